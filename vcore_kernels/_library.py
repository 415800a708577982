"""The operator library ``torch.ops.vcore_kernels``: schemas are declared here in Python, once each.

The compiled libraries (``_C.so`` for the CPU dispatch key, ``_C_cuda.so`` for CUDA; built from
``csrc/``) only supply implementations and are optional. Every op module calls :func:`define` for
its own operators.
"""

import os
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.autograd.forward_ad as fwAD

NAMESPACE = "vcore_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
COMPILED_PATH = Path(__file__).with_name("_C.so")
CUDA_PATH = Path(__file__).with_name("_C_cuda.so")
# Triton's interpreter: the Triton kernels then serve CPU tensors in the place of the compiled ones.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")

_compiled: list[str] = []


def define(schema: str, fake: Callable | None = None, *, compiled: bool = True) -> None:
    """Declares ``schema`` and the fake (shape-only) implementation that torch.compile traces.

    ``compiled``: the compiled library has a CPU kernel for it.
    """
    name = schema.split("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    if fake is not None:
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=LIBRARY)
    if compiled:
        _compiled.append(name)


def no_derivative(name: str) -> None:
    """Gives operator ``name`` an autograd kernel that refuses forward AD.

    An operator without one drops the tangent of a dual tensor without a word: utilities would read
    zero and weights uniform. For operators that only run inside the autograd functions of this
    library.
    """

    def kernel(keyset, *args):
        for arg in args:
            if isinstance(arg, torch.Tensor) and fwAD._current_level >= 0:
                tangent = fwAD.unpack_dual(arg).tangent
                if tangent is not None:
                    raise RuntimeError(
                        f"{NAMESPACE}::{name} has no forward derivative and would lose the "
                        "tangent. Call the public functions of vcore_kernels instead of the raw "
                        "operator."
                    )
        op = getattr(getattr(torch.ops, NAMESPACE), name).default
        return op.redispatch(keyset & torch._C._after_autograd_keyset, *args)

    LIBRARY.impl(name, kernel, "Autograd", with_keyset=True)


def differentiable(name: str, function: type[torch.autograd.Function], forward: Callable) -> None:
    """Gives operator ``name`` the derivatives of ``function``; ``forward`` is the call without
    them.

    The operator is for torch.compile, which cannot trace a function with a ``jvp``. Eagerly the
    public function applies ``function`` itself, which torch.func can transform.
    """

    def kernel(*args):
        if torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{NAMESPACE}::{name}: torch.func transforms do not reach inside an operator. Call "
                f"{NAMESPACE}.{name} outside torch.compile instead."
            )
        return function.apply(*args)

    LIBRARY.impl(name, forward, "CompositeExplicitAutograd")
    LIBRARY.impl(name, kernel, "Autograd")


def _load(path: Path, how_to_build: str) -> str | None:
    """Loads compiled kernels; returns why that was not possible, or None."""
    if INTERPRETED:
        return "TRITON_INTERPRET=1: in this process Triton's interpreter takes the place of it"
    if not path.exists():
        return f"{path.name} is not built ({how_to_build})"
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return f"{path.name} does not load with torch {torch.__version__}: {error}"
    return None


def _why_not_cuda() -> str | None:
    why_not = _load(CUDA_PATH, "installing builds it where it finds nvcc and a torch with CUDA")
    if why_not is None and not torch.cuda.is_available():
        return "no CUDA device is usable here"
    return why_not


WHY_NOT_COMPILED = _load(COMPILED_PATH, "install with VCORE_BUILD_CPP=1 to see why")
WHY_NOT_CUDA = _why_not_cuda()


def has_compiled(name: str) -> bool:
    """Whether a compiled library that is loaded has a CPU kernel for operator ``name``."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"{NAMESPACE}::{name}", "CPU")


def check_compiled() -> None:
    """To be called when every operator is declared: is the compiled library of this version?"""
    global WHY_NOT_COMPILED
    if WHY_NOT_COMPILED is None:
        missing = [op for op in _compiled if not has_compiled(op)]
        if missing:
            WHY_NOT_COMPILED = (
                f"{COMPILED_PATH.name} is of another version of this package: it lacks "
                f"{', '.join(missing)}. Build it again (make setup, or pip install)."
            )
            warnings.warn(
                f"vcore_kernels runs without its compiled kernels, several times slower: "
                f"{WHY_NOT_COMPILED}",
                RuntimeWarning,
                stacklevel=2,
            )
