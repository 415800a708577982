"""Gradient norms of 64 responses of 128 tokens beside a loop over the responses.

    python -m pytest benchmarks/bench_gradient_norms.py --benchmark-only

The model is that of ``vcore demo`` (float32; its head tied to the embeddings, and untied). The unit
is one forward and backward pass of the same batch as this library trains with, gradients by all
parameters included. The loop is GVM's first stage as released
(:mod:`benchmarks.published_gvm`): a forward and a backward pass for each response.
"""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from vcore_train.bench_record import Row

from benchmarks.measure import Call
from benchmarks.published_gvm import response_loop, stage_one
from benchmarks.suite import Bench, gate, relative_error
from vcore_kernels import gvm_allocate, weighted_linear_nll

PROMPTS = 16  # of the batch: as many responses each
UNIT = "forward and backward"


class Responses:
    def __init__(self, tied: bool, quick: bool, device: torch.device):
        import transformers
        from vcore_train.demo import FULL, QUICK

        torch.manual_seed(0)
        scale = QUICK if quick else FULL
        config = scale.size.config()
        config.vocab_size, config.tie_word_embeddings = scale.vocab_size, tied
        self.model: Any = transformers.Qwen3ForCausalLM(config).train().to(device)
        self.count, length = (16, 12) if quick else (64, 128)
        ids = torch.randint(scale.vocab_size, (self.count, length)).to(device)
        self.inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
        self.rewards = (torch.rand(self.count) < 0.5).float().to(device)
        self.prompt = torch.arange(self.count, device=device) // (self.count // PROMPTS)
        self.title = f"{self.count} x {length}, {'tied' if tied else 'untied'} head"

    def unit(self) -> None:
        from vcore_train.modeling import head_of, hidden_states

        head, ids = head_of(self.model), self.inputs["input_ids"]
        hidden = hidden_states(self.model, self.inputs)
        weights = torch.ones(ids.shape, device=ids.device)
        weighted_linear_nll(hidden, head.weight, ids, weights, shift=1)[0].backward()
        self.model.zero_grad(set_to_none=True)

    def norms(self, params: str) -> Tensor:
        from vcore_train import sequence_grad_norms

        return sequence_grad_norms(self.model, self.inputs, params=params)

    def weight(self, params: str) -> Tensor:
        embeddings = self.model.get_input_embeddings().weight
        return embeddings if params == "embeddings" else self.model.lm_head.weight

    def loop(self, params: str) -> Tensor:
        return response_loop(self.model, self.inputs, self.weight(params))

    def full_loop(self) -> Tensor:
        """All linear layers, which our embeddings and head leave out."""
        names = [
            p
            for n, p in self.model.named_parameters()
            if p.dim() == 2 and "embed" not in n and "lm_head" not in n
        ]
        return response_loop(self.model, self.inputs, *names)

    def stage_one(self, params: str) -> Tensor:
        """Counts of the second stage from ``sequence_grad_norms``."""
        accepted = self.rewards > 0
        norms = self.norms(params).where(accepted, 0.0)
        prompts = torch.zeros(PROMPTS, device=norms.device)
        solved = prompts.index_add(0, self.prompt, accepted.float())
        sums = prompts.index_add(0, self.prompt, norms.float())
        rate = solved / (self.count // PROMPTS)
        return gvm_allocate(sums / solved.clamp(min=1), rate, 8 * self.count)

    def published(self, params: str) -> Tensor:
        return stage_one(
            self.model,
            self.inputs,
            self.prompt,
            self.rewards,
            self.weight(params),
            budget=8 * self.count,
        )


@functools.lru_cache(maxsize=1)
def responses(tied: bool, quick: bool, device: torch.device) -> Responses:
    return Responses(tied, quick, device)


TASKS = {"embeddings": True, "lm_head": False, "all-linear": True}  # its head: tied


@pytest.mark.parametrize("subject", ["here", "loop"])
@pytest.mark.parametrize("params", TASKS)
def test_norms(bench: Bench, device, quick, params, subject):
    """The norms alone."""
    pytest.importorskip("transformers")
    found = responses(TASKS[params], quick, device)
    calls: dict[str, Call] = {
        "here": lambda: found.norms(params),
        "loop": found.full_loop if params == "all-linear" else lambda: found.loop(params),
    }
    other = calls["loop" if subject == "here" else "here"]
    row = Row(
        f"gradient norms, {params}: {found.title}",
        "sequence_grad_norms" if subject == "here" else "a pass for each response",
        "ours" if subject == "here" else "peer",
        unit=UNIT,
    )
    bench.measure(
        row,
        lambda: calls[subject],
        found.unit,
        lambda norms: gate({"norm": relative_error(norms, other())}, {"norm": 1e-4}),
        memory="allocator",
    )


@pytest.mark.parametrize("subject", ["here", "released"])
def test_gvm_stage(bench: Bench, device, quick, subject):
    """The first stage of GVM but for sampling: norms of the accepted responses, then counts."""
    pytest.importorskip("transformers")
    found = responses(True, quick, device)
    row = Row(
        f"GVM's first stage, {PROMPTS} prompts: {found.title}",
        "sequence_grad_norms and gvm_allocate" if subject == "here" else "the released loop",
        "ours" if subject == "here" else "peer",
        unit=UNIT,
    )
    calls: dict[str, Call] = {
        "here": lambda: found.stage_one("embeddings"),
        "released": lambda: found.published("embeddings"),
    }
    other = calls["released" if subject == "here" else "here"]

    def check(counts: Tensor) -> str:
        """Both distribute the same budget alike; norms that differ in rounding may move one."""
        different = (counts - other()).abs().max().item()
        assert counts.sum().item() == 8 * found.count, "the budget is not spent"
        return gate(
            {"largest difference of counts": different}, {"largest difference of counts": 1}
        )

    bench.measure(row, lambda: calls[subject], found.unit, check, memory="allocator")
