"""Compiles every Triton kernel ahead of time, in every configuration of the tuning table, for GPUs
that need not be here, and reports what the compilers made of it.

    python benchmarks/aot.py            # prints the table
    python benchmarks/aot.py --write    # and writes benchmarks/results/aot.json and aot.md
    python benchmarks/aot.py --check    # fails where a kernel breaks a rule or the report is stale
    --kernel NAME  --target sm90        # one kernel, one target (neither written nor compared)

The library's own host code chooses the kernels and their settings: it runs on small CPU tensors
with ``common.recorded`` set, so that launches are recorded and not run (benchmarks/aot_cases.py).
Each distinct one is compiled as a launch on that GPU would compile it. The rules: no spilled
register, no scratch memory, shared memory within the device's, products of 16-bit operands on the
best matrix instruction that the target has. Nothing here depends on the clock or the machine: the
same versions of triton give the same report.
"""

import argparse
import json
import multiprocessing
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from benchmarks import aot_cases
from vcore_kernels.triton import common

RESULTS = Path(__file__).resolve().parent / "results"
KIB = 1024


@dataclass(frozen=True)
class Target:
    """A GPU to compile for, and what its multiprocessor holds."""

    name: str  # the key of the tuning tables
    gpu: GPUTarget
    shared_limit: int  # bytes of shared memory that one program can have
    shared_total: int  # bytes of shared memory on a multiprocessor
    warps: int  # warps (AMD: wavefronts) that a multiprocessor can hold
    matrix: str  # the best matrix instruction for 16-bit operands, a regular expression

    @property
    def nvidia(self) -> bool:
        return self.gpu.backend == "cuda"


TARGETS = {
    target.name: target
    for target in (
        Target("sm80", GPUTarget("cuda", 80, 32), 163 * KIB, 164 * KIB, 64, r"mma\.sync"),
        Target("sm89", GPUTarget("cuda", 89, 32), 99 * KIB, 100 * KIB, 48, r"mma\.sync"),
        Target("sm90", GPUTarget("cuda", 90, 32), 227 * KIB, 228 * KIB, 64, r"wgmma\.mma_async"),
        Target("sm100", GPUTarget("cuda", 100, 32), 227 * KIB, 228 * KIB, 64, r"tcgen05\.mma"),
        Target("gfx942", GPUTarget("hip", "gfx942", 64), 64 * KIB, 64 * KIB, 32, r"v_mfma"),
    )
}

# What is counted in the compiled text: PTX for NVIDIA, AMD's assembly.
INSTRUCTIONS = {
    "wgmma": r"\bwgmma\.mma_async",
    "tcgen05": r"\btcgen05\.mma",
    "mma.sync": r"(?<!w)\bmma\.sync",
    "mfma": r"\bv_s?mfma",
    "tma": r"\bcp\.(?:async|reduce)\.(?:async\.)?bulk\.tensor",
}


@dataclass(frozen=True)
class Compilation:
    """One distinct launch and what the compiler made of it. Figures are per thread or program."""

    kernel: str
    target: str
    signature: dict[str, str]  # parameter -> type; divisible by 16: marked with "/16"
    constants: dict[str, str]
    num_warps: int
    num_stages: int
    registers: int  # a thread's vector registers (AMD: with the accumulators')
    spills: int  # bytes a thread spills to memory, or keeps in local memory for other reasons
    scalar_spills: int  # AMD: scalar registers kept in vector registers
    shared: int  # bytes a program
    shared_limit: int
    resident: int  # programs that fit on a multiprocessor by registers, shared memory and warps
    instructions: dict[str, int]
    half_products: bool  # multiplies matrices of 16-bit numbers
    best_instruction: bool | None  # ... on the target's best matrix instruction
    serialised: bool  # ptxas waits after every wgmma

    def faults(self) -> list[str]:
        """The rules that this one breaks."""
        found = []
        if self.spills:
            found.append(f"{self.spills} bytes a thread spilled or in local memory")
        if self.shared > self.shared_limit:
            found.append(f"{self.shared} bytes of shared memory, {self.shared_limit} at most")
        if self.best_instruction is False:
            found.append("16-bit products without the target's matrix instruction")
        return found

    def key(self) -> tuple:
        order = list(TARGETS).index(self.target)
        return self.kernel, order, str(self.signature), str(self.constants)

    def title(self) -> str:
        return f"{self.kernel} on {self.target} ({types(self.signature)}; {settings(self)})"


