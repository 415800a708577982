"""Losses and gradients of a linear head beside the peers.

    python -m pytest benchmarks/bench_head.py --benchmark-only

The unit is ``hidden @ weight.T`` (one GEMM, N*V*H multiplications) in the same round. Arithmetic
alone asks for 2 of them with a frozen head and for 3 with a trained one, so *% of ceiling* counts
these, however many a subject takes. Weights of the tokens are "known" where the loss is made
(:func:`weighted_linear_nll`), or "late" where they come with the upstream gradient
(:func:`linear_nll`); peers with ``none`` have them late, eager PyTorch has both, and those without
take a plain mean.

*extra* is everything at the peak but the inputs and the returned gradients.
"""

import functools
from dataclasses import dataclass, replace

import pytest
import torch
from vcore_train.bench_record import Row

from benchmarks.measure import Call
from benchmarks.peers import Absent, Gradients, Peer, Problem, eager, peers_for
from benchmarks.suite import Bench, default_device, gate, product, relative_error
from vcore_kernels import linear_nll, weighted_linear_nll

UNIT = "hidden @ weight.T"
ROWS = 256  # of the truth at a time


@dataclass(frozen=True)
class Shape:
    n: int
    h: int
    v: int
    dtype: torch.dtype
    quick: tuple[int, int, int]  # instead of n, h, v with --quick

    @property
    def id(self) -> str:
        return f"{product(self.dtype).split()[0]}-V{self.v}"

    def of(self, quick: bool) -> "Shape":
        return replace(self, **dict(zip("nhv", self.quick, strict=True))) if quick else self

    @property
    def title(self) -> str:
        return f"{product(self.dtype).split()[0]} N={self.n} H={self.h} V={self.v}"

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.n * self.h * self.v


MAIN = Shape(1024, 1024, 65536, torch.bfloat16, (64, 32, 512))
SINGLE = Shape(1024, 1024, 16384, torch.float32, (64, 32, 256))
# Qwen3's vocabulary, divisible by nothing that tiles; what counts here is the memory.
MEMORY = Shape(4096, 256, 151936, torch.bfloat16, (96, 16, 771))
ON_GPU = (
    Shape(4096, 4096, 128256, torch.bfloat16, (64, 32, 512)),
    Shape(4096, 2560, 151936, torch.bfloat16, (96, 16, 771)),
)
SHAPES = (MAIN, SINGLE, MEMORY)


class Head:
    """A problem of one shape, and the truth about it."""

    def __init__(self, shape: Shape, device: torch.device):
        generator = torch.Generator().manual_seed(0)
        n, h, v = shape.n, shape.h, shape.v
        self.shape = shape
        self._truth: dict[bool, Gradients] = {}
        self.hidden = torch.randn(n, h, generator=generator).to(device, shape.dtype)
        self.hidden.requires_grad_()
        weight = torch.randn(v, h, generator=generator).mul_(3 / h**0.5)
        self.weight = weight.to(device, shape.dtype)
        self.trained = self.weight.detach().requires_grad_()
        self.target = torch.randint(0, v, (n,), generator=generator).to(device)
        self.token_weight = (torch.rand(n, generator=generator) / n).to(device)

    def problem(self, trained: bool, uniform: bool) -> Problem:
        weight = self.trained if trained else self.weight
        n = len(self.target)
        weights = torch.full_like(self.token_weight, 1 / n) if uniform else self.token_weight
        return Problem(self.hidden, weight, self.target, weights)

    def truth(self, uniform: bool) -> Gradients:
        if uniform not in self._truth:
            self._truth[uniform] = self._find_truth(uniform)
        return self._truth[uniform]

    def _find_truth(self, uniform: bool) -> Gradients:
        """Gradients in float64 (for bf16 inputs in float32), from some rows at a time."""
        wide = torch.float64 if self.shape.dtype == torch.float32 else torch.float32
        problem = self.problem(True, uniform)
        hidden, weight = problem.hidden.detach(), problem.weight.detach().to(wide)
        d_hidden = torch.empty(hidden.shape, dtype=wide, device=hidden.device)
        d_weight = torch.zeros_like(weight)
        for start in range(0, len(hidden), ROWS):
            rows = slice(start, start + ROWS)
            x, target = hidden[rows].to(wide), problem.target[rows, None]
            p = torch.softmax(x @ weight.T, -1)
            p.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            p.mul_(problem.token_weight[rows, None])
            d_hidden[rows] = p @ weight
            d_weight.addmm_(p.T, x)
        return {"d_hidden": d_hidden, "d_weight": d_weight}

    def errors(self, gradients: Gradients, uniform: bool) -> dict[str, float]:
        truth = self.truth(uniform)
        return {
            name: relative_error(value, truth[name])
            for name, value in gradients.items()
            if name in truth
        }

    @functools.cached_property
    def eager_errors(self) -> dict[str, float]:
        """What eager PyTorch in the dtype of the inputs is off by."""
        return self.errors(eager(self.problem(True, False))(), False)

    def check(self, gradients: Gradients, *, trained: bool, uniform: bool, times: float) -> str:
        """The gate: at most ``times`` eager PyTorch's error, plus one rounding."""
        eps = torch.finfo(self.shape.dtype).eps
        expected = {"d_hidden", "d_weight"} if trained else {"d_hidden"}
        assert expected <= gradients.keys(), f"only {', '.join(gradients)} came back"
        allowed = {name: times * error + eps for name, error in self.eager_errors.items()}
        return gate(self.errors(gradients, uniform), allowed)


