"""Attention with a tangent beside PyTorch's own, causal, bf16, 8 heads of 64 over 4 key heads.

    python -m pytest benchmarks/bench_attention.py --benchmark-only

The unit is the forward pass of PyTorch's fused attention in the same round, which has no tangent.
Arithmetic asks for 3 of it for values and tangents: dQK' and QdK' beside QK', dPV and PdV beside
PV.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from torch import Tensor
from vcore_train.bench_record import Row

from benchmarks.measure import Call
from benchmarks.suite import Bench, gate, product, relative_error
from vcore_kernels import attention_jvp

HEADS, KEY_HEADS, WIDTH = 8, 4, 64
UNIT = "SDPA forward"


class Attention:
    def __init__(self, batch: int, length: int, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        self.q, self.dq, self.k, self.dk, self.v, self.dv = (
            torch.randn(batch, length, heads, WIDTH, generator=generator)
            .to(device, torch.bfloat16)
            .transpose(1, 2)
            for heads in (HEADS, HEADS, KEY_HEADS, KEY_HEADS, KEY_HEADS, KEY_HEADS)
        )
        lowest = torch.finfo(torch.bfloat16).min
        self.mask = torch.full((length, length), lowest, dtype=torch.bfloat16).triu(1).to(device)

    def sdpa(self) -> Tensor:
        return F.scaled_dot_product_attention(
            self.q, self.k, self.v, is_causal=True, enable_gqa=True
        )

    def eager(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As transformers has it."""
        keys, values = (x.repeat_interleave(HEADS // KEY_HEADS, 1) for x in (k, v))
        scores = torch.matmul(q, keys.transpose(2, 3)) * WIDTH**-0.5 + self.mask.to(q.dtype)
        wide = torch.promote_types(q.dtype, torch.float32)
        return torch.matmul(torch.softmax(scores, -1, dtype=wide).to(q.dtype), values)

    def eager_dual(self, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, Tensor]:
        pairs = ((self.q, self.dq), (self.k, self.dk), (self.v, self.dv))
        with fwAD.dual_level():
            duals = (fwAD.make_dual(x.to(dtype), dx.to(dtype)) for x, dx in pairs)
            out = fwAD.unpack_dual(self.eager(*duals))
            return out.primal, out.tangent

    def jvp(self) -> tuple[Tensor, Tensor]:
        return attention_jvp(
            *(self.q, self.k, self.v, self.dq, self.dk, self.dv), causal=True, scale=WIDTH**-0.5
        )

    def call(self, name: str) -> Call:
        return {
            "attention_jvp": self.jvp,
            "eager, dual": self.eager_dual,
            "attention_jvp, no tangents": lambda: attention_jvp(
                self.q, self.k, self.v, None, None, None, causal=True, scale=WIDTH**-0.5
            )[:1],
            "eager forward": lambda: (self.eager(self.q, self.k, self.v),),
        }[name]


TASKS = {
    "values and tangents": ("attention_jvp", "eager, dual"),
    "values": ("attention_jvp, no tangents", "eager forward"),
}


@pytest.mark.parametrize(
    ("task", "name"),
    [
        pytest.param(task, name, id=name.replace(" ", "_").replace(",", ""))
        for task, names in TASKS.items()
        for name in names
    ],
)
@pytest.mark.parametrize(("batch", "length"), [(4, 512), (1, 2048)], ids=["4x512", "1x2048"])
def test_attention(bench: Bench, device, quick, batch, length, task, name):
    if quick:
        batch, length = 1, length // 16
    problem = Attention(batch, length, device)
    # Two products of T x T/2 x D a head.
    flops = 2 * 2.0 * batch * HEADS * length * length / 2 * WIDTH
    tokens = batch * length * WIDTH * 2
    row = Row(
        f"attention, {task}: bf16 B={batch} T={length}",
        name,
        "ours" if name.startswith("attention_jvp") else "peer",
        unit=UNIT,
        flops=flops * (3 if task != "values" else 1),
        bytes=tokens * (2 * HEADS + 2 * KEY_HEADS) * (2 if task != "values" else 1),
        ceiling=product(torch.bfloat16),
    )
    with torch.no_grad():
        truth, eager = problem.eager_dual(torch.float32), problem.eager_dual()
        labels = ("out", "tangent")
        eps = torch.finfo(torch.bfloat16).eps
        allowed = {
            n: 2 * relative_error(e, t) + eps for n, e, t in zip(labels, eager, truth, strict=True)
        }
        bench.measure(
            row,
            lambda: problem.call(name),
            problem.sdpa,
            lambda result: gate(
                {n: relative_error(r, t) for n, r, t in zip(labels, result, truth, strict=False)},
                allowed,
            ),
            unit_row=Row(row.group, UNIT, "yardstick", flops=flops),
            memory="allocator",
        )
