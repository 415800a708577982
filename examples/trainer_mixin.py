"""Token weights in a Trainer of one's own: two lines where the class and its arguments are.

python examples/trainer_mixin.py
"""

import tempfile

import torch
import toy
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from vcore_train import VcoreMixin, with_vcore_options


class MyTrainer(Trainer):
    """Somebody's trainer, with an optimizer of its own."""

    def create_optimizer(self, model=None):
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1, momentum=0.9)
        return self.optimizer


class MyVcoreTrainer(VcoreMixin, MyTrainer):  # the first line
    pass


model, tokenizer = toy.load()
with tempfile.TemporaryDirectory() as folder:
    args = TrainingArguments(
        folder,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        **toy.OPTIONS,
    )
    args = with_vcore_options(args, kl_budget=0.02)  # the second
    trainer = MyVcoreTrainer(
        model, args, DataCollatorForSeq2Seq(tokenizer), train_dataset=toy.rows(tokenizer)
    )
    trainer.train()
toy.show(trainer)
