import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from command import vcore
from vcore_train import bench, provenance
from vcore_train.bench_compare import compare, lines, share
from vcore_train.bench_record import Record, Row
from vcore_train.plain import markdown_table, plain


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
    assert [r.subject for r in result.vanished] == ["old"]
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
    assert result.new == ["two: x"]
    assert [r.group for r in result.vanished] == ["one"]


def test_one_round_has_no_spread_and_no_verdict():
    for one, other in (([1.0], SLOWER), (STEADY, [1.2]), ([1.0], [1.2])):
        result = compare(record(row("a", one)), record(row("a", other)))
        assert result.moved == result.slower(0.0) == []
        out = lines(result)
        assert "1 have 1 round in a run" in out[0]
        assert out[1].startswith("  1 round 1.")


def test_other_surroundings_are_warned_of():
    a = record(threads=2, versions={"torch": "2.12", "numpy": "2"}, processor="A")
    b = record(threads=1, versions={"torch": "2.13", "numpy": "2"}, processor="B")
    b.quick = True
    b.selection, b.missing = ["head"], ["interrupted"]
    assert compare(a, b).warnings == [
        "the runs differ in processor: A and B",
        "the runs differ in threads: 2 and 1",
        "the runs differ in torch: 2.12 and 2.13",
        "the runs differ in suites: all and head",
        "a record of --quick, whose figures mean nothing",
        "B is not all of its run: interrupted",
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


def spoilt(kind, status):
    """The record with a row that is not timed, or that is not there."""
    found = record(row("a", STEADY))
    if status != "vanished":
        found.rows.append(Row("head", "c", kind, status, note="no wheel", gate="off by 1"))
    return found


@pytest.mark.parametrize(
    ("status", "line", "fault"),
    [
        ("wrong", "  wrong     head: c{}: off by 1", "1 rows of ours are wrong"),
        ("vanished", "  vanished  head: c{}", "1 rows of ours vanished"),
        ("checked", "  untimed   head: c{}: no wheel", "1 rows of ours have no time any more"),
        ("absent", "  absent    head: c{}: no wheel", "1 rows of ours have no time any more"),
    ],
)
def test_what_is_wrong_or_gone_fails_where_it_is_ours(tmp_path, capsys, status, line, fault):
    for kind, name, code in (("ours", "", 1), ("peer", " (a peer)", 0)):
        record(row("a", STEADY), row("c", STEADY, kind)).write(tmp_path / "a.json")
        spoilt(kind, status).write(tmp_path / "b.json")
        files = ("--compare", tmp_path / "a.json", tmp_path / "b.json")
        assert vcore("bench", *files) == 0
        assert line.format(name) in capsys.readouterr().out
        assert vcore("bench", *files, "--fail-over", "10%") == code
        assert (fault in capsys.readouterr().out) == bool(code)


def test_a_run_that_failed_fails_the_comparison():
    a, b = record(row("a", STEADY)), record(row("a", STEADY))
    assert compare(a, b).faults(0.1) == []
    b.exit_status = 1  # a test that failed before it had a row
    assert compare(a, b).faults(0.1) == ["the run of B ended with exit status 1"]


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": [1, 2]}, "rows[0] must be an object, got 1"),
        ({"rows": None}, "record.rows must be a list, each item an object, got None"),
        ({"rows": ...}, "rows are missing, expected a list"),
        ({"growth": [{"sizes": [1]}]}, "growth[0]: "),
        ({"environment": []}, "record.environment must be an object, each value"),
        ({"row": {"subject": ...}}, "rows[0]: "),
        ({"row": {"kind": "mine"}}, "rows[0].kind must be one of ours, peer, yardstick"),
        ({"row": {"seconds": [1.0, None, 1.0]}}, "rows[0].seconds must be a list, each item a nu"),
        ({"row": {"seconds": 3}}, "rows[0].seconds must be a list"),
        ({"row": {"seconds": [1.0, float("nan"), 1.0]}}, "rows[0].seconds must be a list"),
        ({"row": {"unit_seconds": [1.0, 0.0, 1.0]}}, "rows[0]: unit_seconds must be above 0"),
        ({"row": {"unit_seconds": [1.0]}}, "of the same rounds, got 3 and 1"),
        ({"row": {"seconds": [], "unit_seconds": []}}, "'measured' without seconds"),
        ({"rows": []}, "holds no row with a time"),
    ],
)
def test_files_that_are_no_record_say_so(files, capsys, change, message):
    a, b = files
    data = json.loads(a.read_text())
    place = data["rows"][0] if "row" in change else data
    for name, value in change.get("row", change).items():
        place[name] = value
        if value is ...:
            del place[name]
    a.write_text(json.dumps(data))
    assert vcore("bench", "--compare", a, b) == 1
    err = capsys.readouterr().err
    assert f"{a}: " in err
    assert message in err
    assert "vcore bench --out DIR" in err


