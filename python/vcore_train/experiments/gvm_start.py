"""Where the runs of the GVM study begin: a model that solves some prompts, and the gradients there.

The start has learned arithmetic by plain supervision, not to the end. What is measured there: the
acceptance rate of each prompt, and how much the estimate of the gradient varies for each way of
distributing a budget of samples, by the formula and by drawing samples again and again.
"""

import hashlib
import json
import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vcore_kernels import NothingToAllocateError, allocate, gvm_variance, gvm_variance_bound
from vcore_train.arithmetic import Problem, generate_problems
from vcore_train.data import Example, encode, prompt_tokens
from vcore_train.experiments.setting import (
    Row,
    Setting,
    adamw,
    batches,
    collate,
    drawn,
    endless,
    train_step,
)
from vcore_train.gradient_norms import sequence_grad_norms
from vcore_train.gvm.engines import Sampling, TransformersEngine
from vcore_train.modeling import IGNORE_INDEX, input_embeddings, token_nll
from vcore_train.models import new_model
from vcore_train.tokenizer import train_tokenizer
from vcore_train.verifiers import exact_match

CHUNK = 512  # responses sampled at once
RULES = ("uniform", "gvm", "gvm, alpha 0", "neyman", "knapsack")  # those that decide at once
BEST = "least by the formula"
POOL, STAGE1, AS_IN_A_RUN, FEW_PROMPTS = KNOWS = (
    *("pool", "stage 1", "stage 1, as in a run", "stage 1, as with few prompts"),
)
FEWER, LONGER = 4, 2  # with few prompts: times the samples of each, times its first stage
FIGURES = ("measured", "p estimated", "formula", "bound")
QUANTILES = (0.1, 0.25, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class GvmSetting(Setting):
    """The start, the runs from it, and the pools of responses that gradients are measured on.

    Problems are expressions of ``operations`` steps with numbers up to ``largest``. The start
    trains on ``rows`` of them until it solves a share ``goal`` of others at temperature 1, judged
    every ``judged_every`` steps, or for ``train_steps``; so the starts of all seeds leave the same
    room. Runs sample for ``prompts`` more problems.

    Runs: ``iterations`` of ``prompts_per_iteration`` prompts with ``samples_per_prompt``
    responses, ``stage1`` of them in the first stage where a rule has one, and ``steps`` optimizer
    steps. ``raft_lr`` and ``grpo_lr`` were chosen by the *uniform* arms alone; see ``FULL``.

    Gradients: two pools of ``pool_samples`` responses to each of ``pool_prompts`` prompts; a
    budget of ``samples_per_prompt`` for each; ``draws`` estimates for each allocation. ``rated``
    and ``rated_samples``: prompts and responses for the acceptance rates at the start.
    """

    goal: float = 0.35
    judged_every: int = 25
    operations: tuple[int, int] = (1, 4)
    largest: int = 20
    prompts: int = 1280
    max_new_tokens: int = 48
    iterations: int = 10
    prompts_per_iteration: int = 128
    samples_per_prompt: int = 8
    stage1: int = 4
    steps: int = 4
    raft_lr: float = 1e-3
    grpo_lr: float = 1e-3
    pool_prompts: int = 48
    pool_samples: int = 32
    draws: int = 400
    rated: int = 192
    rated_samples: int = 16


class Problems(NamedTuple):
    supervised: list[Problem]  # for the start
    prompts: list[Problem]  # for the runs: none of those above
    held_out: list[Problem]  # no calculation of either


@dataclass(frozen=True)
class Start:
    """A model after plain supervision, in evaluation mode."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    problems: Problems


@lru_cache(maxsize=1)
def _data(setting: GvmSetting) -> tuple[Problems, PreTrainedTokenizerBase]:
    """The same for every seed."""
    options: dict[str, Any] = {
        "steps": setting.operations,
        "largest": setting.largest,
        "stories": 0.0,
    }
    found = generate_problems(setting.rows + setting.prompts, **options)
    random.Random(0).shuffle(found)  # short problems are few, and would all come early
    held_out = generate_problems(setting.held_out, held_out=True, **options)
    problems = Problems(found[: setting.rows], found[setting.rows :], held_out)
    texts = (text for p in problems.supervised for text in (f"{p.prompt}\n", p.response))
    return problems, train_tokenizer(texts, vocab_size=setting.vocab, window=setting.length)


def load_start(setting: GvmSetting, seed: int, weights: Path | None = None) -> Start:
    """The start as it was saved in ``weights``; None: before any training."""
    problems, tokenizer = _data(setting)
    model = new_model(setting.config(), tokenizer, seed=seed)
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    return Start(model.eval(), tokenizer, problems)


def start_file(folder: Path, setting: GvmSetting, seed: int) -> Path:
    """Where a start is kept, named by all that its weights depend on."""
    names = (
        *("architecture", "layers", "hidden", "heads", "vocab", "length", "train_steps"),
        *("batch_size", "lr", "warmup", "rows", "prompts", "operations", "largest"),
        *("goal", "judged_every", "rated", "max_new_tokens"),
    )
    values = [seed, torch.__version__, *(getattr(setting, name) for name in names)]
    key = hashlib.sha256(json.dumps(values).encode()).hexdigest()[:16]
    return folder / "starts" / f"gvm-{key}.pt"


def make_start(setting: GvmSetting, seed: int, weights: Path) -> dict[str, Any]:
    """Trains the start of a seed, unless ``weights`` are there, and saves it.

    Returns what it accepts (:func:`acceptance`), and the steps that it took.
    """
    taken = train_start(setting, seed, weights)
    start = load_start(setting, seed, weights)
    judged = start.problems.prompts[-setting.rated :]
    pool = sample(start, setting, judged, setting.rated_samples, seed=1 + seed)
    return {"seed": seed, "steps": taken, **acceptance(pool.accepted)}


def train_start(setting: GvmSetting, seed: int, weights: Path) -> int:
    """Trains the start of a seed, unless ``weights`` are there; returns the steps it took."""
    steps = weights.with_suffix(".json")
    if not weights.exists():
        weights.parent.mkdir(parents=True, exist_ok=True)
        start = load_start(setting, seed)
        judged = start.problems.prompts[-setting.rated :]
        steps.write_text(json.dumps(_train(start, setting, judged, seed)), encoding="utf-8")
        save_start(start, weights)
    return json.loads(steps.read_text(encoding="utf-8"))


def save_start(start: Start, weights: Path) -> None:
    """For :func:`load_start`; the file appears whole or not at all."""
    partial = weights.with_suffix(f".{os.getpid()}.partial")
    torch.save(start.model.state_dict(), partial)
    os.replace(partial, weights)


def _train(start: Start, setting: GvmSetting, judged: Sequence[Problem], seed: int) -> int:
    """Plain supervision until the goal is reached; returns the steps it took."""
    examples = [Example(p.prompt, p.response, "generated") for p in start.problems.supervised]
    encoded = encode(examples, start.tokenizer, max_length=setting.length).rows
    rows = [{name: row[name] for name in ("input_ids", "labels")} for row in encoded]
    order = endless(drawn(rows, len(rows), seed), setting.batch_size)
    optimizer = adamw(start.model, setting.lr)
    for step in range(1, setting.train_steps + 1):
        for group in optimizer.param_groups:
            group["lr"] = setting.lr * min(1.0, step / max(setting.warmup, 1))
        train_step(start.model.train(), optimizer, next(order))
        if step % setting.judged_every == 0:
            found = sample(start, setting, judged, 2, seed=seed)
            if float(found.rate.mean()) >= setting.goal:
                break
    start.model.eval()
    return step


def acceptance(accepted: Tensor) -> dict[str, Any]:
    """Of bool [m, K]: the mean rate, and how the rates of the prompts are distributed."""
    rate = accepted.double().mean(1)
    quantiles = rate.quantile(rate.new_tensor(QUANTILES)).tolist()
    return {
        "accuracy": float(rate.mean()),
        "quantiles": dict(zip(QUANTILES, quantiles, strict=True)),
        "never": float((rate == 0).double().mean()),
        "always": float((rate == 1).double().mean()),
        "rates": rate.tolist(),
    }


# ---- pools of responses ----


@dataclass(frozen=True)
class Pool:
    """K responses to each of m prompts."""

    rows: list[list[Row]]  # [m][K]
    accepted: Tensor  # bool [m, K]

    @property
    def rate(self) -> Tensor:
        """float64 [m]."""
        return self.accepted.double().mean(1)


def sample(
    start: Start, setting: GvmSetting, problems: Sequence[Problem], count: int, *, seed: int
) -> Pool:
    """``count`` responses to each problem at temperature 1, verified as in the runs."""
    engine = TransformersEngine(start.tokenizer)
    engine.load(start.model)
    sampling = Sampling(setting.max_new_tokens)
    prompts = prompt_tokens([p.prompt for p in problems], start.tokenizer)
    rows: list[list[Row]] = []
    accepted: list[list[bool]] = []
    at_once = max(1, CHUNK // count)
    for first in range(0, len(problems), at_once):
        chunk = slice(first, first + at_once)
        asked, tokens = problems[chunk], prompts[chunk]
        found = engine.sample(tokens, [count] * len(asked), sampling, seed=seed * 1000 + first)
        for problem, prompt, responses in zip(asked, tokens, found, strict=True):
            rows.append([_row(prompt, r.tokens) for r in responses])
            texts = start.tokenizer.batch_decode(
                [r.tokens for r in responses], skip_special_tokens=True
            )
            accepted.append([exact_match(text, str(problem.answer)) > 0 for text in texts])
    return Pool(rows, torch.tensor(accepted))


def _row(prompt: list[int], response: list[int]) -> Row:
    labels = [IGNORE_INDEX] * len(prompt) + response
    return {"input_ids": [*prompt, *response], "labels": labels}


def accepted_norms(start: Start, pool: Pool) -> Tensor:
    """Gradient norm of each accepted response by the input embeddings, 0 elsewhere: [m, K]."""
    norms = torch.zeros(pool.accepted.shape, dtype=torch.float64)
    rows = list(_accepted(pool))
    norms[pool.accepted] = torch.cat(
        [sequence_grad_norms(start.model, batch).double() for batch in batches(rows, 64)]
        or [norms.new_zeros(0)]
    )
    return norms


def accepted_gradients(start: Start, pool: Pool) -> Tensor:
    """Gradient of each accepted response's log-probability: float32 [accepted, entries of W]."""
    embedding: Any = input_embeddings(start.model)
    found = []
    for row in _accepted(pool):
        logp = -token_nll(start.model, collate([row])).sum()
        found.append(torch.autograd.grad(logp, embedding)[0].flatten())
    return torch.stack(found) if found else torch.zeros(0, embedding.numel())


def _accepted(pool: Pool) -> Iterator[Row]:
    """In the order of ``pool.accepted.nonzero()``."""
    return (pool.rows[i][j] for i, j in pool.accepted.nonzero().tolist())


# ---- how much the estimate varies ----


class Known(NamedTuple):
    """What is known of m prompts, float64: p, and of the gradients of their accepted responses."""

    rate: Tensor  # [m]
    mean_norm: Tensor  # [m], mean of the norms
    rms_norm: Tensor  # [m], their root mean square
    mean: Tensor | None = None  # [m, entries of W], mu

    @classmethod
    def of(cls, accepted: Tensor, norms: Tensor, mean: Tensor | None = None) -> "Known":
        count = accepted.sum(1).clamp(min=1)
        average, square = norms.sum(1) / count, norms.square().sum(1) / count
        return cls(accepted.double().mean(1), average, square.sqrt(), mean)


def variance_record(setting: GvmSetting, seed: int, weights: Path) -> dict[str, Any]:
    """Error of the estimator for each allocation, measured and by the formula.

    Pool A decides and predicts; the estimates are drawn with replacement from pool B, whose
    acceptance rates are taken as known. Only prompts that are accepted sometimes but not always in
    A, and at least once in B, take part. Each has one sample or more, so that its estimator is
    unbiased and the error a variance. But "as in a run" a rule may leave prompts out, and the first
    stage has cost its share of the budget; so it is "as with few prompts", where each prompt has
    ``FEWER`` times the samples (uniform too, which figures are relative to).

    Returns ``prompts`` (that take part) and ``allocations``: rule, ``knows`` (one of ``KNOWS``) and
    ``FIGURES``, each relative to uniform. Where a first stage decides it is as long as that of a
    run, and figures are means over disjoint ones of pool A.
    """
    start = load_start(setting, seed, weights)
    asked = start.problems.prompts[: setting.pool_prompts]
    pools = [
        sample(start, setting, asked, setting.pool_samples, seed=100 + 2 * seed + i) for i in (0, 1)
    ]
    settled = (pools[0].rate == 0) | (pools[0].rate == 1) | (pools[1].rate == 0)
    chosen = (~settled).nonzero().flatten().tolist()
    if not chosen:
        return {"seed": seed, "prompts": 0, "allocations": []}
    a, b = (Pool([pool.rows[i] for i in chosen], pool.accepted[chosen]) for pool in pools)
    norms = accepted_norms(start, a)
    known = Known.of(a.accepted, norms, _means(accepted_gradients(start, a), a.accepted))
    gradients = accepted_gradients(start, b).double()
    estimator = Estimator(b.accepted, gradients @ gradients.T)

    def stages(width: int) -> list[Known]:
        """What disjoint first stages of pool A know."""
        return [
            Known.of(a.accepted[:, i : i + width], norms[:, i : i + width])
            for i in range(0, setting.pool_samples - width + 1, width)
        ]

    each, width = setting.samples_per_prompt, setting.stage1
    short, long = stages(width), stages(LONGER * width)
    cases: list[tuple[str, str, list[Known], int]] = [
        *((rule, POOL, [known], each) for rule in (*RULES, BEST)),
        *((rule, STAGE1, short, each) for rule in RULES[1:]),
        *((rule, AS_IN_A_RUN, short, each - width) for rule in RULES[1:]),
        ("uniform", FEW_PROMPTS, [known], FEWER * each),
        *((rule, FEW_PROMPTS, long, FEWER * each - LONGER * width) for rule in RULES[1:]),
    ]
    generator = torch.Generator().manual_seed(seed)
    bases: dict[bool, dict[str, float]] = {}
    found: list[dict[str, Any]] = []
    for rule, knows, seen, samples in cases:
        values = []
        for one in seen:
            counts = allocation(rule, one, samples, floor=knows in (POOL, STAGE1))
            errors = estimator.measured(counts, setting.draws, generator)
            values.append((*errors, formula(known, counts), bound(known, counts)))
        mean = torch.tensor(values, dtype=torch.float64).mean(0).tolist()
        figures = dict(zip(FIGURES, mean, strict=True))
        few = knows == FEW_PROMPTS
        if rule == "uniform":
            bases[few] = figures
        found.append(
            {"rule": rule, "knows": knows, **{n: figures[n] / bases[few][n] for n in FIGURES}}
        )
    return {
        "seed": seed,
        "prompts": len(chosen),
        "uniform": bases[False],
        "least_bound": gvm_variance_bound(
            known.rms_norm, known.rate, setting.samples_per_prompt * len(chosen), alpha=0.0
        )
        / bases[False]["bound"],
        "allocations": found,
    }


def allocation(rule: str, known: Known, each: int, *, floor: bool) -> Tensor:
    """``each`` samples a prompt on average, by the rule: int64 [m].

    ``floor``: one for each prompt first.
    """
    prompts = len(known.rate)
    least, budget = int(floor), (each - int(floor)) * prompts
    name, _, unregularised = rule.partition(", ")
    norm = known.mean_norm
    options: dict[str, Any] = {"alpha": 0.0} if unregularised else {}
    if rule == BEST:  # GVM's weights of this G are the square roots of the formula's terms
        name, options = "gvm", {"alpha": 0.0}
        norm = (known.rms_norm.square() - known.rate * _square_of_mean(known)).clamp(min=0).sqrt()
    try:
        counts = allocate(name, budget, accept_rate=known.rate, grad_norm=norm, **options)
    except NothingToAllocateError:  # as in a run
        counts = allocate("uniform", budget, prompts=prompts)
    return counts + least


def formula(known: Known, counts: Tensor) -> float:
    """Mean squared error of the estimate of the sum over prompts.

    Variance where there are samples; a prompt without any is missing from the sum.
    """
    assert known.mean is not None
    there = counts > 0
    norm_of_mean = _square_of_mean(known).sqrt()
    once = gvm_variance(known.rms_norm, norm_of_mean, known.rate, counts.clamp(min=1))
    return float(once[there].sum() + known.mean[~there].sum(0).square().sum())


def bound(known: Known, counts: Tensor) -> float:
    """What GVM minimises, ``sum G^2 / (p n)``; infinite where a prompt has no sample."""
    return float((known.rms_norm.square() / known.rate / counts).sum())


def _square_of_mean(known: Known) -> Tensor:
    assert known.mean is not None
    return known.mean.square().sum(1).minimum(known.rms_norm.square())


def _means(gradients: Tensor, accepted: Tensor) -> Tensor:
    """mu of each prompt from the gradients of its accepted responses: float64 [m, entries]."""
    prompt = accepted.nonzero()[:, 0]
    sums = gradients.new_zeros(len(accepted), gradients.shape[1]).index_add(0, prompt, gradients)
    return sums.double() / accepted.sum(1, keepdim=True).clamp(min=1)


@dataclass(frozen=True)
class Estimator:
    """``sum_i 1/(n_i p_i) sum_j 1[j accepted] g_j`` for samples j drawn from a pool.

    ``gram``: products of the accepted responses' gradients, all that distances need.
    """

    accepted: Tensor  # bool [m, K]
    gram: Tensor  # float64 [accepted, accepted]

    def measured(
        self, counts: Tensor, draws: int, generator: torch.Generator
    ) -> tuple[float, float]:
        """Mean squared distance from the pool's own value, over ``draws`` estimates.

        The second number is for p_i = accepted / n_i of the draw itself, which makes the estimate
        the mean over accepted responses, and 0 for a prompt without any: smaller, but biased.
        """
        often = torch.zeros(draws, *self.accepted.shape, dtype=torch.float64)  # [draws, m, K]
        even = torch.ones(draws, self.accepted.shape[1])
        for i, n in enumerate(counts.tolist()):
            if n:
                came = torch.multinomial(even, n, replacement=True, generator=generator)
                often[:, i].scatter_add_(1, came, torch.ones_like(came, dtype=torch.float64))
        rate = self.accepted.double().mean(1)
        known = often / (counts.clamp(min=1) * rate).unsqueeze(1)
        estimated = often / (often * self.accepted).sum(2, keepdim=True).clamp(min=1)
        return self._error(known), self._error(estimated)

    def _error(self, estimate: Tensor) -> float:
        """``estimate``: [draws, m, K], the weight of each response."""
        expected = 1 / self.accepted.sum(1, keepdim=True).double()
        off = (estimate - expected)[:, self.accepted]  # [draws, accepted]
        return float(((off @ self.gram) * off).sum(1).mean())
