"""Sequences that several processes share, against the same step in one process."""

import itertools
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.distributed as dist
from ranks import run_ranks
from tiny import packed_batch, padded_batch, tiny_model, with_lora
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import flash_attention_mask
from vcore_train import context_parallel as cp
from vcore_train.context_parallel import (
    context_parallel,
    exchange,
    gather_tokens,
    shard_batch,
    split_tokens,
    sum_gradients,
)
from vcore_train.directions import descent_direction, uniform_gradient
from vcore_train.gradient_norms import sequence_grad_norms
from vcore_train.modeling import (
    label_shift,
    segment_starts,
    supervised_labels,
    token_nll,
    trainable_parameters,
)
from vcore_train.processes import Processes
from vcore_train.reuse import forward_with_utilities
from vcore_train.utilities import token_utilities, token_utilities_and_nll

from vcore_kernels import vcore_loss

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).parents[2]

BATCHES = {
    "padded": padded_batch,  # T = 9
    "left": lambda **options: padded_batch((9, 5, 7), side="left", **options),
    "packed": packed_batch,  # 21 tokens; the second trajectory spans the boundary of two ranks
    "boundary": lambda **options: packed_batch((8, 4, 12), **options),  # one at ranks' boundaries
    "prompt": lambda **options: padded_batch((16,), **{**options, "prompt": 12}),
    "short": lambda **options: padded_batch((3, 2), **{**options, "prompt": 1}),
}


def make_model(kind, *, lora=False, dtype=torch.float32, **options):
    """Without dropout."""
    options = {"attention_dropout": 0.0, **options}
    model = tiny_model(kind, **options)
    if lora:
        model = with_lora(model, targets=("q_proj", "k_proj", "v_proj", "down_proj"))
    return model.to(dtype)


# ---- a step, alone and shared ----


def step_alone(model, batch, probe, method="jvp", epsilon=None):
    mask = supervised_labels(batch) != -100
    direction = descent_direction(model, probe)
    utility, nll, *_ = token_utilities_and_nll(
        model, batch, direction, method=method, epsilon=epsilon
    )
    weights = weights_of(batch, nll, utility, mask)
    loss = (weights * token_nll(model, batch)).sum() / mask.sum()
    loss.backward()
    return {"direction": direction, "utility": utility, "nll": nll, "weights": weights}, loss


def step_shared(model, batch, probe, group, method="jvp", epsilon=None):
    mask = supervised_labels(batch) != -100
    with context_parallel(model, group):
        part = shard_batch(batch, group)
        direction = descent_direction(model, shard_batch(probe, group), processes=Processes(group))
        values = token_utilities_and_nll(model, part, direction, method=method, epsilon=epsilon)
        utility, nll = gather_tokens(batch, [values.utility, values.nll], group)
        weights = weights_of(batch, nll, utility, mask)
        loss = (split_tokens(weights, group) * token_nll(model, part)).sum() / mask.sum()
        loss.backward()
    sum_gradients(model, group)
    loss = Processes(group).sum(loss.detach())
    return {"direction": direction, "utility": utility, "nll": nll, "weights": weights}, loss


def weights_of(batch, nll, utility, mask):
    """Gibbs weights of whole trajectories, packed or padded."""
    starts = segment_starts(batch).flatten()
    segment = (starts.cumsum(0) - 1)[mask.flatten()]
    counts = torch.unique_consecutive(segment, return_counts=True)[1]
    cu_seqlens = torch.cat([counts.new_zeros(1), counts.cumsum(0)]).int()
    result = vcore_loss(nll[mask], utility[mask], cu_seqlens=cu_seqlens, kl_budget=0.05)
    weights = torch.zeros_like(nll)
    weights[mask] = result.weights
    return weights


