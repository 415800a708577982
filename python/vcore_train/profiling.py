"""``vcore profile``: a few steps of a real trainer under PyTorch's profiler, phase by phase."""

import importlib
import os
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, schedule
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from vcore_kernels.spans import span
from vcore_train.arithmetic import generate_problems
from vcore_train.config import VcoreConfig
from vcore_train.data import Example, encode, plain_text, read_examples
from vcore_train.models import Size, load_model, load_tokenizer, new_model, window_of
from vcore_train.phase_table import Profile, cells, columns, read_trace, take_apart, to_csv
from vcore_train.phase_table import to_markdown as markdown
from vcore_train.timeline import plot_timeline
from vcore_train.tokenizer import train_tokenizer
from vcore_train.trainer import VcoreTrainer
from vcore_train.training import LoraOptions, with_lora

TRACE, TABLE, FIGURES, TIMELINE = "trace.json.gz", "phases.md", "phases.csv", "timeline.png"
PROTON = "proton"  # .hatchet
FILES = TRACE, TABLE, FIGURES, TIMELINE, f"{PROTON}.hatchet"
# Steps before the profile: one that allocates and initialises, one under the profiler whose own
# start-up would be in it otherwise.
UNTIMED = 2


@dataclass(frozen=True)
class ProfileOptions:
    """What ``vcore profile`` is asked for; ``arguments``: keywords of :class:`VcoreConfig`."""

    out: Path
    steps: int
    arguments: dict[str, Any]
    data: str | None = None
    split: str = "train"
    limit: int | None = None
    model: str | None = None
    dtype: str = "float32"
    size: Size = field(default_factory=Size)
    lora: LoraOptions | None = None
    proton: bool = False
    overwrite: bool = False


class _Steps(TrainerCallback):
    """Tells ``profiler`` of the steps, and makes the optimizer's span."""

    def __init__(self, profiler: Any = None):
        self.profiler = profiler
        self.optimizer: AbstractContextManager | None = None

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.optimizer = span("optimizer")
        self.optimizer.__enter__()

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self.leave()

    def leave(self) -> None:
        if self.optimizer is not None:
            self.optimizer.__exit__(None, None, None)
            self.optimizer = None

    def on_step_end(self, *_: Any, **__: Any) -> None:
        if self.profiler is not None:
            self.profiler.step()


def profile_training(trainer: Trainer, trace: str | Path) -> Profile:
    """Trains, and profiles the steps after the first two into the file ``trace``.

    ``trainer``: any ``transformers.Trainer``; of :class:`VcoreTrainer` and :class:`GvmTrainer` the
    phases have names, of others forward, backward and all are ``other`` and only the optimizer has
    one. ``args.max_steps`` of it says how many steps; set no evaluation, saving or logging that
    should not be in the profile. CPU, CUDA where there is a device, and memory are recorded.

    Returns the :class:`~vcore_train.phase_table.Profile`: ``rows`` are the table.

    Raises ValueError where fewer than three steps were trained, or ``trace`` is not a
    ``.json`` or ``.json.gz``.
    """
    trace = Path(trace)
    if not trace.name.endswith((".json", ".json.gz")):
        raise ValueError(f"profile_training: trace must end in .json or .json.gz, got {trace}.")
    planned = trainer.args.max_steps
    if planned <= UNTIMED:
        raise ValueError(
            f"profile_training: max_steps of the trainer's arguments must be at least "
            f"{UNTIMED + 1}, of which {UNTIMED} are not in the profile; got {planned}."
        )
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop otherwise
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available() and trainer.args.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    done: list[Path] = []

    def export(profiler: Any) -> None:
        profiler.export_chrome_trace(str(trace))
        done.append(trace)

    with profile(
        activities=activities,
        schedule=schedule(wait=UNTIMED - 1, warmup=1, active=planned - UNTIMED, repeat=1),
        on_trace_ready=export,
        profile_memory=True,
        acc_events=True,
    ) as profiler:
        steps = _Steps(profiler)
        trainer.add_callback(steps)
        try:
            trainer.train()
        finally:
            steps.leave()
            trainer.remove_callback(steps)
        if trainer.state.global_step < planned:
            raise ValueError(
                f"profile_training: the trainer stopped after {trainer.state.global_step} of "
                f"{planned} steps."
            )
    assert done
    return take_apart(read_trace(trace))


def why_no_proton() -> str | None:
    """Why Triton's Proton cannot profile here, or None."""
    if not torch.cuda.is_available():
        return "no GPU is usable here; Proton reads the counters of NVIDIA (CUPTI) and AMD GPUs"
    try:
        importlib.import_module("triton.profiler")
    except ImportError as error:
        return f"triton.profiler is not importable ({error}). Install triton"
    return None


def profile_with_proton(trainer: Trainer, out: Path) -> Path:
    """Trains under Proton: ``<out>.hatchet``, a tree of spans and kernels with flops and bytes.

    Raises RuntimeError, with the reason, where Proton cannot run.
    """
    reason = why_no_proton()
    if reason is not None:
        raise RuntimeError(f"--proton: {reason}.")
    from triton import profiler as proton

    session = proton.start(str(out), hook="triton")
    steps = _Steps()
    trainer.add_callback(steps)
    try:
        trainer.train()
    finally:
        steps.leave()
        trainer.remove_callback(steps)
        proton.finalize(session)
    return out.with_name(f"{out.name}.hatchet")


