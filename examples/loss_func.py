"""Token weights where only a loss function can be given: Trainer(compute_loss_func=...).

It sees logits and hidden states, so its utilities are those of the output head alone.

python examples/loss_func.py
"""

import tempfile

import toy
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from vcore_train import vcore_loss_func

model, tokenizer = toy.load()
model.config.output_hidden_states = True  # the last of them is what the head reads
loss_func = vcore_loss_func(model, direction="ema", kl_budget=0.02)
with tempfile.TemporaryDirectory() as folder:
    trainer = Trainer(
        model,
        TrainingArguments(
            folder,
            per_device_train_batch_size=8,
            **toy.OPTIONS,
        ),
        DataCollatorForSeq2Seq(tokenizer),
        train_dataset=toy.rows(tokenizer),
        compute_loss_func=loss_func,
    )
    trainer.train()
toy.show(trainer)
last = loss_func.last
print(f"last batch: kl {last.kl.mean():.4f}, ess {last.ess.mean():.3f}, alpha {last.alpha:.3f}")