def types(signature: dict[str, str]) -> str:
    """The floating-point types of the pointers and descriptors, each once."""
    found: list[str] = []
    for kind in signature.values():
        match = re.match(r"(?:\*k?|tensordesc<)((?:bf|fp)\d+)", kind)
        if match and match[1] not in found:
            found.append(match[1])
    return " ".join(found)


def settings(row: Compilation) -> str:
    """The constants, but for absent tensors only their names behind a minus."""
    absent = [name.removeprefix("p_") for name, value in row.constants.items() if value == "None"]
    given = [f"{name}={value}" for name, value in row.constants.items() if value != "None"]
    words = [*given, f"warps={row.num_warps}", f"stages={row.num_stages}"]
    return " ".join(words + [f"-{name}" for name in absent])


# ---- from a launch to what the compiler takes ----


@dataclass(frozen=True)
class Source:
    """A launch as the compiler sees it; equal ones are compiled once."""

    kernel: Any
    signature: dict[str, str]
    constants: dict[tuple, Any]
    attributes: dict[tuple, Any]
    options: dict[str, Any]

    def key(self) -> str:
        """Independent of the order of recording and of the process."""
        parts = (self.signature, self.names(), sorted(map(str, self.attributes.items())))
        return f"{self.kernel.__name__} {parts} {self.options}"

    def names(self) -> dict[str, str]:
        """Parameter -> constant as text; types and functions by name."""
        parameters = [parameter.name for parameter in self.kernel.params]

        def text(value: Any) -> str:
            value = getattr(value, "value", value)
            return str(getattr(value, "__name__", value))

        named = {}
        for path, value in self.constants.items():
            inner = "".join(f"[{index}]" for index in path[1:])
            named[parameters[path[0]] + inner] = text(value)
        return named

    def marked_signature(self) -> dict[str, str]:
        """The types of what is not constant, "/16" behind those known to be divisible by 16."""
        aligned = {path[0] for path, value in self.attributes.items() if value}
        return {
            name: kind + ("/16" if number in aligned else "")
            for number, (name, kind) in enumerate(self.signature.items())
            if kind != "constexpr"
        }


def source_of(launch: common.Launch, target: Target) -> Source:
    """What Triton's launcher would compile for these arguments, by Triton's own rules."""
    backend = make_backend(target.gpu)
    kernel = launch.kernel
    bind = create_function_from_signature(kernel.signature, kernel.params, backend)
    options: dict[str, Any] = {"num_warps": launch.num_warps, "num_stages": launch.num_stages}
    if not launch.enable_fp_fusion:
        options["enable_fp_fusion"] = False
    bound, specialization, extra = bind(*launch.args, **launch.constants, **options)
    _, signature, constants, attributes = kernel._pack_args(
        backend, {**launch.constants, **options}, bound, specialization, extra
    )
    return Source(kernel, signature, constants, attributes, options)


@lru_cache
def record(target_name: str) -> tuple[Source, ...]:
    """Every distinct launch of the library on this target."""
    target = TARGETS[target_name]
    launches = (source_of(launch, target) for launch in recorded_launches(target_name))
    sources = {source.key(): source for source in launches}
    return tuple(source for _, source in sorted(sources.items()))


def recorded_launches(architecture: str) -> Iterator[common.Launch]:
    for case in aot_cases.CASES:
        common.recorded, common.recorded_architecture = [], architecture
        try:
            case()
            launches = common.recorded
        finally:
            common.recorded = None
        yield from launches


# ---- compiling and reading the result ----


