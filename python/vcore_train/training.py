"""``vcore train``: from options to a trained model in a folder, its figures and its plots."""

import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from vcore_train.config import VcoreConfig
from vcore_train.config_file import check_record
from vcore_train.data import Encoded, Example, encode, plain_text, read_examples
from vcore_train.interrupt import StopAtInterrupt
from vcore_train.launch import (
    check_same,
    is_main,
    lost_contact,
    on_main,
    process_count,
    together,
)
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
    BeginRun,
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
    """``arguments``: keywords of :class:`VcoreConfig`, output_dir aside. ``record``: the text of
    ``config.yaml`` in the folder of the run.
    """

    data: DataOptions
    model: ModelOptions
    out: Path
    arguments: dict[str, Any]
    lora: LoraOptions | None = None
    resume: bool = False
    overwrite: bool = False
    record: str | None = None


@dataclass(frozen=True)
class TrainSummary:
    """``interrupted``: ended by Ctrl-C or SIGTERM, with a checkpoint."""

    steps: int
    first_loss: float
    last_loss: float
    eval_loss: float | None
    seconds: float
    interrupted: bool


def train(options: TrainOptions, console: Console) -> TrainSummary:
    """Trains, saves model and tokenizer in ``options.out``, and prints a summary.

    The folder then holds the model, ``checkpoint-*`` folders to resume from, ``metrics.jsonl``,
    ``summary.json``, ``plots/`` and ``config.yaml``, the options. User mistakes raise ValueError or
    OSError before any training.

    In several processes (:mod:`vcore_train.launch`) all call this; the main one writes the files.
    ``options.out`` is one folder for all of them.
    """
    _check_sharding(options)
    arguments = VcoreConfig(output_dir=str(options.out), **options.arguments)
    checkpoint, done, metrics = on_main(lambda: _claimed(options))
    tokenizer, model, train_rows, eval_rows = _prepare(options, checkpoint, console)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    _announce(options, arguments, train_rows, model, trainable, console)

    log = RunLog(
        LABELS.get(arguments.method, arguments.method),
        console=console,
        file=metrics if is_main() else None,
        extra={"method": arguments.method},
    )
    begin = BeginRun(options.out, overwrite=options.overwrite, record=options.record)
    start = time.perf_counter()
    with StopAtInterrupt(console) as interrupt:
        with together():
            trainer = VcoreTrainer(
                model=model,
                args=arguments,
                train_dataset=train_rows.rows,
                eval_dataset=eval_rows.rows if eval_rows else None,
                processing_class=tokenizer,
                callbacks=[begin, log, interrupt],
            )
        trainer.remove_callback(PrinterCallback)
        if checkpoint is not None and done is not None and done >= _planned_steps(trainer):
            console.print(
                f"The run in {options.out} is finished: {checkpoint} is its last step. Nothing "
                "is left to train; raise --steps or --epochs for more.",
                soft_wrap=True,
            )
            finished = on_main(lambda: finished_summary(options.out, TrainSummary, done))
            if finished is not None:
                return finished
            _restore(trainer, checkpoint)
        else:
            try:
                trainer.train(resume_from_checkpoint=checkpoint)
            except Exception as error:
                if lost_contact(error):
                    raise RuntimeError(_lost(options.out, error)) from error
                raise
            finally:
                log.close()
        stopped = interrupt.requested_anywhere(arguments.device)
        if not stopped:
            _save_model(trainer, options.out)
    seconds = time.perf_counter() - start
    evaluated = None
    if eval_rows and not stopped:
        evaluated = trainer.evaluate()["eval_loss"]
    summary = _summarise(log, trainer, evaluated, seconds, stopped)
    if is_main():
        _write(options, arguments, log, summary)
    _show(options, arguments, log, summary, console)
    return summary


def sharding_arguments(strategy: str | None, config: str | None) -> dict[str, Any]:
    """``fsdp`` and ``fsdp_config`` of TrainingArguments; {} without a ``strategy``.

    ``strategy``: ``"full_shard"`` or ``"shard_grad_op"``. ``config``: a JSON file with more of
    ``fsdp_config``, and the last word. FSDP2 unless it says otherwise.

    Raises ValueError or OSError where the file is not readable.
    """
    if strategy is None:
        return {}
    more: Any = {}
    if config is not None:
        try:
            more = json.loads(Path(config).read_text(encoding="utf-8"))
        except json.JSONDecodeError as error:
            raise ValueError(f"--fsdp-config {config}: not valid JSON ({error}).") from error
        if not isinstance(more, dict):
            raise ValueError(f"--fsdp-config {config}: expected a JSON object.")
    more = {name.removeprefix("fsdp_"): value for name, value in more.items()}
    given = {"version": 2, "reshard_after_forward": strategy == "full_shard"}
    return {"fsdp": True, "fsdp_config": given | more}


def _check_sharding(options: TrainOptions) -> None:
    """Raises ValueError where FSDP was asked for, here or of accelerate, and would be left out."""
    by_launcher = os.environ.get("ACCELERATE_USE_FSDP", "").lower() in ("true", "1")
    if not (options.arguments.get("fsdp") or by_launcher):
        return
    asked = "accelerate's configuration (FSDP)" if by_launcher else "--fsdp"
    if options.arguments.get("use_cpu"):
        raise ValueError(
            f"{asked} shards over GPUs, and this run uses the CPU, where accelerate shards "
            "nothing. Leave it out: the processes then hold a copy of the model each."
        )
    if process_count() == 1:
        raise ValueError(
            f"{asked} shards over several processes, and there is one. Start them with torchrun "
            "--nproc-per-node, or leave it out."
        )


