"""The benchmark suite without its figures: gates, absent peers, the record, and that it runs."""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("pytest_benchmark")

from vcore_train import bench_report
from vcore_train.bench_record import Growth, Record, Row, exponent, quartiles

from benchmarks.peers import Absent
from benchmarks.suite import Bench, gate, relative_error

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")


def suite(*arguments):
    # A worker of pytest-xdist says so in the environment, and pytest-benchmark then times nothing.
    own = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**own, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    return done.stdout


class Fixture:
    """What the suite uses of pytest-benchmark's fixture."""

    def __init__(self, disabled=False):
        self.disabled, self.group, self.extra_info = disabled, None, {}
        self.stats = SimpleNamespace(stats=SimpleNamespace(data=[]))

    def pedantic(self, target, setup=None, rounds=1, warmup_rounds=0):
        for _ in range(rounds + warmup_rounds):
            if setup is not None:
                setup()
            target()
        self.stats.stats.data = [0.5] * rounds


def make_bench(**options):
    record = Record(quick=True)
    return Bench(Fixture(**options), record, CPU, {}, late=False), record


def measure(bench, row, call, check, **options):
    def unit():
        pass

    return bench.measure(row, lambda: call, unit, check, **options)


# ---- one subject ----


def test_a_subject_and_its_unit_become_rows():
    bench, record = make_bench()
    order = []
    row = Row("group", "fast", "ours", unit="the unit", ceiling="copy")
    bench.measure(
        row,
        lambda: lambda: order.append("call"),
        lambda: order.append("unit"),
        lambda result: "seen",
        unit_row=Row("group", "the unit", "yardstick", bytes=8.0),
    )
    assert row.status == "measured"
    assert row.gate == "seen"
    assert len(row.seconds) == len(row.unit_seconds) == 2
    # The gate's call comes first, and every round begins with the unit.
    assert order[:2] == ["call", "unit"]
    rounds = order[-4:]
    assert rounds == ["unit", "call"] * 2
    (known, unit) = record.rows
    assert known is row
    assert (unit.subject, unit.kind, unit.bytes) == ("the unit", "yardstick", 8.0)
    assert unit.seconds == row.unit_seconds
    bench.benchmark = Fixture()
    measure(bench, Row("group", "second", "peer", unit="the unit"), lambda: None, lambda _: "")
    assert len(record.rows) == 3  # the unit's row is there already, and has gathered more
    assert len(unit.seconds) == 4


def wrong(_):
    raise AssertionError("d_hidden 5e-01, allowed 1e-03")


@pytest.mark.parametrize("once", [False, True])
def test_a_wrong_peer_is_reported_and_not_timed(once):
    bench, record = make_bench()
    row = Row("group", "wrong peer", "peer", unit="unit")
    with pytest.raises(pytest.xfail.Exception, match="wrong peer is wrong: d_hidden"):
        measure(bench, row, lambda: None, wrong, once=once)
    assert record.rows == [row]
    assert (row.status, row.seconds) == ("wrong", [])
    assert "WRONG: d_hidden 5e-01" in bench_report.text(record)
    assert record.failures() == []


def test_a_wrong_result_of_ours_fails():
    bench, record = make_bench()
    with pytest.raises(AssertionError, match="d_hidden"):
        measure(bench, Row("group", "ours", "ours"), lambda: None, wrong)
    assert record.failures() == ["group: ours: d_hidden 5e-01, allowed 1e-03"]


