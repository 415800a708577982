"""The scripts in examples/ run as they stand, without a network, and show what they say."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(script, *arguments, launcher=()):
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "python")]),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, *launcher, str(ROOT / "examples" / script), *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def figures(text, name):
    """What the lines of steps say of ``name``."""
    lines = [line for line in text.splitlines() if line.startswith("step ")]
    return [float(found[1]) for line in lines if (found := re.search(rf"\b{name} ([\d.]+)", line))]


def test_bare_loop():
    out = run("bare_loop.py", "--steps", "4")
    nll = figures(out, "nll")
    assert len(nll) == 4
    assert nll[-1] < nll[0] - 0.1
    assert figures(out, "kl") == [0.02] * 4


@pytest.mark.distributed
def test_bare_loop_in_two_processes():
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    out = run("bare_loop.py", "--steps", "3", launcher=launcher)
    nll = figures(out, "nll")
    assert len(nll) == 3  # of one process
    assert nll[-1] < nll[0] - 0.1


def test_trainer_mixin():
    out = run("trainer_mixin.py")
    assert figures(out, "kl") == pytest.approx([0.02] * 5, rel=0.01)
    nll = figures(out, "nll")
    assert nll[-1] < nll[0] - 0.1


@pytest.mark.skipif(importlib.util.find_spec("trl") is None, reason="needs trl")
def test_trl_sft():
    out = run("trl_sft.py")
    assert figures(out, "kl") == pytest.approx([0.02] * 5, rel=0.01)
    tokens = figures(out, "num_tokens")
    assert tokens == sorted(set(tokens))
    assert 2000 < tokens[-1] <= 5 * 2 * 256  # packed rows are nearly full


def test_loss_func():
    out = run("loss_func.py")
    assert len(figures(out, "loss")) == 5
    kl = re.search(r"last batch: kl ([\d.]+)", out)
    assert float(kl[1]) == pytest.approx(0.02, rel=0.01)


def test_packing():
    out = run("packing.py")
    assert figures(out, "kl") == pytest.approx([0.02] * 10, rel=0.01)
    difference = re.search(r"largest difference of a weight ([\de.-]+)", out)
    assert float(difference[1]) < 1e-6
