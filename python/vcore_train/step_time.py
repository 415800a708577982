"""Step times of several trainers, measured in turns so that a busy machine slows all alike."""

import statistics
import time
from collections.abc import Mapping

from vcore_train.trainer import VcoreTrainer


def interleaved_step_seconds(
    trainers: Mapping[str, VcoreTrainer], *, rounds: int
) -> dict[str, float]:
    """Median wall-clock seconds of an optimizer step of each trainer, by name.

    The trainers have finished training. Every round takes one step of each, on the same batch where
    their data and seeds are the same; an untimed round comes first. Weights change: a trainer whose
    learning rate has not decayed to zero keeps learning.
    """
    batches = {name: iter(trainer.get_train_dataloader()) for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in trainers}
    for number in range(rounds + 1):
        for name, trainer in trainers.items():
            start = time.perf_counter()
            _step(trainer, batches[name])
            if number:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(times) for name, times in seconds.items()}


def _step(trainer: VcoreTrainer, batches) -> None:
    count = trainer.args.gradient_accumulation_steps
    micro_batches, items = trainer.get_batch_samples(batches, count, trainer.args.device)
    for batch in micro_batches:
        trainer.training_step(trainer.model_wrapped, batch, items)
    assert trainer.optimizer is not None
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    trainer.state.global_step += 1  # a direction is kept for so many of these
