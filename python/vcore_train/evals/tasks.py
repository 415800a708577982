"""The benchmarks of ``vcore eval``: what each is, and which task of the harness stands for it.

lm-evaluation-harness has thousands of task files, and reading all of them takes many seconds, so
a benchmark here names the folder that its task is in. Any other task of the harness can be asked
for by the harness' own name.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OWN_TASKS = Path(__file__).parent / "harness_tasks"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        task: the harness' name of it; ``folder``: where its file is in the harness' ``tasks``,
            None for a task file of our own.
        measures, source, licence: for people. The licence is the one that the data set's page
            names, as far as known; read the page before redistributing anything.
        dataset: its name on the hub.
        runs_code: scoring executes what the model wrote.
        scored: responses are checked by :mod:`vcore_train.verifiers`, several for a problem if
            wanted, instead of by the harness.
        max_new_tokens: where the harness' own limit (256) would cut solutions short.
    """

    task: str
    folder: str | None
    measures: str
    source: str
    dataset: str
    licence: str
    runs_code: bool = False
    scored: bool = False
    max_new_tokens: int | None = None


BENCHMARKS: dict[str, Benchmark] = {
    "gsm8k": Benchmark(
        task="gsm8k_cot",
        folder="gsm8k",
        measures="grade-school word problems, 8 worked examples",
        source="arXiv 2110.14168",
        dataset="openai/gsm8k",
        licence="MIT",
        max_new_tokens=512,
    ),
    "math500": Benchmark(
        task="hendrycks_math500",
        folder="hendrycks_math",
        measures="competition mathematics, 500 problems of MATH",
        source="arXiv 2103.03874, 2305.20050",
        dataset="HuggingFaceH4/MATH-500",
        licence="MIT (MATH)",
        scored=True,
        max_new_tokens=4096,
    ),
    "aime24": Benchmark(
        task="aime24",
        folder="aime",
        measures="American Invitational Mathematics Examination 2024, 30 problems",
        source="MAA",
        dataset="Maxwell-Jia/AIME_2024",
        licence="MIT on its page; the problems are the MAA's",
        scored=True,
    ),
    "aime25": Benchmark(
        task="aime25",
        folder="aime",
        measures="the same of 2025, 30 problems",
        source="MAA",
        dataset="math-ai/aime25",
        licence="Apache-2.0 on its page; the problems are the MAA's",
        scored=True,
    ),
    "humaneval_plus": Benchmark(
        task="humaneval_plus",
        folder="humaneval",
        measures="164 Python functions from their docstrings, many tests",
        source="arXiv 2107.03374, 2305.01210",
        dataset="evalplus/humanevalplus",
        licence="Apache-2.0",
        runs_code=True,
    ),
    "mbpp": Benchmark(
        task="mbpp",
        folder="mbpp",
        measures="500 short Python programs, 3 worked examples",
        source="arXiv 2108.07732",
        dataset="google-research-datasets/mbpp",
        licence="CC-BY-4.0",
        runs_code=True,
    ),
    "mbpp_plus": Benchmark(
        task="mbpp_plus",
        folder="mbpp",
        measures="378 of them, many tests",
        source="arXiv 2305.01210",
        dataset="evalplus/mbppplus",
        licence="Apache-2.0",
        runs_code=True,
    ),
    "hellaswag": Benchmark(
        task="hellaswag",
        folder="hellaswag",
        measures="which ending of a text is likeliest: common sense, no generation",
        source="arXiv 1905.07830",
        dataset="Rowan/hellaswag",
        licence="MIT",
    ),
    "strategyqa": Benchmark(
        task="strategyqa",
        folder=None,
        measures="yes or no by several implicit steps, 4 worked examples",
        source="arXiv 2101.02235",
        dataset="ChilleD/StrategyQA",
        licence="MIT",
    ),
    "bbh": Benchmark(
        task="bbh_cot_fewshot",
        folder="bbh/cot_fewshot",
        measures="27 hard tasks of BIG-bench, 3 worked examples",
        source="arXiv 2210.09261",
        dataset="SaylorTwift/bbh",
        licence="MIT",
    ),
}


def harness_folder() -> Path:
    """Where the installed harness keeps its task files."""
    import lm_eval.tasks

    return Path(lm_eval.tasks.__file__).parent


def folder_of(benchmark: Benchmark) -> Path:
    return OWN_TASKS if benchmark.folder is None else harness_folder() / benchmark.folder


def task_files(benchmark: Benchmark) -> Any:
    """A ``TaskManager`` that knows the tasks in the benchmark's folder alone."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[folder_of(benchmark)], include_defaults=False)


def no_tasks() -> Any:
    """A ``TaskManager`` for tasks that are loaded already: the default one reads every file."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=[OWN_TASKS], include_defaults=False)


def all_tasks() -> Any:
    """A ``TaskManager`` that knows every task of the harness; many seconds."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def unknown(name: str, known: list[str]) -> ValueError:
    nearest = difflib.get_close_matches(name, [*BENCHMARKS, *known], n=1)
    hint = f"Did you mean {nearest[0]}?" if nearest else "vcore eval --list shows the benchmarks."
    return ValueError(
        f"--tasks {name}: neither a benchmark here ({', '.join(BENCHMARKS)}) nor a task of the "
        f"harness. {hint}"
    )
