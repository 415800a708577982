"""Gibbs weights and variance control on a GPU, beside one copy of the utilities."""

import torch

from benchmarks.measure import Bench, Figure, timed_figure
from vcore_kernels import gibbs_weights, vcore_loss

UNIT = "copy of the utilities"
RULES = {
    "KL budget 0.1": {"kl_budget": 0.1},
    "KL budget 0.1, batch": {"kl_budget": 0.1, "kl_scope": "batch"},
    "tau": {"tau": 1.0},
}


def run(bench: Bench) -> None:
    """1,024 packed trajectories of 1 to 16,384 tokens, a trainer's micro-batch of 32 x 3,000, and
    the copy that both are compared with; through CUDA graphs, so that launching does not count, and
    as called.
    """
    layouts = {
        "1024 packed segments of up to 16384": (1024, 16384),
        "32 packed segments of up to 4096": (32, 4096),
    }
    if bench.dry:
        layouts = {"5 packed segments of up to 40": (5, 40)}
    for title, (segments, longest) in layouts.items():
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, longest + 1, (segments,), generator=generator)
        lengths[0] = longest
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        cu_seqlens = offsets.to(torch.int32).to(bench.device)
        utility = torch.randn(int(offsets[-1]), generator=generator).to(bench.device)
        nll = utility.abs()
        run_layout(bench, f"{title} ({len(utility)} tokens)", utility, nll, cu_seqlens)


def run_layout(bench, title, utility, nll, cu_seqlens) -> None:
    out = torch.empty_like(utility)
    figures, calls = {}, {UNIT: lambda: out.copy_(utility)}
    for rule, options in RULES.items():
        shared = {"cu_seqlens": cu_seqlens, **options}

        def weights(shared=shared, backend="triton"):
            return gibbs_weights(utility, backend=backend, **shared)

        def loss(shared=shared, backend="triton"):
            return vcore_loss(nll, utility, backend=backend, **shared)

        for name, call in ((f"gibbs_weights, {rule}", weights), (f"vcore_loss, {rule}", loss)):
            figure = Figure("gibbs", title, name, UNIT, ceiling="copy")
            figures[name] = figure
            bench.poison(8 * utility.nbytes)
            got, expected = call(), call(backend="reference")
            errors = {
                field: _difference(getattr(got, field), getattr(expected, field))
                for field in got._fields
                if torch.is_tensor(getattr(got, field)) and getattr(got, field).is_floating_point()
            }
            figure.gate = ", ".join(f"{field} {error:.1e}" for field, error in errors.items())
            if not all(error <= 1e-4 for error in errors.values()):
                figure.gate = f"FAILED: {figure.gate}"
                bench.failures.append(f"gibbs, {title}, {name}: {figure.gate}")
                continue
            figure.extra_bytes = bench.peak_extra(call)
            calls[name] = call
    eager = "gibbs_weights, KL budget 0.1, eager PyTorch"
    calls[eager] = lambda: gibbs_weights(
        utility, cu_seqlens=cu_seqlens, kl_budget=0.1, backend="reference"
    )
    figures[eager] = Figure("gibbs", title, eager, UNIT)

    as_called = bench.time(calls, UNIT)
    ours = {}
    for name, call in calls.items():
        if name != eager:
            try:
                ours[name] = bench.graphed(call)
            except RuntimeError as error:
                bench.failures.append(f"gibbs, {title}, {name}: no CUDA graph: {error}")
    graphed = {} if bench.dry else bench.time(ours, UNIT)
    for name, figure in figures.items():
        times = graphed.get(name) or as_called.get(name)
        timed_figure(figure, times)
        if times and name in as_called:
            figure.note = f"as called {as_called[name].median:.3f} ms"
            # read the utilities, write q and weights
            gigabytes = 3 * utility.nbytes / times.median / 1e6
            figure.percent_of_ceiling = 100 * gigabytes / bench.ceilings["copy, GB/s"]
    unit = Figure("gibbs", title, UNIT, UNIT)
    bench.add([timed_figure(unit, graphed.get(UNIT)), *figures.values()])


def _difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference in units of the expected's largest entry; NaN stays NaN."""
    scale = expected.double().abs().max().clamp(min=1e-30)
    return ((got.double() - expected.double()).abs().max() / scale).item()
