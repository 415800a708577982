"""The ``vcore`` command as the tests call it, and data for it."""

import json

import pytest
from vcore_train.arithmetic import generate_problems
from vcore_train.cli import main


def vcore(*arguments):
    """The exit code of ``vcore`` with these arguments."""
    with pytest.raises(SystemExit) as exited:
        main([str(argument) for argument in arguments])
    return exited.value.code or 0


def write_problems(path, count):
    """``path``, with so many rows of a prompt and a response."""
    rows = ({"prompt": p.prompt, "response": p.response} for p in generate_problems(count))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return str(path)
