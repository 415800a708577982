"""The dual pass as the main forward: gradients and utilities of the two passes it replaces."""

import gc
import weakref

import pytest
import torch
from exact import LiftedCasts, random_direction
from tiny import packed_batch, padded_batch, tiny_model, with_lora
from training import logged, make_trainer, parameters, train
from vcore_train import VcoreConfig, attention, reuse
from vcore_train import mixin as trainer_module
from vcore_train.direction_schedule import DirectionSchedule
from vcore_train.head_check import verify_head
from vcore_train.modeling import hidden_states, token_nll, trainable_parameters
from vcore_train.reuse import checkpointed_layers, forward_with_utilities
from vcore_train.utilities import NonFiniteDirectionError, token_utilities_and_nll

NO_DROPOUT = {"attention_dropout": 0.0}
BATCHES = {
    "padded right": padded_batch(),
    "padded left": padded_batch(side="left"),
    "packed": packed_batch(),
}


def full(model_type="qwen3", **options):
    return tiny_model(model_type, **{**NO_DROPOUT, **options})


def lora(model_type="qwen3", targets=("q_proj", "v_proj", "down_proj"), **options):
    return with_lora(full(model_type, **options), targets=targets)


def embeddings_frozen(**options):
    model = full("llama", **options)
    model.get_input_embeddings().requires_grad_(False)
    model.get_output_embeddings().requires_grad_(False)
    return model


def checkpointed(model, reentrant):
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return model


MODELS = {
    "full, tied": full,
    "full, untied": lambda **o: full("llama", **o),
    "full, soft caps": lambda **o: full("gemma2", **o),
    "head frozen": embeddings_frozen,
    "lora": lora,
    "lora on the head": lambda **o: lora("llama", ("q_proj", "down_proj", "lm_head"), **o),
}


def token_weights(batch, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch["labels"].shape, generator=generator)


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def ordinary(model, batch, weights):
    return gradients(model, (weights * token_nll(model, batch)).sum())