@pytest.mark.parametrize("once", [False, True])
def test_a_peer_that_cannot_run_is_absent_with_its_reason(once):
    def missing():
        raise Absent("import quack: No module named 'quack'")

    def unsupported():
        raise RuntimeError("no kernel\nfor this device")

    for kind, reason in (
        (missing, "import quack: No module named 'quack'"),
        (unsupported, "RuntimeError: no kernel for this device"),
    ):
        bench, record = make_bench()
        row = Row("group", "a peer", "peer")
        with pytest.raises(pytest.skip.Exception, match="a peer: "):
            measure(bench, row, kind, lambda _: "", once=once)
        assert (row.status, row.note) == ("absent", reason)
        line = next(x for x in bench_report.text(record).splitlines() if "a peer" in x)
        assert "absent" in line
        assert line.endswith(reason)
        assert reason in bench_report.markdown(record)
    bench, _ = make_bench()
    with pytest.raises(RuntimeError, match="no kernel"):  # ours must run
        measure(bench, Row("group", "ours", "ours"), unsupported, lambda _: "")


@pytest.mark.parametrize("once", [False, True])
def test_without_timing_only_the_gate_runs(once):
    bench, record = make_bench(disabled=True)
    row = measure(bench, Row("g", "s", "ours"), lambda: None, lambda _: "right", once=once)
    assert (row.status, row.gate, row.seconds) == ("checked", "right", [])
    assert record.rows == [row]


def test_memory_counts_what_is_live_at_once_and_not_what_is_returned():
    def call():
        kept = torch.ones(1 << 18)  # 1 MiB
        work = torch.ones(1 << 20)  # 4 MiB
        return kept + work[: 1 << 18]

    bench, _ = make_bench()
    row = measure(bench, Row("g", "s", "ours"), call, lambda _: "", memory="allocator")
    assert 5 << 20 <= row.extra_bytes < (5 << 20) + 65536  # 6 at the peak, 1 returned
    if Path("/proc/self/clear_refs").exists():
        big = measure(
            make_bench()[0],
            Row("g", "s", "ours"),
            lambda: torch.ones(32 << 20).sum(),  # 128 MiB
            lambda _: "",
            memory="resident",
        )
        assert 100 << 20 < big.extra_bytes < 180 << 20


def test_the_gate_compares_with_what_is_allowed():
    truth = torch.ones(4, dtype=torch.float64)
    assert relative_error(torch.ones(4) * 1.5, truth) == pytest.approx(0.5)
    assert relative_error(torch.tensor([1, 1, 1, math.nan]), truth) == math.inf
    assert gate({"a": 0.1}, {"a": 0.2}) == "a 1.0e-01"
    for error in (0.3, math.nan, math.inf):
        with pytest.raises(AssertionError, match=r"allowed 2\.00e-01"):
            gate({"a": error}, {"a": 0.2})


def test_the_heads_gate_sees_wrong_gradients():
    from benchmarks.bench_head import MAIN, Head, known

    head = Head(MAIN.of(True), CPU)
    check = functools.partial(head.check, trained=True, uniform=False, times=2)
    gradients = known(head.problem(trained=True, uniform=False))()
    assert "d_weight" in check(gradients)
    for name in gradients:
        spoilt = {**gradients, name: gradients[name].clone()}
        spoilt[name][0] += 0.1 * gradients[name].norm()
        with pytest.raises(AssertionError, match=name):
            check(spoilt)
    with pytest.raises(AssertionError, match="came back"):
        check({"d_hidden": gradients["d_hidden"]})
    with pytest.raises(AssertionError):  # for uniform weights they are others
        head.check(gradients, trained=True, uniform=True, times=2)


def test_the_released_gvm_loop_allocates_as_ours():
    from benchmarks.bench_gradient_norms import Responses

    found = Responses(True, True, CPU)
    counts = found.stage_one("embeddings")
    assert torch.equal(counts, found.published("embeddings"))
    assert counts.sum() == 8 * found.count
    solved = torch.zeros(16).index_add(0, found.prompt, found.rewards)
    assert ((counts > 0) == (solved > 0)).all()


def test_the_published_utilities_leave_the_model_as_it_was():
    from benchmarks.bench_step import Model

    found = Model(8192, True, True, CPU)
    before = [p.detach().clone() for p in found.steps.model.parameters()]
    r = found.fidelity()
    assert r["default"] > 0.999
    assert abs(r["published"]) < 0.9
    after = found.steps.model.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert all(p.grad is None for p in found.steps.model.parameters())


