"""The registered attention with a forward derivative, in models of many architectures."""

import logging

import pytest
import torch
import torch.autograd.forward_ad as fwAD
from exact import random_direction
from tiny import packed_batch, padded_batch, tiny_model, unpacked, with_lora
from transformers import masking_utils
from vcore_train import attention
from vcore_train.attention import NAME, VisibleKeys
from vcore_train.modeling import token_nll, trainable_parameters
from vcore_train.utilities import token_utilities

from vcore_kernels import backends

BATCHES = {
    "left": lambda: padded_batch(side="left"),
    "right": padded_batch,
    "whole": lambda: padded_batch((8, 8)),
    "packed": packed_batch,
}
MODELS = ["qwen3", "llama", "mistral", "gemma2", "gemma3_text", "phi3"]


@pytest.fixture
def calls(monkeypatch):
    """How often the kernel and the formula with a dense mask were called."""
    counts = {"kernel": 0, "dense": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        return call

    monkeypatch.setattr(attention, "attention_jvp", counted("kernel", attention.attention_jvp))
    monkeypatch.setattr(
        attention, "dense_attention_jvp", counted("dense", attention.dense_attention_jvp)
    )
    return counts


def with_eager_attention(model, inputs, direction):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "serves", lambda lm: False)
        return token_utilities(model, inputs, direction)


def same(value, expected, rtol=1e-5):
    scale = float(expected.abs().max())
    assert scale > 0
    torch.testing.assert_close(value, expected, rtol=rtol, atol=rtol * scale)


def implementations(model):
    return [vars(m.config).copy() for m in model.modules() if hasattr(m, "config")]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_utilities_are_those_of_eager_attention(name, batch, lora, calls):
    model, inputs = tiny_model(name), BATCHES[batch]()
    if lora:
        targets = ("qkv_proj", "down_proj") if name == "phi3" else ("q_proj", "v_proj", "down_proj")
        model = with_lora(model, targets=targets)
    direction = random_direction(trainable_parameters(model))
    before = implementations(model)
    utility = token_utilities(model, inputs, direction)
    assert calls == {"kernel": 2, "dense": 0}  # one a layer
    assert implementations(model) == before
    same(utility, with_eager_attention(model, inputs, direction))
    assert calls["kernel"] == 2


@pytest.mark.parametrize("name", MODELS)
def test_padding_on_the_left_is_not_seen(name):
    """A mask that does not arrive changes every utility of a left-padded batch."""
    lengths, model = (9, 5, 7), tiny_model(name)
    direction = random_direction(trainable_parameters(model))
    padded = token_utilities(model, padded_batch(lengths, side="left"), direction)
    alone = token_utilities(model, padded_batch(lengths), direction)
    packed = unpacked(token_utilities(model, packed_batch(lengths), direction), lengths)
    for row, n in enumerate(lengths):
        same(padded[row, 9 - n :], alone[row, :n], 1e-4)
        same(packed[row, :n], alone[row, :n], 1e-4)


def test_segments_in_several_rows(calls):
    model, inputs = tiny_model("mistral"), padded_batch((12, 12))
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.tensor([[*range(5), *range(7)], [*range(12)]])
    direction = random_direction(trainable_parameters(model))
    utility = token_utilities(model, inputs, direction)
    assert calls == {"kernel": 2, "dense": 0}
    same(utility, with_eager_attention(model, inputs, direction))


@pytest.mark.parametrize("additive", [False, True])
def test_a_mask_of_any_other_form(additive, calls):
    """Prompt tokens that see each other both ways."""
    model, inputs = tiny_model("llama"), padded_batch((9, 9))
    visible = torch.ones(9, 9, dtype=torch.bool).tril()
    visible[:3, :3] = True
    mask = visible.expand(2, 1, 9, 9)
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(2, 1, 9, 9).masked_fill(~mask, lowest)
    direction = random_direction(trainable_parameters(model))
    given = inputs | {"attention_mask": added if additive else mask}
    utility = token_utilities(model, given, direction)
    assert calls == {"kernel": 0, "dense": 2}
    inputs["attention_mask"] = added  # what eager attention can take
    same(utility, with_eager_attention(model, inputs, direction))


