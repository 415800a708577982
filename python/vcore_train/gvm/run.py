"""``vcore gvm``: from options to a policy trained on its own responses, figures and plots."""

import importlib
import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedTokenizerBase, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from vcore_train.gvm.config import GvmConfig
from vcore_train.gvm.engines import RolloutEngine, TransformersEngine
from vcore_train.gvm.sampling import Progress
from vcore_train.gvm.trainer import GvmTrainer
from vcore_train.interrupt import StopAtInterrupt
from vcore_train.models import load_model, load_tokenizer, text_config
from vcore_train.plots import plot_panels
from vcore_train.prompts import Prompt, read_prompts
from vcore_train.run_folder import (
    METRICS,
    PLOTS,
    SUMMARY,
    claim,
    clear,
    finished_summary,
    last_checkpoint,
    steps_done,
)
from vcore_train.run_log import MetricsFile, RunLog
from vcore_train.training import LoraOptions, with_lora
from vcore_train.verifiers import VERIFIERS, Verifier

ENGINES = ("transformers", "vllm")
PANELS = {
    "accept_rate": "share of responses accepted",
    "eval_accuracy": "held-out accuracy",
    "response_tokens": "tokens a response",
    "truncated": "responses cut at the limit",
    "clip_fraction": "share of tokens clipped",
    "kl_old": "KL from the policy that sampled (nats)",
}


@dataclass(frozen=True)
class PromptOptions:
    """Which prompts to read (see :mod:`vcore_train.prompts`)."""

    data: str
    eval_data: str | None = None
    split: str = "train"
    prompt_field: str | None = None
    answer_field: str | None = None
    limit: int | None = None
    eval_limit: int | None = None
    unanswered: str = "error"
    suffix: str = ""


@dataclass(frozen=True)
class GvmOptions:
    """``arguments``: keywords of :class:`GvmConfig`, output_dir aside."""

    prompts: PromptOptions
    model: str
    out: Path
    arguments: dict[str, Any]
    tokenizer: str | None = None
    dtype: str = "float32"
    lora: LoraOptions | None = None
    verifier: str = "math-verify"
    engine: str = "transformers"
    engine_options: dict[str, Any] = field(default_factory=dict)
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class GvmSummary:
    """Accuracies are None without evaluation data; ``interrupted``: ended by Ctrl-C."""

    iterations: int
    steps: int
    rollouts: int
    first_accept_rate: float
    last_accept_rate: float
    first_accuracy: float | None
    last_accuracy: float | None
    seconds: float
    interrupted: bool


def run(options: GvmOptions, console: Console) -> GvmSummary:
    """Trains, saves model and tokenizer in ``options.out``, and prints a summary.

    The folder then holds the model, ``rollouts/``, ``checkpoint-*`` folders, ``metrics.jsonl``,
    ``summary.json`` and ``plots/``. User mistakes raise ValueError or OSError before any sampling.
    """
    inputs = {"--model": options.model, "--tokenizer": options.tokenizer}
    claim(options.out, resume=options.resume, overwrite=options.overwrite, inputs=inputs)
    checkpoint = last_checkpoint(options.out) if options.resume else None
    done = None if checkpoint is None else steps_done(checkpoint)
    arguments = GvmConfig(
        output_dir=str(options.out),
        eval_on_start=options.prompts.eval_data is not None and checkpoint is None,
        **options.arguments,
    )
    if done is not None and done >= arguments.max_steps:
        finished = finished_summary(options.out, GvmSummary, done)
        if finished is not None:
            console.print(
                f"The run in {options.out} is finished: {checkpoint} is its last step. Raise "
                "--iterations for more.",
                soft_wrap=True,
            )
            return finished
    metrics = MetricsFile(options.out / METRICS, keep_up_to=done)
    verifier = find_verifier(options.verifier)
    prompts, held_out = _read(options.prompts, console)
    with console.status("Loading model and tokenizer"):
        tokenizer = load_tokenizer(options.tokenizer or options.model)
        model: Any = load_model(
            options.model, dtype=options.dtype, bf16=arguments.bf16, cpu=arguments.use_cpu
        )
        if options.lora is not None:
            model = with_lora(model, options.lora)
        engine = _engine(options, tokenizer)
    _announce(options, arguments, prompts, model, console)

    log = RunLog(
        arguments.objective.upper(),
        console=console,
        file=metrics,
        extra={"objective": arguments.objective, "allocation": arguments.allocation},
        figures=("loss", "ratio", "clip_fraction"),
    )
    start = time.perf_counter()
    with StopAtInterrupt(console) as interrupt:
        trainer = GvmTrainer(
            model,
            arguments,
            train_dataset=prompts,
            processing_class=tokenizer,
            verifier=verifier,
            engine=engine,
            eval_dataset=held_out,
            callbacks=[log, IterationLines(console, arguments.iterations), interrupt],
        )
        trainer.remove_callback(PrinterCallback)
        trainer.progress = _stopping(log.task, interrupt)
        if options.overwrite and options.out.exists():
            clear(options.out)
        try:
            trainer.train(resume_from_checkpoint=options.resume)
        except KeyboardInterrupt:
            if not interrupt.requested:
                raise
        finally:
            log.close()
        if not interrupt.requested:
            trainer.save_model(str(options.out))
    summary = _summarise(log, trainer, time.perf_counter() - start, interrupt.requested)
    _write(options.out, log, summary)
    _show(options, arguments, log, summary, console)
    return summary


