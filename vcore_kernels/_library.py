"""The operator library ``torch.ops.vcore_kernels``: schemas are declared here in Python, once each.

The compiled library (``_C.so``, built from ``csrc/``) only supplies implementations for the CPU dispatch
key and is optional. Every op module calls :func:`define` for its own operators.
"""

from collections.abc import Callable
from pathlib import Path

import torch

NAMESPACE = "vcore_kernels"
LIBRARY = torch.library.Library(NAMESPACE, "DEF")
COMPILED_PATH = Path(__file__).with_name("_C.so")


def define(schema: str, fake: Callable) -> None:
    """Declares ``schema`` and its fake (shape-only) implementation, which torch.compile traces with."""
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    torch.library.register_fake(f"{NAMESPACE}::{schema.split('(')[0]}", fake, lib=LIBRARY)


def _load() -> str | None:
    """Loads the compiled kernels; returns why that was not possible, or None."""
    if not COMPILED_PATH.exists():
        return f"{COMPILED_PATH.name} is not built (VCORE_BUILD_CPP=1 pip install . needs a C++ compiler)"
    try:
        torch.ops.load_library(str(COMPILED_PATH))
    except OSError as error:
        return f"{COMPILED_PATH.name} does not load with torch {torch.__version__}: {error}"
    return None


WHY_NOT_COMPILED = _load()
