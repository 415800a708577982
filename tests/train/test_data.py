import json

import pytest
from transformers import AutoTokenizer
from vcore_train.data import encode, prompt_tokens, read_examples
from vcore_train.modeling import IGNORE_INDEX
from vcore_train.tokenizer import END, SMALLEST_VOCABULARY, train_tokenizer

TEXTS = ["What is 17 + 5?", "17 + 5 = 22", "Ana has 3 apples.", "naïve — 数"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, vocab_size=300)


def write(path, *rows):
    path.write_text(
        "".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows)
    )
    return path


@pytest.mark.parametrize(
    ("row", "prompt", "response"),
    [
        ({"question": "q", "answer": "a"}, "q", "a"),
        ({"prompt": "q", "response": "a", "id": 7}, "q", "a"),
        ({"prompt": "q", "completion": "a"}, "q", "a"),
        ({"instruction": "do", "input": "this", "output": "a"}, "do\nthis", "a"),
        ({"instruction": "do", "input": "", "output": "a"}, "do", "a"),
        ({"problem": "q", "solution": "a", "answer": "7"}, "q", "a"),
        # The columns of nvidia/OpenMathReasoning.
        (
            {
                "expected_answer": "7",
                "problem_type": "has_answer_extracted",
                "problem_source": "aops_c4_high_school_math",
                "generation_model": "DeepSeek-R1",
                "pass_rate_72b_tir": "0.5",
                "problem": "q",
                "generated_solution": "a",
                "inference_mode": "cot",
                "used_in_kaggle": True,
            },
            "q",
            "a",
        ),
        (
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            [{"role": "user", "content": "q"}],
            "a",
        ),
        (
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            [{"role": "user", "content": "q"}],
            "a",
        ),
        (
            {
                "prompt": [{"role": "user", "content": "q"}],
                "completion": [{"role": "assistant", "content": "a"}],
            },
            [{"role": "user", "content": "q"}],
            "a",
        ),
    ],
)
def test_fields_are_recognised(tmp_path, row, prompt, response):
    (example,), skipped = read_examples(write(tmp_path / "x.jsonl", row))
    assert (example.prompt, example.response, skipped) == (prompt, response, 0)


def test_named_fields_win(tmp_path):
    path = write(tmp_path / "x.jsonl", {"question": "q", "answer": "a", "long": "b"})
    (example,), _ = read_examples(path, response_field="long")
    assert (example.prompt, example.response) == ("q", "b")


def test_blank_lines_byte_order_mark_and_limit(tmp_path):
    path = tmp_path / "x.jsonl"
    row = json.dumps({"question": "q", "answer": "a"})
    path.write_bytes(b"\xef\xbb\xbf" + f"{row}\n\n{row}\n{row}".encode())
    examples, _ = read_examples(path)
    assert [example.where for example in examples] == [f"{path}, row {n}" for n in (1, 3, 4)]
    assert len(read_examples(path, limit=2)[0]) == 2


GOOD = {"question": "q", "answer": "a"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD, {"question": "q", "text": "x"}],
            r"row 2: the response field 'answer' is missing; ",
        ),
        ([GOOD, {"question": "q", "text": "x"}], r"the row has 'question', 'text'"),
        ([GOOD, {"answer": "a"}], r"row 2: the prompt field 'question' is missing"),
        ([{"a": 1}], r"row 1: no field looks like the prompt; the row has 'a'\. .*--prompt-field"),
        ([{"question": "q"}], r"row 1: no field looks like the response"),
        ([{}], r"row 1: no field looks like the prompt; the row has no fields"),
        ([GOOD, {"question": "q", "answer": " \n"}], r"row 2: the response .*'answer'.* is empty"),
        ([GOOD, {"question": "q", "answer": 7}], r"row 2: field 'answer' is int, expected text"),
        ([GOOD, GOOD, '{"question": "q" "x"'], r"row 3: not valid JSON .*column 18"),
        ([GOOD, "[1, 2]"], r"row 2: holds a JSON list"),
        ([], r"no rows"),
        ([{"messages": [{"role": "user", "content": "q"}]}], r"row 1: a conversation must end"),
        ([{"messages": "hello"}], r"row 1: expected a list of turns"),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=message) as raised:
        read_examples(path)
    assert str(path) in str(raised.value)


def test_empty_responses_can_be_skipped(tmp_path):
    path = write(tmp_path / "x.jsonl", GOOD, {"question": "q", "answer": ""}, GOOD)
    examples, skipped = read_examples(path, empty="skip")
    assert (len(examples), skipped) == (2, 1)
    with pytest.raises(ValueError, match="'error' or 'skip'"):
        read_examples(path, empty="maybe")


def test_not_text_and_not_there(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"question": "\xff", "answer": "a"}\n')
    with pytest.raises(ValueError, match="row 1: not UTF-8"):
        read_examples(path)
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read_examples(tmp_path / "none.jsonl")


