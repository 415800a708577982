"""Token-weighted training of sequences that several processes share, on a small random model.

torchrun --nproc-per-node 2 examples/context_parallel.py    # 1, 2 or 4: the losses are the same
"""

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM
from vcore_train.collators import PackingCollator
from vcore_train.context_parallel import (
    context_parallel,
    gather_tokens,
    shard_batch,
    split_tokens,
    sum_gradients,
)
from vcore_train.directions import descent_direction
from vcore_train.modeling import token_nll
from vcore_train.processes import Processes
from vcore_train.supervised import SupervisedTokens
from vcore_train.utilities import token_utilities_and_nll

from vcore_kernels import vcore_loss

dist.init_process_group("gloo")
group = dist.group.WORLD  # or the group of the processes that share a batch
torch.manual_seed(0)  # the same weights everywhere
model = Qwen3ForCausalLM(
    Qwen3Config(
        vocab_size=128, hidden_size=64, intermediate_size=128, head_dim=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.1,
    )
)  # fmt: skip
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
generator = torch.Generator().manual_seed(0)  # the same batches everywhere


def draw_batch():
    """Three sequences that count upwards, the first tokens of each a prompt, in one row."""
    rows = []
    for length in (301, 120, 77):
        ids = (torch.arange(length) + torch.randint(128, (1,), generator=generator)) % 128
        labels = ids.where(torch.arange(length) >= 8, -100)
        rows.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return PackingCollator()(rows)


for step in range(8):
    batch, probe = draw_batch(), draw_batch()
    with context_parallel(model, group):
        part = shard_batch(batch, group)
        g = descent_direction(model, shard_batch(probe, group), processes=Processes(group))
        values = token_utilities_and_nll(model, part, g)
        # Weights are those of whole trajectories, so losses and utilities come together for them.
        utility, nll = gather_tokens(batch, [values.utility, values.nll], group)
        tokens = SupervisedTokens.of([batch])
        nll, utility = tokens.packed([nll]), tokens.packed([utility])
        weighted = vcore_loss(nll, utility, cu_seqlens=tokens.cu_seqlens, kl_budget=0.02)
        (weights,) = tokens.unpacked(weighted.weights)
        loss = (split_tokens(weights, group) * token_nll(model, part)).sum() / tokens.count
        loss.backward()
    sum_gradients(model, group)
    optimizer.step()
    optimizer.zero_grad()
    loss = Processes(group).sum(loss.detach())
    if dist.get_rank() == 0:
        print(f"step {step}: loss {loss:.4f}, alpha {weighted.alpha:.3f}", flush=True)
del group  # gloo's threads must end before Python does
dist.destroy_process_group()
