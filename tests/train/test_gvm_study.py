import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from vcore_train.experiments import gvm, gvm_report, gvm_start
from vcore_train.experiments.gvm import QUICK
from vcore_train.experiments.gvm_arms import ARMS, Arm, base_of
from vcore_train.experiments.gvm_start import Estimator, Known, Pool
from vcore_train.experiments.setting import Context
from vcore_train.experiments.study import StudyOptions, run_study
from vcore_train.gvm.store import IterationStore, Rollout


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the study's workers: the models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    weights = tmp_path_factory.mktemp("start") / "start.pt"
    return weights, gvm_start.make_start(QUICK, 0, weights)


@pytest.fixture(scope="module")
def start(made):
    return gvm_start.load_start(QUICK, 0, made[0])


def test_a_start_solves_some_prompts_and_is_kept(made):
    weights, record = made
    assert 0 < record["accuracy"] < 1
    assert record["steps"] % QUICK.judged_every == 0
    assert record["never"] + record["always"] < 1
    written = weights.stat().st_mtime_ns
    assert gvm_start.make_start(QUICK, 0, weights) == record
    assert weights.stat().st_mtime_ns == written


def test_prompts_are_new_to_the_start(start):
    supervised, prompts, held_out = ({p.prompt for p in part} for part in start.problems)
    assert (len(prompts), len(held_out)) == (QUICK.prompts, QUICK.held_out)
    assert not (supervised & prompts)
    assert not ((supervised | prompts) & held_out)


def record_of(made, name, **changes):
    arm = next(arm for arm in ARMS if arm.name == name)
    return gvm.run_record(replace(QUICK, **changes), 0, made[0], arm)


def test_arms_cost_the_same(made):
    uniform = record_of(made, "RAFT++")
    each = QUICK.prompts_per_iteration * QUICK.samples_per_prompt
    assert uniform["rollouts"] == [0, each, 2 * each]
    assert uniform["steps"] == [0, QUICK.steps, 2 * QUICK.steps]
    assert len(uniform["accuracy"]) == 3
    assert uniform["further"] == {}
    for name in ("GVM-RAFT++", "GVM-RAFT++, stage 1 reused", "Knapsack-GRPO"):
        other = record_of(made, name)
        assert other["rollouts"] == uniform["rollouts"]
        assert other["steps"] == uniform["steps"]
        assert other["accuracy"][0] == uniform["accuracy"][0]
        assert sum(count for _, count in other["further"].values()) == 2 * 8
    ada = record_of(made, "Reinforce-Ada-RAFT++", iterations=1)
    assert ada["rollouts"][1] <= each
    more = record_of(made, "RAFT++, 4 x the steps", iterations=1)
    assert (more["rollouts"][1], more["steps"][1]) == (each, 4 * QUICK.steps)


def test_further_samples_are_counted_by_what_came_first(tmp_path):
    store = IterationStore(tmp_path / "iteration-0000", "policy")

    def rollouts(prompt, rewards):
        return [Rollout(prompt, 1, [5], True, "", r, None) for r in rewards]

    store.append(0, 0, rollouts(0, [1.0, 0.0]) + rollouts(1, [1.0, 1.0]))
    store.append(0, 1, rollouts(2, [0.0, 1.0]))
    assert gvm.further_samples(tmp_path, 2) == {}
    store.append(1, 0, rollouts(0, [0.0] * 3) + rollouts(1, [1.0]))
    store.append(2, 0, rollouts(2, [1.0] * 4))
    assert gvm.further_samples(tmp_path, 2) == {"1": [3.5, 2], "2": [1.0, 1]}


def test_speed_is_read_between_evaluations():
    base = {"accuracy": [0.1, 0.2, 0.3, 0.4, 0.4, 0.4], "rollouts": [0, 10, 20, 30, 40, 50]}
    assert gvm_report.speed(base, base, "rollouts") == 1
    fast = {**base, "accuracy": [0.1, 0.3, 0.6, 0.6, 0.6, 0.6]}
    # Running means after the start: uniform reaches 0.4 at its fifth point, the other on its way
    # to its second.
    own = 10 * (0.4 - 0.1) / (0.45 - 0.1)
    assert gvm_report.speed(fast, base, "rollouts") == pytest.approx(40 / own)
    assert gvm_report.speed({**base, "accuracy": [0.1] * 6}, base, "rollouts") == 0
    assert math.isnan(gvm_report.speed(fast, {**base, "accuracy": [0.1] * 6}, "rollouts"))


def test_gaps_are_paired_by_seed_and_objective():
    runs = [
        {"arm": arm, "objective": objective, "seed": seed, "accuracy": [0.0, value, value + 0.2]}
        for arm, objective, values in (
            *(("RAFT++", "raft++", (0.1, 0.5)), ("GVM-RAFT++", "raft++", (0.2, 0.6))),
            ("GRPO", "grpo", (0.9, 0.9)),
        )
        for seed, value in enumerate(values)
    ]
    for at_end in (True, False):
        found = gvm_report.gaps({"runs": runs}, "GVM-RAFT++", at_end=at_end)
        assert found == pytest.approx([0.1, 0.1])


