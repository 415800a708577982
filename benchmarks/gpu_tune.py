"""Other settings of the head's products: compiled in several processes, then timed in turn.

Each table of vcore_kernels/triton/tuning.py is swept alone, the others as they are, by the time of
one operator that spends most of its time in it. What spills, or does not fit into shared memory, is
not timed. The printed winners can be put into the table as they stand.
"""

import itertools
import multiprocessing
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from benchmarks.gpu_head import DRY_SHAPES, SHAPES, Inputs, our_subjects
from benchmarks.measure import Bench
from vcore_kernels.backends.triton import INTERPRETED
from vcore_kernels.triton import common, tuning
from vcore_kernels.triton.tuning import Tiles

if TYPE_CHECKING:
    from benchmarks.gpu_report import Report


@dataclass(frozen=True)
class Sweep:
    """A line of a table, and the (operator, task) of gpu_head.our_subjects that shows it."""

    table: str
    key: tuple  # behind the architecture
    subject: str
    task: str
    products: int = 1  # accumulators held at once


SWEEPS = (
    Sweep("LOGITS", ("half", "one"), "vcore: nll alone", "no gradient"),
    Sweep("HIDDEN_GRADIENT", ("half",), "vcore: known weights", "frozen"),
    Sweep("WEIGHT_GRADIENT", ("half",), "vcore: known weights", "trained"),
    Sweep("LOGITS", ("half", "jvp"), "vcore: jvp", "tangent, frozen", 2),
    Sweep("LOGITS", ("half", "jvp+weight"), "vcore: jvp", "tangent, trained", 2),
)