def test_autocast_is_as_exact_as_with_eager_attention():
    errors = torch.zeros(2)
    for seed in range(6):  # one error is chance
        model, inputs = tiny_model("qwen3", seed=seed), padded_batch(side="left", seed=seed)
        direction = random_direction(trainable_parameters(model), seed=seed)
        exact = token_utilities(model, inputs, direction)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = token_utilities(model, inputs, direction)
            rival = with_eager_attention(model, inputs, direction)
        errors += torch.stack([(mixed - exact).norm(), (rival - exact).norm()])
    assert errors[0] <= 1.2 * errors[1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights(dtype):
    model, inputs = tiny_model("qwen3"), padded_batch(side="left")
    direction = random_direction(trainable_parameters(model))
    exact = token_utilities(model, inputs, direction)
    direction = {n: g.to(dtype) for n, g in direction.items()}
    utility = token_utilities(model.to(dtype), inputs, direction)
    assert torch.corrcoef(torch.stack([utility.flatten(), exact.flatten()]))[0, 1] > 0.999


# ---- what it does not compute ----


def test_attention_sinks_fall_back_to_eager_attention(calls, caplog):
    options = {"num_local_experts": 2, "num_experts_per_tok": 1}
    model, inputs = tiny_model("gpt_oss", **options), padded_batch()
    direction = random_direction(trainable_parameters(model))
    before = implementations(model)
    with caplog.at_level(logging.INFO, logger="vcore_train"):
        first = token_utilities(model, inputs, direction)
        second = token_utilities(model, inputs, direction)
    assert [r.message for r in caplog.records if "s_aux" in r.message] == [
        "token_utilities: GptOssAttention passes s_aux to its attention, which 'vcore_jvp' does "
        "not know. Eager attention serves this model."
    ]
    assert calls == {"kernel": 0, "dense": 0}
    assert implementations(model) == before
    assert torch.equal(first, second)
    assert torch.equal(first, with_eager_attention(model, inputs, direction))


def test_dropout_under_a_tangent_is_refused():
    q, k, v = torch.randn(3, 1, 2, 4, 8)
    with fwAD.dual_level():
        q = fwAD.make_dual(q, torch.ones_like(q))
        with pytest.raises(attention.AttentionUnsupportedError, match=r"applies dropout 0\.5"):
            attention._attention(torch.nn.Identity(), q, k, v, None, dropout=0.5)


# ---- in place of the model's own attention ----


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_without_a_tangent_it_is_the_usual_attention(name, batch):
    """Values and gradients of a model loaded with it."""
    inputs = BATCHES[batch]()
    expected_model = tiny_model(name, attention="eager").eval()
    model = tiny_model(name, attention=NAME).eval()
    assert model.config._attn_implementation == NAME
    expected, nll = token_nll(expected_model, inputs), token_nll(model, inputs)
    torch.testing.assert_close(nll, expected, rtol=1e-5, atol=1e-5)
    for one, other in zip(
        torch.autograd.grad(nll.sum(), list(model.parameters())),
        torch.autograd.grad(expected.sum(), list(expected_model.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_model_loaded_with_it_trains_and_generates():
    model = tiny_model("gemma2", attention=NAME)
    model.gradient_checkpointing_enable()
    token_nll(model, padded_batch(side="left")).sum().backward()  # with dropout
    assert all(p.grad is not None for p in model.parameters())
    model.eval()
    prompt = padded_batch((6,))["input_ids"]
    expected = tiny_model("gemma2", attention="eager").eval()
    for cache in (None, "static"):
        options = {"max_new_tokens": 5, "do_sample": False, "cache_implementation": cache}
        assert torch.equal(model.generate(prompt, **options), expected.generate(prompt, **options))


def test_torch_func_jvp_goes_through():
    model, inputs = tiny_model("mistral", attention=NAME).eval(), padded_batch(side="left")
    parameters = {n: p.detach() for n, p in model.named_parameters()}
    direction = random_direction(parameters)

    def losses(parameters):
        inner = {f"model.{n}": p for n, p in parameters.items()}

        class Wrapped(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.model = model

            def forward(self):
                return token_nll(self.model, inputs)

        return torch.func.functional_call(Wrapped(), inner, ())

    _, tangent = torch.func.jvp(losses, (parameters,), (direction,))
    same(tangent, token_utilities(model, inputs, direction))


# ---- masks ----

B, T = 2, 11
POSITIONS = torch.tensor([[*range(4), *range(7)], [*range(11)]])
SEGMENTS = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])


def packed(mask_function):
    """As transformers makes the mask of a packed batch; before 5.24 in one function."""
    at_once = getattr(masking_utils, "packed_sequence_compatibility_function", None)
    if at_once is not None:
        return at_once(mask_function, POSITIONS, SEGMENTS)
    remapped = masking_utils.remap_positions_for_packed_sequence(mask_function, POSITIONS)
    segments = masking_utils.packed_sequence_mask_function(SEGMENTS)
    return masking_utils.and_masks(remapped, segments)


def mask_case(name):
    causal, window = masking_utils.causal_mask_function, None
    padding = None
    skip = True
    if name in ("window", "padded window", "packed window"):
        window = 3
        causal = masking_utils.sliding_window_causal_mask_function(3)
    if name == "chunked":
        window = 3
        causal = masking_utils.chunked_causal_mask_function(3, torch.tensor([0, 2]))
    if name in ("padded", "padded window"):
        padding = torch.arange(T) >= torch.tensor([[0], [4]])
    if name in ("packed", "packed window"):
        skip = False
        causal = packed(causal)
    if name == "blocks":  # images that see themselves both ways
        skip = False
        blocks = masking_utils.blockwise_overlay(torch.tensor([[-1, 0, 0, 0] + [-1] * 7] * B))
        causal = masking_utils.or_masks(causal, blocks)
    if name == "bidirectional":
        skip = False
        causal = masking_utils.bidirectional_mask_function
    return {
        "batch_size": B,
        "q_length": T,
        "kv_length": T,
        "mask_function": causal,
        "attention_mask": padding,
        "local_size": window,
        "allow_is_causal_skip": skip,
    }


@pytest.mark.parametrize("rows", [256, 4])
@pytest.mark.parametrize(
    ("name", "compact"),
    [
        ("causal", True),
        ("padded", True),
        ("window", True),
        ("padded window", True),
        ("packed", True),
        ("packed window", True),
        ("chunked", False),
        ("blocks", False),
        ("bidirectional", False),
    ],
)
def test_masks(name, compact, rows, monkeypatch):
    monkeypatch.setattr(attention, "_MASK_ROWS", rows)
    case = mask_case(name)
    mask = attention._mask(**case)
    assert isinstance(mask, VisibleKeys) == compact
    expected = masking_utils.sdpa_mask(**case | {"allow_is_causal_skip": False})
    if not compact:
        assert torch.equal(mask, expected)
    elif name == "causal":
        assert mask.dense is None
    else:
        assert torch.equal(mask.dense.expand(B, 1, T, T), expected)


def test_a_cache_has_a_mask_of_any_form():
    case = mask_case("causal") | {"q_length": 2, "q_offset": T - 2}
    assert torch.equal(attention._mask(**case), masking_utils.sdpa_mask(**case))


def test_the_backend_is_the_fast_one():
    model, inputs = tiny_model("llama"), padded_batch()
    token_utilities(model, inputs, random_direction(trainable_parameters(model)))
    expected = "cpp" if backends()["cpp"] else "reference"
    assert last_used_backend() == expected


def last_used_backend():
    from vcore_kernels.backends import last_used

    return last_used["attention_jvp"]