def run_profile(options: ProfileOptions, console: Console) -> Profile:
    """The command: files in ``options.out``, and the table on ``console``.

    User mistakes raise ValueError, OSError or, where Proton cannot run, RuntimeError, before any
    step.
    """
    out = options.out
    _check(options)
    with console.status("Preparing data and model"):
        make, rows = _prepare(options)
    out.mkdir(parents=True, exist_ok=True)
    for name in FILES if options.overwrite else ():
        (out / name).unlink(missing_ok=True)
    console.print(
        f"{options.arguments['method']}: {options.steps} of {options.steps + UNTIMED} steps "
        f"profiled, {options.arguments['per_device_train_batch_size']} of {rows:,} rows a step"
    )
    # Moved to their place when all are there: an interrupted run leaves nothing.
    with tempfile.TemporaryDirectory(dir=out, prefix=".unfinished-") as folder:
        scratch = Path(folder)
        with console.status("Profiling"):
            found = profile_training(make(folder, options.steps + UNTIMED), scratch / TRACE)
        if options.proton:
            with console.status("Profiling with Proton"):
                profile_with_proton(make(folder, options.steps), scratch / PROTON)
        (scratch / TABLE).write_text(markdown(found), encoding="utf-8")
        (scratch / FIGURES).write_text(to_csv(found), encoding="utf-8")
        plot_timeline(scratch / TIMELINE, found)
        files = [name for name in FILES if (scratch / name).exists()]
        for name in files:
            os.replace(scratch / name, out / name)
    console.print(_table(found))
    console.print(f"In {out}: {', '.join(files)}", soft_wrap=True, markup=False)
    return found


def _check(options: ProfileOptions) -> None:
    out = options.out
    if options.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {options.steps}.")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected a folder.")
    if any((out / name).exists() for name in FILES) and not options.overwrite:
        raise ValueError(
            f"{out} holds an earlier profile. Replace it with --overwrite, or choose another --out."
        )
    if options.proton and (reason := why_no_proton()):
        raise RuntimeError(f"--proton: {reason}. Without --proton the rest works.")


def _prepare(options: ProfileOptions) -> tuple[Callable[[str, int], VcoreTrainer], int]:
    """Makes trainers of a folder and a number of steps, each with a model of its own; the rows."""
    arguments = options.arguments
    examples = _examples(options)
    if options.model is not None:
        tokenizer = load_tokenizer(options.model)
    else:
        texts = (t for e in examples for t in (f"{plain_text(e.prompt)}\n", e.response))
        tokenizer = train_tokenizer(texts, vocab_size=4096, window=options.size.window)
    model = _model(options, tokenizer)
    rows = encode(examples, tokenizer, max_length=window_of(model), too_long="skip").rows
    loaded = [model]  # for the first trainer
    batch = arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]
    if len(rows) < batch:
        source = options.data or "the generated data"
        raise ValueError(
            f"{source}: {len(rows)} rows that fit the model's window, and a step takes {batch}. "
            "Give more rows, or lower --batch-size or --accumulation."
        )

    def make(folder: str, steps: int) -> VcoreTrainer:
        trainer = VcoreTrainer(
            model=loaded.pop() if loaded else _model(options, tokenizer),
            args=VcoreConfig(
                output_dir=folder,
                max_steps=steps,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                **arguments,
            ),
            train_dataset=rows,
            processing_class=tokenizer,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    return make, len(rows)


def _examples(options: ProfileOptions) -> list[Example]:
    if options.data is not None:
        return read_examples(options.data, split=options.split, limit=options.limit, empty="skip")[
            0
        ]
    batch = options.arguments["per_device_train_batch_size"]
    count = options.limit or max(256, 2 * batch * options.arguments["gradient_accumulation_steps"])
    problems = generate_problems(count, seed=options.arguments.get("seed", 0))
    return [Example(p.prompt, p.response, f"problem {i}") for i, p in enumerate(problems, 1)]


def _model(options: ProfileOptions, tokenizer: PreTrainedTokenizerBase) -> Any:
    seed = options.arguments.get("seed", 42)
    if options.model is None:
        model: Any = new_model(options.size.config(), tokenizer, seed=seed)
    else:
        model = load_model(
            options.model,
            dtype=options.dtype,
            bf16=bool(options.arguments.get("bf16")),
            cpu=bool(options.arguments.get("use_cpu")),
        )
    return model if options.lora is None else with_lora(model, options.lora)


def _table(profile: Profile) -> Table:
    table = Table(box=None, pad_edge=False)
    for number, name in enumerate(columns(profile)):
        numeric = 0 < number < len(columns(profile)) - 1
        table.add_column(name, justify="right" if numeric else "left", no_wrap=numeric)
    for line in cells(profile, top=2):
        table.add_row(*map(escape, line), style="bold" if line[0] == "step" else None)
    return table
