import csv

import pytest
import torch
from quick_study import watched_study
from vcore_train.experiments import variance
from vcore_train.experiments.run import UNIFORM
from vcore_train.experiments.variance import ARMS, OPTIMIZERS


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """QUICK in this process; the weights and the batches that each run began with."""
    out = tmp_path_factory.mktemp("variance")
    return out, *watched_study(variance, out)


def test_the_files(ran):
    out, result, _ = ran
    page = (out / "variance.md").read_text(encoding="utf-8")
    assert all(arm.name in page for arm in ARMS)
    assert all(sentence in page for sentence in variance.reading(result))
    assert "nan" not in page
    assert (out / "variance.png").stat().st_size > 10_000
    with open(out / "variance.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ARMS) * len(OPTIMIZERS) * variance.QUICK.seeds
    assert {"seed", "optimizer", "arm", "loss_first", "loss_last", "spikes", "noise"} <= set(
        rows[0]
    )
    assert {(r["optimizer"], r["arm"]) for r in rows} == {
        (optimizer, arm.name) for optimizer in OPTIMIZERS for arm in ARMS
    }


def test_arms_begin_at_the_same_weights_with_the_same_batches(ran):
    _, result, begun = ran
    assert len(begun) == len(result["runs"])
    for weights, ids, seed in begun:
        assert torch.equal(weights, begun[0][0])
        assert (ids, seed) == begun[0][1:]
    assert len({r["loss"][0] for r in result["runs"]}) == 1


def test_alpha_of_the_modes(ran):
    _, result, _ = ran
    alpha = {r["arm"]: r["alpha"] for r in result["runs"] if r["optimizer"] == "sgd"}
    assert alpha["none, KL 0.1"] == [1, 1]
    assert alpha["uniform"] == [1, 1]
    assert all(value < 0.95 for value in (*alpha["utility, KL 0.1"], *alpha["ess, KL 0.1"]))
    assert max(alpha["utility, KL 0.1, cap 1"]) <= 1
    norms = result["norms"]
    assert set(norms) == {f"{o}, {a.name}" for o in OPTIMIZERS for a in ARMS}
    assert all(len(values) == variance.QUICK.steps for values in norms.values())


def made_up(**changes):
    """Three seeds; by default every arm has the same figures. ``changes``: {arm: figures}."""
    runs = [
        {
            "seed": seed,
            "optimizer": optimizer,
            "arm": arm.name,
            "steps": [0, 60, 120],
            "loss": [2.0, 1.5, 1.0 + 0.01 * seed],
            "alpha": [1.0, 1.0],
            **dict.fromkeys(("alpha_mean", "alpha_least", "norm", "norm_largest"), 1.0),
            **{"noise": 2.0, "relative_noise": 1.0, "spikes": 4, "spikes_of_run": 3},
            "clipped": 0.5,
        }
        for seed in range(3)
        for optimizer in OPTIMIZERS
        for arm in ARMS
    ]
    for record in runs:
        for name, function in changes.get(record["arm"], {}).items():
            record[name] = function(record[name], record["seed"])
    return {"runs": runs, "norms": {}}


def test_differences_are_paired_by_seed():
    result = made_up(
        **{"none, KL 0.1": {"loss": lambda loss, seed: [*loss[:2], loss[2] + 0.1 * (seed + 1)]}}
    )
    gap = variance.paired(result, "sgd", "none, KL 0.1", UNIFORM.name)
    assert gap.mean == pytest.approx(0.2)
    assert gap.half == pytest.approx(4.302653 * 0.1 / 3**0.5, rel=1e-5)
    spikes = variance.paired(result, "sgd", "none, KL 0.1", UNIFORM.name, "spikes")
    assert spikes.mean == 0


def test_reading_of_no_difference():
    sentences = variance.reading(made_up())
    text = " ".join(sentences)
    assert "gradient variance of 2 against 2 without control" in text
    assert "0.0 ± 0.0 with it less without, no clear difference" in text
    assert "No control changes the held-out loss clearly" in text
    assert "SGD 1.00 (1.00 of that over norm²), loss +0.000 (no" in variance.headline(made_up())


def test_reading_of_a_difference():
    win = made_up(
        **{
            "utility, KL 0.1": {
                "loss": lambda loss, seed: [*loss[:2], loss[2] - 0.05 - 0.001 * seed],
                "noise": lambda *_: 0.5,
                "spikes": lambda _, seed: seed == 0,
            }
        }
    )
    text = " ".join(variance.reading(win))
    assert "gradient variance of 0.5 against 2 without control" in text
    assert "Held-out loss less that without control: utility, KL 0.1 -0.0510" in text
    assert "no clear difference in the others" in text
    assert "Spikes: 0.3 a run with it, 4.0 without" in text
    assert "-3.7 ± 1.4 with it less without." in text
    assert variance.headline(win).endswith("AdamW 0.25 (1.00 of that over norm²), loss -0.051")
    loss = made_up(
        **{"utility, KL 0.1": {"loss": lambda loss, seed: [*loss[:2], loss[2] + 0.1 + seed * 1e-3]}}
    )
    assert "utility, KL 0.1 +0.1010" in " ".join(variance.reading(loss))
