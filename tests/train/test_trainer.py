import math
import time
from types import SimpleNamespace

import pytest
import torch
from tiny import with_lora
from training import example_rows, logged, make_trainer, parameters, qwen3, train
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments
from vcore_train import VcoreConfig, VcoreTrainer
from vcore_train.collators import PaddingCollator
from vcore_train.config import DEFAULT_KL_BUDGET

METHODS = ("sft", "random", "dft", "iw_sft", "vcore")


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


# ---- the loss and its scale ----


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_is_what_transformers_trains(tmp_path, accumulate):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate}
    ours = train(tmp_path / "ours", method="sft", max_grad_norm=1.0, **options)
    args = TrainingArguments(
        output_dir=str(tmp_path / "plain"),
        max_steps=3,
        learning_rate=0.1,
        lr_scheduler_type="constant",
        optim="sgd",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        seed=7,
        **options,
    )
    plain = Trainer(qwen3(), args, PaddingCollator(), train_dataset=example_rows())
    plain.train()
    assert_same(parameters(ours), parameters(plain), atol=2e-6, rtol=1e-5)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(ours, "nll") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(ours, "grad_norm") == pytest.approx(logged(plain, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize(
    "options",
    [
        *({"method": method} for method in ("sft", "dft", "iw_sft")),
        *({"variance_control": mode} for mode in ("utility", "trajectory", "ess", "loss", "none")),
        {"kl_scope": "batch", "variance_cap": None},
        {"tau": 30.0, "variance_control": "none"},
    ],
    ids=str,
)
def test_accumulation_changes_nothing(tmp_path, options):
    rows = example_rows(24)
    options = {"rows": rows, "probe_batch_size": 6, "max_grad_norm": 0.5, "max_steps": 3, **options}
    whole = train(tmp_path, per_device_train_batch_size=8, **options)
    parts = train(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, **options)
    assert_same(parameters(whole), parameters(parts), atol=3e-6, rtol=3e-5)
    for name in ("loss", "nll", "grad_norm", "supervised_tokens"):
        assert logged(whole, name) == pytest.approx(logged(parts, name), rel=1e-4)
    if "variance_control" in options:
        assert logged(whole, "alpha") == pytest.approx(logged(parts, "alpha"), rel=1e-4)


def test_alpha_scales_the_accumulated_gradient_once(tmp_path):
    def update(mode):
        trainer = train(
            tmp_path,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=3,
            max_steps=1,
            kl_budget=0.4,
            variance_control=mode,
        )
        return trainer, parameters(trainer)

    start = parameters(make_trainer(tmp_path))
    with_alpha, moved = update("utility")
    _, unscaled = update("none")
    (alpha,) = logged(with_alpha, "alpha")
    assert 0 < alpha < 0.95
    for name in start:
        torch.testing.assert_close(
            moved[name] - start[name], alpha * (unscaled[name] - start[name]), atol=1e-6, rtol=1e-3
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_packed_equals_padded(tmp_path, method, accumulate):
    options = {
        "method": method,
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": accumulate,
        "probe_batch_size": 4,
    }
    padded = train(tmp_path, **options)
    packed = train(tmp_path, packing=True, **options)
    assert logged(packed, "supervised_tokens") == logged(padded, "supervised_tokens")
    if method == "random":  # other random numbers, so other tokens
        return
    assert_same(parameters(packed), parameters(padded), atol=5e-6, rtol=1e-4)


def test_zero_budget_is_sft(tmp_path):
    """Bit for bit with a second forward pass, to rounding where the probe's is reused."""
    uniform = train(tmp_path, method="sft")
    weighted = train(tmp_path, method="vcore", kl_budget=0, reuse_forward=False)
    assert_same(parameters(weighted), parameters(uniform), atol=0, rtol=0)
    reused = train(tmp_path, method="vcore", kl_budget=0)
    assert_same(parameters(reused), parameters(uniform), atol=1e-5, rtol=1e-5)


def test_anchor_steps_weight_every_kth_step(tmp_path):
    trainer = train(tmp_path, anchor_steps=2, max_steps=4)
    with_tau = [line["step"] for line in trainer.state.log_history if "tau" in line]
    assert with_tau == [1, 3]


def test_a_direction_is_kept_for_every_steps(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, every=3, max_steps=7, direction="ema")
    draws = []
    draw = trainer._sampler.draw
    monkeypatch.setattr(
        trainer._sampler,
        "draw",
        lambda count: draws.append(trainer.state.global_step) or draw(count),
    )
    trainer.train()
    assert draws == [0, 3, 6]


def test_the_first_update_of_an_average_may_be_thorough(tmp_path):
    trainer = make_trainer(tmp_path, every=2, max_steps=5, direction="ema", ema_warmup=3)
    drawn = []
    draw = trainer._sampler.draw
    trainer._sampler.draw = lambda count: drawn.append(count) or draw(count)
    trainer.train()
    assert drawn == [12, 4, 4]
    assert trainer._schedule.state.weight == pytest.approx(0.9 * (0.9 * 3 + 1) + 1)


@pytest.mark.parametrize("direction", ["probe", "ema", "momentum"])
def test_a_preconditioned_direction_of_a_part(tmp_path, direction, caplog):
    trainer = train(
        tmp_path,
        direction=direction,
        direction_precondition=True,
        direction_params="last_1_layers,lm_head",
        optim="adamw_torch",
        learning_rate=1e-3,
    )
    assert logged(trainer, "kl") == pytest.approx([DEFAULT_KL_BUDGET] * 3, abs=1e-5)
    assert ("averages the reweighted gradients" in caplog.text) == (direction == "momentum")
    with pytest.raises(ValueError, match=r"'last_9_layers'.* has 2 layers"):
        make_trainer(tmp_path, direction_params="last_9_layers")


# ---- methods ----


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("packing", [False, True])
def test_every_method_learns(tmp_path, method, packing):
    trainer = train(
        tmp_path,
        method=method,
        packing=packing,
        rows=example_rows(8),
        max_steps=30,
        optim="adamw_torch",
        learning_rate=3e-3,
        per_device_train_batch_size=8,
    )
    losses = logged(trainer, "nll")
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize("direction", ["probe", "ema", "momentum", "adam"])
@pytest.mark.parametrize("utility_method", ["jvp", "central", "finite_difference"])
def test_every_direction_and_utility_method(tmp_path, direction, utility_method):
    trainer = train(
        tmp_path,
        direction=direction,
        utility_method=utility_method,
        optim="adamw_torch",
        learning_rate=1e-3,
        kl_budget=0.05,
    )
    kl = logged(trainer, "kl")
    assert kl == pytest.approx([0.05] * 3, abs=1e-4)
    assert all(0 < share < 1 for share in logged(trainer, "probe_time_share"))
    snr = logged(trainer, "utility_snr")
    assert len(snr) == (0 if utility_method == "jvp" else 3)
    assert all(ratio > 10 for ratio in snr)


def test_random_keeps_a_share_and_repeats_it(tmp_path):
    def tokens(**options):
        return logged(train(tmp_path, rows=example_rows(12, longest=30), **options), "nll")

    some = tokens(method="random", random_keep=0.5)
    assert some == tokens(method="random", random_keep=0.5)
    assert some != tokens(method="random", random_keep=0.5, seed=8)
    assert tokens(method="random", random_keep=1.0) == tokens(method="sft")


def test_random_keeps_the_answer(tmp_path):
    rows = example_rows(4, longest=30)
    for row in rows:
        row["answer_mask"] = [0] * (len(row["labels"]) - 2) + [1, 1]
    trainer = train(
        tmp_path, method="random", random_keep=0.01, rows=rows, max_steps=1, num_train_epochs=1
    )
    assert logged(trainer, "supervised_tokens") == [8]


def test_iw_sft_starts_as_sft_and_departs_from_it(tmp_path):
    reference = train(tmp_path, method="sft", max_steps=1)
    first = train(tmp_path, method="iw_sft", max_steps=1)
    assert_same(parameters(first), parameters(reference), atol=1e-6, rtol=1e-5)
    sft, weighted = (train(tmp_path, method=method, max_steps=6) for method in ("sft", "iw_sft"))
    assert logged(weighted, "loss")[-1] > 1.01 * logged(weighted, "nll")[-1]
    assert logged(sft, "loss")[-1] == pytest.approx(logged(sft, "nll")[-1], rel=1e-5)


def test_a_micro_batch_without_supervised_tokens(tmp_path):
    def blank_odd(rows):
        batch = PaddingCollator()(rows)
        odd = batch["example_index"] % 2 == 1
        batch["labels"][odd] = -100
        return batch

    def run(collator, rows, **options):
        trainer = make_trainer(tmp_path, rows=rows, train_sampling_strategy="sequential", **options)
        trainer.data_collator = collator
        trainer._sampler.draw = lambda count: [0]
        trainer.train()
        return parameters(trainer)

    rows = example_rows(8)
    blanked = run(blank_odd, rows, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    even = run(PaddingCollator(), rows[::2], per_device_train_batch_size=2)
    assert_same(blanked, even, atol=2e-6, rtol=1e-5)


# ---- models ----


def test_lora_moves_and_probes_adapters_only(tmp_path):
    model = with_lora(qwen3())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = train(tmp_path, model=model, direction="ema", every=2)
    assert len(logged(trainer, "kl")) == 3
    tensors, _ = trainer._schedule.state_dict()
    probed = [name for name in tensors if name.startswith("direction/")]
    assert probed
    assert all("lora_" in name for name in probed)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]) != ("lora_" in name), name


def test_dropout_is_on_in_training_and_off_in_the_probe(tmp_path):
    def model():
        return qwen3(attention_dropout=0.4)

    with_dropout = train(tmp_path, model=model(), method="sft", max_steps=1)
    without = train(tmp_path, model=qwen3(), method="sft", max_steps=1)
    assert logged(with_dropout, "nll") != pytest.approx(logged(without, "nll"), rel=1e-3)
    probed = train(tmp_path, model=model(), max_steps=1)
    plain = train(tmp_path, model=qwen3(), max_steps=1)
    for name in ("tau", "utility_mean", "utility_std", "alpha"):
        assert logged(probed, name) == pytest.approx(logged(plain, name), rel=1e-5)
    # the probe leaves the random numbers of the training pass alone
    assert logged(probed, "nll") == pytest.approx(logged(with_dropout, "nll"), rel=1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_gradient_checkpointing_changes_nothing(tmp_path, method):
    plain = train(tmp_path, method=method, max_steps=2)
    checkpointed = train(tmp_path, method=method, max_steps=2, activation_checkpointing=True)
    assert_same(parameters(checkpointed), parameters(plain), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("method", METHODS)
def test_bf16_autocast(tmp_path, method):
    full = train(tmp_path, method=method)
    mixed = train(tmp_path, method=method, bf16=True)
    assert all(p.dtype == torch.float32 for p in mixed.model.parameters())
    losses = logged(full, "loss"), logged(mixed, "loss")
    assert losses[0] == pytest.approx(losses[1], rel=2e-2)
    assert losses[0] != losses[1]


def test_saves_a_model_that_loads(tmp_path):
    trainer = train(tmp_path, max_steps=1)
    trainer.save_model(str(tmp_path / "saved"))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert_same(dict(loaded.named_parameters()), parameters(trainer), atol=0, rtol=0)


# ---- logs and evaluation ----


def test_logs_are_complete_and_finite(tmp_path):
    trainer = train(tmp_path, max_steps=2, gradient_accumulation_steps=2)
    names = ["loss", "nll", "tau", "kl", "ess", "alpha", "utility_mean", "utility_std", "grad_norm"]
    names += ["probe_time_share", "supervised_tokens", "fallback_steps", "saturated"]
    for name in names:
        values = torch.tensor(logged(trainer, name))
        assert values.shape == (2,), name
        assert values.isfinite().all(), name
    assert logged(trainer, "fallback_steps") == [0, 0]
    assert logged(trainer, "kl") == pytest.approx([DEFAULT_KL_BUDGET] * 2, abs=1e-5)


def test_saturated_trajectories_are_counted(tmp_path):
    trainer = train(tmp_path, kl_budget=50.0, max_steps=2)
    assert logged(trainer, "saturated") == [4, 8]


@pytest.mark.parametrize("packing", [False, True])
def test_evaluation_is_a_mean_over_tokens(tmp_path, packing):
    eval_rows = example_rows(5, seed=3, longest=20)
    trainer = make_trainer(
        tmp_path, eval_rows=eval_rows, per_device_eval_batch_size=2, packing=packing
    )
    total = count = 0
    for row in eval_rows:
        batch = {k: torch.tensor([v]) for k, v in row.items()}
        with torch.no_grad():
            mean = trainer.model.eval()(**batch).loss.double()
        supervised = sum(label != -100 for label in row["labels"])
        total, count = total + mean * supervised, count + supervised
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(total / count), rel=1e-5)


def test_evaluation_with_metrics_sees_the_logits(tmp_path):
    seen = []

    def shapes(prediction):
        seen.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"one": 1.0}

    trainer = make_trainer(tmp_path, eval_rows=example_rows(3))
    plain = trainer.evaluate()
    trainer.compute_metrics = shapes
    metrics = trainer.evaluate()
    assert metrics["eval_one"] == 1.0
    assert metrics["eval_loss"] == pytest.approx(plain["eval_loss"], rel=1e-6)
    (logits, labels), *_ = seen
    assert logits[:2] == labels
    assert logits[2] == 61


# ---- what can go wrong ----


@pytest.mark.parametrize("packing", [False, True])
def test_a_step_without_supervised_tokens_is_a_connected_zero(tmp_path, packing):
    trainer = make_trainer(tmp_path, packing=packing)
    trainer.create_optimizer()
    batch = trainer.data_collator(example_rows(2))
    batch["labels"] = torch.full_like(batch["labels"], -100)
    for method in METHODS:
        trainer.args.method = method
        if method == "iw_sft":
            trainer._reference = trainer._take_reference()
            batch["example_index"] = torch.tensor([], dtype=torch.int64)
        trainer.model.zero_grad()
        trainer._step_batches = [batch]
        trainer._step_weights = trainer._probe() if method == "vcore" else None
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(0))
        loss.backward()
        assert loss.item() == 0
        grads = [p.grad for p in trainer.model.parameters()]
        assert all(g is not None and g.count_nonzero() == 0 for g in grads)


def test_a_direction_with_nan_falls_back_to_uniform(tmp_path, monkeypatch):
    import vcore_train.direction_schedule as schedule

    real = schedule.read_direction

    def broken(state, model, **options):
        direction = real(state, model, **options)
        if trainer.state.global_step == 1:
            next(iter(direction.values())).view(-1)[0] = float("nan")
        return direction

    trainer = make_trainer(tmp_path, max_steps=3, every=2)
    monkeypatch.setattr(schedule, "read_direction", broken)
    trainer.args.every = 1
    trainer.train()
    assert logged(trainer, "fallback_steps") == [0, 1, 1]
    assert [line["step"] for line in trainer.state.log_history if "tau" in line] == [1, 3]
    assert all(p.isfinite().all() for p in trainer.model.parameters())


def test_utilities_with_inf_fall_back_to_uniform(tmp_path, monkeypatch):
    import vcore_train.mixin as module

    real = module.token_utilities_and_nll

    def broken(*args, **options):
        result = real(*args, **options)
        result.utility[result.utility != 0] = float("inf")
        return result

    monkeypatch.setattr(module, "token_utilities_and_nll", broken)
    weighted = train(tmp_path, max_steps=2, reuse_forward=False)
    uniform = train(tmp_path, method="sft", max_steps=2)
    assert logged(weighted, "fallback_steps") == [1, 2]
    assert_same(parameters(weighted), parameters(uniform), atol=0, rtol=0)


def test_wrong_arguments(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(TypeError, match=r"args must be a VcoreConfig, got TrainingArguments"):
        VcoreTrainer(qwen3(), args, train_dataset=example_rows())
    args = VcoreConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True)
    with pytest.raises(ValueError, match=r"compute_loss_func would replace the objective"):
        VcoreTrainer(qwen3(), args, compute_loss_func=lambda *_: 0)
    model = qwen3().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no trainable parameter"):
        VcoreTrainer(model, args, train_dataset=example_rows())


@pytest.mark.parametrize(
    ("optimizer", "direction"),
    [
        (lambda p: torch.optim.SGD(p, 0.1), "momentum"),
        (lambda p: torch.optim.SGD(p, 0.1, momentum=0.9), "adam"),
        (lambda p: torch.optim.Adagrad(p), "momentum"),
        (lambda p: type("AdamW8bit", (torch.optim.AdamW,), {})(p), "adam"),
    ],
)
def test_optimizers_without_readable_moments(tmp_path, optimizer, direction):
    model = qwen3()
    args = VcoreConfig(
        output_dir=str(tmp_path), report_to="none", use_cpu=True, direction=direction
    )
    with pytest.raises(ValueError, match=rf"direction='{direction}' .* has none that it can read"):
        VcoreTrainer(
            model,
            args,
            train_dataset=example_rows(),
            optimizers=(optimizer(model.parameters()), None),
        )
    with pytest.raises(ValueError, match=r"direction_precondition=True .* has none that it can"):
        VcoreTrainer(
            model,
            VcoreConfig(**{**args.to_dict(), "direction": "ema", "direction_precondition": True}),
            train_dataset=example_rows(),
            optimizers=(torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), None),
        )
    with pytest.raises(ValueError, match=r"SGD as configured has none"):
        train(tmp_path, optim="sgd", direction="momentum")
    sgd = train(tmp_path, optim="sgd", direction="momentum", optim_args="momentum=0.9")
    assert len(logged(sgd, "kl")) == 3


