"""The linear head on a GPU: every operator and every peer, at the shapes of :data:`SHAPES`.

Products count N*V*H multiplications: a frozen head with known weights needs two, a trained one
three. "GEMMs" is the time over that of one such product, ``hidden @ weight.T``, in the same round.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.measure import Bench, Figure, Times, tensors_in, timed_figure
from benchmarks.peers import PEERS, Absent, Problem, foreign_errors
from vcore_kernels import linear_nll, linear_nll_jvp, linear_nll_pair, weighted_linear_nll

UNIT = "one GEMM"
CEILING = "bf16 GEMM"
SAMPLES = 24  # rows and vocabulary entries whose results are compared with float64


@dataclass(frozen=True)
class Shape:
    name: str
    n: int
    h: int
    v: int
    peers: bool = True  # beside every peer; else only ours
    quick: bool = True  # also with --quick

    @property
    def title(self) -> str:
        return f"{self.name}: N={self.n} H={self.h} V={self.v}"

    @property
    def flops(self) -> float:
        """Of one product."""
        return 2.0 * self.n * self.h * self.v


SHAPES = (
    Shape("Llama 8B", 4096, 4096, 128256),
    Shape("Qwen3 0.6B", 4096, 1024, 151936, quick=False),
    Shape("Qwen3 4B", 4096, 2560, 151936, quick=False),
    Shape("few rows", 256, 4096, 128256, peers=False, quick=False),
    Shape("one row", 1, 4096, 128256, peers=False, quick=False),
    Shape("N*V > 2^31", 32768, 1024, 151936, peers=False),
)
DRY_SHAPES = (
    Shape("dry", 48, 32, 160),
    Shape("dry, odd", 3, 16, 131, peers=False),
)


class Inputs:
    """Random data of one shape, and the calls on it."""

    def __init__(self, shape: Shape, device: torch.device):
        generator = torch.Generator(device).manual_seed(0)

        def normal(*size: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(*size, generator=generator, device=device) * scale
            return values.to(torch.bfloat16)

        n, h, v = shape.n, shape.h, shape.v
        self.shape = shape
        self.hidden = normal(n, h).requires_grad_()
        self.frozen = normal(v, h, scale=3 / h**0.5)  # logits of standard deviation 3
        self.trained = self.frozen.detach().requires_grad_()
        self.target = torch.randint(v, (n,), generator=generator, device=device)
        self.token_weight = torch.rand(n, generator=generator, device=device) / n
        self.uniform = torch.full((n,), 1 / n, device=device)
        self.hidden_tangent = normal(n, h)
        self.weight_tangent = normal(v, h, scale=3 / h**0.5)
        self.hidden_perturbed = (self.hidden.detach().float() + 0.01 * self.hidden_tangent).to(
            torch.bfloat16
        )
        self.weight_perturbed = (self.frozen.float() + 0.01 * self.weight_tangent).to(
            torch.bfloat16
        )

    def problem(self, trained: bool, uniform: bool) -> Problem:
        weight = self.trained if trained else self.frozen
        token_weight = self.uniform if uniform else self.token_weight
        return Problem(self.hidden, weight, self.target, token_weight)


@dataclass(frozen=True)
class Subject:
    """One line: what is called, and how many products the arithmetic of its task asks for."""

    name: str
    task: str
    call: Callable[[], dict[str, Tensor]]
    products: int
    ours: bool = False
    accumulates: bool = False  # d_weight in float32 beside its result, no part of the extra memory
    uniform: bool = False


def our_subjects(inputs: Inputs, backend: str, memory_only: bool) -> list[Subject]:
    def known(trained: bool, uniform: bool):
        problem = inputs.problem(trained, uniform)

        def call():
            loss, nll = weighted_linear_nll(
                problem.hidden,
                problem.weight,
                problem.target,
                problem.token_weight,
                backend=backend,
            )
            return {"nll": nll, **problem.gradients(loss)}

        return call

    def late(trained: bool):
        problem = inputs.problem(trained, uniform=False)

        def call():
            nll = linear_nll(problem.hidden, problem.weight, problem.target, backend=backend)
            return {"nll": nll.detach(), **problem.weighted(nll)}

        return call

    def alone():
        with torch.no_grad():
            nll = linear_nll(inputs.hidden, inputs.frozen, inputs.target, backend=backend)
        return {"nll": nll}

    hidden, weight, target = inputs.hidden.detach(), inputs.frozen, inputs.target

    def jvp(weight_tangent: Tensor | None):
        def call():
            nll, tangent = linear_nll_jvp(
                hidden, weight, target, inputs.hidden_tangent, weight_tangent, backend=backend
            )
            return {"nll": nll, "tangent": tangent}

        return call

    def pair(weight_perturbed: Tensor | None):
        def call():
            nll, difference = linear_nll_pair(
                hidden, inputs.hidden_perturbed, weight, target, weight_perturbed, backend=backend
            )
            return {"nll": nll, "difference": difference}

        return call

    subjects = [
        Subject("known weights", "trained", known(True, False), 3, accumulates=True),
        Subject("known weights", "frozen", known(False, False), 2),
        Subject("late weights", "trained", late(True), 4, accumulates=True),
        Subject("late weights", "frozen", late(False), 2),
        Subject("nll alone", "no gradient", alone, 1),
        Subject("jvp", "tangent, frozen", jvp(None), 2),
    ]
    if not memory_only:
        subjects += [
            Subject("uniform weights", "trained", known(True, True), 3, uniform=True),
            Subject("uniform weights", "frozen", known(False, True), 2, uniform=True),
        ]
        subjects += [
            Subject("jvp", "tangent, trained", jvp(inputs.weight_tangent), 3),
            Subject("pair", "pair, frozen", pair(None), 2),
            # Differences are formed from those of the inputs: (h - h')W' + h(W - W').
            Subject("pair", "pair, trained", pair(inputs.weight_perturbed), 3),
        ]
    return [replace(s, ours=True, name=f"vcore: {s.name}") for s in subjects]


def peer_subjects(inputs: Inputs, bench: Bench) -> list[Subject]:
    subjects = []
    for trained in (True, False):
        for peer in PEERS:
            try:
                call = peer.make(inputs.problem(trained, peer.uniform))
            except Absent as reason:
                bench.absent[peer.name] = str(reason)
                continue
            task = "trained" if trained else "frozen"
            products = 3 if trained else 2
            subjects.append(Subject(peer.name, task, call, products, uniform=peer.uniform))
        subjects.append(eager_tangent(inputs, trained))
    return subjects


def eager_tangent(inputs: Inputs, trained: bool) -> Subject:
    """PyTorch's own forward-mode derivative, with stored logits."""

    def losses(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden, weight).float()
        return F.cross_entropy(logits, inputs.target, reduction="none")

    def call():
        hidden, weight = inputs.hidden.detach(), inputs.frozen
        if trained:
            primals, tangents = (hidden, weight), (inputs.hidden_tangent, inputs.weight_tangent)
            nll, tangent = torch.func.jvp(losses, primals, tangents)
        else:
            nll, tangent = torch.func.jvp(
                lambda h: losses(h, weight), (hidden,), (inputs.hidden_tangent,)
            )
        return {"nll": nll, "tangent": tangent}

    task = "tangent, trained" if trained else "tangent, frozen"
    return Subject("eager forward AD", task, call, 3 if trained else 2)


