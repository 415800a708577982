"""Attention with its tangent against float64, under every mask, on ragged and hostile inputs."""

import oracle
import pytest
import torch

from vcore_kernels import attention_jvp
from vcore_kernels.backends import backends, last_used, supports
from vcore_kernels.backends.triton import INTERPRETED

needs_cpp = pytest.mark.skipif(not backends()["cpp"], reason=backends()["cpp"].reason)

# No Triton kernel multiplies float64; with a `backend` of "triton" such a case has nothing to test.
# float16 differs from bfloat16 by its rounding alone, and the interpreter is slow.
DTYPES = [torch.float32, torch.bfloat16]
DTYPES += [] if INTERPRETED else [torch.float16, torch.float64]


def make(batch, heads, kv_heads, length, width, dtype, *, value_width=None, std=1.0, seed=0):
    """q, k, v and their tangents."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(heads, width), (kv_heads, width), (kv_heads, value_width or width)]
    return [
        (torch.randn(batch, h, length, d, generator=generator, device="cpu") * std).to(dtype)
        for h, d in (*shapes, *shapes)
    ]


def padding(length, side):
    """[3, length]: a whole row, padding of about a third, and one of all but a token."""
    mask = torch.ones(3, length, dtype=torch.int64)
    for row, padded in ((1, length // 3), (2, length - 1)):
        mask[row, slice(0, padded) if side == "left" else slice(length - padded, length)] = 0
    return mask


def eager(tensors, visible, scale, softcap, dtype):
    """Plain attention and torch's own tangent of it, in ``dtype``."""
    primals = tuple(x.cpu().to(dtype) for x in tensors[:3])
    tangents = tuple(
        torch.zeros_like(x) if dx is None else dx.cpu().to(dtype)
        for x, dx in zip(primals, tensors[3:], strict=True)
    )
    return torch.func.jvp(
        lambda q, k, v: oracle.attention(q, k, v, visible, scale, softcap), primals, tangents
    )


def check(tensors, backend, *, causal=True, scale=None, lengths=None, scales=(None, None), **mask):
    """Both results against float64; ``scales``: the size of the terms they are sums of."""
    q = tensors[0]
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    softcap = mask.pop("softcap", None)
    visible = oracle.visible_keys(q.shape[2], causal, lengths=lengths, **mask)
    options = {"causal": causal, "scale": scale, "softcap": softcap, "backend": backend, **mask}
    device = torch.get_default_device()
    given = [None if x is None else x.to(device) for x in tensors]
    if mask.get("key_mask") is not None:
        options["key_mask"] = mask["key_mask"].to(device)
    if lengths is None:
        out, dout = attention_jvp(*given, **options)
    else:
        offsets = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0).to(torch.int32)
        given = [None if x is None else x[0] for x in given]
        out, dout = (x[None] for x in attention_jvp(*given, **options, cu_seqlens=offsets))
    assert last_used["attention_jvp"] == backend
    truth = eager(tensors, visible, scale, softcap, torch.float64)
    plain = eager(tensors, visible, scale, softcap, q.dtype)
    for name, value, exact, rival, size in zip(
        ("out", "dout"), (out, dout), truth, plain, scales, strict=True
    ):
        assert value.dtype == q.dtype
        oracle.assert_as_good_as_eager(value.cpu(), exact, rival, q.dtype, name, size)
    return out, dout


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [64, 16, 40, 80, 96, 128, 7])
@pytest.mark.parametrize("length", [1, 17, 130])
def test_shapes(length, width, dtype, backend):
    check(make(2, 2, 1, length, width, dtype), backend)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1)], ids=str)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_grouped_heads_and_both_directions(heads, causal, dtype, backend):
    check(make(2, *heads, 77, 32, dtype), backend, causal=causal)


OPTIONS = {
    "plain": {},
    "softcap": {"softcap": 1.5},
    "window": {"window": 5},
    "window of one": {"window": 1},
    "window longer than the text": {"window": 1000},
    "window and softcap": {"window": 70, "softcap": 1.5},
    "negative scale": {"scale": -0.3},
    "no scores": {"scale": 0.0},
}


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masks(options, side, dtype, backend):
    length = 150
    key_mask = None if side is None else padding(length, side)
    tensors = make(3, 2, 1, length, 32, dtype)
    check(tensors, backend, key_mask=key_mask, **OPTIONS[options])


