"""``vcore eval``: tasks and a model given to lm-evaluation-harness, its results kept and shown."""

import importlib.util
import json
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console

from vcore_train.data import plain_text
from vcore_train.evals import results
from vcore_train.evals.scoring import judge_with, scored
from vcore_train.evals.tasks import (
    BENCHMARKS,
    Benchmark,
    all_tasks,
    folder_of,
    no_tasks,
    task_files,
    unknown,
)
from vcore_train.option_checks import flag
from vcore_train.prompts import read_prompts
from vcore_train.verifiers import VERIFIERS, Verification

DATA_TASK = "data"
SAMPLING_TEMPERATURE = 0.6  # where several responses are asked for and no temperature is given
# Arguments of the harness' model that have an option of ours, by which results.json names them.
HAVE_OPTIONS = {
    "pretrained": "MODEL",
    "peft": "--adapter",
    "lora_local_path": "--adapter",
    "tokenizer": "--tokenizer",
    "dtype": "--dtype",
    "device": "--cpu (or CUDA_VISIBLE_DEVICES)",
    "batch_size": "--batch-size",
    "seed": "--seed",
}
HARNESS = "harness:"  # before a task's name: the harness' own, where a benchmark here has the name
DTYPES = ("auto", "float32", "bfloat16", "float16")
OFFLINE = (
    "Fetch it once where the hub can be reached and copy the cache (HF_HOME) here, then set "
    "HF_DATASETS_OFFLINE=1 and HF_HUB_OFFLINE=1; or use --data with a file."
)


@dataclass(frozen=True)
class EvalOptions:
    """What to evaluate on what, by the names of ``vcore eval``."""

    model: str
    tasks: tuple[str, ...] = ()
    data: str | None = None
    prompt_field: str | None = None
    answer_field: str | None = None
    unanswered: str = "error"
    out: Path = Path("vcore-eval")
    adapter: str | None = None
    tokenizer: str | None = None
    dtype: str = "auto"
    backend: str = "hf"
    model_args: dict[str, Any] = field(default_factory=dict)
    limit: int | None = None
    batch_size: int | None = None  # 8; vLLM chooses for itself
    num_fewshot: int | None = None
    chat_template: bool = False
    max_new_tokens: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float = 0.95
    verifier: str = "math-verify"
    verifier_seconds: float = 5.0
    seed: int = 1234
    allow_code_execution: bool = False
    save_samples: bool = True
    cpu: bool = False
    overwrite: bool = False

    @property
    def batch(self) -> int | str:
        return self.batch_size or ("auto" if self.backend == "vllm" else 8)

    @property
    def sampling_temperature(self) -> float:
        """0: greedy."""
        if self.temperature is not None:
            return self.temperature
        return SAMPLING_TEMPERATURE if self.samples > 1 else 0.0


def run(options: EvalOptions, console: Console) -> dict[str, Any]:
    """Evaluates, writes ``results.json`` and the samples to ``options.out``, prints a table.

    Returns the content of ``results.json``. User mistakes, and data that cannot be reached, raise
    ValueError or OSError in one line, before the model is loaded where possible.
    """
    check(options)
    results.claim(options.out, overwrite=options.overwrite, data=options.data)
    if options.allow_code_execution:
        os.environ["HF_ALLOW_CODE_EVAL"] = "1"
    with _quiet(), Verification(options.verifier, seconds=options.verifier_seconds) as verification:
        from lm_eval import simple_evaluate

        with console.status("Reading tasks"):
            tasks = [*_tasks(options, verification), *_data_task(options, verification)]
            _check_unique([leaf.config.task for task in tasks for leaf in _leaves(task)])
        with console.status("Loading the model"):
            model = _model(options)
        generation = {"max_gen_toks": options.max_new_tokens} if options.max_new_tokens else None
        try:
            found = simple_evaluate(
                model=model,
                tasks=tasks,
                task_manager=no_tasks(),
                num_fewshot=options.num_fewshot,
                limit=options.limit,
                batch_size=options.batch,
                gen_kwargs=generation,
                apply_chat_template=options.chat_template,
                fewshot_as_multiturn=options.chat_template,
                log_samples=True,
                bootstrap_iters=1000,
                confirm_run_unsafe_code=options.allow_code_execution,
                random_seed=options.seed,
                numpy_random_seed=options.seed,
                torch_random_seed=options.seed,
                fewshot_random_seed=options.seed,
            )
        except (AssertionError, IndexError) as error:
            raise ValueError(_generation_problem(error)) from error
    record = results.record(found, _settings(options))
    results.write(options.out, record, found["samples"] if options.save_samples else {})
    results.show(record, console)
    console.print(f"results.json and samples: {options.out}", soft_wrap=True, markup=False)
    return record


