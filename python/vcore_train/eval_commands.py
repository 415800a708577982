"""``vcore eval``."""

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from vcore_train.command_options import (
    DATA,
    MODEL,
    AnswerField,
    Cpu,
    Overwrite,
    PromptField,
    Unanswered,
    option,
)
from vcore_train.console import console, quiet_other_libraries
from vcore_train.option_checks import check_numbers, flag

Backend = Literal["hf", "vllm"]
Answers = Literal["exact", "math-verify"]

RESPONSES = "Responses"


def evaluate(
    model: Annotated[
        str | None,
        typer.Argument(
            help="A model, or the folder of an adapter: path or name.", show_default=False
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        option("Benchmarks with commas (see --list), or tasks of the harness by name.", panel=DATA),
    ] = None,
    data: Annotated[
        str | None,
        option("Problems of your own: prompts with answers, as vcore gvm reads them.", panel=DATA),
    ] = None,
    prompt_field: PromptField = None,
    answer_field: AnswerField = None,
    unanswered: Unanswered = "error",
    out: Annotated[Path, option("Folder for results.json and the samples.")] = Path("vcore-eval"),
    overwrite: Overwrite = False,
    limit: Annotated[
        int | None, option("Only the first problems of each task: for a trial.", panel=DATA)
    ] = None,
    save_samples: Annotated[
        bool,
        option(
            "Write a file of samples for each task, which --compare needs.",
            "--save-samples/--no-save-samples",
        ),
    ] = True,
    adapter: Annotated[
        str | None, option("LoRA adapter over the model: path or name.", panel=MODEL)
    ] = None,
    tokenizer: Annotated[str | None, option("Tokenizer, if not the model's.", panel=MODEL)] = None,
    dtype: Annotated[
        str, option("Precision of the weights: auto, float32, bfloat16, float16.", panel=MODEL)
    ] = "auto",
    backend: Annotated[Backend, option("What runs the model.", panel=MODEL)] = "hf",
    model_args: Annotated[
        str | None,
        option(
            'More arguments of the harness\' model, as JSON: {"max_length": 8192}.', panel=MODEL
        ),
    ] = None,
    batch_size: Annotated[
        int | None, option("Problems at once.", default="8; vllm decides itself", panel=MODEL)
    ] = None,
    cpu: Cpu = False,
    num_fewshot: Annotated[
        int | None,
        option(
            "Worked examples; not for tasks that are defined without.",
            default="the task's own",
            panel=RESPONSES,
        ),
    ] = None,
    chat_template: Annotated[
        bool,
        option(
            "Put prompts into the tokenizer's chat template.", "--chat-template", panel=RESPONSES
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None, option("Length limit of a response.", default="the task's own", panel=RESPONSES)
    ] = None,
    samples: Annotated[
        int,
        option(
            "Responses a problem: avg@k, maj@k, pass@k (aime24, aime25, math500, --data).",
            panel=RESPONSES,
        ),
    ] = 1,
    temperature: Annotated[
        float | None,
        option("Of sampling.", default="greedy; 0.6 with several --samples", panel=RESPONSES),
    ] = None,
    top_p: Annotated[float, option("Of sampling.", panel=RESPONSES)] = 0.95,
    verifier: Annotated[
        Answers, option("What checks answers (aime24, aime25, math500, --data).", panel=RESPONSES)
    ] = "math-verify",
    verifier_seconds: Annotated[
        float, option("Time limit of one answer, which then scores 0.", panel=RESPONSES)
    ] = 5.0,
    seed: Annotated[
        int, option("Of sampling and of the choice of examples.", panel=RESPONSES)
    ] = 1234,
    allow_code_execution: Annotated[
        bool,
        option(
            "Run the code that the model writes (humaneval_plus, mbpp).", "--allow-code-execution"
        ),
    ] = False,
    list_: Annotated[bool, option("Show the benchmarks and end.", "--list")] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        option("Compare two --out folders problem by problem, and end.", metavar="A B"),
    ] = None,
) -> None:
    """Evaluate a model on benchmarks, through lm-evaluation-harness (docs/evaluation.md)."""
    given = dict(locals())
    if list_:
        _list()
        return
    if compare is not None:
        from vcore_train.evals.compare import show

        show(*compare, console)
        return
    check_numbers({name: value for name, value in given.items() if name != "temperature"})
    for name, value, low in (
        ("samples", samples, 1),
        ("num_fewshot", num_fewshot, 0),
        ("temperature", temperature, 0),
    ):
        if value is not None and not low <= value < math.inf:
            raise ValueError(f"{flag(name)} must be finite and at least {low}, got {value}.")
    if model is None:
        raise ValueError("expected a model, as in: vcore eval MODEL --tasks gsm8k. See --list.")
    if backend == "vllm" and cpu:
        raise ValueError("--cpu means nothing for --backend vllm. Drop one of them.")
    quiet_other_libraries()
    from vcore_train.evals.run import EvalOptions, run

    run(
        EvalOptions(
            model=model,
            tasks=tuple(name.strip() for name in tasks.split(",") if name.strip()) if tasks else (),
            data=data,
            prompt_field=prompt_field,
            answer_field=answer_field,
            unanswered=unanswered,
            out=out,
            adapter=adapter,
            tokenizer=tokenizer,
            dtype=dtype,
            backend=backend,
            model_args=_json(model_args),
            limit=limit,
            batch_size=batch_size,
            num_fewshot=num_fewshot,
            chat_template=chat_template,
            max_new_tokens=max_new_tokens,
            samples=samples,
            temperature=temperature,
            top_p=top_p,
            verifier=verifier,
            verifier_seconds=verifier_seconds,
            seed=seed,
            allow_code_execution=allow_code_execution,
            save_samples=save_samples,
            cpu=cpu,
            overwrite=overwrite,
        ),
        console,
    )


def _list() -> None:
    from vcore_train.evals.tasks import BENCHMARKS

    for name, benchmark in BENCHMARKS.items():
        console.print(f"[bold]{name}[/]  {benchmark.measures}", soft_wrap=True)
        parts = [f"task {benchmark.task}", f"data {benchmark.dataset}", benchmark.licence]
        parts.append(benchmark.source)
        if benchmark.folder is None:
            parts.append("a task file of this library")
        if benchmark.scored:
            parts.append("answers checked by --verifier")
        if benchmark.runs_code:
            parts.append("runs the model's code: --allow-code-execution")
        console.print(f"    {'; '.join(parts)}", soft_wrap=True, style="dim")
    console.print(
        "Any other task of lm-evaluation-harness goes by the harness' own name; where a benchmark "
        "above has the name (gsm8k), harness:NAME is the harness' task.",
        soft_wrap=True,
    )


def _json(text: str | None) -> dict[str, Any]:
    try:
        value = {} if text is None else json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"--model-args {text}: not valid JSON ({error.msg}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"--model-args {text}: expected a JSON object, such as {{}}.")
    return value
