"""Does it pay to decide how many responses each prompt gets? GVM and its rivals at equal cost.

All arms of a seed begin at the same weights and meet the same prompts in the same order. An
iteration has the same samples for all, the first stage included, and the same optimizer steps; but
Reinforce-Ada may stop before its budget is spent, and one control shows what more steps do alone.
"""

import tempfile
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import Future, as_completed
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback

from vcore_kernels.allocation import RULES_BY_RATE
from vcore_train.arithmetic import Problem
from vcore_train.experiments.gvm_arms import ARMS, Arm
from vcore_train.experiments.gvm_report import plot, tables
from vcore_train.experiments.gvm_start import (
    FEWER,
    LONGER,
    GvmSetting,
    Start,
    load_start,
    make_start,
    start_file,
    variance_record,
)
from vcore_train.experiments.setting import Context
from vcore_train.experiments.workers import workers
from vcore_train.gvm.config import GvmConfig
from vcore_train.gvm.store import IterationStore
from vcore_train.gvm.trainer import ROLLOUTS, GvmTrainer

__all__ = ["DATA", "FULL", "QUICK", "measure", "plot", "tables"]  # what a study is

# Learning rates by a scan of the uniform arms alone, 12 iterations on seed 100, which is not on
# record. Mean accuracy of the run in percent, the start at 51.6: RAFT++ 57.5, 57.6, 60.1, 51.8 at
# 1e-4, 2e-4, 3e-4, 5e-4; GRPO 58.4, 56.9, 55.6 at 1e-4, 2e-4, 3e-4. At 1e-3, with half the
# responses a step, RAFT++ fell below its start within an iteration.
FULL = GvmSetting(
    layers=2,
    hidden=96,
    vocab=300,
    length=96,
    batch_size=32,
    lr=2e-3,
    train_steps=1200,
    held_out=384,
    raft_lr=3e-4,
    grpo_lr=1e-4,
)
QUICK = GvmSetting(
    **{
        **vars(GvmSetting.quick(train_steps=400, rows=400, seeds=1)),
        **{"layers": 1, "length": 64, "goal": 0.15, "judged_every": 50, "operations": (1, 1)},
        **{"lr": 5e-3, "prompts": 48, "max_new_tokens": 16, "iterations": 2, "steps": 2},
        **{"prompts_per_iteration": 8, "samples_per_prompt": 6, "stage1": 3},
        **{"pool_prompts": 12, "pool_samples": 12, "draws": 50, "rated": 24, "rated_samples": 8},
    }
)
DATA = "generated arithmetic expressions"


# ---- one run, in a process of its own ----


def run_record(setting: GvmSetting, seed: int, weights: Path, arm: Arm) -> dict[str, Any]:
    return run_from(load_start(setting, seed, weights), setting, seed, arm)


def run_from(start: Start, setting: GvmSetting, seed: int, arm: Arm) -> dict[str, Any]:
    """Accuracy and what it cost so far, at the start and after each iteration."""
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GvmTrainer(
            start.model,
            _config(setting, seed, arm, folder),
            train_dataset=_rows(start.problems.prompts),
            eval_dataset=_rows(start.problems.held_out),
            processing_class=start.tokenizer,
            verifier="exact",
        )
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        first = trainer.args.stage1 or setting.stage1
        further = further_samples(Path(folder) / ROLLOUTS, first)
    logged = trainer.state.log_history
    judged = [line for line in logged if "eval_accuracy" in line]
    iterations = [line for line in logged if "rollouts" in line]
    return {
        "seed": seed,
        "arm": arm.name,
        "objective": arm.objective,
        "rule": arm.allocation,
        "accuracy": [line["eval_accuracy"] for line in judged],
        "steps": [line["step"] for line in judged],
        "rollouts": [0, *(line["rollouts"] for line in iterations)],
        "accept_rate": [line["accept_rate"] for line in iterations],
        "unsampled": [line["prompts_unsampled"] for line in iterations],
        "fell_back": sum(line["fell_back"] for line in iterations),
        "further": further,
        "seconds": time.perf_counter() - begin,
    }


