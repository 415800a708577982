"""Finite differences: what of them is signal, and what of the passes they share."""

import copy
import logging
from contextlib import nullcontext

import pytest
import torch
from exact import exact_utilities, random_direction
from tiny import CONFIGS, packed_batch, padded_batch, tiny_model, with_lora
from trained import arithmetic_batches, trained_qwen3
from vcore_train.directions import descent_direction
from vcore_train.modeling import hidden_states, supervised_labels, trainable_parameters
from vcore_train.shared_trunk import SharedTrunk
from vcore_train.utilities import token_utilities, token_utilities_and_nll

from vcore_kernels.perturbed import StalledPerturbationWarning

DIFFERENCES = ("central", "finite_difference")


# ---- signal and noise ----


@pytest.fixture(scope="module")
def trained():
    """By precision: (model, batch, direction from other batches, utilities in float64)."""
    model = trained_qwen3(12, layers=2, hidden=32)
    batch, *others = arithmetic_batches(3, size=4, seed=99)
    direction = descent_direction(model, others)
    rounded = copy.deepcopy(model).bfloat16()
    truth = exact_utilities(model, batch, direction)
    return {
        "fp32": (model, batch, direction, truth),
        "autocast": (model, batch, direction, truth),
        "weights": (rounded, batch, direction, exact_utilities(rounded, batch, direction)),
    }


def rms(values):
    return float(values.double().square().mean().sqrt())


def measured(trained, precision, method, epsilon, **options):
    """Signal-to-noise ratio as reported, and against float64."""
    model, batch, direction, truth = trained[precision]
    mask = supervised_labels(batch) != -100
    with torch.autocast("cpu", torch.bfloat16) if precision == "autocast" else nullcontext():
        out = token_utilities_and_nll(
            model, batch, direction, method=method, epsilon=epsilon, **options
        )
    return out.snr, rms(truth[mask]) / rms(out.utility[mask].double() - truth[mask])


@pytest.mark.parametrize("head", ["linear", "pair"])
@pytest.mark.parametrize("method", DIFFERENCES)
@pytest.mark.parametrize("precision", ["fp32", "autocast", "weights"])
def test_the_reported_ratio_is_the_true_one(trained, precision, method, head):
    for epsilon in (1e-5, 1e-3, 1e-2, None):
        reported, true = measured(trained, precision, method, epsilon, head=head)
        if true < 0.8:
            assert reported < 1
        elif true > 2:  # the curvature that a central difference cancels makes it less
            central = method == "central" and precision == "fp32"
            assert reported / true < 2
            assert reported > (100 if central else true / 2)
        if epsilon == 1e-5:
            assert (true < 1) == (precision != "fp32")


def test_a_chosen_step_stands_above_the_noise(trained):
    for precision, least in (("fp32", 1000), ("autocast", 30), ("weights", 30)):
        for method in DIFFERENCES:
            reported, true = measured(trained, precision, method, None)
            assert min(reported, true) > least


def test_the_head_is_best_linearised(trained):
    """In a forward difference that leaves out the head's curvature."""
    linear, pair = (
        measured(trained, "fp32", "finite_difference", 1e-2, head=head)[1]
        for head in ("linear", "pair")
    )
    assert linear > 2 * pair


def test_a_ratio_below_one_warns_once_a_model(trained, caplog):
    model, batch, direction, _ = trained["fp32"]
    model = copy.deepcopy(model)
    with caplog.at_level(logging.WARNING, logger="vcore_train"):
        token_utilities(model, batch, direction, method="central")
        assert not caplog.text
        for _ in range(2):
            # So small that the rounding of fp32 weights is warned of, too.
            with torch.autocast("cpu", torch.bfloat16), pytest.warns(StalledPerturbationWarning):
                token_utilities(model, batch, direction, method="central", epsilon=1e-6)
    assert len(caplog.records) == 1
    assert "signal-to-noise ratio" in caplog.text
    assert "Use method='jvp'" in caplog.text


