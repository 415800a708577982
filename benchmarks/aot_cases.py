"""The calls whose launches benchmarks/aot.py compiles: one function for each operator's file.

Tensors are small and empty: nothing is computed. Sizes are multiples of 16, as those of models are.
A case is a function without arguments that calls the library's raw Triton functions; there is one
for each dtype and each combination of flags that changes a kernel.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from vcore_kernels.triton import head

Case = Callable[[], object]

HALF = (torch.bfloat16, torch.float16)
PRODUCTS = (*HALF, torch.float32)
ALL = (*PRODUCTS, torch.float64)


def head_cases() -> Iterator[Case]:
    """Every operator on the head: in bf16 with and without bias and soft cap, in the other dtypes
    with both, which takes the most registers.
    """
    n, h, v = 256, 64, 512
    target = torch.zeros(n, dtype=torch.int64)
    vector = torch.empty(n)
    lse = torch.empty(2, n)

    for dtype in PRODUCTS:

        def normal(*size: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(size, dtype=dtype)

        hidden, weight, bias = normal(n, h), normal(v, h), normal(v)
        operands = hidden, weight, target
        second_bias = torch.empty(v)
        for given, softcap in ((None, 0.0), (bias, 30.0)):
            if given is None and dtype != torch.bfloat16:
                continue
            options = softcap, 1.0, -100
            for keep in (False, True):
                yield partial(head.linear_nll_forward, *operands, given, *options, keep)
            for needs in ((True, False, False), (True, True, given is not None)):
                yield partial(
                    head.linear_nll_backward,
                    vector,
                    *operands,
                    given,
                    vector,
                    lse,
                    *options,
                    *needs,
                )
                yield partial(
                    head.weighted_linear_nll_forward, *operands, vector, given, *options, *needs
                )
            tangent = None if given is None else second_bias
            for beside in (None, weight):
                for function in (head.linear_nll_jvp, head.linear_nll_pair):
                    yield partial(function, *operands, hidden, beside, given, tangent, *options)
        for out in {dtype, torch.float32}:
            yield partial(head.scale_cast, hidden, torch.empty(()), out)
            yield partial(head.scale_cast, hidden, vector, out)


CASES: list[Case] = [case for cases in (head_cases,) for case in cases()]
