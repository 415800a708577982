"""``vcore gvm`` and ``vcore gvm allocate`` from the command line."""

import inspect
import json
import os
import signal
from dataclasses import fields
from typing import get_args

import pytest
import torch
import transformers
from test_cli import GSM8K, vcore
from transformers import AutoModelForCausalLM, TrainingArguments
from vcore_train import GvmConfig, gvm_commands
from vcore_train.arithmetic import generate_problems
from vcore_train.gvm import config, run
from vcore_train.gvm.engines import TransformersEngine
from vcore_train.gvm.run import IterationLines
from vcore_train.models import Size, new_model
from vcore_train.run_log import read_metrics
from vcore_train.tokenizer import train_tokenizer

from vcore_kernels import ALLOCATION_RULES
from vcore_kernels.aggregation import AGGREGATIONS
from vcore_kernels.grpo_advantages import SCALES
from vcore_kernels.prompt_weights import PROMPT_WEIGHTINGS

# One character of the vocabulary at random is a digit often enough for some rewards.
VERIFIER = "gvm_cli_verifier:any_digit"
QUICK = [
    *("--iterations", 2, "--samples-per-prompt", 6, "--max-new-tokens", 6, "--lr", 1e-3),
    *("--generation-batch-size", 16, "--steps-per-iteration", 2, "--cpu"),
]


@pytest.fixture(autouse=True)
def other_libraries_speak_again():
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture(autouse=True, scope="module")
def verifier_module(tmp_path_factory):
    folder = tmp_path_factory.mktemp("modules")
    (folder / "gvm_cli_verifier.py").write_text(
        "def any_digit(text, answer):\n    return any(c in 'aeiou0123456789' for c in text)\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        yield


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = ({"question": p.prompt, "answer": p.response} for p in generate_problems(6))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [text for p in generate_problems(40) for text in (p.prompt, p.response)]
    tokenizer = train_tokenizer(texts, vocab_size=300, window=256)
    size = Size(layers=1, hidden=32, heads=2, window=256)
    new_model(size.config(), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(problems, model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "out"
    command = ["gvm", problems, "--model", model, "--out", out, *QUICK, "--verifier", VERIFIER]
    assert vcore(*command, "--eval-data", problems, "--eval-limit", 3) == 0
    return out


def test_a_run_leaves_a_model_rollouts_metrics_and_a_plot(trained):
    AutoModelForCausalLM.from_pretrained(trained)
    rows = read_metrics(trained / "metrics.jsonl")
    assert [row["iteration"] for row in rows if "accept_rate" in row] == [0, 1]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert len([row for row in rows if "eval_accuracy" in row]) == 3
    assert (trained / "plots" / "run.png").read_bytes().startswith(b"\x89PNG")
    summary = json.loads((trained / "summary.json").read_text())
    assert (summary["iterations"], summary["steps"], summary["rollouts"]) == (2, 4, 72)
    assert 0 < summary["first_accept_rate"] <= 1
    responses = (trained / "rollouts" / "iteration-0001" / "responses.jsonl").read_text()
    assert len([line for line in responses.splitlines() if '"text"' in line]) == 36


def test_every_option_of_the_configuration_is_an_option(trained):
    inherited = {field.name for field in fields(TrainingArguments)}
    options = inspect.signature(gvm_commands.train).parameters
    own = [field for field in fields(GvmConfig) if field.name not in inherited]
    assert len(own) > 25
    for field in own:
        default = options[field.name].default
        assert default == field.default, field.name


def test_the_command_may_be_named_and_options_may_come_first(problems, model, tmp_path):
    for number, words in enumerate((["gvm", "train"], ["gvm"])):
        out = tmp_path / str(number)
        options = [*QUICK, "--iterations", 1, "--verifier", "exact", "--allocation", "uniform"]
        command = [*words, "--model", model, "--out", out, *options, problems]
        assert vcore(*command) == 0


def test_no_accepted_response_is_told(problems, model, tmp_path, capsys):
    out = tmp_path / "out"
    options = [*QUICK, "--iterations", 1, "--verifier", "exact", "--objective", "grpo"]
    assert vcore("gvm", problems, "--model", model, "--out", out, *options) == 0
    told = capsys.readouterr().out
    assert "No prompt was accepted" in told
    assert "of 6 prompts 6 never" in told


@pytest.mark.skipif(not GSM8K.exists(), reason="GSM8K is not here")
def test_gsm8k_with_math_verify(model, tmp_path, capsys, caplog):
    out = tmp_path / "out"
    options = [*QUICK, "--iterations", 1, "--limit", 4]
    assert vcore("gvm", GSM8K, "--model", model, "--out", out, *options) == 0
    assert "No prompt was accepted" in capsys.readouterr().out
    assert "no prompt was accepted: none of 24 responses to 4 prompts" in caplog.text
    rollouts = (out / "rollouts" / "iteration-0000" / "responses.jsonl").read_text().splitlines()
    assert all(json.loads(line).get("problem") is None for line in rollouts)


def test_interrupt_and_resume_equal_an_uninterrupted_run(
    trained, problems, model, tmp_path, capsys, monkeypatch
):
    out = tmp_path / "out"
    command = ["gvm", problems, "--model", model, "--out", out, *QUICK, "--verifier", VERIFIER]
    command += ["--eval-data", problems, "--eval-limit", 3]
    log = IterationLines.on_log

    def press(self, args, state, control, logs=None, **kwargs):
        log(self, args, state, control, logs, **kwargs)
        if "ratio" in logs and state.global_step == 1:
            os.kill(os.getpid(), signal.SIGINT)

    with monkeypatch.context() as patch:
        patch.setattr(IterationLines, "on_log", press)
        assert vcore(*command) == 130
    assert "--resume" in capsys.readouterr().out
    assert vcore(*command) == 1
    assert "holds an earlier run" in capsys.readouterr().err
    assert vcore(*command, "--resume") == 0
    a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (trained, out))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    steps = [row["step"] for row in read_metrics(out / "metrics.jsonl") if "loss" in row]
    assert steps == [1, 2, 3, 4]

    assert vcore(*command, "--overwrite", "--iterations", 1) == 0
    assert not (out / "rollouts" / "iteration-0001").exists()
    assert not (out / "checkpoint-4").exists()


def test_a_finished_run_resumes_to_nothing(trained, problems, model, tmp_path, capsys):
    before = (trained / "metrics.jsonl").read_text()
    command = ["gvm", problems, "--model", model, "--out", trained, *QUICK, "--verifier", VERIFIER]
    assert vcore(*command, "--resume", "--eval-data", problems, "--eval-limit", 3) == 0
    assert (trained / "metrics.jsonl").read_text() == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--iterations", "0"], "--iterations must be at least 1"),
        (["--temperature", "0"], "--temperature must be above 0"),
        (["--stage1-samples", "6"], "Raise --samples-per-prompt, lower --stage1-samples"),
        (["--lora-rank", "4"], "--lora-rank means nothing without --lora"),
        (["--dual-clip", "3"], "--dual-clip means nothing without --objective grpo"),
        (["--eval-limit", "3"], "--eval-limit means nothing without --eval-data"),
        (["--allocation-options", "{"], "--allocation-options {: not valid JSON"),
        (["--allocation-options", "[1]"], "expected a JSON object"),
        (["--allocation-options", '{"enough": 2}'], "no option 'enough'"),
        (["--verifier", "best"], "--verifier best: no such verifier. Expected exact, math-verify"),
        (["--verifier", ":"], "--verifier :: no such verifier"),
        (["--grad-norm-params", "head"], "head"),
        (["--verifier", "nowhere:f"], "--verifier nowhere:f: No module named"),
        (["--engine", "vllm"], "vllm is not installed"),
        (["--answer-field", "nothing"], "'nothing'"),
        (["--max-new-tokens", "250"], "more than the model's window of 256"),
        (["--prompts-per-iteration", "9"], "there are 6 prompts"),
    ],
    ids=str,
)
def test_bad_options_are_one_line(problems, model, tmp_path, capsys, options, message):
    command = ["gvm", problems, "--model", model, "--out", tmp_path / "out", *QUICK]
    assert vcore(*command, "--verifier", "exact", *options) in (1, 2)
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "rollouts").exists()


