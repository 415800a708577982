"""``vcore demo``: four ways to supervise, one small model, the same batches, side by side.

Every method continues from the same weights: a Qwen3-architecture model that learnt the form of the
solutions in a short run of plain supervision. From random weights there would be nothing to
compare: DFT scales each token's loss by its probability, iw-SFT by its probability relative to the
start, and both are about 1 / vocabulary then.
"""

import copy
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from vcore_train.arithmetic import Problem, answer_of, generate_problems
from vcore_train.config import DEFAULT_KL_BUDGET, VcoreConfig
from vcore_train.data import Example, encode, prompt_tokens
from vcore_train.evaluation import RowLosses, greedy_responses, row_losses
from vcore_train.models import Size, new_model
from vcore_train.plots import LABELS, plot_accuracy, plot_losses
from vcore_train.run_log import MetricsFile, RunLog
from vcore_train.show_weights import weigh_trajectory
from vcore_train.step_time import interleaved_step_seconds
from vcore_train.tokenizer import train_tokenizer
from vcore_train.trainer import VcoreTrainer
from vcore_train.weights_page import weights_page

METHODS = ("sft", "dft", "iw_sft", "vcore")
ROW = dict[str, list[int]]


@dataclass(frozen=True)
class Scale:
    """How large a demo is. ``largest`` and ``operations`` set the difficulty of its problems."""

    size: Size
    start_steps: int
    steps: int
    batch: int = 16
    held_out: int = 320
    vocab_size: int = 512
    largest: int = 20
    operations: int = 3
    start_lr: float = 3e-3
    lr: float = 1.5e-3
    kl_budget: float = DEFAULT_KL_BUDGET
    direction: str = VcoreConfig.direction
    probe_rows: int = 64
    timed_rounds: int = 7


FULL = Scale(Size(layers=3, hidden=128, heads=4, window=256), start_steps=300, steps=250)
QUICK = Scale(
    Size(layers=1, hidden=32, heads=2, window=256),
    start_steps=3,
    steps=4,
    batch=4,
    held_out=8,
    vocab_size=300,
    probe_rows=4,
    timed_rounds=1,
)


@dataclass(frozen=True)
class Outcome:
    """One row of the table: how a model does on the held-out problems, and what a step cost."""

    method: str
    losses: RowLosses
    correct: list[bool]
    tokens_per_second: float = math.nan
    step_seconds: float = math.nan

    @property
    def accuracy(self) -> float:
        return sum(self.correct) / len(self.correct)


@dataclass(frozen=True)
class Data:
    tokenizer: PreTrainedTokenizerBase
    start_rows: list[ROW]
    rows: list[ROW]
    held_out: list[Problem]
    held_out_rows: list[ROW]


