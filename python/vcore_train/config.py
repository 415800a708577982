"""The options of token-weighted training: for any trainer, and those of VcoreTrainer."""

from dataclasses import dataclass, field, fields, make_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar

from transformers import TrainingArguments
from transformers.training_args import OptimizerNames

from vcore_train.config_checks import check_count, check_number, option_error

METHODS = ("sft", "random", "dft", "vcore")
DIRECTIONS = ("probe", "ema", "momentum", "adam")
UTILITY_METHODS = ("jvp", "central", "finite_difference")
VARIANCE_CONTROLS = ("utility", "trajectory", "ess", "loss", "none")
KL_SCOPES = ("trajectory", "batch")
IW_LEVELS = ("sequence", "token")
DEFAULT_KL_BUDGET = 0.02  # nats
# Optimizers of transformers that keep their moments in the parameters' own layout and precision.
ADAM_OPTIMIZERS = ("adamw_torch", "adamw_torch_fused", "adamw_torch_xla", "adamw_torch_npu_fused")
MOMENTUM_OPTIMIZERS = (*ADAM_OPTIMIZERS, "sgd")

if TYPE_CHECKING:
    _Arguments = TrainingArguments
else:
    _Arguments = object


@dataclass
class VcoreOptions(_Arguments):
    """Options of :class:`vcore_train.VcoreMixin`, to be put before a trainer's own arguments::

        @dataclass
        class Config(VcoreOptions, TrainingArguments): ...

    Every option is checked when the object is made; a bad one raises ValueError naming it, what
    came and what is allowed.

    Which objective:
        method: ``"vcore"`` (Gibbs weights over utilities, arXiv 2510.27462), ``"sft"`` (uniform),
            ``"random"`` (uniform over a random part of the response) or ``"dft"`` (each token's
            loss times its own probability).

    Which utilities (method ``"vcore"``):
        direction: where the descent direction g comes from. ``"probe"``: the gradient of the
            uniform loss on fresh examples. ``"ema"``: an exponential average of such gradients,
            less noisy and staler: where a step moves the model far, what it averages is used up.
            ``"momentum"``, ``"adam"``: the optimizer's own average, which costs nothing but is an
            average of *reweighted* gradients and so feeds on itself.
        direction_precondition: divide g by the root of Adam's second moment (``g / (sqrt(v) +
            eps)``, 0 where v is 0): utilities then say what a step of Adam does to each token.
        direction_params: which trained parameters g and the utilities are about: ``"all"``,
            ``"lm_head"``, ``"last_<k>_layers"``, a name or an fnmatch pattern of names; several in
            a list, or in one string with commas. What comes before the first of them in the model
            costs one plain forward.
        utility_method: ``"jvp"`` (forward-mode derivative), ``"central"`` or
            ``"finite_difference"``.
        epsilon: step of the two difference methods; None picks one for the precision and the size
            of g.
        every: optimizer steps that one g is kept for. Weights are computed anew at every step.
        anchor_steps: weighted steps are those whose number (from 0) is a multiple of this, all
            others are uniform and unprobed, as in the released code. 1 weights every step.
        probe_batch_size: examples in a probe batch, over all processes; None takes
            ``per_device_train_batch_size`` for each process.
        probe_replacement: draw every probe batch anew from the whole training set (True, as in the
            released code), or go through it in a random order before any example comes again
            (False).
        probe_max_norm: clip g to this norm first, as the released code does with 1.0; None does
            not.
        ema_decay: in [0, 1), weight of the past in direction ``"ema"``.
        ema_warmup: probe batches in the first update of direction ``"ema"``, which counts as so
            many of the later ones (at most as ``1 / (1 - ema_decay)``).
        reuse_forward: train by the probe's own forward pass instead of a second one. Saves a
            forward pass of each weighted step; the gradients are the same. The activations of all
            micro-batches of a step are then kept at once: accumulation saves no memory, unless
            gradient checkpointing is on. Needs ``utility_method="jvp"``, one process, and a model
            without any dropout; True raises where it cannot be. None does it where it can be and
            takes little memory: without accumulation, checkpointing and torch_compile. See
            :mod:`vcore_train.reuse`.

    Which weights (method ``"vcore"``):
        kl_budget, temperature, tau: at most one of the three. ``kl_budget`` (nats) takes the
            sharpest weights within that divergence from uniform, ``tau`` multiplies the utilities,
            ``temperature`` divides them. None of the three means ``kl_budget=0.02``, at which a
            step has most of the gain that larger budgets have. A budget is also about what
            held-out loss a run may lose: the weights tilt the data that far (docs/studies.md).
        kl_scope: the budget holds in each ``"trajectory"``, or on average over the ``"batch"``,
            which is the whole optimizer step.
        variance_control: ``"utility"``, ``"trajectory"``, ``"ess"``, ``"loss"`` or ``"none"``: how
            the scale alpha of the step is found (``vcore_kernels.variance_control``).
        variance_cap: upper bound of alpha; None for no bound.

    Other methods:
        random_keep: in (0, 1], supervised share of the response for ``"random"``.
    """

    method: str = field(default="vcore", metadata={"help": f"Objective: {', '.join(METHODS)}."})
    direction: str = field(
        default="probe", metadata={"help": f"Descent direction: {', '.join(DIRECTIONS)}."}
    )
    direction_precondition: bool = field(
        default=False, metadata={"help": "Divide the direction by the root of Adam's moment."}
    )
    direction_params: str = field(
        default="all",
        metadata={"help": "Probed parameters: all, lm_head, last_<k>_layers, names, patterns."},
    )
    utility_method: str = field(
        default="jvp", metadata={"help": f"How utilities are found: {', '.join(UTILITY_METHODS)}."}
    )
    epsilon: float | None = field(
        default=None, metadata={"help": "Step of the difference methods; by default chosen."}
    )
    tau: float | None = field(default=None, metadata={"help": "Factor on the utilities."})
    temperature: float | None = field(default=None, metadata={"help": "1 / tau."})
    kl_budget: float | None = field(
        default=None,
        metadata={"help": f"KL from uniform weights, nats (default {DEFAULT_KL_BUDGET})."},
    )
    kl_scope: str = field(
        default="trajectory", metadata={"help": f"Where kl_budget holds: {', '.join(KL_SCOPES)}."}
    )
    variance_control: str = field(
        default="utility", metadata={"help": f"Scale of a step: {', '.join(VARIANCE_CONTROLS)}."}
    )
    variance_cap: float | None = field(
        default=1.0, metadata={"help": "Upper bound of the scale of a step."}
    )
    every: int = field(default=1, metadata={"help": "Optimizer steps that a direction is kept."})
    anchor_steps: int = field(
        default=1, metadata={"help": "Weight only every k-th step, the others are uniform."}
    )
    probe_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Examples in a probe batch of all processes (default: a micro-batch each)."
        },
    )
    probe_replacement: bool = field(
        default=True, metadata={"help": "Draw probe batches with replacement."}
    )
    probe_max_norm: float | None = field(
        default=None, metadata={"help": "Clip the direction to this norm."}
    )
    ema_decay: float = field(default=0.9, metadata={"help": "Decay of the averaged direction."})
    ema_warmup: int = field(
        default=1, metadata={"help": "Probe batches in the first update of direction ema."}
    )
    reuse_forward: bool | None = field(
        default=None,
        metadata={
            "help": "Train by the probe's forward pass, not by a second one (default: where that "
            "takes little memory)."
        },
    )
    random_keep: float = field(
        default=0.2, metadata={"help": "Supervised share of a response for method random."}
    )
    _methods: ClassVar[tuple[str, ...]] = METHODS

    def __post_init__(self):
        super().__post_init__()
        self._check_options()

    def _check_options(self) -> None:
        self._check_choices()
        self._check_sharpness()
        self._check_numbers()
        self._check_combinations()
        if self.probe_batch_size is None:
            self.probe_batch_size = self.per_device_train_batch_size * self.world_size

    @property
    def sharpness(self) -> dict[str, float]:
        """The one of tau, temperature and kl_budget that is set, as keyword arguments."""
        given = {name: getattr(self, name) for name in ("tau", "temperature", "kl_budget")}
        return {name: value for name, value in given.items() if value is not None}

    @property
    def direction_choice(self) -> str | list[str]:
        """``direction_params`` as :func:`vcore_train.descent_direction` takes it."""
        params = self.direction_params
        parts = params.split(",") if isinstance(params, str) else list(params)
        return parts[0].strip() if len(parts) == 1 else [part.strip() for part in parts]

    def _check_choices(self) -> None:
        for name, allowed in (
            ("method", self._methods),
            ("direction", DIRECTIONS),
            ("utility_method", UTILITY_METHODS),
            ("variance_control", VARIANCE_CONTROLS),
            ("kl_scope", KL_SCOPES),
        ):
            if getattr(self, name) not in allowed:
                raise self._error(name, getattr(self, name), "one of " + ", ".join(allowed))
        for name in ("probe_replacement", "direction_precondition"):
            if not isinstance(getattr(self, name), bool):
                raise self._error(name, getattr(self, name), "True or False")
        if not (self.reuse_forward is None or isinstance(self.reuse_forward, bool)):
            raise self._error("reuse_forward", self.reuse_forward, "True, False or None")
        params: object = self.direction_params
        items = params.split(",") if isinstance(params, str) else params
        if (
            not isinstance(items, list | tuple)
            or not items
            or not all(isinstance(item, str) and item.strip() for item in items)
        ):
            raise self._error(
                "direction_params",
                params,
                "'all', 'lm_head', 'last_<k>_layers', a name or a pattern, or several of them",
            )

    def _check_sharpness(self) -> None:
        given = self.sharpness
        if len(given) > 1:
            came = ", ".join(f"{name}={value}" for name, value in given.items())
            raise ValueError(
                f"{self._owner}: pass at most one of tau, temperature and kl_budget, got {came}."
            )
        for name, value in given.items():
            positive = name == "temperature"
            self._check_number(name, value, low=0, low_open=positive)
        if not given:
            self.kl_budget = DEFAULT_KL_BUDGET

    def _check_numbers(self) -> None:
        for name in ("epsilon", "variance_cap", "probe_max_norm"):
            if getattr(self, name) is not None:
                self._check_number(name, getattr(self, name), low=0, low_open=True)
        self._check_number("ema_decay", self.ema_decay, low=0, high=1, high_open=True)
        self._check_number("random_keep", self.random_keep, low=0, low_open=True, high=1)
        for name, low in (
            ("every", 1),
            ("anchor_steps", 1),
            ("ema_warmup", 1),
            ("probe_batch_size", 1),
        ):
            value = getattr(self, name)
            if value is None and name == "probe_batch_size":
                continue
            check_count(self._owner, name, value, low)

    def _check_combinations(self) -> None:
        if self.label_smoothing_factor != 0:
            raise self._error(
                "label_smoothing_factor",
                self.label_smoothing_factor,
                "0: the objectives here are likelihoods of the given tokens",
            )
        if self.epsilon is not None and self.utility_method == "jvp":
            raise ValueError(
                f"{self._owner}: epsilon={self.epsilon} has no meaning for utility_method='jvp'. "
                "Drop it, or pass utility_method='central' or 'finite_difference'."
            )
        if self.torch_compile:
            raise self._error(
                "torch_compile", True, "False: losses are computed beside the compiled forward"
            )
        if self.method != "vcore":
            return
        self._check_reuse()
        if (
            self.variance_control == "trajectory"
            and self.per_device_train_batch_size * self.gradient_accumulation_steps == 1
            and self.world_size == 1
        ):
            raise ValueError(
                f"{self._owner}: variance_control='trajectory' needs at least 2 trajectories in an "
                "optimizer step, and per_device_train_batch_size * gradient_accumulation_steps is "
                "1. Use 'utility'."
            )
        if self.fp16:
            raise ValueError(
                f"{self._owner}: fp16=True does not work with method='vcore': the gradient of a "
                "probe batch has no loss scaling and underflows. Use bf16=True, or float32."
            )
        optim = OptimizerNames(self.optim).value
        if self.direction_precondition and self.direction == "adam":
            raise ValueError(
                f"{self._owner}: direction='adam' is preconditioned already. Drop "
                "direction_precondition, or use direction='momentum' with it, which is the same."
            )
        if self.direction_precondition and optim not in ADAM_OPTIMIZERS:
            raise ValueError(
                f"{self._owner}: direction_precondition=True reads Adam's second moment, and "
                f"optim={optim!r} has none that it can read. Use optim="
                f"{' or '.join(ADAM_OPTIMIZERS)}, or drop it."
            )
        served = {"adam": ADAM_OPTIMIZERS, "momentum": MOMENTUM_OPTIMIZERS}.get(self.direction)
        if served is not None and optim not in served:
            raise ValueError(
                f"{self._owner}: direction={self.direction!r} reads the moments of the optimizer, "
                f"and optim={optim!r} has none that it can read. Use optim={' or '.join(served)}, "
                "or direction='probe' or 'ema', which work with any optimizer."
            )

    def _check_reuse(self) -> None:
        if not self.reuse_forward:
            return
        if self.utility_method != "jvp":
            raise ValueError(
                f"{self._owner}: reuse_forward=True has no pass to reuse with utility_method="
                f"{self.utility_method!r}, whose passes are at other parameters. Use "
                "utility_method='jvp', or leave reuse_forward off."
            )
        if self.world_size > 1:
            raise ValueError(
                f"{self._owner}: reuse_forward=True works in one process, and there are "
                f"{self.world_size}: gradients are synchronised around the forward pass of the "
                "training step, which it leaves out. Leave reuse_forward off."
            )

    @property
    def _owner(self) -> str:
        return type(self).__name__

    def _error(self, name: str, value: object, allowed: str) -> ValueError:
        return option_error(self._owner, name, value, allowed)

    def _check_number(self, name: str, value: object, **bounds: Any) -> None:
        check_number(self._owner, name, value, **bounds)


