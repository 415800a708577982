"""What only the Triton kernels of the gradient's norms have: slices, groups, two ways."""

import pytest
import torch

from vcore_kernels import linear_nll_grad_norms
from vcore_kernels.backends.triton import INTERPRETED

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)

from vcore_kernels.triton import common, head_norms, tuning

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16]
V = 1301  # three slices of the smallest width


def make(dtype, b=4, t=40, h=72):
    hidden = torch.randn(b, t, h).to(DEVICE, dtype)
    weight = (torch.randn(V, h) / h**0.5).to(DEVICE, dtype)
    target = torch.randint(0, V, (b, t)).to(DEVICE)
    target[torch.rand(b, t).to(DEVICE) < 0.3] = -100
    return hidden, weight, target


def norms(hidden, weight, target, **options):
    return linear_nll_grad_norms(hidden, weight, target, backend="triton", **options)


def packed_norms(hidden, weight, target, **options):
    b, t = target.shape
    bounds = torch.arange(b + 1, device=DEVICE) * t
    return norms(hidden.flatten(0, 1), weight, target.flatten(), cu_seqlens=bounds.int(), **options)


def choose(monkeypatch, gram):
    monkeypatch.setattr(head_norms, "gram_is_cheaper", lambda *_: gram)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_both_ways_agree(dtype, monkeypatch):
    inputs = make(dtype)
    choose(monkeypatch, True)
    gram = norms(*inputs, softcap=3.0)
    choose(monkeypatch, False)
    product = norms(*inputs, softcap=3.0)
    torch.testing.assert_close(gram, product, rtol=1e-5, atol=0)
    assert torch.equal(product, packed_norms(*inputs, softcap=3.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gram", [True, False])
def test_slices_and_groups_change_no_bit(dtype, gram, monkeypatch):
    inputs = make(dtype)
    choose(monkeypatch, gram)
    expected = norms(*inputs)
    launches = []
    launch = common.launch
    monkeypatch.setattr(
        head_norms, "launch", lambda k, *a, **o: (launches.append(k.__name__), launch(k, *a, **o))
    )
    # under the interpreter slices of 512, and grams of 48 x 48 for 3 and 1 of the sequences
    monkeypatch.setattr(tuning, "WORKSPACE", 30000)
    assert torch.equal(norms(*inputs), expected)
    assert launches.count("_gram_of_gradients" if gram else "_squares_of_products") >= 3
    assert launches.count("_root_of_sums") >= (2 if gram else 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gram", [True, False])
def test_a_sequence_alone_equals_itself_in_a_batch(dtype, gram, monkeypatch):
    hidden, weight, target = make(dtype)
    choose(monkeypatch, gram)
    batch = norms(hidden, weight, target)
    packed = packed_norms(hidden, weight, target)
    for i in range(target.shape[0]):
        one = slice(i, i + 1)
        assert torch.equal(norms(hidden[one], weight, target[one]), batch[one])
        # packed among others of other lengths, and without the tokens that do not count
        counted = target[i] != -100
        alone = norms(
            hidden[i][counted],
            weight,
            target[i][counted],
            cu_seqlens=torch.tensor([0, 0, int(counted.sum())], device=DEVICE),
        )
        assert torch.equal(alone[1:], packed[one])


def test_unwritten_memory_is_never_read(monkeypatch):
    """Every buffer starts as NaN."""
    if not INTERPRETED:
        pytest.skip("fills CPU memory")
    inputs = make(torch.float32)
    expected = [norms(*inputs), packed_norms(*inputs)]
    new_empty = torch.Tensor.new_empty

    def nan_filled(self, *size, **options):
        out = new_empty(self, *size, **options)
        return out.fill_(torch.nan) if out.is_floating_point() else out

    monkeypatch.setattr(torch.Tensor, "new_empty", nan_filled)
    for gram in (True, False):
        choose(monkeypatch, gram)
        for result, value in zip((norms(*inputs), packed_norms(*inputs)), expected, strict=True):
            torch.testing.assert_close(result, value, rtol=1e-5, atol=0)


def test_the_choice():
    """Grams for a response of 2048 tokens at H = 4096, the gradient's tiles for one of 8192."""
    tiles = tuning.NORM_GRAM["sm90", "half"]
    assert head_norms.gram_is_cheaper(2048, 151936, 4096, tiles)
    assert head_norms.gram_is_cheaper(512, 151936, 1024, tiles)
    assert not head_norms.gram_is_cheaper(8192, 151936, 4096, tiles)
    assert not head_norms.gram_is_cheaper(1, 151936, 64, tiles)
    # one sequence's grams beyond the workspace
    assert not head_norms.gram_is_cheaper(16384, 151936, 1 << 20, tiles)
