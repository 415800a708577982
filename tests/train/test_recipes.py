"""The files in recipes/: every option is known, and each runs on a tiny model."""

import json
import shlex
from pathlib import Path
from typing import get_type_hints

import pytest
import transformers
import typer
import yaml
from command import vcore
from vcore_train import commands, gvm_commands
from vcore_train.arithmetic import generate_problems
from vcore_train.config_file import read_options
from vcore_train.models import Size, new_model
from vcore_train.tokenizer import train_tokenizer

FOLDER = Path(__file__).parents[2] / "recipes"
RECIPES = sorted(path.name for path in FOLDER.glob("*.yaml"))
SUPERVISED = [name for name in RECIPES if not name.startswith("gvm")]
SAMPLED = [name for name in RECIPES if name.startswith("gvm")]
# What a dry run changes, beside the model, the data and the folder. The rest is as it stands: bf16,
# adapters, dropout, checkpointing, window.
SHORTER = {"accumulation": 2, "steps": 2, "epochs": None, "probe-batch-size": 4, "cpu": True}
SMALLER = {
    **{"engine": "transformers", "engine-options": None},  # vLLM needs a GPU
    **{"iterations": 1, "prompts-per-iteration": 3, "max-new-tokens": 4, "steps-per-iteration": 2},
    **{"batch-size": 16, "cpu": True},
}
WINDOW = 16384


