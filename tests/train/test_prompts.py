import json
from pathlib import Path

import pytest
from vcore_train.prompts import read_prompts

GSM8K = Path(__file__).parents[2].parent / "shared" / "data" / "gsm8k" / "train.jsonl"
BOXED = r"First $2 \cdot 2 = \boxed{4}$, then $4 + \frac{1}{2} = \boxed{\frac{9}{2}}$."
UNMARKED = "Both sides are even."
GOOD = {"question": "q", "answer": "3 + 4 = 7\n#### 7"}


def user(text="q"):
    return {"role": "user", "content": text}


def assistant(text="So #### 7"):
    return {"role": "assistant", "content": text}


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def read_one(tmp_path, row, **options):
    (prompt,), skipped = read_prompts(write(tmp_path / "x.jsonl", row), **options)
    assert skipped == 0
    assert prompt.where == f"{tmp_path / 'x.jsonl'}, row 1"
    return prompt.prompt, prompt.answer


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        pytest.param(GOOD, "q", "7", id="GSM8K"),
        pytest.param({"problem": "q", "solution": BOXED}, "q", r"\frac{9}{2}", id="MATH"),
        pytest.param(
            {"problem": "q", "solution": BOXED, "answer": "4.5"}, "q", "4.5", id="MATH-500"
        ),
        pytest.param(
            {"problem": "q", "solution": BOXED, "messages": [user("p"), assistant()]},
            "q",
            r"\frac{9}{2}",
            id="NuminaMath-CoT",
        ),
        pytest.param(
            {"prompt": [user()], "reward_model": {"style": "rule", "ground_truth": "34"}},
            [user()],
            "34",
            id="verl",
        ),
        pytest.param({"prompt": [user()], "solution": r"\boxed{3}"}, [user()], "3", id="TRL"),
        pytest.param({"prompt": "q", "ground_truth": "3"}, "q", "3", id="TRL, plain"),
        pytest.param({"prompt": "q", "answer": " 3\n"}, "q", "3", id="prompt and answer"),
        pytest.param({"messages": [user(), assistant()]}, [user()], "7", id="conversation"),
        pytest.param(
            {
                "conversations": [
                    {"from": "human", "value": "q"},
                    {"from": "gpt", "value": "#### 7"},
                ]
            },
            [user()],
            "7",
            id="older conversation",
        ),
        pytest.param({"messages": [user()], "answer": "7"}, [user()], "7", id="turns and answer"),
        pytest.param(
            {"prompt": [user()], "completion": [assistant()]}, [user()], "7", id="completion"
        ),
        pytest.param(
            {"instruction": "do", "input": "this", "target": "3"}, "do\nthis", "3", id="Alpaca"
        ),
        pytest.param({"prompt": "q", "answer": 7}, "q", "7", id="int"),
        pytest.param({"prompt": "q", "answer": 0.5}, "q", "0.5", id="float"),
        pytest.param({"prompt": "q", "answer": "proof"}, "q", "proof", id="not NuminaMath"),
    ],
)
def test_layouts_are_recognised(tmp_path, row, prompt, answer):
    assert read_one(tmp_path, row) == (prompt, answer)


def test_named_fields_win(tmp_path):
    row = {"question": "q", "answer": "a", "other": {"prompt": "p", "deep": {"answer": 5}}}
    assert read_one(tmp_path, row, answer_field="other.deep.answer") == ("q", "5")
    assert read_one(tmp_path, row, prompt_field="other.prompt") == ("p", "a")
    assert read_one(tmp_path, {**row, "x.y": "b"}, answer_field="x.y") == ("q", "b")
    solved = {"problem": "q", "solution": "12"}
    assert read_one(tmp_path, solved, answer_field="solution") == ("q", "12")
    turns = {"messages": [user(), assistant()], "answer": "8"}
    assert read_one(tmp_path, turns, answer_field="messages") == ([user()], "7")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q"}, r"field 'answer' is missing or null; the row has 'question'"),
        ({"question": "q", "answer": None}, r"field 'answer' is missing or null; .*'answer'"),
        ({"question": "q", "answer": " \n"}, r"field 'answer' is ' \\n'"),
        ({"question": "q", "answer": float("nan")}, r"field 'answer' is 'nan'"),
        (
            {"question": "q", "answer": "3 + 4 = 7\n#### "},
            r"field 'answer' is '3 \+ 4 = 7\\n#### '",
        ),
        ({"question": "q", "answer": r"so \boxed{3"}, r"field 'answer' is 'so .*'"),
    ],
)
def test_unanswered_rows_are_named_or_counted(tmp_path, row, message):
    path = write(tmp_path / "x.jsonl", GOOD, GOOD, row, GOOD)
    mend = r"\. Remove the row, skip such rows with --unanswered skip, or .*--answer-field"
    with pytest.raises(ValueError, match=rf"x\.jsonl, row 3: no reference.*{message}{mend}"):
        read_prompts(path)
    prompts, skipped = read_prompts(path, unanswered="skip")
    assert ([prompt.answer for prompt in prompts], skipped) == (["7"] * 3, 1)


