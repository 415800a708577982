"""Utilities by finite differences, for models without a forward derivative and to compare with.

``(l(theta + eps*g) - l(theta - eps*g)) / (2*eps)`` ("central") or ``(l(theta) - l(theta - eps*g)) /
eps`` (the paper's, arXiv 2510.27462). The decoder runs at each point; what the hidden states change
by is formed in fp32 and goes through the head as a tangent, or the head's losses at both points are
subtracted without cancellation (``head``).

Signal and noise: with a = l(theta + eps*g) - l(theta) and b = l(theta) - l(theta - eps*g) the
change of the losses is D = a + b (central) or b, and R = a - b is what is not a straight line:
rounding (of the passes; of 16-bit weights, which move by stochastic rounding) and curvature. The
rounding of a and of b is independent or, as both have theta in them, opposed; so the mean of their
product over the supervised tokens, 4 a*b = D^2 - R^2 or a*b, is the power of the signal or less.
Rounding of variance v in each pass gives R the variance 6 v and D the variance 2 v: the power of
the noise is ``mean(R^2) / 3``. (16-bit weights round at the moved points alone: w there gives R 2 w
more, a central D 2 w and a forward one w. With w = v the share is 1/2 and 3/8. Curvature c gives R
= c and a forward difference the error c / 2, about the same share; in a central difference it
cancels, which makes the ratio a lower bound there.) Then ``snr = sqrt(max(0, signal) / noise)``,
about the root mean square of the utilities over that of their error; 0 where the step is so small
that nothing in the decoder moved.

On small trained Qwen3s (fp32, bf16 autocast, bf16 weights, LoRA; epsilon from 1e-6 to 0.1) it was
within a factor of 2 of the ratio found with float64 wherever that was above 2 and curvature did not
rule, and below 1 wherever that was.

head="linear" is the rule because there it came up to 4 times closer to float64 than head="pair",
and nowhere stayed more than 1% behind it: it leaves out the head's own curvature and the rounding
of its weights.
"""

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any, Literal, NamedTuple, get_args
from weakref import WeakSet

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn

from vcore_kernels import linear_nll_jvp, linear_nll_pair
from vcore_kernels.perturbed import perturbed
from vcore_train.context_parallel import sequence_processes
from vcore_train.direction_tensors import local, norm_of, wide
from vcore_train.modeling import (
    IGNORE_INDEX,
    Head,
    causal_lm,
    head_of,
    hidden_states,
    label_shift,
    probing,
)
from vcore_train.probed import Probed, TokenUtilities
from vcore_train.sharding import (
    duals_in_places,
    reshard,
    sharing_processes,
    unpacked,
    within_forward,
)
from vcore_train.shared_trunk import SharedTrunk

logger = logging.getLogger("vcore_train")
DifferenceHead = Literal["linear", "pair"]
DIFFERENCE_HEADS: tuple[DifferenceHead, ...] = get_args(DifferenceHead)

# Without a given epsilon the step is such that the losses change by this many nats (root mean
# square over the tokens): factor * eps ** power, eps the machine epsilon of the pass (0.044 and
# 0.07 nats in bf16, 1.7e-4 and 1.7e-3 in fp32). The powers balance rounding, which falls with the
# step, against the first term left out, which grows with it or with its square. The factors are
# from a small trained Qwen3 with bf16 weights or autocast, full-parameter and LoRA, whose best
# steps differ tenfold in epsilon and in |epsilon * g| / |theta|, but not in the change of the
# losses.
_TARGETS = {False: (0.5, 1 / 2), True: (0.35, 1 / 3)}  # by whether central
_TOLERATED, _TRIES = 2.0, 4  # accepted factor around the target; steps tried at most
_warned: WeakSet[nn.Module] = WeakSet()


class _Measured(NamedTuple):
    """Losses, and what they lose on the way from one point to another."""

    nll: Tensor
    change: Tensor


