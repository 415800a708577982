"""Other people's ways to the loss and gradients of a linear head, as users call them.

Each function takes a :class:`Problem` and returns a call that makes the gradients, or raises
:class:`Absent` with the reason. ``uniform``: the peer has a mean over tokens only, without weights.
"""

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Gradients = dict[str, Tensor]


class Absent(Exception):
    """The peer cannot run here; the message says why."""


@dataclass
class Problem:
    """A batch of a language-model head; of a trained one ``weight`` requires a gradient."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    target: Tensor  # int64 [N]
    token_weight: Tensor  # float32 [N]

    @property
    def trained(self) -> bool:
        return self.weight.requires_grad

    def gradients(self, loss: Tensor) -> Gradients:
        wanted = {"d_hidden": self.hidden}
        if self.trained:
            wanted["d_weight"] = self.weight
        grads = torch.autograd.grad(loss, list(wanted.values()))
        return dict(zip(wanted, grads, strict=True))

    def weighted(self, nll: Tensor) -> Gradients:
        return self.gradients((nll.float() * self.token_weight).sum())


Maker = Callable[[Problem], Callable[[], Gradients]]


@dataclass(frozen=True)
class Peer:
    name: str
    make: Maker
    package: str | None = None  # whose version is reported
    uniform: bool = False


def _import(module: str, *names: str) -> Any:
    """The module's attributes ``names``, or Absent."""
    try:
        found = importlib.import_module(module)
    except ImportError as error:
        raise Absent(f"import {module}: {error}") from error
    missing = [name for name in names if not hasattr(found, name)]
    if missing:
        raise Absent(f"{module} has no {', '.join(missing)}")
    return [getattr(found, name) for name in names]


# ---- PyTorch ----


def _eager_nll(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(hidden, weight).float(), target, reduction="none")


def eager(problem: Problem):
    return lambda: problem.weighted(_eager_nll(problem.hidden, problem.weight, problem.target))


def compiled(problem: Problem):
    if problem.hidden.device.type == "cpu":
        raise Absent("compiling for a CPU takes longer than a dry run should")
    nll = torch.compile(_eager_nll, dynamic=False)
    return lambda: problem.weighted(nll(problem.hidden, problem.weight, problem.target))


def compiled_for_cpu(problem: Problem):
    """Inductor's C++, compiled when first called."""
    nll = torch.compile(_eager_nll, dynamic=False)
    return lambda: problem.weighted(nll(problem.hidden, problem.weight, problem.target))


def _torch_linear_cross_entropy(reduction: str) -> Maker:
    def make(problem: Problem):
        if not hasattr(F, "linear_cross_entropy"):
            raise Absent(f"torch {torch.__version__} has no nn.functional.linear_cross_entropy")
        (options,) = _import(
            "torch.nn.modules.linear_cross_entropy_options", "LinearCrossEntropyOptions"
        )

        def call():
            loss = F.linear_cross_entropy(
                problem.hidden,
                problem.weight,
                problem.target,
                reduction=reduction,
                ignore_index=-100,
                options=options(),
            )
            return problem.weighted(loss) if reduction == "none" else problem.gradients(loss)

        return call

    return make


def cublas_loop(problem: Problem, chunk: int = 2048):
    """Chunks of rows through cuBLAS with float32 logits, row operations in eager PyTorch: what a
    careful user writes in twenty lines.
    """
    hidden, weight = problem.hidden.detach(), problem.weight.detach()

    def product(a: Tensor, b: Tensor) -> Tensor:
        if a.device.type == "cuda":
            return torch.mm(a, b, out_dtype=torch.float32)
        return a.float() @ b.float()

    def call():
        nll = hidden.new_empty(len(hidden), dtype=torch.float32)
        d_hidden = torch.empty_like(hidden)
        d_weight = weight.new_zeros(weight.shape, dtype=torch.float32) if problem.trained else None
        for start in range(0, len(hidden), chunk):
            rows = slice(start, start + chunk)
            target = problem.target[rows, None]
            logits = product(hidden[rows], weight.T)
            normaliser = logits.logsumexp(-1, keepdim=True)
            nll[rows] = (normaliser - logits.gather(-1, target)).squeeze(-1)
            p = logits.sub_(normaliser).exp_()
            p.scatter_add_(-1, target, -torch.ones_like(normaliser))
            p = p.mul_(problem.token_weight[rows, None]).to(hidden.dtype)
            torch.mm(p, weight, out=d_hidden[rows])
            if d_weight is not None:
                d_weight += product(p.T, hidden[rows])
        gradients = {"nll": nll, "d_hidden": d_hidden}
        if d_weight is not None:
            gradients["d_weight"] = d_weight.to(weight.dtype)
        return gradients

    return call


# ---- packages ----


def liger(problem: Problem):
    """Liger's Triton kernels, with the float32 accumulation of d_weight that ours has."""
    (function,) = _import(
        "liger_kernel.transformers.fused_linear_cross_entropy", "LigerFusedLinearCrossEntropyLoss"
    )
    loss = function(reduction="mean", accum_dtype=torch.float32)
    return lambda: problem.gradients(loss(problem.weight, problem.hidden, problem.target))


