"""What several studies fine-tune on: one task in arithmetic, a start for it, one run from there.

A small model has met calculations of any length, told as stories and written as expressions, in a
short run of plain supervision. Fine-tuning goes on from it with expressions of middle length alone,
and is judged on held-out problems like those, on longer ones, and on stories.
"""

import hashlib
import json
import os
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.axis import Axis
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback

from vcore_train.arithmetic import Problem, answer_of, generate_problems
from vcore_train.config import VcoreConfig
from vcore_train.data import Example, encode, prompt_tokens
from vcore_train.evaluation import greedy_responses, row_losses
from vcore_train.experiments.setting import (
    Context,
    Row,
    Setting,
    adamw,
    drawn,
    endless,
    train_step,
)
from vcore_train.experiments.statistics import Interval, interval
from vcore_train.experiments.workers import in_pool
from vcore_train.models import new_model
from vcore_train.step_time import interleaved_step_seconds
from vcore_train.tokenizer import train_tokenizer
from vcore_train.trainer import VcoreTrainer

DATA = "generated arithmetic"
IN_DOMAIN, HARDER, STORIES = SETS = ("in-domain", "harder", "stories")


@dataclass(frozen=True)
class TaskSetting(Setting):
    """The start, the task, and a run of ``steps`` on it.

    Numbers go up to ``largest``. The start trains on problems of ``first`` operations, half of
    them stories, until it solves a share ``goal`` of ``asked`` expressions of ``operations``, asked
    every ``asked_every`` steps, or for ``train_steps``; so the starts of all seeds leave about the
    same room. Runs take ``rows`` expressions of ``operations``; they are
    judged on ``held_out`` problems each: such expressions, ``harder`` ones, and stories of
    ``operations``, of which no calculation is trained on. The learning rate ``run_lr`` is warmed
    up over a tenth of the steps and then falls linearly to zero; ``judged`` times along the run
    the held-out loss is taken. ``rounds``: of the step times.
    """

    first: tuple[int, int] = (1, 4)
    operations: tuple[int, int] = (2, 3)
    harder: tuple[int, int] = (4, 4)
    largest: int = 16
    goal: float = 0.4
    asked: int = 256
    asked_every: int = 50
    steps: int = 64
    run_lr: float = 2e-3
    judged: int = 1
    rounds: int = 25


# The learning rate by a scan of SFT alone, seed 100, which is not on record: held-out loss 0.045,
# 0.041, 0.042, 0.061 and accuracy 76, 78, 73, 63% at 1e-3, 2e-3, 4e-3, 8e-3; the start had 48%.
# With numbers up to 10 SFT reached 99% in as many steps, which leaves nothing to compare.
FULL = TaskSetting(
    layers=2,
    hidden=64,
    vocab=600,
    length=160,
    batch_size=16,
    lr=4e-3,
    train_steps=2000,
    rows=8000,
    held_out=320,
)
QUICK = TaskSetting.quick(
    layers=1,
    vocab=400,
    length=160,
    batch_size=4,
    rows=640,
    asked=8,
    asked_every=4,
    held_out=8,
    train_steps=8,
    first=(1, 2),
    operations=(1, 2),
    harder=(3, 3),
    largest=10,
    steps=4,
    judged=2,
    rounds=1,
    seeds=1,
)


class Task(NamedTuple):
    """The same for every seed."""

    tokenizer: PreTrainedTokenizerBase
    first: list[Row]  # of the start
    rows: list[Row]  # of the runs
    asked: list[Problem]  # of the training side, which stop the start
    held_out: dict[str, list[Problem]]  # by the names of SETS
    held_out_rows: dict[str, list[Row]]


@lru_cache(maxsize=1)
def task(setting: TaskSetting) -> Task:
    """Problems and their token rows; short problems are few, so the order is shuffled."""

    def problems(count: int, steps: tuple[int, int], stories: float, **options: Any) -> Any:
        found = generate_problems(
            count, steps=steps, largest=setting.largest, stories=stories, **options
        )
        random.Random(0).shuffle(found)
        return found

    first = problems(setting.rows, setting.first, 0.5)
    trained = problems(setting.rows, setting.operations, 0.0, seed=1)
    held_out = {
        name: problems(setting.held_out, steps, stories, held_out=True)
        for name, steps, stories in (
            (IN_DOMAIN, setting.operations, 0.0),
            (HARDER, setting.harder, 0.0),
            (STORIES, setting.operations, 1.0),
        )
    }
    texts = (text for p in [*first, *trained] for text in (f"{p.prompt}\n", p.response))
    tokenizer = train_tokenizer(texts, vocab_size=setting.vocab, window=setting.length)

    def rows(part: Sequence[Problem]) -> list[Row]:
        examples = [Example(p.prompt, p.response, DATA) for p in part]
        return encode(examples, tokenizer, max_length=setting.length).rows

    held_out_rows = {name: rows(part) for name, part in held_out.items()}
    asked = problems(setting.asked, setting.operations, 0.0, seed=2)
    return Task(tokenizer, rows(first), rows(trained), asked, held_out, held_out_rows)


