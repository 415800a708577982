"""What is told of an iteration: figures for the log, rows for the disk, and warnings."""

import logging
from collections.abc import Sequence
from typing import Any

from vcore_train.gvm.sampling import EStep, Task, tally

logger = logging.getLogger(__name__)


def e_step_figures(found: EStep) -> dict[str, float]:
    """As :class:`vcore_train.GvmTrainer` names them."""
    rollouts = found.rollouts
    sampled, accepted = tally(rollouts, found.prompts)
    second, _ = tally([r for r in rollouts if r.stage == 2], found.prompts)
    count = max(len(rollouts), 1)
    truncated = [r for r in rollouts if not r.finished]
    figures: dict[str, float] = {
        "accept_rate": int(accepted.sum()) / count,
        "reward": sum(r.reward for r in rollouts) / count,
        "prompts_accepted": int(((accepted > 0) & (accepted < sampled)).sum()),
        "prompts_rejected": int(((accepted == 0) & (sampled > 0)).sum()),
        "prompts_solved": int(((accepted == sampled) & (sampled > 0)).sum()),
        "truncated": len(truncated),
        "truncated_accepted": sum(r.accepted for r in truncated),
        "unverified": sum(r.problem is not None for r in rollouts),
        "missing": found.missing,
        "fell_back": int(found.fell_back is not None),
        "response_tokens": sum(len(r.tokens) for r in rollouts) / count,
        "samples_min": int(second.min()),
        "samples_max": int(second.max()),
        "prompts_unsampled": int((second == 0).sum()),
    }
    if found.grad_norm is not None and found.grad_norm.any():
        figures["grad_norm_mean"] = float(found.grad_norm[found.grad_norm > 0].mean())
    return figures


def prompt_rows(tasks: Sequence[Task], found: EStep) -> list[dict[str, Any]]:
    """p, G and the samples of each prompt."""
    counts = [
        tally([r for r in found.rollouts if r.stage == stage], found.prompts) for stage in (1, 2)
    ]
    return [
        {
            "prompt": task.number,
            "accept_rate": None if found.accept_rate is None else float(found.accept_rate[i]),
            "grad_norm": None if found.grad_norm is None else float(found.grad_norm[i]),
            **{
                f"{name}_{stage}": int(values[i])
                for stage, pair in zip((1, 2), counts, strict=True)
                for name, values in zip(("sampled", "accepted"), pair, strict=True)
            },
        }
        for i, task in enumerate(tasks)
    ]


def warn(number: int, found: EStep, *, trained: int) -> None:
    """Warnings of iteration ``number``, of whose responses ``trained`` have a gradient."""
    rollouts = found.rollouts
    if found.fell_back is not None:
        logger.warning("Iteration %d: the samples are shared evenly. %s", number, found.fell_back)
    if not any(r.accepted for r in rollouts):
        logger.warning(
            "Iteration %d: no prompt was accepted: none of %d responses to %d prompts has a "
            "positive reward. Start from a model that solves some of them, or take easier prompts.",
            number,
            len(rollouts),
            found.prompts,
        )
    if not trained:
        logger.warning(
            "Iteration %d: no response is left to learn from; the weights stay as they are.", number
        )
    if found.missing:
        logger.warning(
            "Iteration %d: the engine did not return %d of the responses asked for.",
            number,
            found.missing,
        )
    problems = [r.problem for r in rollouts if r.problem is not None]
    if problems:
        logger.warning(
            "Iteration %d: %d responses could not be verified and score 0, the first: %s",
            number,
            len(problems),
            problems[0],
        )