def test_tables_and_saved_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    rows = [{"question": f"q{i}", "answer": f"a{i}"} for i in range(3)]
    table = datasets.Dataset.from_list(rows)
    table.to_csv(tmp_path / "x.csv")
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    (tmp_path / "folder").mkdir()
    write(tmp_path / "folder" / "train.jsonl", *rows)
    for name in ("x.csv", "x.parquet", "saved", "splits", "folder"):
        examples, _ = read_examples(tmp_path / name)
        assert [example.response for example in examples] == ["a0", "a1", "a2"]
        assert examples[1].where.endswith(f"{name}, row 2")
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        read_examples(tmp_path / "splits", split="dev")


def test_labels_cover_the_response_and_its_end(tokenizer, tmp_path):
    path = write(tmp_path / "x.jsonl", {"question": "What is 17 + 5?", "answer": "17 + 5 = 22"})
    encoded = encode(read_examples(path)[0], tokenizer, max_length=100)
    (row,) = encoded.rows
    supervised = [label for label in row["labels"] if label != IGNORE_INDEX]
    prompt = row["input_ids"][: len(row["input_ids"]) - len(supervised)]
    assert tokenizer.decode(prompt) == "What is 17 + 5?\n"
    assert tokenizer.decode(supervised) == "17 + 5 = 22" + END
    assert row["input_ids"] == prompt + supervised
    assert encoded.tokens == len(row["input_ids"])
    assert encoded.supervised_tokens == len(supervised)


def test_answer_mask_marks_the_final_answer(tokenizer, tmp_path):
    rows = [{"question": "q", "answer": "3 + 4 = 7\n#### 7"}, {"question": "q", "answer": "7"}]
    encoded = encode(read_examples(write(tmp_path / "x.jsonl", *rows))[0], tokenizer, max_length=99)
    first, second = encoded.rows
    kept = [i for i, m in zip(first["input_ids"], first["answer_mask"], strict=True) if m]
    assert tokenizer.decode(kept) == "#### 7" + END
    assert set(second["answer_mask"]) == {0}
    assert len(second["answer_mask"]) == len(second["input_ids"])


def test_chat_template_is_used_where_there_is_one(tokenizer, tmp_path):
    chatty = train_tokenizer(TEXTS, vocab_size=300)
    chatty.chat_template = (
        "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )
    turns = [{"role": "system", "content": "s"}, {"role": "user", "content": "q"}]
    assert [chatty.decode(ids) for ids in prompt_tokens(["q", turns], chatty)] == [
        "[user]q[assistant]",
        "[system]s[user]q[assistant]",
    ]
    assert [tokenizer.decode(ids) for ids in prompt_tokens([turns], tokenizer)] == ["s\nq\n"]


def test_rows_longer_than_the_window(tokenizer, tmp_path):
    long = {"question": "q", "answer": "1 " * 50}
    huge = {"question": "2 " * 50, "answer": "a"}
    path = write(tmp_path / "x.jsonl", GOOD, long, huge)
    examples, _ = read_examples(path)
    with pytest.raises(ValueError, match=r"x\.jsonl, row 2: the trajectory has 103 tokens, 20 fit"):
        encode(examples, tokenizer, max_length=20)
    cut = encode(examples, tokenizer, max_length=20, too_long="truncate")
    assert (len(cut.rows), cut.skipped, cut.truncated) == (2, 1, 1)
    assert len(cut.rows[1]["input_ids"]) == len(cut.rows[1]["labels"]) == 20
    assert tokenizer.eos_token_id not in cut.rows[1]["input_ids"]
    left = encode(examples, tokenizer, max_length=20, too_long="skip")
    assert (len(left.rows), left.skipped, left.truncated) == (1, 2, 0)
    with pytest.raises(ValueError, match="none of the rows fits"):
        encode(examples[1:], tokenizer, max_length=20, too_long="skip")


def test_trained_tokenizer_round_trips_and_reloads(tokenizer, tmp_path):
    assert len(tokenizer) <= 300
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    for text in [*TEXTS, "unseen: \t żółć 1,234\n\n ", "👍"]:
        ids = tokenizer(text)["input_ids"]
        assert again(text)["input_ids"] == ids
        assert again.decode(ids) == text
    assert again.eos_token == END
    assert again.pad_token_id not in (None, again.eos_token_id)
    assert len(tokenizer("1234")["input_ids"]) == 4
    with pytest.raises(ValueError, match=str(SMALLEST_VOCABULARY)):
        train_tokenizer(TEXTS, vocab_size=100)


@pytest.mark.parametrize("field", ["prompt", "response"])
def test_half_a_surrogate_pair_is_named(tmp_path, field):
    path = tmp_path / "data.jsonl"
    row = {"prompt": "p", "response": "r"}
    broken = {**row, field: "ab\ud800"}
    path.write_text(f"{json.dumps(row)}\n{json.dumps(broken)}\n")
    with pytest.raises(ValueError, match=rf"data.jsonl, row 2: field '{field}' holds \\ud800 at"):
        read_examples(path)
