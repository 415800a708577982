"""What every kernel file shares: launching, the device's table of settings, rounding, products.

Triton's interpreter (``TRITON_INTERPRET=1``, set before triton is imported) runs the same kernels
on CPU tensors. It multiplies bf16 as integers and rounds to bf16 towards zero, so :func:`dot` and
:func:`cast` do both by hand there.
"""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels.backends.triton import INTERPRETED

_INTERPRETED = tl.constexpr(INTERPRETED)


# ---- launching ----


@dataclass(frozen=True)
class Launch:
    """One launch as the compiler sees it: what the ahead-of-time report compiles."""

    kernel: Any
    args: tuple  # in the kernel's order: tensors, descriptors, numbers
    constants: dict[str, Any]
    num_warps: int
    num_stages: int
    enable_fp_fusion: bool = True


# A list to which launches are appended *instead of* being run (benchmarks/aot.py), and the
# architecture whose settings they then take.
recorded: list[Launch] | None = None
recorded_architecture = "sm90"


def launch(
    kernel: Any,
    grid: Sequence[int],
    *args: Any,
    num_warps: int = 4,
    num_stages: int = 2,
    enable_fp_fusion: bool = True,
    **constants: Any,
) -> None:
    """Runs ``kernel`` on the device and the current stream of its first tensor.

    ``enable_fp_fusion=False``: a product and a sum are each rounded, never one instruction.
    """
    if recorded is not None:
        recorded.append(Launch(kernel, args, constants, num_warps, num_stages, enable_fp_fusion))
        return
    if not all(grid):
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        options = {} if enable_fp_fusion else {"enable_fp_fusion": False}
        kernel[tuple(grid)](
            *args, num_warps=num_warps, num_stages=num_stages, **constants, **options
        )


def architecture(device: torch.device) -> str:
    """The key of the tuning tables: interpreter, sm80, sm89, sm90, sm100 or gfx942."""
    if recorded is not None:
        return recorded_architecture
    return "interpreter" if INTERPRETED else _architecture(device)


@lru_cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip:
        return "gfx942"
    major, minor = torch.cuda.get_device_capability(device)
    if major >= 10:
        return "sm100" if major == 10 else "sm89"  # consumer Blackwell has Ada's shared memory
    if major == 9:
        return "sm90"
    return "sm80" if minor == 0 else "sm89"  # sm_86 and sm_89 have 99 KiB of shared memory


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``: a persistent grid keeps a few programs on each."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return 6  # under the interpreter: few, so that programs take several tiles


def precision(dtype: torch.dtype) -> str:
    """tf32 only for float32 operands where the user has allowed it for PyTorch's own products."""
    allowed = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"
    return "tf32" if allowed else "ieee"


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


# ---- inside kernels ----


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a @ b in float32. PRECISION: "ieee" or "tf32", for float32 operands."""
    if _INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def cast(x, dtype: tl.constexpr):
    """float32 ``x`` in ``dtype``, rounded to nearest even."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        rounded = tl.where(x == x, rounded, bits | 0x400000)  # a NaN stays one
        return rounded.to(tl.float32, bitcast=True).to(tl.bfloat16)
    return x.to(dtype)


@triton.jit
def exp(x):
    """exp for x <= 0 or moderate, by the hardware's exp2."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def expm1(x):
    """exp(x) - 1 with full relative accuracy near 0."""
    # Horner's scheme of the Taylor series up to x^8 / 8!: below 2^-24 relative for |x| < 0.35.
    p = 1.0 / 40320
    p = p * x + 1.0 / 5040
    p = p * x + 1.0 / 720
    p = p * x + 1.0 / 120
    p = p * x + 1.0 / 24
    p = p * x + 1.0 / 6
    p = p * x + 0.5
    p = p * x + 1.0
    return tl.where(tl.abs(x) < 0.35, p * x, tl.exp(x) - 1.0)


@triton.jit
def log1p(x):
    """log(1 + x) with full relative accuracy near 0 (Kahan's correction of the rounded 1 + x)."""
    u = 1.0 + x
    correction = (x - (u - 1.0)) / u
    small = tl.abs(x) < 1e-8
    return tl.where(small, x, tl.where(u == float("inf"), u, tl.log(u) + correction))


@triton.jit
def halves(x, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The left and the right half of the columns: each thread's own registers, nothing moves."""
    return tl.split(x.reshape([ROWS, 2, COLUMNS // 2]).permute(0, 2, 1))