def difference_utilities(
    model: nn.Module,
    inputs: Mapping[str, Any],
    labels: Tensor,
    probed: Mapping[str, Probed],
    epsilon: float | None,
    backend: str,
    *,
    central: bool,
    head: DifferenceHead = "linear",
    snr: bool = True,
) -> TokenUtilities:
    """Utilities and losses; see the head of this module.

    Cost: two forward passes without a graph, three with ``snr``; without ``epsilon`` up to three
    times two more for the search. Layers before the first that moves are run once. Memory: a
    backup of the moved parameters, the hidden states of each point, and with head="pair" a copy of
    the head where it moves.

    Args:
        head: "linear": the change of the hidden states (fp32), and the head's own direction as it
            is, through the head's derivative. "pair": the losses of both points under the head as
            it is moved there, rounding and all.
        snr: measure the signal-to-noise ratio, and warn once a model where it is below 1.
    """
    with probing(model, attention=None):
        points = _Points(model, inputs, labels, probed, backend, central, head)
        if epsilon is None:
            epsilon, measured = points.search()
        else:
            measured = points.measure(epsilon)
        ratio = points.snr(epsilon, measured.change) if snr else None
    if ratio is not None and ratio < 1:
        _warn(model, ratio, epsilon)
    span = 2 * epsilon if central else epsilon
    return TokenUtilities(measured.change / span, measured.nll, epsilon, ratio)


class _Point(NamedTuple):
    """What the losses depend on at one point of parameter space."""

    hidden: Tensor
    head: Head | None  # for pairs of losses only


