import pytest
import torch
from properties import given, settings, st

from vcore_kernels import random_supervision


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@given(st.integers(1, 6), st.integers(0, 40), st.floats(0, 1), st.booleans(), st.integers(0, 10**6))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_each_trajectory_keeps_its_share(rows, length, keep, with_answer, seed):
    mask = torch.rand(rows, length, generator=seeded(seed)) < 0.8
    always = torch.rand(rows, length, generator=seeded(seed + 1)) < 0.2 if with_answer else None
    kept = random_supervision(mask, keep, always=always, generator=seeded(seed))
    assert kept.dtype == torch.bool
    assert not (kept & ~mask).any()
    for i in range(rows):
        n = int(mask[i].sum())
        wanted = round(keep * n) if keep == 0 else min(n, max(1, round(keep * n)))
        answer = torch.zeros_like(mask[i]) if always is None else always[i] & mask[i]
        assert (kept[i] | ~answer).all()
        assert int(kept[i].sum()) == max(wanted, int(answer.sum()))


def test_every_token_is_as_likely():
    mask = torch.ones(20_000, 10, dtype=torch.bool)
    rate = random_supervision(mask, 0.3, generator=seeded()).double().mean(0)
    torch.testing.assert_close(rate, torch.full((10,), 0.3).double(), rtol=0, atol=0.02)


def test_packed_equals_padded_counts():
    cu_seqlens = torch.tensor([0, 10, 10, 30, 35], dtype=torch.int32)
    mask = torch.ones(35, dtype=torch.int64)
    kept = random_supervision(mask, 0.2, cu_seqlens=cu_seqlens, generator=seeded())
    assert [int(part.sum()) for part in kept.split([10, 0, 20, 5])] == [2, 0, 4, 1]


def test_a_generator_makes_it_repeatable():
    mask = torch.ones(3, 50, dtype=torch.bool)
    one, again, other = (random_supervision(mask, 0.5, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert mask.all()


@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0)])
def test_empty(shape):
    assert random_supervision(torch.zeros(shape, dtype=torch.bool), 0.2).shape == shape


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"keep": 1.5}, ValueError, "keep must be a share between 0 and 1, got 1.5"),
        ({"keep": float("nan")}, ValueError, "keep must be a share"),
        ({"mask": torch.ones(2, 3)}, TypeError, "mask must be bool or integer"),
        ({"mask": None}, TypeError, "mask must be a tensor, got None"),
        ({"always": torch.ones(3, 2).bool()}, ValueError, "always has shape"),
        ({"cu_seqlens": torch.tensor([0, 6])}, ValueError, "packed"),
    ],
)
def test_bad_arguments(kwargs, error, message):
    arguments = {"mask": torch.ones(2, 3, dtype=torch.bool), "keep": 0.2, **kwargs}
    with pytest.raises(error, match=f"random_supervision: .*{message}"):
        random_supervision(**arguments)
