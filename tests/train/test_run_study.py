import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from vcore_train.experiments import run
from vcore_train.experiments.run import QUICK, UNIFORM, Arm, Home
from vcore_train.experiments.setting import Context, batches, collate
from vcore_train.experiments.study import StudyOptions, run_study
from vcore_train.supervised import SupervisedTokens

SMALL = replace(QUICK, seeds=1, train_steps=10, rows=120, length=128)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return Context(SMALL, tmp_path_factory.mktemp("start")).start(0)


def trained(start, arm, **options):
    judged = batches(start.held_out[:8], 8)
    if options.get("optimizer") == "sgd":
        options["lr"] = 0.3
    return run.train(start, start.held_in, judged, arm, SMALL, seed=0, **options)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
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
        assert same.figures["ratio"] == pytest.approx([1] * 4, rel=1e-4)
        assert same.figures["kl"] == pytest.approx([0] * 4, abs=1e-9)
    other = trained(start, Arm("sharp", {"kl_budget": 0.5, "direction": "probe"}))
    assert other.loss[-1] != pytest.approx(uniform.loss[-1], abs=1e-4)


def test_a_run_leaves_the_start_alone_and_repeats(start):
    before = [p.detach().clone() for p in start.model.parameters()]
    arm = Arm("shuffled", {"kl_budget": 0.1, "direction": "probe"}, shuffled=True)
    first, again = trained(start, arm), trained(start, arm)
    assert first.loss == again.loss
    assert all(map(torch.equal, before, start.model.parameters()))


def test_figures_of_the_steps(start):
    budget = trained(start, Arm("budget", {"kl_budget": 0.1, "direction": "probe"}))
    assert budget.figures["kl"] == pytest.approx([0.1] * 4, rel=1e-3)
    # alpha = min(cap, sqrt(V_u / V_q)), here below the cap
    for alpha, ratio in zip(budget.figures["alpha"], budget.figures["ratio"], strict=True):
        assert alpha == pytest.approx(ratio**-0.5, rel=1e-3)
        assert alpha < 1
    assert len(budget.norms) == 4


def test_a_difference_in_fp32_trains_as_the_derivative_does(start):
    options = {"temperature": 1.0, "direction": "probe", "probe_max_norm": 1.0}
    exact = trained(start, Arm("exact", options))
    by_difference = {**options, "utility_method": "finite_difference", "epsilon": 1e-3}
    close = trained(start, Arm("paper", by_difference, head="pair"))
    assert close.loss == pytest.approx(exact.loss, abs=2e-3)
    assert close.figures["kl"] == pytest.approx(exact.figures["kl"], rel=0.1)
    assert close.figures["kl"] != exact.figures["kl"]


def test_what_watches_a_run_sees_its_judged_steps(start):
    seen = []
    trained(start, UNIFORM, watch=lambda step, model: seen.append((step, model.training)))
    assert seen == [(0, True), (2, True), (4, True)]


def test_a_run_ends_where_gradients_are_not_finite(start):
    found = trained(start, replace(UNIFORM, lr=1e30), optimizer="sgd")
    assert found.steps == [0, 2, 4]
    assert math.isnan(found.loss[-1])
    assert math.isnan(found.accuracy[-1])
    assert len(found.norms) < 4
    assert not math.isfinite(found.norms[-1])


def test_variance_ratio_by_hand():
    batch = {"input_ids": torch.tensor([[5, 5, 5]]), "labels": torch.tensor([[-100, 5, 5]])}
    tokens = SupervisedTokens.of([batch])
    utility, weights = torch.tensor([[0.0, 1.0, 3.0]]), torch.tensor([[0.0, 0.5, 1.5]])
    # s/n = 0.5, 1.5; q = 1/4, 3/4: q*s = 0.25, 2.25. Variances of two values: half the square
    # of their difference.
    assert run.variance_ratio(tokens, utility, weights) == pytest.approx(4)
    assert run.variance_ratio(tokens, utility, 7 * weights) == pytest.approx(4)


def test_spikes_by_hand():
    steady = [1.0] * 10
    assert run.spikes([*steady, 2.0, 2.1, 1.0]) == 1  # above, not at, twice the median
    assert run.spikes([9.0] * 3 + [1.0] * 7) == 0  # warm-up
    assert run.spikes([*steady, *[5.0] * 30]) == 10  # until half of the last 20 are as large
    assert run.spikes([*steady, 3.0], times=4.0) == 0
    assert run.spikes([]) == 0


def test_means_by_window():
    assert run.by_window([1, 3, 5, 7, 9], 2) == [2, 6, 9]


def test_a_start_is_one_object_for_jobs_that_follow_each_other(tmp_path):
    home = Home.of(Context(SMALL, tmp_path))
    run.make_start(home, 0)
    first = run.start_at(home, 0)
    assert first is run.start_at(home, 0)
    again = Context(SMALL, tmp_path).start(0)
    rows = [start.held_in[:2] for start in (first, again)]
    assert torch.equal(*(collate(r)["input_ids"] for r in rows))
    for p, q in zip(first.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_jobs_run_here_with_one_thread(tmp_path, monkeypatch):
    context = Context(SMALL, tmp_path)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert run.each(context, "Sums", lambda a, b: a + b, [(1, 2), (3, 4)]) == [3, 7]


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
    record = run_study("run", StudyOptions(tmp_path, quick=True), Console(file=io.StringIO()))
    assert set(record["result"]) == {"runs"}
    assert {r["data"] for r in record["result"]["runs"]} == {"clean", "noisy"}
    assert "minus uniform" in (tmp_path / "run.md").read_text(encoding="utf-8")
    assert (tmp_path / "run.png").stat().st_size > 10_000
