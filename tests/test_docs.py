"""What the documents say can be done: their code runs, their commands parse, their links lead on.

Python blocks run in order; each section (``##``) of a page begins with the names of ``prepared``.
One that cannot run here says why in the line before it (``NOT_RUN``). Blocks below a file's name,
on the page that shows how to add things, are applied to a copy of the sources.
"""

import contextlib
import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import typer

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *(page for page in sorted(DOCS.rglob("*.md")) if page.parent.name != "results"),
    *sorted((ROOT / "examples").rglob("README.md")),
    *sorted((ROOT / "recipes").rglob("README.md")),
]
FENCE = re.compile(r"^( *)```([^\n`]*)\n(.*?)^\1```$", re.M | re.S)
TITLE = re.compile(r"^`([\w./-]+/[\w.-]+\.\w+)`\n\n\Z", re.M)
NOT_RUN = re.compile(r"Not run by the tests: (.+?)\n+$")
# Every block that is not run. A longer list needs a better reason than convenience.
LEFT_OUT: set[tuple[str, str]] = set()


class Block(NamedTuple):
    page: Path
    line: int  # of the fence, from 1
    section: int  # headings of level 2 before it
    language: str
    title: str | None
    text: str
    not_run: str | None  # the reason

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks_of(page: Path, text: str | None = None) -> list[Block]:
    text = page.read_text(encoding="utf-8") if text is None else text
    found = []
    for match in FENCE.finditer(text):
        before = text[: match.start()]
        language = match[2].strip()
        title, reason = TITLE.search(before), NOT_RUN.search(before)
        found.append(
            Block(
                page,
                before.count("\n") + 1,
                FENCE.sub("", before).count("\n## "),
                language,
                title[1] if title and language in ("python", "diff") else None,
                re.sub(f"^{match[1]}", "", match[3], flags=re.M),
                reason and reason[1],
            )
        )
    return found


BLOCKS = [block for page in PAGES for block in blocks_of(page)]


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


# ------------------------------------------------------------------------------------ Python blocks


@pytest.fixture(scope="module")
def tokenizer():
    from vcore_train.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["what is 3 + 4? the answer is 7", "0123456789"], vocab_size=280)
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message['role'] == 'assistant' %}"
        "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
        "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    )
    return tokenizer


@pytest.fixture(scope="module")
def trained_model(tokenizer):
    from vcore_train.models import Size, new_model

    size = Size(layers=2, hidden=32, heads=2, intermediate=64, window=256)
    return new_model(size.config(), tokenizer, seed=0)


@pytest.fixture
def prepared(tokenizer, trained_model):
    """Makes the names that documents use without saying where they come from."""
    return partial(names_for, tokenizer, trained_model)