def assert_same(found, expected, rtol):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        error = torch.linalg.vector_norm(found[name] - value) / torch.linalg.vector_norm(value)
        assert error < rtol, (name, float(error))


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "ckpt", "reentrant"])
@pytest.mark.parametrize("kind", MODELS)
def test_gradients_of_the_ordinary_pass(kind, checkpointing):
    model = MODELS[kind]()
    batch = BATCHES["padded left"]
    direction = random_direction(trainable_parameters(model))
    weights = token_weights(batch)
    expected = ordinary(model, batch, weights)
    reference = token_utilities_and_nll(model, batch, direction)
    if checkpointing is not None:
        checkpointed(model, checkpointing)
        assert len(checkpointed_layers(model)) == 2
    forward = forward_with_utilities(model, batch, direction)
    torch.testing.assert_close(forward.nll, reference.nll, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(forward.utility, reference.utility, rtol=1e-4, atol=1e-4)
    loss = forward.loss(weights)
    torch.testing.assert_close(loss.detach(), (weights * reference.nll).sum())
    assert_same(gradients(model, loss), expected, 1e-5)


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("kind", ["full, tied", "lora"])
def test_float64(kind, batch, checkpointing, monkeypatch):
    model, batch = MODELS[kind](dtype=torch.float64).double(), BATCHES[batch]
    direction = random_direction(trainable_parameters(model))
    weights = token_weights(batch).double()
    call = reuse._call

    def lifted(*args):  # autograd leaves the mode when it computes a layer again
        with LiftedCasts():
            return call(*args)

    monkeypatch.setattr(reuse, "_call", lifted)
    with LiftedCasts():
        expected = ordinary(model, batch, weights)
        reference = token_utilities_and_nll(model, batch, direction)
        if checkpointing is not None:
            checkpointed(model, checkpointing)
        forward = forward_with_utilities(model, batch, direction)
        torch.testing.assert_close(forward.utility, reference.utility, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(forward.nll, reference.nll, rtol=1e-10, atol=1e-10)
        assert_same(gradients(model, forward.loss(weights)), expected, 1e-10)


@pytest.mark.parametrize("checkpointing", [None, False], ids=["plain", "checkpointed"])
def test_bf16_autocast(checkpointing):
    """As near to float32 as the two passes of bf16 are."""
    model, batch = lora(), BATCHES["padded right"]
    direction = random_direction(trainable_parameters(model))
    weights = token_weights(batch)
    exact = ordinary(model, batch, weights)
    utilities = token_utilities_and_nll(model, batch, direction).utility
    if checkpointing is not None:
        checkpointed(model, checkpointing)
    with torch.autocast("cpu", torch.bfloat16):
        two_passes = ordinary(model, batch, weights)
        forward = forward_with_utilities(model, batch, direction)
        loss = forward.loss(weights)
    assert torch.corrcoef(torch.stack([forward.utility, utilities]).flatten(1))[0, 1] > 0.999
    one_pass = gradients(model, loss)
    for name, value in exact.items():
        norm = torch.linalg.vector_norm
        assert norm(one_pass[name] - value) < 2 * norm(two_passes[name] - value) + 1e-3, name


@pytest.mark.parametrize("attention_jvp", [True, False], ids=["vcore_jvp", "eager"])
def test_direction_of_the_last_layer_alone(attention_jvp, monkeypatch):
    """What lies before the first perturbed layer has no tangents, and is run once."""
    if not attention_jvp:
        monkeypatch.setattr(attention, "serves", lambda lm: False)
    model, batch = full(), BATCHES["packed"]
    parameters = trainable_parameters(model)
    last = {n: p for n, p in parameters.items() if ".layers.1." in n}
    assert 0 < len(last) < len(parameters)
    direction = random_direction(last)
    weights = token_weights(batch)
    expected = ordinary(model, batch, weights)
    reference = token_utilities_and_nll(model, batch, direction)
    calls = []
    hooks = [
        layer.register_forward_hook(lambda layer, args, out, i=i: calls.append((i, dual(out))))
        for i, layer in enumerate(model.model.layers)
    ]
    forward = forward_with_utilities(model, batch, direction)
    loss = forward.loss(weights)
    for hook in hooks:
        hook.remove()
    assert calls == [(0, False), (1, True)]
    torch.testing.assert_close(forward.utility, reference.utility, rtol=1e-4, atol=1e-5)
    assert_same(gradients(model, loss), expected, 1e-5)


def dual(tensor):
    return torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None


@pytest.mark.parametrize("model_type", ["llama", "qwen3"], ids=["untied", "tied"])
def test_direction_of_the_head_alone(model_type):
    model, batch = full(model_type), BATCHES["padded right"]
    direction = random_direction({"lm_head.weight": model.lm_head.weight})
    weights = token_weights(batch)
    expected = ordinary(model, batch, weights)
    reference = token_utilities_and_nll(model, batch, direction)
    forward = forward_with_utilities(model, batch, direction)
    torch.testing.assert_close(forward.utility, reference.utility)
    assert_same(gradients(model, forward.loss(weights)), expected, 1e-5)


def test_gradients_of_parameters_outside_the_direction():
    model, batch = full(), BATCHES["padded right"]
    every = trainable_parameters(model)
    for name, parameter in every.items():
        parameter.requires_grad_("mlp" in name or "attn" in name)
    direction = random_direction({n: p for n, p in every.items() if "attn" in n})
    weights = token_weights(batch)
    expected = ordinary(model, batch, weights)
    reference = token_utilities_and_nll(model, batch, direction)
    forward = forward_with_utilities(model, batch, direction)
    torch.testing.assert_close(forward.utility, reference.utility, rtol=1e-4, atol=1e-5)
    assert_same(gradients(model, forward.loss(weights)), expected, 1e-5)


def test_tangents_are_freed_with_the_pass():
    """Of the activations; the graph that is kept for the backward pass keeps none of them."""
    model, batch = full(), BATCHES["padded right"]
    verify_head(model)
    tangents = []

    def watch(layer, args, output):
        tangent = torch.autograd.forward_ad.unpack_dual(output).tangent
        assert not tangent.requires_grad
        tangents.append(weakref.ref(tangent))

    hooks = [m.register_forward_hook(watch) for m in model.modules() if "Norm" in type(m).__name__]
    forward = forward_with_utilities(model, batch, random_direction(trainable_parameters(model)))
    for hook in hooks:
        hook.remove()
    gc.collect()
    assert len(tangents) == 9
    assert not any(tangent() is not None for tangent in tangents)
    forward.loss(token_weights(batch)).backward()


# ---- refusals, and what is left behind ----


def test_dropout_is_refused_by_name():
    batch = BATCHES["padded right"]
    model = full("llama", attention_dropout=0.3)
    direction = random_direction(trainable_parameters(model))
    with pytest.raises(ValueError, match=r"self_attn .*attention_dropout=0.3.*to 0"):
        forward_with_utilities(model, batch, direction)
    model = with_lora(full(), lora_dropout=0.1)
    direction = random_direction(trainable_parameters(model))
    with pytest.raises(ValueError, match=r"lora_dropout.* \(Dropout\) has p=0.1"):
        forward_with_utilities(model, batch, direction)


def test_float16_is_refused():
    model = lora().half()
    direction = random_direction(trainable_parameters(model))
    with pytest.raises(ValueError, match=r"lora_A.* is float16"):
        forward_with_utilities(model, BATCHES["padded right"], direction)


def test_loss_is_given_away_once():
    model, batch = lora(), BATCHES["padded right"]
    forward = forward_with_utilities(model, batch, random_direction(trainable_parameters(model)))
    with pytest.raises(ValueError, match=r"token_weight has shape \[3\], the labels \[3, 9\]"):
        forward.loss(torch.ones(3))
    forward.loss(token_weights(batch))
    with pytest.raises(ValueError, match="loss was called before"):
        forward.loss(token_weights(batch))


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "ckpt", "reentrant"])
def test_an_exception_leaves_no_trace(reentrant, monkeypatch):
    model, batch = lora(), BATCHES["padded right"]
    if reentrant is not None:
        checkpointed(model, reentrant)
    direction = random_direction(trainable_parameters(model))
    last = model.get_base_model().model.layers[-1]
    before = state(model)
    mlp = type(last.mlp).forward
    for stage in ("dual pass", "loss"):
        forward = forward_with_utilities(model, batch, direction)
        with monkeypatch.context() as patch:
            if stage == "dual pass":
                patch.setattr(type(last.mlp), "forward", fail)
                with pytest.raises(ArithmeticError):
                    forward_with_utilities(model, batch, direction)
            elif reentrant is not None:
                patch.setattr(type(model.get_base_model().model.norm), "forward", fail)
                with pytest.raises(ArithmeticError):
                    forward.loss(token_weights(batch))
        assert state(model) == before
    assert type(last.mlp).forward is mlp
    assert torch.autograd.forward_ad._current_level == -1


