"""``vcore train``: from options to a trained model in a folder, its figures and its plots."""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from vcore_train.config import VcoreConfig
from vcore_train.data import Encoded, encode, plain_text, read_examples
from vcore_train.interrupt import StopAtInterrupt
from vcore_train.models import (
    Size,
    load_model,
    load_tokenizer,
    new_model,
    read_config,
    text_config,
    window_of,
)
from vcore_train.plots import LABELS, plot_losses, plot_panels
from vcore_train.run_folder import (
    METRICS,
    PLOTS,
    SUMMARY,
    ClearFolder,
    claim,
    finished_summary,
    last_checkpoint,
    steps_done,
)
from vcore_train.run_log import MetricsFile, RunLog
from vcore_train.tokenizer import train_tokenizer
from vcore_train.trainer import VcoreTrainer

PANELS = {"kl": "KL from uniform (nats)", "tau": "tau", "ess": "ESS", "alpha": "alpha"}


@dataclass(frozen=True)
class DataOptions:
    """Which rows to read (see :mod:`vcore_train.data`)."""

    data: str
    eval_data: str | None = None
    split: str = "train"
    prompt_field: str | None = None
    response_field: str | None = None
    limit: int | None = None
    eval_limit: int | None = None
    empty_rows: str = "error"
    long_rows: str = "error"
    max_length: int | None = None


@dataclass(frozen=True)
class ModelOptions:
    """A pretrained ``model``, or one from scratch by ``config`` file or ``size``."""

    model: str | None = None
    config: str | None = None
    size: Size = field(default_factory=Size)
    tokenizer: str | None = None
    vocab_size: int = 4096
    dtype: str = "float32"


@dataclass(frozen=True)
class LoraOptions:
    rank: int = 8
    alpha: int = 16
    dropout: float = 0.0
    targets: str = "all-linear"


@dataclass(frozen=True)
class TrainOptions:
    """``arguments``: keywords of :class:`VcoreConfig`, output_dir aside."""

    data: DataOptions
    model: ModelOptions
    out: Path
    arguments: dict[str, Any]
    lora: LoraOptions | None = None
    resume: bool = False
    overwrite: bool = False


@dataclass(frozen=True)
class TrainSummary:
    """``interrupted``: ended by Ctrl-C, with a checkpoint."""

    steps: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    seconds: float
    interrupted: bool


def train(options: TrainOptions, console: Console) -> TrainSummary:
    """Trains, saves model and tokenizer in ``options.out``, and prints a summary.

    The folder then holds the model, ``checkpoint-*`` folders to resume from, ``metrics.jsonl``,
    ``summary.json`` and ``plots/``. User mistakes raise ValueError or OSError before any training.
    """
    arguments = VcoreConfig(output_dir=str(options.out), **options.arguments)
    checkpoint = _checkpoint(options)
    done = None if checkpoint is None else steps_done(checkpoint)
    metrics = MetricsFile(options.out / METRICS, keep_up_to=done)
    tokenizer, model, train_rows, eval_rows = _prepare(options, checkpoint, console)
    if options.lora is not None:
        model = with_lora(model, options.lora)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _announce(options, arguments, train_rows, model, trainable, console)

    log = RunLog(
        LABELS.get(arguments.method, arguments.method),
        console=console,
        file=metrics,
        extra={"method": arguments.method},
    )
    start = time.perf_counter()
    with StopAtInterrupt(console) as interrupt:
        trainer = VcoreTrainer(
            model=model,
            args=arguments,
            train_dataset=train_rows.rows,
            eval_dataset=eval_rows.rows if eval_rows else None,
            processing_class=tokenizer,
            callbacks=[*([ClearFolder(options.out)] if options.overwrite else []), log, interrupt],
        )
        trainer.remove_callback(PrinterCallback)
        if checkpoint is not None and done is not None and done >= _planned_steps(trainer):
            console.print(
                f"The run in {options.out} is finished: {checkpoint} is its last step. Nothing "
                "is left to train; raise --steps or --epochs for more.",
                soft_wrap=True,
            )
            finished = finished_summary(options.out, TrainSummary, done)
            if finished is not None:
                return finished
            _restore(trainer, checkpoint)
        else:
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            finally:
                log.close()
        if not interrupt.requested:
            trainer.save_model(str(options.out))
    seconds = time.perf_counter() - start
    evaluated = None
    if eval_rows and not interrupt.requested:
        evaluated = trainer.evaluate()["eval_loss"]
    summary = _summarise(log, trainer, evaluated, seconds, interrupt.requested)
    _write(options, arguments, log, summary)
    _show(options, arguments, log, summary, console)
    return summary


