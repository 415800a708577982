"""Token weights for any ``transformers.Trainer``: what :class:`VcoreTrainer` and others share."""

import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from vcore_kernels import dft_loss, weighted_linear_nll
from vcore_kernels.spans import span
from vcore_train.base_trainer import OwnLosses
from vcore_train.checkpoint import load_state, save_state, under_prefix, with_prefix
from vcore_train.collators import model_inputs
from vcore_train.config import VcoreOptions
from vcore_train.direction_schedule import DirectionSchedule
from vcore_train.directions import Direction
from vcore_train.head_check import verify_head
from vcore_train.metrics import Metrics
from vcore_train.modeling import (
    IGNORE_INDEX,
    causal_lm,
    head_of,
    hidden_states,
    label_shift,
    supervised_labels,
    token_nll,
)
from vcore_train.parameter_choice import chosen_parameters
from vcore_train.probe_sampler import ProbeSampler
from vcore_train.processes import Processes
from vcore_train.random_labels import random_labels
from vcore_train.reuse import (
    ForwardWithUtilities,
    check_reusable,
    checkpointed_layers,
    forward_with_utilities,
)
from vcore_train.sharding import is_sharded, within_forward
from vcore_train.supervised import SupervisedTokens
from vcore_train.utilities import (
    Method,
    NonFiniteDirectionError,
    TokenUtilities,
    token_utilities_and_nll,
)
from vcore_train.weighting import weigh

logger = logging.getLogger("vcore_train")
Batch = dict[str, Any]


