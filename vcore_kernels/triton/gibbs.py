"""Gibbs weights of packed segments, their KL budget and the variances: one launch.

A program owns a segment and passes over it in tiles: for its extremes, its distribution, each step
of the search for the temperature, the sum of the weights, and to write them. Only the first pass
reads memory: 16384 float32 utilities are 64 KiB and stay in the first-level cache of the
multiprocessor. (Held in registers, 32 a thread, they made every configuration spill.) 32-bit
utilities are worked on in float32. Of the numbers of a segment those that may leave float32's range
(differences of 1e-45 beside utilities of 1e38) are float64. How a segment is summed depends on the
block and its own length, never on the batch.

KL(q || uniform) of q = softmax(rate*d) comes from sums over x = rate*d in one of two forms. With
M = mean e^x it is E_q[x] - log M, to about 2e-7 nats in float32. While the spread of x is at most
1, y = x - mean x and the sums of e^y - 1 - y, y*(e^y - 1) >= 0 give it without cancellation, to
about 1e-6 of itself.

The variances go over all segments: each program leaves the moments of its own, and the last one to
finish combines them in the segments' order. One temperature for the whole batch needs the mean KL
at every step of the search: a launch each, of a fixed number, most of which find that the search is
over and end at once.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vcore_kernels._gibbs import NEWTON_STEPS, STEPS
from vcore_kernels.triton import costs, tuning
from vcore_kernels.triton.common import INTERPRETED, architecture, exp, launch, log1p

_INTERPRETED = tl.constexpr(INTERPRETED)
_STEPS = tl.constexpr(STEPS)
_NEWTON_STEPS = tl.constexpr(NEWTON_STEPS)
_CHUNK = tl.constexpr(256)  # segments that the last program combines at a time
_TAU, _TRAJECTORY = tl.constexpr(0), tl.constexpr(1)  # the third: the batch's temperature
_BIG, _POWER, _UNIT = tl.constexpr(2.0**60), tl.constexpr(2.0**100), tl.constexpr(2.0**512)
_NARROW = tl.constexpr(1 + 1e-7)  # a bracket that leaves nothing to search
_RULES = {"tau": 0, "trajectory": 1, "batch": 2}
# Launches of the search for the batch's temperature after the first.
BATCH_STEPS = 32
_MOMENTS, _STATE = 6, 8  # float64 numbers of each segment; of the batch's search


# ---- reductions: one exchange between the warps for all the numbers of a pass ----


@triton.jit
def _add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@triton.jit
def _add3(a0, a1, a2, b0, b1, b2):
    return a0 + b0, a1 + b1, a2 + b2


@triton.jit
def _add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3


@triton.jit
def _extremes4(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), tl.minimum(a1, b1), a2 + b2, a3 + b3


@triton.jit
def _max_add4(a0, a1, a2, a3, b0, b1, b2, b3):
    return tl.maximum(a0, b0), a1 + b1, a2 + b2, a3 + b3


# The interpreter calls a combining function once for each entry, in Python: it gets built-in ones.


@triton.jit
def _reduce_sums2(a, b):
    if _INTERPRETED:
        return tl.sum(a), tl.sum(b)
    return tl.reduce((a, b), 0, _add2)


@triton.jit
def _reduce_sums3(a, b, c):
    if _INTERPRETED:
        return tl.sum(a), tl.sum(b), tl.sum(c)
    return tl.reduce((a, b, c), 0, _add3)


@triton.jit
def _reduce_sums4(a, b, c, d):
    if _INTERPRETED:
        return tl.sum(a), tl.sum(b), tl.sum(c), tl.sum(d)
    return tl.reduce((a, b, c, d), 0, _add4)


@triton.jit
def _reduce_extremes(a, b, c, d):
    if _INTERPRETED:
        return tl.max(a), tl.min(b), tl.sum(c), tl.sum(d)
    return tl.reduce((a, b, c, d), 0, _extremes4)


@triton.jit
def _reduce_max_sums(a, b, c, d):
    if _INTERPRETED:
        return tl.max(a), tl.sum(b), tl.sum(c), tl.sum(d)
    return tl.reduce((a, b, c, d), 0, _max_add4)


# ---- a tile of a segment ----


@triton.jit
def _inside(length, o_tile, BLOCK: tl.constexpr):
    """Which entries of a tile belong to the segment; 32-bit, to spare registers."""
    return tl.arange(0, BLOCK) < tl.minimum(length - o_tile, BLOCK).to(tl.int32)


@triton.jit
def _load(p_s, p_mask, begin, length, o_tile, BLOCK: tl.constexpr):
    """Utilities and which of them are supervised."""
    valid = _inside(length, o_tile, BLOCK)
    i = tl.arange(0, BLOCK)
    if p_mask is not None:
        valid = valid & (tl.load(p_mask + (begin + o_tile) + i, mask=valid, other=0) != 0)
    return tl.load(p_s + (begin + o_tile) + i, mask=valid, other=0.0), valid


@triton.jit
def _difference(p_s, p_mask, begin, length, high, unit, o_tile, BLOCK: tl.constexpr):
    """d = (s - high)*unit <= 0 of supervised tokens, 1 elsewhere. unit = 0 makes d = 0."""
    s, valid = _load(p_s, p_mask, begin, length, o_tile, BLOCK)
    good = valid & (tl.abs(s) < float("inf"))
    return tl.where(valid, tl.where(good, s, high) * unit - high * unit, 1.0)


@triton.jit
def _split(rate, dtype: tl.constexpr):
    """A float64 rate as what _scaled takes: the largest |d| of interest, and two factors.

    The rate may lie outside float32 where its product with any d of the segment does not: a power
    of 2 then goes ahead.
    """
    cut = 1000.0 / tl.maximum(rate, 1e-290)
    if dtype == tl.float64:
        return cut, tl.full((), 1.0, tl.float64), rate
    power = tl.where(rate > _BIG, _POWER, tl.where(rate < 1 / _BIG, 1 / _POWER, 1.0))
    rest = rate * tl.where(rate > _BIG, 1 / _POWER, tl.where(rate < 1 / _BIG, _POWER, 1.0))
    return tl.minimum(cut, 3.4028234e38).to(dtype), power.to(dtype), rest.to(dtype)


@triton.jit
def _scaled(d, cut, power, rest):
    """rate*d, but no less than -1000, whose exponential is 0; 0 where d = 1."""
    return tl.minimum(tl.maximum(d, -cut), 0.0) * power * rest


@triton.jit
def _exp(x):
    if x.dtype == tl.float64:
        return tl.exp(x)
    return exp(x)


# ---- passes over a segment ----


@triton.jit
def _extremes(p_s, p_mask, begin, length, BLOCK: tl.constexpr):
    """Largest and smallest finite supervised utility, number supervised, number not finite."""
    dtype: tl.constexpr = p_s.dtype.element_ty
    top = tl.full((BLOCK,), -float("inf"), dtype)
    bottom = tl.full((BLOCK,), float("inf"), dtype)
    count = tl.zeros((BLOCK,), tl.int32)
    bad = tl.zeros((BLOCK,), tl.int32)
    for o_tile in range(0, length, BLOCK):
        s, valid = _load(p_s, p_mask, begin, length, o_tile, BLOCK)
        good = valid & (tl.abs(s) < float("inf"))
        top = tl.maximum(top, tl.where(good, s, -float("inf")))
        bottom = tl.minimum(bottom, tl.where(good, s, float("inf")))
        count += valid.to(tl.int32)
        bad += (valid & ~good).to(tl.int32)
    return _reduce_extremes(top, bottom, count, bad)


@triton.jit
def _distribution(p_s, p_mask, begin, length, high, unit, inverse, BLOCK: tl.constexpr):
    """The largest d below 0, the number of zeros, sums of z = d*inverse in [-1, 0] and of z^2."""
    dtype: tl.constexpr = p_s.dtype.element_ty
    cut, power, rest = _split(inverse, dtype)
    second = tl.full((BLOCK,), -float("inf"), dtype)
    zeros = tl.zeros((BLOCK,), tl.int32)
    sum_z = tl.zeros((BLOCK,), dtype)
    sum_zz = tl.zeros((BLOCK,), dtype)
    for o_tile in range(0, length, BLOCK):
        d = _difference(p_s, p_mask, begin, length, high, unit, o_tile, BLOCK)
        z = _scaled(d, cut, power, rest)
        second = tl.maximum(second, tl.where(d < 0, d, -float("inf")))
        zeros += (d == 0).to(tl.int32)
        sum_z += z
        sum_zz += z * z
    return _reduce_max_sums(second, zeros, sum_z, sum_zz)


@triton.jit
def _plain_sums(p_s, p_mask, begin, length, high, unit, rate, BLOCK: tl.constexpr):
    """Sums of e^x, e^x x, e^x x^2, x = rate*d."""
    dtype: tl.constexpr = p_s.dtype.element_ty
    cut, power, rest = _split(rate, dtype)
    sum_e = tl.zeros((BLOCK,), dtype)
    sum_ex = tl.zeros((BLOCK,), dtype)
    sum_exx = tl.zeros((BLOCK,), dtype)
    for o_tile in range(0, length, BLOCK):
        d = _difference(p_s, p_mask, begin, length, high, unit, o_tile, BLOCK)
        x = _scaled(d, cut, power, rest)
        e = tl.where(d <= 0, _exp(x), 0.0)
        sum_e += e
        sum_ex += e * x
        sum_exx += e * x * x
    return _reduce_sums3(sum_e, sum_ex, sum_exx)


@triton.jit
def _series_sums(p_s, p_mask, begin, length, high, unit, rate, mean, BLOCK: tl.constexpr):
    """Sums of y, e^y - 1 - y, y*(e^y - 1), y^2 e^y for y = rate*d - mean, |y| <= 1."""
    dtype: tl.constexpr = p_s.dtype.element_ty
    cut, power, rest = _split(rate, dtype)
    sum_y = tl.zeros((BLOCK,), dtype)
    sum_rest = tl.zeros((BLOCK,), dtype)
    sum_yf = tl.zeros((BLOCK,), dtype)
    sum_yye = tl.zeros((BLOCK,), dtype)
    for o_tile in range(0, length, BLOCK):
        d = _difference(p_s, p_mask, begin, length, high, unit, o_tile, BLOCK)
        y = tl.where(d <= 0, _scaled(d, cut, power, rest) - mean, 0.0)
        # (e^y - 1 - y) / y^2: the Taylor series up to y^8 / 10!, what is left out is 2^-23 of it
        p = y * (1.0 / 3628800) + 1.0 / 362880
        p = p * y + 1.0 / 40320
        p = p * y + 1.0 / 5040
        p = p * y + 1.0 / 720
        p = p * y + 1.0 / 120
        p = p * y + 1.0 / 24
        p = p * y + 1.0 / 6
        p = p * y + 0.5
        square = y * y
        beyond = square * p
        f = y + beyond  # e^y - 1
        sum_y += y
        sum_rest += beyond
        sum_yf += y * f
        sum_yye += square + square * f
    return _reduce_sums4(sum_y, sum_rest, sum_yf, sum_yye)


@triton.jit
def _weight_sums(p_s, p_mask, begin, length, high, unit, rate, inverse, BLOCK: tl.constexpr):
    """Sums of e^x, e^2x and e^x z, in float64: ones are counted exactly."""
    dtype: tl.constexpr = p_s.dtype.element_ty
    cut, power, rest = _split(rate, dtype)
    cut_z, power_z, rest_z = _split(inverse, dtype)
    sum_e = tl.zeros((BLOCK,), dtype)
    sum_ee = tl.zeros((BLOCK,), dtype)
    sum_ez = tl.zeros((BLOCK,), dtype)
    for o_tile in range(0, length, BLOCK):
        d = _difference(p_s, p_mask, begin, length, high, unit, o_tile, BLOCK)
        e = tl.where(d <= 0, _exp(_scaled(d, cut, power, rest)), 0.0)
        sum_e += e
        sum_ee += e * e
        sum_ez += e * _scaled(d, cut_z, power_z, rest_z)
    return _reduce_sums3(sum_e.to(tl.float64), sum_ee.to(tl.float64), sum_ez.to(tl.float64))


@triton.jit
def _write_weights(
    p_s, p_mask, p_q, p_weight, begin, length, high, unit, rate, inverse, q_scale, weight_scale,
    level, width, mean_z, mean_v, BLOCK: tl.constexpr,
):  # fmt: skip
    """Writes q and weight; returns the sums of squared deviations of t and of t*weight.

    t = level + width*z. The weights' mean is 1, so that t*weight - level has the mean ``mean_v``.
    """
    dtype: tl.constexpr = p_s.dtype.element_ty
    cut, power, rest = _split(rate, dtype)
    cut_z, power_z, rest_z = _split(inverse, dtype)
    q_scale, weight_scale = q_scale.to(dtype), weight_scale.to(dtype)
    level, width = level.to(dtype), width.to(dtype)
    mean_z, mean_v = mean_z.to(dtype), mean_v.to(dtype)
    sum_u = tl.zeros((BLOCK,), dtype)
    sum_v = tl.zeros((BLOCK,), dtype)
    for o_tile in range(0, length, BLOCK):
        d = _difference(p_s, p_mask, begin, length, high, unit, o_tile, BLOCK)
        e = tl.where(d <= 0, _exp(_scaled(d, cut, power, rest)), 0.0)
        weight = e * weight_scale
        i, inside = tl.arange(0, BLOCK), _inside(length, o_tile, BLOCK)
        tl.store(p_q + (begin + o_tile) + i, e * q_scale, mask=inside)
        tl.store(p_weight + (begin + o_tile) + i, weight, mask=inside)
        z = _scaled(d, cut_z, power_z, rest_z)
        u = tl.where(d <= 0, width * (z - mean_z), 0.0)
        v = level * (weight - 1.0) + width * (z * weight) - mean_v
        v = tl.where(d <= 0, v, 0.0)
        sum_u += u * u
        sum_v += v * v
    return _reduce_sums2(sum_u, sum_v)


# ---- one segment ----


@triton.jit
def _zero():
    return tl.full((), 0.0, tl.float64)


@triton.jit
def _profile(p_s, p_mask, begin, length, budget: tl.constexpr, resolution, BLOCK: tl.constexpr):
    """What the search needs to know of a segment.

    Returns high and unit in the dtype of the utilities, for _difference; n (1 for none), spread of
    the d, magnitude of the s, inverse = 1/spread, mean_z, curvature = Var z, ceiling (a spread of x
    at which all but the maxima have weight 0), supremum of KL, all float64; known (not empty,
    finite), finite, constant, and flat: to be weighted uniformly, under a budget also what is
    constant within ``resolution``.
    """
    dtype: tl.constexpr = p_s.dtype.element_ty
    top, bottom, count, bad = _extremes(p_s, p_mask, begin, length, BLOCK)
    finite = bad == 0
    known = finite & (count > 0)
    top, bottom = tl.where(known, top, 0.0), tl.where(known, bottom, 0.0)

    # Another unit where a difference, or its reciprocal, would overflow.
    high, low = top.to(tl.float64), bottom.to(tl.float64)
    if dtype == tl.float64:
        half = high * 0.5 - low * 0.5
        unit = tl.where((half > 0) & (half < 1e-200), _UNIT, tl.where(half > 1e200, 1 / _UNIT, 1.0))
    else:
        unit = tl.where(high - low > 3.4e38, 0.5, 1.0).to(tl.float64)
    spread = high * unit - low * unit
    magnitude = tl.maximum(tl.abs(high), tl.abs(low))
    constant = known & (spread <= resolution * (magnitude * unit))
    flat = spread == 0
    if budget:
        flat = constant | ~known
    inverse = tl.where(spread > 0, 1.0 / tl.where(spread > 0, spread, 1.0), 0.0)

    unit = tl.where(finite, unit, 0.0).to(dtype)
    second, zeros, sum_z, sum_zz = _distribution(
        p_s, p_mask, begin, length, top, unit, inverse, BLOCK
    )
    n = tl.maximum(count, 1).to(tl.float64)
    mean_z = sum_z.to(tl.float64) / n
    curvature = tl.maximum(sum_zz.to(tl.float64) / n - mean_z * mean_z, 1e-30)
    gap = tl.where(flat, 1.0, -second.to(tl.float64))
    exp_zero: tl.constexpr = 746.0 if dtype == tl.float64 else 110.0  # exp(-exp_zero) is 0
    ceiling = tl.where(flat, 0.0, tl.minimum(exp_zero / gap * spread, 1e300))
    supremum = tl.where(flat, 0.0, tl.log(n / tl.maximum(zeros, 1).to(tl.float64)))
    return (top, unit, n, spread, magnitude, inverse, mean_z, curvature, ceiling, supremum,
            known, finite, constant, flat)  # fmt: skip


@triton.jit
def _evaluate(p_s, p_mask, begin, length, high, unit, n, a, inverse, mean_z, BLOCK: tl.constexpr):
    """KL of the weights whose exponents x spread over a, and Var_q(x) = a dKL/da."""
    dtype: tl.constexpr = p_s.dtype.element_ty
    rate = tl.minimum(a * inverse, _rate_limit(dtype))
    each = 1.0 / n.to(dtype)
    if (dtype == tl.float32) & (a <= 1.0):
        y, beyond, yf, yye = _series_sums(
            p_s, p_mask, begin, length, high, unit, rate, (a * mean_z).to(dtype), BLOCK
        )
        excess = (y + beyond) * each  # mean e^y - 1
        share = each / (1.0 + excess)
        mean_q = (y + yf) * share
        kl = mean_q - log1p(excess)
        variance = yye * share - mean_q * mean_q
    else:
        e, ex, exx = _plain_sums(p_s, p_mask, begin, length, high, unit, rate, BLOCK)
        share = 1.0 / tl.where(e > 0, e, 1.0)  # no token: 0
        mean_q = ex * share
        kl = mean_q - tl.log(tl.where(e > 0, e / n.to(dtype), 1.0))
        variance = exx * share - mean_q * mean_q
    return tl.maximum(kl, 0.0), tl.maximum(variance, 0.0)


@triton.jit
def _rate_limit(dtype: tl.constexpr):
    return 1e300 if dtype == tl.float64 else 1e60


@triton.jit
def _met(kl, budget, a, dtype: tl.constexpr):
    """Whether KL is the budget as nearly as the sums can tell."""
    if dtype == tl.float64:
        return tl.abs(kl - budget) <= 1e-9 * budget + 1e-15
    return tl.abs(kl - budget) <= 4e-6 * budget + tl.where(a > 1.0, 2e-7, 0.0)


@triton.jit
def _first_guess(budget, curvature, low, ceiling):
    guess = tl.sqrt(2.0 * budget / tl.maximum(curvature, 1e-300))
    return tl.minimum(tl.maximum(guess, low), ceiling)


@triton.jit
def _next(a, low, high, kl, variance, budget, step):
    """Newton's step on sqrt(KL); the geometric middle where it leaves the bracket, and at every
    second one of the late steps. ``variance`` = a dKL/da."""
    root = tl.sqrt(kl)
    change = 2.0 * root * (root - tl.sqrt(budget)) / tl.maximum(variance, 1e-37)
    newton = a * (1.0 - change.to(tl.float64))
    inside = (newton > low) & (newton < high) & ((step < _NEWTON_STEPS) | (step % 2 == 0))
    return tl.where(inside, newton, tl.sqrt(low) * tl.sqrt(high))


@triton.jit
def _segment(
    p_s, p_mask, p_q, p_weight, p_stats, p_flags, p_moments, p_state,
    i_segment, number, begin, length, value, resolution, RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Weights, statistics, flags and moments of one segment."""
    dtype: tl.constexpr = p_s.dtype.element_ty
    (top, unit, n, spread, magnitude, inverse, mean_z, curvature, ceiling, supremum,
     known, finite, constant, flat) = _profile(
        p_s, p_mask, begin, length, RULE != _TAU, resolution, BLOCK
    )  # fmt: skip
    wide_unit = tl.where(unit > 0, unit, 1.0).to(tl.float64)
    saturated = tl.full((), 0, tl.int1)
    if RULE == _TAU:
        a = tl.where(flat, 0.0, tl.minimum(value / wide_unit, _rate_limit(dtype)) * spread)
    elif RULE == _TRAJECTORY:
        saturated = (value > 0) & (supremum <= value)
        low = tl.sqrt(8.0 * value) * 0.999
        a = tl.where(value > 0, _first_guess(value, curvature, low, ceiling), 0.0)
        a = tl.where(saturated, ceiling, a)
    else:
        saturated = tl.load(p_state + 4) != 0
        ratio = spread * 0.25 / wide_unit / tl.load(p_state + 5)
        a = tl.where(flat, 0.0, tl.minimum(tl.load(p_state) * ratio, 1e300))

    kl, variance = _evaluate(p_s, p_mask, begin, length, top, unit, n, a, inverse, mean_z, BLOCK)
    if RULE == _TRAJECTORY:
        budget = tl.minimum(value, 1e30).to(dtype)
        high = ceiling
        step = 0
        search = (value > 0) & ~saturated & ~_met(kl, budget, a, dtype)
        while search:
            above = kl > budget
            low, high = tl.where(above, low, a), tl.where(above, a, high)
            a = _next(a, low, high, kl, variance, budget, step)
            kl, variance = _evaluate(
                p_s, p_mask, begin, length, top, unit, n, a, inverse, mean_z, BLOCK
            )
            step += 1
            search = (~_met(kl, budget, a, dtype)) & (step < _STEPS) & (high > low * _NARROW)

    rate = tl.minimum(a * inverse, _rate_limit(dtype))
    sum0, sum1, sum2 = _weight_sums(p_s, p_mask, begin, length, top, unit, rate, inverse, BLOCK)
    # n >= 1, and the maximum has e^x = 1: 0 means that nothing is supervised
    total = tl.where(sum0 > 0, sum0, n)
    ess = tl.where(sum0 > 0, total * total / (n * tl.where(sum0 > 0, sum1, 1.0)), 1.0)

    # Utilities in units of the largest |s|: t = level + width*z.
    size = tl.where(magnitude > 0, magnitude, 1.0)
    level, width = top.to(tl.float64) / size, spread / (size * wide_unit)
    mean_v = width * (sum2 / total)
    square_u, square_v = _write_weights(
        p_s, p_mask, p_q, p_weight, begin, length, top, unit, rate, inverse,
        1.0 / total, n / total, level, width, mean_z, mean_v, BLOCK,
    )  # fmt: skip
    # uniform weights: the two columns of the variance are the same to the last bit
    mean_u = width * mean_z
    mean_v = tl.where(a == 0, mean_u, mean_v)
    square_v = tl.where(a == 0, square_u, square_v)
    tl.store(p_moments + i_segment, tl.where(known, n, 0.0))
    tl.store(p_moments + number + i_segment, level + mean_u)
    tl.store(p_moments + 2 * number + i_segment, square_u.to(tl.float64))
    tl.store(p_moments + 3 * number + i_segment, level + mean_v)
    tl.store(p_moments + 4 * number + i_segment, square_v.to(tl.float64))
    tl.store(p_moments + 5 * number + i_segment, magnitude)

    largest: tl.constexpr = 1.7976931348623157e308 if dtype == tl.float64 else 3.4028234663852886e38
    if RULE == _TAU:
        tau = tl.where(finite, value, 0.0)
    else:
        tau = tl.minimum(rate, largest / tl.maximum(wide_unit, 1.0)) * wide_unit
    tl.store(p_stats + i_segment, tl.minimum(tau, largest).to(dtype))
    tl.store(p_stats + number + i_segment, kl)
    tl.store(p_stats + 2 * number + i_segment, tl.minimum(ess, 1.0).to(dtype))
    tl.store(p_flags + i_segment, saturated)
    tl.store(p_flags + number + i_segment, constant)
    tl.store(p_flags + 2 * number + i_segment, finite)


