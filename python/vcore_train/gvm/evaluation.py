"""How many of some prompts a policy solves."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from vcore_train.gvm.engines import RolloutEngine, Sampling, checked_responses
from vcore_train.gvm.sampling import Progress, Task
from vcore_train.verifiers import Verification


@dataclass(frozen=True)
class Evaluation:
    """``rewards``: of the responses to each prompt. ``truncated``, ``unverified``: of all of them
    how many were cut at the length limit, and could not be verified."""

    rewards: list[list[float]]
    truncated: int
    unverified: int

    def figures(self, prefix: str) -> dict[str, float]:
        flat = [reward for rewards in self.rewards for reward in rewards]
        count = max(len(flat), 1)
        return {
            f"{prefix}_accuracy": sum(reward > 0 for reward in flat) / count,
            f"{prefix}_reward": sum(flat) / count,
            f"{prefix}_truncated": self.truncated / count,
            f"{prefix}_unverified": float(self.unverified),
        }


def evaluate_prompts(
    engine: RolloutEngine,
    verification: Verification,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[Task],
    sampling: Sampling,
    *,
    samples: int,
    vocabulary: int,
    batch_size: int,
    seed: int,
    progress: Progress,
) -> Evaluation:
    """``samples`` responses to each prompt, at most ``batch_size`` (one prompt's at least) at once.

    The engine has the weights already.
    """
    rewards: list[list[float]] = [[] for _ in tasks]
    truncated = unverified = 0
    order = sorted(range(len(tasks)), key=lambda i: len(tasks[i].tokens))
    size = max(1, batch_size // samples)
    with progress("evaluation", len(tasks)) as advance:
        for begin in range(0, len(order), size):
            places = order[begin : begin + size]
            counts = [samples] * len(places)
            came = engine.sample(
                [tasks[i].tokens for i in places], counts, sampling, seed=seed + begin
            )
            responses = checked_responses(
                came,
                counts,
                engine=engine,
                vocabulary=vocabulary,
                max_new_tokens=sampling.max_new_tokens,
            )
            flat = [(i, r) for i, rows in zip(places, responses, strict=True) for r in rows]
            texts = tokenizer.batch_decode([r.tokens for _, r in flat], skip_special_tokens=True)
            verdicts = verification.judge(
                [(text, tasks[i].answer) for (i, _), text in zip(flat, texts, strict=True)]
            )
            for (i, response), verdict in zip(flat, verdicts, strict=True):
                rewards[i].append(verdict.reward)
                truncated += not response.finished
                unverified += verdict.problem is not None
            advance(len(places))
    return Evaluation(rewards, truncated, unverified)