@pytest.fixture(scope="module")
def toy():
    """Three prompts, 16 responses each, gradients of 5 entries; and what is known of them."""
    generator = torch.Generator().manual_seed(0)
    accepted = torch.rand(3, 16, generator=generator) < torch.tensor([[0.2], [0.5], [0.9]])
    size = torch.tensor([1.0, 5.0, 2.0], dtype=torch.float64)[accepted.nonzero()[:, 0], None]
    shape = (int(accepted.sum()), 5)
    gradients = size * (1 + torch.randn(shape, generator=generator, dtype=torch.float64))
    norms = torch.zeros(3, 16, dtype=torch.float64)
    norms[accepted] = gradients.norm(dim=1)
    known = Known.of(accepted, norms, gvm_start._means(gradients, accepted))
    return known, Estimator(accepted, gradients @ gradients.T)


@pytest.mark.parametrize("counts", [[4, 4, 4], [9, 2, 1], [0, 6, 6], [0, 0, 12]])
def test_the_measured_error_is_the_formula(toy, counts):
    known, estimator = toy
    counts = torch.tensor(counts)
    exact = gvm_start.formula(known, counts)
    measured, biased = estimator.measured(counts, 20_000, torch.Generator().manual_seed(1))
    assert biased < measured
    assert measured == pytest.approx(exact, rel=0.04)
    assert math.isinf(gvm_start.bound(known, counts)) == (0 in counts)
    assert gvm_start.bound(known, counts) > exact


def test_allocations_keep_the_budget_and_the_best_is_best(toy):
    known, _ = toy
    errors = {}
    for rule in (*gvm_start.RULES, gvm_start.BEST):
        counts = gvm_start.allocation(rule, known, 100, floor=True)
        assert int(counts.sum()) == 300
        assert int(counts.min()) >= 1
        errors[rule] = gvm_start.formula(known, counts)
    assert min(errors, key=errors.get) == gvm_start.BEST
    assert errors[gvm_start.BEST] < 0.99 * errors["uniform"]
    never = known._replace(rate=torch.tensor([0.0, 0.5, 0.9], dtype=torch.float64))
    for floor in (True, False):
        counts = gvm_start.allocation("gvm", never, 10, floor=floor)
        assert (int(counts[0]), int(counts.sum())) == (int(floor), 30)
    nothing = known._replace(rate=torch.zeros(3, dtype=torch.float64))
    assert gvm_start.allocation("knapsack", nothing, 10, floor=False).tolist() == [10, 10, 10]


def test_gradients_are_those_that_the_norms_are_of(start):
    found = gvm_start.sample(start, QUICK, start.problems.prompts[:12], 8, seed=3)
    assert 0 < found.accepted.sum() < found.accepted.numel()
    gradients = gvm_start.accepted_gradients(start, found)
    norms = gvm_start.accepted_norms(start, found)
    torch.testing.assert_close(gradients.norm(dim=1), norms[found.accepted].float())
    assert not norms[~found.accepted].any()
    means = gvm_start._means(gradients, found.accepted)
    prompt = int(found.accepted.any(1).nonzero()[0])
    own = found.accepted.nonzero()[:, 0] == prompt
    torch.testing.assert_close(means[prompt].float(), gradients[own].mean(0))


def test_nothing_accepted_leaves_nothing_to_measure(start):
    rows = gvm_start.sample(start, QUICK, start.problems.prompts[:2], 2, seed=0).rows
    none = Pool(rows, torch.zeros(2, 2, dtype=torch.bool))
    assert gvm_start.accepted_gradients(start, none).shape[0] == 0
    assert not gvm_start.accepted_norms(start, none).any()


def test_the_command(tmp_path, monkeypatch):
    """In processes of its own, with two arms."""
    kept = ("RAFT++", "GVM-RAFT++")
    monkeypatch.setattr(gvm, "ARMS", tuple(arm for arm in ARMS if arm.name in kept))
    monkeypatch.setattr(gvm, "QUICK", replace(QUICK, iterations=1))
    options = StudyOptions(tmp_path, quick=True, threads=1)
    result = run_study("gvm", options, Console(file=io.StringIO()))["result"]
    assert [run["arm"] for run in result["runs"]] == list(kept)
    assert result["starts"][0]["seed"] == 0
    (variance,) = result["variance"]
    if variance["prompts"]:
        first = variance["allocations"][0]
        assert (first["rule"], first["measured"], first["formula"]) == ("uniform", 1, 1)
    text = (tmp_path / "gvm.md").read_text(encoding="utf-8")
    assert "GVM-RAFT++" in text
    assert "speed by rollouts" in text
    assert (tmp_path / "gvm.png").stat().st_size > 10_000


def test_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="problems are generated"):
        gvm.measure(Context(QUICK, tmp_path, data=Path(__file__)))


def test_every_arm_has_a_colour_and_a_base():
    for arm in ARMS:
        assert gvm_report._kind(arm.name) in gvm_report.LABELS
        assert gvm_report._kind(arm.name) in gvm_report.COLOURS
        assert isinstance(arm, Arm)
        assert base_of(arm) in [a.name for a in ARMS]