def two_steps(kind, options, batch, seeds, group=None):
    """Two steps of AdamW; everything that the steps made."""
    model = make_model(kind, **options)
    # With a small eps, Adam would turn the rounding of the smallest gradients into whole steps.
    optimizer = torch.optim.AdamW(trainable_parameters(model).values(), lr=1e-2, eps=1e-3)
    made = {}
    for n, seed in enumerate(seeds):
        pair = BATCHES[batch](seed=seed), BATCHES[batch](seed=seed + 100)
        if group is None:
            values, loss = step_alone(model, *pair)
        else:
            values, loss = step_shared(model, *pair, group)
        made |= {f"{n} {name}": value for name, value in values.items()}
        made[f"{n} loss"] = loss.detach()
        named = trainable_parameters(model).items()
        made[f"{n} gradient"] = {name: p.grad.clone() for name, p in named}
        optimizer.step()
        optimizer.zero_grad()
    made["parameters"] = {name: p.detach() for name, p in trainable_parameters(model).items()}
    return made


def two_steps_of_rank(*args):
    return two_steps(*args, dist.group.WORLD)


def assert_same(value, expected, rtol, name=""):
    """Relative to the largest entry; of a model's tensors, to the largest of all of them."""
    if isinstance(expected, dict):
        assert value.keys() == expected.keys()
        scale = max(float(e.abs().max()) for e in expected.values())
        for key in expected:
            torch.testing.assert_close(
                value[key], expected[key], rtol=0, atol=rtol * scale, msg=lambda m: f"{name} {m}"
            )
        return
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(
        value, expected, rtol=0, atol=rtol * scale, msg=lambda m: f"{name} {m}"
    )


@pytest.mark.parametrize(
    ("ranks", "kind", "options", "batch"),
    [
        (2, "qwen3", {}, "packed"),
        (4, "qwen3", {}, "padded"),
        (4, "qwen3", {"lora": True}, "packed"),
        (2, "qwen3", {"lora": True}, "left"),
        (2, "qwen3", {}, "boundary"),
        (4, "mistral", {}, "boundary"),  # windows of 4 tokens, parts of 6
        (4, "mistral", {"attention": "eager"}, "left"),
        (2, "gemma2", {"attention": "eager"}, "padded"),  # soft-capped
        (4, "gemma3_text", {}, "packed"),
        (4, "llama", {}, "prompt"),  # no supervised token in half of the parts
        (4, "llama", {"lora": True}, "short"),  # more ranks than tokens
    ],
)
def test_training_is_that_of_one_process(ranks, kind, options, batch):
    expected = two_steps(kind, options, batch, (0, 1))
    for made in run_ranks(ranks, two_steps_of_rank, kind, options, batch, (0, 1)):
        for name, value in expected.items():
            assert_same(made[name], value, 1e-5, name)


def test_training_in_float64():
    args = "qwen3", {"dtype": torch.float64}, "packed", (0,)
    expected = two_steps(*args)
    for made in run_ranks(2, two_steps_of_rank, *args):
        for name, value in expected.items():
            assert_same(made[name], value, 1e-7, name)  # norms are fp32 in transformers


# ---- grouped queries ----


def nll_and_gradient(options, group):
    model = make_model("qwen3", **options)
    batch = packed_batch()
    if group is None:
        nll, gradient = token_nll(model, batch), uniform_gradient(model, batch)
        return nll.detach(), gradient, token_utilities(model, batch, gradient)
    with context_parallel(model, group):
        part = shard_batch(batch, group)
        gradient = uniform_gradient(model, part, processes=Processes(group))
        utility = token_utilities(model, part, gradient)
        nll, utility = gather_tokens(batch, [token_nll(model, part), utility], group)
    return nll, gradient, utility


def heads_of_rank(options):
    return [nll_and_gradient(option, dist.group.WORLD) for option in options]


@pytest.mark.parametrize(
    ("ranks", "heads"),
    [
        (2, [(4, 4), (4, 2), (4, 1), (6, 3), (12, 3)]),  # (6, 3): a key's queries in two ranks
        (4, [(4, 4), (4, 2), (4, 1), (8, 2)]),
    ],
)
def test_key_heads_go_where_their_queries_are(ranks, heads):
    options = [
        {"num_attention_heads": q, "num_key_value_heads": kv, "attention": attention}
        for (q, kv), attention in itertools.product(heads, ["sdpa", "eager"])
    ]
    results = run_ranks(ranks, heads_of_rank, options)
    for n, option in enumerate(options):
        expected = nll_and_gradient(option, None)
        for result in results:
            for value, target in zip(result[n], expected, strict=True):
                assert_same(value, target, 1e-5, str(option))


