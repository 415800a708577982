import pytest
import torch
from properties import given, settings, st

from vcore_kernels.segments import make_segments, segment_max, segment_sum


def test_rows_of_a_padded_batch():
    mask = torch.tensor([[1, 0, 1], [0, 0, 0]])
    segments = make_segments("op", torch.zeros(2, 3), mask)
    assert segments.offsets.tolist() == [0, 3, 6]
    assert segments.number == 2
    assert segments.segment_of().tolist() == [0, 0, 0, 1, 1, 1]
    assert segments.valid().tolist() == [True, False, True, False, False, False]


def test_one_row_is_one_segment():
    segments = make_segments("op", torch.zeros(4))
    assert segments.offsets.tolist() == [0, 4]
    assert segments.mask is None
    assert segments.valid().tolist() == [True] * 4


@pytest.mark.parametrize("shape", [(5,), (1, 5)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_packed_with_empty_segments(shape, dtype):
    cu_seqlens = torch.tensor([0, 0, 2, 2, 5, 5], dtype=dtype)
    segments = make_segments("op", torch.zeros(shape), None, cu_seqlens)
    assert segments.number == 5
    assert segments.segment_of().tolist() == [1, 1, 3, 3, 3]


@pytest.mark.parametrize(
    ("shape", "cu_seqlens", "number"),
    [((0, 4), None, 0), ((3, 0), None, 3), ((0,), None, 1), ((0,), [0], 0), ((0,), [0, 0, 0], 2)],
)
def test_nothing_at_all(shape, cu_seqlens, number):
    if cu_seqlens is not None:
        cu_seqlens = torch.tensor(cu_seqlens, dtype=torch.int32)
    segments = make_segments("op", torch.zeros(shape), None, cu_seqlens)
    assert segments.number == number
    assert segments.segment_of().shape == segments.valid().shape == (0,)


@given(st.lists(st.integers(0, 6), max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_reductions_agree_with_python(lengths, random):
    values = torch.tensor([random.uniform(-9, 9) for _ in range(sum(lengths))], dtype=torch.float64)
    cu_seqlens = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=torch.int32)
    segments = make_segments("op", values, None, cu_seqlens)
    index = segments.segment_of()
    parts = values.split(lengths) if lengths else ()
    sums = torch.tensor([float(part.sum()) for part in parts], dtype=torch.float64)
    highs = torch.tensor(
        [float(part.max()) if len(part) else -torch.inf for part in parts], dtype=torch.float64
    )
    torch.testing.assert_close(segment_sum(values, index, segments.number), sums)
    assert torch.equal(segment_max(values, index, segments.number), highs)


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        ({"mask": torch.ones(2, 4)}, TypeError, "bool or integer, got torch.float32"),
        ({"mask": torch.ones(2, 3, dtype=torch.bool)}, ValueError, r"\[2, 3\], expected \[2, 4\]"),
        ({"mask": [[1, 1, 1, 1]]}, TypeError, "mask must be a tensor, got list"),
        ({"cu_seqlens": torch.tensor([0, 8])}, ValueError, "packed"),
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool, device="meta")},
            ValueError,
            "mask is on meta",
        ),
    ],
)
def test_bad_padded_input(kwargs, error, message):
    with pytest.raises(error, match=f"^caller: .*{message}"):
        make_segments("caller", torch.zeros(2, 4), **kwargs)


@pytest.mark.parametrize(
    ("cu_seqlens", "error", "message"),
    [
        (torch.tensor([0, 3, 2, 8]), ValueError, "increasing, got 3 then 2 at position 2"),
        (torch.tensor([1, 8]), ValueError, "start at 0, got 1"),
        (torch.tensor([0, 4]), ValueError, "packed tokens, 8, got 4"),
        (torch.tensor([0, 9]), ValueError, "packed tokens, 8, got 9"),
        (torch.tensor([], dtype=torch.int32), ValueError, r"got shape \[0\]"),
        (torch.tensor([[0, 8]]), ValueError, r"got shape \[1, 2\]"),
        (torch.tensor([0.0, 8.0]), TypeError, "int32 tensor, got torch.float32"),
        ([0, 8], TypeError, "int32 tensor, got list"),
        (torch.tensor([0, 8], device="meta"), ValueError, "cu_seqlens is on meta"),
    ],
)
def test_bad_cu_seqlens(cu_seqlens, error, message):
    with pytest.raises(error, match=f"^caller: .*{message}"):
        make_segments("caller", torch.zeros(8), None, cu_seqlens)


@pytest.mark.parametrize("shape", [(), (2, 2, 2)])
def test_bad_shape(shape):
    with pytest.raises(ValueError, match=r"caller: expected \[B, T\]"):
        make_segments("caller", torch.zeros(shape))
