"""FSDP2 and DDP against one process: directions, utilities, differences, weights, moments."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from tiny import packed_batch, padded_batch, tiny_model, with_lora
from torch import nn
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from vcore_train import (
    VcoreConfig,
    descent_direction,
    forward_with_utilities,
    token_utilities,
)
from vcore_train.direction_tensors import check_finite, clip_direction, norm_of
from vcore_train.directions import EmaDirection, uniform_gradient
from vcore_train.modeling import causal_lm, supervised_labels, token_nll, trainable_parameters
from vcore_train.processes import Processes
from vcore_train.sharding import is_sharded, sharing_processes, within_forward
from vcore_train.supervised import SupervisedTokens
from vcore_train.weighting import weigh

from vcore_kernels.perturbed import NonFiniteDirectionError, perturbed

pytestmark = pytest.mark.distributed

# Four batches of one shape each rank's part of which is its own; none is supervised in the last.
BATCHES = [
    padded_batch((9, 5, 7), seed=1),
    padded_batch((4, 8, 6), seed=2, prompt=3),
    packed_batch((6, 3, 8), seed=3),
    {**(last := padded_batch((5, 7), seed=4)), "labels": torch.full_like(last["labels"], -100)},
]
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {
    "tied": partial(tiny_model, "qwen3"),
    "untied": partial(tiny_model, "llama", attention_dropout=0.0, attention_bias=False),
    "gemma2": partial(tiny_model, "gemma2", attention_dropout=0.0),
    "lora": lambda: with_lora(tiny_model("qwen3"), targets=LINEAR),
    "lora on the head": lambda: with_lora(
        tiny_model("llama", attention_dropout=0.0), targets=("q_proj", "lm_head")
    ),
    # vocabulary and widths that no number of ranks divides
    "odd": partial(tiny_model, "qwen3", vocab_size=67, intermediate_size=45),
}


def shard(model, *, parts="layers", **options):
    """``parts``: decoder layers, the head for itself too, or what accelerate makes units of."""
    lm = causal_lm(model)
    for layer in lm.get_decoder().layers:
        fully_shard(layer, **options)
    tied = lm.get_output_embeddings().weight is lm.get_input_embeddings().weight
    if parts == "accelerate":
        tail = [lm.get_decoder().norm, lm.get_output_embeddings()]
        if tied:
            tail.insert(1, lm.get_input_embeddings())
        else:
            fully_shard(lm.get_input_embeddings(), **options)
        fully_shard(tail, **{**options, "reshard_after_forward": False})
    elif parts == "head" and not tied:
        fully_shard(lm.get_output_embeddings(), **options)
    return fully_shard(model, **options)


def own_batches(count=1):
    """This rank's part of the first ``count * world size`` batches."""
    size, rank = dist.get_world_size(), dist.get_rank()
    return [BATCHES[(rank + i * size) % len(BATCHES)] for i in range(count)]


def whole(direction):
    return {n: g.full_tensor() if isinstance(g, DTensor) else g for n, g in direction.items()}


def close(actual, expected, rtol=1e-5):
    """Each within ``rtol`` of its largest entry."""
    assert list(actual) == list(expected)
    for name, value in expected.items():
        bound = max(rtol * float(value.abs().max()), 1e-12)
        error = float((actual[name] - value).abs().max())
        assert error <= bound, f"{name}: {error:.3g}, allowed {bound:.3g}"


def probe(model, batches, *, processes=None, method="jvp", epsilon=None):
    """Direction over ``batches`` of all ranks and the utilities of this rank's."""
    direction = descent_direction(model, batches, processes=processes)
    utilities = [
        token_utilities(model, b, direction, method=method, epsilon=epsilon) for b in batches
    ]
    again = descent_direction(model, batches, processes=processes)
    assert all(torch.equal(_local(direction[n]), _local(g)) for n, g in again.items())
    return direction, utilities


def _local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _fsdp_rank(name, parts, options, method):
    model = MODELS[name]()
    shard(model, parts=parts, **options)
    direction, utilities = probe(model, own_batches(), method=method, epsilon=EPSILON[method])
    for tensor, parameter in zip(
        direction.values(), trainable_parameters(model).values(), strict=True
    ):
        assert tensor.placements == parameter.placements
        assert tensor.to_local().shape == parameter.to_local().shape
    assert all(p.grad is None for p in model.parameters())
    return whole(direction), utilities


