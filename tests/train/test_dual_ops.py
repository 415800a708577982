"""Every layer on dual tensors: values, tangents and gradients against the plain layer's."""

import itertools

import pytest
import torch
import torch.autograd.forward_ad as fwAD
import torch.nn.functional as F
from vcore_train import dual_ops


def linear(x, weight, bias=None):
    return F.linear(x, weight, bias)


def low_rank(y, x, a, b):
    return y + F.linear(F.linear(x, a), b) * 0.7


def rms_norm(x, weight):
    return dual_ops.plain_rms_norm(x, weight, 1e-5, 1.0, x.dtype)


def silu_gated(gate, up):
    return F.silu(gate) * up


def gelu_gated(gate, up):
    return F.gelu(gate, approximate="tanh") * up


X = (2, 5, 7)
LAYERS = {  # the layer on duals, the plain one, shapes
    "linear": (dual_ops.linear, linear, [X, (6, 7)]),
    "linear with bias": (dual_ops.linear, linear, [X, (6, 7), (6,)]),
    "linear of one row": (dual_ops.linear, linear, [(7,), (6, 7)]),
    "linear of no rows": (dual_ops.linear, linear, [(0, 7), (6, 7)]),
    "low rank": (
        lambda y, x, a, b: dual_ops.low_rank_update(y, x, a, b, 0.7, y.dtype),
        low_rank,
        [(2, 5, 6), X, (3, 7), (6, 3)],
    ),
    "norm": (lambda x, w: dual_ops.rms_norm(x, w, 1e-5, 1.0, x.dtype), rms_norm, [X, (7,)]),
    "silu": (lambda g, u: dual_ops.gated(g, u, "silu"), silu_gated, [X, X]),
    "gelu": (lambda g, u: dual_ops.gated(g, u, "gelu_tanh"), gelu_gated, [X, X]),
}
CASES = [
    pytest.param(name, moving, id=f"{name}, {''.join(map(str, moving))}")
    for name, (_, _, shapes) in LAYERS.items()
    for moving in itertools.product((0, 1), repeat=len(shapes))
]


def make(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(s, generator=generator).to(dtype) for s in (*shapes, *shapes)]
    return values[: len(shapes)], values[len(shapes) :]


def through(layer, primals, tangents, moving):
    """The layer's value and tangent (None: none)."""
    with fwAD.dual_level():
        given = [
            fwAD.make_dual(x, dx) if m else x
            for x, dx, m in zip(primals, tangents, moving, strict=True)
        ]
        return tuple(fwAD.unpack_dual(layer(*given)))


@pytest.mark.parametrize(("name", "moving"), CASES)
def test_values_tangents_and_gradients(name, moving):
    layer, plain, shapes = LAYERS[name]
    primals, tangents = make(shapes)
    used = tuple(dx * m for dx, m in zip(tangents, moving, strict=True))
    expected, expected_tangent = torch.func.jvp(plain, tuple(primals), used)
    with torch.no_grad():
        value, tangent = through(layer, primals, tangents, moving)
    torch.testing.assert_close(value, expected)
    if any(moving):
        torch.testing.assert_close(tangent, expected_tangent)
    else:
        assert tangent is None

    leaves = [x.clone().requires_grad_() for x in primals]
    value, tangent = through(layer, leaves, tangents, moving)
    torch.testing.assert_close(value, expected)
    assert tangent is None or not tangent.requires_grad
    if any(moving):
        torch.testing.assert_close(tangent, expected_tangent)
    upstream = torch.randn(value.shape, dtype=value.dtype)
    gradients = torch.autograd.grad(value, leaves, upstream)
    expected_gradients = torch.autograd.grad(plain(*leaves), leaves, upstream)
    for gradient, other in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(gradient, other)


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_gradients_where_a_part_is_frozen(frozen):
    (x, weight), tangents = make([X, (6, 7)])
    leaf = (weight if frozen == "x" else x).requires_grad_()
    value, tangent = through(dual_ops.linear, (x, weight), tangents, (1, 1))
    assert not tangent.requires_grad
    (gradient,) = torch.autograd.grad(value.sum(), leaf)
    torch.testing.assert_close(gradient, torch.autograd.grad(linear(x, weight).sum(), leaf)[0])


@pytest.mark.parametrize("name", LAYERS)
def test_16_bits_and_autocast(name):
    """bf16 tensors and fp32 ones under autocast give what the plain layer gives, in its dtype."""
    layer, plain, shapes = LAYERS[name]
    primals, tangents = make(shapes, torch.float32)
    moving = [1] * len(shapes)
    exact = torch.func.jvp(plain, *(tuple(t.double() for t in ts) for ts in (primals, tangents)))
    scale = 1.0 if not exact[0].numel() else float(exact[0].abs().max())
    for cast in (torch.bfloat16, torch.float32):
        values = [[t.to(cast) for t in ts] for ts in (primals, tangents)]
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, cast == torch.float32):
            value, tangent = through(layer, *values, moving)
            dtype = plain(*values[0]).dtype
        assert (value.dtype, tangent.dtype) == (dtype, dtype)
        for got, truth in zip((value, tangent), exact, strict=True):
            torch.testing.assert_close(got.double(), truth, rtol=0.03, atol=0.04 * scale)


def test_fp32_adapters_over_a_bf16_layer():
    primals, tangents = make([(2, 5, 6), X, (3, 7), (6, 3)], torch.float32)
    exact = torch.func.jvp(low_rank, tuple(primals), tuple(tangents))
    for ts in (primals, tangents):
        ts[:2] = [t.bfloat16() for t in ts[:2]]
    layer = LAYERS["low rank"][0]
    for leaves in (primals, [x.clone().requires_grad_(x.dim() == 2) for x in primals]):
        value, tangent = through(layer, leaves, tangents, (1, 1, 1, 1))
        assert value.dtype == tangent.dtype == torch.bfloat16
        for got, truth in zip((value, tangent), exact, strict=True):
            torch.testing.assert_close(got.float(), truth, rtol=0.03, atol=0.05)
        assert value.requires_grad == any(x.requires_grad for x in leaves)


def test_no_argument_is_written_to():
    for layer, _, shapes in LAYERS.values():
        primals, tangents = make(shapes)
        before = [t.clone() for t in (*primals, *tangents)]
        with torch.no_grad():
            through(layer, primals, tangents, [1] * len(shapes))
        assert all(map(torch.equal, (*primals, *tangents), before))
