import csv
import math

import pytest
import torch
from quick_study import watched_study
from vcore_train.experiments import temperature, temperature_report
from vcore_train.experiments.run import UNIFORM
from vcore_train.experiments.temperature import QUICK, arms_of
from vcore_train.experiments.temperature_report import EXACT
from vcore_train.supervised import SupervisedTokens


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """QUICK in this process; what each run began with."""
    out = tmp_path_factory.mktemp("temperature")
    return out, *watched_study(temperature, out)


def test_the_files(ran):
    out, result, _ = ran
    page = (out / "temperature.md").read_text(encoding="utf-8")
    assert "The stability boundary" in page
    assert "nan" not in page
    assert (out / "temperature.png").stat().st_size > 10_000
    with open(out / "temperature.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    pairs = len(QUICK.temperatures) * len(QUICK.epsilons)
    assert len(rows) == (1 + pairs + len(QUICK.budgets)) * QUICK.seeds
    assert {"seed", "arm", "temperature", "epsilon", "kl_budget", "kl", "alpha", "ratio"} <= set(
        rows[0]
    )
    assert {"loss_first", "loss_last", "unstable", "spikes", "norm"} <= set(rows[0])
    assert temperature.reading(result)


def test_arms_begin_at_the_same_weights_with_the_same_batches(ran):
    _, result, begun = ran
    assert len(begun) == len(arms_of(QUICK)) == len(result["runs"])
    for weights, ids, seed in begun:
        assert torch.equal(weights, begun[0][0])
        assert (ids, seed) == begun[0][1:]
    assert len({r["loss"][0] for r in result["runs"]}) == 1


def test_budgets_are_kept_and_temperatures_are_not(ran):
    _, result, _ = ran
    for record in result["runs"]:
        if record["kl_budget"]:
            assert record["kl"] == pytest.approx([record["kl_budget"]] * 2, rel=0.01)
        if record["temperature"] == 1e6:
            assert max(record["kl"]) < 1e-9
            assert record["ratio"] == pytest.approx([1, 1], abs=1e-3)
        if record["temperature"] == 1e-2:
            assert min(record["kl"]) > 1


def test_what_is_weighed(ran):
    _, result, _ = ran
    weighed = result["weighed"]
    estimates = 1 + 2 * len(QUICK.epsilons)
    assert len(weighed) == estimates * (3 + 1) * QUICK.seeds  # three judged steps, another model
    assert {r["hidden"] for r in weighed} == {QUICK.hidden, QUICK.other_hidden}
    for record in weighed:
        assert len(record["kl"]) == len(record["ratio"]) == len(record["temperatures"])
        if record["precision"] == "fp32":
            assert record["pearson"] > 0.999
    bf16 = [r for r in weighed if (r["estimate"], r["precision"]) == ("eps 0.0001", "bf16")]
    assert max(r["pearson"] for r in bf16) < 0.99


def test_kl_and_ratio_by_hand():
    tokens = SupervisedTokens.of(
        [{"input_ids": torch.tensor([[5, 5, 5]]), "labels": torch.tensor([[-100, 5, 5]])}]
    )
    # exp(s/T) in the ratio 1 to 3: q = 1/4, 3/4
    values = torch.tensor([0.0, 2 * math.log(3)])
    kl, ratio = temperature.at_temperature([values], [tokens], 2.0)
    assert kl == pytest.approx(math.log(2) + 0.25 * math.log(0.25) + 0.75 * math.log(0.75))
    assert ratio == pytest.approx((0.75 / 0.5) ** 2)


def test_unstable():
    assert not temperature.unstable([2.0, 3.0, 1.9])
    assert not temperature.unstable([2.0, 2.0])
    assert temperature.unstable([2.0, 1.0, 2.1])
    assert temperature.unstable([2.0, math.nan])


# ---- made-up results ----

TEMPERATURES, EPSILONS, BUDGETS = (1e6, 1e2, 10.0, 1.0), (1e-4, 1e-3), (0.02, 0.5)


def made_up(*, end=None, kl=None):
    """Three seeds. ``end``: {temperature or budget: held-out loss at the end}, 1.0 else; the start
    is at 2.0. ``kl``: {(seed, hidden, step): factor on the KL of a temperature}.
    """
    end, kl = end or {}, kl or {}
    choices = [
        (None, None, None),
        *((t, e, None) for t in TEMPERATURES for e in EPSILONS),
        *((None, None, b) for b in BUDGETS),
    ]
    runs = [
        {
            "seed": seed,
            "arm": UNIFORM.name if (t, b) == (None, None) else f"T {t}, eps {e}, KL {b}",
            "temperature": t,
            "epsilon": e,
            "kl_budget": b,
            "steps": [0, 10, 20],
            "loss": [2.0, 1.5, end.get((t or b, e), end.get(t or b, 1.0)) + 0.001 * seed],
            "unstable": end.get((t or b, e), end.get(t or b, 1.0)) > 2.0,
            "norm": 1.0,
            "norm_largest": 2.0,
            "spikes": 0,
            "clipped": 0.5,
            "kl": [] if (t, b) == (None, None) else [b or 1 / t, b or 1 / t],
            "alpha": [1.0, 1.0],
            "tau": [1.0, 1.0],
            "ratio": [1.0, 1.0],
        }
        for seed in range(3)
        for t, e, b in choices
    ]
    weighed = [
        {
            "seed": seed,
            "hidden": hidden,
            "step": step,
            "estimate": estimate,
            "precision": precision,
            "pearson": 1.0,
            "spread": 2.0,
            "temperatures": list(TEMPERATURES),
            "kl": [kl.get((seed, hidden, step), 1.0) / t for t in TEMPERATURES],
            "ratio": [1 + 1 / t for t in TEMPERATURES],
        }
        for seed in range(3)
        for hidden, step in ((64, 0), (64, 20), (128, 0))
        for estimate, precision in (
            (EXACT, "fp32"),
            *((f"eps {e:g}", p) for e in EPSILONS for p in ("fp32", "bf16")),
        )
    ]
    return {"runs": runs, "weighed": weighed}


def test_the_boundary_by_hand():
    assert temperature_report.boundary(made_up(), 1e-3) == (1.0, None)
    result = made_up(end={(10.0, 1e-3): 2.5, 1.0: 2.5})
    assert temperature_report.boundary(result, 1e-3) == (1e2, 10.0)
    assert temperature_report.boundary(result, 1e-4) == (10.0, 1.0)
    # an unstable temperature above stable ones is the boundary
    assert temperature_report.boundary(made_up(end={1e2: 3.0}), 1e-3) == (1e6, 1e2)
    assert temperature_report.boundary(made_up(end={1e6: 3.0}), 1e-3) == (None, 1e6)


def test_drift_by_hand():
    result = made_up(kl={(0, 64, 20): 3.0, (1, 64, 0): 2.0, (2, 128, 0): 8.0})
    found = temperature_report.drift(result, 10.0)
    assert found["start"] == pytest.approx([0.1, 0.2, 0.1])
    assert found["end"] == pytest.approx([0.3, 0.1, 0.1])
    assert found["other"] == pytest.approx([0.1, 0.1, 0.8])
    assert found["seeds"] == pytest.approx(2)
    assert found["run"] == pytest.approx((3 + 2 + 1) / 3)
    assert found["factor"] == pytest.approx(8)


def test_ratio_at_equal_kl():
    record = {"kl": [1.0, 0.01], "ratio": [16.0, 4.0]}
    assert temperature_report.ratio_at_kl(record, 0.1) == pytest.approx(8)
    assert temperature_report.ratio_at_kl(record, 1.0) == pytest.approx(16)
    assert math.isnan(temperature_report.ratio_at_kl(record, 2.0))
    low, high, _, _ = temperature_report.collapse(made_up(kl={(0, 64, 20): 3.0}), 0.1)
    assert low < high


def test_gaps_average_the_runs_of_a_seed():
    result = made_up(end={(10.0, 1e-4): 1.2, (10.0, 1e-3): 1.4})
    runs = [r for r in result["runs"] if r["temperature"] == 10.0]
    assert temperature_report.gap(result, runs).mean == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("end", "said"),
    [
        ({}, ["At every eps all temperatures are stable", "none ends above its start"]),
        ({10.0: 2.5, 1.0: 2.5}, ["stable down to T 100", "not at T 10 "]),
        ({(1.0, 1e-3): 2.5}, ["At eps 0.001 runs are stable down to T 10 ", "At eps 0.0001 all"]),
        ({0.5: 2.5}, ["the runs of 0.5 end above the start in a seed"]),
        (
            {0.02: 0.9, 0.5: 0.95},
            ["The best budget ends at -0.100 ± 0.000 against uniform weights"],
        ),
        ({1e2: 1.5}, ["2 of 4 clearly apart"]),
    ],
    ids=["stable", "boundary", "by eps", "budget", "win", "loss"],
)
def test_reading(end, said):
    text = " ".join(temperature.reading(made_up(end=end)))
    for words in said:
        assert words in text


def test_reading_of_no_difference_and_of_drift():
    result = made_up(kl={(2, 128, 0): 8.0})
    for record in result["runs"]:  # the seeds disagree
        if record["temperature"] or record["kl_budget"]:
            record["loss"][-1] += (-0.3, 0.0, 0.3)[record["seed"]]
    text = " ".join(temperature.reading(result))
    assert ", no clear difference." in text
    assert "a factor of 8 in all" in text
    assert "what a budget gives varies by at most 1.00" in text
    assert "8 times the KL elsewhere" in temperature_report.headline(result)