EPSILON = {"jvp": None, "central": 1e-2, "finite_difference": 1e-3}


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("parts", ["layers", "accelerate", "head"])
def test_sharded_model_gives_what_one_process_gives(ranks, name, parts):
    if parts == "head" and name not in ("untied", "lora on the head"):
        pytest.skip("tied: the head is not a unit of its own")
    results = run_ranks(ranks, _fsdp_rank, name, parts, {}, "jvp")
    direction, utilities = probe(MODELS[name](), BATCHES[:ranks])
    for rank, (of_rank, its_utilities) in enumerate(results):
        close(of_rank, direction)
        close({"u": its_utilities[0]}, {"u": utilities[rank]})


@pytest.mark.parametrize("method", ["central", "finite_difference"])
@pytest.mark.parametrize("name", ["tied", "untied", "lora"])
def test_differences_of_a_sharded_model(name, method):
    results = run_ranks(2, _fsdp_rank, name, "accelerate", {}, method)
    _, utilities = probe(MODELS[name](), BATCHES[:2], method=method, epsilon=EPSILON[method])
    for rank, (_, its_utilities) in enumerate(results):
        close({"u": its_utilities[0]}, {"u": utilities[rank]}, 2e-3)  # of differences of fp32


def _one_unit_rank(name):
    """Twice the gradient: nothing of the first is left over for the second."""
    model = MODELS[name]()
    shard(model, parts="accelerate")
    first, second = (uniform_gradient(model, own_batches()) for _ in range(2))
    return whole(first), whole(second)


def test_nothing_of_a_gradient_is_left_for_the_next():
    for first, second in run_ranks(2, _one_unit_rank, "lora on the head"):
        expected = uniform_gradient(MODELS["lora on the head"](), BATCHES[:2])
        close(first, expected)
        close(second, expected)


def _unequal_rank(last):
    """Rank 1 has no supervised token in its batches, or in the last of them."""
    model = tiny_model("qwen3")
    shard(model)
    batches = [BATCHES[0], BATCHES[1]] if dist.get_rank() == 0 else [BATCHES[2 if last else 3]] * 2
    if dist.get_rank() and last:
        batches[1] = BATCHES[3]
    direction, utilities = probe(model, batches)
    return whole(direction), utilities, batches


@pytest.mark.parametrize("last", [True, False])
def test_a_rank_without_supervised_tokens_does_not_hang_the_others(last):
    results = run_ranks(2, _unequal_rank, last, timeout=60)
    batches = [batch for _, _, part in results for batch in part]
    direction, utilities = probe(tiny_model("qwen3"), batches)
    close(results[0][0], direction)
    for actual, expected in zip(results[0][1] + results[1][1], utilities, strict=True):
        close({"u": actual}, {"u": expected})


def _none_rank():
    model = tiny_model("qwen3")
    shard(model)
    with pytest.raises(ValueError, match="none of the 2 batches has a supervised token"):
        uniform_gradient(model, BATCHES[3])
    processes = Processes.all()
    with pytest.raises(ValueError, match="none of the 2 batches has a supervised token"):
        uniform_gradient(tiny_model("qwen3"), BATCHES[3], processes=processes)


def test_no_supervised_token_on_any_rank_is_an_error_on_all():
    run_ranks(2, _none_rank, timeout=60)


def _ddp_rank(name):
    model = MODELS[name]()
    return probe(model, own_batches(), processes=Processes.all())


@pytest.mark.parametrize("name", ["tied", "lora"])
def test_copies_of_a_model_share_a_direction(name):
    results = run_ranks(4, _ddp_rank, name)
    direction, utilities = probe(MODELS[name](), BATCHES)
    for rank, (of_rank, its_utilities) in enumerate(results):
        close(of_rank, direction)
        close({"u": its_utilities[0]}, {"u": utilities[rank]})
        assert all(torch.equal(g, results[0][0][n]) for n, g in of_rank.items())


def _exception_rank(parts):
    model = MODELS["untied"]()
    shard(model, parts=parts)
    expected = uniform_gradient(model, own_batches())
    for where in (model, model.model.layers[0], model.model.norm):

        def fail(*_):
            raise ZeroDivisionError

        hook = where.register_forward_hook(fail)
        for broken in (uniform_gradient, lambda m, b: token_utilities(m, b[0], expected)):
            with pytest.raises(ZeroDivisionError):
                broken(model, own_batches())
        hook.remove()
        again = uniform_gradient(model, own_batches())
        close(whole(again), whole(expected))
    return whole(expected)


@pytest.mark.parametrize("parts", ["layers", "accelerate"])
def test_after_an_exception_the_model_is_as_before(parts):
    direction = uniform_gradient(MODELS["untied"](), BATCHES[:2])
    for of_rank in run_ranks(2, _exception_rank, parts):
        close(of_rank, direction)


