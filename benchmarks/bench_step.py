"""Whole optimizer steps beside the published flow, and in units of plain supervision.

    python -m pytest benchmarks/bench_step.py --benchmark-only

``test_published``: a step of :class:`vcore_train.VcoreTrainer` with the library's default settings,
in units of a step of the published flow (:mod:`benchmarks.published_flow`) in the same round, on
the same model and batch; peak memory of both, and the correlation of each one's utilities with the
exact ones in float64. ``test_step``: kinds of VCORE steps in units of an SFT step; "direction" is
what taking it anew costs, so that a step costs kept + direction / k where it is taken every k
steps. Memory is PyTorch's allocator's: weights and optimizer stand before a step, gradients and
activations count.
"""

import functools
import tempfile
from typing import Any

import pytest
import torch
from torch import Tensor
from vcore_train.bench_record import Row

from benchmarks.measure import Call
from benchmarks.published_flow import published_step, published_utility
from benchmarks.suite import Bench, gate, relative_error

JUDGED = 256  # tokens of the first sequence whose utilities are compared with float64
PUBLISHED = "the published flow"


class Model:
    """A model of random weights, its batch, and the ways to take a step with them."""

    def __init__(self, vocab: int, lora: bool, quick: bool, device: torch.device):
        from dataclasses import replace

        from vcore_train.experiments import cost

        setting = cost.QUICK if quick else cost.FULL
        if quick:
            setting = replace(setting, vocab=vocab // 64)
        elif vocab != setting.vocab:
            setting = replace(setting, vocab=vocab, layers=2, hidden=256, heads=4)
        self.steps: Any = cost.make_steps(setting, lora=lora)
        if device.type == "cuda":
            self._move(device)
        s = setting
        self.title = (
            f"{'LoRA' if lora else 'all parameters'}, Qwen3 {s.layers} x {s.hidden} V={s.vocab}, "
            f"{s.batch_size} x {s.length}, bf16"
        )
        self.setting, self.device = setting, device
        ids = self.steps.batch["input_ids"].roll(1, 0)
        self.probe = {"input_ids": ids, "labels": ids}

    def _move(self, device: torch.device) -> None:
        steps = self.steps
        steps.model.to(device)
        steps.batch = {name: value.to(device) for name, value in steps.batch.items()}
        steps.__init__(steps.model, steps.batch)

    @functools.cached_property
    def trainer(self) -> Any:
        """With the default settings, on the rows of the batch."""
        from vcore_train import VcoreConfig, VcoreTrainer

        ids = self.steps.batch["input_ids"].tolist()
        with tempfile.TemporaryDirectory() as folder:  # nothing is written there
            args = VcoreConfig(
                output_dir=folder,
                per_device_train_batch_size=self.setting.batch_size,
                learning_rate=1e-6,
                use_cpu=self.device.type == "cpu",
                report_to="none",
                disable_tqdm=True,
                save_strategy="no",
            )
        rows = [{"input_ids": row, "labels": row} for row in ids]
        trainer = VcoreTrainer(self.steps.model, args, train_dataset=rows)
        trainer.optimizer = self.steps.optimizer
        return trainer

    def default(self) -> None:
        """A training step as the trainer takes it: probe, weights, main pass, clipping, update."""
        trainer = self.trainer
        batches, count = trainer.get_batch_samples(iter([self.steps.batch]), 1, self.device)
        trainer.training_step(self.steps.model, batches[0], count)
        self.steps._update()

    def published(self) -> None:
        published_step(self.steps.model, self.steps.optimizer, self.steps.batch, self.probe)

    def checkpointed(self, step: Call) -> None:
        self.steps._checkpointed(step)

    def calls(self) -> dict[str, Call]:
        steps = self.steps
        return {
            "VCORE, default settings": self.default,
            "VCORE, direction kept": steps.vcore,
            "VCORE, direction kept, reuse": steps.reuse,
            "direction": steps.direction,
            PUBLISHED: self.published,
        }

    def fidelity(self) -> dict[str, float]:
        """Pearson r with the exact utility in float64 of the default's and of the published.

        On a part of the batch, at the model's weights as they are rounded, each against the exact
        utility of its own direction.
        """
        from vcore_train.experiments.exact import exact_utilities
        from vcore_train.experiments.setting import supervised
        from vcore_train.experiments.statistics import pearson
        from vcore_train.reuse import forward_with_utilities
        from vcore_train.utilities import token_utilities

        model, config = self.steps.model, self.trainer.args
        part = {name: value[:1, :JUDGED] for name, value in self.steps.batch.items()}
        mask = supervised(part)
        theirs, g = published_utility(model, part, self.probe)
        if self.trainer._reuses_forward:
            ours = forward_with_utilities(model, part, g).utility
        else:
            ours = token_utilities(
                model, part, g, method=config.utility_method, epsilon=config.epsilon
            )
        truth = exact_utilities(model, part, g)
        return {
            "default": pearson(ours[mask].double(), truth[mask]),
            "published": pearson(theirs[mask].double(), truth[mask]),
        }

    def check_gradients(self) -> str:
        """Reused and second forward pass give the same gradients."""
        from vcore_train.reuse import forward_with_utilities

        steps = self.steps
        weights = torch.rand(steps.labels.shape, device=self.device)
        found: list[Tensor] = []
        for reused in (False, True):
            steps.optimizer.zero_grad()
            if reused:
                forward_with_utilities(steps.model, steps.batch, steps.g).loss(weights).backward()
            else:
                steps.main_pass(weights * steps.tokens.count)
            grads = [p.grad.flatten() for p in steps.model.parameters() if p.grad is not None]
            found.append(torch.cat(grads))
        steps.optimizer.zero_grad()
        return gate(
            {"reused gradient": relative_error(found[1], found[0])}, {"reused gradient": 0.05}
        )


@functools.lru_cache(maxsize=1)
def model(vocab: int, lora: bool, quick: bool, device: torch.device) -> Model:
    return Model(vocab, lora, quick, device)


@pytest.mark.parametrize(
    ("vocab", "lora"),
    [
        pytest.param(8192, True, id="V8192-LoRA"),
        pytest.param(151936, True, id="V151936-LoRA"),
        pytest.param(8192, False, id="V8192-all"),
    ],
)
def test_published(bench: Bench, device, quick, vocab, lora):
    pytest.importorskip("peft")
    found = model(vocab, lora, quick, device)
    row = Row(
        f"step beside the published flow: {found.title}",
        "VcoreTrainer, default settings",
        "ours",
        unit=PUBLISHED,
    )
    theirs = Row(row.group, PUBLISHED, "peer")

    def check(_: Any) -> str:
        """Ours have r >= 0.999 with float64; what the published flow reaches is shown."""
        r = found.fidelity()
        row.facts["r with float64"] = r["default"]
        theirs.facts["r with float64"] = r["published"]
        fell_back = found.trainer.metrics.totals["fallback_steps"]
        assert fell_back == 0, f"{fell_back} steps had uniform weights"
        return gate({"1 - r": 1 - r["default"]}, {"1 - r": 1e-3})

    def make() -> Call:
        found.published()
        theirs.extra_bytes = bench.peak(found.published, "allocator")
        return found.default

    bench.measure(row, make, found.published, check, unit_row=theirs, memory="allocator")
    if row.extra_bytes and theirs.extra_bytes:
        row.facts["memory over the published"] = row.extra_bytes / theirs.extra_bytes


SUBJECTS = (
    "VCORE, default settings",
    "VCORE, direction kept",
    "VCORE, direction kept, reuse",
    "direction",
    PUBLISHED,
)


def named(names: tuple[str, ...]) -> list:
    return [pytest.param(name, id=name.replace(",", "").replace(" ", "_")) for name in names]


@pytest.mark.parametrize("name", named(SUBJECTS))
@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all"])
def test_step(bench: Bench, device, quick, lora, name):
    """Forward, backward, clipping and AdamW, in units of the same for SFT."""
    pytest.importorskip("peft")
    found = model(8192, lora, quick, device)
    row = Row(
        f"step: {found.title}", name, "peer" if name == PUBLISHED else "ours", unit="SFT step"
    )
    bench.measure(
        row,
        lambda: found.calls()[name],
        found.steps.sft,
        lambda _: found.check_gradients() if "reuse" in name else "",
        memory="allocator",
    )


@pytest.mark.parametrize("name", named(("VCORE, direction kept", "VCORE, direction kept, reuse")))
def test_checkpointed_step(bench: Bench, device, quick, name):
    """The same under gradient checkpointing, in units of checkpointed SFT."""
    pytest.importorskip("peft")
    found = model(8192, True, quick, device)
    call = found.calls()[name]
    row = Row(f"checkpointed step: {found.title}", name, "ours", unit="checkpointed SFT step")
    bench.measure(
        row,
        lambda: lambda: found.checkpointed(call),
        lambda: found.checkpointed(found.steps.sft),
        lambda _: "",
        memory="allocator",
    )
