"""Scores of one or several responses to a problem, by the verifiers that training uses.

Of k responses to a problem: ``avg@k`` is the share that is right, ``maj@k`` whether the answer
given most often is right (answers that differ in writing alone count together; of answers given
equally often, the share that is right), ``pass@k`` whether one is right. With k = 1 all three are
the accuracy, which is then called ``accuracy``.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vcore_train.answers import final_answer, normalised
from vcore_train.verifiers import Verification

VERSION = 1  # of these rules, for results.json

Judge = Callable[[Sequence[tuple[str, str]]], Sequence[float]]


def scores_of(responses: Sequence[str], rewards: Sequence[float]) -> dict[str, float]:
    """The metrics of the module's docstring; a reward above 0 is right."""
    right = [reward > 0 for reward in rewards]
    k = len(right)
    if k == 1:
        return {"accuracy": float(right[0])}
    return {
        f"avg@{k}": sum(right) / k,
        f"maj@{k}": majority(responses, right),
        f"pass@{k}": float(any(right)),
    }


def metrics_of(k: int) -> list[str]:
    return ["accuracy"] if k == 1 else [f"avg@{k}", f"maj@{k}", f"pass@{k}"]


def majority(responses: Sequence[str], right: Sequence[bool]) -> float:
    """The share of right answers among those given most often; 0 where no response has one."""
    votes: dict[str, list[bool]] = defaultdict(list)
    for response, good in zip(responses, right, strict=True):
        answer = final_answer(response)
        if answer is not None:
            votes[normalised(answer)].append(good)
    if not votes:
        return 0.0
    most = max(map(len, votes.values()))
    winners = [goods for goods in votes.values() if len(goods) == most]
    return sum(any(goods) for goods in winners) / len(winners)


def scored(
    config: Mapping[str, Any],
    judge: Judge,
    *,
    samples: int,
    temperature: float,
    top_p: float,
    max_new_tokens: int | None,
) -> dict[str, Any]:
    """A task of the harness with its prompts kept, and its scoring replaced by ours.

    ``config``: of the task, whose documents have an ``answer`` (in whatever case). ``judge``:
    rewards of pairs (response, answer).
    """

    def process_results(doc: Mapping[str, Any], results: Sequence[Any]) -> dict[str, float]:
        field = next(name for name in doc if name.lower() == "answer")
        responses = list(results[0])
        return scores_of(responses, judge([(text, str(doc[field])) for text in responses]))

    generation = dict(config.get("generation_kwargs") or {})
    if temperature > 0:
        generation |= {"do_sample": True, "temperature": temperature, "top_p": top_p}
    else:
        generation |= {"do_sample": False, "temperature": 0.0}
    if max_new_tokens is not None:
        generation["max_gen_toks"] = max_new_tokens
    metadata = dict(config.get("metadata") or {})
    metadata["version"] = f"{metadata.get('version', 0)}, vcore {VERSION}"
    return {
        **config,
        "metadata": metadata,
        "repeats": samples,
        "generation_kwargs": generation,
        "process_results": process_results,
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True}
            for name in metrics_of(samples)
        ],
        "filter_list": [
            {"name": "all", "filter": [{"function": "take_first_k", "k": samples}]},
        ],
    }


def judge_with(verification: Verification) -> Judge:
    def judge(pairs: Sequence[tuple[str, str]]) -> list[float]:
        return [verdict.reward for verdict in verification.judge(pairs)]

    return judge