class _Points:
    """Passes at ``theta - step * g`` over one batch, and what the head makes of them.

    The arguments are those of :func:`difference_utilities`.
    """

    def __init__(self, model, inputs, labels, probed, backend, central, kind):
        self.model, self.inputs, self.labels, self.backend = model, inputs, labels, backend
        self.central, self.pair, self.probed = central, kind == "pair", probed
        self.shift = label_shift(inputs)
        self._trunk = SharedTrunk(model, [p.parameter for p in _in_place(probed)])
        self._theta: _Point | None = None
        self._ends: tuple[_Point, _Point] | None = None
        self._decoder_moves = any(p.moves and not p.of_head for p in _in_place(probed))
        # Where ranks share a model or a sequence, each has a part of the tokens, and all take the
        # same steps.
        self._sharing = sharing_processes(model) + sequence_processes(model)

    def measure(self, epsilon: float) -> _Measured:
        """What the losses lose on the way to ``theta - epsilon * g`` from theta or, for a central
        difference, from ``theta + epsilon * g``; and the losses at theta, or near the middle."""
        first, last = self._at(-epsilon if self.central else 0.0), self._at(epsilon)
        self._ends = first, last
        change = _minus(first.hidden, last.hidden)
        if self.pair:
            nll, change = _pair(first, last, self.labels, self.shift, self.backend)
            return _Measured(nll - change / 2 if self.central else nll, change)
        middle = last.hidden + (change / 2).to(last.hidden) if self.central else first.hidden
        return self._through_head(middle, change, 2 * epsilon if self.central else epsilon)

    def snr(self, epsilon: float, change: Tensor) -> float | None:
        """Signal over noise of ``change``; None where nothing is supervised, g is 0 or not finite.

        One more pass.
        """
        assert self._ends is not None
        moving = any(p.moves for p in self.probed.values())
        mask = self.labels != IGNORE_INDEX
        if not moving or not self._sum(mask.sum()):
            return None
        theta, (first, last) = self._at(0.0), self._ends
        if not self.central:
            first = self._at(-epsilon)
        moved = torch.tensor(not torch.equal(first.hidden, last.hidden), device=mask.device)
        if self._decoder_moves and not self._sum(moved.int()):
            return 0.0
        if self.pair:
            residual = _pair(first, theta, self.labels, self.shift, self.backend)[1]
            residual -= _pair(theta, last, self.labels, self.shift, self.backend)[1]
        else:
            second = _minus(first.hidden, theta.hidden) - _minus(theta.hidden, last.hidden)
            residual = self._through_head(theta.hidden, second).change
        change, residual = change[mask].double(), residual[mask].double()
        # The product of the changes on both sides of theta, for a central difference times 4.
        signal = (
            change.square() - residual.square() if self.central else change * (change + residual)
        )
        share = (1 / 2 if self.central else 3 / 8) if _narrow(self.probed) else 1 / 3
        power, noise = self._mean(signal, mask), share * self._mean(residual.square(), mask)
        if not math.isfinite(power):
            return None
        if noise == 0:
            return math.inf if power > 0 else 0.0
        return math.sqrt(max(power, 0.0) / noise)

    def search(self) -> tuple[float, _Measured]:
        """A step that changes the losses as ``_TARGETS`` says, and losses and changes there."""
        factor, power = _TARGETS[self.central]
        target = factor * _machine_epsilon(self.model) ** power
        probed, mask = self.probed.values(), self.labels != IGNORE_INDEX
        theta = norm_of([p.parameter.detach() for p in probed])
        if not (theta > 0 and math.isfinite(theta)):  # of NaN weights, NaN utilities are the answer
            theta = 1.0
        epsilon = 0.05 * target * theta / (norm_of([p.direction for p in probed]) or theta)
        for attempt in range(1, _TRIES + 1):
            measured = self.measure(epsilon)
            change = math.sqrt(self._mean(measured.change[mask].square(), mask))
            close = target / _TOLERATED <= change <= target * _TOLERATED
            if close or change == 0 or not math.isfinite(change) or attempt == _TRIES:
                break
            epsilon *= min(max(target / change, 1e-3), 1e3)
        logger.info("epsilon %.3g changes the losses by %.2g nats rms", epsilon, change)
        return epsilon, measured

    def _sum(self, value: Tensor) -> float:
        for processes in self._sharing:
            value = processes.sum(value)
        return float(value)

    def _mean(self, values: Tensor, mask: Tensor) -> float:
        """Of values at the supervised tokens of all ranks; NaN where there is none."""
        count = self._sum(mask.sum())
        return self._sum(values.sum()) / count if count else math.nan

    def _at(self, step: float) -> _Point:
        if step == 0.0 and self._theta is not None:
            return self._theta
        moved: list[tuple[Tensor, Tensor]] = [
            (p.parameter, p.direction) for p in _in_place(self.probed)
        ]
        weight = None
        for p in self.probed.values():
            if p.of_operator == "weight" and self.pair:
                weight = p.parameter.detach().clone()
                moved.append((weight, p.direction))

        def decode() -> _Point:
            hidden = self._trunk.run(lambda: hidden_states(self.model, self.inputs))
            return _Point(hidden, self._head_here(weight) if self.pair else None)

        with _moved(moved, step):
            point = within_forward(self.model, self.model, decode)
            reshard(self.model)  # or the next pass would not see the weights move back
        if step == 0.0:
            self._theta = point
        return point

    def _head_here(self, weight: Tensor | None) -> Head:
        """The head where it stands now; ``weight`` is its own if it moves alone."""
        head = head_of(self.model)
        if weight is not None:
            head = replace(head, weight=weight)
        if any(p.of_head for p in self.probed.values()):
            bias = None if head.bias is None else head.bias.clone()
            head = replace(head, weight=head.weight.clone(), bias=bias)
        return head

    def _through_head(self, hidden: Tensor, change: Tensor, span: float = 0.0) -> _Measured:
        """Losses and how they change with ``hidden`` and along ``span`` steps of the head's g."""

        def run() -> _Measured:
            head = head_of(self.model)
            weight_change, bias_change = (
                _head_tangents(self.model, self.probed, span) if span else (None, None)
            )
            return _Measured(
                *linear_nll_jvp(
                    hidden,
                    head.weight,
                    self.labels,
                    change,
                    weight_change,
                    bias_tangent=bias_change,
                    ignore_index=IGNORE_INDEX,
                    shift=self.shift,
                    backend=self.backend,
                    **head.options(),
                )
            )

        try:
            return within_forward(self.model, self.model, run)
        finally:
            reshard(self.model)


def _machine_epsilon(model: nn.Module) -> float:
    """The coarsest precision of the pass: of the weights, or of autocast where it is on."""
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    dtypes = {p.dtype for p in parameters}
    device = parameters[0].device.type
    if torch.is_autocast_enabled(device):
        dtypes.add(torch.get_autocast_dtype(device))
    return max(torch.finfo(dtype).eps for dtype in dtypes)


