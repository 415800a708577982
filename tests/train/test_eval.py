"""``vcore eval``: scores, tasks, results, comparison, and what it refuses."""

import ast
import json
import os

import numpy as np
import pytest
import transformers
from command import vcore
from vcore_train.arithmetic import generate_problems
from vcore_train.evals import compare, results, run, scoring, tasks
from vcore_train.models import Size, new_model
from vcore_train.tokenizer import train_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed")


@pytest.fixture(autouse=True)
def surroundings(monkeypatch):
    """No hub, and no half a minute for what the harness asks about the machine."""
    import lm_eval.evaluator

    before = transformers.utils.logging.get_verbosity()
    monkeypatch.setattr(lm_eval.evaluator, "add_env_info", lambda results: None)
    monkeypatch.delenv("HF_ALLOW_CODE_EVAL", raising=False)
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [text for p in generate_problems(40) for text in (p.prompt, p.response)]
    tokenizer = train_tokenizer(texts, vocab_size=300, window=2048)
    size = Size(layers=1, hidden=32, heads=2, window=2048)
    new_model(size.config(), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def problems(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "problems.jsonl"
    rows = ({"question": p.prompt, "answer": p.response} for p in generate_problems(6))
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def content(out):
    return json.loads((out / "results.json").read_text())


def samples(out, task):
    return [json.loads(line) for line in (out / f"samples_{task}.jsonl").read_text().splitlines()]


def values(out, task):
    return {row["metric"]: row["value"] for row in content(out)["tasks"][task]["metrics"]}


def scripted(answer):
    """A model of the harness that says ``answer(prompt, place)``; its favourite ending is last."""
    from lm_eval.api.model import LM

    class Scripted(LM):
        def __init__(self):
            super().__init__()
            self.prompts = []

        def generate_until(self, requests):
            self.prompts += [request.args[0] for request in requests]
            self.settings = requests[0].args[1]
            return [answer(request.args[0], place) for place, request in enumerate(requests)]

        def loglikelihood(self, requests):
            return [(float(len(request.args[1])), False) for request in requests]

        def loglikelihood_rolling(self, requests):
            raise NotImplementedError

    return Scripted()


@pytest.fixture
def made_rows(monkeypatch):
    """Rows in the columns of the data sets, instead of the hub's."""
    import datasets

    rows = {
        "openai/gsm8k": [
            {"question": "1 + 1?", "answer": "1 and 1 is 2.\n#### 2"},
            {"question": "1 + 2?", "answer": "1 and 2 is 3.\n#### 3"},
        ],
        "HuggingFaceH4/MATH-500": [
            {
                "problem": f"problem {n}",
                "solution": rf"So \boxed{{\frac{{1}}{{{n}}}}}.",
                "answer": rf"\frac{{1}}{{{n}}}",
                "subject": "Algebra",
                "level": 1,
                "unique_id": f"test/{n}.json",
            }
            for n in (2, 4)
        ],
        "Maxwell-Jia/AIME_2024": [
            {"ID": "2024-I-1", "Problem": "p", "Solution": "s", "Answer": 204},
            {"ID": "2024-I-2", "Problem": "q", "Solution": "s", "Answer": 25},
        ],
        "math-ai/aime25": [{"problem": "p", "answer": "70", "id": "0"}],
        "Rowan/hellaswag": [
            {
                "ind": 1,
                "activity_label": "Cooking",
                "ctx_a": "A person cooks.",
                "ctx_b": "they",
                "ctx": "A person cooks. they",
                "endings": ["eat", "sing", "sleep for long", "sit"],
                "source_id": "x",
                "split": "val",
                "split_type": "indomain",
                "label": "2",
            }
        ],
        "ChilleD/StrategyQA": [
            {"qid": "a", "term": "t", "question": "Is ice cold?", "answer": True, "facts": "f"},
            {"qid": "b", "term": "t", "question": "Is fire cold?", "answer": False, "facts": "f"},
        ],
        "SaylorTwift/bbh": [{"input": "not True is", "target": "False"}],
        "evalplus/humanevalplus": [
            {
                "task_id": "HumanEval/0",
                "prompt": "def one():\n",
                "canonical_solution": "    return 1\n",
                "entry_point": "one",
                "test": "def check(f):\n    assert f() == 1\n",
            }
        ],
    }

    def load_dataset(path, name=None, **_):
        if path not in rows:
            raise ConnectionError(f"Couldn't reach {path!r} on the Hub")
        made = datasets.Dataset.from_list(rows[path])
        return datasets.DatasetDict(dict.fromkeys(("train", "validation", "test"), made))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


# ---- scores ----


def test_scores_of_several_responses():
    responses = [r"\boxed{2}", r"\boxed{2.0}", r"\boxed{3}", "nothing"]
    assert scoring.scores_of(responses, [1.0, 1.0, 0.0, 0.0]) == {
        "avg@4": 0.5,
        "maj@4": 1.0,
        "pass@4": 1.0,
    }
    assert scoring.scores_of(["x"], [1.0]) == {"accuracy": 1.0}
    assert scoring.scores_of(["x"], [0.0]) == {"accuracy": 0.0}


def test_the_majority():
    two, three = r"\boxed{2}", r"\boxed{3}"
    assert scoring.majority([two, three, three], [True, False, False]) == 0.0
    assert scoring.majority([two, three], [True, False]) == 0.5  # given equally often
    assert scoring.majority(["a", "b"], [True, False]) == 0.0  # no answer, no vote
    assert scoring.majority(["a", "b", two], [False, False, True]) == 1.0


# ---- tasks ----


def test_the_tasks_are_where_the_table_says():
    for name, benchmark in tasks.BENCHMARKS.items():
        assert benchmark.task in tasks.task_files(benchmark).task_index, name
        entry = tasks.task_files(benchmark).task_index[benchmark.task]
        if benchmark.folder != "bbh/cot_fewshot":
            assert entry.cfg["dataset_path"] == benchmark.dataset
            assert bool(entry.cfg.get("unsafe_code")) == benchmark.runs_code


def test_list_names_all(capsys):
    assert vcore("eval", "--list") == 0
    told = capsys.readouterr().out
    for name, benchmark in tasks.BENCHMARKS.items():
        assert f"{name}  " in told
        assert benchmark.dataset in told
    assert "harness:NAME is the harness' task" in told.replace("\n", " ")


# ---- problems of one's own, on a real model ----


def test_a_model_on_problems_of_ones_own(model, problems, tmp_path, capsys):
    command = ["eval", model, "--data", problems, "--cpu", "--verifier", "exact"]
    command += ["--max-new-tokens", 6, "--batch-size", 4]
    for name in ("a", "b"):
        assert vcore(*command, "--out", tmp_path / name) == 0
    assert "accuracy" in capsys.readouterr().out
    record = content(tmp_path / "a")
    assert record["tasks"]["data"]["problems"] == 6
    assert record["tasks"]["data"]["version"] == "1, vcore 1"
    assert record["tasks"]["data"]["metrics"] == [
        {"metric": "accuracy", "filter": "all", "value": 0.0, "stderr": 0.0}
    ]
    assert record["model"]["name"] == str(model)
    assert record["model"]["parameters"] > 0
    assert record["harness"]["version"] == lm_eval.__version__
    assert record["settings"]["max_new_tokens"] == 6
    assert record["settings"]["seed"] == 1234
    rows = samples(tmp_path / "a", "data")
    assert rows == samples(tmp_path / "b", "data")  # greedy
    assert [row["doc_id"] for row in rows] == list(range(6))
    assert rows[0]["prompt"] == f"{generate_problems(6)[0].prompt}\n"

    assert vcore("eval", "--compare", tmp_path / "a", tmp_path / "b") == 0
    assert "+0.00" in capsys.readouterr().out

    assert vcore(*command, "--out", tmp_path / "a") == 1
    assert "holds the results of an evaluation" in capsys.readouterr().err
    assert vcore(*command, "--out", tmp_path / "a", "--overwrite", "--no-save-samples") == 0
    assert not list((tmp_path / "a").glob("samples_*"))
    capsys.readouterr()
    assert vcore("eval", "--compare", tmp_path / "a", tmp_path / "b") == 1
    assert "Evaluate without --no-save-samples" in capsys.readouterr().err


def test_several_samples_differ_and_the_seed_decides(model, problems, tmp_path):
    command = ["eval", model, "--data", problems, "--cpu", "--verifier", "exact", "--limit", 2]
    command += ["--max-new-tokens", 6, "--samples", 3, "--temperature", 1]
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert vcore(*command, "--seed", seed, "--out", tmp_path / name) == 0
    a, b, c = ([row["resps"] for row in samples(tmp_path / name, "data")] for name in "abc")
    assert a == b != c
    assert len(a) == 2
    assert len(set(a[0][0])) == 3
    assert set(values(tmp_path / "a", "data")) == {"avg@3", "maj@3", "pass@3"}


def test_a_chat_template_is_used_where_asked_for(model, problems, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = (
        "{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}[assistant]"
    )
    tokenizer.save_pretrained(tmp_path / "chat")
    command = ["eval", model, "--tokenizer", tmp_path / "chat", "--data", problems, "--limit", 1]
    command += ["--cpu", "--verifier", "exact", "--max-new-tokens", 2, "--chat-template"]
    assert vcore(*command, "--out", tmp_path / "out") == 0
    (row,) = samples(tmp_path / "out", "data")
    assert row["prompt"] == f"[user]{generate_problems(1)[0].prompt}[assistant]"


def test_what_vllm_is_told(monkeypatch):
    told = {}

    class Vllm:
        @classmethod
        def create_from_arg_obj(cls, arguments, common):
            told.update(arguments, **common)

    monkeypatch.setattr("lm_eval.api.registry.get_model", {"vllm": Vllm}.__getitem__)
    options = run.EvalOptions(
        model="org/model",
        adapter="org/adapter",
        backend="vllm",
        model_args={"max_model_len": 64},
        seed=3,
    )
    run._model(options)
    assert told == {
        "pretrained": "org/model",
        "lora_local_path": "org/adapter",
        "dtype": "auto",
        "seed": 3,
        "max_model_len": 64,
        "batch_size": "auto",
    }
    # The harness' class cannot be imported without vllm; its source says what it takes.
    source = (tasks.harness_folder().parent / "models" / "vllm_causallms.py").read_text()
    (kind,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.ClassDef) and node.name == "VLLM"
    ]
    begin = next(node for node in kind.body if getattr(node, "name", "") == "__init__")
    assert set(told) <= {argument.arg for argument in begin.args.args}


def test_an_adapter_folder_stands_on_its_model(model, problems, tmp_path):
    from peft import PeftModel

    adapter = tmp_path / "adapter"
    command = ["train", problems, "--model", model, "--lora", "--steps", 1, "--cpu"]
    assert vcore(*command, "--method", "sft", "--out", adapter) == 0
    options = run.EvalOptions(model=str(adapter), data=str(problems), cpu=True)
    assert run._places(options) == (str(model), str(adapter), str(adapter))
    assert isinstance(run._model(options)._model, PeftModel)


# ---- benchmarks, on made rows ----


def test_scores_of_benchmarks(made_rows, monkeypatch, tmp_path, capsys):
    def answer(prompt, place):
        if "Is ice cold?" in prompt.split("Q:")[-1]:
            return " Ice is frozen. The answer is yes."
        if "Is fire cold?" in prompt.split("Q:")[-1]:
            return " The answer is no. No, the answer is Yes."
        if "1 + 1?" in prompt.split("Q:")[-1]:
            return "The answer is 2."
        if "problem 2" in prompt:
            return r"$\boxed{0.5}$"  # text differs, the number does not
        if prompt == "Question: p\nAnswer:":
            return r"\boxed{204}"
        return "the answer is False." if place % 2 else "no idea"

    said = scripted(answer)
    monkeypatch.setattr(run, "_model", lambda options: said)
    names = "gsm8k,math500,aime24,hellaswag,strategyqa,bbh"
    assert vcore("eval", "any", "--tasks", names, "--out", tmp_path / "out") == 0
    found = {task: values(tmp_path / "out", task) for task in content(tmp_path / "out")["tasks"]}
    assert found["gsm8k_cot"]["exact_match"] == 0.5
    assert found["hendrycks_math500"] == {"accuracy": 0.5}
    assert found["aime24"] == {"accuracy": 0.5}
    assert found["hellaswag"]["acc"] == 1.0
    assert found["strategyqa"] == {"exact_match": 0.5}
    assert 0 < found["bbh_cot_fewshot"]["exact_match"] < 1
    strategy = [prompt for prompt in said.prompts if prompt.endswith("Q: Is ice cold?\nA:")]
    assert len(strategy) == 1
    assert strategy[0].count("The answer is") == 4 + 2  # the examples, the instruction
    assert strategy[0].startswith("Answer each question.")
    told = capsys.readouterr().out
    assert "bbh_cot_fewshot_word_sorting" not in told
    assert content(tmp_path / "out")["tasks"]["aime24"]["version"].endswith("vcore 1")
    # The tasks of a group are compared as one.
    (row,) = [
        row
        for row in compare.compare(tmp_path / "out", tmp_path / "out")[0]
        if row.task == "bbh_cot_fewshot"
    ]
    assert (row.problems, row.difference, row.p) == (27, 0.0, 1.0)


def test_several_samples_of_a_benchmark(made_rows, monkeypatch, tmp_path):
    said = scripted(
        lambda prompt, place: [r"\boxed{204}", r"\boxed{7}", "\\boxed{7}", ""][place % 4]
    )
    monkeypatch.setattr(run, "_model", lambda options: said)
    command = ["eval", "any", "--tasks", "aime24", "--samples", 4, "--verifier", "exact"]
    assert vcore(*command, "--limit", 1, "--out", tmp_path / "out") == 0
    assert values(tmp_path / "out", "aime24") == {"avg@4": 0.25, "maj@4": 0.0, "pass@4": 1.0}
    assert said.settings["do_sample"] is True
    assert (said.settings["temperature"], said.settings["top_p"]) == (0.6, 0.95)
    assert said.settings["max_gen_toks"] == 32768


def test_code_runs_only_where_it_may(made_rows, monkeypatch, tmp_path, capsys):
    import evaluate

    ran = []

    class CodeEval:
        def compute(self, references, predictions, k):
            ran.append(os.environ.get("HF_ALLOW_CODE_EVAL"))
            return {f"pass@{k[0]}": float("return 1" in predictions[0][0])}, {}

    monkeypatch.setattr(evaluate, "load", lambda name: CodeEval())
    monkeypatch.setattr(run, "_model", lambda options: scripted(lambda *_: "    return 1\n"))
    command = ["eval", "any", "--tasks", "humaneval_plus", "--out", tmp_path / "out"]
    assert vcore(*command) == 1
    error = capsys.readouterr().err
    assert "runs code that the model has written" in error
    assert "--allow-code-execution" in error
    assert not ran
    assert vcore(*command, "--allow-code-execution") == 0
    assert values(tmp_path / "out", "humaneval_plus") == {"pass@1": 1.0}
    assert set(ran) == {"1"}


# ---- the folder ----


def test_no_file_of_the_users_is_lost(problems, monkeypatch, tmp_path, capsys):
    said = scripted(lambda prompt, place: "4")
    monkeypatch.setattr(run, "_model", lambda options: said)
    out = tmp_path / "x[/b]"  # not markup either
    command = ["eval", "any", "--verifier", "exact", "--out", out]
    assert vcore(*command, "--data", problems, "--limit", 2) == 0
    assert str(out) in capsys.readouterr().out.replace("\n", "")
    task = content(out)["tasks"]["data"]
    assert (task["problems"], task["problems_of_all"]) == (2, 6)
    assert content(out)["format"] == "vcore eval 1"
    own = out / "samples_own.jsonl"
    for data, message in (
        (out / "samples_data.jsonl", "an evaluation would write over it. Choose another --out"),
        (own, "an evaluation would write over it. Choose another --out"),
        (problems, "samples_own.jsonl: no results.json beside it names it"),
    ):
        own.write_text(problems.read_text())
        assert vcore(*command, "--data", data, "--overwrite") == 1
        assert message in capsys.readouterr().err
        assert own.read_text() == problems.read_text()
    assert len(samples(out, "data")) == 2
    own.unlink()
    (out / "results.json").write_text("{}")
    assert vcore(*command, "--data", problems, "--overwrite") == 1
    assert "Evaluate once more, after removing it. Or choose another" in capsys.readouterr().err


def test_the_fields_of_ones_own_problems(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(run, "_model", lambda options: scripted(lambda *_: r"\boxed{2}"))
    rows = [{"ask": "2 or 3?", "right": "2"}, {"ask": "4?", "right": None}]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["eval", "any", "--data", tmp_path / "rows.jsonl", "--verifier", "exact"]
    command += ["--out", tmp_path / "out", "--prompt-field", "ask"]
    assert vcore(*command) == 1
    assert "no field looks like the answer" in capsys.readouterr().err
    assert vcore(*command, "--answer-field", "right") == 1
    assert "skip such rows with --unanswered skip" in capsys.readouterr().err
    assert vcore(*command, "--answer-field", "right", "--unanswered", "skip") == 0
    assert values(tmp_path / "out", "data") == {"accuracy": 1.0}


def test_a_task_of_the_harness_behind_a_benchmark_of_its_name(made_rows, monkeypatch, tmp_path):
    """gsm8k is gsm8k_cot here."""
    monkeypatch.setattr(run, "all_tasks", lambda: tasks.task_files(tasks.BENCHMARKS["gsm8k"]))
    monkeypatch.setattr(run, "_model", lambda options: scripted(lambda *_: "#### 2"))
    command = ["eval", "any", "--tasks", "gsm8k,harness:gsm8k", "--limit", 1, "--num-fewshot", 1]
    assert vcore(*command, "--out", tmp_path / "out") == 0
    assert set(content(tmp_path / "out")["tasks"]) == {"gsm8k_cot", "gsm8k"}


# ---- comparison ----


def test_the_paired_difference():
    a = np.array([1, 1, 1, 0, 0, 0, 0, 0], float)
    b = np.array([1, 1, 0, 1, 1, 1, 1, 0], float)
    found = compare.difference("t", "m", "none", a, b)
    assert (found.only_a, found.only_b, found.difference) == (1, 4, 0.375)
    assert found.stderr == pytest.approx((b - a).std(ddof=1) / np.sqrt(8))
    assert found.p == pytest.approx(2 * (1 + 5) / 32)  # of 5 that differ, at most 1 the other way
    low, high = found.interval
    assert low == pytest.approx(0.375 - 1.96 * found.stderr)
    assert high == pytest.approx(0.375 + 1.96 * found.stderr)
    same = compare.difference("t", "m", "none", a, a)
    assert (same.difference, same.stderr, same.p) == (0.0, 0.0, 1.0)
    shares = compare.difference("t", "m", "none", np.array([0.5, 0.25, 0.0]), np.ones(3))
    assert shares.only_a is None
    assert 0 < shares.p < 0.1
    steady = compare.difference("t", "m", "none", np.array([0.25, 0.5, 0.75]), np.full(3, 0.75))
    shifted = compare.difference(
        "t", "m", "none", np.array([0.1, 0.3, 0.5]), np.array([0.3, 0.5, 0.7])
    )
    assert steady.p != shifted.p == 0.25  # three differences of one size and sign
    one = compare.difference("t", "m", "none", np.ones(1), np.zeros(1))
    assert (one.difference, one.stderr, one.interval) == (-1.0, None, None)


def result_folder(path, right, *, seed=1, hashes=None, metric="accuracy", task="data", **settings):
    """A result folder as an evaluation leaves it."""
    path.mkdir()
    record = {
        "format": "vcore eval 1",
        "model": {"name": "m"},
        "settings": {"seed": seed, **settings},
        "harness": {"name": "lm-evaluation-harness", "version": "1"},
        "groups": {},
        "tasks": {task: {"version": 1, "problems": len(right), "metrics": []}},
    }
    (path / "results.json").write_text(json.dumps(record))
    rows = [
        {
            "doc_id": number,
            "doc_hash": (hashes or "abcdefgh")[number],
            "filter": "all",
            "values": {metric: value},
        }
        for number, value in enumerate(right)
    ]
    text = "".join(f"{json.dumps(row)}\n" for row in rows)
    (path / f"samples_{task}.jsonl").write_text(text)
    return path


def test_comparison_matches_problems_and_warns(tmp_path, capsys):
    a = result_folder(tmp_path / "a", [1, 0, 0, 1])
    b = result_folder(tmp_path / "b", [1, 1, 1], seed=2)
    (row,), warnings = compare.compare(a, b)
    assert (row.problems, row.only_a, row.only_b) == (3, 0, 2)
    assert warnings == ["--seed was 1 and 2", "data had 4 and 3 problems"]
    assert vcore("eval", "--compare", a, b) == 0
    told = capsys.readouterr().out
    assert "+66.67" in told
    assert "Not the same: --seed was 1 and 2." in told


def test_comparison_warns_of_all_settings_that_change_scores(tmp_path):
    same = {"model": "x", "out": "x", "data": "x", "cpu": True, "batch_size": 1, "adapter": "x"}
    a = result_folder(tmp_path / "a", [1, 0], verifier="exact", top_p=1.0, dtype="auto", **same)
    b = result_folder(tmp_path / "b", [1, 0], verifier="math-verify", model_args={"k": 1})
    assert compare.compare(a, b)[1] == [
        "--verifier was exact and math-verify",
        "--top-p was 1.0 and None",
        "--dtype was auto and None",
        "--model-args was None and {'k': 1}",
    ]


def test_problems_without_a_value_are_counted(tmp_path):
    a = result_folder(tmp_path / "a", [1, None, 0, 1])
    b = result_folder(tmp_path / "b", [1, 1, 1, 1])
    (row,), warnings = compare.compare(a, b)
    assert (row.problems, row.only_b) == (3, 1)
    assert warnings == [
        "data accuracy: 1 of 4 problems have no value in one of the two, and are left out"
    ]


def a_record(tmp_path, **values):
    """The content of results.json, and a sample of the task ``data``."""
    record = json.loads((result_folder(tmp_path / "made", [1]) / "results.json").read_text())
    sample = {"doc_id": 0, "doc_hash": "a", "filter": "all", "resps": [["x"]], "target": "1"}
    return record | values, sample | {"metrics": ["m"], "m": 1.0, "arguments": [["prompt"]]}


def test_samples_are_read_as_they_were_written(tmp_path):
    """Characters at which str.splitlines cuts, but JSON does not escape."""
    record, sample = a_record(tmp_path)
    text = "a\u2028b\u2029c\x85d\x0be"
    results.write(tmp_path, record, {"data": [sample | {"resps": [[text]]}]})
    assert results.read(tmp_path) == record
    (row,) = results.read_samples(tmp_path, "data", 1)
    assert (row["resps"], row["prompt"], row["values"]) == ([[text]], "prompt", {"m": 1.0})


def test_an_evaluation_that_cannot_be_written_leaves_the_earlier_one(tmp_path):
    task = {"version": 1, "problems": 1, "metrics": []}
    record, sample = a_record(tmp_path, tasks={"data": task, "more": task})
    results.write(tmp_path, record, {"data": [sample], "more": [sample]})
    (tmp_path / "samples_users.jsonl").write_text("")
    before = {path.name: path.read_text() for path in tmp_path.glob("*.json*")}
    with pytest.raises(KeyError):
        results.write(tmp_path, record | {"date": "later"}, {"data": [sample], "other": [{}]})
    assert {path.name: path.read_text() for path in tmp_path.glob("*.json*")} == before
    assert not list(tmp_path.glob(".*"))
    results.write(tmp_path, record, {"data": [sample]})
    assert {path.name for path in tmp_path.glob("*.json*")} == {
        "results.json",
        "samples_data.jsonl",
        "samples_users.jsonl",
    }


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("results.json", b"[1]", "its format is None, expected 'vcore eval 1'). Evaluate once"),
        ("results.json", b'{"results": {}}', "not results as this version of vcore eval writes"),
        ("results.json", b"\xff\x00", "results.json: not valid JSON ('utf-8' codec"),
        ("results.json", b'{"format": "vcore eval 1"}', "'model' is missing, or not an object"),
        ("samples_data.jsonl", b"", "samples_data.jsonl: has 0 of 2 problems, it was cut"),
        ("samples_data.jsonl", b"\xff\n", "samples_data.jsonl, line 1: not a sample of vcore"),
        ("samples_data.jsonl", b"[]\n", "line 1: not a sample of vcore eval (no 'doc_id'"),
        ("samples_data.jsonl", None, "samples_data.jsonl, line 2: not a sample of vcore eval ("),
    ],
    ids=["list", "harness", "binary", "empty", "none", "bytes", "row", "cut"],
)
def test_files_that_are_no_results(tmp_path, capsys, file, content, message):
    folder = result_folder(tmp_path / "a", [1, 0])
    if content is None:
        content = (folder / file).read_bytes()[:-5]
    (folder / file).write_bytes(content)
    assert vcore("eval", "--compare", folder, folder) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(folder) in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"hashes": "axcd"}, "has other problems in the second folder (1 of 3"),
        ({"metric": "avg@2"}, "has no metric with values in both"),
        ({"task": "gsm8k"}, "no task is in both"),
    ],
    ids=["problems", "metric", "task"],
)
def test_what_cannot_be_compared(tmp_path, capsys, other, message):
    a = result_folder(tmp_path / "a", [1, 0, 0])
    b = result_folder(tmp_path / "b", [1, 1, 1], **other)
    assert vcore("eval", "--compare", a, b) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_folder_without_results(tmp_path, capsys):
    assert vcore("eval", "--compare", tmp_path, tmp_path) == 1
    assert "Expected the --out folder of an evaluation" in capsys.readouterr().err


