import io
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from vcore_train.experiments import run
from vcore_train.experiments.run import QUICK, UNIFORM, Arm
from vcore_train.experiments.setting import Context, batches
from vcore_train.experiments.study import StudyOptions, run_study

SMALL = replace(QUICK, seeds=1, train_steps=10, rows=120, length=128)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return Context(SMALL, tmp_path_factory.mktemp("start")).start(0)


def trained(start, arm, **options):
    judged = batches(start.held_out[:8], 8)
    options = {"steps": 4, "judged_every": 2} | options
    return run.train(start, start.held_in, judged, arm, SMALL, seed=0, **options)


@pytest.mark.parametrize("optimizer", run.OPTIMIZERS)
def test_weights_of_one_are_the_uniform_run(start, optimizer):
    uniform = trained(start, UNIFORM, optimizer=optimizer)
    assert uniform.steps == [0, 2, 4]
    assert uniform.loss[-1] < uniform.loss[0]
    for arm in (
        Arm("tau 0", {"tau": 0.0, "direction": "ema", "every": 2}),
        Arm("no budget", {"kl_budget": 0.0, "direction": "probe"}),
    ):
        same = trained(start, arm, optimizer=optimizer)
        assert same.loss == pytest.approx(uniform.loss, abs=1e-5)
        assert same.noise == pytest.approx(uniform.noise, rel=1e-3)
        assert same.alpha == pytest.approx(1)
    other = trained(start, Arm("sharp", {"kl_budget": 0.5, "direction": "probe"}))
    assert other.loss[-1] != pytest.approx(uniform.loss[-1], abs=1e-4)


def test_a_run_leaves_the_start_alone_and_repeats(start):
    before = [p.detach().clone() for p in start.model.parameters()]
    arm = Arm("shuffled", {"kl_budget": 0.1, "direction": "probe"}, shuffled=True)
    first, again = trained(start, arm), trained(start, arm)
    assert first.loss == again.loss
    assert all(map(torch.equal, before, start.model.parameters()))


def test_the_noisy_rows(start):
    rows = run.noisy(start, SMALL)
    changed = [a != b for a, b in zip(rows, start.held_in, strict=True)]
    assert changed == [i % SMALL.corrupted == 0 for i in range(len(rows))]


def test_gaps_are_paired_by_seed():
    runs = [
        {"data": "clean", "arm": arm, "seed": seed, "loss": [3.0, value]}
        for arm, values in {"uniform": (1.0, 2.0), "VCORE": (1.1, 2.1)}.items()
        for seed, value in enumerate(values)
    ]
    found = run.gap({"runs": runs}, "clean", "VCORE")
    assert (found.mean, found.half) == (pytest.approx(0.1), pytest.approx(0, abs=1e-9))


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(run, "QUICK", SMALL)
    monkeypatch.setattr(run, "ARMS", {name: arms[:2] for name, arms in run.ARMS.items()})
    monkeypatch.setattr(run, "CONTROLS", run.CONTROLS[:2])
    record = run_study("run", StudyOptions(tmp_path, quick=True), Console(file=io.StringIO()))
    assert {r["data"] for r in record["result"]["runs"]} == {"clean", "noisy"}
    assert "minus uniform" in (tmp_path / "run.md").read_text(encoding="utf-8")
    assert (tmp_path / "run.png").stat().st_size > 10_000
