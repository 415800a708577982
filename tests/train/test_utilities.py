"""Token utilities against the exact per-token gradient products, and the probe's good manners."""

import copy

import pytest
import torch
from exact import (
    LiftedCasts,
    exact_utilities,
    exact_utilities_one_by_one,
    random_direction,
)
from tiny import packed_batch, padded_batch, tiny_model, unpacked, untied_twin, with_lora
from vcore_train.directions import descent_direction
from vcore_train.modeling import token_nll, trainable_parameters
from vcore_train.utilities import (
    ForwardDerivativeError,
    token_utilities,
    token_utilities_and_nll,
)

from vcore_kernels.perturbed import NonFiniteDirectionError


def checkpointed(model):
    model.gradient_checkpointing_enable()
    return model


BATCHES = {
    "left": lambda: padded_batch(side="left"),
    "right": padded_batch,
    "packed": packed_batch,
}
MODELS = {
    "qwen3": lambda: tiny_model("qwen3"),
    "llama": lambda: tiny_model("llama"),
    "gemma2": lambda: tiny_model("gemma2"),
    "qwen3-lora": lambda: with_lora(tiny_model("qwen3"), lora_dropout=0.5),
    "llama-lora-head": lambda: with_lora(
        tiny_model("llama"), targets=("q_proj", "down_proj", "lm_head")
    ),
    "qwen3-lora-tokens": lambda: with_lora(tiny_model("qwen3"), trainable_token_indices=[5, 9, 40]),
    "llama-checkpointed": lambda: checkpointed(tiny_model("llama")),
    "qwen3_moe": lambda: tiny_model(
        "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
    ),
}


def probed_in_double(model, inputs, direction, **options):
    double = copy.deepcopy(model).double()
    with LiftedCasts():
        return token_utilities(
            double, inputs, {n: g.double() for n, g in direction.items()}, **options
        )


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_jvp_is_exact(name, batch):
    model, inputs = MODELS[name](), BATCHES[batch]()
    direction = random_direction(trainable_parameters(model))
    exact = exact_utilities(model, inputs, direction)
    assert exact.abs().max() > 0.1
    torch.testing.assert_close(probed_in_double(model, inputs, direction), exact)
    utility = token_utilities(model, inputs, direction)
    assert utility.dtype == torch.float32
    torch.testing.assert_close(
        utility, exact.float(), rtol=1e-4, atol=1e-5 * float(exact.abs().max())
    )


@pytest.mark.parametrize("tied", [True, False])
def test_the_exact_utilities_are_the_gradients_products(tied):
    model, inputs = tiny_model("qwen3", tie_word_embeddings=tied), padded_batch(side="left")
    direction = random_direction(trainable_parameters(model))
    torch.testing.assert_close(
        exact_utilities(model, inputs, direction),
        exact_utilities_one_by_one(model, inputs, direction),
    )


@pytest.mark.parametrize(
    "only", ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
)
@pytest.mark.parametrize("tied", [True, False])
def test_one_parameter_alone(only, tied):
    """Every use of it moves, but the head's own name of a tied weight stands for the head's use."""
    model, inputs = tiny_model("qwen3", tie_word_embeddings=tied), padded_batch()
    named = dict(model.named_parameters(remove_duplicate=False))
    direction = random_direction({only: named[only]})
    meant = untied_twin(model) if only == "lm_head.weight" else model
    exact = exact_utilities(meant, inputs, direction)
    torch.testing.assert_close(probed_in_double(model, inputs, direction), exact)
    for method in ("central", "finite_difference"):
        for head in ("linear", "pair"):
            utility = token_utilities(model, inputs, direction, method=method, head=head)
            assert correlation(utility, exact) > 0.9999, (method, head)


@pytest.mark.parametrize("head", ["linear", "pair"])
@pytest.mark.parametrize("method", ["central", "finite_difference"])
@pytest.mark.parametrize("name", ["qwen3", "llama", "gemma2", "qwen3-lora", "llama-lora-head"])
def test_differences_approach_the_derivative(name, method, head):
    model, inputs = MODELS[name](), padded_batch(side="left")
    direction = random_direction(trainable_parameters(model))
    exact = exact_utilities(model, inputs, direction)
    scale = float(exact.abs().max())
    coarse, fine = (
        float(
            (
                probed_in_double(model, inputs, direction, head=head, method=method, epsilon=e)
                - exact
            )
            .abs()
            .max()
        )
        for e in (1e-3, 1e-4)
    )
    order = 2 if method == "central" else 1
    assert coarse / fine == pytest.approx(10**order, rel=0.3)
    assert fine < 0.02 * scale
    chosen = token_utilities_and_nll(model, inputs, direction, method=method, head=head)
    assert chosen.epsilon > 0
    assert correlation(chosen.utility, exact) > 0.999


