"""modeling: hidden states, heads, per-token losses, and a probing mode that leaves no trace."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from tiny import packed_batch, padded_batch, tiny_model, unpacked, with_lora
from vcore_train.head_check import verify_head
from vcore_train.modeling import (
    check_packing,
    head_of,
    hidden_states,
    probing,
    supervised_labels,
    token_nll,
    trainable_parameters,
)


def nll_of_own_logits(model, inputs):
    """Losses from the logits that the model itself computes."""
    inputs = {k: v for k, v in inputs.items() if k != "labels"} | {
        "labels": supervised_labels(inputs)
    }
    logits = model(**{k: v for k, v in inputs.items() if k != "labels"}).logits.float()
    labels = inputs["labels"]
    nll = F.cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none", ignore_index=-100
    )
    return F.pad(nll.view(labels.shape[0], -1), (1, 0))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("model_type", ["qwen3", "llama", "gemma2"])
def test_token_nll_is_that_of_the_models_own_logits(model_type, side):
    model = tiny_model(model_type).eval()
    inputs = padded_batch(side=side)
    torch.testing.assert_close(token_nll(model, inputs), nll_of_own_logits(model, inputs))


SCALED = {
    "cohere": {"logit_scale": 0.25},
    "cohere2": {"logit_scale": 0.25, "sliding_window": 4},
    "granite": {"logits_scaling": 3.0},
    "granitemoe": {"logits_scaling": 3.0, "num_local_experts": 4, "num_experts_per_tok": 2},
    "gemma3_text": {"final_logit_softcapping": 4.0, "sliding_window": 4},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "hyperclovax": {"logits_scaling": 0.5},
    "gpt_neox": {},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "logit_scale": 0.5},
    "phi": {},
}


@pytest.mark.parametrize("model_type", SCALED)
def test_every_architectures_head_is_its_own(model_type):
    model = tiny_model(model_type, **SCALED[model_type]).eval()
    verify_head(model)
    inputs = padded_batch()
    torch.testing.assert_close(token_nll(model, inputs), nll_of_own_logits(model, inputs))


def test_an_unknown_logit_rule_is_an_error():
    model = tiny_model("qwen3")
    model.get_output_embeddings().register_forward_hook(lambda module, args, out: out * 0.5)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM does not form its logits"):
        verify_head(model)


def test_weights_that_are_not_finite_are_named():
    model = tiny_model("qwen3")
    model.model.norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM gives NaN.*not finite"):
        verify_head(model)


@pytest.mark.parametrize(
    ("model_type", "attention"), [("qwen3", "sdpa"), ("qwen3", "eager"), ("gemma2", "eager")]
)
def test_packed_equals_padded(model_type, attention):
    lengths = (9, 5, 7)
    model = tiny_model(model_type, attention=attention).eval()
    expected = token_nll(model, padded_batch(lengths))
    packed = packed_batch(lengths)
    torch.testing.assert_close(unpacked(token_nll(model, packed), lengths), expected)
    without_positions = {k: v for k, v in packed.items() if k != "position_ids"}
    torch.testing.assert_close(unpacked(token_nll(model, without_positions), lengths), expected)


@pytest.mark.parametrize(
    ("boundaries", "message"),
    [
        ([2, 9, 21], "must rise from 0"),
        ([], "must rise from 0"),
        ([0, 12, 21], "cuts a trajectory at token 7"),
    ],
)
def test_boundaries_that_leave_tokens_out_or_join_rows(boundaries, message):
    inputs = padded_batch((7, 7, 7))
    del inputs["attention_mask"]
    check_packing({**inputs, "cu_seq_lens_q": torch.tensor([0, 3, 7, 14, 21])})
    with pytest.raises(ValueError, match=message):
        check_packing({**inputs, "cu_seq_lens_q": torch.tensor(boundaries)})


def test_first_tokens_are_never_supervised():
    inputs = packed_batch((4, 3))
    inputs["labels"] = inputs["input_ids"].clone()
    starts = [True, False, False, False, True, False, False]
    assert (supervised_labels(inputs)[0] == -100).tolist() == starts
    for key in ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"):
        del inputs[key]
    assert (supervised_labels(inputs)[0] == -100).tolist() == starts
    model = tiny_model("qwen3").eval()
    assert (token_nll(model, inputs)[0] == 0).tolist() == starts
    with pytest.raises(ValueError, match="the batch has no labels"):
        token_nll(model, {"input_ids": inputs["input_ids"]})


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("lora_bias", [True, False])
def test_lora_on_the_head(tied, lora_bias):
    base = tiny_model("qwen3", tie_word_embeddings=tied)
    model = with_lora(base, targets=("q_proj", "lm_head"), lora_bias=lora_bias)
    inputs = padded_batch()
    nll, expected = token_nll(model, inputs), nll_of_own_logits(model, inputs)
    torch.testing.assert_close(nll, expected)
    parameters = trainable_parameters(model)
    weights = torch.rand(nll.shape)
    got = torch.autograd.grad((weights * nll).sum(), list(parameters.values()))
    want = torch.autograd.grad((weights * expected).sum(), list(parameters.values()))
    for name, a, b in zip(parameters, got, want, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    assert any("lm_head.lora_A" in name for name in parameters)


def test_a_head_adapter_over_bf16_weights_is_not_rounded_away():
    base = tiny_model("llama", dtype=torch.bfloat16)
    model = with_lora(base, targets=("lm_head",)).eval()
    inputs = padded_batch()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(1e-4)  # far below what bf16 can add to the weight
    small = token_nll(model, inputs)
    with model.disable_adapter():
        without = token_nll(model, inputs)
    double = copy.deepcopy(model).double()
    hidden = hidden_states(model, inputs).double()
    logits = hidden @ head_of(double).weight.T  # the decoder in bf16, the head in float64
    labels = supervised_labels(inputs)[:, 1:].flatten()
    exact = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels, reduction="none")
    exact = F.pad(exact.view(3, -1), (1, 0))
    change = (small - without).double()
    assert 0 < change.abs().max() < 1e-3
    torch.testing.assert_close(small.double(), exact, rtol=1e-6, atol=1e-6)


def test_dropout_of_a_head_adapter_is_the_models_own():
    model = with_lora(tiny_model("qwen3"), targets=("lm_head",), lora_dropout=0.5)
    inputs = padded_batch()
    torch.manual_seed(1)
    expected = nll_of_own_logits(model, inputs)
    torch.manual_seed(1)
    torch.testing.assert_close(token_nll(model, inputs), expected)


def test_a_disabled_head_adapter_and_modules_to_save():
    inputs = padded_batch()
    model = with_lora(tiny_model("llama"), targets=("q_proj", "lm_head")).eval()
    with model.disable_adapter():
        torch.testing.assert_close(token_nll(model, inputs), nll_of_own_logits(model, inputs))
    model = with_lora(tiny_model("llama"), targets=("q_proj",), modules_to_save=["lm_head"]).eval()
    saved = [p for n, p in model.named_parameters() if "modules_to_save" in n]
    torch.nn.init.normal_(saved[0])
    torch.testing.assert_close(token_nll(model, inputs), nll_of_own_logits(model, inputs))
    assert head_of(model).weight is saved[0]


def test_heads_that_cannot_be_served():
    with pytest.raises(ValueError, match="LoRA variant"):
        head_of(with_lora(tiny_model("llama"), targets=("lm_head",), use_dora=True))
    model = tiny_model("llama")
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().to(torch.uint8), requires_grad=False)
    with pytest.raises(ValueError, match="quantised"):
        head_of(model)
    with pytest.raises(TypeError, match="PreTrainedModel"):
        head_of(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no output head"):
        hidden_states(tiny_model("qwen3").model, padded_batch())


def test_trainable_parameters_names_tied_ones_once():
    model = tiny_model("qwen3", tie_word_embeddings=True)
    names = trainable_parameters(model)
    assert "model.embed_tokens.weight" in names
    assert "lm_head.weight" not in names
    model.model.norm.weight.requires_grad_(False)
    assert "model.norm.weight" not in trainable_parameters(model)


def state_of(model):
    return (
        [m.training for m in model.modules()],
        [copy.deepcopy(vars(m.config)) for m in model.modules() if hasattr(m, "config")],
        [
            {k: v for k, v in vars(m).items() if isinstance(v, int | float | str)}
            for m in model.modules()
        ],
        [p.requires_grad for p in model.parameters()],
        torch.get_rng_state().tolist(),
        torch.is_autocast_cache_enabled(),
    )


@pytest.mark.parametrize("fails", [True, False])
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flash_attention_2"])
def test_probing_leaves_no_trace(attention, fails):
    model = tiny_model("llama")
    model.config._attn_implementation = attention  # as a model loaded with it has
    model.gradient_checkpointing_enable()
    model.model.layers[0].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = state_of(model)
    try:
        with probing(model):
            assert model.config._attn_implementation == "eager"
            assert not any(m.training for m in model.modules())
            torch.rand(3)
            if fails:
                raise KeyError("probe")
    except KeyError:
        assert fails
    assert state_of(model) == before


def test_probing_switches_experts_and_back():
    model = tiny_model("qwen3_moe", **SCALED["qwen3_moe"])
    before = model.config._experts_implementation
    assert before != "eager"
    with probing(model):
        assert model.config._experts_implementation == "eager"
    assert model.config._experts_implementation == before
    with probing(model, attention=None):
        assert model.config._experts_implementation == before


def test_probing_makes_passes_deterministic_and_equal_to_eval():
    model = with_lora(tiny_model("llama"), lora_dropout=0.5)
    inputs = padded_batch()
    with torch.no_grad():
        noisy = token_nll(model, inputs)
        with probing(model):
            probed = token_nll(model, inputs)
        torch.testing.assert_close(probed, token_nll(model.eval(), inputs))
    assert not torch.allclose(noisy, probed)


def test_checkpointing_survives_without_dropout_when_asked():
    model = tiny_model("bloom", hidden_dropout=0.5, attention_dropout=0.5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    layer = model.transformer.h[0]
    calls = []
    checkpoint = layer._gradient_checkpointing_func
    layer._gradient_checkpointing_func = functools.partial(
        lambda *args, **kwargs: calls.append(1) or checkpoint(*args), use_reentrant=False
    )
    inputs = padded_batch()
    before = state_of(model)
    with probing(model, attention=None, checkpointing=True):
        checkpointed = token_nll(model, inputs)
    assert len(calls) == 1
    assert state_of(model) == before
    torch.testing.assert_close(checkpointed, token_nll(model.eval(), inputs))


def test_a_probe_under_autocast_does_not_cost_the_next_pass_its_gradient():
    model = tiny_model("qwen3")
    inputs = padded_batch()
    with torch.autocast("cpu", torch.bfloat16):
        with torch.no_grad(), probing(model):
            token_nll(model, inputs)
        loss = token_nll(model, inputs).sum()
    gradients = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    assert all(g is not None and g.abs().sum() > 0 for g in gradients)