def names_for(tokenizer, trained_model) -> dict:
    import copy

    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments

    model = copy.deepcopy(trained_model).train()

    def row(a, b):
        prompt = tokenizer(f"what is {a} + {b}?", add_special_tokens=False)["input_ids"]
        answer = tokenizer(f" the answer is {a + b}", add_special_tokens=False)["input_ids"]
        answer = [*answer, tokenizer.eos_token_id]
        return {
            "input_ids": prompt + answer,
            "labels": [-100] * len(prompt) + answer,
            "prompt": f"what is {a} + {b}?",
            "answer": str(a + b),
        }

    rows = [row(a, b) for a in range(2) for b in range(4)]
    collator = DataCollatorForSeq2Seq(tokenizer)
    tokens = [{name: r[name] for name in ("input_ids", "labels")} for r in rows]
    batch = dict(collator(tokens[:4]))
    conversations = Dataset.from_list(
        [
            {
                "messages": [
                    {"role": "user", "content": r["prompt"]},
                    {"role": "assistant", "content": f" the answer is {r['answer']}"},
                ]
            }
            for r in rows
        ]
    )
    with torch.no_grad():
        hidden = model.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state
    return {
        "model": model,
        "tokenizer": tokenizer,
        "lm_head": model.lm_head,
        "rows": rows,
        "batch": batch,
        "probe_batches": [dict(collator(tokens[4:]))],
        "hidden": hidden.requires_grad_(),
        "collator": collator,
        "conversations": conversations,
        "MyTrainer": type("MyTrainer", (Trainer,), {}),
        "args": TrainingArguments(
            output_dir="out",
            use_cpu=True,
            max_steps=2,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
    }


def run_blocks(blocks: list[Block], names: dict) -> None:
    """Runs them in one namespace; a traceback has the lines of the page."""
    for block in blocks:
        source = "\n" * block.line + block.text
        exec(compile(source, str(block.page), "exec"), names)


def python_blocks(page: Path) -> list[Block]:
    return [b for b in BLOCKS if b.page == page and b.language == "python" and b.title is None]


@pytest.mark.filterwarnings(
    "ignore:'pin_memory' argument is set as true but no accelerator",
    "ignore:`gradient_checkpointing` is deprecated:FutureWarning",
)
@pytest.mark.parametrize("page", [p for p in PAGES if python_blocks(p)], ids=name_of)
def test_python_blocks_run(page, prepared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for _, blocks in groupby(python_blocks(page), key=lambda block: block.section):
        run_blocks([block for block in blocks if not block.not_run], prepared())


def test_the_blocks_that_are_not_run():
    assert {(name_of(b.page), b.not_run) for b in BLOCKS if b.not_run} == LEFT_OUT


def test_languages_are_known():
    """So that no block escapes by a language that nothing looks at."""
    known = {"python", "", "text", "yaml", "json", "toml", "diff"}
    assert {block.place: block.language for block in BLOCKS if block.language not in known} == {}
    untitled = [b.place for b in BLOCKS if b.language == "diff" and b.title is None]
    assert untitled == []


# --------------------------------------------------------------------------------- Files and edits


def edited(text: str, edit: str, where: str) -> str:
    """``text`` after a block of lines with "+" and "-"; "@@" parts places, each found once."""
    for hunk in re.split(r"^@@\n", edit, flags=re.M):
        lines = hunk.splitlines()
        assert all(line == "" or line[0] in " +-" for line in lines), f"{where}: {hunk}"
        before = "".join(line[1:] + "\n" for line in lines if line[:1] != "+")
        after = "".join(line[1:] + "\n" for line in lines if line[:1] != "-")
        count = text.count(before)
        assert count == 1, f"{where}: found {count} times:\n{before}"
        text = text.replace(before, after)
    return text


def apply(blocks: list[Block], root: Path) -> list[str]:
    """Writes and edits the files that ``blocks`` name under ``root``; returns the tests added."""
    tests = []
    for block in blocks:
        path = root / block.title
        if block.language == "diff":
            text = path.read_text(encoding="utf-8")
            path.write_text(edited(text, block.text, block.place), encoding="utf-8")
        else:
            assert not path.exists(), f"{block.place}: {block.title} is there already"
            path.write_text(block.text, encoding="utf-8")
            if path.name.startswith("test_"):
                tests.append(block.title)
    return tests


@pytest.mark.slow
def test_additions_of_the_documents_work(tmp_path):
    for folder in ("vcore_kernels", "python", "tests", "docs", "examples"):
        ignored = shutil.ignore_patterns("__pycache__", "results")
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=ignored)
    for file in ("pyproject.toml", "Makefile", "README.md", "CONTRIBUTING.md"):
        shutil.copy(ROOT / file, tmp_path)
    titled = [block for block in BLOCKS if block.title is not None]
    assert {block.page.name for block in titled} == {"extending.md"}
    tests = apply(titled, tmp_path)
    assert len(tests) == 5
    # And those of the library that go over the tables.
    tests += [
        "tests/kernels/test_module_names.py",
        "tests/train/test_config.py::test_bad_options",
        "tests/train/test_loss_function.py::test_options",
        "tests/train/test_cli.py::test_the_choices_of_an_option_are_those_of_the_configuration",
        "tests/train/test_directions.py::test_every_kind_keeps_saves_and_loads",
        "tests/train/test_directions.py::test_the_configuration_knows_every_kind",
        "tests/train/test_gvm_cli.py::test_the_choices_are_those_of_the_library",
        "tests/test_docs.py::test_the_api_pages_have_every_public_name",
        # The commands of the page are those after its edits.
        "tests/test_docs.py::test_commands_can_be_given[docs/extending.md]",
    ]
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{tmp_path / 'python'}"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


# ---------------------------------------------------------------------------------------- Commands


def command_lines(text: str) -> list[str]:
    """The lines of a block without a language, continued ones joined."""
    return [line.strip() for line in text.replace("\\\n", " ").splitlines()]


def words_of(line: str) -> list[str]:
    """Words of a command, without comments, variables before it, and what follows a pipe."""
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in a line of output
        return []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]
    for end, word in enumerate(words):
        if word in ("|", "&&", ";", ">", ">>"):
            return words[:end]
    return words


