"""Examples packed into one row: two collators, and their boundaries straight into the kernels.

Each packed example is a trajectory of its own, with the weights that it has in a padded batch.

python examples/packing.py
"""

import tempfile

import torch
import toy
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments
from vcore_train import (
    VcoreConfig,
    VcoreMixin,
    VcoreTrainer,
    descent_direction,
    token_utilities,
    with_vcore_options,
)
from vcore_train.collators import PackingCollator, PaddingCollator
from vcore_train.modeling import supervised_labels

from vcore_kernels import gibbs_weights, linear_nll, vcore_loss

model, tokenizer = toy.load()
rows = toy.rows(tokenizer)
options = {"per_device_train_batch_size": 8, **toy.OPTIONS}

# 1. VcoreTrainer packs by itself.
with tempfile.TemporaryDirectory() as folder:
    trainer = VcoreTrainer(model, VcoreConfig(folder, packing=True, **options), train_dataset=rows)
    trainer.train()
toy.show(trainer)


# 2. Any trainer with the collator of transformers, whose position_ids restart at each example.
class FlatTrainer(VcoreMixin, Trainer):
    pass


with tempfile.TemporaryDirectory() as folder:
    args = with_vcore_options(TrainingArguments(folder, **options), kl_budget=0.02)
    collator = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    trainer = FlatTrainer(model, args, collator, train_dataset=rows)
    trainer.train()
toy.show(trainer)

# 3. The kernels take packed values [N] with flash-attn's cu_seqlens as they are. Without a mask
#    every token counts, so these are the supervised ones, and boundaries between those.
batch = PackingCollator()(rows[:8])
direction = descent_direction(model, PackingCollator()(rows[8:40]))
utility = token_utilities(model, batch, direction).flatten()
hidden = model.model(batch["input_ids"], position_ids=batch["position_ids"]).last_hidden_state
nll = linear_nll(hidden, model.lm_head.weight, batch["labels"], shift=1).flatten()
mask, cu_seqlens = supervised_labels(batch).flatten() != -100, batch["cu_seq_lens_q"]
counts = torch.stack([part.sum() for part in mask.split(cu_seqlens.diff().tolist())])
ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
weights = gibbs_weights(utility[mask], cu_seqlens=ends, kl_budget=0.02)
result = vcore_loss(nll[mask], utility[mask], cu_seqlens=ends, kl_budget=0.02)
print(f"8 packed examples: loss {result.loss:.4f}, kl {weights.kl.mean():.4f}")

padded = PaddingCollator(tokenizer.pad_token_id)(rows[:8])
in_rows = token_utilities(model, padded, direction)
apart = gibbs_weights(in_rows, mask=supervised_labels(padded) != -100, kl_budget=0.02)
q = apart.q[supervised_labels(padded) != -100]
print(f"the same, padded: largest difference of a weight {(q - weights.q).abs().max():.1e}")