def _accumulating_rank(policy):
    """A probe between two micro-batches of which the first is left unreduced."""
    model = MODELS["tied"]()
    shard(model, parts="accelerate", mp_policy=policy)

    def backward(batch):
        within_forward(model, model, lambda: token_nll(model, batch).sum()).backward()

    batch = own_batches()[0]
    model.set_requires_gradient_sync(False)
    backward(batch)
    direction = uniform_gradient(model, batch)
    model.set_requires_gradient_sync(True)
    backward(batch)
    return whole(direction), {n: p.grad.full_tensor() for n, p in model.named_parameters()}


@pytest.mark.parametrize(
    "policy", [MixedPrecisionPolicy(), MixedPrecisionPolicy(reduce_dtype=torch.float64)], ids=str
)
def test_a_probe_between_micro_batches_leaves_their_gradients(policy):
    model = MODELS["tied"]()
    direction = uniform_gradient(model, BATCHES[:2])
    for batch in BATCHES[:2]:
        token_nll(model, batch).sum().backward()
    gradients = {n: p.grad for n, p in model.named_parameters()}  # twice, and the mean of 2 ranks
    for of_rank, its_gradients in run_ranks(2, _accumulating_rank, policy):
        close(of_rank, direction)
        close(its_gradients, gradients)


def _factors_rank():
    model = MODELS["untied"]()
    shard(model)
    for module in model.modules():
        if module is model:
            module.set_gradient_divide_factor(1.0)
        elif hasattr(module, "set_gradient_divide_factor"):
            module.set_gradient_divide_factor(4.0)
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
    return whole(uniform_gradient(model, own_batches()))


def test_divide_factors_of_units_do_not_reach_the_direction():
    direction = uniform_gradient(MODELS["untied"](), BATCHES[:2])
    for of_rank in run_ranks(2, _factors_rank):
        close(of_rank, direction)


# ---- policies ----


def _policy_rank(name, dtype, offload):
    policy = {} if dtype is None else {"mp_policy": MixedPrecisionPolicy(param_dtype=dtype)}
    if offload:
        policy["offload_policy"] = CPUOffloadPolicy(pin_memory=False)
    model = MODELS[name]()
    shard(model, parts="accelerate", **policy)
    # Twice the whole probe: what a pass leaves behind must not change the next.
    (direction, utilities), (again, _) = (probe(model, own_batches()) for _ in range(2))
    assert all(torch.equal(_local(direction[n]), _local(g)) for n, g in again.items())
    return whole(direction), utilities


def test_cpu_offload_changes_nothing():
    direction, utilities = probe(MODELS["untied"](), BATCHES[:2])
    for rank, (of_rank, its_utilities) in enumerate(
        run_ranks(2, _policy_rank, "untied", None, True)
    ):
        close(of_rank, direction)
        close({"u": its_utilities[0]}, {"u": utilities[rank]})


@pytest.mark.parametrize("name", ["tied", "lora"])
def test_bfloat16_of_fsdp_is_bfloat16_of_the_model(name):
    """param_dtype=bfloat16 computes as a model in bfloat16 does."""
    plain = MODELS[name]().bfloat16()
    direction, _ = probe(plain, BATCHES[:2])
    results = run_ranks(2, _policy_rank, name, torch.bfloat16, False)
    for rank, (of_rank, its_utilities) in enumerate(results):
        cosine = torch.nn.functional.cosine_similarity(
            torch.cat([g.flatten() for g in of_rank.values()]),
            torch.cat([g.flatten() for g in direction.values()]),
            dim=0,
        )
        assert cosine > 0.9995
        mask = supervised_labels(BATCHES[rank]) != -100
        expected = token_utilities(plain, BATCHES[rank], of_rank)[mask]
        error = (its_utilities[0][mask] - expected).norm() / expected.norm()
        assert error < 0.03  # buffers are cast there and not here


# ---- directions as DTensors ----


def _arithmetic_rank():
    model = MODELS["odd"]()
    shard(model)
    g = uniform_gradient(model, own_batches())
    before = {n: t.clone() for n, t in g.items()}
    norm = norm_of(g.values())
    clipped = norm_of(clip_direction(g, norm / 4).values())
    ema = EmaDirection(0.5)
    for _ in range(3):
        ema.update(before)
    assert all(
        t.placements == p.placements for t, p in zip(ema.tensors.values(), g.values(), strict=True)
    )
    average = norm_of(ema.tensors.values())
    largest = check_finite(before)
    name = list(g)[-1]
    if dist.get_rank() == 1:  # in one shard of one parameter
        before[name].to_local()[-1:] = float("nan")
    with pytest.raises(NonFiniteDirectionError, match=r"entries of the direction are NaN .*") as e:
        token_utilities(model, own_batches()[0], before)
    return norm, clipped, average, largest, str(e.value)


