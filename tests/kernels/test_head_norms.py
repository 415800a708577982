"""Norm of the head's gradient for each sequence, against a loop over sequences in float64."""

from itertools import pairwise

import oracle
import pytest
import torch
import torch.autograd.forward_ad as fwAD

from vcore_kernels import BackendError, linear_nll_grad_norms
from vcore_kernels.backends import backends, last_used
from vcore_kernels.backends.triton import INTERPRETED

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
RICH = {"softcap": 3.0, "scale": 2.7}
ops = torch.ops.vcore_kernels


@pytest.fixture(params=["product", "gram"] if INTERPRETED else ["chosen"])
def way(request, monkeypatch):
    """Each way that the Triton kernels have of taking the norm of padded sequences."""
    if request.param != "chosen":
        from vcore_kernels.triton import head_norms

        monkeypatch.setattr(head_norms, "gram_is_cheaper", lambda *_: request.param == "gram")


def make(b, t, h, v, dtype=torch.float32, *, std=1.0, ignored=0.3):
    hidden = torch.randn(b, t, h).to(dtype)
    weight = (torch.randn(v, h) * std / max(h, 1) ** 0.5).to(dtype)
    target = torch.randint(0, v, (b, t))
    target[torch.rand(b, t) < ignored] = -100
    return hidden, weight, target


def loop(hidden, weight, target, dtype, bias=None, **options):
    """By autograd, one sequence after the other: what eager PyTorch computes in ``dtype``."""
    norms = []
    for rows, labels in zip(hidden, target, strict=True):
        leaf = weight.detach().to(dtype, copy=True).requires_grad_()
        bias = None if bias is None else bias.to(dtype)
        nll = oracle.head_nll(rows.to(dtype), leaf, labels, bias, **options)
        nll = nll.where(labels != -100, 0)
        norms.append(torch.autograd.grad(nll.sum(), leaf)[0].double().norm())
    return torch.stack(norms) if norms else torch.zeros(0, dtype=torch.float64)


def check(norms, hidden, weight, target, dtype, **options):
    truth = loop(hidden, weight, target, torch.float64, **options)
    assert norms.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norms.shape == truth.shape
    if dtype in (torch.float64, torch.float32):
        rtol = 1e-12 if dtype == torch.float64 else 1e-5
        torch.testing.assert_close(norms.double(), truth, rtol=rtol, atol=0)
    else:
        eager = loop(hidden, weight, target, dtype, **options)
        oracle.assert_as_good_as_eager(norms, truth, eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "shape", [(3, 37, 65, 1301), (2, 1, 64, 7), (5, 20, 16, 530), (1, 70, 130, 40)], ids=str
)
@pytest.mark.parametrize("rich", [False, True])
def test_against_a_loop(shape, dtype, rich, backend, way):
    hidden, weight, target = make(*shape, dtype)
    target[0, 0] = 0
    options = RICH | {"bias": torch.randn(shape[3]).to(dtype)} if rich else {}
    norms = linear_nll_grad_norms(hidden, weight, target, backend=backend, **options)
    assert last_used["linear_nll_grad_norms"] == backend
    check(norms, hidden, weight, target, dtype, **options)