# ---- the record ----


def made_up():
    common = {"unit": "GEMM", "flops": 8e9, "bytes": 1e9, "ceiling": "bfloat16 GEMM"}
    ours = Row("g: N=1", "known", "ours", "measured", **common)
    ours.seconds, ours.unit_seconds = [2.0, 4.0, 3.0], [1.0, 2.0, 1.0]
    ours.extra_bytes, ours.accumulator_bytes = 3 << 20, 1 << 20
    peer = Row("g: N=1", "eager", "peer", "measured", **common)
    peer.seconds, peer.unit_seconds = [1.9, 1.9, 1.9], [1.0, 1.0, 1.0]
    moved = Row("copies", "perturb_", "ours", "measured", bytes=6e9, ceiling="copy")
    moved.seconds, moved.unit_seconds = [0.25], [0.125]
    record = Record(rows=[peer, ours, moved], ceilings={"bfloat16 GEMM": 8.0, "copy": 48.0})
    record.growth = [Growth("p", "known", "ours", "N", [1, 2, 4], [0.1, 0.4, 1.6], [5, 5, 5])]
    record.environment = {"commit": "0123456789abcdef", "dirty": True, "versions": {"torch": "2"}}
    return record, ours, peer, moved


def test_figures_of_a_row():
    record, ours, peer, moved = made_up()
    assert ours.ratios == [2.0, 2.0, 3.0]
    assert ours.units == 2.0
    assert quartiles([1.0, 2.0, 3.0, 4.0, 5.0]) == (2.0, 4.0)
    assert quartiles([7.0]) == (7.0, 7.0)
    assert record.rate(ours) == pytest.approx(8 / 3)
    assert record.percent(ours) == pytest.approx(100 / 3)
    assert record.rate(moved) == pytest.approx(24.0)
    assert record.percent(moved) == pytest.approx(50.0)
    record.raise_ceiling("copy", 40.0)
    assert record.ceilings["copy"] == 48.0
    assert [r.subject for r in record.groups()["g: N=1"]] == ["known", "eager"]
    assert record.behind() == ["g: N=1: known takes 1.05 x the time of eager"]
    peer.seconds = [2.5, 2.5, 2.5]
    assert record.behind() == []


def test_growth_finds_a_known_exponent():
    assert exponent([1, 2, 4, 8], [3 * s**1.5 for s in (1, 2, 4, 8)]) == pytest.approx(1.5)
    assert exponent([1, 2, 4], [0, 1, 2]) is None
    assert exponent([1, 2, 4], []) is None
    growth = made_up()[0].growth[0]
    assert growth.time_exponent == pytest.approx(2.0)
    assert growth.memory_exponent == pytest.approx(0.0)


def test_a_subject_that_grows_has_its_exponents_measured():
    bench, record = make_bench()
    calls = {n: functools.partial(torch.ones, n, 256) for n in (256, 512, 1024)}
    calls = {n: lambda make=make: make().sum() for n, make in calls.items()}
    bench.grow("problem", "ours", "ours", "N", calls)
    (growth,) = record.growth
    assert growth.sizes == [256, 512, 1024]
    assert growth.memory_exponent == pytest.approx(1.0, abs=0.01)
    assert growth.time_exponent is not None


def test_files_of_a_record(tmp_path):
    record, *_ = made_up()
    names = [path.name for path in bench_report.write(record, tmp_path / "new")]
    assert names == ["bench-cpu.json", "bench-cpu.md", "bench-cpu-roofline.png"]
    read = Record.read(tmp_path / "new" / "bench-cpu.json")
    assert read == record
    text = (tmp_path / "new" / "bench-cpu.md").read_text()
    for part in (
        "commit 0123456789ab, changed files",
        "| \\* known | 3000 [2500, 3500] | 2 [2, 2.5] | 33 | 3.0 (1 of it float32 sums of dW) |",
        "- g: N=1: known takes 1.05 x the time of eager",
        "| p | known | 2.00 | 0.00 |",
    ):
        assert part in text, part
    assert (tmp_path / "new" / "bench-cpu-roofline.png").read_bytes().startswith(b"\x89PNG")
    record.rows = [row for row in record.rows if row.status == "absent"]
    assert len(bench_report.write(record, tmp_path / "new")) == 2  # nothing to draw
    assert not (tmp_path / "new" / "bench-cpu-roofline.png").exists()  # nor that of another run