def test_quantised_models_and_the_forward_derivative(tmp_path):
    model = with_lora(qwen3())
    model.get_base_model().hf_quantizer = SimpleNamespace(is_trainable=True)
    with pytest.raises(ValueError, match=r"utility_method='jvp' cannot pass .*'central'"):
        make_trainer(tmp_path, model=model)
    assert make_trainer(tmp_path, model=model, utility_method="central").args.method == "vcore"


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter(example_rows())


def test_iterable_datasets(tmp_path):
    trainer = train(tmp_path, rows=Stream(), method="sft", max_steps=2)
    assert len(logged(trainer, "nll")) == 2
    trainer = train(tmp_path, rows=Stream(), direction="adam", optim="adamw_torch")
    assert [line["step"] for line in trainer.state.log_history if "kl" in line] == [2, 3]
    with pytest.raises(ValueError, match=r"direction='probe' draws examples by number"):
        make_trainer(tmp_path, rows=Stream())
    with pytest.raises(ValueError, match=r"method='iw_sft' .* iterable"):
        make_trainer(tmp_path, rows=Stream(), method="iw_sft")


def test_training_returns_no_outputs(tmp_path):
    trainer = make_trainer(tmp_path)
    batch = PaddingCollator()(example_rows(2))
    with pytest.raises(ValueError, match="no outputs to return in training"):
        trainer.compute_loss(trainer.model.train(), batch, return_outputs=True)
    loss, outputs = trainer.compute_loss(trainer.model.eval(), batch, return_outputs=True)
    assert outputs.logits.shape[:2] == batch["labels"].shape
    assert loss.isfinite()