def run_demo(
    scale: Scale, *, steps: int | None, seed: int, out: Path, console: Console
) -> list[Outcome]:
    """Runs the comparison and writes everything into ``out``; returns the table's rows."""
    if steps is not None:
        if steps < 1:
            raise ValueError(f"--steps must be at least 1, got {steps}.")
        scale = replace(scale, steps=steps)
    out.mkdir(parents=True, exist_ok=True)
    metrics = MetricsFile(out / "metrics.jsonl")
    data = make_data(scale, seed, out)
    start = new_model(scale.size.config(), data.tokenizer, seed=seed)
    console.print(
        f"Arithmetic word problems and expressions of 1 to {scale.operations} steps; "
        f"{len(data.held_out)} held-out problems share no calculation with the training data."
    )
    console.print(
        f"Qwen3, {scale.size.layers} layers, {scale.size.hidden} wide, "
        f"{sum(p.numel() for p in start.parameters()) / 1e6:.2f}M parameters, "
        f"{torch.get_num_threads()} CPU threads, seed {seed}."
    )
    console.print(
        f"{scale.start_steps} steps of SFT give the start, then each method continues from it for "
        f"{scale.steps} steps on the same batches.\n"
        f"VCORE: KL budget {scale.kl_budget} nats, direction {scale.direction!r}.\n"
    )
    _train(start, "sft", data.start_rows, scale, seed, out, console, metrics, start=True)
    outcomes = [_judge("start", start, data)]
    logs: dict[str, RunLog] = {}
    trainers: dict[str, VcoreTrainer] = {}
    for method in METHODS:
        model = copy.deepcopy(start)
        logs[method], trainers[method] = _train(
            model, method, data.rows, scale, seed, out, console, metrics
        )
        model.save_pretrained(out / "models" / method)
        data.tokenizer.save_pretrained(out / "models" / method)
        with console.status(f"Held-out problems, {LABELS[method]}"):
            outcomes.append(_judge(method, model, data))
        if method == "vcore":
            _weights(out, model, data, scale)
    with console.status("Step times, the methods in turns"):
        seconds = interleaved_step_seconds(trainers, rounds=scale.timed_rounds)
    per_step = sum(len(row["input_ids"]) for row in data.rows) / scale.steps
    outcomes = [
        replace(o, step_seconds=seconds[o.method], tokens_per_second=per_step / seconds[o.method])
        if o.method in seconds
        else o
        for o in outcomes
    ]
    for outcome in outcomes:
        metrics.append(_record(outcome))
    _plot(out, outcomes, logs, data, scale)
    console.print()
    console.print(results_table(outcomes))
    if scale.size == QUICK.size:
        console.print("--quick: nothing was learnt, the figures only show that everything runs.")
    for line in reading(outcomes, scale):
        console.print(Padding(line, (0, 0, 0, 2)))
    console.print(
        f"\nPlots, metrics.jsonl, weights.html and the models: [bold]{out}[/]", soft_wrap=True
    )
    console.print(
        f"More weights: vcore show-weights {out}/models/vcore {out}/held_out.jsonl --row 2",
        style="dim",
        soft_wrap=True,
    )
    return outcomes