def test_the_suite_needs_a_checkout(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "__file__", str(tmp_path / "site" / "vcore_train" / "bench.py"))
    monkeypatch.chdir(tmp_path)
    assert vcore("bench", "--quick") == 1
    err = capsys.readouterr().err
    assert "no benchmarks/ with the suite" in err
    assert "in a clone of it" in err


def test_bench_runs_what_is_selected(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in [name for name in os.environ if "XDIST" in name]:  # pytest-benchmark would not time
        monkeypatch.delenv(name)
    out = tmp_path / "results"
    assert (
        vcore("bench", "--quick", "--select", "gibbs", "--select", "attention", "--out", out) == 0
    )
    name = "bench-quick-cpu-attention-gibbs"
    names = [f"{name}{end}" for end in ("-roofline.png", ".json", ".md")]
    assert sorted(path.name for path in out.iterdir()) == names
    found = Record.read(out / f"{name}.json")
    assert found.complete
    assert found.selection == ["attention", "gibbs"]
    groups = {r.group.split(",")[0] for r in found.rows}
    assert groups == {"gibbs weights", "attention", "vcore_loss: 4 x 60"}
    assert all(r.status == "measured" for r in found.rows)
    assert "Where ours is not the fastest" in capfd.readouterr().out
    # With itself nothing moves.
    path = out / f"{name}.json"
    assert vcore("bench", "--compare", path, path, "--fail-over", "0%") == 0


def noted(tmp_path, *arguments, ran=3, status=0, deselected=0, disabled=False):
    """What ``note_run`` makes of a run over three suites of one test each."""
    folder = tmp_path / "benchmarks"
    folder.mkdir(exist_ok=True)
    suites = ("gibbs", "head", "step")
    for name in suites:
        (folder / f"bench_{name}.py").touch()
    asked = [s for s in suites if any(s in a for a in arguments) or "benchmarks/" in arguments]
    tests = [f"benchmarks/bench_{name}.py" for name in asked][deselected:]
    session = SimpleNamespace(
        items=[SimpleNamespace(location=(file, 1, "test")) for file in tests],
        testscollected=len(tests),
    )
    config = SimpleNamespace(
        rootpath=tmp_path,
        args=arguments,
        invocation_params=SimpleNamespace(dir=tmp_path),
        pluginmanager=SimpleNamespace(get_plugin={"session": session}.get),
        getoption={"benchmark_disable": disabled}.get,
    )
    reports = [SimpleNamespace(nodeid=f"{file}::test", when="call") for file in tests]
    begun = [SimpleNamespace(nodeid=r.nodeid, when="setup") for r in reports]
    stats = {"passed": reports[:ran], "": begun, "deselected": [None] * deselected}
    found = Record()
    bench.note_run(found, SimpleNamespace(config=config, stats=stats), status)
    return found


def test_what_ran_is_noted(tmp_path):
    whole = noted(tmp_path, "benchmarks/")
    assert (whole.selection, whole.complete, whole.exit_status) == ([], True, 0)
    assert noted(tmp_path, "benchmarks/", status=1).complete  # all ran, and one failed
    some = noted(tmp_path, "benchmarks/bench_step.py", "benchmarks/bench_gibbs.py")
    assert (some.selection, some.complete) == (["gibbs", "step"], True)
    for given, options, missing in (
        ("benchmarks/", {"ran": 1, "status": 2}, ["1 of 3 tests ran", "interrupted"]),
        ("benchmarks/", {"ran": 2, "status": 1}, ["2 of 3 tests ran"]),  # pytest -x
        ("benchmarks/", {"deselected": 1}, ["no test of gibbs", "1 tests deselected"]),
        ("benchmarks/", {"disabled": True}, ["nothing was timed (--benchmark-disable)"]),
        ("benchmarks/bench_head.py::test", {}, ["some tests of head alone"]),
    ):
        assert noted(tmp_path, given, **options).missing == missing, given


CHILD = """
import pathlib, signal, sys, time
try:
    pathlib.Path("ready").touch()
    time.sleep(30)
except KeyboardInterrupt:
    time.sleep(0.8)  # as a record takes to write
    pathlib.Path("written").touch()
    sys.exit(2)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_are_passed_on_and_waited_for(number, tmp_path):
    command = [sys.executable, "-c", CHILD]
    code = f"from vcore_train.bench import _passing_signals as run\nexit(run({command}, '.'))"
    here = {**os.environ, "PYTHONPATH": str(Path(bench.__file__).parents[1])}
    with subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, env=here) as process:
        while not (tmp_path / "ready").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(number)
        assert process.wait(20) == 128 + number
    assert (tmp_path / "written").exists() == (number == signal.SIGINT)


def test_exit_codes_without_a_signal(tmp_path):
    def code(text):
        return bench._passing_signals([sys.executable, "-c", text], tmp_path)

    before = signal.getsignal(signal.SIGTERM)
    assert code("exit(3)") == 3
    assert code("import os; os.kill(os.getpid(), 9)") == 137
    assert signal.getsignal(signal.SIGTERM) is before


# ---- where results come from, and what their files hold ----


def test_the_commit_is_that_of_this_package(tmp_path):
    def git(*arguments):
        name = ("-c", "user.name=a", "-c", "user.email=a@b")
        command = ["git", "-C", tmp_path, *name, *arguments]
        subprocess.run(command, check=True, capture_output=True)

    assert provenance.commit(tmp_path) is None
    git("init")
    git("commit", "--allow-empty", "-m", "of another project")
    assert provenance.commit(tmp_path) is None
    (tmp_path / "python" / "vcore_train").mkdir(parents=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(provenance, "HERE", (tmp_path / "python" / "vcore_train").resolve())
        head = provenance.commit(tmp_path)
        assert len(head) == 40
        (tmp_path / "file").touch()
        assert provenance.commit(tmp_path) == head  # untracked
        git("add", "file")
        assert provenance.checkout_state(tmp_path) == (head, 1)
        assert provenance.commit(tmp_path) == f"{head}+"


def test_versions_and_processor():
    assert provenance.versions(["pytest", "no-such-package"]) == {
        "pytest": pytest.__version__,
        "no-such-package": None,
    }
    assert isinstance(provenance.processor(), str)


def test_plain_values_and_tables():
    given = {1: (1.23456789, math.inf), "t": torch.tensor(2), "p": Path("x"), "n": [None, True]}
    exact = {"1": [1.23456789, None], "t": 2, "p": "x", "n": [None, True]}
    assert plain(given) == exact
    assert plain(given, 3) == exact | {"1": [1.23, None]}
    rows = [("a", "1")]
    assert markdown_table(("x", "y"), rows, 1) == ["| x | y |", "| --- | --: |", "| a | 1 |"]
    assert markdown_table(("x", "y"), rows)[1] == "| --- | --- |"