def compile_source(source: Source, target: Target) -> Compilation:
    ast = ASTSource(source.kernel, source.signature, source.constants, source.attributes)
    compiled = triton.compile(ast, target=target.gpu, options=source.options)
    text = compiled.asm["ptx" if target.nvidia else "amdgcn"]
    usage = _nvidia_usage(compiled) if target.nvidia else _amd_usage(text)
    half = bool(re.search(r"tt\.dot\w* .*tensor<[0-9x]*x(?:bf16|f16)", compiled.asm["ttir"]))
    shared = compiled.metadata.shared
    count_of = {
        name: len(re.findall(pattern, text, re.MULTILINE)) for name, pattern in INSTRUCTIONS.items()
    }
    warps = compiled.metadata.num_warps
    return Compilation(
        kernel=source.kernel.__name__,
        target=target.name,
        signature=source.marked_signature(),
        constants=source.names(),
        num_warps=source.options["num_warps"],
        num_stages=source.options["num_stages"],
        shared=shared,
        shared_limit=target.shared_limit,
        resident=_resident(target, usage["registers"], warps, shared),
        instructions={name: number for name, number in count_of.items() if number},
        half_products=half,
        best_instruction=bool(re.search(target.matrix, text)) if half else None,
        serialised=bool(count_of["wgmma"]) and _serialised(text, target),
        **usage,
    )


def _nvidia_usage(compiled: Any) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        report = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name],
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    used = dict(re.findall(r"(\w+):(\d+)", report))
    spills = int(used["STACK"]) + int(used["LOCAL"])
    return {"registers": int(used["REG"]), "spills": spills, "scalar_spills": 0}


def _amd_usage(assembly: str) -> dict[str, int]:
    def metadata(name: str) -> int:
        match = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if match is None:
            raise ValueError(f"AMD's assembly has no .{name}")
        return int(match[1])

    return {
        "registers": metadata("vgpr_count"),
        "spills": max(metadata("private_segment_fixed_size"), 4 * metadata("vgpr_spill_count")),
        "scalar_spills": metadata("sgpr_spill_count"),
    }