def _warn(model: nn.Module, ratio: float, epsilon: float) -> None:
    """Once a model."""
    lm = causal_lm(model)
    if lm not in _warned:
        _warned.add(lm)
        logger.warning(
            "token_utilities: at epsilon %.3g the signal-to-noise ratio of the difference is %.2g: "
            "these utilities are mostly rounding (or curvature, where the step is large). Use "
            "method='jvp', or against rounding a larger epsilon; None searches one.",
            epsilon,
            ratio,
        )


def _in_place(probed: Mapping[str, Probed]) -> list[Probed]:
    """What moves in the model itself. A head's use alone moves in the head's computation."""
    return [p for p in probed.values() if p.moves and p.of_operator is None]


def _narrow(probed: Mapping[str, Probed]) -> bool:
    return any(p.parameter.dtype in (torch.bfloat16, torch.float16) for p in _in_place(probed))


def _minus(a: Tensor, b: Tensor) -> Tensor:
    """``a - b``, in fp32 or wider."""
    dtype = wide(a)
    return a.to(dtype) - b.to(dtype)


def _head_tangents(
    model: nn.Module, probed: Mapping[str, Probed], span: float
) -> tuple[Tensor | None, Tensor | None]:
    """What the head's weight and bias change by over ``span`` steps of g, to first order."""
    changes = {
        n: p.direction * span for n, p in probed.items() if p.of_head and p.of_operator is None
    }
    with fwAD.dual_level():
        with duals_in_places(model, changes):
            head = head_of(model)
        weight = unpacked(head.weight)[1]
        bias = None if head.bias is None else unpacked(head.bias)[1]
    for p in probed.values():
        if p.of_operator == "weight":
            weight = p.direction * span
        elif p.of_operator == "bias":
            bias = p.direction * span
    return weight, bias


def _pair(
    first: _Point, last: _Point, labels: Tensor, shift: int, backend: str
) -> tuple[Tensor, Tensor]:
    """Losses at ``first``, and what they lose on the way to ``last``, without cancellation."""
    assert first.head is not None
    assert last.head is not None
    same = first.head.weight.data_ptr() == last.head.weight.data_ptr()
    return linear_nll_pair(
        first.hidden,
        last.hidden,
        first.head.weight,
        labels,
        None if same else last.head.weight,
        bias_perturbed=None if same else last.head.bias,
        ignore_index=IGNORE_INDEX,
        shift=shift,
        backend=backend,
        **first.head.options(),
    )


@contextmanager
def _moved(pairs: list[tuple[Tensor, Tensor]], step: float) -> Iterator[None]:
    """Tensors at ``theta - step * g`` (of either sign), afterwards back, bit for bit.

    16-bit weights are rounded stochastically: to the nearest, most of them would not move.
    """
    if step == 0.0 or not pairs:
        yield
        return
    tensors, directions = [local(t) for t, _ in pairs], [local(g) for _, g in pairs]
    narrow = any(t.dtype in (torch.bfloat16, torch.float16) for t in tensors)
    rounding: Literal["nearest", "stochastic"] = "stochastic" if narrow else "nearest"
    with (
        _negated(directions) if step < 0 else nullcontext(directions) as signed,
        perturbed(tensors, signed, abs(step), rounding=rounding),
    ):
        yield


@contextmanager
def _negated(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """``-t`` for each, inside in the place of t; of those that share or repeat memory, copies."""
    uses = Counter(t.untyped_storage().data_ptr() for t in tensors)
    alone = [
        t.is_contiguous() and not t.is_inference() and uses[t.untyped_storage().data_ptr()] == 1
        for t in tensors
    ]
    turned = [t for t, own in zip(tensors, alone, strict=True) if own]
    signed = [t if own else t.neg() for t, own in zip(tensors, alone, strict=True)]
    for t in turned:
        t.neg_()
    try:
        yield signed
    finally:
        for t in turned:
            t.neg_()