# ---- the truth ----


class Truth:
    """Float64 results of sampled rows and vocabulary entries, and the errors of eager PyTorch."""

    def __init__(self, inputs: Inputs):
        shape = inputs.shape
        generator = torch.Generator().manual_seed(1)
        rows = torch.randperm(shape.n, generator=generator)[:SAMPLES]
        device = inputs.hidden.device
        self.inputs, self.rows = inputs, rows.to(device)
        drawn = torch.randperm(shape.v, generator=generator)[:SAMPLES].to(device)
        self.entries = torch.cat([drawn, inputs.target[self.rows[: SAMPLES // 2]]]).unique()
        self.expected = self._losses(torch.float64)
        eager = self._losses(torch.bfloat16)
        self.eager = {name: _error(eager[name], value) for name, value in self.expected.items()}
        self._d_weight: dict[bool, Tensor] = {}

    def _losses(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """Eager PyTorch in ``dtype`` on the sampled rows: losses in float32 or wider, the gradient
        of their sum, tangents, and differences of two points.
        """
        inputs, target = self.inputs, self.inputs.target[self.rows]
        wide = torch.promote_types(dtype, torch.float32)

        def losses(hidden: Tensor, weight: Tensor) -> Tensor:
            return F.cross_entropy(F.linear(hidden, weight).to(wide), target, reduction="none")

        hidden = inputs.hidden.detach()[self.rows].to(dtype).requires_grad_()
        weight = inputs.frozen.to(dtype)
        nll = losses(hidden, weight)
        (d_hidden,) = torch.autograd.grad(nll.sum(), hidden)
        found = {"nll": nll.detach(), "d_hidden": d_hidden}
        hidden = hidden.detach()
        tangent = inputs.hidden_tangent[self.rows].to(dtype)
        perturbed = inputs.hidden_perturbed[self.rows].to(dtype)
        for task, d_weight, other_weight in (
            ("frozen", torch.zeros_like(weight), weight),
            ("trained", inputs.weight_tangent.to(dtype), inputs.weight_perturbed.to(dtype)),
        ):
            _, found[f"tangent, {task}"] = torch.func.jvp(
                losses, (hidden, weight), (tangent, d_weight)
            )
            found[f"pair, {task}"] = nll.detach() - losses(perturbed, other_weight)
        return found

    def d_weight(self, uniform: bool) -> Tensor:
        """Rows ``entries`` of the gradient, in float64 from float32 normalisers."""
        if uniform not in self._d_weight:
            inputs, weight = self.inputs, self.inputs.frozen.float()
            factors = inputs.problem(True, uniform).token_weight.double()
            total = torch.zeros(len(self.entries), weight.shape[1], device=weight.device).double()
            for start in range(0, inputs.shape.n, 512):
                rows = slice(start, start + 512)
                hidden = inputs.hidden.detach()[rows].float()
                normaliser = (hidden @ weight.T).logsumexp(-1).double()
                z = hidden.double() @ weight[self.entries].double().T
                p = (z - normaliser[:, None]).exp()
                p -= (inputs.target[rows, None] == self.entries).double()
                total += (p * factors[rows, None]).T @ hidden.double()
            self._d_weight[uniform] = total
        return self._d_weight[uniform]

    def check(self, subject: Subject, results: dict[str, Tensor]) -> tuple[str, bool]:
        """The errors as text, and whether all are within twice eager's (plus a rounding)."""
        found, passed = [], True
        for name, value in results.items():
            if name == "d_weight":
                expected = self.d_weight(subject.uniform)
                got, eager = value[self.entries], torch.finfo(value.dtype).eps
                eager *= expected.abs().max().item()
            else:
                key = name if name in self.expected else subject.task
                expected, got, eager = self.expected[key], value[self.rows], self.eager[key]
            if name == "d_hidden":
                problem = self.inputs.problem(True, subject.uniform)
                factor = problem.token_weight[self.rows].double()[:, None]
                expected, eager = expected * factor, eager * factor.max().item()
            error = _error(got, expected)
            allowed = 2 * eager + torch.finfo(got.dtype).eps * expected.abs().max().item()
            passed = passed and error <= allowed  # False for NaN
            found.append(f"{name} {error:.1e} of {allowed:.1e}")
        return ("" if passed else "FAILED: ") + ", ".join(found), passed


def _error(got: Tensor, expected: Tensor) -> float:
    return (got.detach().double() - expected).abs().max().item()


# ---- running ----


def run(bench: Bench, quick: bool) -> None:
    for shape in DRY_SHAPES if bench.dry else SHAPES:
        if quick and not shape.quick:
            continue
        if bench.late():
            bench.absent[shape.title] = "no time left"
            continue
        run_shape(bench, shape)


def run_shape(bench: Bench, shape: Shape) -> None:
    inputs = Inputs(shape, bench.device)
    big = shape.n * shape.v > 2**31
    subjects = our_subjects(inputs, backend="triton", memory_only=big)
    if shape.peers:
        subjects += peer_subjects(inputs, bench)
    truth = Truth(inputs)
    figures: dict[tuple[str, str], Figure] = {}
    sound = []
    for subject in subjects:
        figure = Figure("head", shape.title, subject.name, UNIT, note=subject.task)
        figures[subject.name, subject.task] = figure
        try:
            bench.poison(1 << 16 if bench.dry else 2 << 30)
            figure.gate, passed = truth.check(subject, subject.call())
            extra = bench.peak_extra(subject.call)
        except foreign_errors() as error:
            if subject.ours:
                bench.failures.append(f"{shape.title}, {subject.name}: {error}")
            figure.gate = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
            continue
        if extra is not None:
            accumulator = 4 * shape.v * shape.h if subject.accumulates else 0
            figure.extra_bytes = extra - accumulator
            figure.share_of_logits = figure.extra_bytes / (2 * shape.n * shape.v)
        if passed:
            sound.append(subject)
        elif subject.ours:
            bench.failures.append(f"{shape.title}, {subject.name} ({subject.task}): {figure.gate}")
    del truth
    for task in dict.fromkeys(subject.task for subject in sound):
        chosen = [subject for subject in sound if subject.task == task]
        times = {} if bench.late() else _time(bench, inputs, chosen)
        for subject in chosen:
            figure = timed_figure(figures[subject.name, task], times.get(subject.name))
            _percent(bench, figure, subject.products * shape.flops)
    bench.add(figures.values())
    for parameter in tensors_in(list(vars(inputs).values())):
        parameter.grad = None


def _time(bench: Bench, inputs: Inputs, subjects: list[Subject]) -> dict[str, Times]:
    hidden, weight = inputs.hidden.detach(), inputs.frozen
    out = hidden.new_empty(hidden.shape[0], weight.shape[0])
    calls = {UNIT: lambda: torch.mm(hidden, weight.T, out=out)}
    calls.update({subject.name: subject.call for subject in subjects})
    return bench.time(calls, UNIT)


def _percent(bench: Bench, figure: Figure, flops: float) -> None:
    rate = bench.ceilings.get("bf16 GEMM, TFLOP/s")
    if rate and figure.ms:
        figure.percent_of_ceiling = flops / (figure.ms * 1e-3) / (rate * 1e12) * 100
        figure.ceiling = CEILING
