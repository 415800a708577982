"""Entry point of the ``vcore`` command: reports errors, and parts that are not installed."""

import sys
from collections.abc import Sequence

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
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs ``vcore`` and exits: 0 for success, 1 for an error in one line, 2 for bad usage.

    130 after Ctrl-C. ``vcore --debug ...`` shows the traceback of an error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        from vcore_train.commands import app

        app(args=given, prog_name="vcore")
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


def _fail(message: str, code: int = 1) -> None:
    print(f"vcore: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)
