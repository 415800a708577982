"""Which layers of a model the dual pass replaces, and that it leaves no trace of it."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
from exact import LiftedCasts, exact_utilities, random_direction
from tiny import packed_batch, padded_batch, tiny_model, with_lora
from vcore_train import dual_layers, dual_ops, utilities
from vcore_train.modeling import token_nll, trainable_parameters
from vcore_train.utilities import token_utilities, token_utilities_and_nll

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
MODELS = {  # model, what is replaced in it
    "qwen3": (lambda: tiny_model("qwen3"), {"Qwen3RMSNorm": 9, "Qwen3MLP": 2}),
    "llama": (lambda: tiny_model("llama"), {"LlamaRMSNorm": 5, "LlamaMLP": 2}),
    "mistral": (lambda: tiny_model("mistral"), {"MistralRMSNorm": 5, "MistralMLP": 2}),
    "gemma2": (lambda: tiny_model("gemma2"), {"Gemma2RMSNorm": 9, "Gemma2MLP": 2}),
    "gemma3": (lambda: tiny_model("gemma3_text"), {"Gemma3RMSNorm": 13, "Gemma3MLP": 2}),
    "olmo2": (lambda: tiny_model("olmo2"), {"Olmo2RMSNorm": 9, "Olmo2MLP": 2}),
    "phi3": (lambda: tiny_model("phi3"), {"Phi3RMSNorm": 5}),
    "gpt2": (lambda: tiny_model("gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=64), {}),
    "qwen3_moe": (
        lambda: tiny_model(
            "qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
        ),
        {"Qwen3MoeRMSNorm": 9},
    ),
    "llama-lora": (
        lambda: with_lora(tiny_model("llama"), targets=ALL, lora_dropout=0.4),
        {"LlamaRMSNorm": 5, "LlamaMLP": 2, "Linear": 14},
    ),
    "gpt2-lora": (  # Conv1D underneath
        lambda: with_lora(
            tiny_model("gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=64),
            targets=["c_attn"],
            fan_in_fan_out=True,
        ),
        {},
    ),
    "qwen3-dora": (
        lambda: with_lora(tiny_model("qwen3"), use_dora=True),
        {"Qwen3RMSNorm": 9, "Qwen3MLP": 2},
    ),
}


def replaced_in(model):
    """How many modules of each class have another forward inside."""
    counts = {}
    with dual_layers.dual_layers(model.eval()):
        for module in model.modules():
            if "forward" in vars(module):
                counts[type(module).__name__] = counts.get(type(module).__name__, 0) + 1
    return counts


@pytest.mark.parametrize("name", MODELS)
def test_utilities_of_every_family(name):
    model, replaced = MODELS[name][0](), MODELS[name][1]
    assert replaced_in(model) == replaced
    direction = random_direction(trainable_parameters(model))
    inputs = packed_batch() if name in ("gemma2", "llama-lora") else padded_batch(side="left")
    exact = exact_utilities(model, inputs, direction)
    assert exact.abs().max() > 0.1
    double = copy.deepcopy(model).double()
    with LiftedCasts():
        utility = token_utilities(double, inputs, {n: g.double() for n, g in direction.items()})
    torch.testing.assert_close(utility, exact)


@pytest.mark.parametrize("name", ["qwen3", "gemma3", "llama-lora"])
@pytest.mark.parametrize("precision", ["autocast", "bf16", "bf16 under fp32 adapters", "fp16"])
def test_losses_are_those_of_a_plain_pass(name, precision):
    model = MODELS[name][0]().eval()
    if precision == "fp16":
        model.half()
    elif precision != "autocast":
        for parameter_name, parameter in model.named_parameters():
            if "lora" not in parameter_name or precision == "bf16":
                parameter.data = parameter.data.bfloat16()
    inputs = padded_batch()
    direction = random_direction(trainable_parameters(model))
    with torch.autocast("cpu", torch.bfloat16, precision == "autocast"):
        dual = token_utilities_and_nll(model, inputs, direction)
        with torch.no_grad():
            plain = token_nll(model, inputs)
    torch.testing.assert_close(dual.nll, plain, rtol=0.05, atol=0.05)


class Clamped(torch.nn.Module):
    """Looks like a gated MLP."""

    def __init__(self, mlp, limit):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn, self.limit = mlp.act_fn, limit

    def forward(self, x):
        gate = self.gate_proj(x).clamp(max=self.limit)
        return self.down_proj(self.act_fn(gate) * self.up_proj(x))


class ShiftedRMSNorm(torch.nn.Module):
    """Named and made like an RMSNorm."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.variance_epsilon = norm.weight, norm.variance_epsilon

    def forward(self, x):
        x = x - x.mean(-1, keepdim=True)
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


