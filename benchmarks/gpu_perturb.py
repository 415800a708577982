"""In-place perturbation on a GPU, beside ``torch._foreach_add_`` and the copies it replaces."""

import torch

from benchmarks.measure import Bench, Figure, timed_figure
from vcore_kernels import free_backup_buffers, perturb_, restore_

UNIT = "_foreach_add_"
EPSILON = 1e-2
# Bytes that each one must move, in units of the bytes of the parameters.
TRAFFIC = {
    UNIT: 3,
    "clone + add + copy back": 7,
    "perturb_ and restore_": 6,
    "perturb_ and restore_, consume": 6,
    "perturb_ and restore_, stochastic": 6,
}


def run(bench: Bench) -> None:
    sizes = [7, 100] if bench.dry else [n * 5000 + 1 for n in range(400)]  # 400M, as in a model
    for dtype in (torch.bfloat16, torch.float32):
        generator = torch.Generator(bench.device).manual_seed(0)

        def normal(size, dtype=dtype, generator=generator):
            values = torch.randn(size, generator=generator, device=bench.device)
            return values.to(dtype)

        params, direction = [normal(size) for size in sizes], [normal(size) for size in sizes]
        run_tensors(bench, f"{len(sizes)} tensors, {dtype}", params, direction)
        free_backup_buffers()


def run_tensors(bench, title, params, direction) -> None:
    backend = "triton" if bench.dry else "auto"

    def there_and_back(**options):
        restore_(perturb_(params, direction, EPSILON, backend=backend, **options))

    def clone_add_copy():
        backup = [p.clone() for p in params]
        torch._foreach_add_(params, direction, alpha=-EPSILON)
        torch._foreach_copy_(params, backup)

    scratch = [p.clone() for p in params]
    calls = {
        UNIT: lambda: torch._foreach_add_(scratch, direction, alpha=-EPSILON),
        "clone + add + copy back": clone_add_copy,
        "perturb_ and restore_": there_and_back,
        "perturb_ and restore_, consume": lambda: there_and_back(consume_direction=True),
        "perturb_ and restore_, stochastic": lambda: there_and_back(rounding="stochastic"),
    }
    pristine = [p.clone() for p in params], [d.clone() for d in direction]
    figures = {}
    for name, call in calls.items():
        figures[name] = Figure("perturb", title, name, UNIT, ceiling="copy")
        if name.startswith("perturb_"):
            figures[name].gate = _gate(bench, title, name, params, direction, pristine, call)
            figures[name].extra_bytes = bench.peak_extra(call)
            torch._foreach_copy_(direction, pristine[1])
    # A consumed direction comes back rounded once; let it not drift over the rounds.
    calls["direction back"] = lambda: torch._foreach_copy_(direction, pristine[1])
    times = bench.time(calls, UNIT)
    size = sum(p.nbytes for p in params)
    for name, figure in figures.items():
        timed_figure(figure, times.get(name))
        if figure.ms:
            rate = TRAFFIC[name] * size / figure.ms / 1e6
            figure.percent_of_ceiling = 100 * rate / bench.ceilings["copy, GB/s"]
            figure.note = f"{rate:.0f} GB/s"
    bench.add(figures.values())


def _gate(bench, title, name, params, direction, pristine, call) -> str:
    """Moved as PyTorch moves it (to one rounding where it is random), and back bit for bit."""
    options: dict = {"backend": "triton" if bench.dry else "auto"}
    if "consume" in name:
        options["consume_direction"] = True
    if "stochastic" in name:
        options["rounding"] = "stochastic"
    moved = perturb_(params, direction, EPSILON, **options)
    wrong = 0
    for p, before, g in zip(params, *pristine, strict=True):
        expected = before.float() - g.float() * EPSILON
        if "stochastic" in name:
            near = (p.float() - expected).abs() <= torch.finfo(p.dtype).eps * expected.abs() * 2
        else:
            near = p == expected.to(p.dtype)
        wrong += int((~near).sum())
    restore_(moved)
    torch._foreach_copy_(direction, pristine[1])
    back = all(torch.equal(p, before) for p, before in zip(params, pristine[0], strict=True))
    if wrong or not back:
        text = f"FAILED: {wrong} entries wrong, {'' if back else 'not '}restored"
        bench.failures.append(f"perturb, {title}, {name}: {text}")
        return text
    return "exact, restored bit for bit"
