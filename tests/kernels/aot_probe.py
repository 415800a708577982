"""Two small kernels on which the tests of benchmarks/aot.py try the harness itself."""

import triton
import triton.language as tl


@triton.jit
def scale(p_x, p_out, factor, n, BLOCK: tl.constexpr):
    """out = factor * x, one block a program."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(p_out + o, tl.load(p_x + o, o < n) * factor, o < n)


@triton.jit
def product(p_a, p_b, p_out, K, BLOCK: tl.constexpr):
    """out = a @ b for one BLOCK x BLOCK tile, float32 sums."""
    o = tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, BLOCK), tl.float32)
    for k in range(0, K, BLOCK):
        a = tl.load(p_a + o[:, None] * K + k + o[None, :])
        b = tl.load(p_b + (k + o[:, None]) * BLOCK + o[None, :])
        acc = tl.dot(a, b, acc)
    tl.store(p_out + o[:, None] * BLOCK + o[None, :], acc)