# ---- the start ----


def start_file(folder: Path, setting: TaskSetting, seed: int) -> Path:
    """Where a start is kept, named by all that its weights depend on."""
    names = (
        *("architecture", "layers", "hidden", "heads", "vocab", "length", "train_steps", "warmup"),
        *("batch_size", "lr", "rows", "first", "operations", "largest"),
        *("goal", "asked", "asked_every"),
    )
    values = [seed, torch.__version__, *(getattr(setting, name) for name in names)]
    key = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    return folder / "starts" / f"task-{key}.pt"


def load_start(setting: TaskSetting, seed: int, weights: Path | None = None) -> PreTrainedModel:
    """The start as it was saved in ``weights``; None: before any training."""
    model = new_model(setting.config(), task(setting).tokenizer, seed=seed).train()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return model


def make_start(setting: TaskSetting, seed: int, weights: Path) -> dict[str, Any]:
    """Trains the start of a seed on problems of its own, unless ``weights`` are there, and saves
    it. Returns how it is judged, and the steps that it took."""
    model = load_start(setting, seed, weights if weights.exists() else None)
    taken = weights.with_suffix(".json")
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        taken.write_text(json.dumps(_train(model, setting, seed)), encoding="utf-8")
        partial = weights.with_suffix(f".{os.getpid()}.partial")
        torch.save(model.state_dict(), partial)
        os.replace(partial, weights)
    steps = json.loads(taken.read_text(encoding="utf-8"))
    return {"seed": seed, "steps": steps, **judge(model, setting)}