def liger_sm90(problem: Problem):
    (function,) = _import(
        "liger_kernel.ops.cutedsl.ops.fused_linear_cross_entropy_sm90",
        "liger_fused_linear_cross_entropy_sm90",
    )
    return lambda: problem.gradients(function(problem.hidden, problem.weight, problem.target))


def liger_per_token(problem: Problem):
    """Liger's per-token losses on Hopper."""
    (function,) = _import(
        "liger_kernel.ops.cutedsl.ops.fused_scaled_cross_entropy_sm90",
        "LigerFusedScaledCrossEntropySM90Function",
    )

    def call():
        result = function.apply(problem.hidden, problem.weight, problem.target)
        return problem.weighted(result[0] if isinstance(result, tuple) else result)

    return call


def _cut_cross_entropy(reduction: str, filter_eps: str | None) -> Maker:
    def make(problem: Problem):
        (function,) = _import("cut_cross_entropy", "linear_cross_entropy")

        def call():
            loss = function(
                problem.hidden,
                problem.weight,
                problem.target,
                reduction=reduction,
                filter_eps=filter_eps,
            )
            return problem.weighted(loss) if reduction == "none" else problem.gradients(loss)

        return call

    return make


def _cut_cross_entropy_on_cpu(reduction: str) -> Maker:
    """Its `torch_compile`, which stores the logits; its Triton kernels need a GPU."""

    def make(problem: Problem):
        (function,) = _import("cut_cross_entropy", "linear_cross_entropy")

        def call():
            loss = function(
                problem.hidden,
                problem.weight,
                problem.target,
                reduction=reduction,
                impl="torch_compile",
            )
            return problem.weighted(loss) if reduction == "none" else problem.gradients(loss)

        return call

    return make


def _for_gpu(problem: Problem):
    raise Absent("its kernels need a CUDA GPU")


def quack(problem: Problem):
    (function,) = _import("quack.linear_cross_entropy", "chunked_linear_cross_entropy")
    return lambda: problem.gradients(
        function(problem.hidden, problem.weight, problem.target, reduction="mean")
    )


PEERS = (
    Peer("eager", eager, "torch"),
    Peer("torch.compile", compiled, "torch"),
    Peer("cuBLAS chunk loop", cublas_loop, "torch"),
    Peer("torch linear_cross_entropy, none", _torch_linear_cross_entropy("none"), "torch"),
    Peer("torch linear_cross_entropy", _torch_linear_cross_entropy("mean"), "torch", uniform=True),
    Peer("CCE, none", _cut_cross_entropy("none", None), "cut-cross-entropy"),
    Peer("CCE, none, filtered", _cut_cross_entropy("none", "auto"), "cut-cross-entropy"),
    Peer("CCE", _cut_cross_entropy("mean", None), "cut-cross-entropy", uniform=True),
    Peer("Liger", liger, "liger-kernel", uniform=True),
    Peer("Liger SM90", liger_sm90, "liger-kernel", uniform=True),
    Peer("Liger SM90, per token", liger_per_token, "liger-kernel"),
    Peer("quack", quack, "quack-kernels", uniform=True),
)

CPU_PEERS = (
    Peer("eager", eager, "torch"),
    Peer("torch.compile", compiled_for_cpu, "torch"),
    Peer("torch linear_cross_entropy, none", _torch_linear_cross_entropy("none"), "torch"),
    Peer("torch linear_cross_entropy", _torch_linear_cross_entropy("mean"), "torch", uniform=True),
    Peer("CCE torch_compile, none", _cut_cross_entropy_on_cpu("none"), "cut-cross-entropy"),
    Peer("CCE torch_compile", _cut_cross_entropy_on_cpu("mean"), "cut-cross-entropy", uniform=True),
    Peer("CCE", _for_gpu, "cut-cross-entropy"),
    Peer("Liger", _for_gpu, "liger-kernel", uniform=True),
    Peer("quack", _for_gpu, "quack-kernels", uniform=True),
)


def peers_for(device: torch.device) -> tuple[Peer, ...]:
    """The peers of the head on this device; those that cannot run there say so when made."""
    return PEERS if device.type == "cuda" else CPU_PEERS


def package_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def foreign_errors() -> tuple[type[BaseException], ...]:
    """What a peer may raise where it does not serve this device, shape or version of torch."""
    known: list[type[BaseException]] = [
        Absent,
        ArithmeticError,
        AssertionError,
        AttributeError,
        ImportError,
        LookupError,
        OSError,
        RuntimeError,
        TypeError,
        ValueError,
    ]
    for module, name in (
        ("triton.errors", "TritonError"),
        ("cutlass.base_dsl.common", "DSLBaseError"),
    ):
        if module.split(".")[0] in sys.modules:
            try:
                known.append(getattr(importlib.import_module(module), name))
            except (ImportError, AttributeError):
                continue
    return tuple(known)