# ---- over all segments: by the last program to finish ----


@triton.jit
def _is_last(p_counter):
    """Whether all other programs have stored their share, which is then visible to this one."""
    tl.debug_barrier()  # the stores of this program's other threads come before its ticket
    last = tl.atomic_add(p_counter, 1, sem="acq_rel", scope="gpu") == tl.num_programs(0) - 1
    if last:
        tl.store(p_counter, 0)  # for the next launch
    return last


@triton.jit
def _row(p_moments, row, number, o_chunk):
    """A chunk of a row of [rows, S]; past the first-level cache, which may hold an older state."""
    i = o_chunk + tl.arange(0, _CHUNK)
    return tl.load(p_moments + row * number + i, mask=i < number, other=0.0, cache_modifier=".cg")


@triton.jit
def _write_variance(p_moments, p_variance, number):
    """variance [2, 2] from the moments of the segments: see GibbsStatistics."""
    largest = _zero()
    tokens, segments, sum_u, sum_v = _zero(), _zero(), _zero(), _zero()
    for o_chunk in range(0, number, _CHUNK):
        magnitude = _row(p_moments, 5, number, o_chunk)
        magnitude = tl.where(_row(p_moments, 0, number, o_chunk) > 0, magnitude, 0.0)
        largest = tl.maximum(largest, tl.max(magnitude))
    scale = tl.where(largest > 0, largest, 1.0)
    for o_chunk in range(0, number, _CHUNK):
        n = _row(p_moments, 0, number, o_chunk)
        known = n > 0
        size = tl.where(known, _row(p_moments, 5, number, o_chunk), 0.0) / scale
        tokens += tl.sum(n)
        segments += tl.sum(known.to(tl.float64))
        sum_u += tl.sum(tl.where(known, size * _row(p_moments, 1, number, o_chunk), 0.0))
        sum_v += tl.sum(tl.where(known, size * _row(p_moments, 3, number, o_chunk), 0.0))
    over_tokens, over_segments = tl.maximum(tokens, 1.0), tl.maximum(segments, 1.0)
    token_u, token_v, segment_u, segment_v = _zero(), _zero(), _zero(), _zero()
    for o_chunk in range(0, number, _CHUNK):
        n = _row(p_moments, 0, number, o_chunk)
        known = n > 0
        size = tl.where(known, _row(p_moments, 5, number, o_chunk), 0.0) / scale
        share = size / tl.maximum(n, 1.0)
        u, v = _row(p_moments, 1, number, o_chunk), _row(p_moments, 3, number, o_chunk)
        square_u = share * share * _row(p_moments, 2, number, o_chunk)
        square_v = share * share * _row(p_moments, 4, number, o_chunk)
        far_u, far_v = share * u - sum_u / over_tokens, share * v - sum_v / over_tokens
        token_u += tl.sum(tl.where(known, square_u + n * far_u * far_u, 0.0))
        token_v += tl.sum(tl.where(known, square_v + n * far_v * far_v, 0.0))
        far_u, far_v = size * u - sum_u / over_segments, size * v - sum_v / over_segments
        segment_u += tl.sum(tl.where(known, far_u * far_u, 0.0))
        segment_v += tl.sum(tl.where(known, far_v * far_v, 0.0))
    tokens, segments = tl.maximum(tokens - 1.0, 1.0), tl.maximum(segments - 1.0, 1.0)
    tl.store(p_variance, token_u / tokens)
    tl.store(p_variance + 1, token_v / tokens)
    tl.store(p_variance + 2, segment_u / segments)
    tl.store(p_variance + 3, segment_v / segments)


