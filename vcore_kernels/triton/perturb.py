"""In-place perturbation in Triton, one launch for each tensor: what serves CUDA tensors where the
compiled library does not, and ROCm.

The same bits as ``csrc/perturb_kernels.cpp``, stochastic rounding included, the payload of NaN
excepted. Entries are loaded and stored as integers of their width, so that the one rounding is the
one written here, under the interpreter too. Launched without fused multiply-adds: the product and
the difference are rounded one after the other.
"""

# ruff: noqa: RET505 (Triton compiles what follows a branch that is known to return)

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels.backends.reference_perturb import BITS, in_memory_order
from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import architecture, cdiv, launch

_KIND = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
}
_BLOCK = 1024  # entries that share a block of Philox counters, as everywhere

_LARGEST = tl.constexpr(torch.finfo(torch.float32).max)
_SMALLEST_NORMAL = tl.constexpr(torch.finfo(torch.float32).tiny)


# ---- host ----


def perturb_(
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    saved: Sequence[Tensor],
    epsilon: float,
    seed: int | None,
    counts: Tensor,
) -> None:
    """theta <- round(theta - epsilon * g) for the tensors on the device of ``counts``.

    The old bits go into ``saved``: uint8 buffers, or ``direction`` itself.
    """
    if counts.dtype != torch.int64 or counts.shape != (len(params), 3):
        raise ValueError(
            f"perturb_: counts must be int64 [{len(params)}, 3], got {counts.dtype} "
            f"{list(counts.shape)}."
        )
    settings = tuning.PERTURB[architecture(counts.device)]
    # float64 as its bits: Triton would pass a Python float as float32.
    epsilon_bits = torch.tensor(epsilon, dtype=torch.float64, device="cpu").view(torch.int64).item()
    for number, (param, g, keep) in enumerate(zip(params, direction, saved, strict=True)):
        if param.device != counts.device:
            continue
        bits = BITS[param.dtype]
        rows = settings.rows * 2 // param.element_size()
        launch(
            _perturb_kernel,
            (cdiv(param.numel(), rows * _BLOCK),),
            in_memory_order(param).view(bits),
            in_memory_order(g).view(BITS[g.dtype]),
            in_memory_order(keep).view(bits),
            counts,
            param.numel(),
            number,
            epsilon_bits,
            0 if seed is None else seed,
            THETA=_KIND[param.dtype],
            G=_KIND[g.dtype],
            STOCHASTIC=seed is not None,
            SWAP=keep.data_ptr() == g.data_ptr(),
            ROWS=rows,
            num_warps=settings.num_warps,
            enable_fp_fusion=False,
        )


def perturb_swap_(
    params: Sequence[Tensor],
    direction: Sequence[Tensor],
    epsilon: float,
    seed: int | None,
    counts: Tensor,
) -> None:
    perturb_(params, direction, direction, epsilon, seed, counts)


def restore_(params: Sequence[Tensor], saved: Sequence[Tensor]) -> None:
    """Copies the old bits back, a device and a width of entries at a time."""
    pairs: dict[tuple, tuple[list[Tensor], list[Tensor]]] = {}
    for param, keep in zip(params, saved, strict=True):
        bits = BITS[param.dtype]
        to, source = pairs.setdefault((param.device, bits), ([], []))
        to.append(in_memory_order(param).view(bits))
        source.append(in_memory_order(keep).view(bits)[: param.numel()])
    for to, source in pairs.values():
        torch._foreach_copy_(to, source)


# ---- device ----


@triton.jit(do_not_specialize=["number", "epsilon_bits", "seed"], launch_metadata=costs.perturb)
def _perturb_kernel(
    p_theta,  # [size], as integers
    p_g,  # [size], as integers
    p_saved,  # [size], as integers; p_g if SWAP
    p_counts,  # int64 [tensors, 3]
    size,
    number,  # of the tensor in its list
    epsilon_bits,  # of a float64
    seed,
    THETA: tl.constexpr,  # "f32", "bf16", "f16" or "f64"
    G: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
):
    """theta <- round(theta - epsilon * g), saved <- theta; row ``number`` of counts grows by the
    nonzero entries of g, the entries moved, and the entries of g that are not finite, plus one.

    Grid: one program for each ROWS blocks of 1024 entries. Each operation in float32 (float64 for
    float64, and for float32 rounded stochastically). A program takes the four quarters of its
    blocks together, which are the four words of the same Philox counters.
    """
    i_program = tl.program_id(0).to(tl.int64)
    epsilon = epsilon_bits.to(tl.int64).to(tl.float64, bitcast=True)
    p_row = p_counts + 3 * number.to(tl.int64)
    # Masks would keep loads from being vectorised where `size` is odd: only the last program has
    # one.
    if (i_program + 1) * (ROWS * 1024) <= size:
        _move_blocks(
            p_theta, p_g, p_saved, p_row, size, i_program, number, epsilon, seed,
            THETA, G, STOCHASTIC, SWAP, ROWS, False,
        )  # fmt: skip
    else:
        _move_blocks(
            p_theta, p_g, p_saved, p_row, size, i_program, number, epsilon, seed,
            THETA, G, STOCHASTIC, SWAP, ROWS, True,
        )  # fmt: skip


