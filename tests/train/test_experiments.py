import io
import json
import math
from dataclasses import replace

import pytest
import torch
from rich.console import Console
from vcore_train.cli import main
from vcore_train.experiments import STUDIES, corruption, fidelity, population, statistics
from vcore_train.experiments.setting import Context, Setting, supervised
from vcore_train.experiments.setting import collate as batch_of
from vcore_train.experiments.study import StudyOptions, run_study

TINY = Setting.quick(train_steps=3, rows=40, held_out=8, length=256)


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
    assert statistics.roc_curve(vector(4, 1, 3, 2), positive, 5) == [
        *((0.0, 0.5), (0.25, 0.5), (0.5, 0.5), (0.75, 0.5), (1.0, 1.0))
    ]
    assert statistics.roc_curve(vector(1, 1, 1, 1), positive, 3) == [(0, 0), (0.5, 0.5), (1, 1)]
    assert math.isnan(statistics.auroc(vector(1, 2), torch.tensor([True, True])))


def test_interval_of_a_mean():
    found = statistics.interval([1.0, 2.0, 3.0])
    assert found.mean == 2
    assert found.half == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert found.text(2) == "2.00 ± 2.48"
    ten = statistics.interval([float(x) for x in range(10)], level=0.9)
    assert ten.half == pytest.approx(1.83311 * math.sqrt(55 / 6 / 10), rel=1e-5)
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


def test_a_start_of_fewer_steps_is_on_the_way(tmp_path):
    from vcore_train.experiments.setting import endless, train_step

    context = Context(replace(TINY, warmup=0), tmp_path)
    early, late = context.start(0, steps=2), context.start(0)
    order = endless([*early.seen, *early.unseen], TINY.batch_size)
    *_, third = (next(order) for _ in range(3))
    train_step(early.model, early.optimizer, third)
    for p, q in zip(early.model.parameters(), late.model.parameters(), strict=True):
        assert torch.equal(p, q)


def test_rows_of_a_file_are_split_and_the_longest_left_out(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} + {n}", "response": "9" * (8 if n else 500)} for n in range(20)]
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    start = Context(replace(TINY, train_steps=1), tmp_path, path).start(0)
    assert (len(start.held_in), len(start.held_out)) == (14, 5)
    start = Context(replace(TINY, train_steps=1), tmp_path, path, path).start(0)
    assert (len(start.held_in), len(start.held_out)) == (19, 8)
    path.write_text(json.dumps(rows[1]))
    with pytest.raises(ValueError, match="cannot be split"):
        Context(TINY, tmp_path, path).start(0)


def test_batches_mark_what_is_supervised():
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [5, 6], "labels": [5, 6]},
    ]
    assert supervised(batch_of(rows)).tolist() == [[False, True, True], [False, True, False]]


# ---- the studies ----


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """One folder for all studies, and what ``run_study`` returned for those that ran."""
    out, records = tmp_path_factory.mktemp("experiments"), {}

    def run(name):
        if name not in records:
            options = StudyOptions(out, seeds=1, quick=True)
            records[name] = run_study(name, options, Console(file=io.StringIO()))["result"]
        return records[name]

    run.out = out
    return run


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_leaves_its_three_files(name, results):
    results(name)
    assert (results.out / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((results.out / f"{name}.json").read_text())
    assert record["command"] == f"vcore experiment {name} --seeds 1 --quick"
    assert record["setting"]["seeds"] == 1
    assert {"torch", "transformers"} <= record["versions"].keys()
    page = (results.out / f"{name}.md").read_text()
    assert f"]({name}.png)" in page
    assert "nan" not in page


def test_fidelity(results):
    records = results("fidelity")["agreement"]
    own = [r for r in records if r["architecture"] == "qwen3"]
    assert {(r["precision"], r["method"], r["epsilon"]) for r in own} == {
        (precision, *estimator)
        for precision in fidelity.PRECISIONS
        for estimator in fidelity.ESTIMATORS
    }
    for record in records:
        assert all(math.isfinite(record[n]) for n in record if "pearson" in n or "spearman" in n)
        if record["method"] == "jvp":
            assert record["pearson"] > 0.999, record
        if record["method"] != "jvp" and record["precision"] == "fp32":
            assert record["pearson"] > 0.99, record
    published = [
        r["pearson"]
        for r in records
        if r["precision"] == "LoRA over bf16" and (r["method"], r["epsilon"]) == fidelity.PUBLISHED
    ]
    assert len(published) == len(fidelity.ARCHITECTURES)
    assert max(map(abs, published)) < 0.9


def test_population(results):
    result = results("population")
    records = result["directions"]
    assert {r["kind"] for r in records} == {"probe", "ema", "momentum", "adam"}
    assert len([r for r in records if r["kind"] == "probe"]) == len(population.SHARES)
    for record in records:
        assert -1 <= record["pearson"] <= 1
        assert -1 <= record["cosine"] <= 1
        assert math.isnan(record["noise"]) == (record["draws"] == 1)


def test_corruption(results):
    records = {r["method"]: r for r in results("corruption")["areas"]}
    assert set(records) == {*corruption.VCORE, *corruption.OTHERS}
    for record in records.values():
        assert all(0 <= record[name] <= 1 for name in ("within", "pooled", "all"))
    # The same ranking of tokens, the other way round.
    dft, loss = records["DFT"], records["the loss itself"]
    assert dft["pooled"] == pytest.approx(1 - loss["pooled"], abs=1e-3)
    # Wrong tokens are unlikely ones, which DFT reads off directly.
    assert dft["within"] > 0.8


def test_corrupted_rows_keep_their_prompt_end_and_length():
    row = {"input_ids": [9, 9, *range(2, 22), 0], "labels": [-100, -100, *range(2, 22), 0]}
    changed, clean = corruption.corrupt(row, 0.2, 30, 0)
    assert clean.count(False) == 4
    assert changed["input_ids"][:2] == [9, 9]
    assert changed["input_ids"][-1] == 0
    assert changed["labels"][2:] == changed["input_ids"][2:]
    differing = [a == b for a, b in zip(changed["input_ids"], row["input_ids"], strict=True)]
    assert differing == clean
    assert all(2 <= token < 30 for token in changed["input_ids"][:-1])
    assert corruption.corrupt(row, 0.0, 30, 0) == (row, [True] * 23)


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