def _serialised(ptx: str, target: Target) -> bool:
    """Whether ptxas could not keep several wgmma in flight, which it only says in its log."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        log = subprocess.run(
            [
                knobs.nvidia.ptxas.path,
                "-v",
                "--regAllocOptLevel=2",
                f"--gpu-name=sm_{target.gpu.arch}a",
                file.name,
                "-o",
                "/dev/null",
            ],
            check=True,
            capture_output=True,
            text=True,
        ).stderr
    return "wgmma.mma_async instructions are serialized" in log


def _resident(target: Target, registers: int, warps: int, shared: int) -> int:
    """How many programs a multiprocessor can hold at a time."""
    by_warps = target.warps // warps
    if target.nvidia:
        a_warp = -(-registers * 32 // 256) * 256  # registers go to warps in units of 256
        by_registers = 65536 // a_warp // warps
        shared += KIB  # what the system keeps of it for each program
    else:
        a_wave = -(-max(registers, 1) // 8) * 8
        by_registers = 4 * min(8, 512 // a_wave) // warps  # four SIMDs of 512 registers a lane
    by_shared = target.shared_total // shared if shared else by_warps
    return min(by_warps, by_registers, by_shared)


# ---- all of them, in several processes ----


def _compile_one(task: tuple[str, int]) -> Compilation:
    """Runs in a worker, which records for itself: launches hold tensors and do not travel."""
    target, number = task
    return compile_source(record(target)[number], TARGETS[target])


def _quiet_worker() -> None:
    torch.set_num_threads(1)


def compile_all(
    targets: Sequence[str], kernel: str | None = None, processes: int = 2, progress: bool = True
) -> list[Compilation]:
    """Every distinct launch on each target, sorted."""
    tasks = [
        (target, number)
        for target in targets
        for number, source in enumerate(record(target))
        if kernel is None or kernel in source.kernel.__name__
    ]
    rows = []
    with multiprocessing.get_context("spawn").Pool(processes, _quiet_worker) as pool:
        for row in pool.imap_unordered(_compile_one, tasks):
            rows.append(row)
            if progress:
                wrong = "; ".join([*row.faults(), *(["(serialised)"] if row.serialised else [])])
                print(f"[{len(rows)}/{len(tasks)}] {row.title()} {wrong}", file=sys.stderr)
    return sorted(rows, key=Compilation.key)


# ---- the report ----


def versions() -> dict[str, str]:
    """Of everything that the figures depend on."""
    return {
        "triton": triton.__version__,
        "ptxas": knobs.nvidia.ptxas.version,
        "ptxas for sm100": knobs.nvidia.ptxas_blackwell.version,
    }


def to_json(rows: Sequence[Compilation]) -> str:
    """One line a row, so that a change of the report reads well."""
    lines = ",\n".join("  " + json.dumps(asdict(row)) for row in rows)
    return f'{{"versions": {json.dumps(versions())}, "kernels": [\n{lines}\n]}}\n'


COLUMNS = "| {} | types | configuration | registers | spills | shared KiB | matrix and TMA | fit |"


def to_markdown(rows: Sequence[Compilation]) -> str:
    header = ", ".join(f"{name} {version}" for name, version in versions().items())
    names = sorted({row.kernel for row in rows})
    counts = ", ".join(
        f"{name} {sum(row.target == name for row in rows)}"
        for name in TARGETS
        if any(row.target == name for row in rows)
    )
    faults = [f"{row.title()}: {fault}" for row in rows for fault in row.faults()]
    lines = [
        "# Triton kernels, compiled ahead of time",
        "",
        "Made by `python benchmarks/aot.py --write`; CI fails when it is stale. No GPU took part, "
        "and there are no times in it.",
        "",
        f"Versions: {header}. Distinct launches compiled: {counts}.",
        f"Rules broken: {len(faults)}." + "".join(f"\n* {fault}" for fault in faults),
        f"Rows in which ptxas waits after every wgmma instruction (*serialised*): "
        f"{sum(row.serialised for row in rows)}.",
        "",
        "*spills*: bytes a thread keeps in memory because registers ran out, or for any other "
        "reason (AMD: scratch memory; `+ n s`: n scalar registers kept in vector registers, which "
        "touches no memory). *matrix and TMA*: instructions in the program text. *fit*: programs "
        "that fit on one multiprocessor at a time by registers, shared memory and warps. `-bias`: "
        "called without that tensor.",
    ]
    for name in names:
        lines += ["", f"## {name}", "", COLUMNS.format("target"), "|---" * 8 + "|"]
        lines += [_markdown_row(row) for row in rows if row.kernel == name]
    return "\n".join(lines) + "\n"


def _markdown_row(row: Compilation) -> str:
    instructions = ", ".join(f"{name} {number}" for name, number in row.instructions.items())
    if row.serialised:
        instructions += " (serialised)"
    spills = f"{row.spills}" + (f" + {row.scalar_spills} s" if row.scalar_spills else "")
    cells = (
        row.target,
        types(row.signature),
        settings(row),
        row.registers,
        spills,
        f"{row.shared / KIB:.1f} of {row.shared_limit // KIB}",
        instructions or "none",
        row.resident,
    )
    return "| " + " | ".join(map(str, cells)) + " |"


def difference(rows: Sequence[Compilation]) -> str | None:
    """Why the committed report is not this one; None where it is, or is of another version."""
    path = RESULTS / "aot.json"
    if not path.exists():
        return f"{path} does not exist"
    committed = json.loads(path.read_text())
    if committed["versions"] != versions():
        return None
    fresh = json.loads(to_json(rows))
    if committed == fresh and (RESULTS / "aot.md").read_text() == to_markdown(rows):
        return None
    old = {json.dumps(row, sort_keys=True) for row in committed["kernels"]}
    new = {json.dumps(row, sort_keys=True) for row in fresh["kernels"]}
    return (
        f"benchmarks/results/aot.* is stale ({len(old - new)} rows gone, {len(new - old)} new): "
        "python benchmarks/aot.py --write"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--write", action="store_true", help="write benchmarks/results/aot.*")
    parser.add_argument("--check", action="store_true", help="fail where the report is stale")
    parser.add_argument("--kernel", help="only kernels whose name contains this")
    parser.add_argument("--target", choices=TARGETS, help="only this target")
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    partial = args.kernel is not None or args.target is not None
    if partial and (args.write or args.check):
        parser.error("--write and --check take all kernels and targets")
    targets = [args.target] if args.target else list(TARGETS)
    rows = compile_all(targets, args.kernel, args.processes)
    if args.write:
        RESULTS.mkdir(exist_ok=True)
        (RESULTS / "aot.json").write_text(to_json(rows))
        (RESULTS / "aot.md").write_text(to_markdown(rows))
        print(f"wrote {len(rows)} rows to {RESULTS}/aot.json and aot.md")
    elif not args.check:
        print(to_markdown(rows))
    wrong = [f"{row.title()}: {fault}" for row in rows for fault in row.faults()]
    if args.check and (stale := difference(rows)):
        wrong.append(stale)
    if wrong:
        raise SystemExit("\n".join(wrong))


if __name__ == "__main__":
    main()