# ---- an implementation of the kind of flash attention ----


def varlen(module, query, key, value, attention_mask, scaling=None, **kwargs):
    """Attention segment by segment, by what flash attention would read."""
    assert module.config._attn_implementation == "tests_varlen"
    assert module.layer_idx in (0, 1)
    assert query.shape[1] // key.shape[1] == module.num_key_value_groups
    assert kwargs.get("position_ids") is None or dist.get_world_size() == 1
    ends = kwargs["cu_seq_lens_q"].tolist()
    assert kwargs["max_length_q"] == max(b - a for a, b in itertools.pairwise(ends))
    assert attention_mask is None
    assert ends[-1] == query.shape[2]
    out = torch.empty_like(query)
    for begin, end in itertools.pairwise(ends):
        q, k, v = (x[:, :, begin:end] for x in (query, key, value))
        out[:, :, begin:end] = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=scaling, enable_gqa=True
        )
    return out.transpose(1, 2), None


def varlen_of_rank():
    AttentionInterface.register("tests_varlen", varlen)
    AttentionMaskInterface.register("tests_varlen", flash_attention_mask)
    group, model, batch = dist.group.WORLD, make_model("qwen3"), packed_batch()
    model.set_attn_implementation("tests_varlen")
    with context_parallel(model, group):
        part = shard_batch(batch, group)
        g = uniform_gradient(model, part, processes=Processes(group))
        utility, nll = token_utilities_and_nll(model, part, g)[:2]  # by "vcore_jvp"
        own = token_nll(model, part)
        return gather_tokens(batch, [own, utility, nll], group), g


def test_attention_that_reads_the_boundaries():
    model, batch = make_model("qwen3"), packed_batch()
    expected, g = token_nll(model, batch).detach(), uniform_gradient(model, batch)
    for (own, utility, nll), gradient in run_ranks(2, varlen_of_rank):
        assert_same(own, expected, 1e-5)
        assert_same(nll, expected, 1e-5)
        assert_same(gradient, g, 1e-5)
        assert_same(utility, token_utilities(model, batch, g), 1e-5)


# ---- utilities by other passes ----


def differences(group):
    model, batch = make_model("qwen3"), BATCHES["prompt"]()
    if group is not None and dist.get_rank(group) == 0:
        torch.manual_seed(9)  # nothing may depend on a rank's own generator
    made = []
    for method, epsilon in itertools.product(["central", "finite_difference"], [None, 1e-2]):
        for head in ["linear", "pair"]:
            options = {"method": method, "epsilon": epsilon, "head": head}
            if group is None:
                g = descent_direction(model, batch)
                made.append(token_utilities_and_nll(model, batch, g, **options))
                continue
            with context_parallel(model, group):
                part = shard_batch(batch, group)
                g = descent_direction(model, part, processes=Processes(group))
                values = token_utilities_and_nll(model, part, g, **options)
                whole = gather_tokens(batch, values[:2], group)
                made.append((*whole, values.epsilon, values.snr))
    return made


def differences_of_rank():
    return differences(dist.group.WORLD)


def test_difference_methods_take_one_step_for_all():
    expected = differences(None)
    for made in run_ranks(4, differences_of_rank):
        for (utility, nll, epsilon, snr), target in zip(made, expected, strict=True):
            assert_same(nll, target.nll, 1e-5)
            assert_same(utility, target.utility, 2e-2)  # rounding over the step
            assert epsilon == pytest.approx(target.epsilon, rel=1e-2)
            assert snr == pytest.approx(target.snr, rel=0.5)
    first = run_ranks(2, differences_of_rank)
    for a, b in zip(*first, strict=True):
        assert a[2:] == b[2:]


def reused(checkpointing, lora, group):
    model, batch = make_model("qwen3", lora=lora), packed_batch()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    mask = supervised_labels(batch) != -100
    if group is None:
        g = descent_direction(model, batch)
        forward = forward_with_utilities(model, batch, g)
        utility, nll = forward.utility, forward.nll
        forward.loss(weights_of(batch, nll, utility, mask)).backward()
    else:
        with context_parallel(model, group):
            part = shard_batch(batch, group)
            g = descent_direction(model, part, processes=Processes(group))
            forward = forward_with_utilities(model, part, g)
            utility, nll = gather_tokens(batch, [forward.utility, forward.nll], group)
            weights = weights_of(batch, nll, utility, mask)
            forward.loss(split_tokens(weights, group)).backward()
        sum_gradients(model, group)
    return utility, nll, {name: p.grad for name, p in trainable_parameters(model).items()}


