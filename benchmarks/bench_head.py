"""The linear head beside its own matrix product and eager PyTorch, in one process.

    python -m pytest benchmarks/bench_head.py -q (--benchmark-json=FILE keeps the figures)

Every subject runs once in each round, in turn, so that a busy machine slows all of them alike;
"ratio" is the median over the rounds of its time over that of ``hidden @ weight.T`` in the same
round: the cost in matrix products, of which the arithmetic says 2 for a frozen and 3 for a trained
head with known weights. Eager PyTorch has rounds of its own, beside the same product: the memory
that it takes and gives back for its logits makes fresh pages dearer for whoever runs next.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import compare
from vcore_kernels import linear_nll, linear_nll_jvp, weighted_linear_nll


class Head:
    def __init__(self, n: int, h: int, v: int, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(0)
        self.hidden = torch.randn(n, h, generator=generator).to(dtype).requires_grad_()
        self.weight = (torch.randn(v, h, generator=generator) * 3 / h**0.5).to(dtype)
        self.trained = self.weight.clone().requires_grad_()
        self.target = torch.randint(0, v, (n,), generator=generator)
        self.token_weight = torch.rand(n, generator=generator) / n

    def backward(self, loss: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss, [x for x in (self.hidden, weight) if x.requires_grad])

    def known(self, weight: Tensor):
        loss, _ = weighted_linear_nll(self.hidden, weight, self.target, self.token_weight)
        return self.backward(loss, weight)

    def late(self, weight: Tensor):
        nll = linear_nll(self.hidden, weight, self.target)
        return self.backward((nll * self.token_weight).sum(), weight)

    def eager(self, weight: Tensor):
        logits = F.linear(self.hidden, weight).float()
        nll = F.cross_entropy(logits, self.target, reduction="none")
        return self.backward((nll * self.token_weight).sum(), weight)

    def subjects(self) -> dict[str, Callable]:
        frozen, trained = self.weight, self.trained
        with_no_grad = torch.no_grad()
        return {
            "hidden @ weight.T": with_no_grad(lambda: self.hidden @ frozen.T),
            "nll alone": with_no_grad(lambda: linear_nll(self.hidden, frozen, self.target)),
            "nll and tangent, frozen": lambda: linear_nll_jvp(
                self.hidden, frozen, self.target, self.hidden
            ),
            "known weights, frozen": lambda: self.known(frozen),
            "late weights, frozen": lambda: self.late(frozen),
            "known weights, trained": lambda: self.known(trained),
            "late weights, trained": lambda: self.late(trained),
        }

    def eager_subjects(self) -> dict[str, Callable]:
        return {
            "hidden @ weight.T": torch.no_grad()(lambda: self.hidden @ self.weight.T),
            "eager, frozen": lambda: self.eager(self.weight),
            "eager, trained": lambda: self.eager(self.trained),
        }

    def check(self) -> None:
        """The gate: gradients of all three agree to the dtype's rounding."""
        for weight in (self.weight, self.trained):
            expected = self.eager(weight)
            for grads in (self.known(weight), self.late(weight)):
                for grad, reference in zip(grads, expected, strict=True):
                    scale = reference.abs().max().item()
                    atol = 4 * torch.finfo(grad.dtype).eps * scale
                    torch.testing.assert_close(grad, reference, rtol=0.02, atol=atol)


@pytest.mark.parametrize("which", ["ours", "eager"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_time(benchmark, dtype, which, capsys):
    n, h, v = (1024, 1024, 65536) if dtype == torch.bfloat16 else (1024, 1024, 16384)
    head = Head(n, h, v, dtype)
    head.check()
    subjects = head.subjects() if which == "ours" else head.eager_subjects()
    title = f"{dtype}, N={n} H={h} V={v}"
    compare(benchmark, capsys, title, subjects)
    gflops = 2e-9 * n * h * v / (benchmark.extra_info["hidden @ weight.T"]["ms"] * 1e-3)
    with capsys.disabled():
        print(f"  one product: {gflops:.0f} GFLOP/s")


def resident_bytes(field: str) -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))


def peak_above(call: Callable) -> tuple[object, int]:
    """What the call returns, and how far resident memory rose above where it stood before."""
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak starts anew
    before = resident_bytes("VmRSS")
    result = call()
    return result, resident_bytes("VmHWM") - before


@pytest.mark.parametrize("name", ["known frozen", "late frozen", "known trained", "late trained"])
def test_memory(benchmark, name, capsys):
    """Peak beyond inputs, gradients and the fp32 accumulator of d weight, at N=4096, V=151936."""
    n, h, v = 4096, 256, 151936
    head = Head(n, h, v, torch.bfloat16)
    weight = head.trained if "trained" in name else head.weight
    call = head.known if "known" in name else head.late
    call(weight)  # whatever is allocated once
    grads, peak = benchmark.pedantic(lambda: peak_above(lambda: call(weight)), rounds=1)
    accumulator = v * h * 4 if "trained" in name else 0
    extra = peak - sum(grad.nbytes for grad in grads) - accumulator
    logits = n * v * 2
    benchmark.extra_info.update(extra_bytes=extra, share_of_bf16_logits=extra / logits)
    with capsys.disabled():
        print(f"\n{name}: {extra / 2**20:.0f} MiB extra, 1/{logits / extra:.1f} of the bf16 logits")
