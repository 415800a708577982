import numpy as np
import pytest
import torch
from training import example_rows
from vcore_train.examples import Examples, ExampleStream, numbered_examples


def test_an_example_longer_than_the_window():
    rows = [*example_rows(5), {"input_ids": [5] * 70, "labels": [5] * 70}]
    with pytest.raises(ValueError, match=r"example 5 has 70 tokens.* window of 64.*max_length=64"):
        numbered_examples(rows, None, 64)
    assert len(numbered_examples(rows, 64, 64)[5]["input_ids"]) == 64
    with pytest.raises(ValueError, match=r"max_length=65 is more than the model's window of 64"):
        numbered_examples(rows, 65, 64)


def test_examples_without_supervision_are_left_out():
    empty = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    first_only = {"input_ids": [5, 6, 7], "labels": [5, -100, -100]}
    examples = numbered_examples([empty, *example_rows(2), first_only], None, None)
    assert examples.skipped == 2
    assert [row["example_index"] for row in examples] == [1, 2]
    with pytest.raises(ValueError, match=r"none of its 1 examples has a supervised token"):
        numbered_examples([empty], None, None)


def test_a_response_that_is_cut_off_is_left_out():
    rows = [{"input_ids": [5] * 6, "labels": [-100] * 4 + [5] * 2}, *example_rows(1, prompt=1)]
    examples = numbered_examples(rows, 4, None)
    assert examples.skipped == 1
    assert len(examples[0]["labels"]) == 4


def test_rows_with_missing_or_uneven_columns():
    with pytest.raises(ValueError, match=r"example 1 has no 'labels', only input_ids"):
        numbered_examples([*example_rows(1), {"input_ids": [4, 5]}], None, None)
    with pytest.raises(ValueError, match=r"example 0 differ in length: .*'labels': 3"):
        numbered_examples([{"input_ids": [4, 5], "labels": [4, 5, 6]}], None, None)


def test_masked_tokens_are_dropped():
    row = {
        "input_ids": torch.tensor([0, 4, 5, 6]),
        "labels": [-100, 4, 5, 6],
        "attention_mask": [0, 1, 1, 1],
        "text": "not for the trainer",
    }
    assert numbered_examples([row], None, None)[0] == {
        "input_ids": [4, 5, 6],
        "labels": [4, 5, 6],
        "example_index": 0,
    }


def test_datasets_of_the_datasets_library():
    import datasets

    rows = example_rows(4)
    examples = numbered_examples(datasets.Dataset.from_list(rows), None, None)
    assert isinstance(examples, Examples)
    assert examples[2] == {**rows[2], "example_index": 2}
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    examples = numbered_examples(stream, None, None)
    assert isinstance(examples, ExampleStream)
    assert list(examples)[2] == {**rows[2], "example_index": 2}


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from example_rows(2)
        yield {"input_ids": [5, 6], "labels": [-100, -100]}
        yield {"input_ids": [5] * 70, "labels": [5] * 70}


def test_a_stream_is_checked_as_it_is_read():
    examples = numbered_examples(Stream(), None, 64)
    rows = iter(examples)
    assert [next(rows)["example_index"] for _ in range(2)] == [0, 1]
    with pytest.raises(ValueError, match=r"example 3 has 70 tokens"):
        next(rows)
    assert examples.skipped == 1


@pytest.mark.parametrize(
    ("row", "error", "message"),
    [
        ([4, 5, 6], TypeError, r"example 2 is a list"),
        ({"input_ids": 4, "labels": 4}, ValueError, r"input_ids of example 2 must be a list"),
        ({"input_ids": "abc", "labels": [4] * 3}, ValueError, r"input_ids of example 2 .*'a'"),
        ({"input_ids": [4, 5.5], "labels": [4, 5]}, ValueError, r"example 2 .* got 5\.5"),
        ({"input_ids": [[4, 5]], "labels": [[4, 5]]}, ValueError, r"example 2 .* got \[4, 5\]"),
        ({"input_ids": [4, 61], "labels": [4, 5]}, ValueError, r"input_ids of .* of 61, got 61"),
        ({"input_ids": [4, -1], "labels": [4, 5]}, ValueError, r"input_ids of .* got -1"),
        ({"input_ids": [4, 5], "labels": [4, 99]}, ValueError, r"labels of example 2 .* got 99"),
        ({"input_ids": [4, 5], "labels": [4, -1]}, ValueError, r"labels of example 2 .* got -1"),
        ({"input_ids": [4, 5], "labels": [4, None]}, ValueError, r"labels of .* got None"),
    ],
    ids=str,
)
def test_bad_rows_are_named(row, error, message):
    with pytest.raises(error, match=message):
        numbered_examples([*example_rows(2), row], None, None, 61)


def test_whole_numbers_of_any_library():
    rows = [
        {"input_ids": np.array([4, 5]), "labels": torch.tensor([-100, 5])},
        {"input_ids": [np.int64(4), np.int32(5)], "labels": (np.int64(-100), 5)},
    ]
    for row in numbered_examples(rows, None, None, 61):
        assert row["input_ids"] == [4, 5]
        assert row["labels"] == [-100, 5]


def test_every_row_of_a_prediction_is_kept():
    unlabelled = [{"input_ids": [4, 5]}, {"input_ids": [6]}]
    assert len(numbered_examples(unlabelled, None, None, every=True)) == 2
    unsupervised = [*example_rows(1), {"input_ids": [4, 5], "labels": [-100, -100]}]
    assert numbered_examples(unsupervised, None, None, every=True).skipped == 0
    with pytest.raises(ValueError, match=r"example 1 has no 'labels'"):
        numbered_examples([*example_rows(1), *unlabelled], None, None, every=True)
    with pytest.raises(ValueError, match=r"example 2 has labels, and the first has none"):
        numbered_examples([*unlabelled, *example_rows(1)], None, None, every=True)