def reused_of_rank(cases):
    return [reused(*case, dist.group.WORLD) for case in cases]


def test_one_forward_pass_for_both():
    cases = list(itertools.product([False, True], [False, True]))
    results = run_ranks(2, reused_of_rank, cases)
    for n, case in enumerate(cases):
        expected = reused(*case, None)
        for result in results:
            for value, target in zip(result[n], expected, strict=True):
                assert_same(value, target, 1e-5, str(case))


def checkpointed_of_rank(reentrant):
    model, batch, group = make_model("mistral"), packed_batch(), dist.group.WORLD
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    with context_parallel(model, group):
        token_nll(model, shard_batch(batch, group)).sum().backward()
    sum_gradients(model, group)
    return {name: p.grad for name, p in trainable_parameters(model).items()}


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers(reentrant):
    model = make_model("mistral")
    token_nll(model, packed_batch()).sum().backward()
    expected = {name: p.grad for name, p in trainable_parameters(model).items()}
    for gradient in run_ranks(2, checkpointed_of_rank, reentrant):
        assert_same(gradient, expected, 1e-5)


# ---- the exchange ----


def exchange_of_rank():
    group = dist.group.WORLD
    rank, count = dist.get_rank(), dist.get_world_size()
    calls = []
    all_to_all = dist.all_to_all_single

    def counted(*args, **kwargs):
        calls.append(args[1].dtype)
        return all_to_all(*args, **kwargs)

    dist.all_to_all_single = counted
    generator = torch.Generator().manual_seed(0)

    def drawn(heads, width, dtype=torch.float64):
        """The same whole tensor [B, heads, T, D] everywhere, and this rank's tokens of it."""
        whole = torch.randn(3, heads, 5 * count, width, generator=generator, dtype=dtype)
        return whole, whole.chunk(count, 2)[rank].clone()

    # Values, of several shapes and dtypes.
    shapes = [(2 * count, 4), (count, 3), (count, 1, torch.bfloat16), (count, 2, torch.float16)]
    wholes, own = zip(*[drawn(*shape) for shape in shapes], strict=True)
    for whole, out in zip(wholes, exchange(own, group), strict=True):
        torch.testing.assert_close(out, whole.chunk(count, 1)[rank], rtol=0, atol=0)
    assert calls == [torch.float64, torch.bfloat16, torch.float16]

    # Gradients: the cotangent of the whole, chunked by heads, comes back chunked by tokens.
    x = own[0].requires_grad_()
    y = own[1].requires_grad_()
    cotangent, cotangent_own = drawn(2 * count, 4)
    out, _ = exchange([x, y], group)
    (gradient,) = torch.autograd.grad(out, x, cotangent.chunk(count, 1)[rank], create_graph=True)
    torch.testing.assert_close(gradient, cotangent_own, rtol=0, atol=0)
    # There and back, twice differentiable.
    (back,) = exchange(exchange([x], group), group, split=2, join=1)
    torch.testing.assert_close(back, x, rtol=0, atol=0)
    (first,) = torch.autograd.grad((back**3).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 6 * x.detach(), rtol=0, atol=1e-12)

    # Tangents of one of two, in one collective with the values, and the values' graph.
    tangent, tangent_own = drawn(2 * count, 4)
    calls.clear()
    with fwAD.dual_level():
        out, plain = exchange([fwAD.make_dual(x, tangent_own), y], group)
        value, moved = fwAD.unpack_dual(out)
        assert fwAD.unpack_dual(plain).tangent is None
        torch.testing.assert_close(moved, tangent.chunk(count, 1)[rank], rtol=0, atol=0)
        torch.testing.assert_close(value, wholes[0].chunk(count, 1)[rank], rtol=0, atol=0)
        assert not moved.requires_grad
    assert len(calls) == 1
    (gradient,) = torch.autograd.grad(value, x, cotangent.chunk(count, 1)[rank])
    torch.testing.assert_close(gradient, cotangent_own, rtol=0, atol=0)

    # A function of the whole: gradient and tangent agree with a difference in float64.
    def energy(point):
        (full,) = exchange([point], group)
        return Processes(group).sum((full.sin() * cotangent.chunk(count, 1)[rank]).sum().detach())

    h = 1e-5
    difference = (energy(x + h * tangent_own) - energy(x - h * tangent_own)) / (2 * h)
    (full,) = exchange([x], group)
    (gradient,) = torch.autograd.grad((full.sin() * cotangent.chunk(count, 1)[rank]).sum(), x)
    along = Processes(group).sum((gradient * tangent_own).sum())
    torch.testing.assert_close(along, difference, rtol=1e-8, atol=0)
    dist.all_to_all_single = all_to_all