def fail(*args, **kwargs):
    raise ArithmeticError("on purpose")


def state(model):
    modules = [
        (m.training, m.__dict__.get("_gradient_checkpointing_func"), len(m._forward_hooks))
        for m in model.modules()
    ]
    attention = model.get_base_model().config._attn_implementation
    return modules, attention, [p.grad for p in model.parameters()]


# ---- the trainer ----


@pytest.mark.parametrize(
    "options",
    [
        {"activation_checkpointing": True},
        {"packing": True, "kl_scope": "batch", "per_device_train_batch_size": 2},
        {"anchor_steps": 2, "max_grad_norm": 1.0, "max_steps": 3},
    ],
    ids=["checkpointed", "packed, batch", "anchor steps"],
)
def test_training_is_the_same(tmp_path, options):
    options = {"gradient_accumulation_steps": 2, "max_steps": 2, **options}
    two = train(tmp_path / "two", **options)
    one = train(tmp_path / "one", reuse_forward=True, **options)
    found, expected = parameters(one), parameters(two)
    assert_same(found, expected, 1e-5)
    for name in ("loss", "nll", "tau", "kl", "alpha"):
        assert logged(one, name) == pytest.approx(logged(two, name), rel=1e-3), name


def test_lora_training_is_the_same(tmp_path):
    options = {"max_steps": 2, "gradient_accumulation_steps": 2}
    two = train(tmp_path / "two", model=lora(), **options)
    one = train(tmp_path / "one", model=lora(), reuse_forward=True, **options)
    assert_same(parameters(one), parameters(two), 1e-5)


