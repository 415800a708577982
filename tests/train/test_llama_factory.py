"""LLaMA-Factory with token weights: arguments, and the real package where there is one.

The package wants its own versions of transformers and others, so it runs in another environment:
``VCORE_LLAMA_FACTORY`` names its python (examples/llama_factory/requirements.txt makes it).
"""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny import tiny_model
from transformers import Trainer, TrainingArguments
from vcore_train.config import VcoreOptions
from vcore_train.llama_factory import main, split_arguments, train, trainer_class
from vcore_train.tokenizer import train_tokenizer

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "llama_factory"
PYTHON = os.environ.get("VCORE_LLAMA_FACTORY") or (
    sys.executable if importlib.util.find_spec("llamafactory") else None
)
real = pytest.mark.skipif(PYTHON is None, reason="VCORE_LLAMA_FACTORY names no python")


# ---- arguments ----


def options_of(**arguments):
    return split_arguments({"stage": "sft", **arguments})[1]


def test_each_option_has_its_argument():
    for option in fields(VcoreOptions):
        value = 0.5 if option.default is None else option.default
        options = options_of(**{f"vcore_{option.name}": value, "vcore_utility_method": "central"})
        assert options[option.name] == ("central" if option.name == "utility_method" else value), (
            option.name
        )


def test_the_released_codes_names():
    options = options_of(vcore_temperature=5e3, vcore_pre_ga=8, vcore_anchor_steps=2)
    assert options == {
        "temperature": 5e3,
        "probe_max_norm": 1.0,
        "pre_ga": 8,
        "anchor_steps": 2,
    }
    assert options_of(vcore_temperature=5e3, vcore_probe_max_norm=2.0)["probe_max_norm"] == 2
    assert "probe_max_norm" not in options_of(vcore_temperature=5e3, vcore_probe_max_norm=None)
    assert options_of(vcore_kl_budget=0.1) == {"kl_budget": 0.1}


def test_the_step_of_a_difference(caplog):
    assert options_of(vcore_epsilon=1e-4) == {}
    assert "vcore_epsilon is ignored" in caplog.text
    options = options_of(vcore_epsilon=1e-4, vcore_utility_method="finite_difference")
    assert options == {"epsilon": 1e-4, "utility_method": "finite_difference"}


def test_what_is_llama_factorys_own():
    arguments = {"stage": "sft", "lora_rank": 8, "output_dir": "out"}
    theirs, options = split_arguments({**arguments, "use_vcore": True, "vcore_every": 2})
    assert theirs == arguments
    assert options == {"every": 2}
    assert split_arguments({**arguments, "stage": "dpo", "use_vcore": False})[1] is None
    assert options_of(vcore_variance_cap=None) == {"variance_cap": None}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vcore_temprature": 1}, "unknown argument vcore_temprature.* nearest is vcore_temper"),
        ({"vcore_pre_gas": 1, "use_vcore": False}, "nearest is vcore_pre_ga"),
        ({"vcore_": 1}, "unknown argument vcore_"),
        ({"use_vcore": "yes"}, "use_vcore must be true or false, got 'yes'"),
        ({"vcore_pre_ga": 2, "vcore_probe_batch_size": 4}, "Drop one"),
        ({"stage": "dpo"}, "stage must be sft, got 'dpo'"),
        ({"use_dft_loss": True}, "use_dft_loss is another objective.*vcore_method: dft"),
        ({"use_asft_loss": True}, "use_asft_loss is another objective.*use_vcore: false"),
        ({"use_ray": True}, "use_ray trains by another trainer"),
        ({"packing": True}, "neat_packing: true and flash_attn: fa2"),
        ({"neat_packing": True, "flash_attn": "sdpa"}, "neat_packing: true and flash_attn: fa2"),
    ],
)
def test_arguments_that_cannot_be(arguments, message):
    with pytest.raises(ValueError, match=message):
        options_of(**arguments)


def test_packing_that_is_served():
    options_of(neat_packing=True, flash_attn="fa2")
    options_of(packing=True, vcore_method="sft")


class Theirs(Trainer):
    def __init__(self, finetuning_args, **kwargs):
        super().__init__(**kwargs)
        self.finetuning_args = finetuning_args


def test_probe_batches_of_so_many_micro_batches(tmp_path):
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=2, use_cpu=True)
    kind = trainer_class(Theirs, {"pre_ga": 3, "temperature": 5e3})
    trainer = kind(args=args, model=tiny_model("qwen3"), finetuning_args="theirs")
    assert trainer.args.probe_batch_size == 6
    assert trainer.args.sharpness == {"temperature": 5e3}
    assert trainer.finetuning_args == "theirs"
    with pytest.raises(ValueError, match="temperature must be a finite number above 0, got '5e3'"):
        trainer_class(Theirs, {"temperature": "5e3"})(args=args, finetuning_args=None)


