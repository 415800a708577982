"""The kernels of the in-place perturbation for GPUs: each CUDA thread's part on a CPU, what the
compilers make of them, and on a GPU streams, graphs, devices and sizes. test_perturbed.py compares
the backends."""

import ctypes
import importlib
import math
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vcore_kernels import backends, free_backup_buffers, perturb_, perturbed, restore_
from vcore_kernels.backends import reference_perturb

CSRC = Path(__file__).resolve().parents[2] / "csrc"
KERNEL_TYPES = {
    torch.float32: ("F32", 0),
    torch.bfloat16: ("BF16", 1),
    torch.float16: ("F16", 2),
    torch.float64: ("F64", 3),
}
SIZES = (5, 1023, 1024, 8192, 8193, 16 * 1024 + 1, 40_000, 70_001)


# ---- on a CPU ----


class Run(ctypes.Structure):
    """PerturbRun of csrc/perturb_kernels.h."""

    _fields_ = (
        ("theta", ctypes.c_void_p),
        ("direction", ctypes.c_void_p),
        ("saved", ctypes.c_void_p),
        ("size", ctypes.c_int64),
        ("offset", ctypes.c_int64),
        ("theta_type", ctypes.c_int),
        ("direction_type", ctypes.c_int),
        ("tensor", ctypes.c_uint32),
    )


def runs(params, direction, saved):
    return (Run * len(params))(
        *(
            Run(
                p.data_ptr(),
                g.data_ptr(),
                s.data_ptr(),
                p.numel(),
                0,
                KERNEL_TYPES[p.dtype][1],
                KERNEL_TYPES[g.dtype][1],
                number,
            )
            for number, (p, g, s) in enumerate(zip(params, direction, saved, strict=True))
        )
    )


def on_cpu(folder, dtype, g_dtype, stochastic):
    """The kernel for these types, compiled for a CPU."""
    compiler = shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    library = folder / "perturb.so"
    command = [compiler, "-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC"]
    command += ["-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", f"-I{CSRC}"]
    command += [f"-DPERTURB_TYPE={KERNEL_TYPES[dtype][0]}{'Stochastic' * stochastic}"]
    command += [f"-DPERTURB_DIRECTION={KERNEL_TYPES[g_dtype][0]}"]
    command += [f"-DPERTURB_STOCHASTIC={str(stochastic).lower()}"]
    source = Path(__file__).with_name("perturb_on_cpu.cpp")
    subprocess.run([*command, str(source), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library))


def some(dtype, seed):
    """Tensors at all kinds of places in memory; the last two are not aligned to 16 bytes."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(size, generator=generator).to(dtype) for size in SIZES]
    return [*tensors[:-2], *(t[1:] for t in tensors[-2:])]


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("dtype", "g_dtype", "stochastic"),
    [
        (torch.float32, torch.float32, False),
        (torch.float64, torch.float64, False),
        (torch.bfloat16, torch.bfloat16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.float16, torch.float16, False),
        (torch.float16, torch.float64, True),
        (torch.float32, torch.bfloat16, True),
    ],
)
def test_every_thread_does_its_part(tmp_path, dtype, g_dtype, stochastic, swap):
    if swap and dtype != g_dtype:
        pytest.skip("only equal types are swapped")
    library = on_cpu(tmp_path, dtype, g_dtype, stochastic)
    seed = 12345678901234 if stochastic else None
    results = []
    for ours in (True, False):
        params, direction = some(dtype, 0), some(g_dtype, 1)
        direction[3][::7] = 0
        direction[5][-1] = math.inf
        before = [p.clone() for p in params]
        saved = direction if swap else [torch.full_like(p, math.nan) for p in params]
        counts = torch.zeros(len(params), 3, dtype=torch.int64)
        table = runs(params, direction, saved)
        if ours:
            library.perturb(
                table,
                len(params),
                ctypes.c_double(0.1),
                ctypes.c_uint64(seed or 0),
                ctypes.c_void_p(counts.data_ptr()),
            )
        else:
            reference_perturb.perturb_(params, direction, saved, 0.1, seed, counts)
        assert all(torch.equal(s, b) for s, b in zip(saved, before, strict=True))
        results.append((counts, [p.clone() for p in params]))
        if ours:
            library.restore(table, len(params))
            assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert torch.equal(results[0][0], results[1][0])
    for a, b in zip(results[0][1], results[1][1], strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


# ---- what nvcc says ----


@pytest.mark.aot
@pytest.mark.parametrize("architecture", [80, 90, 100])
def test_compiles_without_warnings_spills_or_stack(tmp_path, architecture):
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    target = f"arch=compute_{architecture},code=sm_{architecture}"
    command = [nvcc, "-std=c++17", "-O3", "-fmad=false", "-Werror", "all-warnings"]
    command += ["-Xcompiler", "-Wall,-Wextra,-Wno-unknown-pragmas", "-Xptxas", "-v"]
    command += ["-gencode", target, "-c", str(CSRC / "perturb_cuda.cu")]
    done = subprocess.run(
        [*command, "-o", str(tmp_path / "perturb.o")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    spilled = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr
    )
    kernels = re.findall(r"Compiling entry function '(\w+)'", done.stderr)
    assert len(kernels) == 28 + 3  # types of theta and g, rounding; widths to restore
    assert len(spilled) >= len(kernels)
    assert set(spilled) == {("0", "0", "0")}


@pytest.mark.aot
@pytest.mark.parametrize("target", ["sm90", "gfx942"])
def test_triton_does_not_fuse_the_product_and_the_difference(target):
    triton = pytest.importorskip("triton")
    aot = importlib.import_module("benchmarks.aot")
    common = importlib.import_module("vcore_kernels.triton.common")
    kernels = importlib.import_module("vcore_kernels.triton.perturb")
    p, g = torch.empty(1 << 16), torch.empty(1 << 16)
    common.recorded, common.recorded_architecture = [], target
    try:
        kernels.perturb_([p], [g], [g], 0.1, None, torch.empty(1, 3, dtype=torch.int64))
        (launch,) = common.recorded
    finally:
        common.recorded = None
    fused = {}
    for enabled in (False, True):
        source = aot.source_of(replace(launch, enable_fp_fusion=enabled), aot.TARGETS[target])
        ast = triton.compiler.ASTSource(
            source.kernel, source.signature, source.constants, source.attributes
        )
        built = triton.compile(ast, target=aot.TARGETS[target].gpu, options=source.options)
        text = built.asm["ptx" if target == "sm90" else "amdgcn"]
        fused[enabled] = bool(re.search(r"\bfma\.rn|\bv_(?:pk_)?(?:fma|fmac)_f32", text))
    assert fused == {False: False, True: True}


# ---- on a GPU ----

GPU_BACKENDS = pytest.mark.parametrize("backend", ["cuda", "triton"])


def need(backend, devices=1, memory=0):
    if not backends()[backend]:
        pytest.skip(backends()[backend].reason)
    if torch.cuda.device_count() < devices:
        pytest.skip(f"needs {devices} devices")
    if torch.cuda.mem_get_info()[0] < memory:
        pytest.skip(f"needs {memory >> 30} GiB of free memory on the device")


@pytest.mark.gpu
@GPU_BACKENDS
def test_streams_do_not_share_a_backup_buffer(backend):
    """Each stream restores what it saved, with the other one's work under way."""
    need(backend)
    free_backup_buffers()
    streams = [torch.cuda.Stream() for _ in range(2)]
    params = [torch.full((1 << 20,), float(n), device="cuda") for n in range(2)]
    direction = torch.ones(1 << 20, device="cuda")
    torch.cuda.synchronize()
    for _ in range(3):
        for stream, p in zip(streams, params, strict=True):
            with torch.cuda.stream(stream):
                perturbation = perturb_([p], [direction], 0.5, backend=backend)
                torch.cuda._sleep(20_000_000)
                restore_(perturbation)
    torch.cuda.synchronize()
    for n, p in enumerate(params):
        assert (p == n).all()
    free_backup_buffers()


