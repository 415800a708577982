import json
from pathlib import Path
from typing import get_type_hints

import pytest
import torch
import yaml
from command import vcore, write_problems
from safetensors.torch import load_file
from vcore_train.commands import train
from vcore_train.config_file import RECORD, read_options, written_options

KINDS = get_type_hints(train)
SMALL = {"layers": 1, "hidden": 32, "heads": 2, "vocab-size": 300, "window": 256, "cpu": True}
EXAMPLES = Path(__file__).parents[2] / "examples" / "launch"


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    return write_problems(tmp_path_factory.mktemp("data") / "problems.jsonl", 20)


def written(folder, content, name="run.yaml"):
    path = folder / name
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def weights(out):
    return load_file(out / "model.safetensors")


def test_a_file_stands_for_the_options_and_the_command_line_wins(problems, tmp_path):
    options = {"data": problems, "method": "sft", "steps": 5, "batch_size": 4, "lr": 0.01, **SMALL}
    file = written(tmp_path, {**options, "probe-replacement": None})
    assert vcore("train", "--config", file, "--steps", 2, "--out", tmp_path / "a") == 0
    flags = [f"--{name}={value}" for name, value in SMALL.items() if name != "cpu"]
    plain = ["--method", "sft", "--steps", 2, "--batch-size", 4, "--lr", "0.01", "--cpu"]
    assert vcore("train", problems, *plain, *flags, "--out", tmp_path / "b") == 0
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    assert all(torch.equal(a[name], b[name]) for name in b)
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["steps"] == 2

    # The record repeats the run, command line and all.
    record = tmp_path / "a" / RECORD
    assert yaml.safe_load(record.read_text())["steps"] == 2
    assert vcore("train", "--config", record, "--out", tmp_path / "c") == 0
    c = weights(tmp_path / "c")
    assert all(torch.equal(a[name], c[name]) for name in a)
    records = [yaml.safe_load((tmp_path / run / RECORD).read_text()) for run in ("a", "c")]
    assert [record.pop("out") for record in records] == [str(tmp_path / "a"), str(tmp_path / "c")]
    assert records[0] == records[1]
    # It also continues it: the folder is its own.
    assert vcore("train", "--config", record, "--resume", "--steps", 3) == 0
    assert json.loads((tmp_path / "a" / "summary.json").read_text())["steps"] == 3


def test_every_option_survives_the_file(tmp_path):
    options = {
        "data": "gsm8k: main",
        "out": Path("a b/ü"),
        "method": "iw_sft",
        "iw_clip": (0.2, 1.8),
        "lr": 1e-5,
        "weight_decay": 0.0,
        "probe_replacement": False,
        "checkpointing": True,
        "warmup": 1e-12,
        "split": "007",
        "prompt_field": "1e-3",
        "tau": None,
    }
    text = written_options({**options, "resume": True, "overwrite": True, "config": Path("x")})
    assert "gradient-checkpointing: true" in text
    read = read_options(written(tmp_path, text), KINDS)
    expected = {name: value for name, value in options.items() if value is not None}
    assert read == {**expected, "out": str(options["out"]), "iw_clip": [0.2, 1.8]}


def test_json_and_scientific_notation(tmp_path):
    file = written(tmp_path, '{"lr": 1e-3, "max-grad-norm": 1}', "run.json")
    assert read_options(file, KINDS) == {"lr": 1e-3, "max_grad_norm": 1.0}
    # YAML 1.1 takes a number without a point for text.
    assert read_options(written(tmp_path, "lr: 1e-3"), KINDS) == {"lr": 1e-3}
    assert read_options(written(tmp_path, "# nothing\n"), KINDS) == {}


