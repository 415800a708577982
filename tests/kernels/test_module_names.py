"""A public function and the module it lives in share a name; both ways of importing it work."""

import subprocess
import sys

import pytest

import vcore_kernels

FUNCTIONS = sorted(
    name
    for name in vcore_kernels.__all__
    if getattr(getattr(vcore_kernels, name), "__module__", "") == f"vcore_kernels.{name}"
)


def test_there_are_such_functions():
    assert {"gibbs_weights", "linear_nll", "sft_loss", "vcore_loss"} <= set(FUNCTIONS)


@pytest.mark.parametrize("function_first", [True, False])
def test_both_imports_in_either_order(function_first):
    imports = [
        line
        for name in FUNCTIONS
        for line in (f"from vcore_kernels import {name}", f"import vcore_kernels.{name}")
    ]
    checks = [
        f"assert callable(vcore_kernels.{name}) and vcore_kernels.{name} is "
        f"sys.modules['vcore_kernels.{name}'].{name}"
        for name in FUNCTIONS
    ]
    lines = ["import sys", *(imports if function_first else imports[::-1]), *checks]
    command = [sys.executable, "-W", "error", "-c", "\n".join(lines)]
    subprocess.run(command, check=True, cwd=vcore_kernels.__path__[0] + "/..")
