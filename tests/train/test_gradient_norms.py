"""Norms of each response's gradient against a loop over responses in float64."""

import copy

import pytest
import torch
import vcore_train.sequences
from exact import LiftedCasts, double_copy, exact_nll
from tiny import packed_batch, padded_batch, tiny_model, with_lora
from torch import nn
from vcore_train import sequence_grad_norms
from vcore_train.modeling import causal_lm, decoder_of, segment_starts

LENGTHS = (9, 5, 7)
LONG = (33, 2, 20)  # long enough for the direct product to be the cheaper way
BATCHES = {
    "left": lambda: padded_batch(LENGTHS, side="left"),
    "right": lambda: padded_batch(LONG),
    "packed": lambda: packed_batch(LENGTHS),
    "packed-long": lambda: packed_batch(LONG),
}
MODELS = {
    "qwen3": lambda: tiny_model("qwen3"),
    "qwen3-untied": lambda: tiny_model("qwen3", tie_word_embeddings=False),
    "llama": lambda: tiny_model("llama"),
    "gemma2": lambda: tiny_model("gemma2"),
    "gemma3": lambda: tiny_model("gemma3_text"),
    "phi": lambda: tiny_model("phi", hidden_act="gelu"),
    "qwen3-lora": lambda: with_lora(tiny_model("qwen3"), lora_dropout=0.5),
    "llama-lora-head": lambda: with_lora(
        tiny_model("llama"), targets=("q_proj", "down_proj", "lm_head"), bias="lora_only"
    ),
    "qwen3-lora-tied-head": lambda: with_lora(
        tiny_model("qwen3"), targets=("q_proj", "lm_head", "embed_tokens")
    ),
}
CHOICES = ("embeddings", "lm_head", "all-linear")


def names_of(model, params):
    """What the three choices mean, by another way than that of the library."""
    lm = causal_lm(model)
    head = next(m for name, m in lm.named_modules() if name in ("lm_head", "embed_out"))
    inside = set(head.modules())
    names = []
    for prefix, module in model.named_modules():
        if params == "embeddings":
            wanted = isinstance(module, nn.Embedding)
        elif params == "lm_head":
            wanted = module in inside and isinstance(module, nn.Linear) and "lora" not in prefix
        else:
            wanted = isinstance(module, nn.Linear) and module not in inside
        own = [name for name, _ in module.named_parameters(recurse=False)] if wanted else []
        names += [f"{prefix}.{n}" for n in own if n == "weight" or params == "all-linear"]
    assert names
    return names


def loop(model, inputs, *choices):
    """By a backward pass for each response through the model's own logits, in float64.

    Norms [responses] for each of ``choices``, lists of names.
    """
    model = double_copy(model)
    named = dict(model.named_parameters(remove_duplicate=False))
    chosen = [list({named[name]: name for name in names}) for names in choices]
    model.requires_grad_(False)
    everything = list({parameter: 0 for parameters in chosen for parameter in parameters})
    for parameter in everything:
        parameter.requires_grad_()
    nll = exact_nll(model, inputs)
    response = (segment_starts(inputs).flatten().cumsum(0) - 1).view(nll.shape)
    squares = []
    for i in range(int(response.max()) + 1):
        grads = torch.autograd.grad(
            nll[response == i].sum(), everything, retain_graph=True, allow_unused=True
        )
        square = {
            p: 0 if g is None else g.square().sum() for p, g in zip(everything, grads, strict=True)
        }
        squares.append([sum(square[p] for p in parameters) for parameters in chosen])
    return torch.tensor(squares, dtype=torch.float64).sqrt().T


def check(model, inputs, *choices, truth=None):
    """Each of ``choices`` (what ``params`` takes) in float32 and float64."""
    if truth is None:
        truth = loop(model, inputs, *choices)
    double = double_copy(model)
    for params, expected in zip(choices, truth, strict=True):
        norms = sequence_grad_norms(model, inputs, params=params)
        assert norms.dtype == torch.float32
        torch.testing.assert_close(norms.double(), expected, rtol=1e-5, atol=0)
        with LiftedCasts():
            norms = sequence_grad_norms(double, inputs, params=params)
        assert norms.dtype == torch.float64
        torch.testing.assert_close(norms, expected, rtol=1e-11, atol=0)
    assert (truth > 0).any()


def check_choices(model, inputs):
    check(model, inputs, *CHOICES, truth=truth_of_choices(model, inputs))


def truth_of_choices(model, inputs):
    return loop(model, inputs, *(names_of(model, params) for params in CHOICES))