@pytest.mark.parametrize("method", DIFFERENCES)
def test_no_ratio_where_there_is_nothing_to_measure(method, caplog):
    model, inputs = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    options = {"method": method, "epsilon": 1e-3}
    without = token_utilities_and_nll(model, inputs, direction, snr=False, **options)
    assert without.snr is None
    measured = token_utilities_and_nll(model, inputs, direction, **options)
    assert torch.equal(measured.utility, without.utility)
    assert torch.equal(measured.nll, without.nll)
    empty = {**inputs, "labels": torch.full_like(inputs["labels"], -100)}
    assert token_utilities_and_nll(model, empty, direction, **options).snr is None
    zero = {name: torch.zeros_like(g) for name, g in direction.items()}
    assert token_utilities_and_nll(model, inputs, zero, **options).snr is None
    assert not caplog.records
    assert token_utilities_and_nll(model, inputs, direction).snr is None
    # So small a step that nothing moves at all: no signal, and no noise either.
    with pytest.warns(StalledPerturbationWarning):
        stuck = token_utilities_and_nll(model, inputs, direction, method=method, epsilon=1e-30)
    assert stuck.snr == 0.0
    assert len(caplog.records) == 1


# ---- the shared trunk ----


def counted(model):
    """Numbers of the layers whose MLP ran, in order."""
    ran = []
    for number, layer in enumerate(model.get_decoder().layers):
        layer.mlp.register_forward_hook(lambda module, args, out, number=number: ran.append(number))
    return ran


@pytest.mark.parametrize("model_type", CONFIGS)
@pytest.mark.parametrize("batch", [padded_batch, packed_batch])
def test_the_trunk_runs_once_and_gives_the_same_bits(model_type, batch, monkeypatch):
    model, inputs = tiny_model(model_type, dtype=torch.bfloat16), batch()
    direction = descent_direction(model, inputs, params="last_1_layers")
    ran = counted(model)
    options = {"method": "central", "epsilon": 1e-2}
    torch.manual_seed(0)
    shared = token_utilities_and_nll(model, inputs, direction, **options)
    assert sorted(ran) == [0, 1, 1, 1]
    assert not any("forward" in vars(layer) for layer in model.get_decoder().layers)
    monkeypatch.setattr(SharedTrunk, "run", lambda self, decode: decode())
    ran.clear()
    torch.manual_seed(0)
    full = token_utilities_and_nll(model, inputs, direction, **options)
    assert sorted(ran) == [0, 0, 0, 1, 1, 1]
    assert torch.equal(shared.utility, full.utility)
    assert torch.equal(shared.nll, full.nll)
    assert shared.snr == full.snr


@pytest.mark.parametrize(
    ("params", "runs"),
    [
        ("all", 3),
        ("model.embed_tokens.weight", 3),
        (["model.embed_tokens.weight", "last_1_layers"], 3),
        ("model.norm.weight", 1),
        ("lm_head", 1),
        (["model.norm.weight", "last_1_layers"], 1),
    ],
    ids=str,
)
@pytest.mark.parametrize("tied", [True, False])
def test_what_moves_decides_what_is_shared(params, runs, tied):
    model, inputs = tiny_model("qwen3", tie_word_embeddings=tied), padded_batch()
    direction = descent_direction(model, inputs, params=params)
    exact = token_utilities(model, inputs, direction)
    ran = counted(model)
    utility = token_utilities(model, inputs, direction, method="central", epsilon=1e-3)
    assert ran.count(0) == runs
    torch.testing.assert_close(utility, exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))