def _stopping(progress: Progress, interrupt: StopAtInterrupt) -> Progress:
    """``progress``, ending the run at the first step of a bar after Ctrl-C: sampling is kept."""

    @contextmanager
    def watched(what: str, total: int) -> Iterator[Callable[[int], Any]]:
        with progress(what, total) as advance:

            def step(count: int) -> None:
                advance(count)
                if interrupt.requested:
                    raise KeyboardInterrupt

            yield step

    return watched


def find_verifier(name: str) -> str | Verifier:
    """A verifier by its name, or the function that ``module:function`` means."""
    if name in VERIFIERS:
        return name
    module, _, function = name.partition(":")
    try:
        if not function:
            raise ValueError("no such verifier")
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"--verifier {name}: {error}. Expected {', '.join(VERIFIERS)}, or module:function of "
            "a module that can be imported."
        ) from error


def _engine(options: GvmOptions, tokenizer: PreTrainedTokenizerBase) -> RolloutEngine:
    if options.engine == "vllm":
        from vcore_train.gvm.vllm_engine import VllmEngine

        return VllmEngine(options.model, tokenizer, **options.engine_options)
    return TransformersEngine(tokenizer)


def _read(options: PromptOptions, console: Console) -> tuple[list[Prompt], list[Prompt] | None]:
    fields: dict[str, Any] = {
        "split": options.split,
        "prompt_field": options.prompt_field,
        "answer_field": options.answer_field,
        "unanswered": options.unanswered,
        "suffix": options.suffix,
    }
    with console.status("Reading prompts"):
        prompts, skipped = read_prompts(options.data, limit=options.limit, **fields)
        held_out = None
        if options.eval_data:
            held_out, _ = read_prompts(options.eval_data, limit=options.eval_limit, **fields)
    if skipped:
        console.print(f"{skipped} rows skipped: no reference answer")
    return prompts, held_out


class IterationLines(TrainerCallback):
    """A line for each iteration and evaluation."""

    def __init__(self, console: Console, iterations: int):
        self.console, self.iterations = console, iterations

    def on_log(self, args, state, control, logs=None, **kwargs):
        row = logs or {}
        if "eval_accuracy" in row:
            self.console.print(f"  held-out accuracy {100 * row['eval_accuracy']:.1f}%")
        if "accept_rate" not in row:
            return
        prompts = row["prompts_accepted"] + row["prompts_rejected"] + row["prompts_solved"]
        parts = [
            f"iteration {row['iteration'] + 1}/{self.iterations}",
            f"{row['rollouts']:,.0f} rollouts",
            f"{100 * row['accept_rate']:.1f}% accepted",
            f"of {prompts:.0f} prompts {row['prompts_rejected']:.0f} never, "
            f"{row['prompts_solved']:.0f} always",
            f"{row['samples_min']:.0f} to {row['samples_max']:.0f} samples each",
        ]
        for name, text in (
            ("truncated", "cut at the length limit"),
            ("unverified", "not verified"),
            ("missing", "not returned by the engine"),
            ("empty_steps", "steps without a response"),
        ):
            if row[name]:
                parts.append(f"{row[name]:.0f} {text}")
        self.console.print("; ".join(parts), soft_wrap=True)