class VcoreMixin(OwnLosses):
    """Makes a trainer weigh tokens; to be put before a subclass of ``transformers.Trainer``::

        class MyVcoreTrainer(VcoreMixin, MyTrainer): ...

        trainer = MyVcoreTrainer(model, args=with_vcore_options(args, kl_budget=0.02), ...)

    It replaces the loss of training by ``sum w_t * l_t / num_items``, with num_items the supervised
    tokens of the whole optimizer step, over all its micro-batches and processes. Data, collators,
    evaluation, generation and callbacks stay the trainer's own. Batches need ``labels`` (-100 where
    not supervised) and what the model takes: padded, or packed with ``position_ids`` or
    ``cu_seq_lens_q``.

    With ``method="vcore"`` the first micro-batch of a step starts a probe over all of them: the
    descent direction g (anew every ``every`` steps), each token's utility <g, grad l_t>, Gibbs
    weights, and one scale alpha for the step. So neither gradient accumulation nor the number of
    processes changes anything but memory: 1 x 8 and 4 x 2 examples give the same update. Dropout is
    off in the probe and on in the training pass. A step with NaN or infinity in g or in the
    utilities is trained with uniform weights and counted (``fallback_steps``).

    Several processes (DDP, FSDP2) have one direction, one alpha, and trajectories' weights as one
    process would: probe batches are split over them, and each gathers the losses and utilities of
    all, 8 bytes a supervised token and step. Under FSDP2 the direction is sharded as the parameters
    are.

    Logged besides the trainer's own figures: ``nll`` (mean over supervised tokens, unweighted),
    ``tau``, ``kl`` (nats) and ``ess`` (means over trajectories), ``alpha``, ``utility_mean``,
    ``utility_std``, ``utility_snr`` (of the difference methods, in the first micro-batch of a step:
    :mod:`vcore_train.differences`), ``probe_time_share`` (of the time of probes and training
    passes; where the probe's forward pass is reused, it counts as probe); and as totals
    of the run ``supervised_tokens``, ``fallback_steps``, ``saturated`` (trajectories whose KL
    budget could not be reached).

    Raises:
        TypeError, ValueError: a model, dataset or combination of options that cannot be trained,
            with what would work.
    """

    args: VcoreOptions

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        if callable(getattr(self, "compute_loss_func", None)):
            raise ValueError(
                f"{type(self).__name__}: compute_loss_func would replace the objective. Drop it, "
                "or use transformers.Trainer."
            )
        if not isinstance(self.args, VcoreOptions):
            raise TypeError(
                f"{type(self).__name__}: args must have VcoreOptions, got "
                f"{type(self.args).__name__}. Make them with vcore_train.with_vcore_options."
            )
        self._loss_shifts_labels = True
        self._processes = Processes.all()
        self._check_model()
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)

        self.metrics = Metrics()
        if self.args.method == "vcore":
            self.metrics.totals |= {"fallback_steps": 0, "saturated": 0}
        self._step_batches: list[Batch] = []
        self._step_weights: list[Tensor] | None = None
        self._reuses_forward: bool | None = None  # decided when the model is as it will be trained
        self._forwards: dict[int, ForwardWithUtilities] = {}  # by position, where it is reused
        self._position = 0  # of the micro-batch in its optimizer step
        self._drawn = 0  # micro-batches read for the step
        self._step_start = 0.0
        self._schedule = DirectionSchedule(self.args, self._processes)
        self._sampler: ProbeSampler | None = None
        if self.args.method == "vcore" and self.train_dataset is not None:
            self._sampler = self._probe_sampler()

    # ---- construction ----

    def _check_model(self) -> None:
        model, args, owner = self._unwrapped(), self.args, type(self).__name__
        quantised = getattr(causal_lm(model), "hf_quantizer", None) is not None
        if quantised and args.method == "vcore" and args.utility_method == "jvp":
            raise ValueError(
                f"{owner}: utility_method='jvp' cannot pass through the quantised layers of this "
                "model, whose kernels have no forward derivative. Use utility_method='central', "
                "which moves the adapters alone."
            )
        if self._processes.count > 1 and not args.average_tokens_across_devices:
            raise ValueError(
                f"{owner}: average_tokens_across_devices=False gives each process's tokens another "
                "weight. Leave it on: one process and several then train the same."
            )
        if getattr(self, "is_deepspeed_enabled", False):
            raise ValueError(
                f"{owner}: DeepSpeed gathers parameters in a way that no pass beside the model's "
                "own forward can use. Shard with FSDP2 (accelerate, fsdp_version: 2)."
            )
        if getattr(self, "is_fsdp_enabled", False):
            if self.accelerator.state.fsdp_plugin.fsdp_version != 2:
                raise ValueError(
                    f"{owner}: FSDP version 1 flattens parameters, so that they have no direction "
                    "of their own. Use fsdp_version: 2 (fsdp_config={'fsdp_version': 2})."
                )
            # Other processes than the first may have no weights yet; what the first probe needs
            # is checked then.
        else:
            verify_head(model)
        if args.method != "vcore":
            return
        if args.reuse_forward:
            check_reusable(model)
        chosen_parameters(model, args.direction_choice)
        if args.direction in ("momentum", "adam"):
            logger.warning(
                "direction=%r averages the reweighted gradients that it brought about itself, "
                "and can end worse than uniform weights. Use direction='probe', or 'ema' with "
                "ema_decay=0.5; direction_precondition=True gives either Adam's metric.",
                args.direction,
            )

    def _reuse(self) -> bool:
        """Whether the forward pass of the probe is that of the training, too."""
        args, model = self.args, self._unwrapped()
        if args.method != "vcore" or args.reuse_forward is not None:
            return bool(args.reuse_forward)
        if (
            args.utility_method != "jvp"
            or self._processes.count > 1
            or args.gradient_accumulation_steps > 1
            or args.gradient_checkpointing
            or checkpointed_layers(model)
            or args.torch_compile
        ):
            return False
        try:
            check_reusable(model)
        except ValueError as reason:
            logger.info("Weighted steps run the model forward twice. %s", reason)
            return False
        return True

    def _probe_sampler(self) -> ProbeSampler | None:
        """None where the direction needs no probe batch but in the beginning."""
        args, dataset = self.args, cast(Any, self.train_dataset)
        if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
            if args.direction in ("probe", "ema"):
                raise ValueError(
                    f"{type(self).__name__}: direction={args.direction!r} draws examples by "
                    "number, and an iterable dataset has none. Pass a map-style dataset, or "
                    "direction='momentum' or 'adam'."
                )
            return None
        seed = args.seed if args.data_seed is None else args.data_seed
        # The same numbers on all processes, each of which takes a part of them.
        return ProbeSampler(len(dataset), replacement=args.probe_replacement, seed=seed)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(*(() if model is None else (model,)))
        self._check_optimizer(optimizer)
        return optimizer

    def _check_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        """Raises unless the moments that the direction needs will be there and readable."""
        kind, precondition = self.args.direction, self.args.direction_precondition
        reads = precondition or kind in ("momentum", "adam")
        if self.args.method != "vcore" or not reads:
            return
        plain = getattr(optimizer, "optimizer", optimizer)  # out of Accelerate's wrapper
        adam = "betas" in plain.defaults and "bit" not in type(plain).__name__.lower()
        low_precision = type(plain).__module__.split(".")[0] in ("bitsandbytes", "torchao")
        sgd = kind == "momentum" and not precondition
        momentum = sgd and plain.defaults.get("momentum", 0) > 0
        if low_precision or not (adam or momentum):
            works = "Adam or AdamW" + (" or SGD with momentum" if sgd else "")
            what = "direction_precondition=True" if precondition else f"direction={kind!r}"
            raise ValueError(
                f"{type(self).__name__}: {what} reads the moments of the optimizer, and "
                f"{type(plain).__module__}.{type(plain).__name__} as configured has none that it "
                f"can read. Use torch.optim's {works}, or direction='probe' or 'ema', which work "
                "with any optimizer."
            )

    # ---- training ----

    def train(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().train(*args, **kwargs)
        finally:
            self._forwards = {}  # after an interruption they would keep their graphs

    # ---- one optimizer step ----

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, Tensor | int | None]:
        """The micro-batches of the next optimizer step, and how many tokens they supervise."""
        self._drawn = 0
        batches, num_items = super().get_batch_samples(
            map(self._with_supervised_labels, epoch_iterator), num_batches, device
        )
        self._step_batches, self._step_weights, self._position = batches, None, 0
        self._forwards = {}
        return batches, num_items

    def _with_supervised_labels(self, batch: Batch) -> Batch:
        """The batch with labels where the loss has a term, so that counting them is right."""
        if not label_shift(batch):
            raise ValueError(
                f"{type(self).__name__}: the batch has shift_labels and no labels. Sequences that "
                "are split over processes are for loops of your own (docs/scale.md); pass labels."
            )
        batch = {**batch, "labels": supervised_labels(batch)}
        if self.args.method == "random":
            self._drawn += 1
            entropy = (self.args.seed, self.state.global_step, self._drawn, self.args.process_index)
            batch["labels"] = random_labels(batch, self.args.random_keep, entropy)
        return batch

    def training_step(
        self, model: nn.Module, inputs: Any, num_items_in_batch: Tensor | int | None = None
    ) -> Tensor:
        if self._position == 0:
            self._check_wrapped(model)
            self._step_start = self._clock()
            self._begin_step(num_items_in_batch)
        with span("training_pass"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._position += 1
        if self._position == len(self._step_batches):
            self._step_batches, self._step_weights = [], None
            self.metrics.add_step(self._clock() - self._step_start)
        return loss

    def _check_wrapped(self, model: nn.Module) -> None:
        """Raises where an earlier evaluation has kept transformers from wrapping it in DDP."""
        unwrapped = self._unwrapped(model)
        if self._processes.count > 1 and model is unwrapped and not is_sharded(unwrapped):
            raise ValueError(
                f"{type(self).__name__}: the model was not wrapped for {self._processes.count} "
                "processes, whose gradients would drift apart: evaluate() or predict() came before "
                "train(). Use eval_on_start=True, or evaluate with a trainer of its own."
            )

    def _clock(self) -> float:
        """Seconds; where probes are timed, once the device has done what it was given."""
        if self.args.method == "vcore" and self.args.device.type != "cpu":
            torch.accelerator.synchronize(self.args.device)
        return time.perf_counter()

    def _begin_step(self, num_items: Tensor | int | None) -> None:
        self.metrics.totals["supervised_tokens"] += int(num_items or 0)
        if self.args.method == "vcore" and self.state.global_step % self.args.anchor_steps == 0:
            self._step_weights = self._probe()
            self.metrics.add_probing(self._clock() - self._step_start)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        if not model.training:  # evaluation is the trainer's own
            return super().compute_loss(
                model, model_inputs(inputs), return_outputs, num_items_in_batch, **kwargs
            )
        if return_outputs:
            raise ValueError(
                f"{type(self).__name__}: compute_loss has no outputs to return in training, where "
                "no logits are formed. Call it with return_outputs=False, or put the model into "
                "eval mode."
            )
        unwrapped = self._unwrapped(model)
        labels = supervised_labels(inputs)
        mask = labels != IGNORE_INDEX
        num_items = mask.sum() if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(num_items, device=labels.device).clamp(min=1)
        loss, nll = within_forward(
            model, unwrapped, lambda: self._objective(unwrapped, inputs, labels, mask, num_items)
        )
        self.metrics.add_to_ratio("nll", nll.where(mask, 0).sum(), mask.sum())
        if self.args.average_tokens_across_devices and num_items_in_batch is not None:
            # The gradients will be averaged over processes, and num_items counts the tokens of all.
            loss = loss * (self.accelerator.num_processes // self.get_tp_size())
        return loss

    def _objective(
        self, model: nn.Module, inputs: Batch, labels: Tensor, mask: Tensor, num_items: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The loss of a micro-batch, and the nll of each of its labels without a graph."""
        if self.args.method == "dft":
            nll = token_nll(model, model_inputs(inputs))
            return dft_loss(nll, mask=mask, num_items=num_items), nll.detach()
        weights = mask.float() if self._step_weights is None else self._step_weights[self._position]
        forward = self._forwards.pop(self._position, None)
        if forward is not None:
            return forward.loss(weights / num_items), forward.nll
        hidden = hidden_states(model, model_inputs(inputs))
        head = head_of(model)  # after the decoder, by which time a sharded head is gathered
        return weighted_linear_nll(
            hidden,
            head.weight,
            labels,
            weights / num_items,
            shift=1,
            ignore_index=IGNORE_INDEX,
            **head.options(),
        )

    # ---- probing ----

    def _probe(self) -> list[Tensor] | None:
        """Weights of the step's micro-batches; None is uniform, where the probe has no answer.

        Every decision is that of all processes.
        """
        model = self._unwrapped()
        batches = [self._prepare_inputs(batch) for batch in self._step_batches]
        tokens = SupervisedTokens.of(batches)
        assert self.optimizer is not None
        supervised = self._processes.sum(torch.tensor(tokens.count, device=self.args.device))
        if not supervised or (self._sampler is None and not self.optimizer.state):
            return None  # nothing to weigh, or no direction yet: a stream serves no probe batch
        try:
            with self.compute_loss_context_manager():
                with span("direction"):
                    direction = self._schedule.direction(
                        self.state.global_step, model, self.optimizer, self._probe_batches
                    )
                with span("utilities"):
                    pairs = [
                        self._utilities(model, model_inputs(batch), direction, position)
                        for position, batch in enumerate(batches)
                    ]
        except NonFiniteDirectionError as error:
            self._fall_back(str(error))
            return None
        with span("weights"):
            result = weigh(
                self.args,
                tokens,
                [pair.nll for pair in pairs],
                [pair.utility for pair in pairs],
                self._processes,
            )
        if not result.finite:
            self._fall_back("a utility is NaN or infinite")
            return None
        for name, value in result.means.items():
            self.metrics.add_mean(name, value)
        self.metrics.totals["saturated"] += int(result.saturated)
        snr = pairs[0].snr
        if snr is not None and math.isfinite(snr):
            self.metrics.add_mean("utility_snr", torch.tensor(snr))
        return result.weights

    def _utilities(
        self, model: nn.Module, inputs: Batch, direction: Direction, position: int
    ) -> TokenUtilities:
        if self._reuses_forward is None:
            self._reuses_forward = self._reuse()
        if self._reuses_forward:
            forward = forward_with_utilities(model, inputs, direction)
            self._forwards[position] = forward
            return TokenUtilities(forward.utility, forward.nll)
        return token_utilities_and_nll(
            model,
            inputs,
            direction,
            method=cast(Method, self.args.utility_method),
            epsilon=self.args.epsilon,
            snr=position == 0,  # of a difference, at the price of a forward pass
        )

    def _fall_back(self, reason: str) -> None:
        self._schedule.forget()
        self.metrics.totals["fallback_steps"] += 1
        logger.warning("Step %d has uniform weights: %s", self.state.global_step, reason)

    def _probe_batches(self, count: int = 1) -> Iterator[Batch]:
        """This process's part of ``count`` fresh probe batches, in parts of a micro-batch's size.

        Drawn when first read. Every process yields as many parts: one that has nothing left yields
        an example of which nothing is supervised.
        """
        assert self._sampler is not None
        assert self.args.probe_batch_size is not None
        drawn = self._sampler.draw(count * self.args.probe_batch_size)
        processes, size = self._processes, self.args.per_device_train_batch_size
        share = -(-len(drawn) // processes.count)
        own = drawn[processes.rank * share : (processes.rank + 1) * share]
        for start in range(0, share, size):
            part = own[start : start + size]
            batch = self._collated_examples(part or drawn[:1])
            if not part:
                batch["labels"] = torch.full_like(batch["labels"], IGNORE_INDEX)
            yield model_inputs(batch)

    def _collated_examples(self, numbers: list[int]) -> Batch:
        """A batch of training examples, as the training's own data loader makes them."""
        dataset, collator = self.train_dataset, self.data_collator
        if type(dataset).__module__.startswith("datasets."):
            dataset = self._remove_unused_columns(dataset, description="training")
        else:
            collator = self._get_collator_with_removed_columns(collator, description="training")
        rows = [cast(Any, dataset)[number] for number in numbers]
        return self._prepare_inputs(collator(rows))

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a line of training, not of evaluation or of the end
            logs = {**logs, **self.metrics.drain(self._processes, self.args.device)}
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        tensors, values = self._state()
        save_state(Path(output_dir), tensors, values, main_process=self.args.should_save)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        like = dict(self._unwrapped().named_parameters(remove_duplicate=False))
        loaded = load_state(Path(checkpoint), like)
        if loaded is None:
            logger.warning(
                "%s holds no state of %s; probing starts anew.", checkpoint, type(self).__name__
            )
            return
        self._load_state(*loaded)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and values that a checkpoint keeps, the same on every process."""
        tensors, values = self._schedule.state_dict()
        if self._sampler is not None:
            tensors |= with_prefix("sampler", self._sampler.state())
        values["totals"] = dict(self.metrics.totals)
        return tensors, values

    def _load_state(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        self.metrics.totals.update(values.pop("totals"))
        self._schedule.load_state_dict(dict(tensors), values, self.args.device)
        if self._sampler is not None and (sampler := under_prefix("sampler", dict(tensors))):
            self._sampler.load_state(sampler)