@pytest.mark.parametrize("where", ["direction", "utilities"])
def test_fallback_takes_one_forward_pass(tmp_path, monkeypatch, where):
    """Uniform weights, through the pass that was run already where there was one."""
    if where == "direction":
        monkeypatch.setattr(DirectionSchedule, "direction", not_finite)
    else:
        weigh = trainer_module.weigh

        def spoilt(args, tokens, nll, utility, processes):
            return weigh(args, tokens, nll, [u * float("nan") for u in utility])

        monkeypatch.setattr(trainer_module, "weigh", spoilt)
    plain = train(tmp_path / "sft", method="sft", max_steps=2)
    trainer = make_trainer(tmp_path, reuse_forward=True, max_steps=2)
    calls = []
    direction = DirectionSchedule.direction

    def counted(*args):  # a forward pass of the direction is none of the step's
        result = direction(*args)
        calls.clear()
        return result

    monkeypatch.setattr(DirectionSchedule, "direction", counted)
    trainer.model.model.norm.register_forward_hook(lambda *_: calls.append(1))
    trainer.train()
    assert logged(trainer, "fallback_steps") == [1, 2]
    assert len(calls) == (1 if where == "utilities" else 2)  # none of them cleared: one a step
    assert_same(parameters(trainer), parameters(plain), 1e-5)


def not_finite(*args):
    raise NonFiniteDirectionError("on purpose")


def _passes_of_the_training(tmp_path, monkeypatch, **options):
    """Training passes through the decoder that the step takes beside the probe's."""
    calls = []
    monkeypatch.setattr(
        trainer_module, "hidden_states", lambda *args: calls.append(1) or hidden_states(*args)
    )
    trainer = train(tmp_path, max_steps=2, **options)
    return len(calls), trainer


def test_reused_by_default_where_it_takes_little_memory(tmp_path, monkeypatch):
    count, one = _passes_of_the_training(tmp_path / "one", monkeypatch)
    assert count == 0
    count, two = _passes_of_the_training(tmp_path / "two", monkeypatch, reuse_forward=False)
    assert count == 2
    assert_same(parameters(one), parameters(two), 1e-5)


@pytest.mark.parametrize(
    ("options", "passes"),
    [
        ({"gradient_accumulation_steps": 2}, 4),
        ({"activation_checkpointing": True}, 2),
        ({"utility_method": "central"}, 2),
    ],
    ids=["accumulation", "checkpointing", "difference"],
)
def test_not_reused_by_default(tmp_path, monkeypatch, options, passes):
    assert _passes_of_the_training(tmp_path, monkeypatch, **options)[0] == passes


def test_not_reused_by_default_with_dropout(tmp_path, monkeypatch):
    model = full("llama", attention_dropout=0.3)
    assert _passes_of_the_training(tmp_path, monkeypatch, model=model)[0] == 2


def test_the_trainer_refuses_dropout(tmp_path):
    with pytest.raises(ValueError, match=r"attention_dropout=0.3"):
        make_trainer(tmp_path, model=full("llama", attention_dropout=0.3), reuse_forward=True)


def test_more_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(VcoreConfig, "world_size", 2)
    with pytest.raises(ValueError, match=r"reuse_forward=True works in one process, .* are 2"):
        VcoreConfig(output_dir=str(tmp_path), reuse_forward=True)
