"""What a step costs: time and peak memory in units of plain supervision, and where the time goes.

The model has random weights and the tokens are random: neither changes the cost. All subjects take
turns in one process, so that ratios hold on a busy machine.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from vcore_kernels import weighted_linear_nll
from vcore_train.config import VcoreConfig
from vcore_train.direction_schedule import DirectionSchedule
from vcore_train.experiments.fidelity import with_lora
from vcore_train.experiments.measuring import one_round, peak_bytes
from vcore_train.experiments.report import Table, figure
from vcore_train.experiments.setting import Batch, Context, Setting
from vcore_train.experiments.statistics import interval
from vcore_train.modeling import (
    head_of,
    hidden_states,
    supervised_labels,
    trainable_parameters,
)
from vcore_train.parameter_choice import chosen_parameters
from vcore_train.reuse import forward_with_utilities
from vcore_train.supervised import SupervisedTokens
from vcore_train.utilities import token_utilities_and_nll
from vcore_train.weighting import weigh

FULL = Setting.full(
    layers=6, hidden=512, heads=8, vocab=8192, length=512, batch_size=4, train_steps=0, seeds=5
)
QUICK = Setting.quick(length=32, batch_size=2, train_steps=0)
DATA = "random tokens"

TRAINED = {"LoRA": True, "all parameters": False}
# Forward and backward passes of a step in units of a forward pass: with LoRA, with all parameters.
ARITHMETIC = {
    "SFT": (2, 3),
    "VCORE": (4, 6),
    "VCORE, reuse": (3, 5),
    "direction": (2, 3),
    "SFT, checkpointed": (3, 4),
    "VCORE, checkpointed": (5, 7),
    "VCORE, checkpointed, reuse": (4, 6),
}
LAST = "last_2_layers"
PARTS = ("dual pass", "weights", "main pass", "optimizer")
KEPT_FOR = (1, 4, 8, 16)  # steps that one direction serves


class Steps:
    """Optimizer steps of one model on one batch.

    ``seconds`` collects what the parts of each step took, one number a step.
    """

    def __init__(self, model: nn.Module, batch: Batch):
        self.model, self.batch = model, batch
        with tempfile.TemporaryDirectory() as folder:
            self.config = VcoreConfig(output_dir=folder, use_cpu=True)
        self.optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-6)
        self.schedule = DirectionSchedule(self.config)
        self.labels = supervised_labels(batch)
        self.tokens = SupervisedTokens.of([batch])
        self.uniform = (self.labels != -100).float()
        self.seconds: dict[str, list[float]] = {}
        self.sft()  # the moments exist
        self.g = self.direction()
        last = chosen_parameters(model, LAST)
        self.g_last = {name: g for name, g in self.g.items() if name in last}

    def direction(self) -> dict[str, Tensor]:
        """g as the trainer's defaults take it, from a probe batch of the same size."""
        self.schedule.forget()
        return self.schedule.direction(
            0, self.model, self.optimizer, lambda count: [self.batch] * count
        )

    def sft(self) -> None:
        self.main_pass(self.uniform)
        self._update()

    def vcore(self, g: dict[str, Tensor] | None = None) -> None:
        with self._timed("dual pass"):
            found = token_utilities_and_nll(self.model, self.batch, self.g if g is None else g)
        with self._timed("weights"):
            weights = self._weights(found.nll, found.utility)
        with self._timed("main pass"):
            self.main_pass(weights)
        with self._timed("optimizer"):
            self._update()

    def reuse(self, g: dict[str, Tensor] | None = None) -> None:
        with self._timed("dual pass"):
            forward = forward_with_utilities(self.model, self.batch, self.g if g is None else g)
        with self._timed("weights"):
            weights = self._weights(forward.nll, forward.utility)
        with self._timed("main pass"):
            forward.loss(weights / self.tokens.count).backward()
        with self._timed("optimizer"):
            self._update()

    def _weights(self, nll: Tensor, utility: Tensor) -> Tensor:
        return weigh(self.config, self.tokens, [nll], [utility]).weights[0]

    def main_pass(self, weights: Tensor) -> None:
        head = head_of(self.model)
        loss, _ = weighted_linear_nll(
            hidden_states(self.model, self.batch),
            head.weight,
            self.labels,
            weights / self.tokens.count,
            shift=1,
            **head.options(),
        )
        loss.backward()

    def _update(self) -> None:
        torch.nn.utils.clip_grad_norm_(trainable_parameters(self.model).values(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds.setdefault(part, []).append(time.perf_counter() - start)

    def calls(self) -> dict[str, Callable[[], Any]]:
        """The subjects, by name."""
        return {
            "SFT": self.sft,
            "VCORE": self.vcore,
            "VCORE, reuse": self.reuse,
            "direction": self.direction,
            "VCORE, last 2 layers": partial(self.vcore, self.g_last),
            "VCORE, last 2 layers, reuse": partial(self.reuse, self.g_last),
            "SFT, checkpointed": partial(self._checkpointed, self.sft),
            "VCORE, checkpointed": partial(self._checkpointed, self.vcore),
            "VCORE, checkpointed, reuse": partial(self._checkpointed, self.reuse),
        }

    def _checkpointed(self, step: Callable[[], None]) -> None:
        lm: Any = self.model
        lm.activation_checkpointing_enable({"use_reentrant": False})
        try:
            step()
        finally:
            lm.activation_checkpointing_disable()

    def resident_bytes(self) -> int:
        """Weights and the optimizer's moments: what lives through every step."""
        moments = [
            v for s in self.optimizer.state.values() for v in s.values() if isinstance(v, Tensor)
        ]
        return _bytes([*self.model.parameters(), *self.model.buffers(), *moments])


def make_steps(setting: Setting, *, lora: bool, seed: int = 0) -> Steps:
    """A bf16 Qwen3 of random weights, adapters of rank 8 on all linear layers or none."""
    config = setting.config()
    config.vocab_size = setting.vocab
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    if lora:
        model = with_lora(model, seed=seed)
    model = model.bfloat16().train()
    ids = torch.randint(setting.vocab, (setting.batch_size, setting.length))
    return Steps(model, {"input_ids": ids, "labels": ids})


def measure(context: Context) -> dict[str, Any]:
    """``{"steps": one record a subject, "parts": one a part, "direction": its kind}``.

    A repetition is a round in which every subject takes one step; an untimed one comes first.
    """
    if context.data is not None:
        raise ValueError("--data means nothing for cost, whose tokens are random. Drop it.")
    records: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    kind, every = "", 1
    for trained, lora in TRAINED.items():
        steps = make_steps(context.setting, lora=lora)
        kind, every = steps.config.direction, steps.config.every
        calls = steps.calls()
        one_round(calls)
        vcore: list[dict[str, float]] = []
        rounds = []
        for _ in context.track(context.seeds, f"Steps, {trained}"):
            rounds.append(one_round(calls))
            steps.seconds.clear()
            steps.vcore()
            vcore.append({part: seconds[0] for part, seconds in steps.seconds.items()})
        peaks = {
            name: peak_bytes(call)
            for name, call in context.track(list(calls.items()), f"Memory, {trained}")
        }
        resident = steps.resident_bytes()
        directions = _bytes(list(steps.g.values()))
        for name in calls:
            unit = "SFT, checkpointed" if "checkpointed" in name else "SFT"
            lives = resident + (0 if name.startswith("SFT") else directions)
            records.append(
                {
                    "trained": trained,
                    "subject": name,
                    "unit": unit,
                    "seconds": [r[name] for r in rounds],
                    "ratio": [r[name] / r[unit] for r in rounds],
                    "arithmetic": _arithmetic(name, unit, lora),
                    "resident_bytes": lives,
                    "peak_bytes": peaks[name],
                    "memory_ratio": (lives + peaks[name]) / (resident + peaks[unit]),
                }
            )
        sft = [r["SFT"] for r in rounds]
        parts += [
            {
                "trained": trained,
                "part": part,
                "ratio": [v[part] / unit for v, unit in zip(vcore, sft, strict=True)],
            }
            for part in PARTS
        ]
    return {"steps": records, "parts": parts, "direction": kind, "every": every}


def _arithmetic(name: str, unit: str, lora: bool) -> float | None:
    if name not in ARITHMETIC:
        return None
    place = 0 if lora else 1
    return ARITHMETIC[name][place] / ARITHMETIC[unit][place]


def _bytes(tensors: list[Any]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def _record(result: dict[str, Any], trained: str, subject: str) -> dict[str, Any]:
    return next(r for r in result["steps"] if (r["trained"], r["subject"]) == (trained, subject))


def tables(result: dict[str, Any]) -> list[Table]:
    rows = [
        [
            r["trained"],
            r["subject"],
            f"{1e3 * statistics.median(r['seconds']):.0f}",
            interval(r["ratio"]).text(2),
            "" if r["arithmetic"] is None else f"{r['arithmetic']:.2f}",
            f"{(r['resident_bytes'] + r['peak_bytes']) / 2**20:.0f}",
            f"{r['memory_ratio']:.2f}",
        ]
        for r in result["steps"]
    ]
    steps = Table(
        "Optimizer steps with a kept direction, and taking it anew",
        ("trained", "step", "ms", "time / SFT", "arithmetic", "MiB", "memory / SFT"),
        rows,
        text=2,
        note="Checkpointed steps are in units of checkpointed SFT. Memory: weights, moments and "
        "the kept direction, and the most that a step adds, by PyTorch's CPU allocator.",
    )
    rows = [
        [trained, *(interval(_ratios(result, trained, part)).text(2) for part in PARTS)]
        for trained in TRAINED
    ]
    parts = Table("Parts of a VCORE step, in units of an SFT step", ("trained", *PARTS), rows)
    rows = [
        [trained, name, *(f"{_amortised(result, trained, name, k):.2f}" for k in KEPT_FOR)]
        for trained in TRAINED
        for name in ("VCORE", "VCORE, reuse")
    ]
    amortised = Table(
        f"Time / SFT with direction {result['direction']!r} taken anew every k steps",
        ("trained", "step", *(f"k = {k}" for k in KEPT_FOR)),
        rows,
        text=2,
        note=f"The default is k = {result['every']}.",
    )
    return [steps, parts, amortised]


def _ratios(result: dict[str, Any], trained: str, part: str) -> list[float]:
    return next(p["ratio"] for p in result["parts"] if (p["trained"], p["part"]) == (trained, part))


def _amortised(result: dict[str, Any], trained: str, subject: str, every: int) -> float:
    step = interval(_record(result, trained, subject)["ratio"]).mean
    return step + interval(_record(result, trained, "direction")["ratio"]).mean / every


def plot(result: dict[str, Any], path: Path) -> None:
    """Time and memory of each subject in units of SFT, LoRA beside all parameters."""
    with figure(path, 1, len(TRAINED), size=(10.5, 4.9), sharey=True) as (drawn, panels):
        for axes, trained in zip(panels, TRAINED, strict=True):
            records = [r for r in result["steps"] if r["trained"] == trained][::-1]
            places = range(len(records))
            times = [interval(r["ratio"]) for r in records]
            axes.barh(
                [p + 0.2 for p in places],
                [t.mean for t in times],
                0.4,
                xerr=[0 if t.n < 2 else t.half for t in times],
                color="#c8452f",
                label="time",
            )
            axes.barh(
                [p - 0.2 for p in places],
                [r["memory_ratio"] for r in records],
                0.4,
                color="#3b6fb6",
                label="peak memory",
            )
            for place, record in zip(places, records, strict=True):
                if record["arithmetic"] is not None:
                    axes.plot([record["arithmetic"]] * 2, [place, place + 0.4], color="black")
            axes.plot([], [], color="black", label="time by arithmetic")
            axes.axvline(1, color="#8a8f98", linewidth=1)
            axes.set_yticks(list(places), [r["subject"] for r in records])
            axes.set_xlabel("in units of SFT (checkpointed: of checkpointed SFT)")
            axes.set_title(trained)
        handles, labels = panels[0].get_legend_handles_labels()
        drawn.legend(handles, labels, loc="outside lower center", ncols=3)
