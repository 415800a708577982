"""Token weights in TRL's ``SFTTrainer``: chat templates, packing and PEFT are TRL's."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vcore_train.config import VcoreOptions
from vcore_train.mixin import VcoreMixin

try:
    from trl import SFTConfig, SFTTrainer
except ImportError as error:
    raise ImportError(
        "VcoreSFTTrainer and VcoreSFTConfig need TRL: pip install 'vcore_kernels[train,trl]'."
    ) from error


@dataclass
class VcoreSFTConfig(VcoreOptions, SFTConfig):
    """Options of :class:`VcoreSFTTrainer`: those of TRL's ``SFTConfig`` and of
    :class:`vcore_train.VcoreOptions`.

    TRL's own ways to say how the loss is computed are refused, with what to use instead:
    ``loss_type``, ``use_liger_kernel``. TRL's defaults stay: ``bf16``, ``gradient_checkpointing``.
    """

    def __post_init__(self):
        _check_arguments(self)
        if self.loss_type not in (None, "nll"):
            raise ValueError(
                f"{type(self).__name__}: loss_type={self.loss_type!r} would be ignored: method= "
                "says which objective, and the logits are never formed. Leave loss_type out."
            )
        super().__post_init__()


class VcoreSFTTrainer(VcoreMixin, SFTTrainer):
    """TRL's ``SFTTrainer`` with a weight on every token's loss (:class:`VcoreMixin`)::

        trainer = VcoreSFTTrainer(
            "Qwen/Qwen3-0.6B",
            VcoreSFTConfig(output_dir="out", kl_budget=0.02, assistant_only_loss=True),
            train_dataset=load_dataset("json", data_files="messages.jsonl", split="train"),
            peft_config=LoraConfig(),
        )

    Arguments, data formats, packing, padding-free batches, activation offloading, evaluation,
    model cards and checkpoints are TRL's; ``method="sft"`` gives its parameters. A trajectory is
    one example: a row, or a segment of a packed one. With ``packing_strategy="wrapped"``, which
    keeps no boundaries between examples, it is a whole block.

    Training logs have TRL's ``num_tokens`` and the mixin's figures. ``entropy`` and
    ``mean_token_accuracy`` would need the logits, which training does not form; evaluation logs
    them.

    Args:
        model: a name or a causal language model, as in TRL.
        args: a :class:`VcoreSFTConfig`.
        *rest, **kwargs: as in ``SFTTrainer``, in the same order.

    Raises:
        ValueError: image data, or a mixture of experts with a load-balancing loss, which would
            be left out of the loss without a word.
        TypeError, ValueError: as :class:`VcoreMixin` and ``SFTTrainer``.
    """

    args: VcoreSFTConfig

    def __init__(self, model: Any, args: Any = None, *rest: Any, **kwargs: Any):
        if not (isinstance(args, VcoreOptions) and isinstance(args, SFTConfig)):
            raise TypeError(
                f"VcoreSFTTrainer: args must be a VcoreSFTConfig, got {type(args).__name__}. It "
                "takes every option of SFTConfig."
            )
        _check_arguments(args)
        super().__init__(model, args, *rest, **kwargs)
        if self._is_vision_dataset:
            raise ValueError(
                "VcoreSFTTrainer: the training set has images, and losses here come from a "
                "text decoder alone. Use SFTTrainer."
            )
        if self.aux_loss_enabled:
            raise ValueError(
                "VcoreSFTTrainer: the load-balancing loss of a mixture of experts is not part of "
                "the objectives here. Set router_aux_loss_coef=0.0, or use SFTTrainer."
            )

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Any:
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch, **kwargs)
        if model.training:
            self._count_tokens(inputs)
        return loss

    def _count_tokens(self, inputs: Any) -> None:
        """TRL's ``num_tokens``: tokens of the run, prompts included and padding not."""
        mask = inputs.get("attention_mask")
        tokens = inputs["input_ids"].numel() if mask is None else mask.sum()
        tokens = torch.as_tensor(tokens, device=self.args.device)
        everywhere = self.accelerator.gather_for_metrics(tokens).sum().item()
        self._total_train_tokens += everywhere // self.get_tp_size()
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]


def _check_arguments(args: SFTConfig) -> None:
    owner = type(args).__name__
    if args.loss_type == "dft":
        raise ValueError(f"{owner}: loss_type='dft' goes by the name of method='dft' here.")
    if args.use_liger_kernel:
        raise ValueError(
            f"{owner}: use_liger_kernel=True replaces layers by kernels without a forward "
            "derivative, and a head that is not run here. Leave it out: the head's kernels are "
            "this library's own."
        )
