"""GVM's first stage as released, written from its description, to measure beside this library's.

One forward and one backward pass for each accepted response gives the norm of its gradient (arXiv
2505.02391, algorithm 1; the released code takes that of the input embeddings). Their mean over the
accepted responses of a prompt is G, the share of accepted ones p, and both decide how many
responses the second stage samples.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def response_loop(model: Any, inputs: Mapping[str, Tensor], *weights: Tensor) -> Tensor:
    """[B]: the norm over ``weights`` of the gradient of each response's summed log-probability.

    The logits are stored, in fp32.
    """
    norms = []
    for i in range(len(inputs["labels"])):
        one = {name: value[i : i + 1] for name, value in inputs.items()}
        labels = one.pop("labels")
        logits = model(**one, use_cache=False).logits.float()
        nll = F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
        grads = torch.autograd.grad(nll, weights)
        norms.append(torch.stack([g.float().norm() for g in grads]).norm())
    return torch.stack(norms)


def stage_one(
    model: Any,
    inputs: Mapping[str, Tensor],
    prompt: Tensor,
    reward: Tensor,
    weight: Tensor,
    *,
    budget: int,
    alpha: float = 1e-3,
    beta: float = 2.0,
) -> Tensor:
    """Samples for each prompt [P], int64, from its responses: ``prompt`` [B] their numbers,
    ``reward`` [B] 1 for an accepted one.
    """
    size: list[float] = []
    for number in range(int(prompt.max()) + 1):
        own = prompt == number
        accepted = own & (reward > 0)
        if not accepted.any():
            size.append(0.0)
            continue
        rows = {name: value[accepted] for name, value in inputs.items()}
        norm = response_loop(model, rows, weight).mean().item()
        p = (accepted.sum() / own.sum()).item()
        size.append(norm / (p + alpha / p ** (beta - 1)) ** 0.5)
    shares = [budget * a / sum(size) for a in size]
    counts = [round(share) for share in shares]
    # The sum is mended where rounding was furthest off.
    while (missing := budget - sum(counts)) != 0:
        step = 1 if missing > 0 else -1
        residual = [step * (s - c) if s > 0 else -1.0 for s, c in zip(shares, counts, strict=True)]
        counts[residual.index(max(residual))] += step
    return torch.tensor(counts, device=prompt.device)
