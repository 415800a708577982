"""vcore_loss_func: what can be had from finished logits, labels and hidden states."""

import pytest
import torch
from tiny import CONFIGS, padded_batch, tiny_model, with_lora
from training import SHORT, example_rows, logged, make_trainer, parameters, qwen3
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from vcore_train import descent_direction, token_utilities, vcore_loss_func
from vcore_train.loss_function import head_gradient, head_utility
from vcore_train.modeling import head_of, token_nll
from vcore_train.tokenizer import train_tokenizer

from vcore_kernels import vcore_loss

MODELS = {name: {} for name in CONFIGS} | {"cohere": {"logit_scale": 0.3}}


def outputs_of(model, batch):
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    return model(**inputs, output_hidden_states=True)


def model_of(name):
    return tiny_model(name, attention="eager", **MODELS[name]).eval()


@pytest.mark.parametrize("name", MODELS)
def test_utilities_are_those_of_the_heads_direction(name):
    model, batch = model_of(name), padded_batch()
    direction = descent_direction(model, padded_batch(seed=5), params="lm_head")
    expected = token_utilities(model, batch, direction)
    outputs, head = outputs_of(model, batch), head_of(model)
    (g,) = direction.values()
    utility = head_utility(outputs.hidden_states[-1].detach(), head, batch["labels"], {"weight": g})
    torch.testing.assert_close(utility, expected, atol=1e-5, rtol=1e-4)
    assert expected.abs().max() > 1e-3
    gradient = head_gradient(outputs.hidden_states[-1].detach(), head, batch["labels"])
    (expected_g,) = descent_direction(model, batch, params="lm_head").values()
    torch.testing.assert_close(gradient["weight"], expected_g, atol=1e-6, rtol=1e-4)


def test_the_bias_of_a_head():
    model, batch = tiny_model("phi", attention="eager").eval(), padded_batch()
    torch.nn.init.normal_(model.lm_head.bias)
    direction = descent_direction(model, padded_batch(seed=5), params="lm_head")
    assert {name.rpartition(".")[2] for name in direction} == {"weight", "bias"}
    expected = token_utilities(model, batch, direction)
    g = {name.rpartition(".")[2]: value for name, value in direction.items()}
    hidden = outputs_of(model, batch).hidden_states[-1].detach()
    utility = head_utility(hidden, head_of(model), batch["labels"], g)
    torch.testing.assert_close(utility, expected, atol=1e-5, rtol=1e-4)
    assert head_gradient(hidden, head_of(model), batch["labels"]).keys() == g.keys()