def make_data(scale: Scale, seed: int, out: Path) -> Data:
    """Problems, written to ``out`` as JSONL, and their token rows."""
    difficulty: dict[str, Any] = {"steps": (1, scale.operations), "largest": scale.largest}
    start_count = scale.start_steps * scale.batch
    problems = generate_problems(start_count + scale.steps * scale.batch, seed=seed, **difficulty)
    held_out = generate_problems(scale.held_out, seed=seed, held_out=True, **difficulty)
    for name, part in (("train", problems), ("held_out", held_out)):
        lines = (json.dumps({"prompt": p.prompt, "response": p.response}) for p in part)
        (out / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    texts = (text for p in problems for text in (f"{p.prompt}\n", p.response))
    tokenizer = train_tokenizer(texts, vocab_size=scale.vocab_size, window=scale.size.window)

    def rows(part: Sequence[Problem]) -> list[ROW]:
        examples = [Example(p.prompt, p.response, "") for p in part]
        return encode(examples, tokenizer, max_length=scale.size.window).rows

    return Data(
        tokenizer,
        rows(problems[:start_count]),
        rows(problems[start_count:]),
        held_out,
        rows(held_out),
    )


def _train(
    model: PreTrainedModel,
    method: str,
    rows: list[ROW],
    scale: Scale,
    seed: int,
    out: Path,
    console: Console,
    metrics: MetricsFile,
    *,
    start: bool = False,
) -> tuple[RunLog, VcoreTrainer]:
    name = "start" if start else method
    log = RunLog(LABELS[name], console=console, file=metrics, extra={"method": name})
    steps = scale.start_steps if start else scale.steps
    arguments = VcoreConfig(
        output_dir=str(out / "models" / name),
        method=method,
        kl_budget=scale.kl_budget,
        direction=scale.direction,
        max_steps=steps,
        per_device_train_batch_size=scale.batch,
        learning_rate=scale.start_lr if start else scale.lr,
        lr_scheduler_type="constant_with_warmup" if start else "linear",
        warmup_steps=min(50, steps // 4),
        adam_beta2=0.98,
        use_cpu=not torch.accelerator.is_available(),
        seed=seed,
        save_strategy="no",
        logging_steps=1,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = VcoreTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        processing_class=None,
        callbacks=[log],
    )
    trainer.remove_callback(PrinterCallback)
    try:
        trainer.train()
    finally:
        log.close()
    return log, trainer


def _judge(method: str, model: PreTrainedModel, data: Data) -> Outcome:
    prompts = prompt_tokens([problem.prompt for problem in data.held_out], data.tokenizer)
    longest = max(
        len(row["input_ids"]) - len(p) for row, p in zip(data.held_out_rows, prompts, strict=True)
    )
    responses = greedy_responses(model, data.tokenizer, prompts, max_new_tokens=longest)
    correct = [
        answer_of(response) == problem.answer
        for response, problem in zip(responses, data.held_out, strict=True)
    ]
    return Outcome(method, row_losses(model, data.held_out_rows), correct)


def _record(outcome: Outcome) -> dict[str, Any]:
    return {
        "method": outcome.method,
        "step": None,
        "held_out_loss": outcome.losses.mean,
        "accuracy": outcome.accuracy,
        "tokens_per_second": outcome.tokens_per_second,
        "step_seconds": outcome.step_seconds,
    }


# ---- the table and what it says ----


def results_table(outcomes: Sequence[Outcome]) -> Table:
    sft = next(outcome for outcome in outcomes if outcome.method == "sft")
    table = Table(title="Held-out problems", title_justify="left")
    table.add_column("method")
    for heading in ("held-out loss", "exact match", "tokens/s", "ms/step", "time / SFT"):
        table.add_column(heading, justify="right")
    for outcome in outcomes:
        cells = [f"{outcome.losses.mean:.4f}", _percent(outcome)]
        if math.isnan(outcome.step_seconds):
            cells += ["", "", ""]
        else:
            cells += [
                f"{outcome.tokens_per_second:,.0f}",
                f"{outcome.step_seconds * 1e3:.0f}",
                f"{outcome.step_seconds / sft.step_seconds:.2f}",
            ]
        table.add_row(LABELS[outcome.method], *cells)
    return table


def _percent(outcome: Outcome) -> str:
    error = standard_error(outcome.correct)
    return f"{100 * outcome.accuracy:.1f}% \u00b1 {100 * error:.1f}"


def standard_error(correct: Sequence[bool]) -> float:
    share = sum(correct) / len(correct)
    return math.sqrt(share * (1 - share) / len(correct))


@dataclass(frozen=True)
class Difference:
    """A paired difference over the held-out problems, with its standard error."""

    value: float
    error: float

    @property
    def clear(self) -> bool:
        """Beyond two standard errors."""
        return abs(self.value) > 2 * self.error


def accuracy_difference(a: Outcome, b: Outcome) -> Difference:
    """Accuracy of a minus that of b, from the problems on which they differ."""
    pairs = [int(x) - int(y) for x, y in zip(a.correct, b.correct, strict=True)]
    count, mean = len(pairs), sum(pairs) / len(pairs)
    variance = sum((pair - mean) ** 2 for pair in pairs) / max(count - 1, 1)
    return Difference(mean, math.sqrt(variance / count))


def loss_difference(a: Outcome, b: Outcome) -> Difference:
    """Loss a token of a minus that of b; problems vary, so its error is a ratio estimate's."""
    gap, tokens = a.losses.nll - b.losses.nll, a.losses.tokens
    value = float(gap.sum() / tokens.sum())
    residual = gap - value * tokens
    count = len(residual)
    spread = float(residual.std(correction=1)) if count > 1 else 0.0
    return Difference(value, spread * math.sqrt(count) / float(tokens.sum()))


def reading(outcomes: Sequence[Outcome], scale: Scale) -> list[str]:
    """What the table says, differences within their noise called so."""
    by_name = {outcome.method: outcome for outcome in outcomes}
    sft = by_name["sft"]
    lines = []
    for method in METHODS[1:]:
        accuracy = accuracy_difference(by_name[method], sft)
        loss = loss_difference(by_name[method], sft)
        lines.append(
            f"{LABELS[method]} against SFT: accuracy {100 * accuracy.value:+.1f} \u00b1 "
            f"{100 * accuracy.error:.1f} points ({_verdict(accuracy, higher_is_better=True)}), "
            f"loss {loss.value:+.4f} \u00b1 {loss.error:.4f} "
            f"({_verdict(loss, higher_is_better=False)})."
        )
    vcore, ratio = by_name["vcore"], by_name["vcore"].step_seconds / sft.step_seconds
    gain = accuracy_difference(vcore, sft)
    lines += [
        f"So VCORE {_ranking(gain)} SFT here at equal steps (exact match), and one of its steps "
        f"took {ratio:.1f} times as long: at equal time SFT would take {ratio:.1f} times as many.",
        f"One seed, {len(sft.correct)} problems, a {scale.size.layers}-layer model: this shows "
        "that the methods run, not which is best. \u00b1 is the standard error over problems; "
        "another seed moves the figures by more. Held-out loss is what SFT minimises; DFT and "
        "iw-SFT minimise something else.",
    ]
    return lines


def _ranking(gain: Difference) -> str:
    if not gain.clear:
        return "neither beat nor fell behind"
    return "beat" if gain.value > 0 else "fell behind"


def _verdict(difference: Difference, *, higher_is_better: bool) -> str:
    if not difference.clear:
        return "no clear difference"
    return "better" if (difference.value > 0) == higher_is_better else "worse"


# ---- files ----


def _plot(
    out: Path, outcomes: Sequence[Outcome], logs: dict[str, RunLog], data: Data, scale: Scale
) -> None:
    plots = out / "plots"
    plots.mkdir(exist_ok=True)
    plot_losses(
        plots / "loss.png",
        {method: log.series("nll") for method, log in logs.items()},
        title="Training loss from the same start on the same batches",
        ylabel="mean loss of a response token (nats)",
    )
    groups = ["all", *(f"{n} step{'s' * (n > 1)}" for n in range(1, scale.operations + 1))]
    members = [
        [i for i, problem in enumerate(data.held_out) if n in (0, problem.steps)]
        for n in range(scale.operations + 1)
    ]
    parts = {
        outcome.method: [[outcome.correct[i] for i in group] for group in members]
        for outcome in outcomes
    }
    plot_accuracy(
        plots / "accuracy.png",
        groups,
        {method: [sum(p) / max(len(p), 1) for p in part] for method, part in parts.items()},
        {method: [standard_error(p) if p else 0.0 for p in part] for method, part in parts.items()},
        title=f"Held-out accuracy by the length of the solution, {len(data.held_out)} problems",
    )


def _weights(out: Path, model: PreTrainedModel, data: Data, scale: Scale) -> None:
    """The page with VCORE's weights on one held-out problem of each length."""
    picked = {problem.steps: index for index, problem in enumerate(data.held_out)}
    trajectories = [
        weigh_trajectory(
            model,
            data.tokenizer,
            data.held_out_rows[picked[steps]],
            data.rows[: scale.probe_rows],
            where=f"A held-out problem of {steps} step{'s' * (steps > 1)}",
            kl_budget=scale.kl_budget,
        )
        for steps in sorted(picked)
    ]
    page = weights_page(
        trajectories,
        title="Where VCORE puts its weight",
        note=f"After the demo's VCORE run; KL budget {scale.kl_budget} nats a trajectory.",
    )
    (out / "weights.html").write_text(page, encoding="utf-8")