def check(options: EvalOptions) -> None:
    """Raises ValueError for what could only fail later, or would be ignored."""
    if importlib.util.find_spec("lm_eval") is None:
        raise ValueError(
            "vcore eval needs lm-evaluation-harness, which is not installed. Run: pip install "
            "'vcore_kernels[eval]'"
        )
    if not options.tasks and options.data is None:
        raise ValueError("nothing to evaluate on: pass --tasks, --data or both.")
    _check_unique([_benchmark(name).task for name in options.tasks])
    named = ("prompt_field", options.prompt_field), ("answer_field", options.answer_field)
    for name, value in (*named, ("unanswered", options.unanswered == "skip" or None)):
        if value is not None and options.data is None:
            raise ValueError(f"{flag(name)} means nothing without --data.")
    if options.dtype not in DTYPES:
        raise ValueError(f"--dtype must be one of {', '.join(DTYPES)}, got {options.dtype!r}.")
    for name in options.model_args:
        if name in HAVE_OPTIONS:
            raise ValueError(f"--model-args {name}: pass it as {HAVE_OPTIONS[name]} instead.")
    if options.verifier not in VERIFIERS:
        raise ValueError(f"--verifier must be one of {', '.join(VERIFIERS)}.")
    others = [name for name in options.tasks if not _benchmark(name).scored]
    for name, given in (
        ("samples", options.samples > 1),
        ("temperature", options.temperature is not None),
    ):
        if given and others:
            raise ValueError(
                f"{flag(name)} means nothing for {', '.join(others)}, which the harness decodes "
                "and scores in its own way. It is for --data, "
                f"{', '.join(name for name, b in BENCHMARKS.items() if b.scored)}: evaluate the "
                "others in a call of their own."
            )
    if options.samples > 1 and options.sampling_temperature == 0:
        raise ValueError(
            f"--samples {options.samples} at --temperature 0 gives the same response "
            f"{options.samples} times. Raise the temperature, or leave --samples out."
        )
    without = [name for name in options.tasks if _benchmark(name).scored]
    without += ["--data"] if options.data is not None else []
    if options.num_fewshot and without:
        raise ValueError(_no_examples(without))
    running = [name for name in options.tasks if _benchmark(name).runs_code]
    if running and not options.allow_code_execution:
        raise ValueError(_code(running))
    if options.backend == "vllm" and importlib.util.find_spec("vllm") is None:
        raise ValueError("--backend vllm: vllm is not installed. Run: pip install vllm")


def _check_unique(names: Sequence[str]) -> None:
    """Raises where two tasks are one to the harness, which would keep one of their results."""
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(
            f"--tasks: the harness' task {twice} comes twice, by one name, by two, or within a "
            "group. Name it once, or evaluate the two in calls of their own."
        )


def _no_examples(names: list[str]) -> str:
    return (
        f"--num-fewshot means nothing for {', '.join(names)}, defined without worked examples. "
        "Leave it out, or evaluate the others in a call of their own."
    )


def _code(names: list[str]) -> str:
    return (
        f"{', '.join(names)} runs code that the model has written, on this machine. Pass "
        "--allow-code-execution where that can do no harm: in a container without a network and "
        "without anything worth keeping."
    )


def _benchmark(name: str) -> Benchmark:
    """A benchmark of ours, or a stand-in for another task of the harness."""
    task = name.removeprefix(HARNESS)
    other = Benchmark(task=task, folder="", measures="", source="", dataset="", licence="")
    return BENCHMARKS.get(name, other)


# ---- tasks ----


def _tasks(options: EvalOptions, verification: Verification) -> Iterator[Any]:
    others: Any = None  # reads every file of the harness: only where a name is none of ours
    for name in options.tasks:
        known = name in BENCHMARKS
        if not known and others is None:
            others = all_tasks()
        benchmark = _benchmark(name)
        manager = task_files(benchmark) if known else others
        if benchmark.task not in manager.task_index:
            raise unknown(name, manager.all_tasks)
        with _reachable(name, benchmark.dataset):
            if benchmark.scored:
                yield _scored(benchmark, options, verification)
                continue
            loaded = manager._load_spec(benchmark.task)
            found = loaded if isinstance(loaded, list) else [loaded]
        for task in found:
            _prepare(task, name, benchmark, options)
            yield task


def _prepare(task: Any, name: str, benchmark: Benchmark, options: EvalOptions) -> None:
    """Refuses what the harness would ignore or run; raises a limit that cuts solutions short."""
    for leaf in _leaves(task):
        if options.num_fewshot and leaf.get_config("num_fewshot") == 0:
            raise ValueError(_no_examples([name]))
        if getattr(leaf, "UNSAFE_CODE", False) and not options.allow_code_execution:
            raise ValueError(_code([name]))
        if benchmark.max_new_tokens and leaf.get_config("output_type") == "generate_until":
            length = {"max_gen_toks": benchmark.max_new_tokens}
            leaf.set_config(key="generation_kwargs", value=length, update=True)


def _leaves(task: Any) -> list[Any]:
    """The tasks of a group, or the one task."""
    return task.get_all_tasks() if hasattr(task, "get_all_tasks") else [task]


def _scored(benchmark: Benchmark, options: EvalOptions, verification: Verification) -> Any:
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(folder_of(benchmark) / f"{benchmark.task}.yaml")
    return ConfigurableTask(config=_with_our_scores(config, options, verification, benchmark))