def vcore_arguments(words: list[str]) -> list[str] | None:
    """What ``vcore`` is called with, directly or by a launcher."""
    if words and Path(words[0]).name == "vcore":
        return words[1:]
    if "vcore_train.cli" in words:
        return words[words.index("vcore_train.cli") + 1 :]
    return None


def parse_vcore(arguments: list[str]) -> None:
    """Parses with the real command and runs nothing; raises ValueError for what is wrong."""
    from vcore_train.commands import app
    from vcore_train.option_checks import check_train

    command, name = typer.main.get_command(app), "vcore"
    context, parents = None, []
    try:
        while True:
            context = command.make_context(name, list(arguments), parent=context)
            parents.append(name)
            if not hasattr(command, "commands"):
                break
            rest = [*context._protected_args, *context.args]
            name, command, arguments = command.resolve_command(context, rest)
    except Exception as error:
        code = getattr(error, "exit_code", None)  # as what the parser raises has it
        if code is None:
            raise
        if code == 0:  # --help
            return
        raise ValueError(getattr(error, "message", str(error))) from error
    if parents == ["vcore", "train"]:
        check_train(context.params)


def targets_of_make() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.M))


def check_command(line: str) -> bool:
    """Whether ``line`` is a command that is looked at; raises where it could not be given."""
    words = words_of(line)
    if not words:
        return False
    if (arguments := vcore_arguments(words)) is not None:
        parse_vcore(arguments)
        return True
    program = Path(words[0]).name
    if program == "make":
        named = [w for w in words[1:] if re.fullmatch(r"[a-z]+", w)]
        unknown = set(named) - targets_of_make()
        assert not unknown, f"make has no {unknown}"
        return True
    if re.fullmatch(r"python[0-9.]*|sh|torchrun|accelerate", program):
        own = r"(?:benchmarks|examples|tests|recipes)(?:/[\w./*-]+)?"
        for word in words[1:]:
            path = word.split("::")[0]
            if re.fullmatch(own, path) and not re.search(r"results/", path):
                assert list(ROOT.glob(path.rstrip("/"))), f"{path} does not exist"
        return True
    return False


@contextlib.contextmanager
def failures_named(what: str):
    try:
        yield
    except Exception as error:
        message = getattr(error, "message", None) or error
        pytest.fail(f"{what}\n{type(error).__name__}: {message}")


def shell_blocks() -> list[Block]:
    return [block for block in BLOCKS if block.language == ""]