@pytest.mark.parametrize("batch", ["left", "packed-long"])
@pytest.mark.parametrize("name", MODELS)
def test_against_a_loop_over_responses(name, batch):
    check_choices(MODELS[name](), BATCHES[batch]())


@pytest.mark.parametrize("batch", ["left", "packed-long"])
def test_a_small_workspace_takes_the_work_in_parts(batch, monkeypatch):
    monkeypatch.setattr(vcore_train.sequences, "WORKSPACE", 7)
    for name in ("qwen3", "llama"):
        check_choices(MODELS[name](), BATCHES[batch]())


@pytest.mark.parametrize(
    ("model", "params"),
    [
        ("llama", ["model.layers.1.mlp.down_proj.weight"]),
        ("llama", ["model.layers.0.self_attn.q_proj.bias"]),
        (
            "llama",
            ["model.embed_tokens.weight", "lm_head.weight", "model.layers.0.mlp.up_proj.weight"],
        ),
        ("qwen3", ["model.embed_tokens.weight", "lm_head.weight"]),
        ("phi", ["lm_head.bias"]),
        ("phi", ["lm_head.weight", "lm_head.bias", "model.layers.1.mlp.fc1.bias"]),
        ("gemma2", ["lm_head.weight", "model.layers.1.self_attn.o_proj.weight"]),
    ],
    ids=str,
)
def test_names(model, params):
    check(MODELS[model](), padded_batch(LENGTHS), params)


@pytest.mark.parametrize("name", ["qwen3-lora", "llama-lora-head", "qwen3-lora-tied-head"])
def test_what_an_adapter_trains(name):
    model = MODELS[name]()
    trained = [
        n for n, p in model.named_parameters() if p.requires_grad and "lora_embedding" not in n
    ]
    assert any("lora_A" in n for n in trained)
    of_head = [n for n in trained if "lm_head.lora_B" in n]
    check(model, packed_batch(LENGTHS), trained, *([of_head] if of_head else []))


def test_the_padding_token_inside_a_response():
    """An embedding's row at its padding index has no gradient, wherever the token stands."""
    for name in ("llama", "qwen3", "gemma3"):
        model, inputs = MODELS[name](), padded_batch(LENGTHS, side="left")
        inputs["input_ids"][:, -3:-1] = 0
        assert causal_lm(model).get_input_embeddings().padding_idx == 0
        check_choices(model, inputs)


def test_packed_rows():
    """Several rows that each hold several sequences."""
    packed = packed_batch((4, 6, 7, 3))
    inputs = {key: packed[key].view(2, 10) for key in ("input_ids", "labels", "position_ids")}
    assert sequence_grad_norms(MODELS["qwen3"](), inputs).shape == (4,)
    check_choices(MODELS["qwen3"](), inputs)


@pytest.mark.parametrize("params", CHOICES)
def test_nothing_supervised(params):
    for name in ("qwen3", "llama"):
        model, inputs = MODELS[name](), padded_batch(LENGTHS)
        expected = sequence_grad_norms(model, inputs, params=params)
        inputs["labels"][1] = -100
        norms = sequence_grad_norms(model, inputs, params=params)
        assert norms[1] == 0
        torch.testing.assert_close(norms[[0, 2]], expected[[0, 2]])
        inputs["labels"][:] = -100
        assert (sequence_grad_norms(model, inputs, params=params) == 0).all()