def _claimed(options: TrainOptions) -> tuple[str | None, int | None, MetricsFile]:
    """The checkpoint to resume from, its step, and the metrics up to it.

    Refuses to mix two runs in one folder.
    """
    inputs = {"--model": options.model.model, "--tokenizer": options.model.tokenizer}
    claim(options.out, resume=options.resume, overwrite=options.overwrite, inputs=inputs)
    if options.record is not None:
        check_record(options.out)
    checkpoint = done = None
    if options.resume:
        checkpoint = last_checkpoint(options.out)
        if checkpoint is None:
            raise ValueError(f"--resume: no checkpoint-* folder in {options.out}.")
        done = steps_done(checkpoint)
    return checkpoint, done, MetricsFile(options.out / METRICS, keep_up_to=done)


def _check_same_data(train_rows: Encoded, eval_rows: Encoded | None) -> None:
    """Raises ValueError where the processes read different data, and would wait for each other."""
    counts = {"training rows": len(train_rows.rows), "training tokens": train_rows.tokens}
    if eval_rows is not None:
        counts |= {"held-out rows": len(eval_rows.rows), "held-out tokens": eval_rows.tokens}
    check_same(counts, "Give every process the same data and options.")


def _save_model(trainer: VcoreTrainer, out: Path) -> None:
    """The whole model, also of one that is sharded: all processes take part."""
    if trainer.is_fsdp_enabled:
        trainer.accelerator.state.fsdp_plugin.set_state_dict_type("FULL_STATE_DICT")
    trainer.save_model(str(out))


def _lost(out: Path, error: BaseException) -> str:
    last = last_checkpoint(out)
    mend = (
        "There is no checkpoint to continue from"
        if last is None
        else f"Continue from {last} with --resume"
    )
    return f"lost contact with another process, which has ended or hangs. {mend}. ({error})"


def _planned_steps(trainer: VcoreTrainer) -> int:
    return trainer.set_initial_training_values(trainer.args, trainer.get_train_dataloader())[-1]


def _restore(trainer: VcoreTrainer, checkpoint: str) -> None:
    """Model and state of a checkpoint, without a step."""
    trainer._load_from_checkpoint(checkpoint)
    trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / TRAINER_STATE_NAME))


def _prepare(
    options: TrainOptions, checkpoint: str | None, console: Console
) -> tuple[PreTrainedTokenizerBase, Any, Encoded, Encoded | None]:
    """Each process reads the data and the model; a tokenizer is trained once for all."""
    wanted, data = options.model, options.data
    with console.status("Reading data"), together():
        config = read_config(wanted.config) if wanted.config else None
        examples, empty = _read(data, data.data, data.limit)
        held_out = None
        if data.eval_data:
            held_out, _ = _read(data, data.eval_data, data.eval_limit)
    with console.status("Preparing tokenizer and model"):
        source = wanted.tokenizer or wanted.model or checkpoint
        if source is None:
            window = window_of(config) if config is not None else wanted.size.window
            tokenizer: PreTrainedTokenizerBase = on_main(
                lambda: train_tokenizer(
                    _texts(examples), vocab_size=wanted.vocab_size, window=window
                )
            )
        with together():
            if source is not None:
                tokenizer = load_tokenizer(str(source))
            model = _model(options, config, tokenizer)
    window = window_of(model)
    with console.status("Tokenising"), together():
        if data.max_length is not None and data.max_length > window:
            raise ValueError(
                f"--max-length {data.max_length} is more than the model's window, {window}."
            )
        fit: dict[str, Any] = {"max_length": data.max_length or window, "too_long": data.long_rows}
        train_rows = encode(examples, tokenizer, **fit)
        eval_rows = None if held_out is None else encode(held_out, tokenizer, **fit)
    _check_same_data(train_rows, eval_rows)
    for count, what in (
        (empty, "rows skipped: empty response"),
        (train_rows.skipped, "rows skipped: too long"),
        (train_rows.truncated, "rows truncated"),
    ):
        if count:
            console.print(f"{count} {what}")
    return tokenizer, model, train_rows, eval_rows


def _read(options: DataOptions, data: str, limit: int | None) -> tuple[list[Example], int]:
    return read_examples(
        data,
        split=options.split,
        prompt_field=options.prompt_field,
        response_field=options.response_field,
        limit=limit,
        empty=options.empty_rows,
    )


def _texts(examples: list[Example]) -> Iterator[str]:
    for example in examples:
        yield f"{plain_text(example.prompt)}\n"
        yield example.response


def _model(
    options: TrainOptions, config: PretrainedConfig | None, tokenizer: PreTrainedTokenizerBase
) -> Any:
    """On the CPU; the trainer takes it to the device of this process."""
    wanted, seed = options.model, options.arguments.get("seed", 42)
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
        model = new_model(wanted.size.config() if config is None else config, tokenizer, seed=seed)
    if options.lora is None:
        return model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return with_lora(model, options.lora)


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
