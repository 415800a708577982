"""The M-step's plan: which responses train, what each counts, and in which optimizer step."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vcore_kernels import grpo_advantages, prompt_weights
from vcore_kernels.aggregation import AGGREGATIONS
from vcore_train.gvm.config import GvmConfig
from vcore_train.gvm.sampling import EStep, Task, tally
from vcore_train.gvm.store import Rollout
from vcore_train.modeling import IGNORE_INDEX


@dataclass(frozen=True)
class TrainedRow:
    """A response with a gradient."""

    input_ids: list[int]
    labels: list[int]  # -100 on the prompt
    advantage: float  # for RAFT max(0, reward)
    weight: float  # of its prompt


@dataclass(frozen=True)
class MStep:
    """``steps``: for each optimizer step its micro-batches, each places in ``rows``.

    The loss of a step is ``steps_per_iteration`` times that of its responses, divided by
    ``num_items``: the tokens, responses or prompts of the whole iteration. So the steps of an epoch
    have the loss of all responses at once as their mean.
    """

    rows: list[TrainedRow]
    steps: list[list[list[int]]]
    num_items: int


def plan_m_step(e_step: EStep, tasks: Sequence[Task], args: GvmConfig, *, iteration: int) -> MStep:
    """Rows without a gradient (rejected in RAFT; advantage 0 in GRPO without KL) are left out; they
    count where the aggregation counts responses or tokens, unless the method leaves them out."""
    usable = [r for r in e_step.kept if r.finished or not args.mask_truncated]
    group = torch.tensor([r.prompt for r in usable], dtype=torch.int64)
    reward = torch.tensor([r.reward for r in usable], dtype=torch.float64)
    if args.objective == "grpo":
        counted = usable
        advantage = grpo_advantages(reward, group, scale=args.advantage_scale)
        weight = prompt_weights(group, args.weighting)
        trained = (advantage != 0) | (args.beta > 0)
    else:
        counted = [r for r in usable if r.accepted]
        advantage = reward.clamp(min=0)
        weight = _raft_weights(e_step, usable, group, args)
        trained = advantage > 0
    rows = [
        trained_row(tasks, usable[i], float(advantage[i]), float(weight[i]))
        for i in trained.nonzero().flatten().tolist()
    ]
    steps = [
        step
        for epoch in range(args.epochs_per_iteration)
        for step in _deal(
            [len(row.input_ids) for row in rows],
            args.steps_per_iteration,
            args.per_device_train_batch_size,
            (args.seed, iteration, epoch),
        )
    ]
    return MStep(rows, steps, _items(counted, e_step.prompts, args))


def _raft_weights(
    e_step: EStep, usable: Sequence[Rollout], group: Tensor, args: GvmConfig
) -> Tensor:
    """lemma1 takes n over what is trained on, p over every response of the iteration."""
    accepted = torch.tensor([r.accepted for r in usable], dtype=torch.bool)
    counts, _ = tally(e_step.kept, e_step.prompts)
    everything = e_step.rollouts
    sampled, _ = tally(everything, e_step.prompts)
    _, good = tally(
        [r for r in everything if r.finished or not args.mask_truncated], e_step.prompts
    )
    rate = good.to(torch.float64) / sampled.clamp(min=1)
    return prompt_weights(group, args.weighting, counts=counts, accept_rate=rate, accepted=accepted)


def _items(counted: Sequence[Rollout], prompts: int, args: GvmConfig) -> int:
    if args.weighting != "token_mean":
        return prompts
    if AGGREGATIONS[args.loss_aggregation].counts == "tokens":
        return sum(len(r.tokens) for r in counted)
    return len(counted)


def trained_row(
    tasks: Sequence[Task], rollout: Rollout, advantage: float = 1.0, weight: float = 1.0
) -> TrainedRow:
    prompt = tasks[rollout.prompt].tokens
    labels = [IGNORE_INDEX] * len(prompt) + rollout.tokens
    return TrainedRow([*prompt, *rollout.tokens], labels, advantage, weight)


def _deal(
    lengths: Sequence[int], steps: int, batch_size: int, entropy: tuple[int, ...]
) -> list[list[list[int]]]:
    """All rows in a random order, evenly into ``steps``, each into micro-batches by length."""
    order = np.random.default_rng(np.random.SeedSequence(entropy)).permutation(len(lengths))
    dealt = []
    for places in np.array_split(order, steps):
        mine = sorted(places.tolist(), key=lambda i: (lengths[i], i))
        dealt.append([mine[i : i + batch_size] for i in range(0, len(mine), batch_size)])
    return dealt