@pytest.fixture
def files_of_the_commands(tmp_path, monkeypatch):
    """What documents call files of one's own, and the examples."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    if (ROOT / "recipes").exists():
        (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    shutil.copy(ROOT / "examples" / "launch" / "run.yaml", tmp_path)
    (tmp_path / "runs" / "a").mkdir(parents=True)
    (tmp_path / "runs" / "a" / "config.yaml").write_text("data: data.jsonl\nsteps: 1000\n")
    return tmp_path


@pytest.mark.parametrize("page", sorted({b.page for b in shell_blocks()}), ids=name_of)
def test_commands_can_be_given(page, files_of_the_commands, capsys):
    added = [block for block in BLOCKS if block.page == page and block.title is not None]
    if added and not (ROOT / added[0].title).exists():
        return  # test_additions_of_the_documents_work comes here again, once they are added
    for block in shell_blocks():
        if block.page != page:
            continue
        for line in command_lines(block.text):
            with failures_named(f"{block.place}: {line}"):
                check_command(line)


def test_commands_in_the_text_exist():
    """``make X`` and ``vcore X`` inside sentences."""
    from vcore_train.commands import app

    commands = set(typer.main.get_command(app).commands)
    for page in PAGES:
        text = FENCE.sub("", page.read_text(encoding="utf-8"))
        for name in re.findall(r"`make ([a-z]+)\b", text):
            assert name in targets_of_make(), f"{page}: make {name}"
        for name in re.findall(r"`vcore ([a-z][a-z-]*)\b", text):
            assert name in commands, f"{page}: vcore {name}"


# ------------------------------------------------------------------------------------ Links and API


def broken_links(page: Path, text: str) -> list[str]:
    """Relative links and images of a page that lead to no file."""
    text = FENCE.sub("", text)
    text = re.sub(r"`[^`\n]+`", "", text)
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", text)
    relative = [link for link in links if not re.match(r"[a-z]+:", link)]
    return [link for link in relative if not (page.parent / link).exists()]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    assert broken_links(page, page.read_text(encoding="utf-8")) == []


def documented() -> set[str]:
    """Dotted names in the API pages."""
    text = "".join(path.read_text() for path in (DOCS / "api").glob("*.md"))
    return set(re.findall(r"^::: ([\w.]+)$", text, flags=re.M))


def test_the_api_pages_have_every_public_name():
    import vcore_train

    import vcore_kernels

    last = {name.split(".")[-1] for name in documented()} | {"ALLOCATION_RULES"}
    assert set(vcore_kernels.__all__) | set(vcore_train.__all__) <= last
    for name in documented() - {n for n in documented() if "VcoreSFT" in n}:  # these need trl
        module, _, attribute = name.rpartition(".")
        with contextlib.suppress(TypeError):
            assert hasattr(importlib.import_module(module), attribute), name
    assert "`ALLOCATION_RULES`" in (DOCS / "api" / "kernels.md").read_text()


def test_the_command_page_has_every_command():
    from vcore_train.commands import app

    text = (DOCS / "api" / "command.md").read_text()
    for name in typer.main.get_command(app).commands:
        assert f"`vcore {name}" in text, name


# ------------------------------------------------------------- That the checks here can fail at all


def test_a_broken_block_fails_with_its_place(prepared):
    page = DOCS / "index.md"
    text = "# Title\n\n```python\nx = 1\nassert x == 2\n```\n"
    (block,) = blocks_of(page, text)
    with pytest.raises(AssertionError) as error:
        run_blocks([block], prepared())
    assert error.traceback[-1].lineno + 1 == 5
    assert Path(error.traceback[-1].path) == page


def test_a_block_says_why_it_is_not_run():
    page = DOCS / "index.md"
    reason = "Not run by the tests: it needs a GPU.\n\n```python\nboom\n```\n"
    assert blocks_of(page, reason)[0].not_run == "it needs a GPU."
    assert blocks_of(page, "Something else.\n\n```python\nboom\n```\n")[0].not_run is None


@pytest.mark.parametrize(
    "line",
    [
        "vcore train data.jsonl --no-such-option 3",
        "vcore trane data.jsonl",
        "vcore train data.jsonl --method nonsense",
        "vcore train data.jsonl --steps many",
        "vcore train data.jsonl --method sft --kl-budget 0.1",
        "vcore train",
        ".venv/bin/vcore gvm allocate rates.jsonl",
        "torchrun --nproc-per-node 2 -m vcore_train.cli train --config run.yaml --nonsense",
        "vcore train --config missing.yaml",
        "make nonsense",
        "python -m pytest tests/test_nothing.py",
        "X=1 python benchmarks/nothing.py",
    ],
)
def test_bad_commands_fail(line, files_of_the_commands):
    with pytest.raises((ValueError, OSError, AssertionError)):
        check_command(line)


def test_good_commands_pass(files_of_the_commands, capsys):
    assert check_command("vcore train data.jsonl --method vcore --kl-budget 0.1   # a comment")
    assert check_command(".venv/bin/vcore show-weights --help")
    assert check_command("OMP_NUM_THREADS=1 python -m pytest -q tests/test_docs.py")
    assert check_command('make test PYTEST_ARGS="-k perturbed"')
    assert not check_command("GPUs  weights  moments  grads")


def test_broken_links_and_edits_fail():
    page = DOCS / "index.md"
    assert broken_links(page, "[a](nothing.md#x) ![b](results/none.png) [c](../README.md)") == [
        "nothing.md",
        "results/none.png",
    ]
    assert edited("a\nb\nc\n", " a\n-b\n+d\n", "here") == "a\nd\nc\n"
    for edit in (" x\n+y\n", "-a\n+b\n"):
        with pytest.raises(AssertionError, match=r"here: found [02] times"):
            edited("a\nb\na\n", edit, "here")