@pytest.mark.parametrize("ranks", [2, 4])
def test_exchange_and_its_derivatives(ranks):
    run_ranks(ranks, exchange_of_rank)


# ---- the parts of a batch ----


def parts_of_rank(batches):
    return [shard_batch(batch, dist.group.WORLD) for batch in batches]


def next_labels(batch):
    """What each token predicts, -100 if nothing; token by token."""
    labels, starts = batch["labels"], segment_starts(batch)
    out = torch.full_like(labels, -100)
    for row, t in itertools.product(range(labels.shape[0]), range(labels.shape[1] - 1)):
        if not starts[row, t + 1]:
            out[row, t] = labels[row, t + 1]
    return out


@pytest.mark.parametrize("ranks", [2, 4])
def test_parts(ranks):
    names = ["padded", "left", "packed", "boundary", "prompt", "short"]
    batches = [BATCHES[name]() for name in names]
    for batch in batches:  # everything in packed ones is supervised, so that boundaries matter
        batch["token_type_ids"] = torch.arange(batch["labels"].numel()).view_as(batch["labels"])
        batch["example_index"] = torch.tensor([3])
        batch["labels"] = batch["labels"].where(batch["labels"] != -100, batch["input_ids"])
    results = run_ranks(ranks, parts_of_rank, batches)
    for n, (name, batch) in enumerate(zip(names, batches, strict=True)):
        parts = [result[n] for result in results]
        length = batch["input_ids"].shape[1]
        whole = {
            key: torch.cat([part[key] for part in parts], dim=1)
            for key in ["input_ids", "shift_labels", "position_ids", "token_type_ids"]
        }
        assert all("labels" not in part for part in parts)
        assert len({part["input_ids"].shape for part in parts}) == 1
        padded = ranks * parts[0]["input_ids"].shape[1]
        assert length <= padded < length + ranks
        assert (whole["shift_labels"][:, length:] == -100).all()
        torch.testing.assert_close(whole["shift_labels"][:, :length], next_labels(batch))
        for key in ["input_ids", "token_type_ids"]:
            torch.testing.assert_close(whole[key][:, :length], batch[key])
        packed = "cu_seq_lens_q" in batch
        positions = torch.arange(length).expand(len(batch["input_ids"]), -1)
        positions = batch["position_ids"] if packed else positions
        torch.testing.assert_close(whole["position_ids"][:, :length], positions)
        for part in parts:
            assert part["example_index"].tolist() == [3]
            assert label_shift(part) == 0
            assert part["attention_mask"].shape == (len(batch["input_ids"]), padded)
            assert supervised_labels(part) is part["shift_labels"]
            if packed:
                expected = batch["cu_seq_lens_q"].tolist() + [padded] * (padded > length)
                assert part["cu_seq_lens_q"].tolist() == part["cu_seq_lens_k"].tolist() == expected
                assert part["cu_seq_lens_q"].dtype == torch.int32
                assert part["attention_mask"].all()
            else:
                mask = part["attention_mask"]
                torch.testing.assert_close(mask[:, :length], batch["attention_mask"])
        starts = torch.cat([segment_starts(part) for part in parts], dim=1)
        expected = torch.zeros_like(starts)
        expected[:, :: padded // ranks] = True
        if packed:
            expected[:, :length] |= segment_starts(batch)
            expected[:, length:][:, :1] = True
        if name != "short":  # its padding begins a part
            torch.testing.assert_close(starts, expected)


def test_one_process():
    """Without a group, and with one of a single process."""
    for name, batch in BATCHES.items():
        batch = batch()
        model = make_model("qwen3")
        with context_parallel(model, None):
            part = shard_batch(batch, None)
            nll = gather_tokens(batch, [token_nll(model, part)], None)[0]
            torch.testing.assert_close(nll, token_nll(model, batch), msg=lambda m, n=name: n + m)
        # Such a part is an ordinary batch, in a context or not.
        outside = gather_tokens(batch, [token_nll(model, part)], None)[0]
        torch.testing.assert_close(outside, token_nll(model, batch))


def test_gather_and_split_are_inverse():
    batch = packed_batch()
    labels = supervised_labels(batch).float()
    (back,) = gather_tokens(batch, [split_tokens(labels, None)], None)
    torch.testing.assert_close(back[:, 1:], labels[:, 1:])
    with pytest.raises(ValueError, match=r"a part \[1, 21\] of this batch, got \[1, 20\]"):
        gather_tokens(batch, [labels[:, 1:]], None)


def odd_batches_of_rank():
    """Packed batches of other forms, against one process."""
    group, model = dist.group.WORLD, make_model("qwen3")
    bare = packed_batch()
    for key in ["cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"]:
        del bare[key]
    unpositioned = packed_batch()
    del unpositioned["position_ids"]
    rows = {
        "input_ids": torch.arange(22).view(2, 11) + 3,
        "labels": torch.arange(22).view(2, 11) + 3,
        "cu_seq_lens_q": torch.tensor([0, 5, 11, 19, 22], dtype=torch.int32),
    }
    maskless = padded_batch((7, 7))
    del maskless["attention_mask"]
    out = []
    for batch in [bare, unpositioned, rows, maskless]:
        with context_parallel(model, group):
            part = shard_batch(batch, group)
            (nll,) = gather_tokens(batch, [token_nll(model, part)], group)
        out.append((nll, token_nll(model, batch).detach()))
    return out


def test_batches_of_other_forms():
    for nll, expected in itertools.chain(*run_ranks(4, odd_batches_of_rank)):
        assert_same(nll, expected, 1e-5)


# ---- the context ----


def context_of_rank():
    group, model, batch = dist.group.WORLD, make_model("gemma2", attention="eager"), padded_batch()
    expected = token_nll(model, batch)
    logits = model(**{k: v for k, v in batch.items() if k != "labels"}).logits
    names = [m.config._attn_implementation for m in (model, model.model)]
    with context_parallel(model, group):
        part = shard_batch(batch, group)
        # A whole batch runs in each process for itself, with a mask or packed.
        torch.testing.assert_close(token_nll(model, batch), expected)
        token_nll(model, packed_batch())
        with pytest.raises(ValueError, match="use_cache=False"):
            model(**part)
        shared = model(**part, use_cache=False).logits
        rows = logits.tensor_split([5], dim=1)[dist.get_rank()]
        torch.testing.assert_close(shared[:, : rows.shape[1]], rows, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="in a context already"), context_parallel(model, None):
            pass
        four = torch.ones(3, 1, 5, 5, dtype=torch.bool)
        with pytest.raises(ValueError, match="not made by transformers' mask functions"):
            model(input_ids=part["input_ids"], attention_mask=four, use_cache=False)
    with pytest.raises(RuntimeError, match="inside"), context_parallel(model, group):
        raise RuntimeError("inside")
    assert names == [m.config._attn_implementation for m in (model, model.model)]
    assert not cp._groups
    torch.testing.assert_close(token_nll(model, batch), expected, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="must match the size"):
        token_nll(model, part)

    # Two models at once, each in a context of its own.
    other = make_model("qwen3", seed=1)
    with context_parallel(model, group), context_parallel(other, None):
        (nll,) = gather_tokens(batch, [token_nll(model, part)], group)
        torch.testing.assert_close(nll, expected.detach(), rtol=1e-4, atol=1e-5)
        token_nll(other, batch)
    with pytest.raises(ValueError, match="Pass whole ones, with labels"):
        sequence_grad_norms(model, part)


def test_context():
    run_ranks(2, context_of_rank)


def unused_of_rank():
    group = dist.group.WORLD
    first, second, third = (torch.nn.Linear(2, 3) for _ in range(3))
    model = torch.nn.ModuleList([first, second, third])
    first.weight.grad = torch.full((2, 3), 1.0 + dist.get_rank()).t()
    if dist.get_rank() == 1:
        second.bias.grad = torch.ones(3)
    sum_gradients(model, group)
    return first.weight.grad, first.bias.grad, second.bias.grad, third.weight.grad


def test_gradients_that_only_some_processes_have():
    for first, bias, second, third in run_ranks(2, unused_of_rank):
        torch.testing.assert_close(first, torch.full((3, 2), 3.0))
        torch.testing.assert_close(second, torch.ones(3))
        assert bias is None
        assert third is None


def dropout_of_rank():
    """Every process drops in its own heads; the loss of one drawing alike is another one."""
    group, model, batch = dist.group.WORLD, tiny_model("llama"), padded_batch((12, 12))
    losses = []
    with context_parallel(model, group):
        part = shard_batch(batch, group)
        for seeds in [(0, 0), (0, 1), (0, 1)]:
            torch.manual_seed(seeds[dist.get_rank()])
            losses.append(Processes(group).sum(token_nll(model, part).detach().sum()))
    return [float(loss) for loss in losses]


def test_dropout_draws_from_each_process():
    (alike, apart, again), others = run_ranks(2, dropout_of_rank)
    assert [alike, apart, again] == others
    assert apart == again != alike


# ---- mistakes ----


def mistakes_of_rank():
    group, rank = dist.group.WORLD, dist.get_rank()
    batch = padded_batch()
    other = padded_batch(seed=rank)
    with pytest.raises(ValueError, match=r"ranks 0 and 1 differ in input_ids, labels\."):
        shard_batch(other, group)
    with pytest.raises(ValueError, match="differ in token_type_ids"):
        shard_batch({**batch, **({"token_type_ids": batch["labels"]} if rank else {})}, group)
    with pytest.raises(ValueError, match=r"attention_mask has shape \[3, 1, 9, 9\]"):
        shard_batch({**batch, "attention_mask": torch.ones(3, 1, 9, 9)}, group)
    with pytest.raises(ValueError, match=r"expected input_ids \[B, T\]"):
        shard_batch({"labels": batch["labels"]}, group)
    with pytest.raises(ValueError, match=r"expected input_ids \[B, T\]"):
        shard_batch({"input_ids": torch.zeros(2, 0, dtype=torch.int64)}, group)
    with pytest.raises(ValueError, match="both attention_mask and cu_seq_lens_q"):
        shard_batch({**packed_batch(), "attention_mask": torch.ones(1, 21)}, group)
    with pytest.raises(ValueError, match=r"expected position_ids \[B, T\]"):
        shard_batch({**batch, "position_ids": torch.zeros(3, 3, 9, dtype=torch.int64)}, group)
    cut = packed_batch()
    cut["cu_seq_lens_q"] = torch.tensor([0, 8, 14, 21], dtype=torch.int32)
    with pytest.raises(ValueError, match="cu_seq_lens_q"):
        shard_batch(cut, group)

    def refused(match, kind="qwen3", **options):
        with (
            pytest.raises(ValueError, match=match),
            context_parallel(tiny_model(kind, **options), group),
        ):
            pass

    heads = {"num_attention_heads": 3, "num_key_value_heads": 3}
    refused("has 3 attention heads, which 2 processes", **heads)
    long = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    refused("rotary embeddings of type dynamic", rope_parameters=long)
    refused("cannot be exchanged", "bloom")
    refused("layers of type linear_attention", "qwen3_next", num_experts=2)


def test_mistakes():
    run_ranks(2, mistakes_of_rank)


# ---- the example ----


def example(ranks):
    """What the example prints, line by line."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(ranks), str(ROOT / "examples" / "context_parallel.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_example():
    lines = example(1)
    assert len(lines) == 8
    losses = [float(re.search(r"loss ([0-9.]+)", line)[1]) for line in lines]
    assert losses[-1] < losses[0] / 2
    assert example(2) == lines
