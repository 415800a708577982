"""Token weights in a training loop of one's own, without any trainer.

python examples/bare_loop.py [--model Qwen/Qwen3-0.6B] [--steps 10]
torchrun --nproc-per-node 2 examples/bare_loop.py           # gradients are summed over processes
"""

import argparse
import os

import torch
import toy
from vcore_train import descent_direction
from vcore_train.collators import PaddingCollator, model_inputs
from vcore_train.modeling import head_of, hidden_states, supervised_labels
from vcore_train.processes import Processes
from vcore_train.utilities import token_utilities_and_nll

from vcore_kernels import vcore_loss, weighted_linear_nll

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="a checkpoint; by default a small random model")
parser.add_argument("--steps", type=int, default=10)
args = parser.parse_args()
if "RANK" in os.environ:
    torch.distributed.init_process_group("gloo")
processes = Processes.all()
model, tokenizer = toy.load(args.model)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
rows, collate = toy.rows(tokenizer), PaddingCollator(tokenizer.pad_token_id)
generator = torch.Generator().manual_seed(processes.rank)  # each process has its own examples


def draw(count):
    numbers = torch.randint(len(rows), (count,), generator=generator)
    return model_inputs(collate([rows[number] for number in numbers]))


for step in range(args.steps):
    # The direction of the whole training set's uniform loss, estimated on a probe batch.
    direction = descent_direction(model, draw(16), processes=processes)
    batch = draw(8)
    utility, nll = token_utilities_and_nll(model, batch, direction)[:2]  # [B, T], one pass
    mask = supervised_labels(batch) != -100
    # Weights of mean 1 in each solution, times one scale for the batch (of this process).
    result = vcore_loss(nll, utility, mask=mask, kl_budget=0.02)
    num_items = processes.sum(mask.sum())
    hidden, head = hidden_states(model, batch), head_of(model)
    loss, _ = weighted_linear_nll(
        hidden, head.weight, batch["labels"], result.weights / num_items, shift=1, **head.options()
    )
    loss.backward()
    processes.sum_([p.grad for p in model.parameters() if p.grad is not None])
    optimizer.step()
    optimizer.zero_grad()
    if processes.rank == 0:
        mean = (nll.sum() / mask.sum()).item()
        print(f"step {step}: nll {mean:.3f}, kl {result.kl.mean():.3f}, alpha {result.alpha:.3f}")
if processes.group is not None:
    torch.distributed.destroy_process_group()
