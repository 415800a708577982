"""rms_norm_jvp and gated_jvp against torch.func.jvp of the plain formulas in float64."""

import oracle
import pytest
import torch
import torch.nn.functional as F

from vcore_kernels import gated_jvp, rms_norm_jvp
from vcore_kernels.backends import BackendError, last_used, supports

CPP = supports("cpp", "rms_norm_jvp", torch.empty(0, device="cpu"))
needs_cpp = pytest.mark.skipif(not CPP, reason=CPP.reason)
BACKENDS = ["reference", pytest.param("cpp", marks=needs_cpp)]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ACTIVATIONS = {"silu": F.silu, "gelu_tanh": lambda x: F.gelu(x, approximate="tanh")}


def plain_norm(x, weight, eps, offset):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (offset + weight)


def tangents(function, primals, tangents, dtype):
    cast = [
        tuple(torch.zeros_like(x, dtype=dtype) if dx is None else dx.to(dtype) for dx, x in pairs)
        for pairs in (list(zip(primals, primals, strict=True)), zip(tangents, primals, strict=True))
    ]
    return torch.func.jvp(function, *cast)


def make(shapes, dtype, present):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(shape, generator=generator).to(dtype) for shape in (*shapes, *shapes)]
    primals, moving = values[: len(shapes)], values[len(shapes) :]
    return primals, [t if p else None for t, p in zip(moving, present, strict=True)]


def check(results, function, primals, moving, out_dtype):
    truth = tangents(function, primals, moving, torch.float64)
    eager = tangents(function, primals, moving, primals[0].dtype)
    for value, exact, rival, name in zip(results, truth, eager, ("y", "dy"), strict=True):
        assert value.dtype == out_dtype
        scale = max(1.0, float(exact.abs().max()))  # the tangent of a norm is a difference
        oracle.assert_as_good_as_eager(value, exact, rival, primals[0].dtype, name, scale)


@pytest.mark.parametrize("present", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 37), (7, 1), (0, 16)], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_rms_norm(backend, shape, dtype, present):
    primals, moving = make([shape, shape[-1:]], dtype, present)
    for offset in (0.0, 1.0):
        out = rms_norm_jvp(*primals, *moving, eps=1e-5, offset=offset, backend=backend)
        assert last_used["rms_norm_jvp"] == backend
        if shape[0]:
            check(out, lambda x, w, o=offset: plain_norm(x, w, 1e-5, o), primals, moving, dtype)


@pytest.mark.parametrize("present", [(1, 1), (1, 0), (0, 1), (0, 0)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 37), (0, 16)], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gated(backend, activation, shape, dtype, present):
    primals, moving = make([shape, shape], dtype, present)
    out = gated_jvp(*primals, *moving, activation=activation, backend=backend)
    assert last_used["gated_jvp"] == backend
    if shape[0]:
        check(out, lambda g, u: ACTIVATIONS[activation](g) * u, primals, moving, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_far_gates_stay_finite(backend, activation):
    gate = torch.tensor([-1e4, -90.0, -30.0, 0.0, 30.0, 90.0, 1e4])
    ones = torch.ones_like(gate)
    y, dy = gated_jvp(gate, ones, ones, ones, activation=activation, backend=backend)
    torch.testing.assert_close(y, gate.clamp_min(0))
    torch.testing.assert_close(dy, y + torch.tensor([0.0, 0, 0, 0.5, 1, 1, 1]))


@pytest.mark.parametrize("backend", BACKENDS)
def test_hostile_rows(backend):
    x = torch.tensor([[0.0, 0, 0], [1e-20, 0, 0], [float("nan"), 1, 1], [1, 2, 3]])
    y, dy = rms_norm_jvp(x, torch.ones(3), torch.ones(4, 3), eps=1e-6, backend=backend)
    for out in (y, dy):
        assert out.isfinite().all(-1).tolist() == [True, True, False, True]
        assert out[2].isnan().all()
    torch.testing.assert_close(dy[0], torch.full((3,), 1e3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_and_wider_output(backend):
    (x, weight), (dx, dweight) = make([(8, 6, 16), (16,)], torch.bfloat16, (1, 1))
    across = [t.transpose(0, 1) for t in (x, dx)]
    out = rms_norm_jvp(
        across[0], weight, across[1], dweight, eps=1e-6, out_dtype=torch.float32, backend=backend
    )
    wide = [t.float() for t in (x, weight, dx, dweight)]
    expected = rms_norm_jvp(*wide, eps=1e-6, backend=backend)
    for value, straight in zip(out, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, straight.transpose(0, 1))
    got = gated_jvp(x.mT, x.mT, dx.mT, None, activation="silu", backend=backend)
    straight = gated_jvp(x, x, dx, None, activation="silu", backend=backend)
    for value, other in zip(got, straight, strict=True):
        assert torch.equal(value, other.mT)


def test_mistakes_are_named():
    x, w = torch.randn(2, 4), torch.randn(4)
    with pytest.raises(ValueError, match=r"rms_norm_jvp: weight is \[3\], x \[2, 4\]"):
        rms_norm_jvp(x, w[:3], None, eps=1e-6)
    with pytest.raises(ValueError, match=r"rms_norm_jvp: dx is .*\[4\].*tangent like x"):
        rms_norm_jvp(x, w, w, eps=1e-6)
    with pytest.raises(ValueError, match="eps must be finite"):
        rms_norm_jvp(x, w, None, eps=-1.0)
    with pytest.raises(TypeError, match="floating-point"):
        rms_norm_jvp(x.long(), w, None, eps=1e-6)
    with pytest.raises(ValueError, match="unknown activation 'relu', expected one of silu"):
        gated_jvp(x, x, None, None, activation="relu")
    with pytest.raises(ValueError, match=r"gated_jvp: up is .*float64.*must agree"):
        gated_jvp(x, x.double(), None, None, activation="silu")
    with pytest.raises(TypeError, match="floating-point"):
        gated_jvp(x.long(), x.long(), None, None, activation="silu")
    with pytest.raises(BackendError, match="triton"):
        gated_jvp(x, x, None, None, activation="silu", backend="triton")


@needs_cpp
def test_operators():
    (x, weight), (dx, dweight) = make([(4, 8), (8,)], torch.float32, (1, 1))
    ops = torch.ops.vcore_kernels
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(ops.rms_norm_jvp, (x, weight, dx, dweight, 1e-6, dtype))
    torch.library.opcheck(ops.gated_jvp, (x, x, dx, None, "silu"))
