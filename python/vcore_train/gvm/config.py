"""The options of :class:`vcore_train.GvmTrainer`."""

from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from transformers import TrainingArguments

from vcore_kernels import ALLOCATION_RULES, NothingToAllocateError, allocate
from vcore_kernels.aggregation import AGGREGATIONS
from vcore_kernels.allocation import RULES_BY_RATE
from vcore_kernels.grpo_advantages import SCALES
from vcore_kernels.prompt_weights import PROMPT_WEIGHTINGS
from vcore_train.config_checks import check_count, check_number, option_error
from vcore_train.gvm.engines import Sampling

OBJECTIVES = ("raft", "raft++", "grpo")
NORMS = ("mean", "rms")
FORMATS = ("jsonl", "parquet")
DEFAULT_STAGE1 = 4
# What the responses on disk, and the iteration that an optimizer step is in, depend on.
RUN_OPTIONS = (
    *("seed", "prompts_per_iteration", "samples_per_prompt", "stage1_samples", "reuse_stage1"),
    *("allocation", "allocation_options", "max_new_tokens", "temperature", "top_p", "top_k"),
    *("generation_batch_size", "grad_norm_params", "grad_norm_average"),
    *("steps_per_iteration", "epochs_per_iteration"),
)
_OPTIONAL = ("prompts_per_iteration", "stage1_samples", "verifier_workers")
_error = partial(option_error, "GvmConfig")
_check_number = partial(check_number, "GvmConfig")


