"""A model whose head is sharded along the vocabulary, against the same model whole."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from test_sharding import close
from tiny import padded_batch, tiny_model, with_lora
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from vcore_train import descent_direction, token_utilities
from vcore_train.modeling import causal_lm, head_of, hidden_states, supervised_labels, token_nll
from vcore_train.supervised import SupervisedTokens

from vcore_kernels import vcore_loss, weighted_linear_nll

pytestmark = pytest.mark.distributed

BATCHES = [padded_batch((9, 5, 7), seed=1), padded_batch((4, 8, 6), seed=2, prompt=3)]


def model_of(kind):
    """61 classes: no number of ranks divides them."""
    model = tiny_model("llama", attention_dropout=0.0, attention_bias=False)
    model.lm_head.bias = nn.Parameter(torch.linspace(-1, 1, 61))
    return with_lora(model) if kind == "lora" else model


def shard_head(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),), mesh_dim_names=("tp",))
    head = causal_lm(model).get_output_embeddings()
    for name, p in list(head.named_parameters()):
        sharded = distribute_tensor(p.detach(), mesh, [Shard(0)])
        setattr(head, name, nn.Parameter(sharded, requires_grad=p.requires_grad))
    return model


def whole(tensors):
    return {n: t.full_tensor() if isinstance(t, DTensor) else t for n, t in tensors.items()}


def run(kind, sharded, method="jvp"):
    """Two steps of VCORE; the losses, utilities, weights and parameters."""
    model = model_of(kind)
    if sharded:
        shard_head(model)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01, eps=1e-4)
    seen = {}
    for step, batch in enumerate(BATCHES):
        direction = descent_direction(model, BATCHES)
        epsilon = None if method == "jvp" else 1e-2
        utility = token_utilities(model, batch, direction, method=method, epsilon=epsilon)
        tokens = SupervisedTokens.of([batch])
        with torch.no_grad():
            nll = token_nll(model, batch)
        result = vcore_loss(
            tokens.packed([nll]),
            tokens.packed([utility]),
            cu_seqlens=tokens.cu_seqlens,
            kl_budget=0.1,
        )
        (weights,) = tokens.unpacked(result.weights)
        head = head_of(model)
        loss, _ = weighted_linear_nll(
            hidden_states(model, batch),
            head.weight,
            supervised_labels(batch),
            weights / tokens.count,
            shift=1,
            **head.options(),
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seen |= {f"nll {step}": nll, f"utility {step}": utility, f"weights {step}": weights}
        seen |= {f"{n} {step}": g for n, g in whole(direction).items()}
    return seen, {n: t.detach() for n, t in whole(trained).items()}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_parallel_head_gives_what_the_whole_one_gives(kind, ranks):
    seen, parameters = run(kind, False)
    for its_seen, its_parameters in run_ranks(ranks, run, kind, True):
        close(its_seen, seen)
        close(its_parameters, parameters)


def test_differences_under_a_parallel_head():
    seen, _ = run("full", False, "central")
    (its_seen, _), _ = run_ranks(2, run, "full", True, "central")
    close({"u": its_seen["utility 0"]}, {"u": seen["utility 0"]}, 1e-3)
