"""benchmarks/gpu.py from end to end, without a GPU: nothing is measured, all of it runs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpu")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", "--dry-run", "--tune", "--out", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return folder, done.stdout


@pytest.mark.interpreter
def test_dry_run(run):
    folder, output = run
    report = json.loads((folder / "gpu-dry-run.json").read_text())
    text = (folder / "gpu-dry-run.md").read_text()
    assert sorted(path.name for path in folder.iterdir()) == ["gpu-dry-run.json", "gpu-dry-run.md"]
    assert report["status"] == "dry run, no figures"
    assert text.splitlines()[0].endswith("dry run, no figures")
    assert report["failures"] == []
    assert report["ceilings"] == {}
    assert report["seconds"] is None
    # No figure of any kind, in any row.
    measured = ("ms", "ms_quartiles", "units", "percent_of_ceiling", "extra_bytes")
    for figure in report["figures"]:
        assert [figure[name] for name in measured] == [None] * len(measured), figure
        assert not figure["gate"].startswith("FAILED")
    for row in report["tuning"]:
        assert row["ms"] is None
    assert " ms" not in output


@pytest.mark.interpreter
def test_every_operator_and_peer_has_its_row(run):
    report = json.loads((run[0] / "gpu-dry-run.json").read_text())
    rows = {(f["section"], f["subject"], f["note"]): f for f in report["figures"]}
    for task in ("trained", "frozen"):
        for subject in ("known weights", "late weights", "uniform weights"):
            assert "d_hidden" in rows["head", f"vcore: {subject}", task]["gate"]
        assert "d_hidden" in rows["head", "eager", task]["gate"]
        assert "d_hidden" in rows["head", "cuBLAS chunk loop", task]["gate"]
        assert "tangent" in rows["head", "vcore: jvp", f"tangent, {task}"]["gate"]
        assert "difference" in rows["head", "vcore: pair", f"pair, {task}"]["gate"]
    assert "tau" in rows["gibbs", "gibbs_weights, KL budget 0.1", ""]["gate"]
    assert "alpha" in rows["gibbs", "vcore_loss, KL budget 0.1, batch", ""]["gate"]
    for way in ("", ", consume", ", stochastic"):
        gate = rows["perturb", f"perturb_ and restore_{way}", ""]["gate"]
        assert gate == "exact, restored bit for bit"
    # A peer is measured or it is said why not.
    from benchmarks.peers import PEERS

    measured = {subject for _, subject, _ in rows}
    for peer in PEERS:
        assert (peer.name in measured) != bool(report["absent"].get(peer.name)), peer.name


@pytest.mark.interpreter
def test_gate_sees_wrong_results():
    from benchmarks.gpu_head import DRY_SHAPES, Inputs, Subject, Truth

    inputs = Inputs(DRY_SHAPES[0], torch.device("cpu"))
    truth = Truth(inputs)
    problem = inputs.problem(trained=True, uniform=False)

    def results():
        logits = (problem.hidden @ problem.weight.T).float()
        nll = torch.nn.functional.cross_entropy(logits, problem.target, reduction="none")
        return {"nll": nll.detach(), **problem.weighted(nll)}

    subject = Subject("eager", "trained", results, 3)
    assert truth.check(subject, results())[1]
    for name in ("nll", "d_hidden", "d_weight"):
        for spoil in (float("nan"), 1.0):
            spoilt = results()
            spoilt[name] = spoilt[name].clone()
            spoilt[name].view(-1)[:] += spoil
            text, passed = truth.check(subject, spoilt)
            assert not passed
            assert text.startswith("FAILED")
    # Gradients for uniform weights are others.
    assert not truth.check(Subject("x", "trained", results, 3, uniform=True), results())[1]


def test_no_gpu_is_said():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "--dry-run" in done.stderr
