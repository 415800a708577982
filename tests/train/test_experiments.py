import math

import pytest
import torch
from vcore_train.cli import main
from vcore_train.experiments import statistics
from vcore_train.experiments.setting import Context, Setting, supervised
from vcore_train.experiments.setting import collate as batch_of

TINY = Setting.quick(train_steps=3, rows=40, held_out=8)


def vector(*values):
    return torch.tensor(values, dtype=torch.float64)


# ---- statistics ----


def test_correlations_of_known_values():
    x, y = vector(1, 2, 3, 4, 5), vector(2, 1, 4, 3, 5)
    assert statistics.pearson(x, y) == pytest.approx(0.8)
    assert statistics.spearman(x, x**3) == pytest.approx(1)
    assert statistics.pearson(x, -2 * x + 7) == pytest.approx(-1)
    # Ties share the mean of their ranks: 1.5, 1.5, 3 against 1, 2, 3.
    assert statistics.ranks(vector(4, 4, 9)).tolist() == [1.5, 1.5, 3]
    assert statistics.spearman(vector(4, 4, 9), vector(1, 2, 3)) == pytest.approx(math.sqrt(0.75))
    assert math.isnan(statistics.pearson(x, torch.ones(5)))
    # Values of float32 size that differ in their last digits are not lost to cancellation.
    assert statistics.pearson(1e8 + x, y) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="two vectors of one length"):
        statistics.pearson(x, vector(1, 2))


def test_correlations_within_trajectories():
    x = torch.tensor([[1.0, 2, 3, 9], [1, 2, 3, 4], [1, 2, 0, 0]])
    y = torch.tensor([[2.0, 4, 6, -9], [4, 3, 2, 1], [1, 2, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1], [1, 1, 0, 0]])
    each = statistics.within(statistics.pearson, x, y, mask)
    assert each.tolist() == pytest.approx([1, -1])  # the third has two tokens only


def test_area_under_the_curve():
    positive = torch.tensor([True, True, False, False])
    assert statistics.auroc(vector(4, 3, 2, 1), positive) == 1
    assert statistics.auroc(vector(4, 1, 3, 2), positive) == 0.5
    assert statistics.auroc(vector(2, 1, 1, 0), positive) == 0.875  # a tie counts half
    assert statistics.auroc(vector(1, 1, 1, 1), positive) == 0.5
    assert math.isnan(statistics.auroc(vector(1, 2), torch.tensor([True, True])))


@pytest.mark.parametrize(
    ("level", "degrees", "t"),
    [(0.95, 1, 12.7062), (0.95, 2, 4.30265), (0.95, 4, 2.77645), (0.9, 9, 1.83311)],
)
def test_quantiles_of_student_t(level, degrees, t):
    assert statistics.t_quantile(level, degrees) == pytest.approx(t, rel=1e-5)


def test_interval_of_a_mean():
    found = statistics.interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert found.text(2) == "2.00 ± 2.48"
    assert statistics.interval([5.0]).text() == "5.000"
    assert math.isnan(statistics.interval([]).mean)


# ---- the shared start ----


def test_a_start_is_deterministic_kept_and_continued(tmp_path):
    first = Context(TINY, tmp_path).start(0)
    kept = list((tmp_path / "starts").iterdir())
    again = Context(TINY, tmp_path).start(0)
    anew = Context(TINY, tmp_path / "other").start(0)
    assert list((tmp_path / "starts").iterdir()) == kept
    for other in (again, anew):
        for p, q in zip(first.model.parameters(), other.model.parameters(), strict=True):
            assert torch.equal(p, q)
    moments = [s["exp_avg"] for s in first.optimizer.state.values()]
    loaded = [s["exp_avg"] for s in again.optimizer.state.values()]
    assert moments
    assert all(map(torch.equal, moments, loaded))
    assert (len(first.seen), len(first.unseen), len(first.held_out)) == (24, 16, 8)
    other_seed = Context(TINY, tmp_path).start(1)
    assert other_seed.seen != first.seen
    assert sorted(map(str, other_seed.held_in)) == sorted(map(str, first.held_in))


def test_batches_mark_what_is_supervised():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6], "labels": [5, 6]},
    ]
    assert supervised(batch_of(rows)).tolist() == [[False, True, True], [False, True, False]]


# ---- the command ----


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as exited:
        main(["experiment", *map(str, arguments)])
    assert exited.value.code == 1
    return capsys.readouterr().err


def test_mistakes_in_the_options_are_named(tmp_path, capsys):
    out = tmp_path / "out"
    assert "--data" in fails(capsys, "fidelity", "--out", out, "--data", tmp_path / "none.jsonl")
    assert "means nothing" in fails(capsys, "fidelity", "--out", out, "--eval-data", __file__)
    assert "--seeds must be" in fails(capsys, "fidelity", "--out", out, "--seeds", 0)
    assert "is a file" in fails(capsys, "fidelity", "--out", __file__)
    out.mkdir()
    (out / "fidelity.json").write_text("{}")
    assert "--overwrite" in fails(capsys, "fidelity", "--out", out)