@pytest.mark.parametrize("lengths", [(5, 0, 70, 1, 16, 33, 0), (0, 0), (1,), (0,)], ids=str)
def test_ragged_and_packed(lengths, backend, way):
    """Packed, padded on the right and on the left: the same norms."""
    size, longest, h, v = sum(lengths), max(lengths), 33, 300
    hidden, weight, target = make(1, size, h, v, torch.float32)
    bounds = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    pieces = [slice(*ends) for ends in pairwise(bounds.tolist())]
    hidden, target = hidden[0], target[0]
    packed = linear_nll_grad_norms(hidden, weight, target, cu_seqlens=bounds, backend=backend)
    truth = torch.cat([loop([hidden[p]], weight, [target[p]], torch.float64) for p in pieces])
    torch.testing.assert_close(packed.double(), truth, rtol=1e-5, atol=0)
    with_row = linear_nll_grad_norms(
        hidden[None], weight, target[None], cu_seqlens=bounds.long(), backend=backend
    )
    assert torch.equal(with_row, packed)
    for left in (False, True):
        rows = torch.full((len(lengths), longest, h), torch.nan)  # padding is never looked at
        labels = torch.full((len(lengths), longest), -100)
        for i, piece in enumerate(pieces):
            n = piece.stop - piece.start
            place = slice(longest - n, longest) if left else slice(0, n)
            rows[i, place], labels[i, place] = hidden[piece], target[piece]
        padded = linear_nll_grad_norms(rows, weight, labels, backend=backend)
        torch.testing.assert_close(padded, packed, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_long_sequence(dtype):
    """Of more tokens than the compiled kernels take at a time."""
    hidden, weight, target = make(2, 1300, 24, 301, dtype)
    norms = linear_nll_grad_norms(hidden, weight, target, softcap=3.0)
    assert last_used["linear_nll_grad_norms"] == ("cpp" if backends()["cpp"] else "reference")
    check(norms, hidden, weight, target, dtype, softcap=3.0)


@pytest.mark.skipif(not backends()["cpp"], reason=backends()["cpp"].reason)
def test_offsets_of_the_raw_operator():
    hidden, weight, target = make(1, 9, 8, 20)
    for offsets in ([0, 10], [-1, 9], [5, 4]):
        with pytest.raises(ValueError, match="do not cut 9 tokens"):
            ops.linear_nll_grad_norms(
                hidden[0], weight, target[0], None, torch.tensor(offsets), 0, 0.0, 1.0, -100
            )


def test_shift(backend, way):
    """Labels: nothing predicts the first of a sequence, packed or not, whatever it says."""
    hidden, weight, labels = make(3, 12, 16, 90, ignored=0.2)
    truth = loop(hidden[:, :-1], weight, labels[:, 1:], torch.float64)
    norms = linear_nll_grad_norms(hidden, weight, labels, shift=1, backend=backend)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-5, atol=0)
    packed = linear_nll_grad_norms(
        hidden.flatten(0, 1),
        weight,
        labels.flatten(),
        cu_seqlens=torch.tensor([0, 0, 12, 24, 36], dtype=torch.int32),
        shift=1,
        backend=backend,
    )
    torch.testing.assert_close(packed[1:].double(), truth, rtol=1e-5, atol=0)
    assert packed[0] == 0


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (0, 0)], ids=str)
def test_empty(shape, backend, way):
    hidden, weight, target = make(*shape, 8, 20)
    norms = linear_nll_grad_norms(hidden, weight, target, backend=backend)
    assert torch.equal(norms, torch.zeros(shape[0]))


def test_one_sequence_without_a_batch_axis(backend, way):
    hidden, weight, target = make(1, 9, 8, 20)
    alone = linear_nll_grad_norms(hidden[0], weight, target[0], backend=backend)
    assert torch.equal(alone, linear_nll_grad_norms(hidden, weight, target, backend=backend))


def test_ignored_sequences_and_widths_of_zero(backend, way):
    hidden, weight, target = make(3, 9, 8, 20)
    target[1] = -100
    norms = linear_nll_grad_norms(hidden, weight, target, backend=backend)
    assert norms[1] == 0
    assert (norms[[0, 2]] > 0).all()
    target[:] = -100
    assert (linear_nll_grad_norms(hidden, weight, target, backend=backend) == 0).all()
    hidden, weight, target = make(2, 3, 0, 7, ignored=0)
    assert (linear_nll_grad_norms(hidden, weight, target, backend=backend) == 0).all()


def test_one_class_has_nothing_to_learn(backend, way):
    hidden, weight, target = make(2, 5, 8, 1, ignored=0)
    assert (linear_nll_grad_norms(hidden, weight, target, backend=backend) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_huge_logits(dtype, backend, way):
    hidden, weight, target = make(3, 20, 32, 300, dtype, std=1e4)
    norms = linear_nll_grad_norms(hidden, weight, target, backend=backend)
    check(norms, hidden, weight, target, dtype)


def test_a_large_scale_in_float16(backend, way):
    """Kept in units that make room for small probabilities, gradients of 2.7 must still fit."""
    hidden, weight, target = make(2, 20, 32, 300, torch.float16)
    for scale in (30.0, -2.7, 1e-3, 0.0):
        norms = linear_nll_grad_norms(hidden, weight, target, scale=scale, backend=backend)
        truth = loop(hidden, weight, target, torch.float64, scale=scale)
        torch.testing.assert_close(norms.double(), truth, rtol=2e-3, atol=0)


def test_confident_tokens_keep_their_relative_accuracy(backend, way):
    """p(target) = 1 - 1e-8: the gradient is 1e-8, not the rounding of 1 - p."""
    hidden, weight = torch.eye(3, 8)[:, None], torch.zeros(300, 8)
    weight[0, 0], weight[1, 1], weight[2, 2] = 18.0, 25.0, 40.0
    target = torch.tensor([[0], [1], [2]])
    others = 299 * torch.exp(-torch.tensor([18.0, 25.0, 40.0]).double())
    miss = others / (1 + others)
    truth = (miss**2 * (1 + 1 / 299)).sqrt()
    norms = linear_nll_grad_norms(hidden, weight, target, backend=backend)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-5, atol=0)


def test_a_nan_stays_in_its_sequence(backend, way):
    hidden, weight, target = make(4, 11, 24, 70, ignored=0)
    clean = linear_nll_grad_norms(hidden, weight, target, backend=backend)
    for value in (torch.nan, torch.inf):
        hidden[1, 3, 5] = value
        norms = linear_nll_grad_norms(hidden, weight, target, backend=backend)
        assert norms[1].isnan()
        assert torch.equal(norms[[0, 2, 3]], clean[[0, 2, 3]])
    target[1, 3] = -100  # an ignored token is never looked at
    assert linear_nll_grad_norms(hidden, weight, target, backend=backend).isfinite().all()