def test_norms_and_checks_are_of_the_whole_direction():
    results = run_ranks(2, _arithmetic_rank)
    expected = uniform_gradient(MODELS["odd"](), BATCHES[:2])
    norm = norm_of(expected.values())
    for of_rank, clipped, average, largest, message in results:
        assert of_rank == pytest.approx(norm, rel=1e-5)
        assert clipped == pytest.approx(norm / 4, rel=1e-5)
        assert average == pytest.approx(norm, rel=1e-5)
        assert largest == pytest.approx(check_finite(expected), rel=1e-4)
        assert message == results[0][-1]


def _perturbed_rank():
    model = tiny_model("qwen3")
    shard(model)
    direction = uniform_gradient(model, own_batches())
    parameters = [model.get_parameter(name) for name in direction]
    before = [p.to_local().clone() for p in parameters]
    with torch.no_grad(), perturbed(parameters, direction.values(), 0.1):
        nll = within_forward(model, model, lambda: token_nll(model, BATCHES[0]))
        moved = [p.full_tensor().clone() for p in parameters]
    assert all(torch.equal(p.to_local(), b) for p, b in zip(parameters, before, strict=True))
    return moved, nll


def test_perturbed_moves_the_shards():
    model = tiny_model("qwen3")
    direction = uniform_gradient(model, BATCHES[:2])
    parameters = [model.get_parameter(name) for name in direction]
    with torch.no_grad(), perturbed(parameters, direction.values(), 0.1):
        nll = token_nll(model, BATCHES[0])
        for moved, its_nll in run_ranks(2, _perturbed_rank):
            for actual, expected in zip(moved, parameters, strict=True):
                torch.testing.assert_close(actual, expected.detach(), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(its_nll, nll, rtol=1e-5, atol=1e-5)


def _errors_rank():
    model = tiny_model("llama")
    for layer in model.model.layers:
        fully_shard(layer)
    with pytest.raises(ValueError, match=r"Call fully_shard\(model\) after its parts"):
        uniform_gradient(model, BATCHES[0])
    model = tiny_model("qwen3")
    plain = uniform_gradient(model, BATCHES[0])
    shard(model)
    with pytest.raises(ValueError, match="not sharded as the model's parameters are"):
        token_utilities(model, BATCHES[0], plain)
    with pytest.raises(ValueError, match="head's use alone cannot be probed"):
        uniform_gradient(model, BATCHES[0], params="lm_head")
    left_out = tiny_model("llama", attention_dropout=0.0)
    fully_shard(left_out, ignored_params={left_out.model.norm.weight})
    with pytest.raises(ValueError, match=r"model\.norm\.weight are trained and not sharded"):
        uniform_gradient(left_out, BATCHES[0])
    direction = uniform_gradient(model, BATCHES[0])
    with torch.inference_mode():
        token_utilities(model, BATCHES[0], direction)
    with pytest.raises(ValueError, match="reuse_forward: the model is sharded"):
        forward_with_utilities(model, BATCHES[0], {})


def test_errors_say_what_to_do():
    run_ranks(2, _errors_rank)


# ---- weights ----

SHARPNESS = (
    {"kl_budget": 0.05},
    {"kl_budget": 0.05, "kl_scope": "batch"},
    {"tau": 3.0, "variance_control": "trajectory"},
    {"kl_budget": 0.05, "variance_control": "ess"},
    {"temperature": 0.2, "variance_control": "loss"},
)


def _options(**options):
    return VcoreConfig(output_dir="unused", report_to="none", use_cpu=True, **options)


def _random_values(batch):
    generator = torch.Generator().manual_seed(int(batch["input_ids"].sum()))
    shape = batch["labels"].shape
    return torch.rand(shape, generator=generator), torch.randn(shape, generator=generator)


def _weights_rank(options):
    batches = own_batches(2)
    nll, utility = zip(*map(_random_values, batches), strict=True)
    result = weigh(_options(**options), SupervisedTokens.of(batches), nll, utility, Processes.all())
    return result.weights, result.means


@pytest.mark.parametrize("options", SHARPNESS)
def test_weights_are_bitwise_those_of_one_process(options):
    """Micro-batch by micro-batch, rank by rank: the order of one process with all of them."""
    results = run_ranks(2, _weights_rank, options)
    nll, utility = zip(*map(_random_values, BATCHES), strict=True)
    expected = weigh(_options(**options), SupervisedTokens.of(BATCHES), nll, utility, Processes())
    assert all(
        torch.equal(value, means[name])
        for _, means in results
        for name, value in expected.means.items()
    )
    for number, weights in enumerate(expected.weights):
        assert torch.equal(results[number % 2][0][number // 2], weights)


def test_sharing_processes_of_a_plain_model():
    model = nn.Linear(2, 2)
    assert not is_sharded(model)
    assert sharing_processes(model) == []