def test_the_choices_are_those_of_the_library():
    for choices, names in (
        (gvm_commands.Rule, ALLOCATION_RULES),
        (gvm_commands.Aggregation, AGGREGATIONS),
        (gvm_commands.Weighting, PROMPT_WEIGHTINGS),
        (gvm_commands.Scale, SCALES),
        (gvm_commands.Objective, config.OBJECTIVES),
        (gvm_commands.Norm, config.NORMS),
        (gvm_commands.Format, config.FORMATS),
        (gvm_commands.Engine, run.ENGINES),
    ):
        assert set(get_args(choices)) == set(names)


def test_interrupt_while_sampling(problems, model, trained, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    command = ["gvm", problems, "--model", model, "--out", out, *QUICK, "--verifier", VERIFIER]
    command += ["--eval-data", problems, "--eval-limit", 3]
    sample, calls = TransformersEngine.sample, []

    def press(self, *args, **kwargs):
        calls.append(None)
        if len(calls) == 3:  # the first is of the evaluation
            os.kill(os.getpid(), signal.SIGINT)
        return sample(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TransformersEngine, "sample", press)
        assert vcore(*command) == 130
    assert len(calls) == 3
    assert "responses sampled so far" in capsys.readouterr().out
    responses = out / "rollouts" / "iteration-0000" / "responses.jsonl"
    assert responses.read_text().count('"chunk"') == 2
    assert vcore(*command, "--resume") == 0
    a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (trained, out))
    assert all(torch.equal(value, b[name]) for name, value in a.items())


def test_the_model_is_required(problems, capsys):
    assert vcore("gvm", problems) == 2
    assert "--model" in capsys.readouterr().err


# ---- allocate ----


def test_allocate_a_table(tmp_path, capsys):
    table, out = tmp_path / "table.jsonl", tmp_path / "counts.jsonl"
    rows = [{"p": 0.25, "G": 2.0}, {"p": 0.0, "G": 0.0}, {"p": 1.0, "G": 1.0}]
    table.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    assert vcore("gvm", "allocate", table, "--budget", 10, "--out", out) == 0
    counts = [json.loads(line)["count"] for line in out.read_text().splitlines()]
    assert counts == [8, 0, 2]
    options = ["--options", '{"max_accept_rate": 0.5}']
    assert vcore("gvm", "allocate", table, "--budget", 10, "--out", out, *options) == 0
    assert [json.loads(line)["count"] for line in out.read_text().splitlines()] == [10, 0, 0]


def test_allocate_what_a_run_measured(trained, tmp_path, capsys):
    table = trained / "rollouts" / "iteration-0000" / "prompts.jsonl"
    assert vcore("gvm", "allocate", table, "--budget", 12) == 0
    assert "12" in capsys.readouterr().out


def test_allocate_nothing(tmp_path, capsys):
    table = tmp_path / "table.jsonl"
    table.write_text('{"p": 0, "G": 0}\n{"p": 0, "G": 0}\n')
    assert vcore("gvm", "allocate", table, "--budget", 10) == 1
    assert "of 2 prompts 2 have accept_rate 0" in capsys.readouterr().err
