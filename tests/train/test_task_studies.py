"""The studies that fine-tune on one task: methods, supervised_size, probe_size."""

import csv
import io
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from vcore_train.experiments import arithmetic_task, methods, probe_size, supervised_size
from vcore_train.experiments.arithmetic_task import (
    DFT,
    IN_DOMAIN,
    QUICK,
    SETS,
    SFT,
    VCORE,
    Arm,
    fine_tune,
    seed_rows,
    task,
    verdict,
)
from vcore_train.experiments.statistics import Interval, interval, pearson
from vcore_train.experiments.study import StudyOptions, run_study
from vcore_train.trainer import VcoreTrainer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the workers: the models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    file = arithmetic_task.start_file(tmp_path_factory.mktemp("task"), QUICK, 0)
    arithmetic_task.make_start(QUICK, 0, file)
    return file


@pytest.fixture
def in_process(monkeypatch):
    """Jobs of a study run here, one after the other."""

    def in_pool(pool, context, what, function, jobs):
        return [function(*job) for job in jobs]

    for module in (arithmetic_task, methods, supervised_size, probe_size):
        monkeypatch.setattr(module, "in_pool", in_pool)


def run(name, folder):
    record = run_study(name, StudyOptions(folder, quick=True), Console(file=io.StringIO()))
    assert (folder / f"{name}.png").stat().st_size > 10_000
    text = (folder / f"{name}.md").read_text(encoding="utf-8")
    with open(folder / f"{name}.csv", encoding="utf-8", newline="") as file:
        return record["result"], text, list(csv.DictReader(file))


# ---- the task ----


def test_the_sets_differ_as_they_say():
    found = task(QUICK)
    by_set = found.held_out
    assert {p.steps for p in by_set[IN_DOMAIN]} <= {1, 2}
    assert {p.steps for p in by_set["harder"]} == {3}
    stories = {name: ["How many" in p.prompt for p in part] for name, part in by_set.items()}
    assert not any(stories[IN_DOMAIN])
    assert not any(stories["harder"])
    assert all(stories["stories"])
    assert all(len(part) == QUICK.held_out for part in by_set.values())
    assert len(found.asked) == QUICK.asked
    assert not {p.prompt for p in found.asked} & {p.prompt for p in by_set[IN_DOMAIN]}
    trained = {tuple(row["input_ids"]) for row in (*found.first, *found.rows)}
    for rows in found.held_out_rows.values():
        assert not any(tuple(row["input_ids"]) in trained for row in rows)


def test_rows_of_a_seed_begin_alike_and_do_not_repeat():
    many = seed_rows(QUICK, 3, 100)
    assert seed_rows(QUICK, 3, 10) == many[:10]
    assert seed_rows(QUICK, 4, 100) != many
    assert len({tuple(row["input_ids"]) for row in many}) == 100
    with pytest.raises(ValueError, match="641 training rows and the setting has 640"):
        seed_rows(QUICK, 0, 641)


def test_a_start_is_kept(weights):
    written = weights.stat().st_mtime_ns
    first = arithmetic_task.make_start(QUICK, 0, weights)
    assert weights.stat().st_mtime_ns == written
    assert set(first["loss"]) == set(first["accuracy"]) == set(SETS)
    assert first["steps"] == QUICK.train_steps
    easy = replace(QUICK, goal=0.0)
    file = arithmetic_task.start_file(weights.parent, easy, 0)
    assert file.name != weights.name
    assert arithmetic_task.make_start(easy, 0, file)["steps"] == QUICK.asked_every


