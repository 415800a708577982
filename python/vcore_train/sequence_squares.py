"""Squared Frobenius norms of weight gradients, sequence by sequence, from what makes them up.

N tokens of S sequences, T in the longest. Computed in float32, float64 for float64; [S] each.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vcore_kernels import linear_nll, linear_nll_grad_norms
from vcore_kernels.backends.reference import statistics_dtype, without_autocast
from vcore_train.modeling import IGNORE_INDEX, Head, HeadPart
from vcore_train.sequences import WORKSPACE, Sequences


def linear_squares(uses: Sequence[tuple[Tensor, Tensor]], sequences: Sequences) -> Tensor:
    """Of ``sum_t d_t x_t'`` over all uses of a weight: pairs of x [N, in] and d [N, out].

    The cheaper of two ways: the sum itself, T * in * out multiplications, or the ghost norm ``sum
    over t, t' of (x_t.x_t') (d_t.d_t')``, T * T * (in + out). As many sequences at a time as fit
    the workspace, one at least.
    """
    columns, rows = uses[0][0].shape[1], uses[0][1].shape[1]
    length = sequences.length * len(uses)
    ghost = length * (rows + columns) < rows * columns
    entries = length * (rows + columns) + (2 * length**2 if ghost else rows * columns)
    squares = []
    for part in sequences.parts(entries):
        x, d = (
            torch.cat([_wide(sequences.block(use[i], part, fill=0)) for use in uses], dim=1)
            for i in (0, 1)
        )
        with without_autocast(x.device.type):
            if ghost:
                products = (x @ x.mT).mul_(d @ d.mT).sum((1, 2))
            else:
                products = (d.mT @ x).square_().sum((1, 2))
        squares.append(products)
    return torch.cat(squares)


def row_sums(rows: Tensor, sequences: Sequences) -> Tensor:
    """``sum_t d_t`` of d [N, out] over each sequence, a bias's gradient: [S, out]."""
    rows = _wide(rows)
    segment = sequences.segment().to(rows.device)
    return rows.new_zeros(sequences.number, rows.shape[1]).index_add_(0, segment, rows)


class Lookup(NamedTuple):
    """One look-up of a batch in an embedding."""

    tokens: Tensor  # int64 [N]
    gradient: Tensor  # [N, H] of the rows looked up


def lookup_squares(lookups: Sequence[Lookup], sequences: Sequences) -> Tensor:
    """Of an embedding's gradient, whose row v is the sum of d_t over the tokens t that are v."""
    tokens = torch.cat([lookup.tokens for lookup in lookups])
    gradient = torch.cat([_wide(lookup.gradient) for lookup in lookups])
    segment = sequences.segment().to(tokens.device).repeat(len(lookups))
    entry = segment * (tokens.max() + 1) + tokens  # of (sequence, token)
    entries, row = entry.unique(return_inverse=True)
    sums = gradient.new_zeros(entries.shape[0], gradient.shape[1]).index_add_(0, row, gradient)
    of_row = segment.new_empty(entries.shape[0]).scatter_(0, row, segment)
    squares = gradient.new_zeros(sequences.number)
    return squares.index_add_(0, of_row, sums.square_().sum(1))


@dataclass(frozen=True)
class HeadPass:
    """The output head and what it was given."""

    head: Head
    hidden: Tensor  # [B, T, H]
    labels: Tensor  # [B, T]; that of position t is predicted at t - 1
    nll: Tensor  # [B, T], aligned with the labels
    sequences: Sequences
    backend: str

    def targets(self) -> Tensor:
        """[N]: what each token predicts, -100 where nothing supervised."""
        # the last of a sequence would predict the first of the next, which is -100
        return F.pad(self.labels.flatten()[1:], (0, 1), value=IGNORE_INDEX)


def head_squares(given: HeadPass) -> Tensor:
    """Of the whole head's weight, neither logits nor a gradient stored."""
    hidden, labels, bounds = given.hidden, given.labels, None
    if given.sequences.packed:
        hidden, labels = hidden.flatten(0, 1), labels.flatten()
        bounds = given.sequences.offsets
    norms = linear_nll_grad_norms(
        hidden,
        given.head.weight,
        labels,
        cu_seqlens=bounds,
        shift=1,
        ignore_index=IGNORE_INDEX,
        backend=given.backend,
        **given.head.options(),
    )
    return norms.square()


def tied_products(given: HeadPass, lookup: Lookup) -> Tensor:
    """Inner products of an embedding's gradient with that of a head that shares its weight.

    With d_s the gradient of the row looked up at s, token v_s, and g_tv that of the logit of v at
    t, it is ``sum over s, t of g_{t v_s} (h_t.d_s)``. So only logits of the sequence's own tokens
    are formed, T x T of them, as many at a time as fit the workspace.
    """
    sequences, targets = given.sequences, given.targets()
    hidden, nll = given.hidden.flatten(0, 1), F.pad(given.nll.flatten()[1:], (0, 1))
    length, width = sequences.length, hidden.shape[1]
    step = max(1, min(length, WORKSPACE // max(1, length)))
    products = []
    for part in sequences.parts(4 * length * (step + width)):
        tokens = sequences.block(lookup.tokens, part)  # [s, L]
        d = _wide(sequences.block(lookup.gradient, part, fill=0))  # [s, L, H]
        h = _wide(sequences.block(hidden, part, fill=0))
        y = sequences.block(targets, part, fill=IGNORE_INDEX)
        loss = sequences.block(nll, part)
        total = d.new_zeros(d.shape[0])
        for t in range(0, length, step):
            at = (slice(None), slice(t, t + step))
            g = _logit_gradients(given.head, h[at], y[at], loss[at], tokens)  # [s, t, L]
            total += ((g.mT @ h[at].masked_fill((y[at] < 0).unsqueeze(-1), 0)) * d).sum((1, 2))
        products.append(total)
    return torch.cat(products)


def _logit_gradients(head: Head, hidden, target, nll, tokens) -> Tensor:
    """d nll_t / d (logit of tokens_s before scale and cap): [s, t, L], 0 where t has no target."""
    index = target.clamp_min(0)
    at_target = (hidden * _wide(head.weight[index])).sum(-1)
    logits = hidden @ _wide(head.weight[tokens]).mT
    if head.bias is not None:
        at_target = at_target + _wide(head.bias[index])
        logits = logits + _wide(head.bias[tokens]).unsqueeze(1)
    at_target, logits = _capped(head, at_target), _capped(head, logits)
    others = torch.exp(logits - (at_target + nll).unsqueeze(-1))
    is_target = target.unsqueeze(-1) == tokens.unsqueeze(1)
    # p - 1 keeps its relative accuracy where p is close to 1
    gradient = torch.where(is_target, torch.expm1(-nll).unsqueeze(-1), others) * head.scale
    if head.softcap is not None:
        gradient = gradient * (1 - (logits / head.softcap) ** 2)
    return gradient.masked_fill((target < 0).unsqueeze(-1), 0)


def _capped(head: Head, logits: Tensor) -> Tensor:
    logits = logits * head.scale
    return logits if head.softcap is None else head.softcap * torch.tanh(logits / head.softcap)


def head_squares_one_by_one(
    given: HeadPass, parts: Sequence[HeadPart], lookups: Sequence[Lookup]
) -> Tensor:
    """Of some of the parameters in a head, and a weight's ``lookups`` beside, by their gradients.

    For heads with adapters or a bias, where a norm by columns is wanted: V x H entries at a time.
    """
    head, sequences, targets = given.head, given.sequences, given.targets()
    weight = head.weight.detach().requires_grad_()
    bias = None if head.bias is None else head.bias.detach().requires_grad_()
    leaves = [weight] if bias is None else [weight, bias]
    hidden, squares = given.hidden.detach().flatten(0, 1), []
    bounds = sequences.offsets.tolist()
    for begin, end in pairwise(bounds):
        with torch.enable_grad():
            nll = linear_nll(
                hidden[begin:end],
                weight,
                targets[begin:end],
                ignore_index=IGNORE_INDEX,
                backend=given.backend,
                **{**head.options(), "bias": bias},
            )
            d_weight, *d_bias = (_wide(g) for g in torch.autograd.grad(nll.sum(), leaves))
        total = d_weight.new_zeros(())
        for part in parts:
            if part.columns is None:
                total += d_bias[0].square().sum() * part.factor**2
                continue
            columns = d_weight[:, part.columns]
            for lookup in lookups if part is parts[0] else ():
                rows = _wide(lookup.gradient[begin:end])
                columns = columns.index_add(0, lookup.tokens[begin:end], rows)
            total += columns.square().sum()
        squares.append(total)
    return torch.stack(squares)


def _wide(values: Tensor) -> Tensor:
    return values.to(statistics_dtype(values.dtype))
