"""The calls whose launches benchmarks/aot.py compiles: one function for each operator's file.

Tensors are small and empty: nothing is computed. Sizes are multiples of 16, as those of models are;
a few odd ones stand for the rest. A case is a function without arguments that calls the library's
raw Triton functions; one for each dtype and each combination of flags that changes a kernel.
"""

from collections.abc import Callable

Case = Callable[[], object]

CASES: list[Case] = []
