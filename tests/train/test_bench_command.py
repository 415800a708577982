import json

import pytest
from command import vcore
from vcore_train import bench
from vcore_train.bench_compare import compare, share
from vcore_train.bench_record import Record, Row


def row(subject, ratios, kind="ours", group="head"):
    return Row(
        group, subject, kind, "measured", unit="u", seconds=ratios, unit_seconds=[1.0] * len(ratios)
    )


def record(*rows, **environment):
    return Record(
        rows=list(rows), environment={"threads": 2, "versions": {"torch": "2"}} | environment
    )


STEADY, SLOWER, NOISY = [1.0, 1.01, 1.02], [1.2, 1.21, 1.22], [0.8, 1.1, 1.5]


def test_moves_are_flagged_beyond_both_spreads_alone():
    result = compare(
        record(row("a", STEADY), row("b", STEADY), row("c", STEADY), row("old", STEADY)),
        record(row("a", SLOWER), row("b", NOISY), row("c", STEADY), row("new", STEADY)),
    )
    assert [(m.subject, round(m.ratio, 2)) for m in result.moved] == [("a", 1.2)]
    assert result.new == ["head: new"]
    assert result.vanished == ["head: old"]
    assert result.warnings == []
    assert [m.subject for m in result.slower(0.1)] == ["a"]
    assert result.slower(0.25) == []


def test_units_compare_and_not_milliseconds():
    """A machine at half the speed slows the yardstick too."""
    slow = row("a", [2.0, 2.02, 2.04])
    slow.unit_seconds = [2.0, 2.0, 2.0]
    assert compare(record(row("a", STEADY)), record(slow)).moved == []


def test_rows_match_by_problem_and_peers_do_not_fail():
    a = record(row("x", STEADY, group="one"), row("p", STEADY, "peer"))
    b = record(row("x", SLOWER, group="two"), row("p", SLOWER, "peer"))
    result = compare(a, b)
    assert [m.subject for m in result.moves] == ["p"]
    assert result.slower(0.0) == []
    assert (result.new, result.vanished) == (["two: x"], ["one: x"])


def test_other_surroundings_are_warned_of():
    a = record(threads=2, versions={"torch": "2.12", "numpy": "2"}, processor="A")
    b = record(threads=1, versions={"torch": "2.13", "numpy": "2"}, processor="B")
    b.quick = True
    assert compare(a, b).warnings == [
        "processor: A and B",
        "threads: 2 and 1",
        "torch: 2.12 and 2.13",
        "a record of --quick, whose figures mean nothing",
    ]


@pytest.fixture
def files(tmp_path):
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    record(row("a", STEADY), row("c", STEADY)).write(a)
    record(row("a", SLOWER), row("c", STEADY), threads=1).write(b)
    return a, b


def test_compare_command(files, capsys):
    a, b = files
    assert vcore("bench", "--compare", a, b) == 0
    out = capsys.readouterr().out
    assert "warning: the runs differ in threads: 2 and 1" in out
    assert "1 of 2 rows moved" in out
    assert "slower  1.198  1.01 -> 1.21  head: a" in out
    assert vcore("bench", "--compare", a, b, "--fail-over", "10%") == 1
    assert "1 rows of ours slowed by more than 10%" in capsys.readouterr().out
    assert vcore("bench", "--compare", a, b, "--fail-over", "30%") == 0
    assert vcore("bench", "--compare", b, a, "--fail-over", "10%") == 0  # faster


def test_bad_usage_is_explained(files, tmp_path, capsys):
    a, b = files
    other = tmp_path / "other.json"
    other.write_text(json.dumps({"format": "else"}))
    for arguments, message in (
        (("--compare", a, tmp_path / "missing.json"), "missing.json: no record of vcore bench"),
        (("--compare", other, b), "other.json: no record of vcore bench of this version"),
        (("--compare", a, b, "--quick"), "--compare runs nothing"),
        (("--compare", a, b, "--fail-over", "much"), "as 10%, got 'much'"),
        (("--fail-over", "10%"), "Pass --compare A B"),
        (("--select", "heads"), "--select must be one of attention, dual"),
    ):
        assert vcore("bench", *arguments) == 1
        assert message in capsys.readouterr().err
    assert share("2.5%") == 0.025
    with pytest.raises(ValueError, match="at least 0"):
        share("-1%")


def test_the_suite_needs_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "vcore_train" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert vcore("bench", "--quick") == 1
    err = capsys.readouterr().err
    assert "no benchmarks/ with the suite" in err
    assert "in a clone of it" in err


def test_bench_runs_what_is_selected(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    out = tmp_path / "results"
    assert (
        vcore("bench", "--quick", "--select", "gibbs", "--select", "attention", "--out", out) == 0
    )
    names = ["bench-quick-cpu-roofline.png", "bench-quick-cpu.json", "bench-quick-cpu.md"]
    assert sorted(path.name for path in out.iterdir()) == names
    found = Record.read(out / "bench-quick-cpu.json")
    groups = {r.group.split(",")[0] for r in found.rows}
    assert groups == {"gibbs weights", "attention", "vcore_loss: 4 x 60"}
    assert all(r.status == "measured" for r in found.rows)
    assert "Where ours is not the fastest" in capfd.readouterr().out
    # With itself nothing moves.
    path = out / "bench-quick-cpu.json"
    assert vcore("bench", "--compare", path, path, "--fail-over", "0%") == 0