def test_layers_that_get_more_than_hidden_states_are_not_shared():
    """Here layer 1 reads what layer 0 left behind: with layer 0 left out it would be stale."""
    model, inputs = tiny_model("qwen3"), padded_batch()
    lora = random_direction({n: p for n, p in model.named_parameters() if "layers.1.mlp" in n})
    calls = torch.zeros(())

    def count(module, args):
        calls.add_(1)

    def read(module, args, kwargs):
        return args, {**kwargs, "passes": calls.clone()}

    plain = token_utilities(model, inputs, lora, method="central", epsilon=1e-3)
    model.model.layers[0].mlp.register_forward_pre_hook(count)
    model.model.layers[1].register_forward_pre_hook(read, with_kwargs=True)
    ran = counted(model)
    again = token_utilities(model, inputs, lora, method="central", epsilon=1e-3)
    assert torch.equal(plain, again)
    assert ran.count(0) == 1  # each pass found it the same
    trunk = SharedTrunk(model, [p for n, p in model.named_parameters() if n in lora])
    ran.clear()
    with torch.no_grad():
        outs = []
        for _ in range(3):
            outs.append(trunk.run(lambda: hidden_states(model, inputs)))
            calls.add_(1)
    assert ran.count(0) == 3
    assert torch.equal(outs[0], outs[2])


def test_kept_states_that_were_written_to_are_not_used():
    model, inputs = tiny_model("qwen3").eval(), padded_batch()
    trunk = SharedTrunk(model, [model.model.norm.weight])

    def double(module, args):
        args[0].mul_(2)

    model.model.norm.register_forward_pre_hook(double)
    ran = counted(model)
    with torch.no_grad():
        outs = [trunk.run(lambda: hidden_states(model, inputs)) for _ in range(3)]
    assert ran.count(0) == 3
    assert torch.equal(outs[0], outs[1])
    assert torch.equal(outs[0], outs[2])


def test_adapters_on_late_layers_share_the_trunk():
    model = with_lora(tiny_model("llama"), targets=("q_proj",), layers_to_transform=[1])
    inputs = padded_batch()
    direction = random_direction(trainable_parameters(model))
    exact = token_utilities(model, inputs, direction)
    ran = counted(model)
    utility = token_utilities(model, inputs, direction, method="central")
    assert ran.count(0) == 1
    torch.testing.assert_close(utility, exact, rtol=0.02, atol=0.01 * float(exact.abs().max()))


def test_hooks_on_shared_layers_run_once_a_pass():
    model = tiny_model("llama", attention_dropout=0.0)
    model.model.layers[-1].register_forward_hook(lambda module, args, out: out + 1.0)
    direction = descent_direction(model, padded_batch(), params=["lm_head", "model.norm.weight"])
    exact = token_utilities(model, padded_batch(), direction)
    utility = token_utilities(model, padded_batch(), direction, method="central")
    torch.testing.assert_close(utility, exact, rtol=0.01, atol=0.01 * float(exact.abs().max()))


def test_a_direction_whose_tensors_share_memory():
    model = tiny_model("gpt2", n_embd=32, n_head=4, n_layer=2, n_positions=64)
    shared = torch.randn(32, 32, generator=torch.Generator().manual_seed(0))
    direction = {f"transformer.h.{n}.attn.c_proj.weight": shared for n in range(2)}
    direction["transformer.ln_f.weight"] = torch.ones(()).expand(32)
    before = shared.clone()
    exact = token_utilities(model, padded_batch(), direction)
    utility = token_utilities(model, padded_batch(), direction, method="central")
    torch.testing.assert_close(utility, exact, rtol=0.01, atol=0.01 * float(exact.abs().max()))
    assert torch.equal(shared, before)


@pytest.mark.parametrize("method", DIFFERENCES)
def test_the_bias_of_a_tied_head_moves_too(method):
    model = tiny_model("phi", tie_word_embeddings=True)
    direction = descent_direction(model, padded_batch(), params="lm_head")
    assert direction.keys() == {"lm_head.weight", "lm_head.bias"}
    exact = token_utilities(model, padded_batch(), direction)
    utility = token_utilities(model, padded_batch(), direction, method=method)
    torch.testing.assert_close(utility, exact, rtol=0.01, atol=0.01 * float(exact.abs().max()))


def test_weights_with_nan_give_nan():
    model, batch = tiny_model("qwen3"), padded_batch()
    direction = random_direction(trainable_parameters(model))
    token_utilities(model, batch, direction)
    torch.nn.init.constant_(model.model.norm.weight, float("nan"))
    assert token_utilities(model, batch, direction, method="central").isnan().any()
