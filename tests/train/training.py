"""Short training runs of a tiny model for the tests of the trainer."""

import torch
from tiny import VOCABULARY, tiny_model
from vcore_train import VcoreConfig, VcoreTrainer


def example_rows(count=16, *, seed=0, longest=12, prompt=3):
    """Tokenised examples of varied length; the prompt is not supervised."""
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(count):
        length = int(torch.randint(prompt + 2, longest + 1, (), generator=generator))
        tokens = torch.randint(3, VOCABULARY, (length,), generator=generator).tolist()
        rows.append({"input_ids": tokens, "labels": [-100] * prompt + tokens[prompt:]})
    return rows


def qwen3(**options):
    return tiny_model("qwen3", **options)


# Plain SGD: updates are proportional to gradients.
SHORT = {
    "per_device_train_batch_size": 4,
    "max_steps": 3,
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "optim": "sgd",
    "max_grad_norm": 0.0,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
    "seed": 7,
}


def make_trainer(folder, *, model=None, rows=None, eval_rows=None, callbacks=None, **options):
    """A trainer of a SHORT run unless told otherwise."""
    options = {**SHORT, "output_dir": str(folder), **options}
    return VcoreTrainer(
        qwen3() if model is None else model,
        VcoreConfig(**options),
        train_dataset=example_rows() if rows is None else rows,
        eval_dataset=eval_rows,
        callbacks=callbacks,
    )


def train(folder, **options):
    trainer = make_trainer(folder, **options)
    trainer.train()
    return trainer


def parameters(trainer):
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def logged(trainer, name):
    return [line[name] for line in trainer.state.log_history if name in line]