def candidates(sweep: Sweep, current: Tiles) -> list[Tiles]:
    """Alternatives near ``current`` first: those with the fewest fields changed."""
    if INTERPRETED:
        return [replace(current, depth=current.depth // 2)]
    found = []
    for rows, columns, depth, warps, stages, parts, programs in itertools.product(
        (64, 128), (64, 128, 256), (32, 64, 128), (4, 8), (2, 3, 4, 5), (1, 2, 4), (1, 2)
    ):
        sums = rows * columns * sweep.products // (32 * warps)  # registers a thread for the sums
        slices = (rows + columns) * depth * 2 * sweep.products * stages  # bytes of shared memory
        if not 32 <= sums <= 128 or not 48 << 10 <= slices * programs <= 227 << 10:
            continue
        found.append(
            replace(
                current,
                rows=rows,
                columns=columns,
                depth=depth,
                warps=warps,
                stages=stages,
                parts=parts,
                programs=programs,
            )
        )
    random.Random(0).shuffle(found)
    return sorted((tiles for tiles in found if tiles != current), key=lambda t: changes(t, current))


def changes(tiles: Tiles, current: Tiles) -> int:
    return sum(a != b for a, b in zip(vars(tiles).values(), vars(current).values(), strict=True))


@contextmanager
def settings(sweep: Sweep, architecture: str, tiles: Tiles) -> Iterator[None]:
    table, key = getattr(tuning, sweep.table), (architecture, *sweep.key)
    before = table[key]
    table[key] = tiles
    try:
        yield
    finally:
        table[key] = before


def _compile(task: tuple[Sweep, str, Tiles]) -> tuple[Sweep, Tiles, str]:
    """Runs in a worker without a GPU: what is wrong with the settings, or nothing. The compiled
    kernels stay in Triton's cache, where the timing finds them.
    """
    from triton.compiler import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from benchmarks import aot

    sweep, architecture, tiles = task
    target = aot.TARGETS[architecture]
    inputs = Inputs(replace(DRY_SHAPES[0], n=256, h=64, v=512), torch.device("cpu"))
    faults = []
    with settings(sweep, architecture, tiles):
        common.recorded, common.recorded_architecture = [], architecture
        try:
            record(sweep, inputs)
            launches = common.recorded
        finally:
            common.recorded = None
        for launch in launches:
            try:
                row = aot.compile_source(aot.source_of(launch, target), target)
            except (CompilationError, OutOfResources, PTXASError, RuntimeError) as error:
                return sweep, tiles, f"{type(error).__name__}"
            faults += row.faults()
    return sweep, tiles, "; ".join(faults)


def record(sweep: Sweep, inputs: Inputs) -> None:
    """The launches of the sweep's operator on small CPU tensors, by its raw Triton function."""
    from vcore_kernels.triton import head

    hidden, weight = inputs.hidden.detach(), inputs.frozen
    shared, options = (hidden, weight, inputs.target), (0.0, 1.0, -100)
    if sweep.task == "no gradient":
        head.linear_nll_forward(*shared, None, *options, False)
    elif sweep.task.startswith("tangent"):
        beside = inputs.weight_tangent if "trained" in sweep.task else None
        head.linear_nll_jvp(*shared, inputs.hidden_tangent, beside, None, None, *options)
    else:
        needs = (True, sweep.task == "trained", False)
        head.weighted_linear_nll_forward(*shared, inputs.token_weight, None, *options, *needs)


def run(bench: Bench, report: "Report", seconds: float) -> None:
    """Half of the time for compiling, half for timing; writes and prints what was found."""
    begin = time.monotonic()
    architecture = common.architecture(bench.device)
    tables = {sweep: getattr(tuning, sweep.table)[(architecture, *sweep.key)] for sweep in SWEEPS}
    queues = {sweep: candidates(sweep, current) for sweep, current in tables.items()}
    if bench.dry:
        sound = {sweep: queue[:1] for sweep, queue in queues.items()}
    else:
        sound = compile_queues(queues, architecture, begin + seconds / 2, report)

    inputs = Inputs(DRY_SHAPES[0] if bench.dry else SHAPES[0], bench.device)
    calls = {(s.name, s.task): s.call for s in our_subjects(inputs, "triton", memory_only=False)}
    for number, (sweep, current) in enumerate(tables.items()):
        call = calls[sweep.subject, sweep.task]
        expected = call()["nll"].clone()
        kernel = f"{sweep.table} {sweep.key}"
        left = begin + seconds - time.monotonic()
        until = time.monotonic() + left / (len(tables) - number)
        rows = []
        for tiles in [current, *sound[sweep]]:
            if not bench.dry and time.monotonic() > until:
                break
            with settings(sweep, architecture, tiles):
                ms, right = time_once(bench, call, expected)
            note = ("in the table" if tiles is current else "") if right else "WRONG"
            rows.append({"kernel": kernel, "settings": show(tiles), "ms": ms, "note": note})
        rows.sort(key=lambda row: (row["note"] == "WRONG", row["ms"] or 0))
        report.tuning += rows
        report.write(bench)
        print(
            f"{kernel}, by {sweep.subject} ({sweep.task}), {len(rows)} settings timed", flush=True
        )
        for row in rows[:3] + [row for row in rows[3:] if row["note"]]:
            ms = "" if row["ms"] is None else f"{row['ms']:9.3f} ms  "
            print(f"  {ms}{row['settings']}  {row['note']}", flush=True)


def compile_queues(
    queues: dict[Sweep, list[Tiles]], architecture: str, until: float, report: "Report"
) -> dict[Sweep, list[Tiles]]:
    """Those of each queue that compile without a fault, as far as the time goes."""
    in_turn = [
        (sweep, architecture, tiles)
        for group in itertools.zip_longest(*queues.values())
        for sweep, tiles in zip(queues, group, strict=True)
        if tiles is not None
    ]
    sound: dict[Sweep, list[Tiles]] = {sweep: [] for sweep in queues}
    tried = 0
    processes = max(1, (os.cpu_count() or 2) - 1)
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for sweep, tiles, fault in pool.imap_unordered(_compile, in_turn):
            tried += 1
            if not fault:
                sound[sweep].append(tiles)
            if time.monotonic() > until:
                pool.terminate()
                break
    print(f"{tried} settings compiled, {sum(map(len, sound.values()))} without a fault", flush=True)
    report.checks["settings compiled for tuning"] = tried
    return sound


def time_once(
    bench: Bench, call: Callable[[], dict], expected: torch.Tensor
) -> tuple[float | None, bool]:
    """Median of seven calls, and whether the losses are what they were."""
    nll = call()["nll"]
    right = bool(torch.allclose(nll, expected, rtol=1e-4, atol=1e-4))
    if bench.dry:
        return None, right
    times = []
    for _ in range(7):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end))
    return sorted(times)[3], right


def show(tiles: Tiles) -> str:
    return f"Tiles({', '.join(f'{name}={value}' for name, value in vars(tiles).items())})"
