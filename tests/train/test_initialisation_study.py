import csv
import io
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from vcore_train.experiments import initialisation, initialisation_report
from vcore_train.experiments.gvm_start import Pool, load_start
from vcore_train.experiments.initialisation import QUICK
from vcore_train.experiments.initialisation_report import ARMS, BASE, CONTROL, METHODS
from vcore_train.experiments.setting import Context
from vcore_train.experiments.statistics import interval
from vcore_train.experiments.study import StudyOptions, run_study
from vcore_train.trainer import VcoreTrainer


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As in the study's workers: the models are small."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder and the result of the quick study."""
    folder = tmp_path_factory.mktemp("initialisation")
    options = StudyOptions(folder, quick=True, threads=1)
    return folder, run_study("initialisation", options, Console(file=io.StringIO()))["result"]


def test_the_study_leaves_all_files(ran):
    folder, result = ran
    assert [s["start"] for s in result["starts"]] == [BASE, *METHODS]
    pairs = [(run["start"], run["arm"]) for run in result["runs"]]
    assert pairs == [(m, a) for m in METHODS for a in ARMS] + [(m, CONTROL) for m in METHODS]
    text = (folder / "initialisation.md").read_text(encoding="utf-8")
    assert "GVM-RAFT++ at the end" in text
    assert "The sharpest start is" in text
    assert (folder / "initialisation.png").stat().st_size > 10_000
    with open(folder / "initialisation.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(ARMS) * len(METHODS) * (QUICK.iterations + 1)
    assert {row["start"] for row in rows} == set(METHODS)
    assert all((row["accept_rate"] == "") == (row["rollouts"] == "0") for row in rows)


def test_runs_begin_at_their_start_and_cost_the_same(ran):
    _, result = ran
    starts = {start["start"]: start for start in result["starts"]}
    assert starts["sft"]["greedy"] > 0
    for run in result["runs"]:
        start = starts[run["start"]]
        assert run["accuracy"][0] == start["greedy"]
        assert run["sampled"] == [start["sampled"], run["end"]["sampled"]]
        if run["arm"] != CONTROL:
            assert run["steps"] == [0, QUICK.iterations * QUICK.steps]
            assert run["rollouts"] == [0, QUICK.prompts_per_iteration * QUICK.samples_per_prompt]


def test_methods_see_the_same_batches_from_the_same_weights(ran, monkeypatch):
    folder, _ = ran
    (base,) = (folder / "starts").glob("gvm-*.pt")
    seen, after = {}, {}

    class Watching(VcoreTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            record.append((inputs["input_ids"].clone(), model.lm_head.weight.detach().clone()))
            return super().training_step(model, inputs, *args, **kwargs)

    monkeypatch.setattr(initialisation, "VcoreTrainer", Watching)
    for method in METHODS:
        record = seen[method] = []
        start = load_start(QUICK, 0, base)
        initialisation.fine_tune(start, QUICK, 0, method)
        after[method] = start.model.lm_head.weight
        kept = torch.load(base.with_name(f"initialisation-0-{method}.pt"), weights_only=True)
        assert torch.equal(kept["lm_head.weight"], after[method])  # the study's, in another process
    before = load_start(QUICK, 0, base).model.lm_head.weight
    for method in METHODS:
        assert len(seen[method]) == QUICK.tuning_steps
        assert torch.equal(seen[method][0][1], before)
        for (own, _), (reference, _) in zip(seen[method], seen["sft"], strict=True):
            assert torch.equal(own, reference)
        if method != "sft":
            assert not torch.equal(after[method], after["sft"])


def test_fine_tuning_and_reinforcement_learning_share_no_problem():
    problems = load_start(QUICK, 0).problems
    tuned, others = initialisation.parts(problems, QUICK)
    assert len(tuned) == QUICK.tuning_steps * QUICK.batch_size
    assert len(others.prompts) >= QUICK.iterations * QUICK.prompts_per_iteration
    texts = [{p.prompt for p in part} for part in (tuned, *others)]
    for place, part in enumerate(texts):
        assert not part & set().union(*texts[:place])


def test_full_has_a_prompt_for_each_place():
    full = initialisation.FULL
    assert full.prompts == full.tuned + full.iterations * full.prompts_per_iteration


def test_entropy_is_that_of_response_tokens():
    def model(input_ids, attention_mask):
        """Even over 4 tokens where tokens 7 and 8 are predicted, certain elsewhere."""
        logits = torch.zeros(*input_ids.shape, 4)
        logits[..., 0] = 1e4
        logits[:, 1, :] = 0
        logits[:, 2] = torch.tensor([1.0, 1.0, 0.0, 0.0]).log().clamp(min=-1e4)
        return SimpleNamespace(logits=logits)

    row = {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]}
    short = {"input_ids": [5, 6, 7], "labels": [-100, -100, 7]}
    pool = Pool([[row], [short]], torch.zeros(2, 1, dtype=torch.bool))
    found = initialisation.entropy(SimpleNamespace(model=model), pool)
    assert found == pytest.approx((2 * math.log(4) + math.log(2)) / 3)


def test_distinct_responses_are_counted_by_prompt():
    rows = [[{"input_ids": [1, token]} for token in tokens] for tokens in ([2, 2, 2, 3], [4] * 4)]
    pool = Pool(rows, torch.zeros(2, 4, dtype=torch.bool))
    assert initialisation.distinct(pool) == pytest.approx((2 / 4 + 1 / 4) / 2)


def made_up(gains, entropies, control=0.0):
    """Three seeds, starts at 0.4 + seed / 10. ``gains``: of an arm and start; twice if sampled."""
    starts, runs = [], []
    for seed in range(3):
        level = 0.4 + seed / 10
        for start in (BASE, *METHODS):
            figures = dict.fromkeys(initialisation_report.FIGURES, level)
            figures["entropy"] = entropies.get(start, 0.2) + seed / 10
            starts.append({"seed": seed, "start": start, **figures})
        for start in METHODS:
            for arm in (*ARMS, CONTROL):
                gain = control if arm == CONTROL else gains(arm, start, seed)
                runs.append(
                    {
                        **{"seed": seed, "start": start, "arm": arm},
                        **{"accuracy": [level, level + gain], "sampled": [level, level + 2 * gain]},
                        **{"rollouts": [0, 10], "steps": [0, 2], "accept_rate": [0.5]},
                        "end": {"entropy": 0.1},
                    }
                )
    return {"starts": starts, "runs": runs}


SHARP = {"sft": 0.1, "dft": 0.05, "vcore": 0.12}


@pytest.mark.parametrize(
    ("difference", "jitter", "answer"),
    [
        (-0.05, 0.001, "it gains less"),
        (0.05, 0.001, "it gains more"),
        (0.01, 0.05, "whether it gains less is not settled"),
    ],
)
def test_what_is_read_of_a_sharper_start(difference, jitter, answer):
    def gains(arm, start, seed):
        return 0.1 + (start == "dft") * (difference + (seed - 1) * jitter)

    result = made_up(gains, SHARP)
    lines = initialisation_report.reading(result)
    (sharp,) = (line for line in lines if line.startswith("The sharpest start is DFT's"))
    assert f"greedily, so {answer}" in sharp
    assert f"sampled, so {answer}" in sharp
    assert "0.150 nats a token against 0.200" in sharp
    grpo = next(line for line in lines if line.startswith("GRPO"))
    word = {-0.05: "lower", 0.05: "higher", 0.01: "no clear difference"}[difference]
    assert f"{100 * difference:+.1f}" in grpo
    assert word in grpo.split("DFT")[1].split("VCORE")[0]


def test_differences_are_paired_by_seed():
    def gains(arm, start, seed):
        return seed + {"GRPO": 0.1, "RAFT++": 0.2, "GVM-RAFT++": 0.5}[arm] + 0.3 * (start == "dft")

    result = made_up(gains, SHARP, control=0.05)
    report = initialisation_report
    for what, times in (("accuracy", 1), ("sampled", 2)):
        of_dft = report.run_gap(result, "GRPO", "dft", report.gain, what)
        assert of_dft == pytest.approx(interval([times * 0.3] * 3))
        assert report.mean_gain_gap(result, "dft", what).mean == pytest.approx(times * 0.3)
        of_gvm = report.gvm_gap(result, ["vcore"], what)
        assert of_gvm == pytest.approx(interval([times * 0.3] * 3))
        over = report.over_control(result, "RAFT++", what)
        assert over == pytest.approx(
            interval([times * (seed + 0.2 + 0.1 - 0.05) for seed in range(3)])
        )


@pytest.mark.parametrize("sign", [1, -1])
def test_sharpness_and_gain_are_compared_within_seeds(sign):
    def gains(arm, start, seed):
        return sign * SHARP[start] - sign * 2 * seed  # across seeds it goes the other way

    result = made_up(gains, SHARP)
    assert initialisation_report.sharpness_correlation(result, "GRPO", "accuracy") == (
        pytest.approx(sign)
    )


def test_more_supervision_is_set_against_the_gains():
    result = made_up(lambda *_: 0.02, SHARP, control=0.12)
    line = next(x for x in initialisation_report.reading(result) if x.startswith("As many steps"))
    assert "gain +12.0 points greedily and +24.0 sampled" in line
    assert line.count("-10.0") == line.count("-20.0") == len(ARMS)


def test_data_is_refused(tmp_path):
    with pytest.raises(ValueError, match="problems are generated"):
        initialisation.measure(Context(QUICK, tmp_path, data=Path(__file__)))
