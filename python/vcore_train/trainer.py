"""Token-weighted training on ``transformers.Trainer``."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer_utils import EvalLoopOutput

from vcore_kernels import iw_sft_loss
from vcore_train.base_trainer import BaseTrainer
from vcore_train.checkpoint import under_prefix, with_prefix
from vcore_train.collators import PackingCollator, PaddingCollator, model_inputs
from vcore_train.config import VcoreConfig
from vcore_train.examples import Examples, ExampleStream, numbered_examples
from vcore_train.mixin import Batch, VcoreMixin
from vcore_train.modeling import IGNORE_INDEX, causal_lm, supervised_labels, token_nll
from vcore_train.reference_logp import ReferenceLogp
from vcore_train.sharding import within_forward
from vcore_train.supervised import SupervisedTokens, segments

logger = logging.getLogger(__name__)


class VcoreTrainer(VcoreMixin, BaseTrainer):
    """Fine-tunes a causal language model with a weight on every token's loss.

    How a step goes, what is logged and how several processes share it: :class:`VcoreMixin`. Of its
    own this trainer has the objective ``iw_sft``, packing, an ``eval_loss`` that is the mean over
    all supervised tokens of the evaluation set, and checkpoints that appear whole or not at all and
    from which a resumed run repeats the uninterrupted one: data order, dropout, probe batches,
    averaged and kept directions.

    Datasets hold tokenised rows: ``input_ids`` and ``labels`` (-100 for the prompt), optionally
    ``attention_mask`` and ``answer_mask`` (tokens that ``method="random"`` always keeps). Rows are
    read once at construction; those without a supervised token are left out and counted in the log.
    ``predict``, and evaluation with ``compute_metrics``, keep every row and pad where training
    packs, so that row i of the logits is example i; rows may then come without ``labels``. A PEFT
    model's trainable parameters are its adapters, and so are the probed ones.

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
        super().__init__(
            model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **kwargs,
        )
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
        self._reference: ReferenceLogp | None = None
        self._evaluated = torch.zeros(2, dtype=torch.float64)
        if isinstance(self.train_dataset, ExampleStream) and args.method == "iw_sft":
            raise ValueError(
                "VcoreTrainer: method='iw_sft' takes the reference of each example before "
                "training, and an iterable dataset has no length. Pass a map-style dataset."
            )
        if args.method == "vcore" and train_dataset is not None:
            self._sampler = self._probe_sampler()  # of the examples that are left

    # ---- construction ----

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

    # ---- objectives ----

    def _begin_step(self, num_items: Tensor | int | None) -> None:
        if self.args.method == "iw_sft" and self._reference is None:
            self._reference = self._take_reference()
        super()._begin_step(num_items)

    def _objective(
        self, model: nn.Module, inputs: Batch, labels: Tensor, mask: Tensor, num_items: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.args.method != "iw_sft":
            return super()._objective(model, inputs, labels, mask, num_items)
        nll = token_nll(model, model_inputs(inputs))
        return self._iw_sft_loss(nll, inputs, mask, num_items), nll.detach()

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
                lambda rows: self._prepare_inputs(self.data_collator(rows)),
                self.args.per_device_train_batch_size,
            )

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
            nll = within_forward(
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

    # ---- checkpoints ----

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = super()._state()
        if self._reference is not None:
            tensors |= with_prefix("reference", self._reference.state())
        return tensors, values

    def _load_state(self, tensors: Mapping[str, Tensor], values: dict[str, Any]) -> None:
        super()._load_state(tensors, values)
        if self.args.method == "iw_sft" and (reference := under_prefix("reference", dict(tensors))):
            self._reference = ReferenceLogp(**reference)
            self._reference.check(cast(Examples, self.train_dataset))