@triton.jit(launch_metadata=costs.gibbs)
def _gibbs_kernel(
    p_s, p_mask, p_offsets, p_q, p_weight, p_stats, p_flags, p_variance, p_moments, p_counter,
    p_state, number, value: tl.float64, resolution: tl.float64,
    RULE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """q = softmax(tau*s) over each segment, weights q*n, statistics, flags and variances.

    s [N] float32 or float64, mask bool [N] or None, offsets int64 [S + 1]. Grid: (S,). Outputs:
    q, weight [N], stats [3, S], flags [3, S], variance [2, 2]; moments [6, S] are scratch, counter
    is 0 before and after. ``state`` holds the batch's temperature and is read for that rule alone.
    """
    i_segment = tl.program_id(0).to(tl.int64)
    begin = tl.load(p_offsets + i_segment)
    length = tl.load(p_offsets + i_segment + 1) - begin
    value, resolution = tl.full((), value, tl.float64), tl.full((), resolution, tl.float64)
    _segment(
        p_s, p_mask, p_q, p_weight, p_stats, p_flags, p_moments, p_state, i_segment, number,
        begin, length, value, resolution, RULE, BLOCK,
    )  # fmt: skip
    if _is_last(p_counter):
        _write_variance(p_moments, p_variance, number)


# ---- one temperature for the batch: a = t * ratio, ratio = spread / the widest spread ----
# State: t, low, high, whether the search is over, saturated, widest spread, 1 / known segments,
# step.


@triton.jit
def _batch_segment(
    p_s, p_mask, p_moments, p_state, i_segment, number, begin, length, resolution,
    FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the search needs of one segment: at first its profile, then KL and its derivative."""
    (top, unit, n, spread, _, inverse, mean_z, curvature, ceiling, supremum,
     known, _, _, flat) = _profile(
        p_s, p_mask, begin, length, True, resolution, BLOCK
    )  # fmt: skip
    wide_unit = tl.where(unit > 0, unit, 1.0).to(tl.float64)
    width = tl.where(flat, 0.0, spread * 0.25 / wide_unit)
    if FIRST:
        tl.store(p_moments + i_segment, known.to(tl.float64))
        tl.store(p_moments + number + i_segment, width)
        tl.store(p_moments + 2 * number + i_segment, ceiling)
        tl.store(p_moments + 3 * number + i_segment, supremum)
        tl.store(p_moments + 4 * number + i_segment, curvature)
    else:
        a = tl.minimum(tl.load(p_state) * (width / tl.load(p_state + 5)), 1e300)
        kl, variance = _evaluate(
            p_s, p_mask, begin, length, top, unit, n, a, inverse, mean_z, BLOCK
        )
        tl.store(p_moments + i_segment, kl.to(tl.float64))
        tl.store(p_moments + number + i_segment, variance.to(tl.float64))


@triton.jit
def _begin_search(p_moments, p_state, number, value):
    widest, known = _zero(), _zero()
    for o_chunk in range(0, number, _CHUNK):
        widest = tl.maximum(widest, tl.max(_row(p_moments, 1, number, o_chunk)))
        known += tl.sum(_row(p_moments, 0, number, o_chunk))
    widest = tl.where(widest > 0, widest, 1.0)
    ceiling, supremum, curvature, squares = _zero(), _zero(), _zero(), _zero()
    for o_chunk in range(0, number, _CHUNK):
        ratio = _row(p_moments, 1, number, o_chunk) / widest
        own = tl.where(ratio > 0, _row(p_moments, 2, number, o_chunk), 0.0)
        ceiling = tl.maximum(ceiling, tl.max(own / tl.where(ratio > 0, ratio, 1.0)))
        supremum += tl.sum(_row(p_moments, 3, number, o_chunk))
        curvature += tl.sum(ratio * ratio * _row(p_moments, 4, number, o_chunk))
        squares += tl.sum(ratio * ratio)
    share = 1.0 / tl.maximum(known, 1.0)
    ceiling = tl.minimum(ceiling, 1e300)
    reached = supremum * share <= value
    low = tl.sqrt(8.0 * value / tl.maximum(squares * share, 1e-300)) * 0.999
    t = _first_guess(value, curvature * share, low, ceiling)
    tl.store(p_state, tl.where(reached, ceiling, t))
    tl.store(p_state + 1, low)
    tl.store(p_state + 2, ceiling)
    tl.store(p_state + 3, reached.to(tl.float64))
    tl.store(p_state + 4, reached.to(tl.float64))
    tl.store(p_state + 5, widest)
    tl.store(p_state + 6, share)
    tl.store(p_state + 7, 0.0)


@triton.jit
def _continue_search(p_moments, p_state, number, value, dtype: tl.constexpr):
    kl, variance = _zero(), _zero()
    for o_chunk in range(0, number, _CHUNK):
        kl += tl.sum(_row(p_moments, 0, number, o_chunk))
        variance += tl.sum(_row(p_moments, 1, number, o_chunk))
    share = tl.load(p_state + 6)
    kl, variance = kl * share, variance * share
    t, low, high = tl.load(p_state), tl.load(p_state + 1), tl.load(p_state + 2)
    step = tl.load(p_state + 7).to(tl.int32)
    done = _met(kl, value, t, dtype)
    low, high = tl.where(kl > value, low, t), tl.where(kl > value, t, high)
    following = _next(t, low, high, kl, variance, value, step)
    done = done | (high <= low * _NARROW)
    tl.store(p_state, tl.where(done, t, following))
    tl.store(p_state + 1, low)
    tl.store(p_state + 2, high)
    tl.store(p_state + 3, done.to(tl.float64))
    tl.store(p_state + 7, (step + 1).to(tl.float64))


@triton.jit(launch_metadata=costs.gibbs_batch)
def _batch_kernel(
    p_s, p_mask, p_offsets, p_moments, p_counter, p_state, number, value: tl.float64,
    resolution: tl.float64, FIRST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One step of the search for t at which the mean KL is ``value``; nothing once it is over.

    Arguments and grid as of _gibbs_kernel. The first launch brackets t and guesses it from the
    curvatures, each further one evaluates the mean KL at t and moves it.
    """
    value, resolution = tl.full((), value, tl.float64), tl.full((), resolution, tl.float64)
    run = tl.full((), 1, tl.int1)
    if not FIRST:
        run = tl.load(p_state + 3) == 0
    if run:
        i_segment = tl.program_id(0).to(tl.int64)
        begin = tl.load(p_offsets + i_segment)
        length = tl.load(p_offsets + i_segment + 1) - begin
        _batch_segment(
            p_s, p_mask, p_moments, p_state, i_segment, number, begin, length, resolution,
            FIRST, BLOCK,
        )  # fmt: skip
        if _is_last(p_counter):
            if FIRST:
                _begin_search(p_moments, p_state, number, value)
            else:
                _continue_search(p_moments, p_state, number, value, p_s.dtype.element_ty)


# ---- the operator ----


def gibbs_variance(
    utility: Tensor,  # float32 or float64 [N]
    mask: Tensor | None,  # bool [N]
    offsets: Tensor,  # int64 [S + 1]
    value: float,
    rule: str,
    resolution: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """See ``vcore_kernels._gibbs.reference``: q, weight, [tau, kl, ess], flags, variance."""
    if rule not in _RULES:
        raise ValueError(f"gibbs_variance: rule must be {', '.join(_RULES)}, got {rule!r}.")
    if utility.dim() != 1 or utility.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"gibbs_variance: expected utility [N], float32 or float64, got "
            f"{list(utility.shape)}, {utility.dtype}."
        )
    if offsets.dim() != 1 or offsets.shape[0] < 1 or offsets.dtype != torch.int64:
        raise TypeError("gibbs_variance: offsets must be int64 [S + 1].")
    if mask is not None and (mask.dtype != torch.bool or mask.shape != utility.shape):
        raise TypeError("gibbs_variance: mask must be bool [N].")
    number = offsets.shape[0] - 1
    utility, offsets = utility.contiguous(), offsets.contiguous()
    mask = None if mask is None else mask.contiguous()
    q, weight = torch.empty_like(utility), torch.empty_like(utility)
    stats = utility.new_empty((3, number))
    flags = utility.new_empty((3, number), dtype=torch.bool)
    if number == 0:
        return q, weight, stats, flags, utility.new_zeros((2, 2), dtype=torch.float64)
    variance = utility.new_empty((2, 2), dtype=torch.float64)
    scratch = utility.new_empty(_MOMENTS * number + _STATE, dtype=torch.float64)
    moments, state = scratch[_STATE:], scratch
    counter = torch.zeros(1, dtype=torch.int32, device=utility.device)

    table = tuning.GIBBS[architecture(utility.device), utility.dtype]
    options: dict[str, Any] = {"BLOCK": table.block, "num_warps": table.warps}
    search: dict[str, Any] = {"BLOCK": table.block, "num_warps": table.step_warps}
    if rule == "batch" and value == 0:
        rule = "trajectory"  # uniform
    if rule == "batch":
        for step in range(1 + BATCH_STEPS):
            launch(
                _batch_kernel, (number,), utility, mask, offsets, moments, counter, state, number,
                value, resolution, FIRST=step == 0, **search,
            )  # fmt: skip
    launch(
        _gibbs_kernel, (number,), utility, mask, offsets, q, weight, stats, flags, variance,
        moments, counter, state, number, value, resolution, RULE=_RULES[rule], **options,
    )  # fmt: skip
    return q, weight, stats, flags, variance
