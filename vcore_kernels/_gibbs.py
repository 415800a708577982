"""The operator behind ``gibbs_weights`` and ``vcore_loss``: one launch for all of it.

``torch.ops.vcore_kernels.gibbs_variance`` is the compiled kernel (csrc/gibbs.cpp), and
``gibbs_variance_reference`` is :func:`reference`, opaque to torch.compile like the kernel. Both
work in float64 inside, on utilities brought to z = (s - max s) / (max s - min s) in [-1, 0], so
that neither the scale of the utilities nor a constant added to them matters: q = softmax(a*z),
with a = tau * (max s - min s).
"""

import math
from collections.abc import Callable
from numbers import Real
from typing import NamedTuple

import torch
from torch import Tensor

from vcore_kernels._library import LIBRARY, define
from vcore_kernels.backends import resolve
from vcore_kernels.backends.reference import statistics_dtype
from vcore_kernels.backends.triton import implement
from vcore_kernels.segments import Segments, segment_max, segment_sum

# exp(-EXP_ZERO) is 0 in float64. The compiled kernel has the same constants.
EXP_ZERO = 746.0
LARGEST = 1e300
TINY = 1e-200
STEPS = 64
NEWTON_STEPS = 8


class GibbsStatistics(NamedTuple):
    """Everything that one launch computes. Entries outside the mask are 0."""

    q: Tensor  # [N], sums to 1 over each segment
    weight: Tensor  # [N] q*n, exactly 1 where uniform
    tau: Tensor  # [S]
    kl: Tensor  # [S] KL(q || uniform), nats
    ess: Tensor  # [S] 1 / (n * sum q^2)
    saturated: Tensor  # bool [S]
    constant: Tensor  # bool [S]
    finite: Tensor  # bool [S]
    # float64 [2, 2]: sample variance over tokens (row 0) and trajectories (row 1) of the utilities
    # under uniform (column 0) and Gibbs weights (column 1), in units of the largest |utility|
    # squared
    variance: Tensor