@dataclass
class GvmConfig(TrainingArguments):
    """Options of training on sampled responses, on top of ``transformers.TrainingArguments``.

    An iteration samples, verifies and allocates with fixed weights (E-step), then takes
    ``epochs_per_iteration * steps_per_iteration`` optimizer steps on the responses (M-step). So the
    steps of a run are ``iterations`` times that, whatever the allocation: ``max_steps`` and
    ``num_train_epochs`` follow and must not be given. Options are checked when the object is made;
    a bad one raises ValueError naming it, what came and what is allowed.

    Sampling:
        iterations: E- and M-steps.
        prompts_per_iteration: prompts of an iteration, from one random order of all after the
            other, so that each comes once before any comes again; None takes all each time.
        samples_per_prompt: responses sampled in an iteration divided by its prompts, *the first
            stage included*. Runs that agree in this have the same cost, whatever the rule.
        allocation: how they are distributed: ``"gvm"``, ``"uniform"``, ``"neyman"``,
            ``"knapsack"``, ``"reinforce_ada"`` (``vcore_kernels.allocate``).
        allocation_options: of the rule, such as ``{"max_accept_rate": 0.9}``.
        stage1_samples: responses of each prompt that its acceptance rate p (and for ``"gvm"`` G) is
            measured on. None: 4 for rules that need p, 0 for the others.
        reuse_stage1: train on the responses of the first stage too, and let the rule distribute
            all samples, not only those of the second. Saves their cost. The number of a prompt's
            responses then depends on responses that are trained on, so that no weighting is
            unbiased any more: a prompt that was lucky in the first stage gets fewer further samples
            and keeps its lucky ones. False, as in the paper: they only measure, which can cost more
            than the rule gains (docs/studies.md).
        grad_norm_params, grad_norm_average: W of G: ``"embeddings"``, ``"lm_head"``,
            ``"all-linear"``, or names of parameters with commas (``sequence_grad_norms``); and
            whether G is the ``"mean"`` over accepted responses or their ``"rms"``, which the bound
            asks for.
        max_new_tokens, temperature, top_p, top_k: of a response. The log-probabilities that are
            trained on have the same temperature; with top_p or top_k they are those of the whole
            vocabulary.
        generation_batch_size: responses sampled at once, and so what a kill can lose.
        eval_samples: responses of each evaluation prompt; 1 is greedy, more are sampled.

    Verification:
        verifier_seconds, verifier_workers: time limit of one answer, past which it scores 0, and
            processes that check answers (None: up to 4).

    Training:
        objective: ``"raft++"``, ``"raft"`` (no ratio, no clip) or ``"grpo"``.
        steps_per_iteration: optimizer steps in which an M-step goes through the responses once.
            Each has the same number of them, give or take one, as micro-batches of
            ``per_device_train_batch_size``.
        epochs_per_iteration: how often it goes through them.
        prompt_weighting: ``"lemma1"``, ``"algorithm1"`` or ``"token_mean"``
            (``vcore_kernels.prompt_weights``). None: lemma1 for RAFT, algorithm1 for GRPO: each
            prompt counts the same, however many samples it got. lemma1 takes p over all samples of
            the iteration, and is unbiased as far as that is the true rate and the number of samples
            does not depend on them: not with ``"reinforce_ada"``, nor with reuse_stage1.
        aggregation: from tokens to a loss (``vcore_kernels.raft_loss``), over prompts. None:
            ``"token-mean"`` for token_mean, otherwise ``"dr-grpo"``: the sum over tokens, divided
            by the prompts and by ``max_new_tokens``. ``"seq-mean-token-sum-norm"`` divides by
            ``max_new_tokens`` alone.
        clip_low, clip_high, dual_clip: of the ratio.
        advantage_scale: ``"group"``, ``"batch"`` or ``"none"``, for GRPO.
        beta: weight of the KL from the reference model, for GRPO.
        mask_truncated: leave responses that were cut at the length limit out of the loss.

    Records:
        rollout_format: ``"jsonl"``, or ``"parquet"`` once an iteration is sampled.

    ``save_steps``, ``eval_steps`` of 0 (default) mean once an iteration. Micro-batches follow from
    the number of responses, so ``gradient_accumulation_steps`` must stay 1.
    """

    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop dataset columns that the model does not take."}
    )
    logging_steps: float = field(default=1, metadata={"help": "Log every this many steps."})
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinity out of the logged loss."}
    )
    save_steps: float = field(default=0, metadata={"help": "0: once an iteration."})
    eval_steps: float | None = field(default=0, metadata={"help": "0: once an iteration."})

    iterations: int = field(default=10, metadata={"help": "E- and M-steps."})
    prompts_per_iteration: int | None = field(
        default=None, metadata={"help": "Prompts of an iteration."}
    )
    samples_per_prompt: int = field(
        default=8, metadata={"help": "Responses a prompt on average, the first stage included."}
    )
    allocation: str = field(
        default="gvm", metadata={"help": f"Rule: {', '.join(ALLOCATION_RULES)}."}
    )
    allocation_options: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Options of the rule, as JSON."}
    )
    stage1_samples: int | None = field(
        default=None, metadata={"help": "Responses a prompt that measure its acceptance rate."}
    )
    reuse_stage1: bool = field(
        default=False, metadata={"help": "Train on the first stage's responses too."}
    )
    grad_norm_params: str = field(
        default="embeddings", metadata={"help": "Parameters of G: embeddings, lm_head, all-linear."}
    )
    grad_norm_average: str = field(default="mean", metadata={"help": "mean or rms over accepted."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length limit of a response."})
    temperature: float = field(default=1.0, metadata={"help": "Of sampling."})
    top_p: float = field(default=1.0, metadata={"help": "Of sampling; 1 for all tokens."})
    top_k: int = field(default=0, metadata={"help": "Of sampling; 0 for all tokens."})
    generation_batch_size: int = field(default=64, metadata={"help": "Responses sampled at once."})
    eval_samples: int = field(
        default=1, metadata={"help": "Responses of an evaluation prompt; 1 is greedy."}
    )
    verifier_seconds: float = field(default=5.0, metadata={"help": "Time limit of one answer."})
    verifier_workers: int | None = field(
        default=None, metadata={"help": "Processes that check answers."}
    )
    objective: str = field(default="raft++", metadata={"help": f"One of {', '.join(OBJECTIVES)}."})
    steps_per_iteration: int = field(
        default=4, metadata={"help": "Optimizer steps that go through the responses once."}
    )
    epochs_per_iteration: int = field(
        default=1, metadata={"help": "How often an M-step goes through the responses."}
    )
    prompt_weighting: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(PROMPT_WEIGHTINGS)}."}
    )
    aggregation: str | None = field(
        default=None, metadata={"help": f"One of {', '.join(AGGREGATIONS)}."}
    )
    clip_low: float = field(default=0.2, metadata={"help": "Lower clip of the ratio."})
    clip_high: float = field(default=0.2, metadata={"help": "Upper clip of the ratio."})
    dual_clip: float | None = field(default=None, metadata={"help": "Bound of the loss, A < 0."})
    advantage_scale: str = field(
        default="group", metadata={"help": f"Standard deviation: {', '.join(SCALES)}."}
    )
    beta: float = field(default=0.0, metadata={"help": "Weight of the KL from the reference."})
    mask_truncated: bool = field(
        default=False, metadata={"help": "Leave responses cut at the limit out of the loss."}
    )
    rollout_format: str = field(default="jsonl", metadata={"help": "jsonl or parquet."})

    _VALID_DICT_FIELDS = [  # noqa: RUF012 (as in the base class)
        *TrainingArguments._VALID_DICT_FIELDS,
        "allocation_options",
    ]

    def __post_init__(self):
        self._check_numbers()
        if self.max_steps not in (-1, self.total_steps):
            raise _error(
                "max_steps",
                self.max_steps,
                "left out: the steps are iterations * epochs_per_iteration * steps_per_iteration",
            )
        self.max_steps = self.total_steps
        self.save_steps = self.save_steps or self.steps_of_iteration
        self.eval_steps = self.eval_steps or self.steps_of_iteration
        super().__post_init__()
        if self.allocation_options is None:
            self.allocation_options = {}
        self._check_choices()
        self._check_combinations()

    # ---- what follows from the options ----

    @property
    def steps_of_iteration(self) -> int:
        """Optimizer steps of one M-step."""
        return self.epochs_per_iteration * self.steps_per_iteration

    @property
    def total_steps(self) -> int:
        return self.iterations * self.steps_of_iteration

    @property
    def stage1(self) -> int:
        """Responses a prompt in the first stage."""
        if self.stage1_samples is not None:
            return self.stage1_samples
        return DEFAULT_STAGE1 if self.allocation in RULES_BY_RATE else 0

    @property
    def norm_params(self) -> str | list[str]:
        """``grad_norm_params`` as :func:`vcore_train.sequence_grad_norms` takes it."""
        names = [name.strip() for name in self.grad_norm_params.split(",")]
        return names[0] if names[0] in ("embeddings", "lm_head", "all-linear") else names

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.max_new_tokens, self.temperature, self.top_p, self.top_k)

    @property
    def weighting(self) -> str:
        """``prompt_weighting``, or what None of it means."""
        by_objective = "algorithm1" if self.objective == "grpo" else "lemma1"
        return self.prompt_weighting or by_objective

    @property
    def loss_aggregation(self) -> str:
        """``aggregation``, or what None of it means."""
        return self.aggregation or ("token-mean" if self.weighting == "token_mean" else "dr-grpo")

    # ---- checks ----

    def _check_choices(self) -> None:
        choices: tuple[tuple[str, Any], ...] = (
            ("objective", OBJECTIVES),
            ("allocation", tuple(ALLOCATION_RULES)),
            ("prompt_weighting", (None, *PROMPT_WEIGHTINGS)),
            ("aggregation", (None, *AGGREGATIONS)),
            ("advantage_scale", SCALES),
            ("grad_norm_average", NORMS),
            ("rollout_format", FORMATS),
        )
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                listed = ", ".join(str(value) for value in allowed if value is not None)
                raise _error(name, getattr(self, name), f"one of {listed}")
        if not isinstance(self.allocation_options, dict):
            raise _error("allocation_options", self.allocation_options, "a dictionary of options")
        for name in ("reuse_stage1", "mask_truncated"):
            if not isinstance(getattr(self, name), bool):
                raise _error(name, getattr(self, name), "True or False")

    def _check_numbers(self) -> None:
        for name, least in (
            *(("iterations", 1), ("prompts_per_iteration", 1), ("samples_per_prompt", 1)),
            *(("stage1_samples", 0), ("max_new_tokens", 1), ("top_k", 0), ("eval_samples", 1)),
            *(("generation_batch_size", 1), ("verifier_workers", 1)),
            *(("steps_per_iteration", 1), ("epochs_per_iteration", 1)),
        ):
            value = getattr(self, name)
            if value is not None or name not in _OPTIONAL:
                check_count("GvmConfig", name, value, least)
        for name in ("temperature", "verifier_seconds"):
            _check_number(name, getattr(self, name), low=0, low_open=True)
        _check_number("top_p", self.top_p, low=0, low_open=True, high=1)
        for name in ("clip_low", "clip_high", "beta"):
            _check_number(name, getattr(self, name), low=0)
        if self.dual_clip is not None:
            _check_number("dual_clip", self.dual_clip, low=1, low_open=True)

    def _check_combinations(self) -> None:
        if self.gradient_accumulation_steps != 1:
            raise _error(
                "gradient_accumulation_steps",
                self.gradient_accumulation_steps,
                "1: an optimizer step has as many micro-batches of per_device_train_batch_size as "
                "its responses fill",
            )
        for name in ("save_strategy", "eval_strategy", "logging_strategy"):
            if getattr(self, name) == "epoch":
                raise _error(
                    name, "epoch", "'steps' or 'no': a run has no epochs, 0 steps mean an iteration"
                )
        if self.fp16:
            raise ValueError(
                "GvmConfig: fp16=True needs a gradient in every step, and a step without an "
                "accepted response has none. Use bf16=True, or float32."
            )
        for name, usual in (
            ("num_train_epochs", 3.0),
            ("label_smoothing_factor", 0.0),
            ("neftune_noise_alpha", None),
            ("auto_find_batch_size", False),
        ):
            if getattr(self, name) != usual:
                raise _error(name, getattr(self, name), f"{usual}: it has no meaning here")
        if self.torch_compile:
            raise _error(
                "torch_compile", True, "False: losses are computed beside the compiled forward"
            )
        if self.allocation in RULES_BY_RATE and self.stage1 < 1:
            raise ValueError(
                f"GvmConfig: allocation={self.allocation!r} decides by an acceptance rate, and "
                "stage1_samples=0 measures none. Pass 1 or more, or allocation='uniform'."
            )
        self._check_rule()
        if self.stage1 > self.samples_per_prompt or (
            self.stage1 == self.samples_per_prompt and not self.reuse_stage1
        ):
            raise ValueError(
                f"GvmConfig: the first stage takes {self.stage1} of samples_per_prompt="
                f"{self.samples_per_prompt} and leaves none to train on. Raise samples_per_prompt, "
                "lower stage1_samples, or pass reuse_stage1=True."
            )
        over_sequences = AGGREGATIONS[self.loss_aggregation].counts != "tokens"
        if self.weighting != "token_mean" and not over_sequences:
            raise ValueError(
                f"GvmConfig: prompt_weighting={self.weighting!r} is a mean over prompts, and "
                f"aggregation={self.loss_aggregation!r} divides by tokens. Pass "
                "prompt_weighting='token_mean', or another aggregation."
            )
        if self.weighting == "lemma1" and self.objective == "grpo":
            raise ValueError(
                "GvmConfig: prompt_weighting='lemma1' divides by accepted responses, and GRPO "
                "learns from rejected ones too. Pass 'algorithm1' or 'token_mean'."
            )
        if self.objective != "grpo":
            for name, default in (("beta", 0.0), ("dual_clip", None), ("advantage_scale", "group")):
                if getattr(self, name) != default:
                    raise ValueError(
                        f"GvmConfig: {name} belongs to GRPO, and objective is {self.objective!r}."
                    )

    def _check_rule(self) -> None:
        """Its options, by a prompt of which every rule could say something."""
        half, one = torch.full((1,), 0.5), torch.ones(1)
        options: Any = self.allocation_options
        with suppress(NothingToAllocateError):
            try:
                allocate(self.allocation, 1, accept_rate=half, grad_norm=one, **options)
            except TypeError as error:
                raise ValueError(f"GvmConfig: allocation_options {options}: {error}") from error