def test_the_example_is_read():
    options = read_options(EXAMPLES / "run.yaml", KINDS)
    assert options["kl_budget"] == 0.02
    assert options["lr"] == 2e-5


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("bach-size: 4", "no option is called 'bach-size'. Did you mean batch-size?"),
        ("kl_budgt: 4", "no option is called 'kl_budgt'. Did you mean kl-budget?"),
        ("checkpointing: true", "Did you mean gradient-checkpointing?"),
        ("zzz: 1", "no option is called 'zzz'. vcore train --help lists"),
        ("3: 1", "no option is called '3'"),
        ("config: a.yaml", "does not name another"),
        ("batch-size: 4\nbatch-size: 8", "batch-size is given twice"),
        ("batch-size: 4\nbatch_size: 8", "batch_size is given twice"),
        ("batch-size: 4.5", "batch-size must be a whole number, got 4.5"),
        ("batch-size: '4'", "batch-size must be a whole number, got '4'"),
        ("batch-size: true", "batch-size must be a whole number, got True"),
        ("batch-size: [1]", "batch-size must be a whole number, got [1]"),
        ("lr: fast", "lr must be a number, got 'fast'"),
        ("lr: true", "lr must be a number, got True"),
        ("lr: {a: 1}", "lr must be a number, got {'a': 1}"),
        ("packing: 1", "packing must be true or false, got 1"),
        ("packing: 'yes'", "packing must be true or false, got 'yes'"),
        ("split: 3", "split must be text, got 3"),
        ("method: magic", "method must be one of sft, random"),
        ("method: [sft]", "method must be one of sft, random"),
        ("iw-clip: 3", "iw-clip must be a list of 2 numbers, got 3"),
        ("iw-clip: [1, x]", "iw-clip must be a list of 2 numbers, got [1, 'x']"),
        ("- a", "expected options as 'name: value'"),
        ("steps", "expected options as 'name: value'"),
        ("a: [", "not valid YAML"),
        ("a: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("? [a]\n: 1", "not valid YAML"),
        ("model_type: qwen3", "pass it as --model-config"),
        ("steps: 0", "--steps must be at least 1, got 0"),
        ("steps: 2\nepochs: 1", "--epochs beside --steps"),
    ],
)
def test_mistakes_in_a_file(problems, tmp_path, capsys, content, message):
    file = written(tmp_path, content)
    assert vcore("train", problems, "--config", file, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert error.startswith("vcore: ")
    assert error.count("\n") == 1
    assert message in error
    assert not (tmp_path / "out").exists()


def test_mistakes_with_a_file(problems, tmp_path, capsys):
    assert vcore("train", problems, "--config", tmp_path / "none.yaml") == 1
    assert "no such file" in capsys.readouterr().err
    assert vcore("train", problems, "--config", written(tmp_path, "a", "run.toml")) == 1
    assert "expected a .yaml, .yml or .json file" in capsys.readouterr().err
    assert vcore("train", problems, "--config", written(tmp_path, '{"lr": 1,}', "x.json")) == 1
    assert "x.json, line 1: not valid JSON" in capsys.readouterr().err
    assert vcore("train", problems, "--config", written(tmp_path, '{"lr":1,"lr":2}', "y.json")) == 1
    assert "lr is given twice" in capsys.readouterr().err
    (tmp_path / "z.yaml").write_bytes(b"\xff\xfe\x00")
    assert vcore("train", problems, "--config", tmp_path / "z.yaml") == 1
    assert "z.yaml" in capsys.readouterr().err
    assert vcore("train", "--config", written(tmp_path, {"steps": 1})) == 2  # no data
    assert "data" in capsys.readouterr().err.lower()


def test_a_file_of_the_user_is_not_overwritten(problems, tmp_path, capsys):
    file = written(tmp_path, {"steps": 1, **SMALL}, RECORD)
    before = file.read_bytes()
    for more in ([], ["--overwrite"]):
        assert vcore("train", problems, "--config", file, "--out", tmp_path, *more) == 1
        assert "was not written by vcore train" in capsys.readouterr().err
    assert file.read_bytes() == before