def test_the_command_says_what_is_wrong(tmp_path):
    for argv in ([], ["train"], ["export", "x.yaml"]):
        with pytest.raises(SystemExit, match=r"usage: python -m .* train config"):
            main(argv)
    with pytest.raises(SystemExit, match=r"error: .*expected a YAML file"):
        main(["train", "x.json"])


@pytest.mark.skipif(bool(importlib.util.find_spec("llamafactory")), reason="it is here")
def test_where_it_is_not_installed(tmp_path):
    (tmp_path / "a.yaml").write_text("stage: sft\n")
    missing = r"needs LLaMA-Factory: pip install llamafactory==0\.9\.5"
    with pytest.raises(SystemExit, match=missing):
        main(["train", str(tmp_path / "a.yaml")])
    with pytest.raises(ImportError, match=missing):
        train({"stage": "sft"})
    assert "torchaudio" not in sys.modules  # the stand-in went again


# ---- the real package ----


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    rows = json.loads((EXAMPLE / "additions.json").read_text())
    tokenizer = train_tokenizer((row["output"] for row in rows), vocab_size=300)
    # LLaMA-Factory's template adds its own special tokens.
    size = len(tokenizer) + 16
    tiny_model("qwen3", vocab_size=size, max_position_embeddings=512).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def run(model, folder, *arguments):
    """What a run of the example's configuration logged, and the adapters it saved."""
    command = [
        *(
            "-W",
            "ignore",
            "-m",
            "vcore_train.llama_factory",
            "train",
            str(EXAMPLE / "lora_sft.yaml"),
        ),
        f"model_name_or_path={model}",
        f"dataset_dir={EXAMPLE}",
        f"output_dir={folder}",
        *("max_steps=3", "save_steps=3", "seed=3", *arguments),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    assert PYTHON is not None
    done = subprocess.run(
        [PYTHON, *command], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    assert (folder / "checkpoint-3" / "adapter_model.safetensors").exists()
    state = json.loads((folder / "trainer_state.json").read_text())
    history = [line for line in state["log_history"] if "loss" in line]
    assert len(history) == 3
    return history, load_file(folder / "adapter_model.safetensors")


UNPATCHED = ("use_vcore=false",)  # LLaMA-Factory's run_exp, its own trainer


@real
@pytest.mark.slow
def test_sft_is_what_llama_factory_trains(model, tmp_path):
    plain, expected = run(model, tmp_path / "plain", *UNPATCHED)
    ours, adapters = run(model, tmp_path / "ours", "vcore_method=sft", "vcore_kl_budget=null")
    assert adapters.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(adapters[name], value, atol=1e-6, rtol=1e-5)
    for left, right in zip(ours, plain, strict=True):
        assert left["loss"] == pytest.approx(right["loss"], rel=1e-4)
        assert left["grad_norm"] == pytest.approx(right["grad_norm"], rel=1e-3)
    assert "nll" not in plain[0]
    assert "nll" in ours[0]


@real
@pytest.mark.slow
def test_tokens_are_weighted(model, tmp_path):
    _, uniform = run(model, tmp_path / "sft", "vcore_method=sft")
    history, adapters = run(model, tmp_path / "vcore", "vcore_kl_budget=0.1")
    for line in history:
        assert line["kl"] == pytest.approx(0.1, rel=0.05)
        assert line["fallback_steps"] == 0
        assert line["utility_std"] > 0
    assert any((adapters[name] - uniform[name]).abs().max() > 1e-6 for name in uniform)
    kept = json.loads((tmp_path / "vcore" / "adapter_config.json").read_text())
    assert kept["r"] == 8


@real
@pytest.mark.slow
def test_the_released_codes_configuration(model, tmp_path):
    history, _ = run(
        model,
        tmp_path,
        *("vcore_kl_budget=null", "vcore_temperature=0.01", "vcore_epsilon=0.0001"),
        *("vcore_pre_ga=4", "vcore_anchor_steps=2", "vcore_utility_method=finite_difference"),
    )
    # Every second step, and every trajectory at the given temperature.
    assert ["tau" in line for line in history] == [True, False, True]
    assert history[0]["tau"] == pytest.approx(100)


@real
@pytest.mark.slow
def test_a_resumed_run(model, tmp_path):
    options = ("vcore_direction=ema", "save_steps=1", "lr_scheduler_type=constant")
    whole, expected = run(model, tmp_path / "whole", *options)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    resumed, adapters = run(
        model, tmp_path / "again", *options, f"resume_from_checkpoint={checkpoint}"
    )
    assert resumed[-1]["supervised_tokens"] == whole[-1]["supervised_tokens"]
    for name, value in expected.items():
        torch.testing.assert_close(adapters[name], value, atol=1e-6, rtol=1e-5)