@pytest.fixture(autouse=True)
def other_libraries_speak_again():
    before = transformers.utils.logging.get_verbosity()
    yield
    transformers.utils.logging.set_verbosity(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    texts = [text for p in generate_problems(40) for text in (p.prompt, p.response)]
    tokenizer = train_tokenizer(texts, vocab_size=300, window=WINDOW)
    size = Size(layers=1, hidden=32, heads=2, window=WINDOW)
    new_model(size.config(), tokenizer, seed=0).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows with the columns of the two data sets; every fourth of NuminaMath's is a proof."""
    folder = tmp_path_factory.mktemp("data")
    reasoning, numina = [], []
    for number, p in enumerate(generate_problems(12)):
        reasoning.append(
            {
                "expected_answer": "7",
                "problem_type": "has_answer_extracted",
                "problem_source": "aops_c4_high_school_math",
                "generation_model": "DeepSeek-R1",
                "pass_rate_72b_tir": "0.5",
                "problem": p.prompt,
                "generated_solution": f"<think>\n{p.response}\n</think>\n\\boxed{{7}}",
                "inference_mode": "cot",
                "used_in_kaggle": True,
            }
        )
        proof = number % 4 == 3
        numina.append(
            {
                "problem": p.prompt,
                "solution": p.response,
                "answer": "proof" if proof else "7",
                "problem_type": "Algebra",
                "question_type": "proof" if proof else "math-word-problem",
                "problem_is_valid": "Yes",
                "solution_is_valid": "Yes",
                "source": "olympiads",
                "synthetic": False,
            }
        )
    paths = {}
    for name, rows in (("nvidia/OpenMathReasoning", reasoning), ("AI-MO/NuminaMath-1.5", numina)):
        paths[name] = str(folder / f"{name.split('/')[1]}.jsonl")
        Path(paths[name]).write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return paths


def changed(recipe, folder, changes):
    """A copy of the recipe with some options replaced, or dropped where None."""
    options = yaml.safe_load((FOLDER / recipe).read_text())
    for name, value in changes.items():
        if name in options or name in ("steps", "cpu", "model", "out"):
            options[name] = value
    path = folder / recipe
    path.write_text(yaml.safe_dump({k: v for k, v in options.items() if v is not None}))
    return path


def options_of(recipe):
    function, command = (
        (gvm_commands.train, "vcore gvm") if recipe in SAMPLED else (commands.train, "vcore train")
    )
    return read_options(FOLDER / recipe, get_type_hints(function), command)


def test_the_recipes_are_there():
    assert len(SUPERVISED) == 7
    assert len(SAMPLED) == 2


@pytest.mark.parametrize("recipe", SUPERVISED)
def test_supervised_recipes_have_the_papers_figures(recipe):
    options = options_of(recipe)
    assert (options["data"], options["split"]) == ("nvidia/OpenMathReasoning", "cot")
    assert (options["lr"], options["lora_rank"], options["limit"]) == (2e-5, 8, 3200)
    assert options["batch_size"] * options["accumulation"] == 32
    assert options["epochs"] == 1
    size = recipe.split("-")[1]
    assert options["model"] == f"Qwen/Qwen3-{size.upper()}"
    assert options["method"] in recipe
    assert options["out"] == f"runs/{Path(recipe).stem}"
    # All but what makes the method is the same, so that the runs can be compared.
    apart = {"method", "out", "model", "kl_budget", "probe_batch_size", "temperature", "epsilon"}
    apart |= {"utility_method", "variance_control", "probe_max_norm", "probe_replacement"}
    apart |= {"anchor_steps", "iw_level", "iw_temp", "random_keep"}
    common = {name: value for name, value in options.items() if name not in apart}
    first = options_of("qwen3-4b-lora-sft.yaml")
    assert common == {name: value for name, value in first.items() if name not in apart}


def test_the_papers_own_vcore_settings():
    options = options_of("qwen3-4b-lora-vcore-paper.yaml")
    assert options["temperature"] == 5e3
    assert (options["utility_method"], options["epsilon"]) == ("finite_difference", 1e-4)
    assert (options["variance_control"], options["probe_max_norm"]) == ("loss", 1.0)


@pytest.mark.parametrize("recipe", SAMPLED)
def test_sampled_recipes(recipe):
    options = options_of(recipe)
    assert options["model"] == "Qwen/Qwen2.5-Math-1.5B"
    assert options["allocation"] == "gvm"
    assert json.loads(options["allocation_options"]) == {"alpha": 1e-3, "beta": 2.0}
    assert options["stage1_samples"] == 8
    assert options["objective"].removesuffix("++") in recipe
    assert options["suffix"].startswith("\n")


@pytest.mark.parametrize("recipe", ["qwen3-4b-lora-sft.yaml", "gvm-qwen2.5-math-1.5b-raft.yaml"])
def test_an_unknown_option_is_named(recipe, tmp_path, capsys):
    path = tmp_path / recipe
    path.write_text((FOLDER / recipe).read_text() + "\nlearning-rat: 1\n")
    command = "gvm" if recipe in SAMPLED else "train"
    assert vcore(command, "--config", path, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "no option is called 'learning-rat'" in error
    assert recipe in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("recipe", SUPERVISED)
def test_supervised_recipes_run(recipe, model, data, tmp_path):
    out = tmp_path / "out"
    rows = data["nvidia/OpenMathReasoning"]
    places = {"data": rows, "model": str(model), "out": str(out)}
    assert vcore("train", "--config", changed(recipe, tmp_path, {**SHORTER, **places})) == 0
    assert json.loads((out / "summary.json").read_text())["steps"] == 2
    assert (out / "adapter_model.safetensors").exists()


@pytest.mark.parametrize("recipe", SAMPLED)
def test_sampled_recipes_run(recipe, model, data, tmp_path, capsys):
    out = tmp_path / "out"
    places = {"prompts": data["AI-MO/NuminaMath-1.5"], "model": str(model), "out": str(out)}
    assert vcore("gvm", "--config", changed(recipe, tmp_path, {**SMALLER, **places})) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["steps"], summary["rollouts"]) == (2, 3 * 16)
    assert "3 rows skipped: no reference answer" in capsys.readouterr().out


def shell_lines(page):
    """The lines of a page's blocks without a language or in a shell's, continued ones joined."""
    inside = language = None
    for line in page.replace("\\\n", " ").splitlines():
        if line.startswith("```"):
            inside, language = not inside, line.strip("` ")
        elif inside and language in ("", "sh", "bash", "console", "shell"):
            yield line


def vcore_commands(page):
    """The arguments of the vcore commands on a page."""
    for line in shell_lines(page):
        words = shlex.split(line, comments=True)
        for place, word in enumerate(words):
            if word.split("/")[-1] == "vcore" or word == "vcore_train.cli":
                yield words[place + 1 :]
                break


def parsed(words):
    """The context of the command that ``words`` call, which is not run."""
    command = typer.main.get_command(commands.app)
    context = command.make_context("vcore", list(words))
    while hasattr(command, "commands"):
        name, command, rest = command.resolve_command(
            context, [*context._protected_args, *context.args]
        )
        context = command.make_context(name, rest, parent=context)
    return context


@pytest.mark.parametrize("page", ["recipes/README.md", "docs/evaluation.md"])
def test_the_commands_on_the_pages_are_good(page, monkeypatch):
    monkeypatch.chdir(FOLDER.parent)
    found = list(vcore_commands((FOLDER.parent / page).read_text()))
    assert len(found) > 4
    for words in found:
        context = parsed(words)
        assert context.info_name in ("train", "gvm", "eval"), words
    with pytest.raises(Exception, match="No such option"):
        parsed(["eval", "model", "--taks", "gsm8k"])


def test_every_recipe_is_on_its_page():
    text = (FOLDER / "README.md").read_text()
    for recipe in RECIPES:
        assert recipe in text