def test_masked_classes(backend, way):
    hidden, weight, target = make(2, 9, 16, 50)
    bias = torch.zeros(50)
    bias[20:] = -torch.inf
    target = target.clamp(max=19)
    norms = linear_nll_grad_norms(hidden, weight, target, bias=bias, backend=backend)
    truth = loop(hidden, weight[:20], target, torch.float64)
    torch.testing.assert_close(norms.double(), truth, rtol=1e-5, atol=0)


def test_not_contiguous(backend, way):
    hidden, weight, target = make(3, 11, 24, 70)
    expected = linear_nll_grad_norms(hidden, weight, target, backend=backend)
    strided = (
        hidden.transpose(0, 2).contiguous().transpose(0, 2),
        weight.T.contiguous().T,
        target.T.contiguous().T,
    )
    assert not any(x.is_contiguous() for x in strided)
    norms = linear_nll_grad_norms(*strided, backend=backend)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)
    wide = torch.randn(70, 50)
    wide[:, :24] = weight
    norms = linear_nll_grad_norms(hidden, wide[:, :24], target, backend=backend)
    torch.testing.assert_close(norms, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_two_runs_are_equal_bit_for_bit(dtype, backend, way):
    inputs = make(3, 33, 40, 600, dtype)
    first, second = (linear_nll_grad_norms(*inputs, backend=backend) for _ in range(2))
    assert torch.equal(first, second)


def test_autocast_and_no_graph(backend, way):
    hidden, weight, target = make(2, 9, 16, 50)
    rounded = linear_nll_grad_norms(hidden.bfloat16(), weight.bfloat16(), target, backend=backend)
    with torch.autocast(hidden.device.type, torch.bfloat16):
        norms = linear_nll_grad_norms(
            hidden.requires_grad_(), weight.requires_grad_(), target, backend=backend
        )
    assert torch.equal(norms, rounded)
    assert not norms.requires_grad
    hidden, weight = hidden.detach(), weight.detach()
    with fwAD.dual_level():
        dual = fwAD.make_dual(hidden, hidden)
        with pytest.raises(RuntimeError, match="no forward derivative"):
            linear_nll_grad_norms(dual, weight, target, backend=backend)


def test_opcheck(backend):
    name = "linear_nll_grad_norms" + ("_reference" if backend == "reference" else "")
    hidden, weight, target = make(2, 9, 16, 50)
    rows = hidden.flatten(0, 1), weight, target.flatten()
    for bias, length in ((None, 9), (torch.randn(50), 0)):
        args = (*rows, bias, torch.arange(3) * 9, length, 3.0, 1.0, -100)
        torch.library.opcheck(getattr(ops, name), args)


def test_compiles_without_a_graph_break(backend):
    def run(hidden, weight, target):
        return linear_nll_grad_norms(hidden * 2, weight, target, shift=1, backend=backend) + 1

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for length in (9, 14):
        inputs = make(2, length, 16, 50)
        torch.testing.assert_close(compiled(*inputs), run(*inputs))

    def packed(hidden, weight, target, bounds):
        return linear_nll_grad_norms(
            hidden, weight, target, cu_seqlens=bounds, shift=1, backend=backend
        )

    compiled = torch.compile(packed, fullgraph=True, backend="aot_eager")
    for length in (9, 14):
        hidden, weight, target = make(1, length, 16, 50)
        inputs = hidden[0], weight, target[0], torch.tensor([0, 4, 4, length])
        torch.testing.assert_close(compiled(*inputs), packed(*inputs))


def test_mistakes():
    hidden, weight, target = make(2, 9, 16, 50)
    call = linear_nll_grad_norms
    with pytest.raises(ValueError, match=r"linear_nll_grad_norms: weight has 16 columns"):
        call(hidden[..., :8], weight, target)
    with pytest.raises(ValueError, match=r"target 50 at flat position 3 is outside"):
        call(hidden, weight, target.flatten().index_fill(0, torch.tensor(3), 50).view(2, 9))
    with pytest.raises(ValueError, match=r"cu_seqlens goes with packed"):
        call(hidden, weight, target, cu_seqlens=torch.tensor([0, 18]))
    with pytest.raises(ValueError, match=r"must end at the number of packed tokens, 9"):
        call(hidden[0], weight, target[0], cu_seqlens=torch.tensor([0, 8]))
    with pytest.raises(ValueError, match=r"expected \[B, T\], or packed"):
        call(hidden[None], weight, target[None])
    with pytest.raises(TypeError, match=r"target must be int64"):
        call(hidden, weight, target.int())
    with pytest.raises(BackendError, match=r"linear_nll_grad_norms: backend 'cuda' cannot serve"):
        call(hidden, weight, target, backend="cuda")