# ---- mistakes ----


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to evaluate on: pass --tasks, --data or both"),
        (["--tasks", "aime24,aime24"], "the harness' task aime24 comes twice"),
        (["--tasks", "gsm8k,gsm8k_cot"], "the harness' task gsm8k_cot comes twice, by one name"),
        (["--tasks", "aime24", "--dtype", "foo"], "--dtype must be one of auto, float32"),
        (["--tasks", "aime24", "--temperature", "inf"], "--temperature must be finite"),
        (["--tasks", "aime24", "--answer-field", "a"], "--answer-field means nothing without --d"),
        (["--tasks", "aime24", "--model-args", '{"dtype": 1}'], "dtype: pass it as --dtype inst"),
        (["--tasks", "aime24", "--model-args", '{"peft": 1}'], "peft: pass it as --adapter inst"),
        (["--data", "x", "--out", f"{__file__}/out"], "test_eval.py/out: cannot be written"),
        (["--tasks", "gsm8k", "--samples", "4"], "--samples means nothing for gsm8k"),
        (["--tasks", "hellaswag", "--temperature", "1"], "--temperature means nothing for hella"),
        (["--tasks", "aime24", "--samples", "4", "--temperature", "0"], "same response 4 times"),
        (["--tasks", "aime24", "--samples", "0"], "--samples must be finite and at least 1"),
        (
            ["--tasks", "aime24", "--temperature", "-1"],
            "--temperature must be finite and at",
        ),
        (["--tasks", "aime24", "--limit", "0"], "--limit must be at least 1"),
        (["--tasks", "aime24", "--num-fewshot", "2"], "--num-fewshot means nothing for aime24"),
        (["--tasks", "humaneval_plus", "--num-fewshot", "2"], "humaneval_plus runs code"),
        (
            ["--tasks", "aime24", "--num-fewshot", "-1"],
            "--num-fewshot must be finite and at",
        ),
        (["--tasks", "aime24", "--top-p", "0"], "--top-p must be above 0"),
        (["--tasks", "aime24", "--model-args", "{"], "--model-args {: not valid JSON"),
        (["--tasks", "aime24", "--model-args", "[]"], "expected a JSON object"),
        (["--tasks", "aime24", "--backend", "vllm"], "vllm is not installed"),
        (["--tasks", "mbpp", "--limit", "1"], "mbpp runs code"),
        (["--tasks", "mbpp_plus"], "--tasks mbpp_plus: what it needs from the hub (data set "),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: no such file"),
    ],
)
def test_mistakes_are_one_line(made_rows, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.setattr(run, "_model", lambda options: pytest.fail("loaded the model"))
    allowed = ["--allow-code-execution"] if "mbpp_plus" in options else []
    if allowed:
        import evaluate

        def unreachable(name):
            raise FileNotFoundError(f"Couldn't find a module script at {name}")

        monkeypatch.setattr(evaluate, "load", unreachable)
    out = [] if "--out" in options else ["--out", tmp_path / "out"]
    assert vcore("eval", "any", *options, *allowed, *out) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_data_that_cannot_be_reached(made_rows, tmp_path, monkeypatch, capsys):
    import datasets

    def unreachable(path, **_):
        raise ConnectionError(f"Couldn't reach {path!r} on the Hub (LocalEntryNotFoundError)")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert vcore("eval", "any", "--tasks", "bbh", "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    for part in ("--tasks bbh", "SaylorTwift/bbh", "HF_HOME", "HF_DATASETS_OFFLINE=1"):
        assert part in error
    assert error.count("\n") == 1


def test_mistakes_about_the_model(model, problems, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    for name, message in (
        (tmp_path / "empty", "not a checkpoint"),
        ("./nowhere", "no such folder"),
    ):
        assert vcore("eval", name, "--data", problems, "--out", tmp_path / "out") == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    command = ["eval", model, "--data", problems, "--cpu", "--out", tmp_path / "out"]
    (tmp_path / "adapter").write_text("{}")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "adapter_config.json").write_text("{")
    for option, value, message in (
        ("--tokenizer", "./nope", "./nope: no tokenizer there"),
        ("--adapter", tmp_path / "adapter", "adapter: not an adapter, which is a folder with"),
        ("--adapter", model, "not an adapter, which is a folder with a readable"),
        ("--adapter", tmp_path / "broken", "broken: not an adapter, which is a folder with"),
    ):
        assert vcore(*command, option, value) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") == 1
    assert vcore(*command, "--max-new-tokens", 4096) == 1
    assert "Pass a smaller --max-new-tokens" in capsys.readouterr().err
    assert vcore("eval", "--tasks", "gsm8k") == 1
    assert "expected a model" in capsys.readouterr().err


def test_without_the_harness(monkeypatch):
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'vcore_kernels\[eval\]'"):
        run.check(run.EvalOptions(model="any", tasks=("gsm8k",)))


def test_a_name_that_is_no_task():
    error = tasks.unknown("gsm8", ["gsm8k_cot"])
    assert "--tasks gsm8: neither a benchmark here" in str(error)
    assert "Did you mean gsm8k?" in str(error)
    assert "vcore eval --list" in str(tasks.unknown("qqqqqq", []))
