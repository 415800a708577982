"""The E-step: rounds, chunks, shortages, and what the allocation is given."""

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from rollouts import TOKENIZER, Judge, RandomEngine
from vcore_train.gvm.engines import Response, Sampling
from vcore_train.gvm.sampling import (
    Collector,
    Plan,
    Task,
    e_step,
    prompt_norms,
    prompts_of,
    split,
    tally,
)
from vcore_train.gvm.store import IterationStore, Rollout

from vcore_kernels import allocate

LENGTHS = (4, 2, 7, 3)
TASKS = [Task(i, list(range(5, 5 + n)), str(i)) for i, n in enumerate(LENGTHS)]


@contextmanager
def silent(what, total):
    yield lambda n: None


def collector(folder, engine=None, judge=None, *, batch_size=5, seed=(0, 0), tasks=TASKS):
    return Collector(
        RandomEngine() if engine is None else engine,
        Judge() if judge is None else judge,
        TOKENIZER,
        Sampling(max_new_tokens=6),
        IterationStore(folder, "policy"),
        tasks,
        vocabulary=len(TOKENIZER),
        batch_size=batch_size,
        seed=seed,
        progress=silent,
    )


def plan(rule="gvm", samples=6, stage1=3, *, reuse=False, average="mean", **options):
    return Plan(rule, options, samples, stage1, reuse, average)


def norms_of(rollouts):
    return torch.tensor([float(len(r.tokens)) for r in rollouts])


@pytest.mark.parametrize("batch_size", [1, 3, 5, 100])
def test_chunks_hold_every_response_once(batch_size):
    counts = [3, 0, 8, 2]
    chunks = split(counts, LENGTHS, batch_size)
    assert all(sum(n for _, n in chunk) <= batch_size for chunk in chunks)
    assert [sum(n for i, n in pairs(chunks) if i == p) for p in range(4)] == counts
    assert len(chunks) == math.ceil(13 / batch_size)
    order = [LENGTHS[i] for i, _ in pairs(chunks)]
    assert order == sorted(order)


def pairs(chunks):
    return [pair for chunk in chunks for pair in chunk]


def test_nothing_to_sample_is_no_chunk():
    assert split([0, 0], [1, 1], 4) == []


@pytest.mark.parametrize("reuse", [False, True])
def test_both_stages_keep_to_the_budget_and_follow_the_rule(tmp_path, reuse):
    found = e_step(collector(tmp_path), plan(reuse=reuse), norms_of)
    sampled, accepted = tally(found.first, 4)
    assert sampled.tolist() == [3, 3, 3, 3]
    assert len(found.rollouts) == 24
    assert torch.equal(found.accept_rate, accepted.double() / 3)
    second = [r for r in found.kept if r.stage == 2]
    expected = allocate(
        "gvm",
        24 if reuse else 12,
        accept_rate=accepted.double() / 3,
        grad_norm=found.grad_norm,
        **({"sampled": sampled, "accepted": accepted} if reuse else {}),
    )
    assert tally(second, 4)[0].tolist() == expected.tolist()
    assert len(found.kept) == (24 if reuse else 12)


def test_grad_norms_are_averaged_over_accepted_responses():
    rollouts = [
        Rollout(prompt, 1, [1] * length, True, "", reward, None)
        for prompt, length, reward in ((0, 1, 1.0), (0, 7, 1.0), (0, 9, 0.0), (2, 4, 0.5))
    ]
    assert prompt_norms(rollouts, 3, norms_of, "mean").tolist() == [4.0, 0.0, 4.0]
    assert prompt_norms(rollouts, 3, norms_of, "rms").tolist() == [5.0, 0.0, 4.0]


def test_rules_without_a_first_stage(tmp_path):
    found = e_step(collector(tmp_path), plan("uniform", stage1=0), norms_of)
    assert found.first == []
    assert found.accept_rate is None
    assert tally(found.kept, 4)[0].tolist() == [6, 6, 6, 6]


def test_reinforce_ada_watches_what_comes(tmp_path):
    found = e_step(
        collector(tmp_path, judge=Judge(lambda text, answer: answer == "0")),
        plan("reinforce_ada", 8, 0, round_size=2, max_samples=6),
        norms_of,
    )
    # No prompt ever has both outcomes, so each one goes on to its limit.
    assert tally(found.kept, 4)[0].tolist() == [6, 6, 6, 6]


def test_a_budget_smaller_than_the_prompts(tmp_path):
    tasks = [Task(i, [5], "1") for i in range(9)]
    found = e_step(collector(tmp_path, tasks=tasks), plan(samples=2, stage1=1), norms_of)
    assert len(found.kept) == 9
    sampled, _ = tally(found.kept, 9)
    rejected = found.accept_rate == 0
    assert rejected.any()
    assert sampled[rejected].sum() == 0


