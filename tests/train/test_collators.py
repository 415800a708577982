import torch
from vcore_train.collators import PackingCollator, PaddingCollator, model_inputs


def test_padding_collator():
    rows = [{"input_ids": [4, 5, 6], "labels": [-100, 5, 6]}, {"input_ids": [7], "labels": [7]}]
    batch = PaddingCollator(pad_token_id=9, pad_to_multiple_of=4)(rows)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 9], [7, 9, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100], [7, -100, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0]]


def test_packing_collator():
    rows = [{"input_ids": [4, 5, 6], "labels": [4, 5, 6]}, {"input_ids": [7, 8], "labels": [7, 8]}]
    batch = PackingCollator()(rows)
    assert batch["input_ids"].tolist() == [[4, 5, 6, 7, 8]]
    assert batch["labels"].tolist() == [[-100, 5, 6, -100, 8]]
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5]
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["max_length_q"] == 3


def test_trainer_keys_are_carried_and_kept_from_the_model():
    rows = [
        {"input_ids": [4, 5], "labels": [4, 5], "answer_mask": [0, 1], "example_index": 7},
        {"input_ids": [6], "labels": [6], "answer_mask": [1], "example_index": 3},
    ]
    for collator, answers in (
        (PaddingCollator(), [[0, 1], [1, 0]]),
        (PackingCollator(), [[0, 1, 1]]),
    ):
        batch = collator(rows)
        assert batch["example_index"].tolist() == [7, 3]
        assert batch["answer_mask"].tolist() == answers
        assert not {"example_index", "answer_mask"} & model_inputs(batch).keys()
