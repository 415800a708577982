"""In-place perturbation beside `torch._foreach_add_` and the copies that it replaces.

    python -m pytest benchmarks/bench_perturb.py -q     (--benchmark-json=FILE keeps the figures)

Every subject runs once in each round, in turn, so that a busy machine slows all of them alike;
times are medians over the rounds. GB/s counts what each one must move, once: add reads theta and g
and writes theta (3 x the parameters); a perturbation writes the old values too (4 x), a restore
reads and writes (2 x), clone + add + copy back is 2 + 3 + 2 = 7 x. "ratio" is the bandwidth over
that of `_foreach_add_` in the same round, by the clock on the wall and by processor time: with
OMP_NUM_THREADS=1 the latter is what to read where other programs compete for the cores.
"""

import statistics
import time

import pytest
import torch

from vcore_kernels import free_backup_buffers, perturb_, restore_

PARAMETERS = 50_000_000
ROUNDS = 11
EPSILON = 1e-2


def tensors(dtype: torch.dtype, layout: str) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """One tensor of 50M entries, or 400 of 1 to 250,000 as in a model."""
    sizes = [PARAMETERS] if layout == "one" else [n * 625 + 1 for n in range(400)]
    generator = torch.Generator().manual_seed(0)
    block = torch.randn(1 << 20, generator=generator).to(dtype)

    def make() -> list[torch.Tensor]:
        return [block.repeat(-(-size // block.numel()))[:size].clone() for size in sizes]

    return make(), make()


class Subjects:
    """What is timed, all on the same tensors."""

    def __init__(self, params: list[torch.Tensor], direction: list[torch.Tensor]):
        self.params, self.direction = params, direction
        self.perturbation = None

    def clone_add_copy(self):
        backup = [p.clone() for p in self.params]
        torch._foreach_add_(self.params, self.direction, alpha=-EPSILON)
        torch._foreach_copy_(self.params, backup)

    def foreach_add(self):
        torch._foreach_add_(self.params, self.direction, alpha=-EPSILON)

    def perturb(self, **options):
        self.perturbation = perturb_(self.params, self.direction, EPSILON, **options)

    def restore(self):
        restore_(self.perturbation)


def check(params: list[torch.Tensor], direction: list[torch.Tensor]) -> None:
    """The gate: moved as PyTorch moves it, restored bit for bit, in both modes."""
    before = [p.clone() for p in params]
    for consume in (False, True):
        g = [d.clone() for d in direction] if consume else direction
        perturbation = perturb_(params, g, EPSILON, consume_direction=consume)
        for p, b, d in zip(params, before, direction, strict=True):
            acc = torch.promote_types(p.dtype, torch.float32)
            assert torch.equal(p, (b.to(acc) - d.to(acc) * EPSILON).to(p.dtype))
        restore_(perturbation)
        assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))


# Bytes moved, in units of the bytes of the parameters.
UNITS = {
    "clone + add + copy back": 7,
    "_foreach_add_": 3,
    "perturb_": 4,
    "restore_": 2,
    "perturb_ (consume)": 4,
    "restore_ (consume)": 2,
    "perturb_ (stochastic)": 4,
}


def one_round(
    subjects: Subjects, pristine: list[torch.Tensor], stochastic: bool
) -> dict[str, tuple[float, float]]:
    times = {}

    def timed(name, call, *args, **options):
        start = time.perf_counter(), time.process_time()
        call(*args, **options)
        times[name] = time.perf_counter() - start[0], time.process_time() - start[1]

    timed("clone + add + copy back", subjects.clone_add_copy)
    timed("_foreach_add_", subjects.foreach_add)
    timed("perturb_", subjects.perturb)
    timed("restore_", subjects.restore)
    timed("perturb_ (consume)", subjects.perturb, consume_direction=True)
    timed("restore_ (consume)", subjects.restore)
    torch._foreach_copy_(subjects.direction, pristine)
    if stochastic:
        timed("perturb_ (stochastic)", subjects.perturb, rounding="stochastic")
        subjects.restore()
    return times


@pytest.mark.parametrize("layout", ["one", "many"])
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str
)
def test_perturb(benchmark, dtype, layout, capsys):
    params, direction = tensors(dtype, layout)
    check(params, direction)
    subjects, pristine = Subjects(params, direction), [d.clone() for d in direction]
    one_round(subjects, pristine, dtype != torch.float64)  # warm-up
    rounds: list[dict[str, tuple[float, float]]] = []
    benchmark.pedantic(
        lambda: rounds.append(one_round(subjects, pristine, dtype != torch.float64)),
        rounds=ROUNDS,
        iterations=1,
    )
    size = sum(p.nbytes for p in params) / 1e9
    lines = [
        f"{dtype}, {layout} ({len(params)} tensors, {size:.2f} GB), {torch.get_num_threads()} "
        "threads"
    ]
    for name in rounds[0]:
        units = UNITS[name] / UNITS["_foreach_add_"]
        wall, processor = (
            sorted(units * r["_foreach_add_"][clock] / r[name][clock] for r in rounds)
            for clock in (0, 1)
        )
        seconds = statistics.median(r[name][0] for r in rounds)
        row = {
            "ms": seconds * 1e3,
            "GB/s": UNITS[name] * size / seconds,
            "ratio": statistics.median(wall),
            "ratio, quartiles": (wall[len(wall) // 4], wall[3 * len(wall) // 4]),
            "ratio, processor time": statistics.median(processor),
        }
        benchmark.extra_info[name] = row
        lines.append(
            f"  {name:24s} {row['ms']:8.2f} ms {row['GB/s']:7.1f} GB/s   ratio {row['ratio']:.2f} "
            f"({wall[len(wall) // 4]:.2f} to {wall[3 * len(wall) // 4]:.2f}), processor time "
            f"{row['ratio, processor time']:.2f}"
        )
    with capsys.disabled():
        print("\n" + "\n".join(lines))
    free_backup_buffers()
