"""Token-weighted training on ``transformers.Trainer``."""

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.profiler import record_function
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput, TrainOutput

from vcore_kernels import dft_loss, iw_sft_loss, weighted_linear_nll
from vcore_train.base_trainer import BaseTrainer
from vcore_train.checkpoint import load_state, save_state, under_prefix, with_prefix
from vcore_train.collators import PackingCollator, PaddingCollator, model_inputs
from vcore_train.config import VcoreConfig
from vcore_train.direction_schedule import DirectionSchedule
from vcore_train.directions import Direction
from vcore_train.examples import Examples, ExampleStream, numbered_examples
from vcore_train.forward_redirection import call_inside_forward
from vcore_train.metrics import Metrics
from vcore_train.modeling import (
    IGNORE_INDEX,
    causal_lm,
    head_of,
    hidden_states,
    supervised_labels,
    token_nll,
    verify_head,
)
from vcore_train.parameter_choice import chosen_parameters
from vcore_train.probe_sampler import ProbeSampler
from vcore_train.random_labels import random_labels
from vcore_train.reference_logp import ReferenceLogp
from vcore_train.reuse import ForwardWithUtilities, check_reusable, forward_with_utilities
from vcore_train.supervised import SupervisedTokens, segments
from vcore_train.utilities import (
    Method,
    NonFiniteDirectionError,
    TokenUtilities,
    token_utilities_and_nll,
)
from vcore_train.weighting import weigh

logger = logging.getLogger(__name__)
Batch = dict[str, Any]


