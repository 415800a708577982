"""The calls whose launches benchmarks/aot.py compiles: one function for each operator's file.

Tensors are small and empty: nothing is computed. Sizes are multiples of 16, as those of models are.
A case is a function without arguments that calls the library's raw Triton functions; there is one
for each dtype and each combination of flags that changes a kernel.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from vcore_kernels.triton import attention_jvp, common, gibbs, head, head_norms, perturb, tuning

Case = Callable[[], object]


def head_cases() -> Iterator[Case]:
    """Every operator on the head, with bias and soft cap, which takes the most registers.

    Without them only on sm90; in float16, which has the settings of
    bf16, only what makes gradients, where it is scaled; with rows that a copy engine does not serve
    (H = 516) where the tables use one, and there also an odd vocabulary.
    """
    yield from _head_cases(torch.bfloat16, 512, rich=True)
    yield from _head_cases(torch.float32, 512, rich=True)
    for case in _head_cases(torch.float16, 512, rich=True, tangents=False):
        yield partial(_where, lambda: common.recorded_architecture != "sm89", case)
    for case in _head_cases(torch.bfloat16, 512, rich=False):
        yield partial(_where, lambda: common.recorded_architecture == "sm90", case)
    for case in _head_cases(torch.bfloat16, 516, rich=True):
        yield partial(_where, _tables_use_copies, case)
    for case in (*_gradient_cases(256, 512, 515), *_gradient_cases(128, 64, 515)):
        yield partial(_where, _tables_use_copies, case)


def _tables_use_copies() -> bool:
    return tuning.LOGITS[common.recorded_architecture, "half", "one"].tma


def _where(condition: Callable[[], bool], case: Case) -> None:
    if condition():
        case()


def _head_cases(dtype: torch.dtype, h: int, rich: bool, tangents: bool = True) -> Iterator[Case]:
    yield from _head_cases_of(256, dtype, h, rich, tangents)
    if rich and h % 8 == 0:  # few tiles: the vocabulary is split between programs
        yield from _head_cases_of(128, dtype, 64, rich, False)
        if dtype == torch.bfloat16:
            yield from _gradient_cases(256, h, 512)


def _head_cases_of(
    n: int, dtype: torch.dtype, h: int, rich: bool, tangents: bool
) -> Iterator[Case]:
    v = 512
    hidden, weight, bias = (torch.empty(size, dtype=dtype) for size in ((n, h), (v, h), (v,)))
    vector, lse = torch.empty(n), torch.empty(2, n)
    operands = hidden, weight, torch.zeros(n, dtype=torch.int64)
    given, second_bias = (bias, torch.empty(v)) if rich else (None, None)
    options = 30.0 if rich else 0.0, 1.0, -100
    for keep in (False, True):
        yield partial(head.linear_nll_forward, *operands, given, *options, keep)
    for needs in ((True, False, False), (True, True, rich)):
        late = vector, *operands, given, vector, lse, *options, *needs
        known = *operands, vector, given, *options, *needs
        yield partial(_in_two_chunks, head.linear_nll_backward, *late)
        yield partial(_in_two_chunks, head.weighted_linear_nll_forward, *known)
    for beside in (None, weight) if tangents else ():
        for function in (head.linear_nll_jvp, head.linear_nll_pair):
            yield partial(function, *operands, hidden, beside, given, second_bias, *options)
    if rich:
        for out in (dtype, torch.float32):
            yield partial(head.scale_cast, hidden, torch.empty(()), out)
            yield partial(head.scale_cast, hidden, vector, out)


def _gradient_cases(n: int, h: int, v: int) -> Iterator[Case]:
    """A trained head, in two chunks and in one, whose d_weight needs no accumulator."""
    hidden, weight = (
        torch.empty(n, h, dtype=torch.bfloat16),
        torch.empty(v, h, dtype=torch.bfloat16),
    )
    operands = hidden, weight, torch.zeros(n, dtype=torch.int64), torch.empty(n), None
    for how in (_in_two_chunks, _directly):
        yield partial(
            how, head.weighted_linear_nll_forward, *operands, 0.0, 1.0, -100, True, True, False
        )


def _directly(function: Callable, *args: object) -> None:
    before = head.writes_weight_gradient_directly
    head.writes_weight_gradient_directly = lambda *_: True
    try:
        function(*args)
    finally:
        head.writes_weight_gradient_directly = before


def _in_two_chunks(function: Callable, *args: object) -> None:
    """The first chunk writes d_weight, the second adds to it."""
    weight = args[1] if function is head.weighted_linear_nll_forward else args[2]
    assert isinstance(weight, Tensor)
    before = tuning.WORKSPACE
    tuning.WORKSPACE = tuning.ROW_BLOCK * weight.shape[0] * weight.element_size()
    try:
        function(*args)
    finally:
        tuning.WORKSPACE = before


def norm_cases() -> Iterator[Case]:
    """By tiles of the gradient and by pairs of tokens, in two slices of the vocabulary."""
    n, v = 256, 1024
    target, offsets = torch.zeros(n, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    for dtype, h, softcap in (
        (torch.bfloat16, 512, 30.0),
        (torch.bfloat16, 516, 30.0),
        (torch.float16, 512, 0.0),
        (torch.float32, 512, 30.0),
    ):
        tensors = torch.empty(n, h, dtype=dtype), torch.empty(v, h, dtype=dtype), target
        bias = torch.empty(v, dtype=dtype) if softcap else None
        for length in (0, n // 2):
            yield partial(_in_two_slices, *tensors, bias, offsets, length, softcap, 1.0, -100)


def _in_two_slices(hidden: Tensor, *args: object) -> None:
    """The first slice writes the grams, the second adds to them."""
    before = tuning.WORKSPACE
    tuning.WORKSPACE = 256 * 512 * hidden.element_size()
    try:
        head_norms.linear_nll_grad_norms(hidden, *args)
    finally:
        tuning.WORKSPACE = before


def perturb_cases() -> Iterator[Case]:
    half, single, double = torch.bfloat16, torch.float32, torch.float64
    for dtype, g_dtype, seed, swap in (
        (half, single, None, False),
        (half, single, 1 << 40, False),
        (half, half, None, True),
        (torch.float16, torch.float16, 1 << 40, True),
        (single, single, None, False),
        (single, single, 1 << 40, False),
        (double, double, None, False),
    ):
        params, direction = [torch.empty(1 << 16, dtype=d) for d in (dtype, g_dtype)]
        saved = direction if swap else torch.empty(params.nbytes, dtype=torch.uint8)
        counts = torch.empty(1, 3, dtype=torch.int64)
        yield partial(perturb.perturb_, [params], [direction], [saved], 0.1, seed, counts)


def gibbs_cases() -> Iterator[Case]:
    """Every rule and dtype, with and without a mask."""
    size = 256
    mask, offsets = torch.empty(size, dtype=torch.bool), torch.empty(17, dtype=torch.int64)
    for dtype in (torch.float32, torch.float64):
        utility = torch.empty(size, dtype=dtype)
        for given in (None, mask):
            for rule in ("tau", "trajectory", "batch"):
                yield partial(gibbs.gibbs_variance, utility, given, offsets, 0.1, rule, 1e-6)


def attention_cases() -> Iterator[Case]:
    """Attention with a tangent at every width of the table, under every mask, which takes the most
    registers; in bf16 also causal alone and packed. float16 has the settings of bf16.
    """
    length, key_mask = 256, torch.empty(2, 256, dtype=torch.bool)
    offsets, function = torch.zeros(3, dtype=torch.int32), attention_jvp.attention_jvp
    for dtype, widths in ((torch.bfloat16, (64, 128, 256)), (torch.float32, (64, 128))):
        for width in widths:
            q, k = (torch.empty(2, heads, length, width, dtype=dtype) for heads in (4, 2))
            every, scale = (q, k, k, q, k, k), width**-0.5
            yield partial(function, *every, key_mask, None, True, scale, 50.0, 128)
            if dtype == torch.bfloat16:
                yield partial(function, *every, None, None, True, scale, 0.0, 0)
                packed = (x[:1] for x in every)
                yield partial(function, *packed, None, offsets, True, scale, 0.0, 0)


CASES: list[Case] = [
    case
    for cases in (head_cases, norm_cases, gibbs_cases, perturb_cases, attention_cases)
    for case in cases()
]