@triton.jit
def _move_blocks(
    p_theta,
    p_g,
    p_saved,
    p_row,
    size,
    i_program,
    number,
    epsilon,
    seed,
    THETA: tl.constexpr,
    G: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    SWAP: tl.constexpr,
    ROWS: tl.constexpr,
    MASKED: tl.constexpr,
):
    i_block = i_program * ROWS + tl.arange(0, ROWS)[:, None].to(tl.int64)
    i_entry = tl.arange(0, 256)[None, :]
    o_0 = i_block * 1024 + i_entry  # [ROWS, 256]
    theta_0, g_0 = _load(p_theta, p_g, o_0, size, MASKED)
    theta_1, g_1 = _load(p_theta, p_g, o_0 + 256, size, MASKED)
    theta_2, g_2 = _load(p_theta, p_g, o_0 + 512, size, MASKED)
    theta_3, g_3 = _load(p_theta, p_g, o_0 + 768, size, MASKED)
    if SWAP:
        tl.debug_barrier()  # another thread may store where this one has loaded
    if STOCHASTIC:
        counter = i_block * 256 + i_entry
        low = counter.to(tl.uint32)
        high = (counter >> 32).to(tl.uint32)
        tensor = tl.zeros_like(low) + number.to(tl.uint32)
        r_0, r_1, r_2, r_3 = tl.philox(seed, low, high, tensor, tl.zeros_like(low))
    else:
        r_0, r_1, r_2, r_3 = i_entry, i_entry, i_entry, i_entry  # not used
    new_0 = _move(theta_0, g_0, epsilon, r_0, THETA, G, STOCHASTIC)
    new_1 = _move(theta_1, g_1, epsilon, r_1, THETA, G, STOCHASTIC)
    new_2 = _move(theta_2, g_2, epsilon, r_2, THETA, G, STOCHASTIC)
    new_3 = _move(theta_3, g_3, epsilon, r_3, THETA, G, STOCHASTIC)
    _store(p_theta, p_saved, o_0, size, new_0, theta_0, MASKED)
    _store(p_theta, p_saved, o_0 + 256, size, new_1, theta_1, MASKED)
    _store(p_theta, p_saved, o_0 + 512, size, new_2, theta_2, MASKED)
    _store(p_theta, p_saved, o_0 + 768, size, new_3, theta_3, MASKED)

    nonzero = _nonzero(g_0, G) + _nonzero(g_1, G) + _nonzero(g_2, G) + _nonzero(g_3, G)
    moved = (new_0 != theta_0).to(tl.int32) + (new_1 != theta_1).to(tl.int32)
    moved += (new_2 != theta_2).to(tl.int32) + (new_3 != theta_3).to(tl.int32)
    nonfinite = _nonfinite(g_0, G) + _nonfinite(g_1, G) + _nonfinite(g_2, G) + _nonfinite(g_3, G)
    first = (i_program == 0).to(tl.int64)
    tl.atomic_add(p_row, tl.sum(tl.sum(nonzero, 1), 0).to(tl.int64) + first, sem="relaxed")
    tl.atomic_add(p_row + 1, tl.sum(tl.sum(moved, 1), 0).to(tl.int64) + first, sem="relaxed")
    tl.atomic_add(p_row + 2, tl.sum(tl.sum(nonfinite, 1), 0).to(tl.int64) + first, sem="relaxed")


@triton.jit
def _load(p_theta, p_g, o, size, MASKED: tl.constexpr):
    if MASKED:
        m = o < size
        return tl.load(p_theta + o, mask=m, other=0), tl.load(p_g + o, mask=m, other=0)
    else:
        return tl.load(p_theta + o), tl.load(p_g + o)


@triton.jit
def _store(p_theta, p_saved, o, size, new, old, MASKED: tl.constexpr):
    if MASKED:
        tl.store(p_saved + o, old, mask=o < size)
        tl.store(p_theta + o, new, mask=o < size)
    else:
        tl.store(p_saved + o, old)
        tl.store(p_theta + o, new)


@triton.jit
def _magnitude(bits, KIND: tl.constexpr):
    """All bits but the sign, and those of infinity."""
    if KIND == "f64":
        return bits & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000000
    elif KIND == "f32":
        return bits & 0x7FFFFFFF, 0x7F800000
    elif KIND == "bf16":
        return bits.to(tl.int32) & 0x7FFF, 0x7F80
    else:
        return bits.to(tl.int32) & 0x7FFF, 0x7C00