@pytest.mark.parametrize("direction", ["previous", "batch", "ema"])
def test_weights_of_each_direction(direction):
    model = model_of("qwen3")
    function = vcore_loss_func(model, direction=direction, ema_decay=0.5, kl_budget=0.1)
    batches = [padded_batch(seed=seed) for seed in range(3)]
    gradients = [
        next(iter(descent_direction(model, b, params="lm_head").values())) for b in batches
    ]
    for n, batch in enumerate(batches):
        loss = function(outputs_of(model, batch), batch["labels"])
        if direction == "previous":
            g = gradients[n - 1] if n else None
        elif direction == "batch":
            g = gradients[n]
        else:  # weights decay ** age, normalised
            ages = torch.tensor([0.5**age for age in range(n, -1, -1)])
            g = torch.stack(gradients[: n + 1]).mul((ages / ages.sum())[:, None, None]).sum(0)
        nll, mask = token_nll(model, batch), batch["labels"] != -100
        if g is None:
            assert function.last is None
            torch.testing.assert_close(loss, nll[mask].mean())
            continue
        name = next(iter(descent_direction(model, batch, params="lm_head")))
        utility = token_utilities(model, batch, {name: g})
        expected = vcore_loss(nll, utility, mask=mask, kl_budget=0.1)
        torch.testing.assert_close(loss, expected.loss, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(function.last.weights, expected.weights, atol=1e-3, rtol=1e-3)
        assert function.last.kl.max() == pytest.approx(0.1, rel=0.02)


def trained(folder, function, *, output_hidden_states=False, model=None, **options):
    args = TrainingArguments(**{**SHORT, "output_dir": str(folder), **options})
    model = qwen3() if model is None else model
    model.config.output_hidden_states = output_hidden_states
    trainer = Trainer(
        model,
        args,
        DataCollatorForSeq2Seq(train_tokenizer(["digits"], vocab_size=258)),
        train_dataset=example_rows(),
        eval_dataset=example_rows(5),
        compute_loss_func=function(model),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("method", ["sft", "dft"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_objectives_of_logits_are_those_of_vcore_trainer(tmp_path, method, accumulate):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate}
    ours = trained(tmp_path, lambda _: vcore_loss_func(method=method), **options)
    reference = make_trainer(tmp_path, method=method, **options)
    reference.train()
    left, right = parameters(ours), parameters(reference)
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], atol=2e-6, rtol=1e-5)
    assert logged(ours, "loss") == pytest.approx(logged(reference, "loss"), rel=1e-5)


def test_random_supervision_keeps_its_share(tmp_path):
    model, batch = model_of("qwen3"), padded_batch((40, 30), prompt=5)
    runs = [
        [function(outputs_of(model, batch), batch["labels"]).item() for _ in range(3)]
        for function in (vcore_loss_func(method="random", seed=1), vcore_loss_func(method="random"))
    ]
    assert len({*runs[0], *runs[1]}) == 6  # another choice at each call
    again = vcore_loss_func(method="random", seed=1)
    assert again(outputs_of(model, batch), batch["labels"]).item() == runs[0][0]
    outputs = outputs_of(model, batch)
    outputs.logits.retain_grad()
    vcore_loss_func(method="random", random_keep=0.2)(outputs, batch["labels"]).backward()
    assert (outputs.logits.grad.abs().sum(-1) > 0).sum(-1).tolist() == [7, 5]  # of 35 and 25


def test_it_trains_and_evaluates_uniformly(tmp_path):
    functions = []

    def function(model):
        functions.append(vcore_loss_func(model, kl_budget=0.1))
        return functions[0]

    trainer = trained(tmp_path, function, output_hidden_states=True)
    uniform = trained(tmp_path, lambda _: vcore_loss_func(method="sft"))
    left, right = parameters(trainer), parameters(uniform)
    assert max(float((left[name] - right[name]).abs().max()) for name in left) > 1e-4
    # The first step has no direction yet.
    assert logged(trainer, "loss")[0] == pytest.approx(logged(uniform, "loss")[0], rel=1e-5)
    assert functions[0].last.kl.max() == pytest.approx(0.1, rel=0.02)
    before = functions[0].state.tensors["weight"]
    loss = trainer.evaluate()["eval_loss"]
    assert functions[0].state.tensors["weight"] is before
    trainer.compute_loss_func = vcore_loss_func(method="sft")
    assert trainer.evaluate()["eval_loss"] == loss


def test_bfloat16(tmp_path):
    trainer = trained(
        tmp_path,
        lambda model: vcore_loss_func(model, direction="ema"),
        output_hidden_states=True,
        bf16=True,
    )
    assert all(torch.isfinite(torch.tensor(logged(trainer, "loss"))))


def test_hostile_values():
    model = model_of("qwen3")
    for direction in ("previous", "batch", "ema"):
        function = vcore_loss_func(model, direction=direction)
        batch = padded_batch()
        function(outputs_of(model, batch), batch["labels"])
        broken = outputs_of(model, batch)
        broken.hidden_states = tuple(h * float("nan") for h in broken.hidden_states)
        nll = token_nll(model, batch)[batch["labels"] != -100]
        loss = function(broken, batch["labels"])
        torch.testing.assert_close(loss, nll.mean())  # uniform
    nothing = torch.full_like(batch["labels"], -100)
    assert function(outputs_of(model, batch), nothing) == 0
    first = nothing.clone()
    first[:, 0] = 5  # nothing predicts it
    assert function(outputs_of(model, batch), first) == 0


def test_one_trajectory_and_its_variance():
    model, batch = model_of("qwen3"), padded_batch((9,))
    function = vcore_loss_func(model, variance_control="trajectory", direction="batch")
    function(outputs_of(model, batch), batch["labels"])
    assert function.last.alpha == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "iw_sft"}, "method must be one of sft, random, dft, vcore, got 'iw_sft'"),
        ({"direction": "probe"}, "direction must be one of previous, batch, ema"),
        ({"tau": 1.0, "kl_budget": 0.1}, "at most one of tau, temperature and kl_budget"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"random_keep": 0}, "random_keep must be"),
        ({"ema_decay": 1}, "ema_decay must be"),
        ({"max_norm": -1}, "max_norm must be"),
        ({"variance_control": "paper"}, "variance_control must be one of"),
        ({"model": None}, "Pass the model"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=f"vcore_loss_func: .*{message}"):
        vcore_loss_func(**{"model": qwen3(), **options})


def test_heads_that_cannot_be_probed():
    with pytest.raises(ValueError, match="chooses frozen parameters only"):
        vcore_loss_func(with_lora(qwen3()))
    model = with_lora(tiny_model("llama"), targets=("lm_head", "q_proj"), ensure_weight_tying=False)
    with pytest.raises(ValueError, match=r"vcore_loss_func: the head carries an adapter|frozen"):
        vcore_loss_func(model)
    whole = with_lora(tiny_model("llama"), modules_to_save=["lm_head"])
    batch = padded_batch()
    function = vcore_loss_func(whole, direction="batch")
    function(outputs_of(whole.eval(), batch), batch["labels"])
    assert function.last.kl.max() > 0


def test_what_a_call_needs():
    model, batch = qwen3(), padded_batch()
    function = vcore_loss_func(model)
    with pytest.raises(ValueError, match="output_hidden_states = True"):
        function(model(batch["input_ids"]), batch["labels"])
    with pytest.raises(ValueError, match="no labels"):
        function(outputs_of(model, batch), None)
    outputs = outputs_of(model, batch)
    outputs.hidden_states = outputs.hidden_states[:-1]
    with pytest.raises(ValueError, match="is not what the head reads"):
        function(outputs, batch["labels"])