class VcoreTrainer(BaseTrainer):
    """Fine-tunes a causal language model with a weight on every token's loss.

    The loss of a micro-batch is ``sum w_t * l_t / num_items``, with num_items the supervised tokens
    of the whole optimizer step, over all its micro-batches and processes. With ``method="vcore"``
    the first micro-batch of a step starts a probe over all of them: the descent direction g (anew
    every ``every`` steps), each token's utility <g, grad l_t>, Gibbs weights, and one scale alpha
    for the step. So gradient accumulation changes nothing but memory: 1 x 8 and 4 x 2 examples give
    the same update. Dropout is off in the probe and on in the training pass. A step with NaN or
    infinity in g or in the utilities is trained with uniform weights and counted
    (``fallback_steps``).

    Datasets hold tokenised rows: ``input_ids`` and ``labels`` (-100 for the prompt), optionally
    ``attention_mask`` and ``answer_mask`` (tokens that ``method="random"`` always keeps). Rows are
    read once at construction; those without a supervised token are left out and counted in the log.
    ``predict``, and evaluation with ``compute_metrics``, keep every row and pad where training
    packs, so that row i of the logits is example i; rows may then come without ``labels``. A PEFT
    model's trainable parameters are its adapters, and so are the probed ones.

    Logged besides transformers' own figures: ``nll`` (mean over supervised tokens, unweighted),
    ``tau``, ``kl`` (nats) and ``ess`` (means over trajectories), ``alpha``, ``utility_mean``,
    ``utility_std``, ``utility_snr`` (of the difference methods, in the first micro-batch of a step:
    :mod:`vcore_train.differences`), ``probe_time_share`` (of the time of probes and training
    passes; with ``reuse_forward`` the forward pass of the training counts as probe); and as totals
    of the run ``supervised_tokens``, ``fallback_steps``, ``saturated`` (trajectories whose KL
    budget could not be reached). ``eval_loss`` is the mean over all supervised tokens of the
    evaluation set.

    Checkpoints appear whole or not at all, and a resumed run repeats the uninterrupted one: data
    order, dropout, probe batches, averaged and kept directions.

    Args:
        model: a transformers causal LM, or a PEFT model around one.
        args: a :class:`VcoreConfig`.
        data_collator: by default :class:`PackingCollator` with ``args.packing``, otherwise
            :class:`PaddingCollator`.
        train_dataset, eval_dataset, processing_class, **kwargs: as in ``transformers.Trainer``.

    Raises:
        TypeError, ValueError: a model, dataset or combination of options that cannot be trained,
            with what would work.
    """

    args: VcoreConfig

    def __init__(
        self,
        model: nn.Module | None = None,
        args: VcoreConfig | None = None,
        data_collator: Callable | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ):
        args = VcoreConfig() if args is None else args
        if not isinstance(args, VcoreConfig):
            raise TypeError(
                f"VcoreTrainer: args must be a VcoreConfig, got {type(args).__name__}. It takes "
                "every option of TrainingArguments."
            )
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError(
                "VcoreTrainer: compute_loss_func would replace the objective. Drop it, or use "
                "transformers.Trainer."
            )
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
        self._loss_shifts_labels = True
        self._check_model()
        if self.optimizer is not None:
            self._check_optimizer(self.optimizer)

        config = causal_lm(self._unwrapped()).config.get_text_config()
        self._window = getattr(config, "max_position_embeddings", None)
        self._vocabulary = getattr(config, "vocab_size", None)
        self._padding = PaddingCollator(getattr(processing_class, "pad_token_id", None) or 0)
        if data_collator is None:
            self.data_collator = PackingCollator() if args.packing else self._padding
        if train_dataset is not None:
            self.train_dataset = self._examples(train_dataset, "training")
        if isinstance(eval_dataset, dict):
            self.eval_dataset = {
                name: self._examples(
                    dataset, f"evaluation set {name!r}", every=self._metrics_wanted
                )
                for name, dataset in eval_dataset.items()
            }
        elif eval_dataset is not None:
            self.eval_dataset = self._examples(
                eval_dataset, "evaluation", every=self._metrics_wanted
            )
        self._check_needs_index()

        self.metrics = Metrics()
        if args.method == "vcore":
            self.metrics.totals |= {"fallback_steps": 0, "saturated": 0}
        self._reference: ReferenceLogp | None = None
        self._step_batches: list[Batch] = []
        self._step_weights: list[Tensor] | None = None
        self._forwards: dict[int, ForwardWithUtilities] = {}  # by position, with reuse_forward
        self._position = 0  # of the micro-batch in its optimizer step
        self._drawn = 0  # micro-batches read for the step
        self._step_start = 0.0
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        self._schedule = DirectionSchedule(args)
        self._sampler: ProbeSampler | None = None
        if args.method == "vcore" and isinstance(self.train_dataset, Examples):
            seed = args.seed if args.data_seed is None else args.data_seed
            self._sampler = ProbeSampler(
                len(self.train_dataset),
                replacement=args.probe_replacement,
                seed=seed + args.process_index,
            )

    # ---- construction ----

    def _check_model(self) -> None:
        model, args = self._unwrapped(), self.args
        quantised = getattr(causal_lm(model), "hf_quantizer", None) is not None
        if quantised and args.method == "vcore" and args.utility_method == "jvp":
            raise ValueError(
                "VcoreTrainer: utility_method='jvp' cannot pass through the quantised layers of "
                "this model, whose kernels have no forward derivative. Use "
                "utility_method='central', which moves the adapters alone."
            )
        if args.method == "vcore" and args.reuse_forward:
            check_reusable(model)
        verify_head(model)
        if args.method == "vcore":
            chosen_parameters(model, args.direction_choice)
            if args.direction in ("momentum", "adam"):
                logger.warning(
                    "direction=%r averages the reweighted gradients that it brought about itself, "
                    "and can end worse than uniform weights. direction='ema' averages gradients of "
                    "the uniform loss; direction_precondition=True gives it Adam's metric.",
                    args.direction,
                )

    def _examples(
        self, dataset: Any, what: str, *, every: bool = False
    ) -> Examples | ExampleStream:
        examples = numbered_examples(
            dataset, self.args.max_length, self._window, self._vocabulary, every=every
        )
        if examples.skipped:
            logger.warning(
                "%d examples of the %s data have no supervised token and are left out",
                examples.skipped,
                what,
            )
        return examples

    def _check_needs_index(self) -> None:
        if not isinstance(self.train_dataset, ExampleStream):
            return
        if self.args.method == "iw_sft":
            raise ValueError(
                "VcoreTrainer: method='iw_sft' takes the reference of each example before "
                "training, and an iterable dataset has no length. Pass a map-style dataset."
            )
        if self.args.method == "vcore" and self.args.direction in ("probe", "ema"):
            raise ValueError(
                f"VcoreTrainer: direction={self.args.direction!r} draws examples by number, and an "
                "iterable dataset has none. Pass a map-style dataset, or direction='momentum' or "
                "'adam'."
            )

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
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
                f"VcoreTrainer: {what} reads the moments of the optimizer, and "
                f"{type(plain).__module__}.{type(plain).__name__} as configured has none that it "
                f"can read. Use torch.optim's {works}, or direction='probe' or 'ema', which work "
                "with any optimizer."
            )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> torch.utils.data.DataLoader:
        if eval_dataset is not None and not isinstance(eval_dataset, str):
            eval_dataset = self._examples(eval_dataset, "evaluation", every=self._metrics_wanted)
        with self._one_row_each() if self._metrics_wanted else nullcontext():
            return super().get_eval_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Any) -> torch.utils.data.DataLoader:
        with self._one_row_each():
            return super().get_test_dataloader(self._examples(test_dataset, "test", every=True))

    @property
    def _metrics_wanted(self) -> bool:
        return self.compute_metrics is not None and not self.args.prediction_loss_only

    @contextmanager
    def _one_row_each(self) -> Iterator[None]:
        """Data loaders made inside pad where they would pack: row i of the logits is example i."""
        collator = self.data_collator
        if isinstance(collator, PackingCollator):
            self.data_collator = self._padding
        try:
            yield
        finally:
            self.data_collator = collator

    # ---- training ----

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
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
            self._step_start = self._clock()
            self._begin_step(num_items_in_batch)
        with record_function("vcore::training_pass"):
            loss = super().training_step(model, inputs, num_items_in_batch)
        self._position += 1
        if self._position == len(self._step_batches):
            self._step_batches, self._step_weights = [], None
            self.metrics.add_step(self._clock() - self._step_start)
        return loss

    def _clock(self) -> float:
        """Seconds; where probes are timed, once the device has done what it was given."""
        if self.args.method == "vcore" and self.args.device.type != "cpu":
            torch.accelerator.synchronize(self.args.device)
        return time.perf_counter()

    def _begin_step(self, num_items: Tensor | int | None) -> None:
        args = self.args
        self.metrics.totals["supervised_tokens"] += int(num_items or 0)
        if args.method == "iw_sft" and self._reference is None:
            self._reference = self._take_reference()
        if args.method == "vcore" and self.state.global_step % args.anchor_steps == 0:
            self._step_weights = self._probe()
            self.metrics.add_probing(self._clock() - self._step_start)

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        if return_outputs:
            if model.training:
                raise ValueError(
                    "VcoreTrainer: compute_loss has no outputs to return in training, where no "
                    "logits are formed. Call it with return_outputs=False, or put the model into "
                    "eval mode."
                )
            return super().compute_loss(model, model_inputs(inputs), True, num_items_in_batch)
        unwrapped = self._unwrapped(model)
        labels = supervised_labels(inputs)
        mask = labels != IGNORE_INDEX
        num_items = mask.sum() if num_items_in_batch is None else num_items_in_batch
        num_items = torch.as_tensor(num_items, device=labels.device).clamp(min=1)
        loss, nll = call_inside_forward(
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
        method = self.args.method
        if method in ("dft", "iw_sft"):
            nll = token_nll(model, model_inputs(inputs))
            if method == "dft":
                return dft_loss(nll, mask=mask, num_items=num_items), nll.detach()
            return self._iw_sft_loss(nll, inputs, mask, num_items), nll.detach()
        weights = mask.float() if self._step_weights is None else self._step_weights[self._position]
        forward = self._forwards.pop(self._position, None)
        if forward is not None:
            return forward.loss(weights / num_items), forward.nll
        head = head_of(model)
        return weighted_linear_nll(
            hidden_states(model, model_inputs(inputs)),
            head.weight,
            labels,
            weights / num_items,
            shift=1,
            ignore_index=IGNORE_INDEX,
            **head.options(),
        )

    def _iw_sft_loss(self, nll: Tensor, inputs: Batch, mask: Tensor, num_items: Tensor) -> Tensor:
        if self._reference is None:
            raise ValueError(
                "VcoreTrainer: the reference of method='iw_sft' is taken when training begins; "
                "compute_loss has none before."
            )
        tokens = SupervisedTokens.of([inputs])
        return iw_sft_loss(
            tokens.packed([nll]),
            tokens.packed([self._reference.for_batch(inputs)]),
            cu_seqlens=tokens.cu_seqlens,
            level=self.args.iw_level,
            temp=self.args.iw_temp,
            clip=None
            if self.args.iw_clip is None
            else cast(tuple[float, float], tuple(self.args.iw_clip)),
            num_items=num_items,
        )

    def _take_reference(self) -> ReferenceLogp:
        if self.state.global_step > 0:
            logger.warning(
                "The checkpoint holds no reference log-probabilities; the policy at step %d "
                "serves as reference.",
                self.state.global_step,
            )
        with self.compute_loss_context_manager():
            return ReferenceLogp.of(
                self._unwrapped(),
                cast(Examples, self.train_dataset),
                self._collated,
                self.args.per_device_train_batch_size,
            )

    # ---- probing ----

    def _probe(self) -> list[Tensor] | None:
        """Weights of the step's micro-batches; None is uniform, where the probe has no answer."""
        model = self._unwrapped()
        batches = [self._prepare_inputs(batch) for batch in self._step_batches]
        tokens = SupervisedTokens.of(batches)
        assert self.optimizer is not None
        if tokens.count == 0 or (self._sampler is None and not self.optimizer.state):
            return None  # nothing to weigh, or no direction yet: a stream serves no probe batch
        try:
            with self.compute_loss_context_manager():
                with record_function("vcore::direction"):
                    direction = self._schedule.direction(
                        self.state.global_step, model, self.optimizer, self._probe_batches
                    )
                with record_function("vcore::utilities"):
                    pairs = [
                        self._utilities(model, model_inputs(batch), direction, position)
                        for position, batch in enumerate(batches)
                    ]
        except NonFiniteDirectionError as error:
            self._fall_back(str(error))
            return None
        with record_function("vcore::weights"):
            result = weigh(
                self.args, tokens, [pair.nll for pair in pairs], [pair.utility for pair in pairs]
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
        if self.args.reuse_forward:
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
        """``count`` fresh probe batches in parts of a micro-batch's size, drawn when first read."""
        args, examples = self.args, cast(Examples, self.train_dataset)
        assert self._sampler is not None
        assert args.probe_batch_size is not None
        drawn = self._sampler.draw(count * args.probe_batch_size)
        size = args.per_device_train_batch_size
        for start in range(0, len(drawn), size):
            rows = [examples[i] for i in drawn[start : start + size]]
            yield model_inputs(self._collated(rows))

    def _collated(self, rows: list[Any]) -> Batch:
        return self._prepare_inputs(self.data_collator(rows))

    # ---- evaluation ----

    def prediction_step(
        self,
        model: nn.Module,
        inputs: Any,
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Any, Any]:
        inputs = self._prepare_inputs(inputs)
        if inputs.get("labels") is None:
            return super().prediction_step(
                model, model_inputs(inputs), prediction_loss_only, ignore_keys
            )
        unwrapped = self._unwrapped(model)
        with torch.no_grad(), self.compute_loss_context_manager():
            nll = call_inside_forward(
                model, unwrapped, lambda: token_nll(unwrapped, model_inputs(inputs))
            )
        # By trajectory, so that what pads the last batch over processes is dropped again.
        mask = (supervised_labels(inputs) != IGNORE_INDEX).flatten()
        index = segments(inputs).flatten()
        sums = torch.zeros(int(index[-1]) + 1, 2, dtype=torch.float64, device=nll.device)
        sums.index_add_(0, index, torch.stack([nll.flatten().where(mask, 0), mask], -1).double())
        # Without accelerate's even_batches the last batches of processes differ in size.
        sums = self.accelerator.pad_across_processes(sums)
        self._evaluated += self.gather_function(sums).sum(0).cpu()
        if prediction_loss_only:
            return nll.sum() / mask.sum().clamp(min=1), None, None
        return super().prediction_step(model, model_inputs(inputs), False, ignore_keys)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        output = super().evaluation_loop(*args, **kwargs)
        prefix = kwargs.get("metric_key_prefix", "eval")
        if output.metrics is not None and f"{prefix}_loss" in output.metrics:
            nll, count = self._evaluated.tolist()
            output.metrics[f"{prefix}_loss"] = nll / max(count, 1)
        return output

    # ---- logs ----

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:  # a line of training, not of evaluation or of the end
            logs = {**logs, **self.metrics.drain()}
        super().log(logs, start_time)

    # ---- checkpoints ----

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        tensors, values = self._schedule.state_dict()
        if self._sampler is not None:
            tensors |= with_prefix("sampler", self._sampler.state())
        if self._reference is not None:
            tensors |= with_prefix("reference", self._reference.state())
        values["totals"] = dict(self.metrics.totals)
        save_state(Path(output_dir), self._state_suffix(), tensors, values)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        loaded = load_state(Path(checkpoint), self._state_suffix())
        if loaded is None:
            logger.warning("%s holds no state of VcoreTrainer; probing starts anew.", checkpoint)
            return
        tensors, values = loaded
        self.metrics.totals.update(values.pop("totals"))
        self._schedule.load_state_dict(tensors, values, self.args.device)
        if self._sampler is not None and (sampler := under_prefix("sampler", tensors)):
            self._sampler.load_state(sampler)
        if self.args.method == "iw_sft" and (reference := under_prefix("reference", tensors)):
            self._reference = ReferenceLogp(**reference)
            self._reference.check(cast(Examples, self.train_dataset))

    def _state_suffix(self) -> str:
        return f"_{self.args.process_index}" if self.args.world_size > 1 else ""
