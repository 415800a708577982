"""What the trainers share: whole checkpoints, the unwrapped model, autocast around the losses."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import TrainOutput, rotate_checkpoints

from vcore_kernels.spans import span
from vcore_train.checkpoint import recover, staged_folder
from vcore_train.modeling import trainable_parameters

logger = logging.getLogger(__name__)


if TYPE_CHECKING:
    _Trainer = Trainer
else:
    _Trainer = object


class OwnLosses(_Trainer):
    """For a trainer whose losses are computed on the unwrapped model, past its own ``forward``,
    under the autocast of Accelerate, and divided by ``num_items_in_batch``."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        # Whatever the model's own loss does.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True

    def _unwrapped(self, model: nn.Module | None = None) -> nn.Module:
        """The model (by default the trained one) out of DDP and its like."""
        model = self.model if model is None else model
        return self.accelerator.unwrap_model(model, keep_torch_compile=False)

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        with span("clip"):
            return super()._clip_grad_norm(model)

    def autocast_smart_context_manager(self, cache_enabled: bool | None = True) -> Any:
        # Accelerate puts autocast around the model's forward alone.
        return self.accelerator.autocast()


class BaseTrainer(OwnLosses, Trainer):
    """A ``transformers.Trainer`` with :class:`OwnLosses` whose checkpoints appear whole or not at
    all. One process uses one device.
    """

    _staging: Path | None = None  # where a checkpoint is being written

    def __init__(self, model: Any = None, args: TrainingArguments | None = None, **kwargs: Any):
        if args is not None and args.n_gpu > 1:
            logger.warning(
                "One process uses one device here; start one process for each with torchrun."
            )
            args._n_gpu = 1
        super().__init__(model, args, **kwargs)
        self._check_parameters()

    def _check_parameters(self) -> None:
        name_of_class = type(self).__name__
        parameters = trainable_parameters(self._unwrapped())
        if not parameters:
            raise ValueError(f"{name_of_class}: the model has no trainable parameter.")
        for name, parameter in parameters.items():
            if not parameter.is_floating_point():
                raise ValueError(
                    f"{name_of_class}: parameter {name} is {parameter.dtype}, which has no "
                    "gradient. Freeze quantised weights and train adapters over them (PEFT LoRA)."
                )

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.args.should_save and self.args.output_dir is not None:
            recover(Path(self.args.output_dir))
        self.accelerator.wait_for_everyone()
        return super().train(*args, **kwargs)

    def _init_training_state(
        self, max_steps: int, steps_per_epoch: int, epochs: int, *args: Any
    ) -> tuple[int, int]:
        start = super()._init_training_state(max_steps, steps_per_epoch, epochs, *args)
        if self.state.global_step < max_steps:
            return start
        logger.warning(
            "The checkpoint is at step %d of %d: nothing is left to train.",
            self.state.global_step,
            max_steps,
        )
        return epochs, 0  # all epochs are done, also one that max_steps ends within

    # ---- checkpoints ----

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """As in transformers, but the folder appears only once it is complete and on the disk."""
        run_folder = Path(super()._get_output_dir(trial))
        final = run_folder / f"checkpoint-{self.state.global_step}"
        push, self.args.push_to_hub = self.args.push_to_hub, False
        try:
            with staged_folder(
                final,
                main_process=self.args.should_save,
                barrier=self.accelerator.wait_for_everyone,
            ) as staging:
                self._staging = staging.parent
                super()._save_checkpoint(model, trial)
                if self.state.best_model_checkpoint == str(staging):
                    self.state.best_model_checkpoint = str(final)
                    if self.args.should_save:
                        self.state.save_to_json(str(staging / TRAINER_STATE_NAME))
        except (OSError, RuntimeError, SafetensorError):
            logger.error("Nothing of %s stays; earlier checkpoints are whole.", final)
            raise
        finally:
            self._staging = None
            self.args.push_to_hub = push
        if push:
            self._push_from_checkpoint(str(final))
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(run_folder),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._staging is None else str(self._staging)
