"""Which backend serves a call: ``reference`` (eager PyTorch), ``cpp`` (compiled CPU kernels),
``cuda`` (compiled CUDA kernels, in-place perturbation alone), ``triton`` (CUDA and ROCm)."""

import logging
import os
from dataclasses import dataclass

import torch

from vcore_kernels import _library
from vcore_kernels.backends import triton

logger = logging.getLogger("vcore_kernels")
if os.environ.get("VCORE_LOG"):  # the one log switch, e.g. VCORE_LOG=DEBUG
    logging.basicConfig()
    logger.setLevel(os.environ["VCORE_LOG"].upper())


class BackendError(RuntimeError):
    """An explicitly requested backend cannot serve the call; the message says why."""


@dataclass(frozen=True)
class Support:
    """Whether something is usable, and where it is not, why. True and False in a condition."""

    usable: bool
    reason: str = ""

    def __bool__(self) -> bool:
        return self.usable


YES = Support(True)
_CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CUDA_OPS = ("perturb_",)
_ROW_OPS = ("gated_jvp", "rms_norm_jvp")
_TRITON_DTYPES = _CPP_DTYPES
_TRITON_PRODUCT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_PRODUCTS = (
    "attention_jvp",
    "linear_nll",
    "weighted_linear_nll",
    "linear_nll_jvp",
    "linear_nll_pair",
    "linear_nll_grad_norms",
)

# op -> the backend that served its last eager call. For tests and `vcore info`.
last_used: dict[str, str] = {}


def _support(why_not: str | None) -> Support:
    return YES if why_not is None else Support(False, why_not)


def backends() -> dict[str, Support]:
    """Every backend of this build and whether it is usable on this machine.

    Returns a dict from name to :class:`Support`, whose ``reason`` says why a backend is not usable.
    """
    return {
        "reference": YES,
        "cpp": _support(_library.WHY_NOT_COMPILED),
        "cuda": _support(_library.WHY_NOT_CUDA),
        "triton": _support(triton.WHY_NOT),
    }


def supports(backend: str, op: str, *tensors: torch.Tensor) -> Support:
    """Whether ``backend`` can serve a call of ``op`` on these tensors."""
    available = backends().get(backend)
    if available is None:
        raise ValueError(f"unknown backend {backend!r}: expected auto, {', '.join(backends())}")
    if not available or backend == "reference":
        return available
    serves = {"cpp": _cpp_serves, "cuda": _cuda_serves, "triton": _triton_serves}[backend]
    for tensor in tensors:
        support = serves(op, tensor)
        if not support:
            return support
    return YES


def _cpp_serves(op: str, tensor: torch.Tensor) -> Support:
    if tensor.device.type != "cpu":
        return Support(False, f"cpp serves CPU tensors, got {tensor.device}")
    if tensor.is_floating_point() and tensor.dtype not in _CPP_DTYPES:
        return Support(False, f"cpp has no kernel for {tensor.dtype}")
    return YES


def _cuda_serves(op: str, tensor: torch.Tensor) -> Support:
    if op not in _CUDA_OPS:
        return Support(False, f"cuda has no kernel for {op}")
    if tensor.device.type != "cuda":
        return Support(False, f"cuda serves CUDA tensors, got {tensor.device}")
    if tensor.is_floating_point() and tensor.dtype not in _CPP_DTYPES:
        return Support(False, f"cuda has no kernel for {tensor.dtype}")
    return _capable("cuda", tensor.device)


def _triton_serves(op: str, tensor: torch.Tensor) -> Support:
    if op in _ROW_OPS:
        return Support(False, f"triton has no kernel for {op}")
    expected = "cpu" if triton.INTERPRETED else "cuda"
    if tensor.device.type != expected:
        return Support(False, f"triton serves {expected} tensors here, got {tensor.device}")
    dtypes = _TRITON_PRODUCT_DTYPES if op in _PRODUCTS else _TRITON_DTYPES
    if tensor.is_floating_point() and tensor.dtype not in dtypes:
        return Support(False, f"triton has no kernel for {op} in {tensor.dtype}")
    if op == "attention_jvp" and tensor.dim() == 4:
        widest = 128 if tensor.dtype == torch.float32 else 256  # accumulators in registers
        if tensor.shape[3] > widest:
            return Support(
                False,
                f"triton has heads of at most {widest} columns in {tensor.dtype}, got "
                f"{tensor.shape[3]}",
            )
    if expected == "cuda" and torch.version.hip is None:
        return _capable("triton", tensor.device)
    return YES


def _capable(backend: str, device: torch.device) -> Support:
    capability = torch.cuda.get_device_capability(device)
    if capability < (8, 0):
        name = ".".join(map(str, capability))
        return Support(False, f"{backend} needs compute capability 8.0, {device} has {name}")
    return YES


def resolve(op: str, backend: str, *tensors: torch.Tensor) -> str:
    """The backend that serves ``op`` on these tensors.

    ``auto`` takes the fastest one that can (never Triton's interpreter); a named one that cannot
    raises :class:`BackendError`.
    """
    if backend == "auto":
        fast = [] if triton.INTERPRETED else ["cpp", "cuda", "triton"]
        chosen = next((name for name in fast if supports(name, op, *tensors)), "reference")
    else:
        chosen = backend
        support = supports(backend, op, *tensors)
        if not support:
            raise BackendError(
                f"{op}: backend {backend!r} cannot serve this call: {support.reason}"
            )
    if not torch.compiler.is_compiling():
        if last_used.get(op) != chosen:
            logger.info("%s: backend %s", op, chosen)
        last_used[op] = chosen
    return chosen
