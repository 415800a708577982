"""What only the Triton kernel of gibbs_variance has: tiles, launches, a last program."""

import math

import pytest
import torch

from vcore_kernels import _gibbs
from vcore_kernels.backends.triton import INTERPRETED

if not (INTERPRETED or torch.cuda.is_available()):
    pytest.skip("needs TRITON_INTERPRET=1 or a CUDA device", allow_module_level=True)

from vcore_kernels.triton import common, gibbs, tuning

pytestmark = pytest.mark.interpreter if INTERPRETED else pytest.mark.gpu
DEVICE = "cpu" if INTERPRETED else "cuda"
RULES = [("tau", 2.0), ("trajectory", 0.3), ("trajectory", 1e-6), ("batch", 0.2)]


def ragged(dtype=torch.float32, lengths=(70, 0, 1, 16, 17, 33, 5)):
    torch.manual_seed(0)
    utility = torch.randn(sum(lengths), dtype=torch.float64).to(DEVICE, dtype)
    mask = (torch.rand(sum(lengths)) < 0.8).to(DEVICE)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], device=DEVICE)
    return utility, mask, offsets


@pytest.fixture
def short_tiles(monkeypatch):
    """Tiles of 16 tokens, so that segments take several."""
    for key in tuning.GIBBS:
        monkeypatch.setitem(tuning.GIBBS, key, tuning.Gibbs(16, 1, 1))


@pytest.mark.parametrize(("rule", "value"), RULES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("masked", [True, False])
def test_segments_longer_than_a_tile(short_tiles, rule, value, dtype, masked):
    utility, mask, offsets = ragged(dtype)
    utility[-2] = math.inf if masked and mask[-2] else utility[-2]
    args = utility, mask if masked else None, offsets, value, rule, 1e-6
    expected, result = _gibbs.reference(*args), gibbs.gibbs_variance(*args)
    # a budget is met to 1e-9 of itself in float64: tau may differ by more
    rtol, atol = (1e-7, 1e-8) if dtype == torch.float64 else (2e-4, 2e-6)
    for one, other in zip(expected, result, strict=True):
        torch.testing.assert_close(other, one, rtol=rtol, atol=atol)


@pytest.mark.parametrize(("rule", "value"), RULES)
def test_every_output_is_written_and_runs_agree(monkeypatch, rule, value):
    utility, mask, offsets = ragged()
    empty = torch.empty_like

    def full_of_nan(tensor):
        return empty(tensor).fill_(math.nan)

    once = gibbs.gibbs_variance(utility, mask, offsets, value, rule, 1e-6)
    monkeypatch.setattr(torch, "empty_like", full_of_nan)
    new = torch.Tensor.new_empty

    def new_full_of_nan(tensor, *args, **options):
        made = new(tensor, *args, **options)
        return made.fill_(math.nan) if made.is_floating_point() else made.fill_(True)

    monkeypatch.setattr(torch.Tensor, "new_empty", new_full_of_nan)
    again = gibbs.gibbs_variance(utility, mask, offsets, value, rule, 1e-6)
    assert all(x.isfinite().all() for x in again)
    assert all(map(torch.equal, once, again))


@pytest.mark.parametrize(("rule", "value"), RULES[:3])
def test_a_segment_alone_is_the_same_to_the_last_bit(rule, value):
    utility, mask, offsets = ragged()
    q, weight, stats, flags, _ = gibbs.gibbs_variance(utility, mask, offsets, value, rule, 1e-6)
    for i, (a, b) in enumerate(zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)):
        alone = gibbs.gibbs_variance(
            utility[a:b], mask[a:b], torch.tensor([0, b - a], device=DEVICE), value, rule, 1e-6
        )
        together = q[a:b], weight[a:b], stats[:, i : i + 1], flags[:, i : i + 1]
        assert all(map(torch.equal, alone[:4], together))


def test_more_segments_than_are_combined_at_a_time():
    utility, mask, offsets = ragged(lengths=(3, 2) * 150)
    args = utility, mask, offsets, 0.1, "trajectory", 1e-6
    expected, result = _gibbs.reference(*args), gibbs.gibbs_variance(*args)
    torch.testing.assert_close(result[4], expected[4], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("rule", "launches"), [("tau", 1), ("trajectory", 1), ("batch", 2 + gibbs.BATCH_STEPS)]
)
def test_number_of_launches(monkeypatch, rule, launches):
    monkeypatch.setattr(common, "recorded", [])
    gibbs.gibbs_variance(*ragged(), 0.1, rule, 1e-6)
    assert len(common.recorded) == launches


def test_refuses_nonsense():
    utility, mask, offsets = ragged()
    with pytest.raises(ValueError, match="rule must be"):
        gibbs.gibbs_variance(utility, mask, offsets, 0.1, "other", 1e-6)
    with pytest.raises(TypeError, match="float32 or float64"):
        gibbs.gibbs_variance(utility.half(), mask, offsets, 0.1, "tau", 1e-6)
    with pytest.raises(TypeError, match="mask must be bool"):
        gibbs.gibbs_variance(utility, utility, offsets, 0.1, "tau", 1e-6)
    with pytest.raises(TypeError, match="offsets must be int64"):
        gibbs.gibbs_variance(utility, mask, offsets.int(), 0.1, "tau", 1e-6)
