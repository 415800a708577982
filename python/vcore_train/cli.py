"""Entry point of the ``vcore`` command: reports errors, and parts that are not installed."""

import sys
import time
from collections.abc import Sequence
from typing import Any

from vcore_train.launch import OtherProcessError, is_main, process_number

# Modules of the `train` extra, by import name.
EXTRA = (
    "accelerate",
    "cloudpickle",
    "datasets",
    "matplotlib",
    "peft",
    "pyarrow",
    "rich",
    "safetensors",
    "tokenizers",
    "transformers",
    "typer",
    "yaml",
)
# Of several processes the main one reports what all of them met, and the launcher ends the others
# once it is gone. One that is still there after so many seconds was alone with its error.
REPORTED_BY_THEN = 5.0


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``vcore`` and exits: 0 for success, 1 for an error in one line, 2 for bad usage.

    130 after Ctrl-C. ``vcore --debug ...`` shows the traceback of an error. Of several processes
    the main one alone writes, and another one only an error of its own.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from vcore_train.commands import app

        if is_main():
            app(args=given, prog_name="vcore")
        else:
            _run_silently(app, given)
    except OtherProcessError:
        if "--debug" in given:
            raise
        time.sleep(REPORTED_BY_THEN)
        raise SystemExit(1) from None
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] not in EXTRA or "--debug" in given:
            raise
        _fail(f"{error.name} is not installed. Run: pip install 'vcore_kernels[train]'")
    except KeyboardInterrupt:
        _fail("interrupted", code=130)
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        if "--debug" in given:
            raise
        _fail(str(error) or type(error).__name__)
    except (LookupError, ArithmeticError, AttributeError) as error:  # no message meant for users
        if "--debug" in given:
            raise
        _fail(f"{type(error).__name__}: {error}. Run vcore --debug ... to see where.")


def _run_silently(app: Any, given: list[str]) -> None:
    """The same, where wrong usage is not explained once more."""
    try:
        code = app(args=given, prog_name="vcore", standalone_mode=False)
    except Exception as error:
        usage = getattr(error, "exit_code", None)  # as the errors of typer's parser have it
        if usage is None:
            raise
        code = usage
    if isinstance(code, int) and code != 0:
        time.sleep(REPORTED_BY_THEN if code == 2 else 0)
        raise SystemExit(code)


def _fail(message: str, code: int = 1) -> None:
    if not is_main():
        time.sleep(REPORTED_BY_THEN)
        message = f"process {process_number()}: {message}"
    print(f"vcore: {' '.join(message.split())}", file=sys.stderr, flush=True)
    raise SystemExit(code)


if __name__ == "__main__":
    main()