@triton.jit
def _nonzero(bits, KIND: tl.constexpr):
    magnitude, _ = _magnitude(bits, KIND)
    return (magnitude != 0).to(tl.int32)


@triton.jit
def _nonfinite(bits, KIND: tl.constexpr):
    magnitude, infinity = _magnitude(bits, KIND)
    return (magnitude >= infinity).to(tl.int32)


@triton.jit
def _widen(bits, KIND: tl.constexpr):
    if KIND == "f64":
        return bits.to(tl.float64, bitcast=True)
    elif KIND == "f32":
        return bits.to(tl.float32, bitcast=True)
    elif KIND == "bf16":
        return (bits.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    else:
        return bits.to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def _move(
    theta, g, epsilon, random, THETA: tl.constexpr, G: tl.constexpr, STOCHASTIC: tl.constexpr
):
    """The bits of theta - epsilon * g, rounded to THETA."""
    if THETA == "f64":
        step = _widen(g, G).to(tl.float64) * epsilon
        return (_widen(theta, THETA) - step).to(tl.int64, bitcast=True)
    elif THETA == "f32" and STOCHASTIC:
        step = _widen(g, G).to(tl.float64) * epsilon
        return _stochastic_f32(_widen(theta, THETA).to(tl.float64) - step, random)
    else:
        step = _widen(g, G).to(tl.float32) * epsilon.to(tl.float32)
        x = _widen(theta, THETA) - step
        if THETA == "f32":
            return x.to(tl.int32, bitcast=True)
        elif THETA == "bf16":
            return _nearest_bf16(_grid_bf16(x, random) if STOCHASTIC else x)
        else:
            return _nearest_f16(_grid_f16(x, random) if STOCHASTIC else x)


@triton.jit
def _nearest_bf16(x):
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return tl.where(x == x, rounded, 0x7FC0).to(tl.uint16).to(tl.int16, bitcast=True)


@triton.jit
def _nearest_f16(x):
    # Halves end at 65504: from 65520 on, the nearest is infinity.
    fits = tl.abs(x) < 65520.0
    bits = tl.where(fits, x, 0.0).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 16) & 0x8000
    return tl.where(fits, bits, sign | tl.where(x == x, 0x7C00, 0x7E00)).to(tl.int16)


@triton.jit
def _grid_bf16(x, random):
    """x rounded at random to a float32 that bf16 holds exactly."""
    bits = x.to(tl.uint32, bitcast=True)
    rounded = (bits + (random & 0xFFFF)) & 0xFFFF0000
    return tl.where((bits & 0x7F800000) == 0x7F800000, bits, rounded).to(tl.float32, bitcast=True)


@triton.jit
def _grid_f16(x, random):
    """x rounded at random to a float32 that float16 holds exactly, or to its infinity."""
    bits = x.to(tl.uint32, bitcast=True)
    normal = (bits + (random & 0x1FFF)) & 0xFFFFE000
    # Subnormal results lie on a fixed grid of 2^-24.
    small = tl.abs(x) < 6.103515625e-05  # 2^-14
    units = tl.where(small, tl.abs(x), 0.0) * 16777216.0
    units += (random >> 8).to(tl.float32) * 5.9604644775390625e-08
    grid = units.to(tl.int32).to(tl.float32) * 5.9604644775390625e-08
    subnormal = grid.to(tl.uint32, bitcast=True) | (bits & 0x80000000)
    rounded = tl.where(small, subnormal, normal)
    return tl.where((bits & 0x7F800000) == 0x7F800000, bits, rounded).to(tl.float32, bitcast=True)


@triton.jit
def _stochastic_f32(x, random):
    """The bits of the float32 that float64 ``x`` is rounded to at random."""
    random = random.to(tl.int64)
    bits = x.to(tl.int64, bitcast=True)
    normal = (((bits + (random & 0x1FFFFFFF)) >> 29) << 29).to(tl.float64, bitcast=True)
    # Subnormal results lie on a fixed grid of 2^-149.
    small = tl.abs(x) < _SMALLEST_NORMAL
    units = tl.where(small, tl.abs(x), 0.0) * 2.0**149 + random.to(tl.float64) * 2.0**-32
    subnormal = units.to(tl.int32)  # is its own bit pattern
    sign = ((bits >> 32) & 0x80000000).to(tl.uint32).to(tl.int32, bitcast=True)
    rounded = tl.where(tl.abs(x) <= _LARGEST, normal, x).to(tl.float32).to(tl.int32, bitcast=True)
    return tl.where(small, subnormal | sign, rounded)