def _checkpoint(options: TrainOptions) -> str | None:
    """The checkpoint to resume from; refuses to mix two runs in one folder."""
    inputs = {"--model": options.model.model, "--tokenizer": options.model.tokenizer}
    claim(options.out, resume=options.resume, overwrite=options.overwrite, inputs=inputs)
    if not options.resume:
        return None
    last = last_checkpoint(options.out)
    if last is None:
        raise ValueError(f"--resume: no checkpoint-* folder in {options.out}.")
    return last


def _planned_steps(trainer: VcoreTrainer) -> int:
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _restore(trainer: VcoreTrainer, checkpoint: str) -> None:
    """Model and state of a checkpoint, without a step."""
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def _prepare(
    options: TrainOptions, checkpoint: str | None, console: Console
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel, Encoded, Encoded | None]:
    wanted, data = options.model, options.data
    with console.status("Reading data"):
        examples, empty = read_examples(
            data.data,
            split=data.split,
            prompt_field=data.prompt_field,
            response_field=data.response_field,
            limit=data.limit,
            empty=data.empty_rows,
        )
    with console.status("Preparing tokenizer and model"):
        config = read_config(wanted.config) if wanted.config else None
        if wanted.model or wanted.tokenizer or checkpoint:
            tokenizer = load_tokenizer(str(wanted.tokenizer or wanted.model or checkpoint))
        else:
            window = window_of(config) if config is not None else wanted.size.window
            texts = (
                text
                for example in examples
                for text in (f"{plain_text(example.prompt)}\n", example.response)
            )
            tokenizer = train_tokenizer(texts, vocab_size=wanted.vocab_size, window=window)
        if wanted.model:
            model = load_model(
                wanted.model,
                dtype=wanted.dtype,
                bf16=bool(options.arguments.get("bf16")),
                cpu=bool(options.arguments.get("use_cpu")),
            )
            embedded = text_config(model).vocab_size
            if len(tokenizer) > embedded:
                raise ValueError(
                    f"the tokenizer has {len(tokenizer)} entries, the model embeds {embedded}. "
                    "Pass the model's own tokenizer."
                )
        else:
            if config is None:
                config = wanted.size.config()
            model = new_model(config, tokenizer, seed=options.arguments.get("seed", 42))
    window = window_of(model)
    if data.max_length is not None and data.max_length > window:
        raise ValueError(
            f"--max-length {data.max_length} is more than the model's window, {window}."
        )
    fit: dict[str, Any] = {"max_length": data.max_length or window, "too_long": data.long_rows}
    with console.status("Tokenising"):
        train_rows = encode(examples, tokenizer, **fit)
        eval_rows = None
        if data.eval_data:
            held_out, _ = read_examples(
                data.eval_data,
                split=data.split,
                prompt_field=data.prompt_field,
                response_field=data.response_field,
                limit=data.eval_limit,
                empty=data.empty_rows,
            )
            eval_rows = encode(held_out, tokenizer, **fit)
    for count, what in (
        (empty, "rows skipped: empty response"),
        (train_rows.skipped, "rows skipped: too long"),
        (train_rows.truncated, "rows truncated"),
    ):
        if count:
            console.print(f"{count} {what}")
    return tokenizer, model, train_rows, eval_rows


def with_lora(model: PreTrainedModel, lora: LoraOptions) -> Any:
    """A PEFT model around ``model``."""
    from peft import LoraConfig, get_peft_model  # needed only here

    targets: Any = lora.targets
    if targets != "all-linear":
        targets = [name.strip() for name in targets.split(",")]
    return get_peft_model(
        model,
        LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules=targets,
            task_type="CAUSAL_LM",
        ),
    )