def reference(
    utility: Tensor,  # [N]
    mask: Tensor | None,  # bool [N]
    offsets: Tensor,  # int64 [S + 1]
    value: float,
    rule: str,  # "tau", or the scope of a KL budget: "trajectory", "batch"
    resolution: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Eager PyTorch on any device. Returns q, weight, [tau, kl, ess], flags, variance."""
    dtype, segments = utility.dtype, Segments(offsets, mask, utility.shape[0])
    number, index, valid = segments.number, segments.segment_of(), segments.valid()
    s = utility.to(torch.float64)
    if number == 0:
        empty = utility.new_empty
        flags = empty((3, 0), dtype=torch.bool)
        return empty(0), empty(0), empty((3, 0)), flags, s.new_zeros(2, 2)

    def total(x: Tensor) -> Tensor:
        return segment_sum(x, index, number)

    def highest(x: Tensor, where: Tensor) -> Tensor:
        return segment_max(x.where(where, -torch.inf), index, number)

    count = total(valid.to(s.dtype))
    n = count.clamp(min=1)
    finite = total((valid & ~s.isfinite()).to(s.dtype)) == 0
    known = finite & (count > 0)
    used = valid & finite[index]
    high = highest(s, used).where(known, 0)
    low = (-highest(-s, used)).where(known, 0)
    # the difference may overflow, and the reciprocal of it may
    plain = high - low
    unit = torch.ones_like(high).where((plain == 0) | (plain >= TINY), 2.0**512)
    unit = unit.where(plain.isfinite(), 0.25)
    spread = high * unit - low * unit
    magnitude = torch.maximum(high.abs(), low.abs())
    constant = known & (spread <= resolution * (magnitude * unit))
    flat = spread == 0 if rule == "tau" else constant | ~known

    scale = spread.where(~flat, 1)
    z = ((s * unit[index] - (high * unit)[index]) / scale[index]).where(used & ~flat[index], 0)
    peaks = total((valid & (z == 0)).to(s.dtype)).clamp(min=1)
    gap = -highest(z, valid & (z < 0))  # to the second highest; infinite where there is none
    supremum = (n / peaks).log()
    ceiling = (EXP_ZERO / gap).clamp(max=LARGEST)
    curvature = (total(z * z) / n - (total(z) / n) ** 2).clamp(min=0)

    def evaluate(a: Tensor) -> tuple[Tensor, Tensor]:
        """KL(softmax(a*z) || uniform) and its derivative, per segment."""
        e = (a[index] * z).exp().where(valid, 0)
        z_sum = total(e).where(count > 0, 1)
        mean = total(e * z) / z_sum
        spread_q = (total(e * z * z) / z_sum - mean * mean).clamp(min=0)
        return (a * mean - (z_sum / n).log()).clamp(min=0).where(count > 0, 0), a * spread_q

    saturated = torch.zeros_like(finite)
    if rule == "tau":
        a = (value * (spread / unit)).clamp(max=LARGEST)
    elif value == 0:
        a = torch.zeros_like(spread)
    elif rule == "trajectory":
        saturated = supremum <= value
        a = _solve(evaluate, value, ceiling, curvature, torch.full_like(n, 0.25))
        a = ceiling.where(saturated, a).where(~flat, 0)
    else:  # one tau, in units of 1 / the widest spread
        share = known / known.sum().clamp(min=1)  # of each trajectory in the mean
        width = (spread / unit).where(~flat, 0)
        ratio = width / width.amax().clamp(min=torch.finfo(s.dtype).tiny)
        ceiling = (ceiling / ratio.where(~flat, 1)).where(~flat, 0).amax().clamp(max=LARGEST)

        def evaluate_batch(t: Tensor) -> tuple[Tensor, Tensor]:
            kl, slope = evaluate(t * ratio)
            return (share * kl).sum(), (share * ratio * slope).sum()

        curvature = (share * ratio * ratio * curvature).sum()
        bound = (share * ratio * ratio).sum() * 0.25
        reached = (share * supremum).sum() <= value
        t = _solve(evaluate_batch, value, ceiling, curvature, bound)
        a = ceiling.where(reached, t) * ratio
        saturated = reached.expand(number).clone()

    e = (a[index] * z).exp().where(valid, 0)
    z_sum = total(e).where(count > 0, 1)
    q = e / z_sum[index]
    weight = e * (n / z_sum)[index]
    kl, _ = evaluate(a)
    ess = (z_sum * z_sum / (n * total(e * e).where(count > 0, 1))).clamp(max=1)
    tau = torch.full_like(a, value).where(finite, 0) if rule == "tau" else a / scale * unit
    stats = torch.stack([tau.clamp(max=torch.finfo(dtype).max), kl, ess])
    flags = torch.stack([saturated, constant, finite])
    variance = utility_variance(s, q, 1 / n, magnitude, used, known, index)
    return q.to(dtype), weight.to(dtype), stats.to(dtype), flags, variance


def _solve(
    evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
    budget: float,
    ceiling: Tensor,
    curvature: Tensor,
    bound: Tensor,
) -> Tensor:
    """The a at which KL(a) = budget: Newton's method on sqrt(KL), nearly linear in a, in a bracket.

    KL(a) <= bound*a^2/2 gives the bracket's lower end, KL(a) ~ curvature*a^2/2 the first guess. A
    step that leaves the bracket is replaced by its geometric middle, and so is every second one of
    the late ones. Only a CPU stops early: elsewhere the number of steps is fixed, so that nothing
    waits for the device.
    """
    low, high = (2 * budget / bound).sqrt(), ceiling
    a = torch.minimum((2 * budget / curvature).sqrt().clamp(max=LARGEST).maximum(low), high)
    for step in range(STEPS):
        kl, slope = evaluate(a)
        done = (kl - budget).abs() <= 1e-9 * budget + 1e-15
        if done.device.type == "cpu" and done.all():
            break
        above = kl > budget
        low, high = low.where(above, a), a.where(above, high)
        root = kl.sqrt()
        newton = a - 2 * root * (root - math.sqrt(budget)) / slope
        inside = (newton > low) & (newton < high)
        if step >= NEWTON_STEPS and step % 2:
            inside = torch.zeros_like(inside)
        a = a.where(done, newton.where(inside, low.sqrt() * high.sqrt()))
    return a


def utility_variance(
    s: Tensor,  # float64 [N]
    q: Tensor,  # float64 [N]
    uniform: Tensor,  # [S] 1/n, as precise as q
    magnitude: Tensor,  # [S] largest |s|
    used: Tensor,  # bool [N]
    known: Tensor,  # bool [S]
    index: Tensor,  # [N]
) -> Tensor:
    """Unbiased sample variances of s/n and of q*s: ``GibbsStatistics.variance``."""
    largest = magnitude.where(known, 0).amax()
    s = (s / largest.clamp(min=1 / LARGEST)).where(used, 0)
    pair = [s * uniform[index], s * q.where(used, 0)]
    tokens = [_variance(x, used) for x in pair]
    sums = [segment_sum(x, index, known.shape[0]) for x in pair]
    return torch.stack([torch.stack(tokens), torch.stack([_variance(x, known) for x in sums])])


def _variance(x: Tensor, where: Tensor) -> Tensor:
    """Unbiased sample variance of the chosen entries; 0 for fewer than two."""
    count = where.sum()
    mean = x.where(where, 0).sum() / count.clamp(min=1)
    return ((x - mean) ** 2).where(where, 0).sum() / (count - 1).clamp(min=1)


def _fake(utility, mask, offsets, value, rule, resolution):
    number = offsets.shape[0] - 1
    return (
        torch.empty_like(utility),
        torch.empty_like(utility),
        utility.new_empty(3, number),
        utility.new_empty((3, number), dtype=torch.bool),
        utility.new_empty((2, 2), dtype=torch.float64),
    )


_SCHEMA = (
    "(Tensor utility, Tensor? mask, Tensor offsets, float value, str rule, float resolution)"
    " -> (Tensor q, Tensor weight, Tensor stats, Tensor flags, Tensor variance)"
)
define(f"gibbs_variance{_SCHEMA}", _fake)
define(f"gibbs_variance_reference{_SCHEMA}", _fake, compiled=False)
LIBRARY.impl("gibbs_variance_reference", reference, "CompositeExplicitAutograd")
implement("gibbs", "gibbs_variance")


def gibbs_statistics(
    op: str,
    utility: Tensor,  # any shape
    segments: Segments,
    rule: str,
    value: float,
    backend: str,
) -> GibbsStatistics:
    """Runs the operator for ``op``, on utilities widened to 32 bits, without a gradient."""
    dtype = statistics_dtype(utility.dtype)
    # Utilities closer together than this, relative to their size, are equal as far as anyone can
    # tell: a few roundings of the sums that formed them, or one step of a narrower dtype they were
    # stored in.
    resolution = 8 * torch.finfo(dtype).eps
    if utility.dtype != dtype:
        resolution = max(resolution, torch.finfo(utility.dtype).eps)
    flat = utility.detach().to(dtype).reshape(-1)
    chosen = resolve(op, backend, flat)
    ops = torch.ops.vcore_kernels
    run = ops.gibbs_variance_reference if chosen == "reference" else ops.gibbs_variance
    q, weight, stats, flags, variance = run(
        flat, segments.mask, segments.offsets, value, rule, resolution
    )
    tau, kl, ess = stats.unbind()
    saturated, constant, finite = flags.unbind()
    return GibbsStatistics(q, weight, tau, kl, ess, saturated, constant, finite, variance)


def resolve_rule(
    op: str,
    tau: float | None,
    temperature: float | None,
    kl_budget: float | None,
    kl_scope: str,
) -> tuple[str, float]:
    """What the user gave as the operator's (rule, value); ValueError unless it is exactly one."""
    given = {"tau": tau, "temperature": temperature, "kl_budget": kl_budget}
    chosen = [name for name, number in given.items() if number is not None]
    if len(chosen) != 1:
        raise ValueError(
            f"{op}: pass exactly one of tau, temperature and kl_budget, got "
            f"{' and '.join(chosen) or 'none'}."
        )
    if kl_scope not in ("trajectory", "batch"):
        raise ValueError(f"{op}: kl_scope must be 'trajectory' or 'batch', got {kl_scope!r}.")
    name = chosen[0]
    value = given[name]
    if not isinstance(value, (Real, torch.SymFloat, torch.SymInt)):
        raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}.")
    if name == "temperature":
        if not 0 < value < math.inf or 1 / value == math.inf:
            raise ValueError(f"{op}: temperature must be a positive number, got {value}.")
        return "tau", 1 / value
    if not 0 <= value < math.inf:
        raise ValueError(f"{op}: {name} must be a number >= 0, got {value}.")
    return ("tau" if name == "tau" else kl_scope), float(value)
