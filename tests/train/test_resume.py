import errno
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import with_lora
from training import example_rows, logged, make_trainer, parameters, qwen3
from transformers import AutoModelForCausalLM, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

# Dropout, two epochs with an uneven last step, and a checkpoint in the middle of the second or at
# its start.
RUN = {
    "optim": "adamw_torch",
    "learning_rate": 3e-3,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 2,
    "max_steps": 8,
    "save_strategy": "steps",
    "save_steps": 100,
}


def dropout_model():
    return qwen3(attention_dropout=0.3)


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            control.should_training_stop = True
            control.should_save = True


def assert_bitwise(left, right):
    for name, value in left.items():
        assert torch.equal(value, right[name]), name


@pytest.mark.parametrize(
    ("stop", "options"),  # 5 steps an epoch: stops within the first, between the two, in the second
    [
        (3, {"method": "sft"}),
        (7, {"method": "random"}),
        (5, {"method": "iw_sft"}),
        (3, {"direction": "probe"}),
        (5, {"direction": "probe"}),
        (7, {"direction": "probe", "probe_replacement": False, "every": 2}),
        (5, {"direction": "ema", "every": 3}),
        (3, {"direction": "ema", "packing": True, "anchor_steps": 2}),
        (4, {"direction": "ema", "ema_warmup": 3, "every": 3, "direction_precondition": True}),
        (7, {"direction": "momentum"}),
        (5, {"direction_params": "last_1_layers,lm_head", "every": 4}),
        (6, {"direction": "adam", "every": 4}),
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path, options, stop):
    options = {**RUN, "rows": example_rows(18), **options}
    whole = make_trainer(
        tmp_path / "whole",
        model=dropout_model(),
        save_strategy="no",
        **_but(options, "save_strategy"),
    )
    whole.train()

    first = make_trainer(
        tmp_path / "parts", model=dropout_model(), callbacks=[StopAt(stop)], **options
    )
    first.train()
    assert first.state.global_step == stop
    second = make_trainer(tmp_path / "parts", model=qwen3(seed=5, attention_dropout=0.3), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "parts" / f"checkpoint-{stop}"))

    assert_bitwise(parameters(whole), parameters(second))
    for name in ("loss", "nll", "supervised_tokens", "kl", "alpha", "utility_std", "saturated"):
        assert logged(second, name) == logged(whole, name), name


def _but(options, *names):
    return {key: value for key, value in options.items() if key not in names}


def test_lora_resumes(tmp_path):
    options = {**RUN, "max_steps": 4, "save_steps": 3, "direction": "ema", "every": 2}
    whole = make_trainer(tmp_path / "whole", model=with_lora(qwen3()), **options)
    whole.train()
    second = make_trainer(tmp_path / "whole", model=with_lora(qwen3()), **options)
    second.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert_bitwise(parameters(whole), parameters(second))


def test_state_is_safetensors_and_json(tmp_path):
    trainer = make_trainer(
        tmp_path, **{**RUN, "max_steps": 2, "save_steps": 2, "direction": "ema", "every": 2}
    )
    trainer.train()
    folder = tmp_path / "checkpoint-2"
    names = set(load_file(folder / "vcore_state.safetensors"))
    assert {name.split("/")[0] for name in names} == {"direction", "sampler"}
    values = json.loads((folder / "vcore_state.json").read_text())["values"]
    assert values["totals"]["fallback_steps"] == 0
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_checkpoint_without_state_resumes_with_a_warning(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **{**RUN, "max_steps": 2, "save_steps": 2})
    trainer.train()
    for path in tmp_path.glob("checkpoint-*/vcore_state*"):
        path.unlink()
    second = make_trainer(tmp_path, **{**RUN, "max_steps": 3})
    second.train(resume_from_checkpoint=True)
    assert "holds no state of VcoreTrainer" in caplog.text
    assert second.state.global_step == 3


# ---- whole or not at all ----


def snapshot(folder):
    return {
        path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()
    }


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("where", ["_save_rng_state", "save_state", "_flush"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, where):
    options = {**RUN, "max_steps": 3, "save_steps": 2, "save_total_limit": 1}
    first = make_trainer(tmp_path, callbacks=[StopAt(2)], **options)
    first.train()
    before = snapshot(tmp_path)
    assert (tmp_path / "checkpoint-2").is_dir()

    second = make_trainer(tmp_path, callbacks=[StopAt(3)], **options)
    owner = {
        "_save_rng_state": "vcore_train.trainer.VcoreTrainer",
        "save_state": "vcore_train.mixin",
        "_flush": "vcore_train.checkpoint",
    }[where]
    with monkeypatch.context() as patch:
        patch.setattr(f"{owner}.{where}", full_disk)
        with pytest.raises(OSError, match="No space left"):
            second.train(resume_from_checkpoint=True)
    assert snapshot(tmp_path) == before
    assert Path(get_last_checkpoint(str(tmp_path))).name == "checkpoint-2"

    third = make_trainer(tmp_path, callbacks=[StopAt(3)], **options)
    third.train(resume_from_checkpoint=True)
    assert Path(get_last_checkpoint(str(tmp_path))).name == "checkpoint-3"
    assert not (tmp_path / "checkpoint-2").exists()  # save_total_limit


def test_best_checkpoint_is_found_under_its_final_name(tmp_path):
    options = {
        **RUN,
        "max_steps": 3,
        "save_steps": 1,
        "eval_rows": example_rows(4, seed=2),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "method": "sft",
    }
    trainer = make_trainer(tmp_path, **options)
    trainer.train()
    best = Path(trainer.state.best_model_checkpoint)
    assert best.parent == tmp_path
    assert best.is_dir()
    state = json.loads((tmp_path / "checkpoint-3" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(best)


@pytest.mark.parametrize("max_steps", [3, 2])
def test_a_finished_run_is_not_trained_on(tmp_path, max_steps):
    options = {**RUN, "gradient_accumulation_steps": 1, "rows": example_rows(8)}  # 4 steps an epoch
    first = make_trainer(tmp_path, **{**options, "max_steps": 3, "save_steps": 3})
    first.train()
    second = make_trainer(tmp_path, model=qwen3(seed=5), **{**options, "max_steps": max_steps})
    output = second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert output.global_step == second.state.global_step == 3
    assert_bitwise(parameters(first), parameters(second))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probe_replacement": False}, r"from 18 examples, and the training set has 10"),
        ({"method": "iw_sft"}, r"reference of 18 examples, and the training set has 10"),
    ],
    ids=str,
)
def test_a_run_does_not_resume_with_other_data(tmp_path, options, message):
    options = {**RUN, "max_steps": 3, "save_steps": 2, **options}
    make_trainer(tmp_path, rows=example_rows(18), **options).train()
    second = make_trainer(tmp_path, rows=example_rows(10), **options)
    with pytest.raises(ValueError, match=message):
        second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_what_a_killed_process_left_is_cleaned_up(tmp_path):
    options = {**RUN, "max_steps": 3, "save_steps": 2, "method": "sft"}
    make_trainer(tmp_path, callbacks=[StopAt(2)], **options).train()
    (tmp_path / ".incomplete" / "checkpoint-3").mkdir(parents=True)
    (tmp_path / "checkpoint-2").rename(tmp_path / ".incomplete" / "checkpoint-2.retired")
    second = make_trainer(tmp_path, **{**options, "save_strategy": "no"})
    second.train(resume_from_checkpoint=True)
    assert second.state.global_step == 3
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