def test_a_part_of_the_suite_leaves_the_record_of_all_of_it(tmp_path):
    whole, *_ = made_up()
    bench_report.write(whole, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    some = made_up()[0]
    some.selection = ["gibbs", "head"]
    cut = made_up()[0]
    cut.missing, cut.exit_status = ["3 of 9 tests ran", "interrupted"], 2
    for record, name in ((some, "bench-cpu-gibbs-head"), (cut, "bench-cpu-partial")):
        paths = bench_report.write(record, tmp_path)
        assert [path.name for path in paths][:2] == [f"{name}.json", f"{name}.md"]
    assert before == {name: (tmp_path / name).read_bytes() for name in before}
    found = json.loads((tmp_path / "bench-cpu-partial.json").read_text())
    assert (found["complete"], json.loads(before["bench-cpu.json"])["complete"]) == (False, True)
    note = "Not all of it ran: 3 of 9 tests ran; interrupted. pytest ended with exit status 2."
    assert f"**{note}**" in (tmp_path / "bench-cpu-partial.md").read_text()
    assert note in bench_report.text(cut)
    assert "Not all" not in before["bench-cpu.md"].decode()
    text = (tmp_path / "bench-cpu-gibbs-head.md").read_text()
    assert "`vcore bench --select gibbs --select head`" in text


def test_what_was_not_finite_is_written_and_read(tmp_path):
    record, ours, *_ = made_up()
    ours.facts = {"r": math.nan}
    path = bench_report.write(record, tmp_path)[0]
    assert Record.read(path).rows[1].facts == {"r": None}
    assert "r none" in bench_report.text(Record.read(path))


# ---- all of it ----


def test_the_suite_runs_and_leaves_its_record(tmp_path):
    out = suite(
        *("benchmarks/", "--benchmark-only", "--quick", "--bench-out", tmp_path),
        *(
            "-k",
            "(test_head and bfloat16-V65536-trained or growth) and not CCE and not torch.compile",
        ),
    )
    record = Record.read(tmp_path / "bench-quick-cpu-partial.json")
    assert (record.selection, record.exit_status) == ([], 0)
    left_out = record.missing.pop()
    assert left_out.endswith("tests deselected")
    assert "no test of gibbs" in record.missing
    found = {row.subject: row for row in record.rows}
    for name in ("known weights", "late weights", "eager", "torch linear_cross_entropy"):
        assert found[name].status == "measured", name
        assert found[name].unit == "hidden @ weight.T"
        assert found[name].units > 0
        assert record.percent(found[name]) > 0
        assert "d_weight" in found[name].gate
        assert found[name].extra_bytes is not None
    for name in ("Liger", "quack"):
        assert found[name].status == "absent"
        assert found[name].note
    assert {g.axis for g in record.growth} == {"N", "V", "H"}
    assert record.environment["threads"] == 1
    assert record.quick
    assert (tmp_path / "bench-quick-cpu-partial-roofline.png").exists()
    assert "hidden @ weight.T" in out
    assert "test_head[" in out  # pytest-benchmark's own table


def test_every_suite_is_collected():
    names = {path.name for path in (ROOT / "benchmarks").glob("bench_*.py")}
    collected = suite("benchmarks/", "--collect-only")
    assert all(f"benchmarks/{name}::" in collected for name in names)
    assert len(names) >= 8
    # A test's identity must not depend on the process.
    assert "0x" not in collected
    assert "<" not in collected
