import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from vcore_train.directions import uniform_gradient
from vcore_train.experiments import descent
from vcore_train.experiments.descent import QUICK, Way
from vcore_train.experiments.setting import Context, batches
from vcore_train.experiments.study import StudyOptions, run_study
from vcore_train.utilities import token_utilities

SMALL = replace(QUICK, seeds=1, train_steps=40, rows=600, population=48, held_out=64, batch_size=8)


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    return Context(SMALL, tmp_path_factory.mktemp("start")).start(0)


@pytest.fixture
def point(start):
    population = uniform_gradient(start.model, batches(start.held_out[:48], 16))
    batch = batches(start.unseen[:8], 8)[0]
    judged = batches(start.held_out[48:], 16)
    return descent.Point(start.model, start.optimizer, start.model, batch, population, judged)


def test_a_ratio_of_means_and_its_interval():
    ratio, half = descent._ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0])
    assert (ratio, half) == (2, pytest.approx(0, abs=1e-12))
    ratio, half = descent._ratio([1.0, 3.0], [1.0, 1.0])
    assert ratio == 2
    assert half == pytest.approx(12.7062, rel=1e-4)  # t of one degree times the standard error, 1


def test_uniform_weights_are_the_batch_gradient(start, point):
    gradient = point.gradient(torch.ones_like(point.nll))
    expected = uniform_gradient(start.model, point.batch)
    for name, g in gradient.items():
        torch.testing.assert_close(g, expected[name], rtol=1e-4, atol=1e-7)
    # No budget, no weights.
    utility = torch.randn(len(point.nll), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(point.gibbs(utility, 0.0, "trajectory"), torch.ones_like(utility))


def test_utilities_beat_the_same_weights_shuffled(start, point):
    average = uniform_gradient(start.model, batches(start.unseen[8:72], 16))
    utility = point.tokens.packed([token_utilities(start.model, point.batch, average)])
    weights = point.gibbs(utility, 0.02, "trajectory")
    shuffled = point.shuffled(weights, torch.Generator().manual_seed(0))
    torch.testing.assert_close(shuffled.sort().values, weights.sort().values)
    own, other = (descent.cosine(point.gradient(w), point.population) for w in (weights, shuffled))
    assert own > other + 0.01


def test_measuring_leaves_the_run_as_it_was(start, point, monkeypatch):
    monkeypatch.setattr(descent, "KL_BUDGETS", (0.1,))
    monkeypatch.setattr(descent, "DIRECTIONS", {"average": "average"})
    before = {name: p.detach().clone() for name, p in start.model.named_parameters()}
    moments = [s["exp_avg"].clone() for s in start.optimizer.state.values()]
    average = uniform_gradient(start.model, batches(start.unseen[8:24], 16))
    found = point.figures({"average": average}, 0)
    assert found[Way("uniform")]["drop_sgd_tenth"] > 0
    for way in (Way("vcore", "average", True, 0.1, "trajectory"), descent.SHUFFLED):
        assert all(map(math.isfinite, found[way].values()))
    assert all(torch.equal(p, before[name]) for name, p in start.model.named_parameters())
    after = [s["exp_avg"] for s in start.optimizer.state.values()]
    assert all(map(torch.equal, moments, after))


def test_steps_of_equal_norm(point):
    """The displacements are those of the two optimizers, scaled to the uniform step's length."""
    gradient = point.gradient(torch.ones_like(point.nll))
    for name, step, norm in point.steps(gradient):
        if name == "sgd":
            expected = [descent.SGD_LR * g for g in gradient.values()]
            for s, e in zip(step, expected, strict=True):
                torch.testing.assert_close(s, e, rtol=1e-3, atol=1e-6)
        assert norm == pytest.approx(math.sqrt(sum(float(s.square().sum()) for s in step)))


def test_the_command(tmp_path, monkeypatch):
    monkeypatch.setattr(descent, "QUICK", replace(QUICK, batches=1, lead=2, seeds=2))
    monkeypatch.setattr(descent, "KL_BUDGETS", (0.1,))
    monkeypatch.setattr(descent, "STEPPED", ("average",))
    few = {name: descent.DIRECTIONS[name] for name in ("average", "momentum")}
    monkeypatch.setattr(descent, "DIRECTIONS", few)
    out = tmp_path / "out"
    run_study("descent", StudyOptions(out, quick=True), Console(file=io.StringIO()))
    assert "less that of uniform" in (out / "descent.md").read_text(encoding="utf-8")
    assert (out / "descent.png").stat().st_size > 10_000