def test_an_empty_training_set(tmp_path):
    with pytest.raises(ValueError, match="dataset: no examples"):
        make_trainer(tmp_path, rows=[])


def test_probing_is_a_share_of_the_steps_alone(tmp_path):
    class Slow(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            time.sleep(0.5)

    trainer = train(tmp_path, max_steps=2, callbacks=[Slow()])
    assert min(logged(trainer, "probe_time_share")) > 0.1


def test_a_loss_that_is_nan_is_logged_as_such(tmp_path):
    model = qwen3()
    with torch.no_grad():
        model.model.norm.weight.mul_(float("nan"))
    trainer = make_trainer(tmp_path, model=qwen3(), method="sft", max_steps=1)
    trainer.model.load_state_dict(model.state_dict())
    trainer.train()
    assert all(math.isnan(loss) for loss in logged(trainer, "loss"))


def test_evaluation_pads_what_processes_gather(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, eval_rows=example_rows(5), per_device_eval_batch_size=4)
    plain = trainer.evaluate()["eval_loss"]
    shapes = []

    def padded(sums, dim=0):
        shapes.append(sums.shape)
        return torch.cat([sums, sums.new_zeros(4 - len(sums), 2)])

    monkeypatch.setattr(trainer.accelerator, "pad_across_processes", padded)
    assert trainer.evaluate()["eval_loss"] == plain
    assert shapes == [(4, 2), (1, 2)]


def test_rows_outside_the_vocabulary(tmp_path):
    with pytest.raises(ValueError, match=r"input_ids of example 16 .* vocabulary of 61, got 61"):
        make_trainer(tmp_path, rows=[*example_rows(16), {"input_ids": [61, 4], "labels": [4, 4]}])


@pytest.mark.parametrize("packing", [False, True])
@pytest.mark.parametrize("labelled", [False, True])
def test_prediction_keeps_every_row_in_its_place(tmp_path, packing, labelled):
    trainer = make_trainer(tmp_path, packing=packing, per_device_eval_batch_size=2)
    rows = example_rows(5, seed=4)
    rows[3]["labels"] = [-100] * len(rows[3]["labels"])
    if not labelled:
        rows = [{"input_ids": row["input_ids"]} for row in rows]
    output = trainer.predict(rows)
    assert len(output.predictions) == 5
    assert (output.label_ids is not None) == ("test_loss" in output.metrics) == labelled
    for row, logits in zip(rows, output.predictions, strict=True):
        with torch.no_grad():
            alone = trainer.model(input_ids=torch.tensor([row["input_ids"]])).logits[0]
        torch.testing.assert_close(torch.tensor(logits[: len(alone)]), alone, atol=1e-5, rtol=1e-4)
    if labelled:
        assert (output.label_ids[3] == -100).all()
        assert math.isfinite(output.metrics["test_loss"])


def test_evaluation_with_metrics_keeps_every_row(tmp_path):
    rows = example_rows(4, seed=4)
    rows[1]["labels"] = [-100] * len(rows[1]["labels"])
    config = make_trainer(tmp_path, packing=True).args
    trainer = VcoreTrainer(
        qwen3(),
        config,
        eval_dataset=rows,
        compute_metrics=lambda prediction: {"rows": len(prediction.label_ids)},
    )
    assert trainer.evaluate()["eval_rows"] == 4
    assert trainer.evaluate(rows[:2])["eval_rows"] == 2
