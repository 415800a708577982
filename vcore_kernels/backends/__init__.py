"""Which backend serves a call: ``reference`` (eager PyTorch), ``cpp`` (compiled CPU kernels)."""

import logging
import os
from dataclasses import dataclass

import torch

from vcore_kernels import _library

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

# op -> the backend that served its last eager call. For tests and `vcore info`.
last_used: dict[str, str] = {}


def backends() -> dict[str, Support]:
    """Every backend of this build and whether it is usable on this machine.

    Returns a dict from name to :class:`Support`, whose ``reason`` says why a backend is not usable.
    """
    why_not = _library.WHY_NOT_COMPILED
    return {"reference": YES, "cpp": YES if why_not is None else Support(False, why_not)}


def supports(backend: str, *tensors: torch.Tensor) -> Support:
    """Whether ``backend`` can serve a call on these tensors."""
    available = backends().get(backend)
    if available is None:
        raise ValueError(f"unknown backend {backend!r}: expected auto, {', '.join(backends())}")
    if not available or backend == "reference":
        return available
    for tensor in tensors:
        if tensor.device.type != "cpu":
            return Support(False, f"cpp serves CPU tensors, got {tensor.device}")
        if tensor.is_floating_point() and tensor.dtype not in _CPP_DTYPES:
            return Support(False, f"cpp has no kernel for {tensor.dtype}")
    return YES


def resolve(op: str, backend: str, *tensors: torch.Tensor) -> str:
    """The backend that serves ``op`` on these tensors.

    ``auto`` takes the fastest one that can; a named one that cannot raises :class:`BackendError`.
    """
    if backend == "auto":
        chosen = "cpp" if supports("cpp", *tensors) else "reference"
    else:
        chosen = backend
        support = supports(backend, *tensors)
        if not support:
            raise BackendError(
                f"{op}: backend {backend!r} cannot serve this call: {support.reason}"
            )
    if not torch.compiler.is_compiling():
        if last_used.get(op) != chosen:
            logger.info("%s: backend %s", op, chosen)
        last_used[op] = chosen
    return chosen