def _train(model: PreTrainedModel, setting: TaskSetting, seed: int) -> int:
    """Plain supervision until the goal is reached; returns the steps it took."""
    tokenizer, rows, _, asked, *_ = task(setting)
    order = endless(drawn(rows, len(rows), seed), setting.batch_size)
    optimizer = adamw(model, setting.lr)
    for step in range(1, setting.train_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * min(1.0, step / max(setting.warmup, 1))
        train_step(model, optimizer, next(order))
        if step % setting.asked_every == 0 and accuracy(model, tokenizer, asked) >= setting.goal:
            break
    return step


def make_starts(
    pool: Executor, context: Context, name: str
) -> tuple[dict[int, Path], list[dict[str, Any]]]:
    """Where the start of each seed is kept, and how they are judged (:func:`make_start`).

    Raises ValueError for --data: the problems of the study ``name`` are generated.
    """
    if context.data is not None:
        raise ValueError(f"--data means nothing for {name}, whose problems are generated. Drop it.")
    setting = context.setting
    assert isinstance(setting, TaskSetting)
    weights = {seed: start_file(context.out, setting, seed) for seed in context.seeds}
    jobs = [(setting, seed, file) for seed, file in weights.items()]
    return weights, in_pool(pool, context, "Starts", make_start, jobs)


# ---- a run ----


@dataclass(frozen=True)
class Arm:
    """A way to train: a name, and options of :class:`VcoreConfig`."""

    name: str
    options: Mapping[str, Any]


SFT = Arm("SFT", {"method": "sft"})
DFT = Arm("DFT", {"method": "dft"})
VCORE = Arm("VCORE", {"method": "vcore"})


def seed_rows(setting: TaskSetting, seed: int, count: int) -> list[Row]:
    """The first ``count`` training rows in the order of the seed: of two counts, one is the
    beginning of the other."""
    rows = task(setting).rows
    if count > len(rows):
        raise ValueError(f"a run needs {count} training rows and the setting has {len(rows)}.")
    return drawn(rows, len(rows), seed)[:count]


def fine_tune(
    setting: TaskSetting,
    seed: int,
    weights: Path,
    arm: Arm,
    *,
    steps: int | None = None,
    rows: Sequence[Row] | None = None,
) -> tuple[PreTrainedModel, dict[str, Any]]:
    """One run from the start: the model, and how it does along the run and at its end.

    ``steps``: None is the setting's. ``rows``: None is as many as the steps take, none twice. Arms
    of one seed with the same steps and rows see the same batches.

    The record: held-out ``curve`` in nats a token at ``curve_steps``, what :func:`judge` returns,
    and, of VCORE, ``alpha`` and ``kl`` on average over the steps.
    """
    steps = setting.steps if steps is None else steps
    rows = seed_rows(setting, seed, steps * setting.batch_size) if rows is None else rows
    model = load_start(setting, seed, weights)
    with tempfile.TemporaryDirectory() as folder:
        trainer = _trainer(model, setting, seed, arm, rows, steps, folder, judged=True)
        trainer.train()
    logged = trainer.state.log_history
    curve = [(line["step"], line["eval_loss"]) for line in logged if "eval_loss" in line]
    record = {
        "curve_steps": [step for step, _ in curve],
        "curve": [loss for _, loss in curve],
        **judge(model, setting),
    }
    for name in ("alpha", "kl"):
        values = [line[name] for line in logged if name in line]
        if values:
            record[name] = sum(values) / len(values)
    return model, record


def _trainer(
    model: PreTrainedModel,
    setting: TaskSetting,
    seed: int,
    arm: Arm,
    rows: Sequence[Row],
    steps: int,
    folder: str,
    *,
    judged: bool,
) -> VcoreTrainer:
    args = VcoreConfig(
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=setting.batch_size,
        per_device_eval_batch_size=4 * setting.batch_size,
        learning_rate=setting.run_lr,
        lr_scheduler_type="linear",
        warmup_steps=steps // 10,
        adam_beta2=0.98,
        eval_strategy="steps" if judged else "no",
        eval_steps=max(1, steps // setting.judged),
        eval_on_start=judged,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=seed,
        **arm.options,
    )
    trainer = VcoreTrainer(
        model=model,
        args=args,
        train_dataset=list(rows),
        eval_dataset=task(setting).held_out_rows[IN_DOMAIN] if judged else None,
        processing_class=task(setting).tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def judge(model: PreTrainedModel, setting: TaskSetting) -> dict[str, Any]:
    """``loss`` (nats a token) and ``accuracy`` (exact match, greedy) on each of ``SETS``."""
    found: dict[str, Any] = {"loss": {}, "accuracy": {}}
    for name, problems in task(setting).held_out.items():
        found["loss"][name] = row_losses(model, task(setting).held_out_rows[name]).mean
        found["accuracy"][name] = accuracy(model, task(setting).tokenizer, problems)
    return found


def accuracy(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]
) -> float:
    """The share of the problems whose answer the greedy response has, which is cut at the length
    of the longest worked solution."""
    prompts = prompt_tokens([p.prompt for p in problems], tokenizer)
    solutions = tokenizer([p.response for p in problems])["input_ids"]
    longest = 1 + max(map(len, solutions))
    responses = greedy_responses(model, tokenizer, prompts, max_new_tokens=longest, batch_size=256)
    right = [answer_of(r) == p.answer for r, p in zip(responses, problems, strict=True)]
    return sum(right) / len(right)


def step_ratios(
    setting: TaskSetting, seed: int, weights: Path, arms: Sequence[Arm]
) -> dict[str, float]:
    """Time of an optimizer step of each arm over that of SFT, which is one of them; by name.

    Wall-clock medians over rounds in which each takes its turn. What iw-SFT does before its first
    step, one forward pass over its data, is not in it.
    """
    rows = seed_rows(setting, seed, (setting.rounds + 2) * setting.batch_size)
    with tempfile.TemporaryDirectory() as folder:
        trainers = {}
        for arm in arms:
            model = load_start(setting, seed, weights)
            trainers[arm.name] = _trainer(model, setting, seed, arm, rows, 1, folder, judged=False)
            trainers[arm.name].train()
        seconds = interleaved_step_seconds(trainers, rounds=setting.rounds)
    return {name: value / seconds[SFT.name] for name, value in seconds.items()}


# ---- what is shown ----


def paired(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]], *keys: str
) -> Interval:
    """The mean over seeds of a figure of ``runs`` less that of ``base``, and its 95% interval."""
    return interval([figure_of(r, *keys) - figure_of(b, *keys) for r, b in by_seed(runs, base)])


def by_seed(
    runs: Sequence[Mapping[str, Any]], base: Sequence[Mapping[str, Any]]
) -> list[tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Pairs of records of one seed."""
    other = {record["seed"]: record for record in base}
    return [(record, other[record["seed"]]) for record in runs]


def figure_of(record: Mapping[str, Any], *keys: str) -> float:
    """``record[keys[0]][keys[1]]...``"""
    value: Any = record
    for key in keys:
        value = value[key]
    return value


def percent(value: Interval) -> Interval:
    """Of a share, times 100."""
    return transformed(lambda share: 100 * share, value)


def transformed(function: Callable[[float], float], value: Interval) -> Interval:
    """Mean and bounds after a function that rises."""
    return Interval(function(value.mean), function(value.low), function(value.high), value.n)


def verdict(gap: Interval, *, higher_is_better: bool) -> str:
    """``"better"`` or ``"worse"``; "no clear difference" where the interval holds 0 or is none."""
    if not (gap.low > 0 or gap.high < 0):
        return "no clear difference"
    return "better" if (gap.mean > 0) == higher_is_better else "worse"


def signed(value: Interval, digits: int) -> str:
    """With its sign; "-0.0" becomes "+0.0"."""
    text = value.text(digits)
    return text if text.startswith("-") else f"+{text}"


def plain_log(axis: Axis) -> None:
    """Ticks of a logarithmic axis at 1, 2 and 5 times the powers of ten, written out."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter(FormatStrFormatter("%g"))
    axis.set_minor_formatter(NullFormatter())