def test_solutions_without_a_marked_answer_are_unanswered(tmp_path):
    rows = [{"problem": "q", "solution": text} for text in (BOXED, UNMARKED)]
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(
        ValueError, match=r"row 2: .*field 'solution' marks none with #### or \\boxed"
    ):
        read_prompts(path)
    assert len(read_prompts(path, unanswered="skip")[0]) == 1
    turns = write(tmp_path / "turns.jsonl", {"messages": [user(), assistant(UNMARKED)]})
    with pytest.raises(ValueError, match=r"row 1: .*field 'messages' marks none"):
        read_prompts(turns)


def test_what_numina_math_leaves_unanswered(tmp_path):
    rows = [{"problem": "q", "solution": BOXED, "answer": a} for a in ("5", "proof", "notfound")]
    path = write(tmp_path / "x.jsonl", *rows)
    with pytest.raises(ValueError, match=r"row 2: no reference answer: field 'answer' is 'proof'"):
        read_prompts(path)
    prompts, skipped = read_prompts(path, unanswered="skip")
    assert ([prompt.answer for prompt in prompts], skipped) == (["5"], 2)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [GOOD, GOOD, {"answer": "a"}],
            r"row 3: the prompt field 'question' is missing; .*'answer'",
        ),
        ([GOOD, {**GOOD, "question": None}], r"row 2: the prompt field 'question' is missing"),
        ([GOOD, {**GOOD, "question": 7}], r"row 2: field 'question' is int, expected text"),
        ([GOOD, {**GOOD, "answer": True}], r"row 2: field 'answer' is bool, .* text or a number"),
        ([GOOD, {**GOOD, "answer": {}}], r"row 2: field 'answer' is dict, .* text or a number"),
        ([GOOD, {**GOOD, "answer": ["7"]}], r"row 2: expected a list of turns, .* field 'answer'"),
        ([GOOD, {**GOOD, "question": "a\ud800"}], r"row 2: field 'question' holds \\ud800 at"),
        ([GOOD, {**GOOD, "answer": "#### \udfff"}], r"row 2: field 'answer' holds \\udfff at"),
        ([{"text": "q"}], r"row 1: no field looks like the prompt; .*'text'\. .*--prompt-field"),
        ([{"question": "q", "id": 1}], r"row 1: no field looks like the answer; .*--answer-field"),
        (
            [{"question": "q", "reward_model": {"style": "x"}}],
            r"row 1: .*'reward_model\.style'\. N",
        ),
        ([], r"no prompts with a reference answer \(0 without one\)"),
        (
            [{"prompt": [user(), assistant("a")], "answer": "7"}],
            r"row 1: the conversation 'prompt' ends with an assistant .*--answer-field prompt",
        ),
        (
            [{"messages": [user(), user()]}],
            r"row 1: a conversation must end with an assistant turn",
        ),
        ([{"messages": [assistant()]}], r"row 1: a conversation must end with an assistant turn"),
        (
            [{"prompt": "q", "completion": [user()]}],
            r"row 1: .*'completion' .*role 'user', expected",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path, rows, message):
    path = write(tmp_path / "bad.jsonl", *rows)
    with pytest.raises(ValueError, match=message) as raised:
        read_prompts(path, unanswered="skip")
    assert str(path) in str(raised.value)