@pytest.mark.parametrize("rule", ["gvm", "neyman", "knapsack"])
@pytest.mark.parametrize("accepts", [0.0, 1.0])
def test_where_the_rule_has_no_use_for_samples_they_are_shared(tmp_path, rule, accepts):
    judge = Judge(lambda text, answer: accepts)
    found = e_step(collector(tmp_path, judge=judge), plan(rule), norms_of)
    assert (found.fell_back is not None) == (accepts == 0 or rule != "gvm")
    assert len(found.kept) == 12
    if found.fell_back is not None:
        assert "4 prompts" in found.fell_back
        assert tally(found.kept, 4)[0].tolist() == [3, 3, 3, 3]


def test_an_engine_that_returns_fewer_is_asked_again(tmp_path):
    engine = RandomEngine(short=1)
    found = e_step(collector(tmp_path, engine), plan("uniform", stage1=0), norms_of)
    # 24 in 5 chunks lose one each, the 5 lacking are one chunk that loses one; one never comes.
    assert found.missing == 1
    assert len(found.kept) == 23
    assert engine.sampled == 23


def test_short_rounds_do_not_end_a_rule_that_has_many(tmp_path):
    engine = RandomEngine(short=1)
    found = e_step(
        collector(tmp_path, engine, Judge(lambda text, answer: 0.0), batch_size=40),
        plan("reinforce_ada", 30, 0, round_size=2),
        norms_of,
    )
    assert len(found.kept) == 4 * 30 - found.missing
    assert found.missing <= 2


def test_an_engine_that_returns_nothing_is_an_error(tmp_path):
    engine = RandomEngine(short=100)
    with pytest.raises(RuntimeError, match=r"RandomEngine\.sample returned no response"):
        e_step(collector(tmp_path, engine), plan(), norms_of)
    assert engine.calls > 4  # it was asked again


@pytest.mark.parametrize(
    ("total", "taken"), [(10, 6), (10, 3), (7, 7), (11, 4), (5, 1), (9, 8), (8, 2)]
)
def test_each_prompt_comes_once_before_any_comes_again(total, taken):
    iterations = [prompts_of(k, total, taken, seed=3) for k in range(40)]
    assert all(len(set(places)) == taken for places in iterations)
    flat = [i for places in iterations for i in places]
    for begin in range(0, len(flat) - total + 1, total):
        assert sorted(flat[begin : begin + total]) == list(range(total))
    assert iterations != [prompts_of(k, total, taken, seed=4) for k in range(40)]


class Bad:
    def __init__(self, responses):
        self.responses = responses

    def sample(self, *args, **kwargs):
        return self.responses


@pytest.mark.parametrize(
    ("responses", "message"),
    [
        ([], "returned 0 for 1 prompts"),
        (None, "returned NoneType for 1 prompts"),
        ([None], "returned NoneType for prompt 0, asked for 5"),
        ([[Response([5], True)] * 9], "returned 9 for prompt 0, asked for 5"),
        ([["text"]], "returned 'text' for prompt 0, expected a pair of token ids"),
        ([[([5.5], True)]], "expected a pair of token ids"),
        ([[([5, 10**6], True)]], "token 1000000 for prompt 0 is not in the vocabulary"),
        ([[([-1], True)]], "token -1"),
        ([[([5] * 7, False)]], "7 tokens for prompt 0, max_new_tokens is 6"),
    ],
)
def test_an_engine_that_returns_something_else_is_an_error(tmp_path, responses, message):
    with pytest.raises(RuntimeError, match=message):
        collector(tmp_path, Bad(responses), tasks=TASKS[:1]).round([5], 1)


def test_numbers_of_numpy_are_kept_as_plain_ones(tmp_path):
    engine = Bad([[(np.array([5, 6]), np.bool_(True))]])
    came = collector(tmp_path, engine, tasks=TASKS[:1]).round([1], 1)
    assert came[0].tokens == [5, 6]
    assert came[0].finished is True
    assert collector(tmp_path, Bad(None), tasks=TASKS[:1]).round([1], 1) == came


def test_empty_responses_count_as_missing(tmp_path):
    engine = Bad([[Response([], False), Response([5], True)]])
    came = collector(tmp_path, engine, tasks=TASKS[:1]).round([2], 1)
    assert [r.tokens for r in came] == [[5]]


@pytest.mark.parametrize("crash_at", range(9))
def test_after_a_crash_only_what_is_missing_is_sampled(tmp_path, crash_at):
    whole_engine = RandomEngine()
    whole = e_step(collector(tmp_path / "whole", whole_engine), plan(), norms_of)

    first, second = RandomEngine(crash_at=crash_at), RandomEngine()
    if crash_at < whole_engine.calls:
        with pytest.raises(KeyboardInterrupt):
            e_step(collector(tmp_path / "parts", first), plan(), norms_of)
    parts = e_step(collector(tmp_path / "parts", second), plan(), norms_of)
    assert parts.rollouts == whole.rollouts
    assert torch.equal(parts.grad_norm, whole.grad_norm)
    assert first.sampled + second.sampled == whole_engine.sampled


def test_other_seeds_give_other_responses(tmp_path):
    runs = [
        e_step(collector(tmp_path / str(seed), seed=seed), plan("uniform", stage1=0), norms_of)
        for seed in ((0, 0), (0, 1), (1, 0))
    ]
    texts = [[r.text for r in run.kept] for run in runs]
    assert texts[0] != texts[1] != texts[2] != texts[0]