def _announce(
    options: GvmOptions, arguments: GvmConfig, prompts: list[Prompt], model: Any, console: Console
) -> None:
    taken = arguments.prompts_per_iteration or len(prompts)
    total = sum(p.numel() for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    part = "" if trainable == total else f", {trainable / 1e6:.2f}M of them trained"
    stage1 = f", {arguments.stage1} of them in stage 1" if arguments.stage1 else ""
    console.print(
        f"[bold]{arguments.objective.upper()}[/], allocation {arguments.allocation}: "
        f"{len(prompts):,} prompts of {options.prompts.data}; each of {arguments.iterations} "
        f"iterations samples {arguments.samples_per_prompt} responses for each of {taken:,} "
        f"prompts on average{stage1}, then takes {arguments.steps_of_iteration} optimizer steps",
        soft_wrap=True,
    )
    console.print(
        f"{text_config(model).model_type}: {total / 1e6:.2f}M parameters{part}; verifier "
        f"{options.verifier}, engine {options.engine}"
    )


def _summarise(log: RunLog, trainer: GvmTrainer, seconds: float, interrupted: bool) -> GvmSummary:
    rates = log.series("accept_rate")[1]
    accuracies = log.series("eval_accuracy")[1]
    rollouts = log.series("rollouts")[1]
    return GvmSummary(
        iterations=len(rates),
        steps=trainer.state.global_step,
        rollouts=int(rollouts[-1]) if rollouts else 0,
        first_accept_rate=rates[0] if rates else math.nan,
        last_accept_rate=rates[-1] if rates else math.nan,
        first_accuracy=accuracies[0] if accuracies else None,
        last_accuracy=accuracies[-1] if accuracies else None,
        seconds=seconds,
        interrupted=interrupted,
    )


def _write(out: Path, log: RunLog, summary: GvmSummary) -> None:
    plots = out / PLOTS
    plots.mkdir(exist_ok=True)
    panels = {title: log.series(name) for name, title in PANELS.items() if log.series(name)[0]}
    if panels:
        plot_panels(plots / "run.png", panels, title="Responses and updates")
    record = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in {**asdict(summary), "torch_threads": torch.get_num_threads()}.items()
    }
    (out / SUMMARY).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _show(
    options: GvmOptions,
    arguments: GvmConfig,
    log: RunLog,
    summary: GvmSummary,
    console: Console,
) -> None:
    table = Table(title="Summary", title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("iterations", f"{summary.iterations} of {arguments.iterations}")
    table.add_row("optimizer steps", f"{summary.steps}")
    table.add_row("rollouts", f"{summary.rollouts:,}")
    if summary.iterations:
        table.add_row(
            "accepted",
            f"{100 * summary.first_accept_rate:.1f}% -> {100 * summary.last_accept_rate:.1f}%",
        )
    if summary.first_accuracy is not None and summary.last_accuracy is not None:
        table.add_row(
            "held-out accuracy",
            f"{100 * summary.first_accuracy:.1f}% -> {100 * summary.last_accuracy:.1f}%",
        )
    for name, title in (
        ("truncated", "responses cut at the length limit"),
        ("unverified", "responses that could not be verified"),
        ("missing", "responses that the engine did not return"),
        ("empty_steps", "optimizer steps without a response"),
        ("fell_back", "iterations whose samples were shared evenly"),
    ):
        total = sum(log.series(name)[1])
        if total:
            table.add_row(title, f"{total:,.0f}")
    for name, title in (("e_step_seconds", "sampling"), ("m_step_seconds", "training")):
        values = log.series(name)[1]
        if values:
            table.add_row(f"time {title}", f"{sum(values):.1f} s")
    console.print(table)
    if summary.iterations and not summary.last_accept_rate:
        console.print(
            "No prompt was accepted in the last iteration: no response had a positive reward. "
            "Start from a model that solves some prompts, or take easier ones."
        )
    if summary.interrupted:
        console.print(
            f"Stopped at step {summary.steps}; the responses sampled so far are in {options.out}. "
            "Continue with the same command and [bold]--resume[/].",
            soft_wrap=True,
        )
    else:
        console.print(
            f"Model, rollouts, metrics.jsonl and plots: [bold]{options.out}[/]", soft_wrap=True
        )
