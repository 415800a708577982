"""Every Triton kernel compiles for every target, without spills and within the target's limits."""

import dataclasses
import json
import pkgutil
import re
from pathlib import Path

import pytest
import torch

from vcore_kernels.backends.triton import INTERPRETED

pytest.importorskip("triton")
if INTERPRETED:
    pytest.skip("the interpreter does not compile", allow_module_level=True)

import aot_probe

import vcore_kernels.triton
from benchmarks import aot, aot_cases
from vcore_kernels.triton import common

pytestmark = pytest.mark.aot


@pytest.fixture(scope="module")
def report():
    return aot.compile_all(list(aot.TARGETS), progress=False)


@pytest.mark.parametrize("target", aot.TARGETS)
def test_rules(report, target):
    rows = [row for row in report if row.target == target]
    assert rows or not aot_cases.CASES
    assert not [f"{row.title()}: {fault}" for row in rows for fault in row.faults()]


def test_every_kernel_file_is_in_the_report():
    """A new kernel file without a line in aot_cases.py would go unproven."""
    launching = set()
    for module in pkgutil.iter_modules(vcore_kernels.triton.__path__):
        path = Path(vcore_kernels.triton.__path__[0]) / f"{module.name}.py"
        if module.name != "common" and re.search(r"\blaunch\(", path.read_text()):
            launching.add(f"vcore_kernels.triton.{module.name}")
    for target in aot.TARGETS:
        found = {source.kernel.__module__ for source in aot.record(target)}
        assert launching <= found, target


def test_the_committed_report_is_fresh(report):
    committed = json.loads((aot.RESULTS / "aot.json").read_text())["versions"]
    if committed != aot.versions():
        pytest.skip(f"the report was made with {committed}, here is {aot.versions()}")
    assert aot.difference(report) is None


# ---- the harness itself ----


def probe_launches():
    x = torch.empty(64, 64, dtype=torch.bfloat16)
    common.launch(aot_probe.scale, (1,), x, x, 0.5, 4096, BLOCK=64)
    common.launch(aot_probe.scale, (1,), x, x, 0.25, 8192, BLOCK=64)
    common.launch(aot_probe.scale, (1,), x, x, 0.5, 4097, BLOCK=64)
    common.launch(aot_probe.product, (1,), x, x, x.float(), 64, num_stages=3, BLOCK=64)


@pytest.fixture
def probe(monkeypatch):
    """The report's rows for the probe kernels alone, by target."""
    monkeypatch.setattr(aot_cases, "CASES", [probe_launches])
    aot.record.cache_clear()

    def rows(target):
        return [aot.compile_source(source, aot.TARGETS[target]) for source in aot.record(target)]

    yield rows
    aot.record.cache_clear()


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("sm80", "mma.sync"),
        ("sm89", "mma.sync"),
        ("sm90", "wgmma"),
        ("sm100", "tcgen05"),
        ("gfx942", "mfma"),
    ],
)
def test_harness_reads_what_the_compiler_made(probe, target, instruction):
    # Two launches that differ in a number divisible by 16 are one; the odd length is another.
    product, odd, aligned = sorted(
        probe(target), key=lambda row: (row.kernel, row.signature.get("n", ""))
    )
    assert [row.kernel for row in (product, aligned, odd)] == ["product", "scale", "scale"]
    assert aligned.signature["n"] == "i32/16"
    assert odd.signature["n"] == "i32"
    assert product.signature["p_a"] == "*bf16/16"
    assert product.constants["BLOCK"] == "64"
    assert product.best_instruction is True
    assert product.instructions[instruction] > 0
    assert aligned.best_instruction is None
    assert product.shared >= 2 * 64 * 64 * 2
    assert product.registers > aligned.registers > 0
    assert product.resident >= 1
    assert not product.faults()


def test_harness_sees_spills(probe, monkeypatch):
    """256 x 256 float32 sums on 4 warps are 512 registers a thread."""

    def too_large():
        x = torch.empty(256, 256, dtype=torch.bfloat16)
        common.launch(aot_probe.product, (1,), x, x, x.float(), 256, BLOCK=256)

    monkeypatch.setattr(aot_cases, "CASES", [too_large])
    for target in ("sm80", "sm90", "gfx942"):
        (row,) = probe(target)
        assert row.spills > 0
        assert any("spilled" in fault for fault in row.faults())
    assert any("shared memory" in fault for fault in probe("sm80")[0].faults())


def test_rules_can_be_broken(probe):
    row = probe("sm90")[0]
    assert not row.faults()
    for change in (
        {"shared": row.shared_limit + 1},
        {"spills": 4},
        {"best_instruction": False},
    ):
        assert len(dataclasses.replace(row, **change).faults()) == 1


def test_report_round_trip(probe, tmp_path, monkeypatch):
    rows = sorted(probe("sm90"), key=aot.Compilation.key)
    monkeypatch.setattr(aot, "RESULTS", tmp_path)
    assert "does not exist" in aot.difference(rows)
    (tmp_path / "aot.json").write_text(aot.to_json(rows))
    (tmp_path / "aot.md").write_text(aot.to_markdown(rows))
    assert aot.difference(rows) is None
    changed = [dataclasses.replace(rows[0], registers=rows[0].registers + 1), *rows[1:]]
    assert "stale" in aot.difference(changed)
    assert "stale" in aot.difference(rows[1:])
    monkeypatch.setattr(aot, "versions", lambda: {"triton": "another"})
    assert aot.difference(changed) is None