def _data_task(options: EvalOptions, verification: Verification) -> Iterator[Any]:
    """The rows of ``--data`` as a task of the harness."""
    if options.data is None:
        return
    import datasets
    from lm_eval.api.task import ConfigurableTask

    prompts, _ = read_prompts(
        options.data,
        prompt_field=options.prompt_field,
        answer_field=options.answer_field,
        unanswered=options.unanswered,
    )
    # Without a template a prompt ends as the trainers end it.
    end = "" if options.chat_template else "\n"
    rows = [{"prompt": plain_text(p.prompt), "answer": p.answer} for p in prompts]
    config = {
        "task": DATA_TASK,
        "custom_dataset": lambda **_: {"test": datasets.Dataset.from_list(rows)},
        "output_type": "generate_until",
        "test_split": "test",
        "doc_to_text": lambda row: row["prompt"] + end,
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "generation_kwargs": {"until": [], "max_gen_toks": 512},
        "metadata": {"version": 1},
    }
    yield ConfigurableTask(config=_with_our_scores(config, options, verification, None))


def _with_our_scores(
    config: dict[str, Any],
    options: EvalOptions,
    verification: Verification,
    benchmark: Benchmark | None,
) -> dict[str, Any]:
    return scored(
        config,
        judge_with(verification),
        samples=options.samples,
        temperature=options.sampling_temperature,
        top_p=options.top_p,
        max_new_tokens=None if benchmark is None else benchmark.max_new_tokens,
    )


@contextmanager
def _reachable(name: str, dataset: str) -> Iterator[None]:
    """Says which data set could not be read, and what to do."""
    import datasets
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except (OSError, HfHubHTTPError, datasets.exceptions.DatasetsError) as error:
        what = f" (data set {dataset})" if dataset else ""
        raise OSError(
            f"--tasks {name}: what it needs from the hub{what} cannot be read ({_line(error)}). "
            f"{OFFLINE}"
        ) from error
    except (ImportError, AssertionError) as error:
        raise ValueError(f"--tasks {name}: {_line(error)}") from error


# ---- model ----


def _model(options: EvalOptions) -> Any:
    """The harness' model: weights from a checkpoint, adapters over them where there are any."""
    from lm_eval.api.registry import get_model
    from transformers import AutoTokenizer

    from vcore_train.models import check_place

    name, adapter, tokenizer = _places(options)
    check_place(name)
    if adapter is not None and Path(adapter).exists():
        _adapter_config(Path(adapter))
    if tokenizer is not None and options.backend == "hf":
        remote = bool(options.model_args.get("trust_remote_code"))
        try:
            AutoTokenizer.from_pretrained(tokenizer, trust_remote_code=remote)
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{tokenizer}: no tokenizer there ({_line(error)})") from error
    arguments: dict[str, Any] = {"pretrained": name, "dtype": options.dtype, "tokenizer": tokenizer}
    common: dict[str, Any] = {"batch_size": options.batch}
    if options.backend == "vllm":
        arguments |= {"lora_local_path": adapter, "seed": options.seed}
    else:
        arguments["peft"] = adapter
        common["device"] = "cpu" if options.cpu else None
    arguments |= options.model_args
    try:
        return get_model(options.backend).create_from_arg_obj(
            {key: value for key, value in arguments.items() if value is not None}, common
        )
    except OSError as error:
        raise OSError(f"{name}: no model there ({_line(error)})") from error
    except TypeError as error:
        raise ValueError(
            f"--model-args {json.dumps(options.model_args)}: {_line(error)}"
        ) from error


def _places(options: EvalOptions) -> tuple[str, str | None, str | None]:
    """The checkpoint, the adapter and the tokenizer: a folder may be an adapter's."""
    folder = Path(options.model)
    if options.adapter is None and (folder / "adapter_config.json").is_file():
        base = _adapter_config(folder).get("base_model_name_or_path")
        if not isinstance(base, str):
            raise ValueError(
                f"{folder}: its adapter_config.json names no base model. Pass the model, and the "
                "folder as --adapter."
            )
        own = options.model if (folder / "tokenizer_config.json").is_file() else None
        return base, options.model, options.tokenizer or own
    return options.model, options.adapter, options.tokenizer


def _adapter_config(folder: Path) -> dict[str, Any]:
    path = folder / "adapter_config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{folder}: not an adapter, which is a folder with a readable adapter_config.json. "
            "Pass the folder that vcore train --lora wrote."
        ) from error
    return config if isinstance(config, dict) else {}


# ---- around ----


@contextmanager
def _quiet() -> Iterator[None]:
    """The harness' notices are about settings that are ours."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def _generation_problem(error: Exception) -> str:
    text = _line(error)
    if "max tokens to generate" in text:
        return f"{text.removeprefix('Invalid configuration: ')} Pass a smaller --max-new-tokens."
    return f"the harness stopped: {text}"


def _settings(options: EvalOptions) -> dict[str, Any]:
    settings = asdict(options) | {
        "temperature": options.sampling_temperature,
        "batch_size": options.batch,
    }
    for name in ("overwrite", "save_samples", "allow_code_execution"):
        settings.pop(name)
    return settings | {"tasks": list(options.tasks), "out": str(options.out)}


def _line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
