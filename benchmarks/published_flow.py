"""The published VCORE step as its description has it, to measure beside this library's.

Its flow (arXiv 2510.27462 and the repository that goes with it): the gradient of a fresh probe
batch, clipped to norm 1; a copy of the trained weights on the host; the weights moved by
``-epsilon * g``; the losses there, from stored fp32 logits; the weights restored; the losses of the
main pass, from stored fp32 logits again; utilities ``(l - l') / (epsilon * T)``, their softmax
over each trajectory, the loss rescaled to that of uniform weights.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON, TEMPERATURE = 1e-4, 5e3


def published_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, Tensor],
    probe_batch: dict[str, Tensor],
    *,
    max_norm: float = 1.0,
) -> Tensor:
    """One optimizer step; returns the weights [B, T], which sum to 1 over each trajectory."""
    trained = [p for p in model.parameters() if p.requires_grad]
    perturbed = _perturbed_nll(model, batch, probe_batch)
    optimizer.zero_grad()
    nll, mask = _nll(model, batch), _mask(batch)
    with torch.no_grad():
        utility = (nll - perturbed) / (EPSILON * TEMPERATURE)
        weights = torch.softmax(utility.masked_fill(~mask, -torch.inf), dim=-1)
        weights = weights.nan_to_num(0.0)  # a row without a supervised token
    lengths = mask.sum(-1, keepdim=True)
    weighted = (weights * lengths * nll).sum() / mask.sum()
    uniform = nll.sum() / mask.sum()
    (weighted * (uniform / weighted).detach().clamp(max=1.0)).backward()
    torch.nn.utils.clip_grad_norm_(trained, max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return weights


def published_utility(
    model: nn.Module, batch: dict[str, Tensor], probe_batch: dict[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """The utilities [B, T] of :func:`published_step`, and the direction by parameter's name."""
    model.zero_grad()
    perturbed = _perturbed_nll(model, batch, probe_batch)
    direction = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    with torch.no_grad():
        return (_nll(model, batch) - perturbed) / EPSILON, direction


def _perturbed_nll(
    model: nn.Module, batch: dict[str, Tensor], probe_batch: dict[str, Tensor]
) -> Tensor:
    """Losses at ``theta - epsilon * g``; g stays in ``.grad``, the weights are as before."""
    trained = [p for p in model.parameters() if p.requires_grad]
    _nll(model, probe_batch).sum().div(_mask(probe_batch).sum()).backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    saved = [p.detach().to("cpu", copy=True) for p in trained]
    with torch.no_grad():
        for p in trained:
            if p.grad is not None:
                p.sub_(p.grad, alpha=EPSILON)
        perturbed = _nll(model, batch)
        for p, value in zip(trained, saved, strict=True):
            p.copy_(value)
    return perturbed


def _nll(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[B, T] from the model's logits in fp32; that of label t stands at t."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs, use_cache=False).logits.float()
    nll = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten(), reduction="none"
    )
    return F.pad(nll.view(logits.shape[0], -1), (1, 0))


def _mask(batch: dict[str, Tensor]) -> Tensor:
    mask = batch["labels"] != -100
    mask[:, 0] = False
    return mask
