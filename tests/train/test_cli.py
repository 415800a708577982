import inspect
import json
import math
import os
import signal
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_args

import pytest
import torch
import transformers
from command import vcore, write_problems
from transformers import AutoModelForCausalLM, AutoTokenizer
from vcore_train import command_options, commands, config, models, run_log
from vcore_train.cli import main
from vcore_train.commands import train
from vcore_train.config import VcoreConfig
from vcore_train.run_log import read_metrics

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"
TINY = ["--layers", "1", "--hidden", "32", "--heads", "2", "--vocab-size", "300", "--window", "256"]
QUICK = [*TINY, "--batch-size", "4", "--log-every", "1", "--cpu"]


@pytest.fixture(autouse=True)
def other_libraries_speak_again():
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl", 40)


@pytest.fixture(scope="module")
def trained(problems, tmp_path_factory):
    """A tiny model, three steps of VCORE old."""
    out = tmp_path_factory.mktemp("run") / "out"
    assert (
        vcore("train", problems, "--out", out, "--steps", 3, *QUICK, "--eval-data", problems) == 0
    )
    return out


def test_train_leaves_a_model_metrics_and_plots(trained, capsys):
    model = AutoModelForCausalLM.from_pretrained(trained)
    tokenizer = AutoTokenizer.from_pretrained(trained)
    inputs = tokenizer("17 + 5", return_tensors="pt")
    logits = model(input_ids=inputs["input_ids"]).logits
    assert logits.shape[-1] == len(tokenizer)
    assert torch.isfinite(logits).all()

    rows = [row for row in read_metrics(trained / "metrics.jsonl") if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    for row in rows:
        for name in ("loss", "nll", "kl", "tau", "ess", "alpha"):
            assert math.isfinite(row[name])
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["steps"] == 3
    assert math.isfinite(summary["eval_loss"])
    for name in ("loss.png", "weights.png"):
        assert (trained / "plots" / name).read_bytes().startswith(b"\x89PNG")


def test_every_option_of_the_configuration_is_an_option_of_train():
    inherited = {field.name for field in fields(transformers.TrainingArguments)}
    own = [field for field in fields(VcoreConfig) if field.name not in inherited]
    options = inspect.signature(train).parameters
    flags = ("method", "packing")
    assert len(own) > 20
    for field in own:
        text = options[field.name].annotation.__metadata__[0].help
        if field.default is not None and field.name not in flags:
            assert f"(default: {field.default})" in text, field.name


@pytest.mark.parametrize("method", ["sft", "random", "dft", "iw_sft"])
def test_every_method_trains(problems, tmp_path, capsys, method):
    out = tmp_path / "out"
    options = [*(["--iw-clip", "0.5", "2", "--iw-temp", "0.5"] * (method == "iw_sft")), *QUICK]
    assert vcore("train", problems, "--method", method, "--out", out, "--steps", 2, *options) == 0
    assert "training loss" in capsys.readouterr().out
    assert {row["method"] for row in read_metrics(out / "metrics.jsonl")} == {method}


def test_same_seed_same_model(problems, tmp_path):
    for name in ("a", "b"):
        assert vcore("train", problems, "--out", tmp_path / name, "--steps", 2, *QUICK) == 0
    a, b = (
        AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("a", "b")
    )
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_an_earlier_run_is_not_overwritten_by_accident(trained, problems, capsys):
    before = (trained / "metrics.jsonl").read_bytes()
    assert vcore("train", problems, "--out", trained, "--steps", 1, *QUICK) == 1
    assert "--overwrite" in capsys.readouterr().err
    assert (trained / "metrics.jsonl").read_bytes() == before


def test_interrupt_saves_and_resume_equals_an_uninterrupted_run(
    problems, tmp_path, capsys, monkeypatch
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    command = ["train", problems, "--steps", 4, *QUICK]
    assert vcore(*command, "--out", whole) == 0

    step_end = run_log.RunLog.on_step_end

    def press(self, args, state, control, **kwargs):
        step_end(self, args, state, control, **kwargs)
        if state.global_step == 2:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(run_log.RunLog, "on_step_end", press)
        capsys.readouterr()
        assert vcore(*command, "--out", parts) == 130
    assert "--resume" in capsys.readouterr().out
    assert (parts / "checkpoint-2").is_dir()
    AutoModelForCausalLM.from_pretrained(parts / "checkpoint-2")

    assert vcore(*command, "--out", parts, "--resume") == 0
    steps = [row["step"] for row in read_metrics(parts / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4]
    a, b = (AutoModelForCausalLM.from_pretrained(run).state_dict() for run in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_lora_over_a_pretrained_model(trained, problems, tmp_path, capsys):
    from peft import AutoPeftModelForCausalLM

    out = tmp_path / "adapter"
    command = ["train", problems, "--model", trained, "--lora", "--lora-rank", 2, "--cpu"]
    assert vcore(*command, "--out", out, "--steps", 2, "--batch-size", 4, "--log-every", 1) == 0
    assert "of them trained" in " ".join(capsys.readouterr().out.split())
    model = AutoPeftModelForCausalLM.from_pretrained(out)
    assert any("lora_B" in name and p.abs().max() > 0 for name, p in model.named_parameters())
    assert not (out / "model.safetensors").exists()


def test_configuration_file_packing_and_accumulation(problems, tmp_path):
    config = tmp_path / "config.json"
    config.write_text(
        json.dumps(
            {
                "model_type": "llama",
                "hidden_size": 32,
                "intermediate_size": 64,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "max_position_embeddings": 256,
            }
        )
    )
    command = ["train", problems, "--model-config", config, "--steps", 2, "--batch-size", 2]
    options = ["--cpu", "--packing", "--accumulation", 2, "--vocab-size", 300, "--bf16"]
    assert vcore(*command, *options, "--out", tmp_path / "out") == 0
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.model_type == "llama"


@pytest.mark.skipif(not GSM8K.exists(), reason="the shared GSM8K data is not here")
def test_gsm8k(tmp_path):
    out = tmp_path / "out"
    size = ["--layers", "2", "--hidden", "64", "--heads", "2", "--vocab-size", "600"]
    command = ["train", GSM8K, "--method", "vcore", "--limit", 200, "--steps", 8, "--cpu", *size]
    assert vcore(*command, "--batch-size", 4, "--log-every", 1, "--warmup", 1, "--out", out) == 0
    rows = [row for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert all(math.isfinite(v) for row in rows for v in row.values() if isinstance(v, float))
    assert sum(row["nll"] for row in rows[-2:]) < sum(row["nll"] for row in rows[:2])
    AutoModelForCausalLM.from_pretrained(out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tau", "1", "--kl-budget", "0.1"], "at most one of"),
        (["--kl-budget", "-1"], "--kl-budget must be at least 0"),
        (["--steps", "0"], "--steps must be at least 1"),
        (["--epsilon", "0", "--utility-method", "central"], "--epsilon must be above 0"),
        (["--prompt-field", "nope"], "row 1: the prompt field 'nope' is missing"),
        (["--max-length", "20"], "row 1: the trajectory has"),
        (["--max-length", "2000"], "more than the model's window, 256"),
        (["--hidden", "33"], "--hidden 33 is not an even multiple"),
        (["--lora"], "pass --model"),
        (["--model-config", "none.json"], "none.json"),
        (["--resume"], "no checkpoint-* folder"),
        (["--dtype", "bfloat16"], "--dtype means nothing without --model"),
        (["--lora-rank", "2", "--lora-alpha", "4"], "--lora-rank, --lora-alpha mean nothing"),
        (["--method", "sft", "--kl-budget", "0.1"], "--kl-budget means nothing without --method"),
        (["--method", "dft", "--tau", "1"], "--tau means nothing without --method vcore"),
        (["--iw-temp", "2"], "--iw-temp means nothing without --method iw_sft"),
        (["--method", "sft", "--no-probe-replacement"], "--probe-replacement means nothing"),
        (["--random-keep", "0.5"], "--random-keep means nothing without --method random"),
        (["--ema-warmup", "4"], "--ema-warmup means nothing without --direction ema"),
        (["--ema-decay", "0.5"], "--ema-decay means nothing without --direction ema"),
        (["--epsilon", "0.1"], "--epsilon means nothing without --utility-method"),
        (["--tau", "1", "--kl-scope", "batch"], "--kl-scope beside --tau"),
        (["--steps", "2", "--epochs", "1"], "--epochs beside --steps"),
        (["--eval-limit", "0"], "--eval-limit must be at least 1, got 0"),
        (["--eval-limit", "1"], "--eval-limit means nothing without --eval-data"),
        (["--limit", "0"], "--limit must be at least 1, got 0"),
        (["--max-grad-norm", "-1"], "--max-grad-norm must be at least 0"),
        (["--lr", "nan"], "--lr must be above 0, got nan"),
        (["--seed", "-1"], "--seed must be at least 0 and at most 4294967295, got -1"),
        (["--layers", "0"], "--layers must be at least 1, got 0"),
        (["--direction", "adam", "--optim", "sgd"], "--direction"),
        (
            ["--variance-control", "trajectory", "--batch-size", "1"],
            "and --batch-size * --accumulation is 1",
        ),
        (["--vocab-size", "10"], "vcore: --vocab-size must be at least"),
        (
            ["--reuse-forward", "--utility-method", "central"],
            "vcore: --reuse-forward means nothing without --utility-method jvp",
        ),
        (["--reuse-forward", "--method", "sft"], "--reuse-forward means nothing without --method"),
    ],
)
def test_mistakes_get_one_line_and_exit_code_1(problems, tmp_path, capsys, options, message):
    out = tmp_path / "out"
    size = [] if "--model-config" in options else QUICK
    assert vcore("train", problems, "--out", out, *size, *options) == 1
    error = capsys.readouterr().err
    assert error.startswith("vcore: ")
    assert message in error
    assert "Vcore" not in error
    assert "Size(" not in error
    assert error.count("\n") == 1
    assert not (out / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("choices", "allowed"),
    [
        (command_options.Method, ("sft", "random", "dft", "iw_sft", "vcore")),
        (commands.Direction, config.DIRECTIONS),
        (command_options.UtilityMethod, config.UTILITY_METHODS),
        (commands.VarianceControl, config.VARIANCE_CONTROLS),
        (commands.KlScope, config.KL_SCOPES),
        (commands.IwLevel, config.IW_LEVELS),
    ],
)
def test_the_choices_of_an_option_are_those_of_the_configuration(choices, allowed):
    assert get_args(choices) == allowed


@pytest.mark.parametrize("error", [KeyError("nope"), IndexError("out"), ZeroDivisionError("by 0")])
def test_unforeseen_errors_are_one_line_without_debug(
    problems, tmp_path, capsys, monkeypatch, error
):
    def fail(self):
        raise error

    monkeypatch.setattr(models.Size, "config", fail)
    assert vcore("train", problems, "--out", tmp_path / "out", *QUICK) == 1
    message = capsys.readouterr().err
    assert message.startswith(f"vcore: {type(error).__name__}")
    assert message.count("\n") == 1
    with pytest.raises(type(error)):
        main(["--debug", "train", problems, "--out", str(tmp_path / "out"), *QUICK])


def test_more_mistakes(tmp_path, capsys):
    assert vcore("train", tmp_path / "none.jsonl") == 1
    assert "no such file" in capsys.readouterr().err
    broken = tmp_path / "x.jsonl"
    broken.write_text('{"question": "q", "answer": ""}\n')
    assert vcore("train", broken, "--out", tmp_path / "out") == 1
    assert "row 1: the response (field 'answer') is empty" in capsys.readouterr().err
    assert vcore("train", broken, "--method", "magic") == 2
    assert vcore("train", broken, "--model", tmp_path, "--layers", 3) == 1
    assert "--layers beside --model: the size is given by --model" in capsys.readouterr().err
    broken.write_text('{"question": "q", "answer": "a"}\n')
    assert vcore("train", broken, "--model", tmp_path, "--out", tmp_path / "out") == 1
    assert "it holds no config.json" in capsys.readouterr().err
    assert vcore("train", broken, "--model", tmp_path / "nowhere", "--out", tmp_path / "out") == 1
    assert "no such folder" in capsys.readouterr().err
    assert vcore("train", broken, "--out", broken) == 1
    assert "is a file, expected a folder" in capsys.readouterr().err
    with pytest.raises(FileNotFoundError):
        main(["--debug", "train", str(tmp_path / "none.jsonl")])


@pytest.mark.parametrize("missing", ["typer", "rich"])
def test_missing_extra_is_named(monkeypatch, capsys, missing):
    for name in list(sys.modules):
        if name in ("vcore_train.commands", "vcore_train.console"):
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    if missing == "rich":
        monkeypatch.setitem(sys.modules, "rich.console", None)
    assert vcore("info") == 1
    assert "pip install 'vcore_kernels[train]'" in capsys.readouterr().err


def test_help_and_info(capsys):
    assert vcore("--help") == 0
    assert "show-weights" in capsys.readouterr().out
    assert vcore("info") == 0
    out = capsys.readouterr().out
    for name in ("reference", "cpp", "torch", "transformers", "threads", "gpu"):
        assert name in out


def test_overwrite_replaces_the_whole_earlier_run(problems, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", problems, "--method", "sft", "--out", out, *QUICK]
    assert vcore(*command, "--steps", 3, "--save-every", 2) == 0
    (out / "notes.txt").write_text("mine")
    (out / ".incomplete").mkdir()
    before = {path.name for path in out.iterdir()}
    assert {"checkpoint-2", "checkpoint-3", "model.safetensors", "plots"} <= before

    # A mistake found late leaves everything as it was.
    assert vcore(*command, "--overwrite", "--steps", 1, "--lr", -1) == 1
    assert {path.name for path in out.iterdir()} == before
    assert vcore(*command, "--overwrite", "--resume", "--steps", 1) == 1
    assert vcore("train", problems, "--model", out, "--out", out, "--overwrite", "--cpu") == 1
    assert "--overwrite would remove --model" in capsys.readouterr().err
    assert {path.name for path in out.iterdir()} == before

    assert vcore(*command, "--overwrite", "--steps", 1) == 0
    assert {p.name for p in out.glob("checkpoint-*")} == {"checkpoint-1"}
    assert (out / "notes.txt").read_text() == "mine"
    assert not (out / ".incomplete").exists()
    assert [r["step"] for r in read_metrics(out / "metrics.jsonl") if "loss" in r] == [1]


def test_overwrite_removes_the_old_model_before_the_first_step(problems, tmp_path, monkeypatch):
    out = tmp_path / "out"
    command = ["train", problems, "--method", "sft", "--out", out, "--steps", 1, *QUICK]
    assert vcore(*command) == 0
    seen = []

    def stop(self, args, state, control, **kwargs):
        seen.extend(path.name for path in out.iterdir())
        raise RuntimeError("stopped")

    monkeypatch.setattr(run_log.RunLog, "on_step_begin", stop)
    assert vcore(*command, "--overwrite") == 1
    assert seen == ["config.yaml"]


def test_resuming_a_finished_run_trains_nothing(problems, tmp_path, capsys):
    out = tmp_path / "out"
    command = ["train", problems, "--method", "sft", "--out", out, "--steps", 3, *QUICK]
    assert vcore(*command) == 0
    files = [path for path in out.rglob("*") if path.is_file()]
    before = {path: path.read_bytes() for path in files}
    assert vcore(*command, "--resume") == 0
    assert "is finished" in capsys.readouterr().out
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before

    # Killed while its last checkpoint was replaced: model and summary are made from it.
    (out / ".incomplete").mkdir()
    (out / "checkpoint-3").rename(out / ".incomplete" / "checkpoint-3.retired")
    (out / "summary.json").unlink()
    (out / "model.safetensors").unlink()
    assert vcore(*command, "--resume", "--seed", 1) == 0
    assert (out / "model.safetensors").read_bytes() == before[out / "model.safetensors"]
    summary = json.loads((out / "summary.json").read_text())
    old = json.loads(before[out / "summary.json"])
    assert summary["steps"] == 3
    assert summary["last_loss"] == old["last_loss"]
    assert (out / "metrics.jsonl").read_bytes() == before[out / "metrics.jsonl"]


@pytest.mark.parametrize("mistake", [["--lr", -1], ["--seed", -1], ["--lora-targets", "no"]])
def test_a_corrected_command_may_use_the_folder(trained, problems, tmp_path, capsys, mistake):
    out = tmp_path / "out"
    command = ["train", problems, "--method", "sft", "--out", out, "--steps", 1, "--cpu"]
    lora = ["--model", trained, "--lora"] if "--lora-targets" in mistake else TINY
    assert vcore(*command, *lora, *mistake) == 1
    assert not (out / "metrics.jsonl").exists()
    (out).mkdir(exist_ok=True)
    (out / "metrics.jsonl").touch()
    assert vcore(*command, *TINY) == 0
