"""Whole optimizer steps in units of plain supervision, beside the published flow, in one process.

    python -m pytest benchmarks/bench_step.py -q (--benchmark-json=FILE keeps the figures)

Direction: the library's default kind. "kept" is a step that finds it taken already; "direction" is
what taking it anew costs, so that a step costs kept + direction / k where it is taken every k
steps. `vcore experiment cost` measures the same with memory and the parts of a step.
"""

import pytest
import torch

from benchmarks.measure import compare
from benchmarks.published_flow import published_step


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all parameters"])
def test_step(benchmark, lora, capsys):
    """4 x 512 tokens, 6-layer Qwen3 with H = 512, bf16; forward, backward, clipping and AdamW."""
    pytest.importorskip("transformers")
    from vcore_train.experiments import cost

    steps = cost.make_steps(cost.FULL, lora=lora)
    calls = steps.calls()
    ids = steps.batch["input_ids"].roll(1, 0)
    probe = {"input_ids": ids, "labels": ids}
    _check_gradients(steps)
    subjects = {
        "SFT": calls["SFT"],
        "VCORE, direction kept": calls["VCORE"],
        "VCORE, direction kept, reuse": calls["VCORE, reuse"],
        "direction": calls["direction"],
        "the published flow": lambda: published_step(
            steps.model, steps.optimizer, steps.batch, probe
        ),
    }
    medians = compare(benchmark, capsys, f"Qwen3, 6 layers, 4 x 512, {_name(lora)}", subjects)
    kind, every = steps.config.direction, steps.config.every
    step, direction = medians["VCORE, direction kept"], medians["direction"]
    with capsys.disabled():
        amortised = ", ".join(f"k = {k}: {step + direction / k:.2f}" for k in cost.KEPT_FOR)
        print(f"  VCORE with direction {kind!r} (default k = {every}): {amortised}")


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all parameters"])
def test_checkpointed_step(benchmark, lora, capsys):
    """The same under gradient checkpointing, in units of checkpointed SFT."""
    pytest.importorskip("transformers")
    from vcore_train.experiments import cost

    calls = cost.make_steps(cost.FULL, lora=lora).calls()
    names = ("SFT, checkpointed", "VCORE, checkpointed", "VCORE, checkpointed, reuse")
    subjects = {name: calls[name] for name in names}
    title = f"Qwen3, 6 layers, 4 x 512, checkpointed, {_name(lora)}"
    compare(benchmark, capsys, title, subjects)


def _name(lora: bool) -> str:
    return "LoRA" if lora else "all parameters"


def _check_gradients(steps) -> None:
    """Reused and second forward pass agree before anything is timed."""
    from vcore_train.reuse import forward_with_utilities

    weights = torch.rand(steps.labels.shape)
    gradients = []
    for reused in (False, True):
        steps.optimizer.zero_grad()
        if reused:
            forward_with_utilities(steps.model, steps.batch, steps.g).loss(weights).backward()
        else:
            steps.main_pass(weights * steps.tokens.count)
        found = [p.grad.flatten() for p in steps.model.parameters() if p.grad is not None]
        gradients.append(torch.cat(found).double())
    steps.optimizer.zero_grad()
    error = (gradients[1] - gradients[0]).norm() / gradients[0].norm()
    assert error < 0.05, error
