"""The E-step: sample, verify, measure, allocate, sample again, with fixed weights."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vcore_kernels import NothingToAllocateError, allocate
from vcore_kernels.spans import span
from vcore_train.gvm.engines import RolloutEngine, Sampling, checked_responses
from vcore_train.gvm.store import IterationStore, Rollout
from vcore_train.verifiers import Verification

EMPTY_ROUNDS = 3  # how often in succession an engine may return nothing before it is given up
# (description, steps) -> a context whose value is called after each step
Progress = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


@dataclass(frozen=True)
class Task:
    """A prompt of the iteration: its tokens, and what the verifier compares with."""

    number: int  # in the training set
    tokens: list[int]
    answer: str


@dataclass(frozen=True)
class Plan:
    """What an E-step is to do: the options of :class:`GvmConfig` that it reads."""

    rule: str
    options: dict[str, Any]
    samples_per_prompt: int
    stage1: int
    reuse_stage1: bool
    norm_average: str


@dataclass(frozen=True)
class EStep:
    """What an E-step brought, for m prompts."""

    first: list[Rollout]  # of stage 1
    kept: list[Rollout]  # to train on: of stage 2, and of stage 1 where it is reused
    accept_rate: Tensor | None  # float64 [m], in stage 1; None without one
    grad_norm: Tensor | None  # float64 [m]; None where the rule does not ask for it
    missing: int  # responses that the engine did not return though asked again
    fell_back: str | None  # why the rule had no use for any sample: they were shared evenly
    prompts: int  # m

    @property
    def rollouts(self) -> list[Rollout]:
        """All, each once."""
        return [*self.first, *(r for r in self.kept if r.stage == 2)]


class Collector:
    """Samples rounds of responses in chunks, verifies them, and keeps each chunk on disk.

    A chunk's seed follows from the run's seed, the iteration, the round and the chunk, and the
    chunks of a round from its counts, so that a run that was killed repeats what it had not kept
    and nothing else.
    """

    def __init__(
        self,
        engine: RolloutEngine,
        verification: Verification,
        tokenizer: PreTrainedTokenizerBase,
        sampling: Sampling,
        store: IterationStore,
        tasks: Sequence[Task],
        *,
        vocabulary: int,
        batch_size: int,
        seed: tuple[int, ...],
        progress: Progress,
    ):
        self.engine, self.verification, self.tokenizer = engine, verification, tokenizer
        self.sampling, self.store, self.tasks = sampling, store, tasks
        self.vocabulary = vocabulary
        self.batch_size, self.seed, self.progress = batch_size, seed, progress
        self.rounds = 0
        self.missing = 0

    def round(self, counts: Sequence[int], stage: int) -> list[Rollout]:
        """Up to ``counts`` responses of each prompt: those on disk, and what has to be sampled."""
        number, self.rounds = self.rounds, self.rounds + 1
        lengths = [len(task.tokens) for task in self.tasks]
        chunks = split(counts, lengths, self.batch_size)
        rollouts: list[Rollout] = []
        with self.progress(f"stage {stage}", sum(counts)) as advance:
            for place, chunk in enumerate(chunks):
                found = self.store.chunk(number, place)
                if found is None:
                    found = self._sample(chunk, stage, (*self.seed, number, place))
                    self.store.append(number, place, found)
                rollouts += found
                advance(sum(n for _, n in chunk))
        return rollouts

    def _sample(
        self, chunk: list[tuple[int, int]], stage: int, entropy: tuple[int, ...]
    ) -> list[Rollout]:
        tasks, counts = [self.tasks[i] for i, _ in chunk], [n for _, n in chunk]
        with span("sampling"):
            responses = self.engine.sample(
                [task.tokens for task in tasks],
                counts,
                self.sampling,
                seed=int(np.random.SeedSequence(entropy).generate_state(1)[0]),
            )
        checked = checked_responses(
            responses,
            counts,
            engine=self.engine,
            vocabulary=self.vocabulary,
            max_new_tokens=self.sampling.max_new_tokens,
        )
        flat = [(i, r) for (i, _), rs in zip(chunk, checked, strict=True) for r in rs]
        texts = self.tokenizer.batch_decode([r.tokens for _, r in flat], skip_special_tokens=True)
        pairs = [(text, self.tasks[i].answer) for (i, _), text in zip(flat, texts, strict=True)]
        with span("verification"):
            verdicts = self.verification.judge(pairs)
        return [
            Rollout(i, stage, r.tokens, r.finished, text, verdict.reward, verdict.problem)
            for (i, r), text, verdict in zip(flat, texts, verdicts, strict=True)
        ]


def split(
    counts: Sequence[int], lengths: Sequence[int], batch_size: int
) -> list[list[tuple[int, int]]]:
    """Chunks of at most ``batch_size`` responses, each pairs of (prompt, how many).

    Short prompts come first, so that a chunk needs little padding.
    """
    chunks: list[list[tuple[int, int]]] = []
    room = 0
    for i in sorted(range(len(counts)), key=lambda i: lengths[i]):
        left = counts[i]
        while left:
            if not room:
                chunks.append([])
                room = batch_size
            now = min(left, room)
            chunks[-1].append((i, now))
            left, room = left - now, room - now
    return chunks


def prompts_of(iteration: int, total: int, taken: int, seed: int) -> list[int]:
    """The prompts of an iteration: ``taken`` of ``total``, none twice.

    From a random order of all prompts, then another one, and so on. Where an iteration takes the
    last of one order and the first of the next, that one's prompts which it has already come later.
    """
    place, end = iteration * taken, (iteration + 1) * taken
    found: list[int] = []
    head: set[int] = set()  # of the order before: what the iteration that reaches on has of it
    for number in range(-(-end // total)):
        entropy = np.random.SeedSequence((seed, number))
        drawn = np.random.default_rng(entropy).permutation(total).tolist()
        order = [i for i in drawn if i not in head] + [i for i in drawn if i in head]
        begin = number * total
        found += order[max(place - begin, 0) : max(end - begin, 0)]
        head = set(order[total - (begin + total) % taken :]) if (begin + total) % taken else set()
    return found


def tally(rollouts: Sequence[Rollout], prompts: int) -> tuple[Tensor, Tensor]:
    """How many responses of each prompt there are, and how many of them accepted: int64 [m]."""
    index = torch.tensor([r.prompt for r in rollouts], dtype=torch.int64)
    good = torch.tensor([r.accepted for r in rollouts], dtype=torch.int64)
    zeros = torch.zeros(prompts, dtype=torch.int64)
    return zeros.index_add(0, index, torch.ones_like(index)), zeros.index_add(0, index, good)


def e_step(
    collector: Collector,
    plan: Plan,
    norms_of: Callable[[Sequence[Rollout]], Tensor],
) -> EStep:
    """Runs both stages.

    Args:
        collector: samples, or reads what was sampled before.
        plan: how many and by which rule.
        norms_of: the gradient norm of each of some responses; called on the accepted responses of
            the first stage where the rule is ``"gvm"``.

    Raises:
        RuntimeError: the engine returned no response at all, or one that does not fit.
    """
    store, prompts = collector.store, len(collector.tasks)
    first: list[Rollout] = []
    if plan.stage1:
        wanted = torch.full((prompts,), plan.stage1)
        first = _until(collector, 1, [], lambda kept: wanted - tally(kept, prompts)[0])
    sampled, accepted = tally(first, prompts)
    rate = accepted.to(torch.float64) / sampled.clamp(min=1) if plan.stage1 else None
    norm = None
    if plan.rule == "gvm":
        norm = store.grad_norms()
        if norm is None:
            with span("gradient_norms"):
                norm = prompt_norms(first, prompts, norms_of, plan.norm_average)
            store.save_grad_norms(norm)

    budget = plan.samples_per_prompt * prompts
    if not plan.reuse_stage1:
        budget -= len(first)
    known: dict[str, Any] = {"accept_rate": rate, "grad_norm": norm}
    rule, options, fell_back = plan.rule, plan.options, None
    try:
        with span("allocation"):
            allocate(rule, budget, prompts=prompts, **known, **options)
    except NothingToAllocateError as error:
        rule, options, fell_back = "uniform", {}, str(error)

    def more(kept: Sequence[Rollout]) -> Tensor:
        sampled, accepted = tally(kept, prompts)
        with span("allocation"):
            return allocate(rule, budget, sampled=sampled, accepted=accepted, **known, **options)

    kept = _until(collector, 2, first if plan.reuse_stage1 else [], more)
    if not first and not kept:
        raise RuntimeError(
            f"{type(collector.engine).__name__}.sample returned no response for any of {prompts} "
            "prompts."
        )
    return EStep(first, kept, rate, norm, collector.missing, fell_back, prompts)


def _until(
    collector: Collector,
    stage: int,
    kept: list[Rollout],
    more: Callable[[Sequence[Rollout]], Tensor],
) -> list[Rollout]:
    """Rounds of what ``more`` asks for, given what has come, until it asks for nothing."""
    kept, empty = list(kept), 0
    while (counts := more(kept)).any():
        came = collector.round(counts.tolist(), stage)
        kept += came
        empty = 0 if came else empty + 1
        if empty == EMPTY_ROUNDS:
            collector.missing += int(counts.sum())
            break
    return kept


def prompt_norms(
    rollouts: Sequence[Rollout],
    prompts: int,
    norms_of: Callable[[Sequence[Rollout]], Tensor],
    average: str,
) -> Tensor:
    """G of each prompt over its accepted responses, their mean or root mean square: float64 [m]."""
    accepted = [r for r in rollouts if r.accepted]
    norms = norms_of(accepted).to(device="cpu", dtype=torch.float64)
    index = torch.tensor([r.prompt for r in accepted], dtype=torch.int64)
    number = tally(rollouts, prompts)[1].clamp(min=1)
    sums = torch.zeros(prompts, dtype=torch.float64)
    if average == "rms":
        return (sums.index_add(0, index, norms.square()) / number).sqrt()
    return sums.index_add(0, index, norms) / number
