import json

import pytest
import torch
from vcore_train.cli import main
from vcore_train.experiments import cost
from vcore_train.experiments.measuring import one_round, peak_bytes


def test_peak_memory_is_what_was_live_at_once():
    before = torch.zeros(1000)

    def call():
        first = torch.zeros(1 << 20)  # 4 MiB
        del first
        second, third = torch.zeros(1 << 19), torch.zeros(1 << 19)
        del second
        return before + third.sum()

    assert 4 << 20 <= peak_bytes(call) < (4 << 20) + 65536


def test_a_round_calls_each_subject_once_in_turn():
    calls = []
    seconds = one_round({name: lambda name=name: calls.append(name) for name in "abc"})
    assert calls == ["a", "b", "c"]
    assert all(value >= 0 for value in seconds.values())


def experiment(*options):
    with pytest.raises(SystemExit) as exited:
        main(["experiment", "cost", *map(str, options)])
    return exited.value.code


def test_the_study_compares_steps_of_the_same_update(tmp_path, capsys):
    out = tmp_path / "out"
    assert experiment("--quick", "--seeds", 1, "--out", out) == 0
    assert "Parts of a VCORE step" in capsys.readouterr().out
    record = json.loads((out / "cost.json").read_text())
    assert record["data"] == "random tokens"
    result = record["result"]
    subjects = {(r["trained"], r["subject"]) for r in result["steps"]}
    assert subjects >= {(t, s) for t in cost.TRAINED for s in cost.ARITHMETIC}
    for line in result["steps"]:
        assert line["ratio"][0] > 0
        assert line["peak_bytes"] > 0
        if line["subject"].startswith("SFT"):
            assert line["ratio"] == [1]
            assert line["memory_ratio"] == 1
    assert {p["part"] for p in result["parts"]} == set(cost.PARTS)
    assert (out / "cost.png").read_bytes().startswith(b"\x89PNG")
    assert experiment("--out", tmp_path / "other", "--data", __file__) == 1
    assert "whose tokens are random" in capsys.readouterr().err


def test_steps_leave_the_model_as_they_found_it():
    steps = cost.make_steps(cost.QUICK, lora=True)
    layers = [layer for layer in steps.model.modules() if hasattr(layer, "gradient_checkpointing")]
    for call in steps.calls().values():
        call()
        assert all(p.grad is None for p in steps.model.parameters())
        assert not any(layer.gradient_checkpointing for layer in layers)