def test_arms_begin_at_the_same_weights_and_see_the_same_batches(weights, monkeypatch):
    seen = []
    step = VcoreTrainer.training_step

    def spied(self, model, inputs, *args, **kwargs):
        seen[-1].append(inputs["input_ids"].clone())
        return step(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(VcoreTrainer, "training_step", spied)
    records = []
    for arm in (SFT, VCORE, Arm("iw-SFT", {"method": "iw_sft"})):
        seen.append([])
        records.append(fine_tune(QUICK, 0, weights, arm)[1])
    first, *others = seen
    assert len(first) == QUICK.steps
    for other in others:
        assert all(map(torch.equal, first, other))
    assert len({record["curve"][0] for record in records}) == 1
    assert all(record["curve_steps"] == [0, 2, 4] for record in records)
    assert records[0]["curve"][-1] == pytest.approx(records[0]["loss"][IN_DOMAIN], rel=1e-5)
    assert records[0]["curve"][-1] != records[1]["curve"][-1]
    assert "alpha" not in records[0]
    assert 0 < records[1]["alpha"] <= 1
    again = fine_tune(QUICK, 0, weights, VCORE)[1]
    assert again == records[1]


def test_verdicts():
    assert verdict(interval([1.0, 1.1, 0.9]), higher_is_better=True) == "better"
    assert verdict(interval([1.0, 1.1, 0.9]), higher_is_better=False) == "worse"
    assert verdict(interval([-1.0, -1.1, -0.9]), higher_is_better=False) == "better"
    unclear = (interval([1.0, -1.0, 0.5]), interval([1.0]), interval([0.0, 0.0]))
    for gap in unclear:
        assert verdict(gap, higher_is_better=True) == "no clear difference"


def test_what_intervals_become():
    value = Interval(0.5, 0.25, 0.75, 3)
    assert arithmetic_task.percent(value) == (50, 25, 75, 3)
    assert arithmetic_task.signed(value, 1) == "+0.5 ± 0.2"
    assert arithmetic_task.signed(Interval(-0.5, -0.75, -0.25, 3), 1) == "-0.5 ± 0.2"
    shuffled = [{"seed": 1, "x": 5.0}, {"seed": 0, "x": 3.0}]
    base = [{"seed": 0, "x": 1.0}, {"seed": 1, "x": 3.0}]
    assert arithmetic_task.paired(shuffled, base, "x").mean == 2
    assert arithmetic_task.paired(shuffled, base, "x").half == 0


# ---- methods ----


def test_equal_time_in_quarters():
    ratios = {"SFT": 1.0, "Random": 1.06, "DFT": 0.93, "iw-SFT": 1.3, "VCORE": 2.83}
    assert methods.steps_at_equal_time(80, ratios) == {
        **{"SFT": 220, "Random": 220, "DFT": 220},
        "iw-SFT": 176,
    }


def test_the_methods_command(tmp_path, in_process, monkeypatch):
    ratios = {"SFT": 1.0, "Random": 1.0, "DFT": 1.0, "iw-SFT": 1.0, "VCORE": 2.0}
    monkeypatch.setattr(methods, "step_ratios", lambda *args: ratios)
    result, text, rows = run("methods", tmp_path)
    assert len(rows) == (1 + 3 + 2 * 4) * len(SETS)
    assert set(rows[0]) == {"seed", "arm", "equal", "steps", "set", "loss", "accuracy"}
    for equal, steps in (("steps", QUICK.steps), ("time", 2 * QUICK.steps)):
        for arm in methods.ARMS:
            (run_,) = methods.runs_of(result, arm.name, equal)
            weighted = arm.name.startswith("VCORE")
            assert run_["steps"] == (QUICK.steps if weighted else steps)
            assert run_["curve"][0] == result["runs"][0]["curve"][0]
    assert "### Equal time" in text


def made_up(loss, accuracy, **keys):
    """Runs of three seeds with figures of their own."""
    return [
        {
            **keys,
            "seed": seed,
            "steps": 10,
            "loss": dict.fromkeys(SETS, loss[seed]),
            "accuracy": dict.fromkeys(SETS, accuracy[seed]),
        }
        for seed in range(3)
    ]


def test_what_the_methods_reading_says():
    runs = []
    for arm in methods.ARMS:
        for equal in ("both",) if arm in methods.BUDGETS else ("steps", "time"):
            loss, accuracy = {
                "DFT": ((2.0, 2.1, 2.2), (0.1, 0.12, 0.14)),
                "VCORE": ((0.5, 0.6, 0.7), (0.61, 0.72, 0.83)),
                "Random": ((1.2, 0.9, 1.3), (0.6, 0.6, 0.8)),
            }.get(arm.name, ((1.0, 1.1, 1.2), (0.5, 0.6, 0.7)))
            runs += made_up(loss, accuracy, arm=arm.name, equal=equal)
    result = {"runs": runs, "starts": made_up((2, 2, 2), (0, 0, 0)), "ratios": {"VCORE": 3.0}}
    lines = methods.reading(result)
    vcore = next(line for line in lines if line.startswith("VCORE (10 steps)"))
    assert "loss -0.5000 ± 0.0000 nats (better); better: in-domain (+12.0 ± 2.5 points)" in vcore
    dft = next(line for line in lines if line.startswith("DFT"))
    assert "loss +1.0000 ± 0.0000 nats (worse); worse: in-domain" in dft
    random = next(line for line in lines if line.startswith("Random"))
    assert "(no clear difference); no clear difference: in-domain (+6.7 ± 14.3 points)" in random
    assert lines[-1] == "A step of VCORE takes 3.00 times the time of one of SFT."
    logs = [math.log(x) for x in (0.5 / 1.0, 0.6 / 1.1, 0.7 / 1.2)]
    ratio = methods.loss_ratio(result, "VCORE", "steps")
    assert ratio.mean == pytest.approx(math.exp(sum(logs) / 3))


# ---- supervised_size ----


def test_the_supervised_size_command(tmp_path, in_process):
    result, text, rows = run("supervised_size", tmp_path)
    assert [(r["arm"], r["size"]) for r in rows] == [
        (arm, size) for size in ("4", "16") for arm in ("SFT", "DFT", "VCORE")
    ]
    assert {"train_loss", "rise", "loss, harder", "accuracy, stories"} < set(rows[0])
    assert len({run["curve"][0] for run in result["runs"]}) == 1
    assert "| SFT | 4 | 4 |" in text  # 4 steps of batches of 4


def test_over_fitting_is_a_rise_that_is_clear():
    assert supervised_size.rise([3.0, 1.0, 1.5]) == 0.5
    assert supervised_size.rise([3.0, 2.0, 1.0]) == 0
    runs = []
    for arm in (SFT, DFT, VCORE):
        for size, rises in ((8, (0.5, 0.6, 0.7)), (64, (0.0, 0.0, 0.3))):
            worse = 0.2 * (arm is VCORE)
            own = made_up([1.0 + worse, 1.1 + worse, 1.2 + worse], (0.5, 0.6, 0.7))
            runs += [
                {**r, "arm": arm.name, "size": size, "rise": 0.0 if arm is DFT else rises[i]}
                for i, r in enumerate(own)
            ]
    result = {"runs": runs, "steps": 16, "batch": 4}
    assert supervised_size.overfits(result, "SFT") == [8]
    assert supervised_size.overfits(result, "DFT") == []
    lines = " ".join(supervised_size.reading(result))
    assert "SFT over-fits with 8: with 8 the loss ends 0.6000 ± 0.2484 nats above" in lines
    assert "DFT over-fits clearly at no size" in lines
    assert "VCORE minus SFT: with 8 loss +0.2000 ± 0.0000 (worse), +0.0 ± 0.0 points" in lines
    assert "Where SFT over-fits, DFT rises by -0.6000 ± 0.2484 with 8 (better)" in lines
    assert "VCORE rises by +0.0000 ± 0.0000 with 8 (no clear difference)" in lines
    assert "DFT minus SFT: with 8 loss +0.0000 ± 0.0000 (no clear difference)" in lines


# ---- probe_size ----


def test_the_probe_size_command(tmp_path):
    """In processes of its own."""
    result, text, rows = run("probe_size", tmp_path)
    assert [r["probe"] for r in rows] == ["0", "1", "8"]
    assert rows[0]["r, start"] == ""
    assert -1 <= float(rows[1]["r, start"]) <= 1
    assert set(result["ratios"]) == {"SFT", "probe of 1", "probe of 8"}
    assert [q["at"] for q in result["quality"]] == ["start", "end of SFT"]
    assert len({run["curve"][0] for run in result["runs"]}) == 1
    assert "Probe batches of VCORE" in text


def test_a_probe_of_the_reference_itself_is_perfect(weights):
    model = arithmetic_task.load_start(QUICK, 0, weights)
    rows = task(QUICK).rows
    judged = probe_size.collate(probe_size._plain(rows[:4]))
    mask = probe_size.supervised(judged)
    truth = probe_size.utilities(model, judged, rows[4:40])
    parts = [probe_size.utilities(model, judged, rows[4:n]) for n in (40, 5)]
    assert pearson(parts[0][mask], truth[mask]) == pytest.approx(1)
    assert pearson(parts[1][mask], truth[mask]) < 0.999


def test_what_the_probe_reading_says():
    runs = []
    for size, shift in ((0, 0.0), (1, 0.3), (16, 0.1)):
        own = made_up([1.0 + shift, 1.1 + shift, 1.2 + shift], (0.5, 0.6, 0.7))
        runs += [{**r, "size": size, "arm": probe_size.probe_arm(size).name} for r in own]
    quality = [
        {"seed": seed, "at": at, "pearson": {"1": 0.25, "16": r}}
        for seed in range(3)
        for at, r in ((probe_size.START, 0.875), (probe_size.END, 0.375))
    ]
    ratios = {"probe of 1": 2.0, "probe of 16": 3.0}
    lines = probe_size.reading({"runs": runs, "quality": quality, "ratios": ratios})
    assert lines[0] == "With probes of 1, 16 a step takes 2.00, 3.00 times the time of one of SFT."
    assert "r = 0.25, 0.88 at the start" in lines[1]
    assert "changes by +0.00 ± 0.00 with 1, -0.50 ± 0.00 with 16." in lines[2]
    assert "A probe of 1 ends +0.3000 ± 0.0000 nats from SFT" in lines[3]
    assert "(worse) and +0.0 ± 0.0 points in accuracy (no clear difference)" in lines[3]
    assert "the loss changes by -0.2000 ± 0.0000 nats (better)" in lines[-1]


def test_data_is_refused(tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("{}\n", encoding="utf-8")
    options = StudyOptions(tmp_path / "out", data=data, quick=True)
    for name in ("methods", "supervised_size", "probe_size"):
        with pytest.raises(ValueError, match=f"--data means nothing for {name}"):
            run_study(name, options, Console(file=io.StringIO()))