@pytest.mark.gpu
@GPU_BACKENDS
def test_the_operators_can_be_captured_in_a_graph(backend):
    need(backend)
    kernels = importlib.import_module("vcore_kernels.perturbed")._kernels(backend)
    params = [torch.randn(size, device="cuda").bfloat16() for size in (70_001, 5, 1024)]
    direction = [torch.randn_like(p) for p in params]
    saved = [torch.empty(p.nbytes + 64, dtype=torch.uint8, device="cuda") for p in params]
    counts = torch.full((3, 3), -1, device="cuda")
    middle = [torch.empty_like(p) for p in params]

    def move():
        counts.fill_(-1)
        kernels.perturb_(params, direction, saved, 0.1, 7, counts)
        for copy, p in zip(middle, params, strict=True):
            copy.copy_(p)
        kernels.restore_(params, saved)

    move()  # Triton compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        move()
    for p in params:
        p.normal_()
    before = [p.clone() for p in params]
    graph.replay()
    for p, b, moved, g in zip(params, before, middle, direction, strict=True):
        assert torch.equal(p, b)
        assert (moved - b + 0.1 * g).abs().max() < 0.1
    assert counts[:, 0].tolist() == [p.numel() for p in params]


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_tensors_on_several_devices(backend, rounding):
    need(backend, devices=2)
    places = ["cuda:0", "cuda:1", "cuda:0", "cuda:1"]
    values = [torch.randn(3000).bfloat16() for _ in places]
    directions = [torch.randn(3000) for _ in places]
    moved = []
    for where in (["cpu"] * 4, places):
        params = [v.to(place, copy=True) for v, place in zip(values, where, strict=True)]
        direction = [d.to(place) for d, place in zip(directions, where, strict=True)]
        generator = torch.Generator().manual_seed(3)
        name = "reference" if where[0] == "cpu" else backend
        options = {"rounding": rounding, "generator": generator, "backend": name}
        with perturbed(params, direction, 0.1, **options):
            moved.append([p.cpu() for p in params])
        assert all(torch.equal(p.cpu(), v) for p, v in zip(params, values, strict=True))
    for a, b in zip(*moved, strict=True):
        assert torch.equal(a, b)


@pytest.mark.gpu
@GPU_BACKENDS
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_more_entries_than_32_bits_count(backend, rounding):
    size = (1 << 31) + 1025
    need(backend, memory=7 * size)
    p = torch.ones(size, dtype=torch.bfloat16, device="cuda")
    g = torch.zeros_like(p)
    g[-1025:] = 1
    with perturbed([p], [g], 0.5, rounding=rounding, backend=backend) as perturbation:
        assert perturbation.stalled == 0
        assert (p[-1025:] == 0.5).all()
        assert (p[:1025] == 1).all()
        assert (p[(1 << 31) - 1025 : 1 << 31] == 1).all()
    assert (p[-1025:] == 1).all()
    free_backup_buffers()