def correlation(a, b):
    return float(torch.corrcoef(torch.stack([a[b != 0], b[b != 0]]).double())[0, 1])


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
@pytest.mark.parametrize("method", ["central", "finite_difference"])
def test_the_chosen_epsilon_follows_the_size_of_g(method, size):
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    exact = exact_utilities(model, inputs, direction)
    scaled = {name: g * size for name, g in direction.items()}
    utility = token_utilities(model, inputs, scaled, method=method)
    assert correlation(utility, exact) > 0.999
    with torch.autocast("cpu", torch.bfloat16):
        utility = token_utilities(model, inputs, scaled, method=method)
    assert correlation(utility, exact) > (0.9 if method == "central" else 0.85)


@pytest.mark.parametrize("method", ["jvp", "central", "finite_difference"])
def test_bf16_weights_and_autocast(method):
    model, inputs = tiny_model("llama"), padded_batch()
    direction = descent_direction(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        utility = token_utilities(model, inputs, direction, method=method)
    least = 0.999 if method == "jvp" else 0.9
    assert correlation(utility, exact_utilities(model, inputs, direction)) > least
    model.bfloat16()
    least = 0.999 if method == "jvp" else 0.7  # rounding of 20k weights does not average out
    utility = token_utilities(model, inputs, direction, method=method)
    assert utility.dtype == torch.float32
    assert correlation(utility, exact_utilities(model, inputs, direction)) > least


def test_float16_does_not_let_a_small_direction_vanish():
    model, inputs = tiny_model("llama"), padded_batch()
    direction = {n: g * 1e-9 for n, g in random_direction(trainable_parameters(model)).items()}
    exact = exact_utilities(model, inputs, direction)
    utility = token_utilities(model.half(), inputs, direction)
    assert correlation(utility, exact) > 0.999


@pytest.mark.parametrize("method", ["jvp", "central", "finite_difference"])
def test_losses_come_along(method):
    model, inputs = tiny_model("gemma2"), packed_batch()
    direction = random_direction(trainable_parameters(model))
    epsilon = None if method == "jvp" else 1e-4
    nll = token_utilities_and_nll(model, inputs, direction, method=method, epsilon=epsilon).nll
    torch.testing.assert_close(nll, token_nll(model.eval(), inputs), rtol=1e-4, atol=1e-4)


def test_packed_equals_padded():
    lengths = (9, 5, 7)
    model = tiny_model("gemma2")
    direction = random_direction(trainable_parameters(model))
    padded = token_utilities(model, padded_batch(lengths), direction)
    packed = token_utilities(model, packed_batch(lengths), direction)
    torch.testing.assert_close(unpacked(packed, lengths), padded, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora", [True, False])
@pytest.mark.parametrize("method", ["jvp", "central", "finite_difference"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_nothing_is_left_behind(method, attention, lora):
    model = tiny_model("llama", attention=attention)
    model.gradient_checkpointing_enable()
    if lora:
        model = with_lora(model, lora_dropout=0.3)
    model.get_input_embeddings().eval()
    inputs = padded_batch()
    token_nll(model, inputs).sum().backward()
    direction = random_direction(trainable_parameters(model))

    def state():
        tensors = [*model.parameters(), *(p.grad for p in model.parameters())]
        tensors += [*direction.values(), torch.get_rng_state()]
        flags = [(m.training, getattr(m, "gradient_checkpointing", None)) for m in model.modules()]
        flags += [p.requires_grad for p in model.parameters()]
        flags += [model.config._attn_implementation, torch.is_autocast_cache_enabled()]
        return [None if t is None else t.detach().clone() for t in tensors], flags

    tensors, flags = state()
    with torch.no_grad():
        token_utilities(model, inputs, direction, method=method)
    utility = token_utilities(model, inputs, direction, method=method)
    assert not utility.requires_grad
    tensors_after, flags_after = state()
    assert flags_after == flags
    for before, after in zip(tensors, tensors_after, strict=True):
        assert (before is None and after is None) or torch.equal(before, after)


def test_inference_mode_and_input_gradients_do_not_matter():
    model = with_lora(tiny_model("qwen3"))
    direction = random_direction(trainable_parameters(model))
    expected = token_utilities(model, padded_batch(), direction)
    model.enable_input_require_grads()  # what PEFT does under gradient checkpointing
    assert torch.equal(token_utilities(model, padded_batch(), direction), expected)
    with torch.inference_mode():
        assert torch.equal(token_utilities(model, padded_batch(), direction), expected)


def test_a_failing_pass_restores_too():
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    before = copy.deepcopy(model.state_dict())

    def fail(module, args):
        raise KeyError("in the middle")

    model.model.layers[1].register_forward_pre_hook(fail)
    for method in ("jvp", "central"):
        with pytest.raises(KeyError):
            token_utilities(model, inputs, direction, method=method)
        assert all(m.training for m in model.modules())
        assert model.config._attn_implementation == "sdpa"
        for name, value in model.state_dict().items():
            assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("params", "with_tangent"),
    [("all", [0, 1]), ("last_1_layers", [1]), (["last_1_layers", "lm_head"], [1]), ("lm_head", [])],
    ids=str,
)
def test_what_comes_before_the_first_probed_parameter_carries_no_tangent(params, with_tangent):
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = descent_direction(model, inputs, params=params)
    exact = exact_utilities(untied_twin(model), inputs, direction) if params != "all" else None
    carried = []

    def note(number, out):
        if torch.autograd.forward_ad.unpack_dual(out).tangent is not None:
            carried.append(number)

    for number, layer in enumerate(model.model.layers):
        layer.register_forward_hook(lambda module, args, out, number=number: note(number, out))
    utility = token_utilities(model, inputs, direction)
    assert carried == with_tangent
    if exact is not None:
        torch.testing.assert_close(utility, exact.float(), rtol=1e-4, atol=1e-5)


# ---- derivatives that are missing ----


class Swish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        sigmoid = torch.sigmoid(x)
        return grad * sigmoid * (1 + x * (1 - sigmoid))


@torch.library.custom_op("vcore_tests::double", mutates_args=())
def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


class Fused(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


@pytest.mark.parametrize("function", [Swish.apply, double])
def test_a_module_without_a_forward_derivative_is_named(function):
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    model.model.layers[1].mlp.act_fn = Fused(function)
    match = r"model\.layers\.1\.mlp\.act_fn \(Fused\) has no forward-mode derivative.*central"
    with pytest.raises(ForwardDerivativeError, match=match):
        token_utilities(model, inputs, direction)
    exact = exact_utilities(model, inputs, direction) if function is not double else None
    central = token_utilities(model, inputs, direction, method="central")
    assert exact is None or correlation(central, exact) > 0.999


def test_hidden_states_without_a_tangent_are_an_error():
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    model.model.norm.register_forward_hook(lambda module, args, out: out.detach())
    del direction["model.embed_tokens.weight"], direction["model.norm.weight"]
    hook = model.model.layers[1].register_forward_hook(
        lambda module, args, out: torch.autograd.forward_ad.unpack_dual(out).primal
    )
    with pytest.raises(ForwardDerivativeError, match=r"model\.layers\.0.*without a tangent"):
        token_utilities(model, inputs, direction)
    hook.remove()


# ---- bad input ----


def test_directions_that_do_not_fit():
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    with pytest.raises(ValueError, match="direction is empty"):
        token_utilities(model, inputs, {})
    with pytest.raises(ValueError, match=r"module\.model\.norm\.weight.*no parameters of Qwen3"):
        token_utilities(model, inputs, {"module.model.norm.weight": torch.ones(32)})
    with pytest.raises(ValueError, match=r"model\.norm\.weight: \[31\] for \[32\]"):
        token_utilities(model, inputs, {"model.norm.weight": torch.ones(31)})
    with pytest.raises(ValueError, match="one tied parameter"):
        token_utilities(model, inputs, direction | {"lm_head.weight": torch.ones(61, 32)})
    direction["model.norm.weight"][3] = torch.inf
    direction["model.layers.0.mlp.up_proj.weight"][0, :2] = torch.nan
    for method in ("jvp", "central"):
        with pytest.raises(NonFiniteDirectionError, match=r"3 entries.*up_proj\.weight \(2\)"):
            token_utilities(model, inputs, direction, method=method)


def test_other_bad_input():
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    with pytest.raises(ValueError, match="unknown method 'forward', expected one of jvp"):
        token_utilities(model, inputs, direction, method="forward")
    for epsilon in (0.0, -1e-4, float("nan")):
        with pytest.raises(ValueError, match="epsilon must be positive"):
            token_utilities(model, inputs, direction, method="central", epsilon=epsilon)
    with pytest.raises(ValueError, match="unknown head 'both', expected one of linear, pair"):
        token_utilities(model, inputs, direction, method="central", head="both")
    with pytest.raises(ValueError, match="takes no epsilon"):
        token_utilities(model, inputs, direction, epsilon=1e-4)
    with pytest.raises(ValueError, match="no labels"):
        token_utilities(model, {"input_ids": inputs["input_ids"]}, direction)


def test_frozen_parameters_are_named():
    model, inputs = with_lora(tiny_model("llama")), padded_batch()
    direction = random_direction(trainable_parameters(model))
    name = "base_model.model.model.layers.0.self_attn.k_proj.weight"
    frozen = dict(model.named_parameters())[name]
    with pytest.raises(
        ValueError, match=r"0\.self_attn\.k_proj\.weight are frozen.*Leave them out"
    ):
        token_utilities(model, inputs, {**direction, name: torch.ones_like(frozen)})


@pytest.mark.parametrize("method", ["jvp", "central"])
def test_boundaries_that_cut_a_trajectory(method):
    model, inputs = tiny_model("qwen3"), packed_batch((9, 5, 7))
    direction = random_direction(trainable_parameters(model))

    def probed(boundaries, **changes):
        cu = torch.tensor(boundaries, dtype=torch.int32)
        batch = {**inputs, "cu_seq_lens_q": cu, "cu_seq_lens_k": cu, **changes}
        for key in [key for key, value in changes.items() if value is None]:
            del batch[key]
        return token_utilities(model, batch, direction, method=method)

    with pytest.raises(ValueError, match=r"cuts a trajectory at token 4 \(1 such.* from 3 to 4"):
        probed([0, 4, 9, 14, 21])
    with pytest.raises(ValueError, match=r"has no boundary at token 9 \(1 such.* from 8 to 0"):
        probed([0, 14, 21])
    with pytest.raises(ValueError, match=r"must rise from 0 to at most the batch's 21 tokens"):
        probed([0, 9, 14, 22])
    with pytest.raises(ValueError, match=r"must rise from 0"):
        probed([0, 14, 9, 21])
    with pytest.raises(ValueError, match="cuts a trajectory at token 4"):
        descent_direction(model, {**inputs, "cu_seq_lens_q": torch.tensor([0, 4, 9, 14, 21])})
    expected = probed([0, 9, 14, 21])
    assert torch.equal(probed([0, 9, 14, 21], position_ids=None), expected)
    labels = inputs["labels"].clone()
    labels[:, :9] = -100  # what is cut is not supervised
    assert probed([0, 4, 9, 14, 21], labels=labels)[:, 9:].any()


def test_quantised_weights():
    model, inputs = with_lora(tiny_model("llama")), padded_batch()
    base = model.get_base_model().model.layers[0].self_attn.k_proj
    base.weight = torch.nn.Parameter(base.weight.detach().to(torch.int8), requires_grad=False)
    direction = random_direction(trainable_parameters(model))
    name = "base_model.model.model.layers.0.self_attn.k_proj.weight"
    with pytest.raises(ValueError, match=r"k_proj\.weight are quantised \(torch\.int8\).*LoRA"):
        token_utilities(model, inputs, {**direction, name: torch.ones(base.weight.shape)})


@pytest.mark.parametrize("method", ["jvp", "central", "finite_difference"])
def test_nothing_supervised_and_a_zero_direction(method):
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    empty = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    assert not token_utilities(model, empty, direction, method=method).any()
    zero = {name: torch.zeros_like(g) for name, g in direction.items()}
    assert not token_utilities(model, inputs, zero, method=method).any()