def with_vcore_options(args: TrainingArguments, **options: Any) -> Any:
    """A copy of a trainer's ``args`` with :class:`VcoreOptions` beside its own; for trainers whose
    arguments are made elsewhere.

    Raises TypeError for an option that there is not, ValueError for a bad one.
    """
    known = {f.name: f.default for f in fields(VcoreOptions)}
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(f"with_vcore_options: unknown option {unknown[0]!r}.")
    copy = _with_options(type(args), known | vars(args) | options)
    copy._check_options()
    return copy


def _with_options(kind: Any, values: dict[str, Any]) -> Any:
    """Arguments of ``kind`` and :class:`VcoreOptions` that hold ``values``."""
    arguments: Any = object.__new__(_kind_with_options(kind))
    vars(arguments).update(values)
    return arguments


@cache
def _kind_with_options(kind: Any) -> type:
    def reduce(self: Any) -> tuple:  # a class made here is found by no name: checkpoints keep args
        return _with_options, (kind, dict(vars(self)))

    if issubclass(kind, VcoreOptions):
        return kind
    name, bases = f"Vcore{kind.__name__}", (VcoreOptions, kind)
    return make_dataclass(name, [], bases=bases, namespace={"__reduce__": reduce})


@dataclass
class VcoreConfig(VcoreOptions, TrainingArguments):
    """Options of :class:`vcore_train.VcoreTrainer`: those of ``transformers.TrainingArguments``,
    of :class:`VcoreOptions`, and these.

    One more objective: ``method="iw_sft"``, weights relative to the policy at the start of
    training. It costs one forward pass over the training set before the first step, and 4 bytes of
    host memory and checkpoint for each supervised token.

        iw_level: ``"sequence"`` or ``"token"`` weights for ``"iw_sft"``.
        iw_temp: factor on the log-ratio before the exponential of a sequence weight.
        iw_clip: lower and upper bound of a weight; None takes (0, 16) for sequences, (0.2, 1.8) for
            tokens.

    Data:
        max_length: longer examples are cut to this many tokens; None cuts nothing, and an example
            longer than the model's window is an error.
        packing: concatenate the examples of a micro-batch into one row without padding. They do not
            see each other; each stays a trajectory of its own.
    """

    # Rows may carry columns that the collator reads and the model does not.
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Drop dataset columns that the model does not take."}
    )
    logging_steps: float = field(
        default=10, metadata={"help": "Log every this many optimizer steps."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Leave NaN and infinity out of the logged loss."}
    )

    iw_level: str = field(
        default="sequence", metadata={"help": f"Importance weights: {', '.join(IW_LEVELS)}."}
    )
    iw_temp: float = field(default=1.0, metadata={"help": "Factor on the log importance ratio."})
    iw_clip: list[float] | None = field(
        default=None, metadata={"help": "Lower and upper bound of an importance weight."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Cut examples to this many tokens."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Concatenate examples instead of padding them."}
    )

    _methods: ClassVar[tuple[str, ...]] = (*METHODS, "iw_sft")

    def __post_init__(self):
        super().__post_init__()
        if self.iw_level not in IW_LEVELS:
            raise self._error("iw_level", self.iw_level, "one of " + ", ".join(IW_LEVELS))
        if not isinstance(self.packing, bool):
            raise self._error("packing", self.packing, "True or False")
        self._check_number("iw_temp", self.iw_temp, low=0)
        if self.max_length is not None:
            check_count(self._owner, "max_length", self.max_length, 2)
        if self.iw_clip is not None:
            bounds = self.iw_clip
            if not isinstance(bounds, list | tuple) or len(bounds) != 2:
                raise self._error("iw_clip", bounds, "a lower and an upper bound")
            for bound in bounds:
                self._check_number("iw_clip", bound, low=0)
            if bounds[0] > bounds[1]:
                raise self._error("iw_clip", bounds, "a lower bound that is not above the upper")