def known(problem: Problem) -> Call:
    def call() -> Gradients:
        loss, _ = weighted_linear_nll(
            problem.hidden, problem.weight, problem.target, problem.token_weight
        )
        return problem.gradients(loss)

    return call


def late(problem: Problem) -> Call:
    return lambda: problem.weighted(linear_nll(problem.hidden, problem.weight, problem.target))


OURS = (Peer("known weights", known), Peer("late weights", late))


@functools.lru_cache(maxsize=1)
def head(shape: Shape, device: torch.device) -> Head:
    return Head(shape, device)


def subjects(shape: Shape) -> list[Peer]:
    device = default_device()
    found = [*OURS, *peers_for(device)]
    if shape is MAIN or device.type == "cuda":
        return found
    absent_anyway = ("CCE", "Liger", "quack")  # the first shape says so
    found = [peer for peer in found if peer.name not in absent_anyway]
    # Compiled once or twice, and where a call takes long one of a kind.
    dropped = ("CCE torch_compile, none", "CCE torch_compile")
    if shape is MEMORY:
        dropped = ("torch.compile", "CCE torch_compile", "torch linear_cross_entropy, none")
        dropped += ("torch linear_cross_entropy",)  # minutes
    return [peer for peer in found if peer.name not in dropped]


def cases() -> list:
    shapes = (*SHAPES, *(ON_GPU if torch.cuda.is_available() else ()))
    return [
        pytest.param(shape, trained, peer, id=f"{shape.id}-{task}-{peer.name.replace(' ', '_')}")
        for shape in shapes
        for trained, task in ((False, "frozen"), (True, "trained"))
        for peer in subjects(shape)
    ]


@pytest.mark.parametrize(("shape", "trained", "peer"), cases())
def test_head(bench: Bench, device, quick, shape: Shape, trained: bool, peer: Peer):
    # On a CPU in bf16, each of its calls takes as long as 20 to 100 products.
    once = device.type == "cpu" and "linear_cross_entropy" in peer.name and shape is not SINGLE
    shape = shape.of(quick)
    found = head(shape, device)
    n, h, v = shape.n, shape.h, shape.v
    size = found.hidden.element_size()
    ours = peer in OURS
    row = Row(
        f"head, {'trained' if trained else 'frozen'}: {shape.title}",
        peer.name,
        "ours" if ours else "peer",
        unit=UNIT,
        note="plain mean" if peer.uniform else "",
        flops=(3 if trained else 2) * shape.flops,
        bytes=size * (n * h * 2 + v * h * (2 if trained else 1)),
        ceiling=product(shape.dtype),
        logits_bytes=n * v * size,
        accumulator_bytes=v * h * 4 if ours and trained and size < 4 else 0,
    )
    hidden, weight = found.hidden.detach(), found.weight
    unit_bytes = size * (n * h + v * h + n * v)

    def make() -> Call:
        if "compile" in peer.name:  # graphs of other problems would count against its limit
            torch._dynamo.reset()
        return peer.make(found.problem(trained, peer.uniform))

    bench.measure(
        row,
        make,
        lambda: torch.mm(hidden, weight.T),
        lambda gradients: found.check(
            gradients, trained=trained, uniform=peer.uniform, times=3 if ours else 8
        ),
        unit_row=Row(row.group, UNIT, "yardstick", flops=shape.flops, bytes=unit_bytes),
        memory="resident",
        once=once,
    )


# ---- growth ----

GROWTH = {  # the others stay at the first size
    "N": (256, 512, 1024),
    "V": (8192, 16384, 32768),
    "H": (128, 256, 512),
}
GROWTH_QUICK = {"N": (16, 32, 64), "V": (128, 256, 512), "H": (8, 16, 32)}


def growing() -> list[Peer]:
    device = default_device()
    wanted: tuple[str, ...] = ("eager", "torch linear_cross_entropy")
    wanted += ("CCE", "Liger", "quack") if device.type == "cuda" else ()
    return [OURS[0], *(peer for peer in peers_for(device) if peer.name in wanted)]


@pytest.mark.parametrize("axis", GROWTH)
@pytest.mark.parametrize("peer", growing(), ids=lambda peer: peer.name.replace(" ", "_"))
def test_growth(bench: Bench, device, quick, peer: Peer, axis: str):
    """A trained head in float32: the sizes are small, so that constant costs show."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    sizes = GROWTH_QUICK if quick else GROWTH
    base = {name: values[0] for name, values in sizes.items()}
    calls = {}
    for size in sizes[axis]:
        given = base | {axis: size}
        found = Head(Shape(given["N"], given["H"], given["V"], dtype, (0, 0, 0)), device)
        try:
            calls[size] = peer.make(found.problem(True, peer.uniform))
        except Absent as reason:
            pytest.skip(f"{peer.name}: {reason}")
        try:
            found.check(calls[size](), trained=True, uniform=peer.uniform, times=8)
        except AssertionError as error:
            if peer in OURS:
                raise
            pytest.xfail(f"{peer.name} is wrong: {error}")
    fixed = " ".join(f"{name}={value}" for name, value in base.items())
    bench.grow(
        f"head, trained, {product(dtype).split()[0]}, from {fixed}",
        peer.name,
        "ours" if peer in OURS else "peer",
        axis,
        calls,
    )
