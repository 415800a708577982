"""Whether the Triton kernels can run here, and their entry into the operators' dispatch tables.

Nothing here imports triton: a kernel file does, when the first call needs it.
"""

import importlib.util
from importlib import import_module

import torch

from vcore_kernels._library import INTERPRETED, LIBRARY, NAMESPACE

__all__ = ["INTERPRETED", "WHY_NOT", "implement"]


def _why_not() -> str | None:
    try:
        found = importlib.util.find_spec("triton") is not None
    except (ImportError, ValueError):  # kept from being imported, or a stand-in without a spec
        found = False
    if not found:
        return "triton is not installed (pip install vcore_kernels[triton])"
    if not INTERPRETED and not torch.cuda.is_available():
        return (
            "no CUDA or ROCm device is usable here (TRITON_INTERPRET=1 in the environment runs the "
            "kernels on a CPU, slowly, for tests)"
        )
    return None


WHY_NOT = _why_not()


def implement(module: str, *names: str) -> None:
    """Makes ``vcore_kernels.triton.<module>.<name>`` the CUDA kernel of each operator ``name``.

    Unless the compiled CUDA library has one. Under Triton's interpreter also the CPU kernel, in the
    place of the compiled library.
    """
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in names:

        def kernel(*args, _name=name):
            return getattr(import_module(f"vcore_kernels.triton.{module}"), _name)(*args)

        if not has_kernel(f"{NAMESPACE}::{name}", "CUDA"):
            LIBRARY.impl(name, kernel, "CUDA")
        if INTERPRETED:
            LIBRARY.impl(name, kernel, "CPU")