def _announce(
    options: TrainOptions,
    arguments: VcoreConfig,
    rows: Encoded,
    model: Any,
    trainable: int,
    console: Console,
) -> None:
    total = sum(p.numel() for p in model.parameters())
    config = text_config(model)
    part = "" if trainable == total else f", {trainable / 1e6:.2f}M of them trained"
    console.print(
        f"[bold]{LABELS.get(arguments.method, arguments.method)}[/] on {options.data.data}: "
        f"{len(rows.rows):,} rows, {rows.tokens:,} tokens, {rows.supervised_tokens:,} supervised",
        soft_wrap=True,
    )
    console.print(
        f"{config.model_type}, {config.num_hidden_layers} layers, {config.hidden_size} wide, "
        f"vocabulary {config.vocab_size:,}: {total / 1e6:.2f}M parameters{part}"
    )


def _summarise(
    log: RunLog,
    trainer: VcoreTrainer,
    evaluated: float | None,
    seconds: float,
    interrupted: bool,
) -> TrainSummary:
    losses = log.series("nll")[1] or log.series("loss")[1]
    part = max(1, len(losses) // 10)
    return TrainSummary(
        steps=trainer.state.global_step,
        first_loss=sum(losses[:part]) / part if losses else math.nan,
        last_loss=sum(losses[-part:]) / part if losses else math.nan,
        eval_loss=evaluated,
        seconds=seconds,
        interrupted=interrupted,
    )


def _write(
    options: TrainOptions, arguments: VcoreConfig, log: RunLog, summary: TrainSummary
) -> None:
    plots = options.out / PLOTS
    plots.mkdir(exist_ok=True)
    nll = log.series("nll") if log.series("nll")[0] else log.series("loss")
    if nll[0]:
        plot_losses(
            plots / "loss.png",
            {arguments.method: nll},
            title=f"Training loss, {LABELS.get(arguments.method, arguments.method)}",
            ylabel="mean loss of a supervised token (nats)",
        )
    panels = {title: log.series(name) for name, title in PANELS.items() if log.series(name)[0]}
    if panels:
        plot_panels(plots / "weights.png", panels, title="Token weights during training")
    record = {**summary.__dict__, "torch_threads": torch.get_num_threads()}
    (options.out / SUMMARY).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


def _show(
    options: TrainOptions,
    arguments: VcoreConfig,
    log: RunLog,
    summary: TrainSummary,
    console: Console,
) -> None:
    table = Table(title="Summary", title_justify="left", show_header=False, box=None)
    table.add_column(style="dim")
    table.add_column()
    table.add_row("steps", f"{summary.steps}")
    table.add_row(
        "training loss", f"{summary.first_loss:.4f} -> {summary.last_loss:.4f} nats/token"
    )
    if summary.eval_loss is not None:
        table.add_row("held-out loss", f"{summary.eval_loss:.4f} nats/token")
    if log.seconds:
        table.add_row("step time", f"{log.median_seconds * 1e3:.0f} ms (median)")
    supervised = log.series("supervised_tokens")[1]
    if supervised and log.seconds:
        per_step = supervised[-1] / summary.steps
        speed = per_step / (sum(log.seconds) / len(log.seconds))
        table.add_row("supervised tokens/s", f"{speed:,.0f}")
    for name, title in {**PANELS, "probe_time_share": "share of time probing"}.items():
        values = log.series(name)[1]
        if values:
            table.add_row(title, f"{sum(values) / len(values):.4g} (mean)")
    for name, title in (
        ("fallback_steps", "steps that fell back to uniform weights"),
        ("saturated", "trajectories short of their KL budget"),
    ):
        values = log.series(name)[1]
        if values and values[-1]:
            table.add_row(title, f"{values[-1]:.0f}")
    console.print(table)
    if summary.interrupted:
        console.print(
            f"Stopped at step {summary.steps}, saved as {options.out}/checkpoint-{summary.steps}. "
            "Continue with the same command and [bold]--resume[/].",
            soft_wrap=True,
        )
    else:
        console.print(f"Model, metrics.jsonl and plots: [bold]{options.out}[/]", soft_wrap=True)