@pytest.mark.parametrize("params", CHOICES)
@pytest.mark.parametrize("name", ["qwen3", "llama"])
def test_one_pass_and_the_model_as_it_was(name, params):
    model, inputs = MODELS[name](), padded_batch(LENGTHS)
    expected = sequence_grad_norms(model, inputs, params=params)
    model.model.layers[0].eval()
    model.lm_head.weight.requires_grad_(False)
    flags = [m.training for m in model.modules()]
    trained = [p.requires_grad for p in model.parameters()]
    values = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    passes = []
    decoder_of(model).register_forward_hook(lambda *_: passes.append(1))
    norms = sequence_grad_norms(model, inputs, params=params)
    assert len(passes) == 1
    assert torch.equal(norms, expected)
    assert not norms.requires_grad
    assert flags == [m.training for m in model.modules()]
    assert trained == [p.requires_grad for p in model.parameters()]
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(v, values[k]) for k, v in model.state_dict().items())
    model.requires_grad_(False)
    with torch.inference_mode():
        inputs = padded_batch(LENGTHS)
        assert torch.equal(sequence_grad_norms(model, inputs, params=params), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    inputs = padded_batch(LENGTHS, side="left")
    for name in ("llama", "qwen3-lora"):
        model = MODELS[name]()
        expected = [sequence_grad_norms(model, inputs, params=params) for params in CHOICES]
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        layer = next(m for m in model.modules() if getattr(m, "gradient_checkpointing", False))
        function = layer._gradient_checkpointing_func
        norms = [sequence_grad_norms(model, inputs, params=params) for params in CHOICES]
        assert all(torch.equal(a, b) for a, b in zip(norms, expected, strict=True))
        assert layer._gradient_checkpointing_func is function
        with pytest.raises(ValueError, match="is used by"):
            sequence_grad_norms(model, inputs, params=[norm_weight(model)])
        assert layer._gradient_checkpointing_func is function


def norm_weight(model):
    return next(n for n, _ in model.named_parameters() if n.endswith("layernorm.weight"))


@pytest.mark.parametrize("way", ["autocast", "weights"])
def test_bfloat16(way):
    for name in ("qwen3", "llama", "gemma2"):
        model, inputs = MODELS[name](), padded_batch(LENGTHS)
        model = model.bfloat16() if way == "weights" else model
        for params, truth in zip(CHOICES, truth_of_choices(model, inputs), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
                norms = sequence_grad_norms(model, inputs, params=params)
            assert norms.dtype == torch.float32
            torch.testing.assert_close(norms.double(), truth, rtol=0.03, atol=0)


def test_layers_that_share_a_weight():
    model = tiny_model("llama")
    model.model.layers[1].mlp = model.model.layers[0].mlp
    names = [n for n in names_of(model, "all-linear") if "layers.1.mlp" not in n]
    for inputs in (padded_batch(LENGTHS), packed_batch(LONG)):
        check(model, inputs, "all-linear", truth=loop(model, inputs, names))


def test_an_embedding_looked_up_twice_and_tied():
    """Rows of both look-ups and those of the head, as one gradient."""

    class Twice(nn.Embedding):
        def forward(self, tokens):
            return super().forward(tokens) + 0.5 * super().forward(tokens.roll(1, -1))

    model = tiny_model("qwen3")
    model.model.embed_tokens.__class__ = Twice
    check_choices(model, padded_batch(LENGTHS))


def test_experts():
    model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model.set_experts_implementation("eager")
    inputs = padded_batch(LENGTHS)
    check(model, inputs, ["model.layers.0.mlp.gate.weight"])
    experts = next(n for n, p in model.named_parameters() if p.dim() == 3)
    with pytest.raises(ValueError, match=r"experts.* is used by .*Only weights"):
        sequence_grad_norms(model, inputs, params=[experts])


def test_dora():
    """Its norms go through the weight in other ways; the adapter's matrices are only multiplied."""
    model = with_lora(tiny_model("qwen3"), use_dora=True)
    matrices = [n for n, p in model.named_parameters() if p.requires_grad and p.dim() == 2]
    check(model, padded_batch(LENGTHS), matrices)
    with pytest.raises(ValueError, match=r"base_layer.weight .* is used by"):
        sequence_grad_norms(model, padded_batch(LENGTHS), params="all-linear")


def test_mistakes():
    model, inputs = tiny_model("qwen3"), padded_batch(LENGTHS)

    def norms(params, inputs=inputs, model=model):
        return sequence_grad_norms(model, inputs, params=params)

    with pytest.raises(ValueError, match=r"unknown params 'heads', expected one of 'embeddings'"):
        norms("heads")
    with pytest.raises(ValueError, match=r"params is empty"):
        norms([])
    with pytest.raises(ValueError, match=r"model.embed.weight are no parameters .* names are like"):
        norms(["model.embed.weight"])
    with pytest.raises(ValueError, match=r"layernorm.weight \[32\] is used by mul.*leave it out"):
        norms([norm_weight(model)])
    with pytest.raises(ValueError, match=r"the batch has no labels"):
        norms("embeddings", {"input_ids": inputs["input_ids"]})
    with pytest.raises(TypeError, match=r"expected a transformers PreTrainedModel"):
        norms("embeddings", model=nn.Linear(3, 3))
    rest = {k: v for k, v in inputs.items() if k != "input_ids"}
    rest["inputs_embeds"] = model.get_input_embeddings()(inputs["input_ids"]).detach()
    with pytest.raises(ValueError, match=r"looks nothing up in model.embed_tokens.weight"):
        norms("embeddings", rest)
    tokens = with_lora(tiny_model("qwen3"), trainable_token_indices=[5, 9])
    with pytest.raises(ValueError, match=r"'embeddings' is no parameter but made from several"):
        norms("embeddings", model=tokens)