def two_adapters():
    model = with_lora(tiny_model("qwen3"))
    model.add_adapter("second", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if "second" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.base_model.set_adapter(["default", "second"])
    return model


@pytest.mark.parametrize(
    "build",
    [
        lambda: with_lora(tiny_model("qwen3"), use_dora=True),  # its norm is a constant to both
        lambda: with_lora(tiny_model("qwen3"), use_rslora=True, bias="all"),
        lambda: with_lora(tiny_model("qwen3"), lora_bias=True),
        lambda: with_lora(tiny_model("llama"), modules_to_save=["lm_head"]),
        lambda: with_lora(tiny_model("llama"), targets=["q_proj", "lm_head", "embed_tokens"]),
        two_adapters,
    ],
    ids=[
        "dora",
        "rslora, bias",
        "lora_bias",
        "modules_to_save",
        "head, embeddings",
        "two adapters",
    ],
)
def test_variants_of_lora_agree_with_their_gradients(build):
    """``sum w_t * <g, grad l_t>`` is ``<g, grad sum w_t * l_t>``."""
    model, batch = build().double().eval(), padded_batch()
    parameters = trainable_parameters(model)
    generator = torch.Generator().manual_seed(1)
    g = {
        name: torch.randn(p.shape, generator=generator, dtype=p.dtype)
        for name, p in parameters.items()
    }
    utility = token_utilities(model, batch, g)
    weights = torch.randn(utility.shape, generator=generator, dtype=torch.float64)
    gradients = torch.autograd.grad(
        (weights * token_nll(model, batch)).sum(), list(parameters.values()), allow_unused=True
    )
    products = [
        (g[name] * gradient).sum()
        for name, gradient in zip(parameters, gradients, strict=True)
        if gradient is not None
    ]
    # transformers casts to fp32 inside
    scale = float(torch.stack([product.abs() for product in products]).sum())
    assert float((weights * utility).sum()) == pytest.approx(float(sum(products)), abs=1e-5 * scale)


def test_what_only_looks_alike_is_left_alone():
    model = tiny_model("qwen3")
    first, second = model.model.layers
    first.mlp = Clamped(first.mlp, 2.0)
    second.mlp = Clamped(second.mlp, float("inf"))  # as good as the real one
    model.model.norm = ShiftedRMSNorm(model.model.norm)
    second.mlp.act_fn = torch.nn.Mish()
    assert replaced_in(model) == {"Qwen3RMSNorm": 8}
    second.mlp.act_fn = torch.nn.SiLU()
    assert replaced_in(model) == {"Qwen3RMSNorm": 8, "Clamped": 1}
    direction = random_direction(trainable_parameters(model))
    exact = exact_utilities(model, padded_batch(), direction)
    utility = token_utilities(model, padded_batch(), direction)
    torch.testing.assert_close(utility, exact.float(), rtol=1e-3, atol=1e-4)


def test_another_forward_on_the_class_is_seen(monkeypatch):
    model = tiny_model("qwen3")
    assert replaced_in(model)["Qwen3MLP"] == 2
    mlp = type(model.model.layers[0].mlp)
    own = mlp.forward
    monkeypatch.setattr(mlp, "forward", lambda self, x: 2 * own(self, x))
    assert replaced_in(model) == {"Qwen3RMSNorm": 9}


def test_hooks_and_own_forwards_stay():
    model = with_lora(tiny_model("llama"), targets=("q_proj",))
    layers = model.get_base_model().model.layers
    seen = []
    layers[0].mlp.act_fn.register_forward_hook(lambda *_: seen.append("act"))
    layers[0].input_layernorm.register_forward_pre_hook(lambda *_: seen.append("norm"))
    layers[0].self_attn.q_proj.lora_A["default"].register_forward_hook(
        lambda *_: seen.append("lora")
    )
    layers[1].self_attn.q_proj.base_layer.register_forward_hook(lambda *_: seen.append("base"))
    norm = layers[1].post_attention_layernorm
    own = norm.forward
    norm.forward = lambda x: (seen.append("own"), own(x))[1]
    assert replaced_in(model) == {"LlamaRMSNorm": 4, "LlamaMLP": 1}  # one has its own
    assert not seen
    direction = random_direction(trainable_parameters(model))
    token_utilities(model, padded_batch(), direction)
    assert set(seen) == {"act", "norm", "lora", "base", "own"}
    assert "forward" in vars(norm)


@pytest.mark.parametrize("fails", [False, True])
def test_no_trace(fails):
    model = with_lora(tiny_model("qwen3"))
    direction = random_direction(trainable_parameters(model))
    handle = None
    if fails:
        handle = model.get_base_model().model.layers[1].register_forward_pre_hook(fail)
    before = [list(vars(m)) for m in model.modules()]
    with pytest.raises(KeyError) if fails else nullcontext():
        token_utilities(model, padded_batch(), direction)
    assert [list(vars(m)) for m in model.modules()] == before
    assert handle is None or not torch.overrides._get_current_function_mode_stack()


def fail(module, args):
    raise KeyError("in the middle")


# ---- nothing is paid for what does not move ----


def dual_calls(model, direction, monkeypatch):
    """Calls of dual_ops with a tangent in the pass, and the decoder layers that gave one out."""
    calls, layers = [], set()
    for name in ("linear", "low_rank_update", "rms_norm", "gated"):
        own = getattr(dual_ops, name)

        def counted(*args, _own=own, _name=name, **kwargs):
            if any(dual_ops.has_tangent(x) for x in args if isinstance(x, torch.Tensor)):
                calls.append(_name)
            return _own(*args, **kwargs)

        monkeypatch.setattr(dual_ops, name, counted)

    def look(module, args, out):
        if dual_ops.has_tangent(out):
            layers.add(module.self_attn.layer_idx)

    handles = [layer.register_forward_hook(look) for layer in model.model.layers]
    token_utilities(model, padded_batch(), direction)
    for handle in handles:
        handle.remove()
    monkeypatch.undo()
    return calls, layers


def test_layers_before_the_first_that_moves_are_plain(monkeypatch):
    model = tiny_model("qwen3", num_hidden_layers=4)
    everything = random_direction(trainable_parameters(model))
    calls, layers = dual_calls(model, everything, monkeypatch)
    assert layers == {0, 1, 2, 3}
    assert calls.count("linear") == 7 * 4
    last = {n: g for n, g in everything.items() if ".layers.3." in n}
    calls, layers = dual_calls(model, last, monkeypatch)
    assert layers == {3}
    assert calls.count("linear") == 7
    assert calls.count("rms_norm") == 5  # four of the layer and the last
    zeros = {n: torch.zeros_like(g) for n, g in everything.items() if n not in last}
    assert dual_calls(model, last | zeros, monkeypatch) == (calls, layers)
    head = {"model.norm.weight": everything["model.norm.weight"]}
    assert dual_calls(model, head, monkeypatch) == (["rms_norm"], set())


def test_a_direction_of_zeros_beside_a_moving_one_changes_nothing():
    model = tiny_model("llama")
    direction = random_direction(trainable_parameters(model))
    some = {n: g for n, g in direction.items() if "mlp" in n}
    rest = {n: torch.zeros_like(g) for n, g in direction.items() if n not in some}
    tiny = {n: torch.full_like(g, 1e-42) for n, g in rest.items()}  # not zero, and no trouble
    utility = token_utilities(model, padded_batch(), some)
    assert torch.equal(token_utilities(model, padded_batch(), some | rest), utility)
    torch.testing.assert_close(token_utilities(model, padded_batch(), some | tiny), utility)


def test_the_log_says_what_was_replaced(caplog):
    model = tiny_model("qwen3")
    model.model.norm.register_forward_hook(lambda *_: None)
    with caplog.at_level(logging.DEBUG, "vcore_train"):
        replaced_in(model)
    assert "'Qwen3RMSNorm': 8" in caplog.text
    assert "'Qwen3RMSNorm, left alone': 1" in caplog.text


def matches_pytorch(model, monkeypatch):
    direction = random_direction(trainable_parameters(model))
    utility = token_utilities(model, padded_batch(), direction)
    monkeypatch.setattr(utilities, "dual_layers", lambda model: nullcontext())
    expected = token_utilities(model, padded_batch(), direction)
    torch.testing.assert_close(utility, expected, rtol=1e-4, atol=1e-4)


def test_a_compiled_module_keeps_its_tangents(monkeypatch):
    model = tiny_model("qwen3")
    model.model.layers[0].mlp.compile(backend="eager")
    model.model.norm.compile(backend="eager")
    matches_pytorch(model, monkeypatch)


class ConditionedRMSNorm(torch.nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, 1e-6

    def forward(self, x, factor):
        return factor * self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Called(torch.nn.Module):
    """``inner`` with other arguments than one tensor in its place."""

    def __init__(self, inner, call):
        super().__init__()
        self.inner, self.call = inner, call

    def forward(self, x):
        return self.call(self.inner, x)


def test_other_signatures_and_keywords(monkeypatch):
    model = tiny_model("qwen3")
    layers, norm = model.model.layers, model.model.norm
    model.model.norm = Called(ConditionedRMSNorm(norm), lambda norm, x: norm(x, 2.0))
    layers[0].input_layernorm = Called(
        layers[0].input_layernorm, lambda norm, x: norm(hidden_states=x)
    )
    layers[0].mlp.up_proj = Called(
        layers[0].mlp.up_proj,
        lambda linear, x: torch.nn.functional.linear(input=x, weight=linear.weight),
    )
    matches_pytorch(model, monkeypatch)


@pytest.mark.parametrize("limit", [7.0, 448.0])
def test_a_clamp_that_only_outliers_reach_is_seen(limit):
    model = tiny_model("qwen3", initializer_range=0.02)
    for layer in model.model.layers:
        layer.mlp = Clamped(layer.mlp, limit)
    assert replaced_in(model) == {"Qwen3RMSNorm": 9}


def test_an_activation_exchanged_later_is_seen():
    model = tiny_model("qwen3")
    assert replaced_in(model)["Qwen3MLP"] == 2
    model.model.layers[0].mlp.act_fn = torch.nn.Tanh()
    assert replaced_in(model)["Qwen3MLP"] == 1


def test_an_output_of_zeros_proves_nothing():
    model = tiny_model("qwen3")
    mlp = model.model.layers[0].mlp
    torch.nn.init.zeros_(mlp.down_proj.weight)
    assert replaced_in(model)["Qwen3MLP"] == 1


def test_a_module_that_stands_in_the_model_twice_is_put_back():
    model = with_lora(tiny_model("qwen3"), trainable_token_indices=[5, 6, 7])  # of both uses
    before = dict(model.named_parameters(remove_duplicate=False))
    direction = random_direction(trainable_parameters(model))
    utility = token_utilities(model, padded_batch(), direction)
    central = token_utilities(model, padded_batch(), direction, method="central")
    after = dict(model.named_parameters(remove_duplicate=False))
    assert all(after[name] is parameter for name, parameter in before.items())
    exact = exact_utilities(model, padded_batch(), direction)
    torch.testing.assert_close(utility, exact.float(), rtol=1e-3, atol=1e-4)
    assert torch.corrcoef(torch.stack([central.flatten(), utility.flatten()]))[0, 1] > 0.999
