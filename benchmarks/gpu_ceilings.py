"""What the device can do at best: copying, and one large matrix product."""

import functools

import torch

from benchmarks.measure import Bench, Figure, timed_figure

COPY_BYTES = 4 << 30
SQUARE = 8192


def run(bench: Bench) -> None:
    """Fills ``bench.ceilings``: GB/s of a copy (read and written), TFLOP/s of bf16 products."""
    size = 1 << 16 if bench.dry else COPY_BYTES
    source = torch.zeros(size // 4, device=bench.device)
    out = torch.empty_like(source)
    copy = f"copy of {size / 2**30:.0f} GiB"
    times = bench.time({copy: functools.partial(out.copy_, source)}, copy)
    figures = [timed_figure(Figure("ceilings", "float32", copy), times.get(copy))]
    if times:
        bench.ceilings["copy, GB/s"] = 2 * size / times[copy].median / 1e6
    del source, out

    # The square, and the products of the head: logits, gradients of hidden and of weight.
    n, h, v = (32, 16, 64) if bench.dry else (4096, 4096, 128256)
    side = 64 if bench.dry else SQUARE
    rates = []
    for rows, depth, columns in ((side, side, side), (n, h, v), (n, v, h), (v, n, h)):
        a = torch.randn(rows, depth, device=bench.device).to(torch.bfloat16)
        b = torch.randn(columns, depth, device=bench.device).to(torch.bfloat16)
        product = a.new_empty(rows, columns)
        name = f"{rows} x {depth} x {columns}"
        calls = {name: functools.partial(torch.mm, a, b.T, out=product)}
        times = bench.time(calls, name)
        figure = timed_figure(Figure("ceilings", "bf16 GEMM", name), times.get(name))
        if times:
            rates.append(2 * rows * depth * columns / times[name].median / 1e9)
            figure.note = f"{rates[-1]:.0f} TFLOP/s"
        figures.append(figure)
    if rates:
        bench.ceilings["bf16 GEMM, TFLOP/s"] = max(rates)
        figures[0].note = f"{bench.ceilings['copy, GB/s']:.0f} GB/s read and written"
    bench.add(figures)
