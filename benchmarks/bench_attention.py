"""Attention with a tangent beside PyTorch's own, in one process.

    python -m pytest benchmarks/bench_attention.py -q (--benchmark-json=FILE keeps the figures)

Every subject runs once in each round, in turn, so that a busy machine slows all of them alike;
"ratio" is the median over the rounds of its time over that of the first subject in the same round.
"""

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F

from benchmarks.measure import compare
from vcore_kernels import attention_jvp


@pytest.mark.parametrize(("batch", "length"), [(4, 128), (4, 512), (1, 2048)], ids=str)
def test_attention(benchmark, batch, length, capsys):
    """8 heads of 64 over 4 key heads, causal, bf16."""
    generator = torch.Generator().manual_seed(0)
    q, dq, k, dk, v, dv = (
        torch.randn(batch, length, heads, 64, generator=generator).bfloat16().transpose(1, 2)
        for heads in (8, 8, 4, 4, 4, 4)
    )
    lowest = torch.finfo(torch.bfloat16).min
    mask = torch.full((length, length), lowest, dtype=torch.bfloat16).triu(1)

    def eager(q, k, v):  # as in transformers
        keys, values = (x.repeat_interleave(2, 1) for x in (k, v))
        scores = torch.matmul(q, keys.transpose(2, 3)) * 0.125 + mask
        return torch.matmul(torch.softmax(scores, -1, dtype=torch.float32).to(q.dtype), values)

    def eager_dual():
        with fwAD.dual_level():
            duals = (fwAD.make_dual(x, dx) for x, dx in ((q, dq), (k, dk), (v, dv)))
            return fwAD.unpack_dual(eager(*duals))

    def jvp():
        return attention_jvp(q, k, v, dq, dk, dv, causal=True, scale=0.125)

    subjects = {
        "SDPA forward": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
        "attention_jvp": jvp,
        "attention_jvp, no tangents": lambda: attention_jvp(
            q, k, v, None, None, None, causal=True, scale=0.125
        ),
        "eager forward": lambda: eager(q, k, v),
        "eager, dual": eager_dual,
    }
    for value, expected in zip(jvp(), eager_dual(), strict=True):
        torch.testing.assert_close(value, expected, rtol=0.05, atol=0.05)
    with torch.no_grad():
        compare(benchmark, capsys, f"bf16, B={batch} T={length} H=8/4 D=64", subjects)