def _config(setting: GvmSetting, seed: int, arm: Arm, folder: str) -> GvmConfig:
    fewer, longer = (FEWER, LONGER) if arm.few else (1, 1)
    stage1 = longer * setting.stage1 if arm.allocation in RULES_BY_RATE else None
    return GvmConfig(
        output_dir=folder,
        objective=arm.objective,
        allocation=arm.allocation,
        allocation_options=(
            {"round_size": setting.stage1} if arm.allocation == "reinforce_ada" else None
        ),
        iterations=setting.iterations,
        prompts_per_iteration=setting.prompts_per_iteration // fewer,
        samples_per_prompt=fewer * setting.samples_per_prompt,
        stage1_samples=stage1,
        steps_per_iteration=arm.steps * setting.steps,
        max_new_tokens=setting.max_new_tokens,
        learning_rate=setting.grpo_lr if arm.objective == "grpo" else setting.raft_lr,
        lr_scheduler_type="constant",
        seed=seed,
        generation_batch_size=512,
        per_device_train_batch_size=64,
        eval_strategy="steps",
        eval_on_start=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arm.options,
    )


def _rows(problems: Sequence[Problem]) -> list[dict[str, str]]:
    return [{"prompt": p.prompt, "answer": str(p.answer)} for p in problems]


def further_samples(folder: Path, first: int) -> dict[str, list[float]]:
    """Samples that prompts got after their first ``first``, by how many of those were accepted.

    ``{accepted of the first: [mean of the further samples, prompts]}`` over the iterations in
    ``folder``; empty where nothing was decided after the first round.
    """
    found: dict[int, list[int]] = defaultdict(list)
    for iteration in sorted(folder.glob("iteration-????")):
        rounds = IterationStore(iteration, None, reading=True).rounds
        accepted: dict[int, int] = defaultdict(int)
        seen: dict[int, int] = defaultdict(int)
        later: dict[int, int] = defaultdict(int)
        for (number, _), rollouts in rounds.items():
            for rollout in rollouts:
                if number:
                    later[rollout.prompt] += 1
                else:
                    seen[rollout.prompt] += 1
                    accepted[rollout.prompt] += rollout.accepted
        for prompt, count in seen.items():
            if count == first:
                found[accepted[prompt]].append(later[prompt])
    if not any(map(any, found.values())):
        return {}
    return {str(a): [sum(n) / len(n), len(n)] for a, n in sorted(found.items())}


# ---- the study ----


def measure(context: Context) -> dict[str, Any]:
    """``starts`` and ``variance``: a record a seed; ``runs``: one for each arm and seed.

    Starts, runs and variances are jobs for as many processes as PyTorch has threads.
    """
    setting = context.setting
    assert isinstance(setting, GvmSetting)
    if context.data is not None:
        raise ValueError("--data means nothing for gvm, whose problems are generated. Drop it.")
    seeds = list(context.seeds)
    weights = {seed: start_file(context.out, setting, seed) for seed in seeds}
    result: dict[str, list[dict[str, Any]]] = {"starts": [], "runs": [], "variance": []}
    with workers() as pool:
        first = [pool.submit(make_start, setting, seed, weights[seed]) for seed in seeds]
        place: dict[Future[dict[str, Any]], str] = {}
        with context.task("Starts", len(seeds)) as advance:
            for seed, start in zip(seeds, first, strict=True):
                result["starts"].append(start.result())
                advance()
                job = (setting, seed, weights[seed])
                place |= {pool.submit(run_record, *job, arm): "runs" for arm in ARMS}
                place[pool.submit(variance_record, *job)] = "variance"
        for future in context.track(as_completed(place), "Runs", len(place)):
            result[place[future]].append(future.result())
    order = [arm.name for arm in ARMS]
    result["runs"].sort(key=lambda run: (run["seed"], order.index(run["arm"])))
    result["variance"].sort(key=lambda record: record["seed"])
    return result