@pytest.mark.parametrize("causal", [True, False])
def test_holes_in_the_mask(causal, backend):
    key_mask = torch.rand(3, 90) < 0.5
    key_mask[1] = False  # no query of this row sees any key
    out, dout = check(
        make(3, 2, 2, 90, 16, torch.float32), backend, causal=causal, key_mask=key_mask
    )
    assert (out[1] == 0).all()
    assert (dout[1] == 0).all()


@pytest.mark.parametrize("lengths", [(150,), (7, 1, 64, 0, 78), (1,) * 40, (0, 113, 0, 1)], ids=str)
@pytest.mark.parametrize("options", ["plain", "window", "window and softcap", "bidirectional"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_packed(lengths, options, dtype, backend):
    chosen = {"causal": False} if options == "bidirectional" else OPTIONS[options]
    check(make(1, 2, 1, sum(lengths), 24, dtype), backend, lengths=lengths, **chosen)


def test_packed_equals_padded(backend):
    lengths = (9, 130, 31)
    padded = make(3, 4, 2, max(lengths), 32, torch.float32)
    key_mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    device = torch.get_default_device()
    options = {"causal": True, "scale": 0.2, "window": 40, "backend": backend}
    wide = attention_jvp(*(x.to(device) for x in padded), **options, key_mask=key_mask.to(device))
    packed = [torch.cat([x[b, :, :n] for b, n in enumerate(lengths)], 1).to(device) for x in padded]
    offsets = torch.tensor([0, 9, 139, 170], dtype=torch.int32)
    for one, other in zip(attention_jvp(*packed, **options, cu_seqlens=offsets), wide, strict=True):
        expected = torch.cat([other[b, :, :n] for b, n in enumerate(lengths)], 1)
        torch.testing.assert_close(one, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("missing", ["q", "k", "v", "qk", "qv", "kv", "qkv"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_absent_tangents_are_zero(missing, dtype, backend):
    tensors = make(2, 4, 2, 65, 32, dtype)
    for name in missing:
        tensors["qkv".index(name) + 3] = None
    _, dout = check(tensors, backend)
    if missing == "qkv":
        assert (dout == 0).all()


def test_values_of_another_width(backend):
    for dtype in (torch.float32, torch.bfloat16):
        out, _ = check(make(2, 4, 2, 60, 48, dtype, value_width=20), backend)
        assert out.shape == (2, 4, 60, 20)
        check(make(2, 4, 2, 60, 24, dtype, value_width=33), backend)


def test_any_strides(backend):
    """As transformers hands them over, [B, T, heads, D] in memory; tangents expanded, turned."""
    tensors = [
        x.transpose(1, 2).contiguous().transpose(1, 2)
        for x in make(2, 4, 2, 70, 32, torch.bfloat16)
    ]
    tensors[3] = tensors[3][:, :, :1].expand(-1, -1, 70, -1)
    tensors[4] = tensors[4].mT.contiguous().mT
    check(tensors, backend)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_tiles_of_keys(dtype, backend):
    length = 300 if backend == "triton" else 1030
    check(make(1, 2, 1, length, 64, dtype), backend)
    check(make(1, 2, 1, length, 64, dtype), backend, window=200)


@pytest.mark.parametrize("width", [64, 40, 7])
def test_every_engine_for_bf16(width, bf16_engine):
    check(make(2, 4, 2, 130, width, torch.bfloat16), "cpp", softcap=2.0)


# ---- hostile ----


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_huge_scores(dtype, backend):
    """Scores of thousands: the softmax is one key almost everywhere."""
    tensors = make(1, 2, 2, 70, 64, dtype, std=30.0)
    # The tangent is a product of p with differences of ds near 1e4 that cancel.
    check(tensors, backend, scale=1.0, scales=(None, 1e5))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_common_tangent_of_all_scores_cancels(dtype, backend):
    """dk the same for all keys moves no probability; without centring it is all rounding."""
    tensors = make(1, 2, 2, 150, 32, dtype)
    tensors[3] = tensors[5] = None
    tensors[4] = torch.full_like(tensors[4], 8.0)
    _, dout = attention_jvp(
        *(None if x is None else x.to(torch.get_default_device()) for x in tensors),
        causal=True,
        scale=1.0,
        backend=backend,
    )
    eps = 2.0**-23 if dtype != torch.float64 else 2.0**-52
    assert dout.abs().max() < 8 * 32 * 4 * eps * 64


def test_growing_scores_shrink_what_came_before(backend):
    """Each tile's maximum is above all before it."""
    tensors = make(1, 1, 1, 400, 16, torch.float32)
    tensors[0] = torch.full_like(tensors[0], 1.0)
    tensors[1] = torch.linspace(-60, 60, 400)[:, None].expand(1, 1, 400, 16).contiguous()
    check(tensors, backend, scale=0.25, scales=(None, 400.0))


def test_nan_stays_in_its_head_and_row(backend):
    tensors = make(2, 4, 2, 80, 16, torch.float32)
    clean = attention_jvp(
        *(x.to(torch.get_default_device()) for x in tensors),
        causal=True,
        scale=0.25,
        backend=backend,
    )
    tensors[0][1, 2, 33, 5] = torch.nan
    tensors[3][0, 1, 50, 0] = torch.nan
    out, dout = attention_jvp(
        *(x.to(torch.get_default_device()) for x in tensors),
        causal=True,
        scale=0.25,
        backend=backend,
    )
    assert out[1, 2, 33].isnan().all()
    assert dout[0, 1, 50].isnan().all()
    rest = torch.ones(2, 4, 80, dtype=torch.bool)
    rest[1, 2, 33] = False
    assert torch.equal(out[rest], clean[0][rest])
    rest[0, 1, 50] = False
    assert torch.equal(dout[rest], clean[1][rest])


@pytest.mark.parametrize("shape", [(0, 2, 1, 5, 8), (2, 2, 1, 0, 8)], ids=str)
def test_empty(shape, backend):
    tensors = [x.to(torch.get_default_device()) for x in make(*shape, torch.float32)]
    for value in attention_jvp(*tensors, causal=True, scale=1.0, backend=backend):
        assert value.shape == tensors[0].shape


def test_heads_of_no_width(backend):
    """Scores of 0: values are averaged, and nothing beside the heads is read."""
    q, k, v, dq, dk, dv = make(1, 2, 1, 5, 0, torch.float32, value_width=8)
    given = [x.to(torch.get_default_device()) for x in (q, k, v, dq, dk, dv)]
    out, dout = attention_jvp(*given, causal=True, scale=1.0, backend=backend)
    for value, exact in ((out, v), (dout, dv)):
        mean = exact.cumsum(2) / torch.arange(1.0, 6.0, device="cpu")[:, None]
        torch.testing.assert_close(value.cpu(), mean.expand(1, 2, 5, 8))


def test_offsets_that_lie_apart(backend):
    """The offsets of every second segment's start; warnings are errors."""
    packed = [x[0].to(torch.get_default_device()) for x in make(1, 2, 1, 10, 8, torch.float32)]
    offsets = torch.tensor([0, 1, 3, 5, 10], dtype=torch.int32)[::2]
    options = {"causal": True, "scale": 1.0, "backend": backend}
    apart = attention_jvp(*packed, cu_seqlens=offsets, **options)
    together = attention_jvp(*packed, cu_seqlens=offsets.clone(), **options)
    for one, other in zip(apart, together, strict=True):
        assert torch.equal(one, other)


def test_autocast(backend):
    tensors = make(2, 4, 2, 40, 32, torch.bfloat16)
    mixed = [x.float() if i % 3 == 0 else x for i, x in enumerate(tensors)]  # norms give float32
    device = torch.get_default_device()
    options = {"causal": True, "scale": 0.2, "backend": backend}
    expected = attention_jvp(*(x.to(device) for x in tensors), **options)
    with torch.autocast(torch.device(device or "cpu").type, torch.bfloat16):
        given = attention_jvp(*(x.to(device) for x in mixed), **options)
    for one, other in zip(given, expected, strict=True):
        assert torch.equal(one, other)


def test_results_lie_as_the_output_projection_reads_them(backend):
    tensors = [x.to(torch.get_default_device()) for x in make(2, 4, 2, 40, 32, torch.float32)]
    for value in attention_jvp(*tensors, causal=True, scale=1.0, backend=backend):
        if backend != "reference":
            assert value.transpose(1, 2).is_contiguous()


@needs_cpp
def test_long_text_in_little_memory():
    """T = 16,384 on a CPU in less than 2 GB: scores alone would take 4 GB a head."""
    tensors = make(1, 2, 1, 16384, 64, torch.bfloat16)
    peak = _peak_above(lambda: attention_jvp(*tensors, causal=True, scale=0.125, window=512))
    assert peak < 64 * 2**20


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True])
def test_every_key_of_a_long_text_in_little_memory(packed):
    """The same where each query sees all keys before it: memory does not grow with what is seen."""
    tensors = make(1, 2, 1, 16384, 64, torch.bfloat16)
    options = {"causal": True, "scale": 0.125}
    if packed:
        tensors = [x[0] for x in tensors]
        options["cu_seqlens"] = torch.tensor([0, 12000, 16384], dtype=torch.int32)
    assert _peak_above(lambda: attention_jvp(*tensors, **options)) < 64 * 2**20
    assert last_used["attention_jvp"] == "cpp"


def _peak_above(call):
    def resident(field):
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith(field))

    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # the peak starts anew
    before = resident("VmRSS")
    call()
    return resident("VmHWM") - before


# ---- bad input ----


def test_bad_input():
    q, k, v, dq, dk, dv = make(2, 4, 2, 10, 8, torch.float32)

    def call(*tensors, causal=True, scale=1.0, **options):
        return attention_jvp(*tensors, causal=causal, scale=scale, **options)

    with pytest.raises(ValueError, match=r"expected q, k, v as \[B, heads, T, D\].*cu_seqlens"):
        call(q[0], k[0], v[0], None, None, None)
    with pytest.raises(ValueError, match="differ in batch, length or key heads"):
        call(q, k[:, :, :9], v[:, :, :9], None, None, None)
    with pytest.raises(ValueError, match="D must be the same"):
        call(q, k[..., :7], v, None, None, None)
    with pytest.raises(ValueError, match="number of heads a multiple"):
        call(q[:, :3], k, v, None, None, None)
    with pytest.raises(TypeError, match="share a floating-point dtype"):
        call(q, k.half(), v, dq, dk, dv)
    with pytest.raises(ValueError, match=r"dk is .*Pass a tangent like k"):
        call(q, k, v, dq, dq, dv)
    with pytest.raises(ValueError, match="window must be 1 or more and needs causal=True"):
        call(q, k, v, dq, dk, dv, causal=False, window=3)
    with pytest.raises(ValueError, match="window must be 1 or more"):
        call(q, k, v, dq, dk, dv, window=0)
    with pytest.raises(ValueError, match="softcap must be positive"):
        call(q, k, v, dq, dk, dv, softcap=0.0)
    with pytest.raises(ValueError, match="scale must be finite"):
        call(q, k, v, dq, dk, dv, scale=float("nan"))
    with pytest.raises(TypeError, match="scale must be a number, got NoneType"):
        call(q, k, v, dq, dk, dv, scale=None)
    with pytest.raises(TypeError, match="window must be a whole number"):
        call(q, k, v, dq, dk, dv, window=2.5)
    with pytest.raises(ValueError, match=r"key_mask must be bool or integer \[2, 10\]"):
        call(q, k, v, dq, dk, dv, key_mask=torch.ones(2, 9, dtype=torch.bool))
    offsets = torch.tensor([0, 3, 10], dtype=torch.int32)
    packed = [x[0] for x in (q, k, v, dq, dk, dv)]
    with pytest.raises(ValueError, match="key_mask does not go with cu_seqlens"):
        call(*packed, cu_seqlens=offsets, key_mask=torch.ones(2, 10, dtype=torch.bool))
    with pytest.raises(ValueError, match="cu_seqlens must end at the number of packed tokens, 10"):
        call(*packed, cu_seqlens=offsets[:2])
    with pytest.raises(ValueError, match="cu_seqlens must be increasing"):
        call(*packed, cu_seqlens=torch.tensor([0, 4, 3, 10]))


def test_wide_heads_have_no_triton_kernel():
    wide = torch.empty(1, 1, 4, 272, dtype=torch.bfloat16)
    support = supports("triton", "attention_jvp", wide)
    assert not support
    if backends()["triton"]:
        assert "heads of at most 256" in support.reason


@pytest.mark.skipif(not INTERPRETED, reason="the other backends test it everywhere")
@pytest.mark.interpreter
def test_float16_under_the_interpreter():
    check(make(2, 2, 1, 70, 32, torch.float16), "triton", softcap=2.0)


@needs_cpp
def test_the_operator_refuses_dual_tensors_and_passes_opcheck():
    tensors = make(1, 2, 1, 9, 8, torch.float32)
    op = torch.ops.vcore_kernels.attention_jvp.default
    args = (*tensors, None, None, True, 1.0, 0.0, 0)
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tensors[0], tensors[3])
        with pytest.raises(RuntimeError, match="would lose the tangent"):
            op(dual, *args[1:])
