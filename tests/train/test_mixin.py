"""VcoreMixin before any subclass of transformers.Trainer, with its own collator and dataset."""

import pytest
import torch
from datasets import Dataset
from tiny import with_lora
from training import SHORT, example_rows, logged, parameters, qwen3
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithFlattening,
    Trainer,
    TrainingArguments,
)
from vcore_train import VcoreConfig, VcoreMixin, VcoreTrainer, with_vcore_options
from vcore_train.config import METHODS, VcoreOptions
from vcore_train.tokenizer import train_tokenizer

TOKENIZER = train_tokenizer(["digits"], vocab_size=258)


class OwnTrainer(Trainer):
    """Somebody's trainer: its learning rate falls by half after the first step."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        optimizer = self.optimizer if optimizer is None else optimizer
        self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: 1.0 if step == 0 else 0.5
        )
        return self.lr_scheduler


class OwnVcoreTrainer(VcoreMixin, OwnTrainer):
    pass


COLLATORS = {
    "padded": lambda: DataCollatorForSeq2Seq(TOKENIZER),
    "positions": DataCollatorWithFlattening,
    "boundaries": lambda: DataCollatorWithFlattening(return_flash_attn_kwargs=True),
    "boundaries alone": lambda: DataCollatorWithFlattening(
        return_position_ids=False, return_flash_attn_kwargs=True
    ),
}


def arguments(folder, **options):
    return TrainingArguments(**{**SHORT, "output_dir": str(folder), **options})


def dataset(count=16):
    """A datasets.Dataset with columns that no model takes."""
    rows = example_rows(count)
    return Dataset.from_list(
        [{**row, "note": str(n), "text": "x" * n} for n, row in enumerate(rows)]
    )


def make(folder, *, collator="padded", data=None, model=None, eval_data=None, **options):
    vcore = {n: options.pop(n) for n in list(options) if n in VcoreOptions.__dataclass_fields__}
    args = with_vcore_options(arguments(folder, **options), **vcore)
    return OwnVcoreTrainer(
        qwen3() if model is None else model,
        args,
        COLLATORS[collator](),
        train_dataset=dataset() if data is None else data,
        eval_dataset=eval_data,
    )


def train(folder, *, resume=None, **options):
    trainer = make(folder, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def assert_same(left, right, atol=1e-6):
    left, right = (x if isinstance(x, dict) else parameters(x) for x in (left, right))
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(
            value, right[name], atol=atol, rtol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("collator", ["padded", "positions", "boundaries"])
def test_sft_is_what_the_trainer_alone_trains(tmp_path, collator, accumulate):
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": accumulate}
    ours = train(tmp_path, collator=collator, method="sft", **options)
    plain = OwnTrainer(
        qwen3(), arguments(tmp_path, **options), COLLATORS[collator](), train_dataset=dataset()
    )
    plain.train()
    assert_same(ours, plain)
    assert logged(ours, "loss") == pytest.approx(logged(plain, "loss"), rel=1e-5)
    assert logged(ours, "learning_rate") == logged(plain, "learning_rate")
    assert logged(ours, "learning_rate")[1] == pytest.approx(0.05)


class Reference(VcoreTrainer):
    create_scheduler = OwnTrainer.create_scheduler


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("rows", ["list", "dataset"])
def test_each_method_is_that_of_vcore_trainer(tmp_path, method, rows):
    data = [{**row, "note": "x"} for row in example_rows()] if rows == "list" else dataset()
    options = {"method": method, "kl_budget": 0.1, "seed": 11, "max_steps": 2}
    ours = train(tmp_path, data=data, **options)
    args = VcoreConfig(**{**SHORT, "output_dir": str(tmp_path), **options})
    theirs = Reference(qwen3(), args, train_dataset=example_rows())
    theirs.train()
    assert_same(ours, theirs)
    for name in ("nll", "kl", "tau", "alpha", "supervised_tokens"):
        assert logged(ours, name) == pytest.approx(logged(theirs, name), rel=1e-4), name


def test_methods_differ(tmp_path):
    runs = [parameters(train(tmp_path, method=method, max_steps=1)) for method in METHODS]
    for i, left in enumerate(runs):
        for right in runs[:i]:
            assert any((left[name] - right[name]).abs().max() > 1e-4 for name in left)


@pytest.mark.parametrize("collator", ["positions", "boundaries", "boundaries alone"])
@pytest.mark.parametrize("method", ["dft", "vcore"])
def test_packed_batches_train_as_padded_ones(tmp_path, collator, method):
    options = {"method": method, "kl_budget": 0.1}
    padded = train(tmp_path, collator="padded", **options)
    packed = train(tmp_path, collator=collator, **options)
    assert_same(padded, packed)
    assert logged(padded, "kl") == pytest.approx(logged(packed, "kl"), rel=1e-4)


@pytest.mark.parametrize("collator", ["padded", "boundaries"])
@pytest.mark.parametrize("options", [{"method": "sft"}, {"method": "dft"}, {"tau": 30.0}])
def test_accumulation_changes_nothing(tmp_path, collator, options):
    options = {**options, "probe_batch_size": 4, "collator": collator, "max_steps": 2}
    runs = [
        train(
            tmp_path,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=4 // size,
            max_grad_norm=1.0,
            **options,
        )
        for size in (4, 2, 1)
    ]
    for run in runs[1:]:
        assert_same(runs[0], run)
        for name in ("loss", "alpha", "supervised_tokens"):
            assert logged(run, name) == pytest.approx(logged(runs[0], name), rel=1e-4), name


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    # The averaged direction, a probe order without replacement and the totals come from the
    # checkpoint.
    options = {"direction": "ema", "probe_replacement": False, "optim": "adamw_torch"}
    options |= {"learning_rate": 1e-2, "max_steps": 4, "kl_budget": 0.1}
    whole = train(tmp_path / "whole", **options)
    train(tmp_path / "cut", save_strategy="steps", save_steps=2, **options)
    resumed = train(tmp_path / "cut", resume=str(tmp_path / "cut" / "checkpoint-2"), **options)
    assert_same(whole, resumed, atol=0)
    assert logged(resumed, "supervised_tokens") == logged(whole, "supervised_tokens")
    assert logged(resumed, "kl") == logged(whole, "kl")


def test_adapters(tmp_path):
    base = with_lora(qwen3())
    trainer = train(tmp_path, model=base, kl_budget=0.1)
    start = dict(with_lora(qwen3()).named_parameters())
    for name, p in trainer.model.named_parameters():
        assert p.requires_grad == ("lora_" in name)
        assert torch.equal(p, start[name]) == ("lora_" not in name)
    assert min(logged(trainer, "kl")) > 0


def test_evaluation_is_the_trainers_own(tmp_path):
    shapes = []

    def metrics(prediction):
        shapes.append((prediction.predictions.shape, prediction.label_ids.shape))
        return {"count": len(prediction.label_ids)}

    data = dataset(6)
    ours = make(tmp_path, eval_data=data, per_device_eval_batch_size=2)
    plain = OwnTrainer(
        qwen3(), ours.args, COLLATORS["padded"](), train_dataset=dataset(), eval_dataset=data
    )
    before = ours.metrics.drain(ours._processes, ours.args.device)
    assert ours.evaluate()["eval_loss"] == plain.evaluate()["eval_loss"]
    assert "nll" not in ours.metrics.drain(ours._processes, ours.args.device)
    assert "nll" not in before
    ours.compute_metrics = plain.compute_metrics = metrics
    assert ours.evaluate()["eval_count"] == plain.evaluate()["eval_count"] == 6
    assert shapes[0] == shapes[1]
    left, right = ours.predict(data), plain.predict(data)
    assert (left.predictions == right.predictions).all()


# ---- what cannot be trained ----


def test_arguments_without_options(tmp_path):
    with pytest.raises(TypeError, match=r"OwnVcoreTrainer: args must have VcoreOptions"):
        OwnVcoreTrainer(qwen3(), arguments(tmp_path), train_dataset=dataset())


@pytest.mark.parametrize("named", [True, False])
def test_a_loss_function_beside_the_objective(tmp_path, named):
    def loss(outputs, labels, num_items_in_batch=None):
        return outputs.logits.sum()

    args = with_vcore_options(arguments(tmp_path))
    before = (None,) * 4  # data_collator, train_dataset, eval_dataset, processing_class
    rest, keywords = ((), {"compute_loss_func": loss})
    if not named:
        rest, keywords = (*before, None, loss), {}
    with pytest.raises(ValueError, match="OwnVcoreTrainer: compute_loss_func would replace"):
        OwnVcoreTrainer(qwen3(), args, *rest, **keywords)


def test_a_stream_serves_no_probe_batches(tmp_path):
    stream = dataset().to_iterable_dataset()
    for direction in ("probe", "ema"):
        with pytest.raises(ValueError, match=rf"direction='{direction}' draws examples by number"):
            make(tmp_path, data=stream, direction=direction)
    trainer = train(tmp_path, data=stream, direction="adam", optim="adamw_torch")
    assert len(logged(trainer, "nll")) == 3
    assert [line["step"] for line in trainer.state.log_history if "kl" in line] == [2, 3]
    train(tmp_path, data=stream, method="sft", max_steps=1)


def test_deepspeed(tmp_path):
    class UnderDeepSpeed(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.is_deepspeed_enabled = True

    class Ours(VcoreMixin, UnderDeepSpeed):
        pass

    args = with_vcore_options(arguments(tmp_path))
    with pytest.raises(ValueError, match=r"Ours: DeepSpeed .* FSDP2"):
        Ours(qwen3(), args, train_dataset=dataset())


def test_batches_without_labels(tmp_path):
    rows = [{"input_ids": row["input_ids"]} for row in example_rows()]
    trainer = make(tmp_path, data=rows, method="sft")
    with pytest.raises(ValueError, match=r"the batch has no labels .*Add `labels`"):
        trainer.train()


def test_nothing_supervised(tmp_path):
    rows = [{**row, "labels": [-100] * len(row["input_ids"])} for row in example_rows()]
    trainer = train(tmp_path, data=rows, max_steps=2)
    start = dict(qwen3().named_parameters())
    assert all(torch.equal(p, start[name]) for name, p in parameters(trainer).items())
    assert logged(trainer, "supervised_tokens") == [0, 0]


# ---- options beside somebody's arguments ----


def test_options_are_checked_and_arguments_kept(tmp_path):
    args = arguments(tmp_path, learning_rate=3e-4)
    ours = with_vcore_options(args, tau=2.0)
    assert isinstance(ours, TrainingArguments)
    assert isinstance(ours, VcoreOptions)
    assert (ours.learning_rate, ours.tau, ours.kl_budget) == (3e-4, 2.0, None)
    assert not hasattr(args, "tau")  # the given ones are as before
    with pytest.raises(TypeError, match="unknown option 'kl_budgett'"):
        with_vcore_options(args, kl_budgett=1)
    with pytest.raises(ValueError, match=r"method must be one of .* got 'iw_sft'"):
        with_vcore_options(args, method="iw_sft")


def test_options_survive_a_file(tmp_path):
    ours = with_vcore_options(arguments(tmp_path, learning_rate=3e-4), tau=2.0)
    torch.save(ours, tmp_path / "training_args.bin")  # as each checkpoint of transformers does
    loaded = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert isinstance(loaded, VcoreOptions)
    assert (loaded.learning_rate, loaded.tau) == (3e-4, 2.0)
    assert loaded.to_dict() == ours.to_dict()
    again = with_vcore_options(loaded, every=3)
    assert (again.tau, again.every, loaded.every) == (2.0, 3, 1)
    assert type(again) is type(loaded) is type(ours)