def test_dotted_names_that_lead_nowhere(tmp_path):
    row = {"prompt": "q", "reward_model": {"ground_truth": "3"}, "id": 1}
    path = write(tmp_path / "x.jsonl", row)
    listed = r"is missing.*; the row has 'prompt', 'reward_model\.ground_truth', 'id'"
    for name in ("reward_model.truth", "reward_model.ground_truth.x", "id.x", "other.x"):
        with pytest.raises(ValueError, match=rf"row 1: .*field '{name}' {listed}"):
            read_prompts(path, answer_field=name)
        with pytest.raises(ValueError, match=rf"row 1: the prompt field '{name}' {listed}"):
            read_prompts(path, prompt_field=name)
    with pytest.raises(ValueError, match=r"no prompts with a reference answer \(1 without one\)"):
        read_prompts(path, answer_field="none", unanswered="skip")


def test_suffix(tmp_path):
    suffix = "\nPut the final answer in \\boxed{}."
    assert read_one(tmp_path, GOOD, suffix=suffix)[0] == f"q{suffix}"
    system = {"role": "system", "content": "s"}
    turns = [system, user("a"), assistant("b"), user("c"), {"role": "tool", "content": "t"}]
    prompt, _ = read_one(tmp_path, {"prompt": turns, "answer": "7"}, suffix=suffix)
    assert prompt == [*turns[:3], user(f"c{suffix}"), turns[4]]
    assert read_one(tmp_path, {"prompt": turns, "answer": "7"})[0] == turns
    with pytest.raises(ValueError, match=r"row 1: the conversation has no user turn"):
        read_one(tmp_path, {"prompt": [system], "answer": "7"}, suffix=suffix)


def test_limit_counts_all_rows_and_duplicates_are_kept(tmp_path):
    path = write(tmp_path / "x.jsonl", GOOD, {**GOOD, "answer": ""}, GOOD, GOOD, {"bad": "row"})
    prompts, skipped = read_prompts(path, limit=4, unanswered="skip")
    assert ([prompt.prompt for prompt in prompts], skipped) == (["q"] * 3, 1)
    assert [prompt.where for prompt in prompts] == [f"{path}, row {n}" for n in (1, 3, 4)]
    with pytest.raises(ValueError, match="at least 1, got 0"):
        read_prompts(path, limit=0)
    with pytest.raises(ValueError, match="'error' or 'skip', got 'maybe'"):
        read_prompts(path, unanswered="maybe")
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read_prompts(tmp_path / "none.jsonl")


def test_tables_and_saved_datasets(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("vcore_train.data.ROWS_AT_ONCE", 2)
    rows = [
        {"prompt": [user(f"q{i}")], "reward_model": {"ground_truth": str(i), "style": "rule"}}
        for i in range(3)
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_parquet(tmp_path / "x.parquet")
    table.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "splits")
    for name in ("x.parquet", "saved", "splits"):
        prompts, _ = read_prompts(tmp_path / name)
        assert [(p.prompt, p.answer) for p in prompts] == [
            ([user(f"q{i}")], f"{i}") for i in range(3)
        ]
        assert prompts[2].where.endswith(f"{name}, row 3")
        assert read_prompts(tmp_path / name, limit=1)[0] == prompts[:1]
    (tmp_path / "x.csv").write_text("question,answer\nq0,1\nq1,\nq2,3\n")
    prompts, skipped = read_prompts(tmp_path / "x.csv", unanswered="skip")
    assert ([float(prompt.answer) for prompt in prompts], skipped) == ([1, 3], 1)
    with pytest.raises(ValueError, match="no split 'dev'; it has train, test"):
        read_prompts(tmp_path / "splits", split="dev")


@pytest.mark.skipif(not GSM8K.exists(), reason="the shared GSM8K data is not here")
def test_gsm8k():
    prompts, skipped = read_prompts(GSM8K)
    assert (len(prompts), skipped) == (7473, 0)
    numbers = [float(prompt.answer.replace(",", "")) for prompt in prompts]
    assert numbers[:2] == [72, 10]
