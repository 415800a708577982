"""The EM loop: what an update is, what is told of an iteration, and bad input."""

import json

import numpy as np
import pytest
import torch
from rollouts import (
    END,
    TOKENIZER,
    Judge,
    RandomEngine,
    logged,
    make_trainer,
    parameters,
    policy,
    prompts,
)
from tiny import with_lora
from transformers import AutoModelForCausalLM
from vcore_train import GvmConfig, GvmTrainer, sequence_grad_norms
from vcore_train.gvm.sampling import tally
from vcore_train.modeling import token_nll
from vcore_train.prompts import Prompt

from vcore_kernels import grpo_advantages


def updates(trainer):
    before = parameters(trainer)
    trainer.train()
    return {name: p - before[name] for name, p in parameters(trainer).items()}


def assert_same(left, right, **tolerance):
    assert left.keys() == right.keys()
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], **(tolerance or {"rtol": 0, "atol": 0}))


def expected_update(trainer, objective, weight_of):
    """Of one step of SGD, one response at a time, from the formulas."""
    model, store = policy(), trainer._iteration.store
    tasks, found = trainer._iteration.tasks, trainer._iteration.e_step
    total = torch.zeros(())
    for rollout in found.kept:
        ids = torch.tensor([[*tasks[rollout.prompt].tokens, *rollout.tokens]])
        labels = ids.clone()
        labels[:, : len(tasks[rollout.prompt].tokens)] = -100
        logp = -token_nll(model, {"input_ids": ids, "labels": labels}).sum()
        total = total - weight_of(rollout, found) * objective(rollout, found) * logp
    total.backward()
    assert store.folder.exists()
    return {name: -0.05 * p.grad for name, p in model.named_parameters()}


def reward_of(rollout, found):
    return max(rollout.reward, 0.0)


def advantage_of(rollout, found):
    group = torch.tensor([r.prompt for r in found.kept])
    reward = torch.tensor([r.reward for r in found.kept], dtype=torch.float64)
    return float(grpo_advantages(reward, group)[found.kept.index(rollout)])


def lemma1(rollout, found):
    everything = [r for r in found.rollouts if r.prompt == rollout.prompt]
    rate = sum(r.accepted for r in everything) / len(everything)
    n = int(tally(found.kept, found.prompts)[0][rollout.prompt])
    return 1 / (n * rate * found.prompts * 6) if rate else 0.0


def per_prompt(rollout, found):
    n = int(tally(found.kept, found.prompts)[0][rollout.prompt])
    return 1 / (n * found.prompts * 6)


def per_token(rollout, found):
    return 1 / sum(len(r.tokens) for r in found.kept if r.accepted)


CASES = {
    "raft++, lemma1": ({"objective": "raft++"}, reward_of, lemma1),
    "raft, lemma1, uniform": ({"objective": "raft", "allocation": "uniform"}, reward_of, lemma1),
    "raft++, tokens": ({"prompt_weighting": "token_mean"}, reward_of, per_token),
    "grpo": ({"objective": "grpo"}, advantage_of, per_prompt),
    "grpo, reuse": ({"objective": "grpo", "reuse_stage1": True}, advantage_of, per_prompt),
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_gradient_of_the_formula(tmp_path, case):
    """And micro-batches of another size change nothing."""
    options, objective, weight_of = CASES[case]
    options = {"iterations": 1, "steps_per_iteration": 1, **options}
    trainer = make_trainer(tmp_path / "a", **options)
    update = updates(trainer)
    assert logged(trainer, "ratio") == ([] if options.get("objective") == "raft" else [1.0])
    expected = expected_update(trainer, objective, weight_of)
    assert_same(update, expected, rtol=1e-4, atol=1e-7)
    assert any(value.abs().max() > 1e-5 for value in update.values())
    other = make_trainer(tmp_path / "b", per_device_train_batch_size=64, **options)
    assert_same(updates(other), update, rtol=1e-4, atol=1e-7)


def test_steps_of_an_epoch_share_the_responses(tmp_path):
    """With steps too small to move anything, their losses add up to that of one step."""
    options = {"iterations": 1, "learning_rate": 1e-12}
    one = make_trainer(tmp_path / "one", steps_per_iteration=1, **options)
    three = make_trainer(tmp_path / "three", steps_per_iteration=3, **options)
    one.train()
    three.train()
    places = [i for step in three._iteration.m_step.steps for micro in step for i in micro]
    assert sorted(places) == list(range(len(three._iteration.m_step.rows)))
    sizes = [sum(map(len, step)) for step in three._iteration.m_step.steps]
    assert max(sizes) - min(sizes) <= 1
    assert sum(logged(three, "loss")) / 3 == pytest.approx(logged(one, "loss")[0], rel=1e-5)


@pytest.mark.parametrize("aggregation", [None, "seq-mean-token-sum", "dr-grpo"])
def test_few_accepted_responses_keep_their_scale(tmp_path, aggregation):
    """Two accepted responses in six steps, weighed by tokens: the mean of the steps is theirs."""
    accept = iter([0.0] * 30 + [1.0, 0.0, 1.0])
    options = {"iterations": 1, "learning_rate": 1e-12, "prompt_weighting": "token_mean"}
    options |= {"allocation": "uniform", "aggregation": aggregation}
    losses = []
    for steps in (1, 6):
        accept = iter([0.0] * 30 + [1.0, 0.0, 1.0])
        judge = Judge(lambda text, answer, accept=accept: next(accept, 0.0))
        trainer = make_trainer(
            tmp_path / str(steps), judge=judge, steps_per_iteration=steps, **options
        )
        trainer.train()
        assert len(trainer._iteration.m_step.rows) == 2
        losses.append(sum(logged(trainer, "loss")) / steps)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("aggregation", [None, "seq-mean-token-sum-norm", "seq-mean-token-mean"])
@pytest.mark.parametrize("objective", ["raft++", "grpo"])
def test_every_aggregation_is_dealt_out(tmp_path, aggregation, objective):
    options = {"iterations": 1, "learning_rate": 1e-12, "aggregation": aggregation}
    losses = []
    for steps in (1, 3):
        trainer = make_trainer(
            tmp_path / str(steps), objective=objective, steps_per_iteration=steps, **options
        )
        trainer.train()
        losses.append(sum(logged(trainer, "loss")) / steps)
    assert losses[1] == pytest.approx(losses[0], rel=1e-4, abs=1e-6)


def test_kl_from_the_policy_that_sampled(tmp_path):
    """Its estimate has the KL as its expectation."""
    trainer = make_trainer(tmp_path)
    old, new = torch.tensor([0.5, 0.5]), torch.tensor([0.9, 0.1])
    ratio = (new.log() - old.log()).unsqueeze(0)
    trainer._count_ratios(ratio, torch.ones(1), torch.ones(1, 2, dtype=torch.bool))
    kl = float((old * (old.log() - new.log())).sum())
    assert trainer.metrics.drain()["kl_old"] == pytest.approx(kl, rel=1e-5)


def test_epochs_go_through_the_responses_again(tmp_path):
    trainer = make_trainer(tmp_path, iterations=1, epochs_per_iteration=3, steps_per_iteration=2)
    trainer.train()
    assert trainer.state.global_step == trainer.args.max_steps == 6
    steps, rows = trainer._iteration.m_step.steps, len(trainer._iteration.m_step.rows)
    epochs = [[i for step in steps[e : e + 2] for m in step for i in m] for e in (0, 2, 4)]
    assert all(sorted(epoch) == list(range(rows)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    ratios = logged(trainer, "ratio")
    assert ratios[0] == 1.0
    assert all(ratio != 1.0 for ratio in ratios[1:])
    assert all(kl >= 0 for kl in logged(trainer, "kl_old"))


def test_old_log_probabilities_are_those_before_the_first_step(tmp_path):
    trainer = make_trainer(tmp_path, iterations=1)
    start = {name: p.clone() for name, p in trainer.model.state_dict().items()}
    trainer.train()
    trainer.model.load_state_dict(start)
    rows, old = trainer._iteration.m_step.rows, trainer._iteration.logp["old"]
    for row, values in zip(rows, old, strict=True):
        inputs = {"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([row.labels])}
        logp = -token_nll(trainer.model, inputs)[0, -len(values) :]
        torch.testing.assert_close(values, logp, rtol=1e-5, atol=1e-5)


def test_temperature_scales_what_is_trained_on_and_measured(tmp_path):
    """The same as a model whose head is divided by the temperature."""
    options = {"iterations": 1, "steps_per_iteration": 1, "temperature": 2.0, "max_new_tokens": 6}
    trainer = make_trainer(
        tmp_path / "a", model=policy(tie_word_embeddings=False, seed=3), **options
    )
    twin = policy(tie_word_embeddings=False, seed=3)
    with torch.no_grad():
        twin.lm_head.weight /= 2
    plain = make_trainer(tmp_path / "b", model=twin, **{**options, "temperature": 1.0})
    update, other = updates(trainer), updates(plain)
    del update["lm_head.weight"], other["lm_head.weight"]
    assert_same(update, other, rtol=1e-4, atol=1e-8)
    norms = [t._iteration.e_step.grad_norm for t in (trainer, plain)]
    torch.testing.assert_close(*norms, rtol=1e-5, atol=0)
    batch = {"input_ids": torch.tensor([[9, 8, 7, 6]]), "labels": torch.tensor([[-100, 8, 7, 6]])}
    torch.testing.assert_close(
        sequence_grad_norms(policy(seed=3, tie_word_embeddings=False), batch, temperature=2.0),
        sequence_grad_norms(_halved(), batch),
    )


def _halved():
    twin = policy(tie_word_embeddings=False, seed=3)
    with torch.no_grad():
        twin.lm_head.weight /= 2
    return twin


def test_temperature_and_a_soft_cap(tmp_path):
    from tiny import tiny_model

    model = tiny_model("gemma2", vocab_size=len(TOKENIZER), max_position_embeddings=128)
    with pytest.raises(ValueError, match="soft-capped"):
        make_trainer(tmp_path, model=model, temperature=0.7)


# ---- the reference ----


@pytest.mark.parametrize("lora", [False, True])
def test_kl_from_the_reference(tmp_path, lora):
    options = {"objective": "grpo", "beta": 0.5, "iterations": 1, "steps_per_iteration": 2}
    model = with_lora(policy()) if lora else policy()
    trainer = make_trainer(tmp_path, model=model, learning_rate=0.5, **options)
    trainer.train()
    ref, old = trainer._iteration.logp["ref"], trainer._iteration.logp["old"]
    assert len(ref) == len(trainer._iteration.e_step.kept)  # with a KL every response trains
    same = all(torch.equal(a, b) for a, b in zip(ref, old, strict=True))
    assert same != lora  # a copy is the policy at the start; the adapters begin elsewhere here
    if not lora:
        frozen = trainer._reference.state_dict()
        assert all(torch.equal(value, policy().state_dict()[n]) for n, value in frozen.items())


def test_a_reference_of_ones_own(tmp_path):
    reference = policy(seed=5)
    options = {"objective": "grpo", "beta": 0.1, "iterations": 1}
    trainer = make_trainer(tmp_path, ref_model=reference, **options)
    trainer.train()
    row, values = trainer._iteration.m_step.rows[0], trainer._iteration.logp["ref"][0]
    inputs = {"input_ids": torch.tensor([row.input_ids]), "labels": torch.tensor([row.labels])}
    logp = -token_nll(reference, inputs)[0, -len(values) :]
    torch.testing.assert_close(values, logp, rtol=1e-5, atol=1e-5)


# ---- what is told and kept ----


def test_an_iteration_is_told_and_kept(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.train()
    assert logged(trainer, "iteration") == [0, 1]
    assert logged(trainer, "rollouts") == [36, 72]
    assert len(logged(trainer, "loss")) == 4
    line = next(line for line in trainer.state.log_history if "accept_rate" in line)
    assert line["step"] == 2
    found = trainer._iteration.e_step
    accepted = sum(r.accepted for r in found.rollouts)
    assert logged(trainer, "accept_rate")[1] == pytest.approx(accepted / 36)
    cut = [r for r in found.rollouts if not r.finished]
    assert logged(trainer, "truncated")[1] == len(cut)
    assert logged(trainer, "truncated_accepted")[1] == sum(r.accepted for r in cut)
    folder = tmp_path / "rollouts" / "iteration-0001"
    rows = [json.loads(text) for text in (folder / "prompts.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == list(range(6))
    for i, row in enumerate(rows):
        assert row["sampled_1"] == 4
        assert row["accept_rate"] == row["accepted_1"] / 4
        own = [r for r in found.rollouts if r.prompt == i and r.stage == 2]
        assert row["sampled_2"] == len(own)
        assert row["accepted_2"] == sum(r.accepted for r in own)
        assert row["grad_norm"] == float(found.grad_norm[i])
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["accept_rate"] == logged(trainer, "accept_rate")[1]
    assert metrics["m_step_seconds"] > 0
    assert logged(trainer, "samples_max")[1] == max(row["sampled_2"] for row in rows)


def test_parquet(tmp_path):
    import pyarrow.parquet

    trainer = make_trainer(tmp_path, rollout_format="parquet", iterations=1)
    trainer.train()
    folder = tmp_path / "rollouts" / "iteration-0000"
    table = pyarrow.parquet.read_table(folder / "responses.parquet")
    assert table.num_rows == 36
    assert not (folder / "responses.jsonl").exists()


def test_prompts_of_an_iteration(tmp_path):
    trainer = make_trainer(
        tmp_path, data=prompts(11), prompts_per_iteration=3, iterations=7, steps_per_iteration=1
    )
    trainer.train()
    assert logged(trainer, "rollouts")[-1] == 7 * 3 * 6
    folder = tmp_path / "rollouts"
    rows = [(folder / f"iteration-000{i}" / "prompts.jsonl").read_text() for i in range(7)]
    taken = [json.loads(line)["prompt"] for text in rows for line in text.splitlines()]
    assert sorted(taken[:11]) == list(range(11))


def test_the_callers_random_state_and_mode_are_left(tmp_path):
    trainer = make_trainer(tmp_path, iterations=1, eval_dataset=prompts(2))
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    trainer.evaluate()
    assert torch.equal(torch.rand(1), expected)


# ---- bad input ----


def test_no_accepted_response(tmp_path, caplog):
    trainer = make_trainer(tmp_path, judge=Judge(lambda text, answer: 0.0), optim="adamw_torch")
    update = updates(trainer)
    assert all(not value.any() for value in update.values())
    assert "no prompt was accepted: none of 36 responses to 6 prompts" in caplog.text
    assert "no response is left to learn from" in caplog.text
    assert logged(trainer, "fell_back") == [1, 1]
    assert logged(trainer, "empty_steps") == [2, 2]
    assert logged(trainer, "prompts_rejected") == [6, 6]
    assert trainer.state.global_step == 4


@pytest.mark.parametrize("objective", ["raft++", "grpo"])
def test_all_accepted(tmp_path, objective, caplog):
    judge = Judge(lambda text, answer: 1.0)
    trainer = make_trainer(tmp_path, judge=judge, objective=objective)
    update = updates(trainer)
    moved = any(value.any() for value in update.values())
    assert moved == (objective == "raft++")  # equal rewards have no advantage
    assert logged(trainer, "prompts_solved") == [6, 6]
    assert ("no response is left" in caplog.text) == (objective == "grpo")


def test_momentum_does_not_move_an_empty_step(tmp_path):
    """A step without any response is none: Adam's average does not drift on."""
    accept = iter([1.0] * 36)
    judge = Judge(lambda text, answer: next(accept, 0.0))
    trainer = make_trainer(
        tmp_path, judge=judge, optim="adamw_torch", weight_decay=0.1, save_strategy="steps"
    )
    trainer.train()
    assert logged(trainer, "empty_steps") == [0, 2]
    first, last = (
        torch.load(tmp_path / f"checkpoint-{n}" / "optimizer.pt")["state"] for n in (2, 4)
    )
    assert all(torch.equal(first[i]["exp_avg"], last[i]["exp_avg"]) for i in first)
    after_first = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    final = parameters(trainer)
    for name, value in after_first.named_parameters():
        assert torch.equal(value, final[name]), name


def raises(text, answer):
    raise LookupError(f"no {answer}")


def hangs(text, answer):
    while answer == "1":
        pass
    return 1.0


def test_a_verifier_that_raises(tmp_path, caplog):
    trainer = make_trainer(tmp_path, iterations=1, verifier=raises, eval_dataset=prompts(2))
    trainer.train()
    assert trainer.evaluate()["eval_unverified"] == 2  # workers come back after training
    trainer.verification.close()
    assert logged(trainer, "unverified") == [36]
    assert "36 responses could not be verified and score 0, the first: LookupError" in caplog.text


def test_a_verifier_that_hangs(tmp_path):
    trainer = make_trainer(
        tmp_path,
        iterations=1,
        verifier=hangs,
        verifier_seconds=0.2,
        data=prompts(3),
        samples_per_prompt=2,
        stage1_samples=1,
    )
    trainer.train()
    first = trainer._iteration.e_step.first
    assert [r.problem for r in first] == [None, "timeout", None]
    assert logged(trainer, "unverified") == [1]  # a prompt that was not accepted gets no more


def test_an_engine_that_falls_short(tmp_path, caplog):
    trainer = make_trainer(tmp_path, engine=RandomEngine(short=2), iterations=1)
    trainer.train()
    missing = logged(trainer, "missing")[0]
    assert missing > 0
    assert f"did not return {missing} of the responses" in caplog.text
    assert logged(trainer, "rollouts")[0] < 36


def test_cut_responses_can_be_left_out(tmp_path):
    judge = Judge(lambda text, answer: 1.0)
    trainer = make_trainer(
        tmp_path, judge=judge, mask_truncated=True, iterations=1, samples_per_prompt=12
    )
    trainer.train()
    rows = trainer._iteration.m_step.rows
    finished = [r for r in trainer._iteration.e_step.kept if r.finished]
    assert 0 < len(rows) == len(finished) < len(trainer._iteration.e_step.kept)
    assert all(row.input_ids[-1] == END for row in rows)


def test_one_prompt_and_more_steps_than_prompts(tmp_path):
    judge = Judge(lambda text, answer: 1.0)
    trainer = make_trainer(
        tmp_path, data=prompts(1), judge=judge, samples_per_prompt=12, steps_per_iteration=4
    )
    trainer.train()
    assert logged(trainer, "trained_rows") == [8, 8]
    assert logged(trainer, "empty_steps") == [0, 0]


def test_fewer_samples_than_prompts(tmp_path):
    trainer = make_trainer(
        tmp_path, data=prompts(9), samples_per_prompt=2, stage1_samples=1, iterations=1
    )
    trainer.train()
    assert logged(trainer, "rollouts") == [18]


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([{"prompt": "a"}], "training data, row 0: no reference answer: field 'answer' is missing"),
        ([{"prompt": "a", "answer": "1"}, {"prompt": "", "answer": "1"}], "row 1: no 'prompt'"),
        ([{"prompt": "a", "answer": None}], "no reference answer"),
        ([{"prompt": "a", "answer": float("nan")}], "no reference answer"),
        ([{"prompt": "a", "answer": "  "}], "no reference answer"),
        ([{"prompt": "a", "answer": ["3", "4"]}], "turns"),
        ([{"prompt": [{"role": "assistant", "content": "a"}], "answer": "1"}], "assistant turn"),
        ([], "no prompts"),
        ([{"prompt": "very " * 200, "answer": "1"}], "more than the model's window of 128"),
        ([{"prompt": [{"role": 1}], "answer": "1"}], "turns"),
    ],
)
def test_prompts_that_cannot_be_used(tmp_path, data, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, data=data)


def test_rows_of_another_kind(tmp_path):
    with pytest.raises(TypeError, match="a str, expected a Prompt or a mapping"):
        make_trainer(tmp_path, data=["what?"])
    make_trainer(tmp_path, data=[Prompt("a", "1", "somewhere")] * 3)
    answers = [np.int64(3), 2.5, np.float64(0.5), "2 + 2 is 4\n#### 4"]
    trainer = make_trainer(tmp_path, data=[{"prompt": "a", "answer": a} for a in answers])
    assert [task.answer for task in trainer.tasks] == ["3", "2.5", "0.5", "4"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts_per_iteration": 7}, "but there are 6 prompts"),
        ({"processing_class": None}, "processing_class must be"),
        ({"verifier": "best"}, "no verifier is named 'best'"),
        ({"grad_norm_params": "bogus"}, "bogus"),
    ],
)
def test_options_that_do_not_fit(tmp_path, options, message):
    tokenizer = options.pop("processing_class", TOKENIZER)
    verifier = options.pop("verifier", "exact")
    with pytest.raises(ValueError, match=message):
        GvmTrainer(
            policy(),
            GvmConfig(
                output_dir=str(tmp_path),
                use_cpu=True,
                report_to="none",
                **{"max_new_tokens": 8, **options},
            ),
            train_dataset=prompts(),
            processing_class=tokenizer,
            verifier=verifier,
        )


def test_the_wrong_configuration(tmp_path):
    from transformers import TrainingArguments

    with pytest.raises(TypeError, match="args must be a GvmConfig"):
        GvmTrainer(policy(), TrainingArguments(output_dir=str(tmp_path), use_cpu=True))


def test_training_needs_prompts(tmp_path):
    trainer = GvmTrainer(
        policy(),
        GvmConfig(output_dir=str(tmp_path), use_cpu=True, report_to="none"),
        processing_class=TOKENIZER,
        verifier="exact",
    )
    with pytest.raises(ValueError, match="needs a train_dataset"):
        trainer.train()
    with pytest.raises(ValueError, match="needs an eval_dataset"):
        trainer.evaluate()


# ---- evaluation ----


@pytest.mark.parametrize("samples", [1, 3])
def test_evaluation(tmp_path, samples):
    judge = Judge(lambda text, answer: int(answer) % 2)
    trainer = make_trainer(
        tmp_path, judge=judge, iterations=1, eval_dataset=prompts(4), eval_samples=samples
    )
    figures = trainer.evaluate()
    assert figures["eval_accuracy"] == 0.5
    assert judge.judged == 4 * samples
    assert trainer.evaluate(prompts(2), metric_key_prefix="test")["test_accuracy"] == 0.5
    trainer.eval_dataset = {"a": prompts(1), "b": prompts(4)}
    assert trainer.evaluate("b")["eval_b_accuracy"] == 0.5
    with pytest.raises(ValueError, match="no eval_dataset named 'c'"):
        trainer.evaluate("c")
    with pytest.raises(ValueError, match="Use evaluate"):
        trainer.predict(prompts(2))
    both = trainer.evaluate()
    assert (both["eval_a_accuracy"], both["eval_b_accuracy"]) == (0.0, 0.5)


def test_evaluation_in_every_iteration_and_the_best_checkpoint(tmp_path):
    trainer = make_trainer(
        tmp_path,
        eval_dataset=prompts(4),
        eval_strategy="steps",
        save_strategy="steps",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    )
    trainer.train()
    assert len(logged(trainer, "eval_accuracy")) == 2
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-4"}
    assert trainer.state.best_model_checkpoint is not None


def test_the_default_engine_samples_from_the_policy(tmp_path):
    trainer = GvmTrainer(
        policy(),
        GvmConfig(
            output_dir=str(tmp_path),
            use_cpu=True,
            report_to="none",
            iterations=2,
            steps_per_iteration=2,
            max_new_tokens=6,
            disable_tqdm=True,
        ),
        train_dataset=prompts(),
        processing_class=TOKENIZER,
        verifier="exact",
        eval_dataset=prompts(2),
    )
    trainer.verification = Judge()
    trainer.train()
    assert logged(trainer, "rollouts") == [48, 96]
    assert "eval_accuracy" in trainer.evaluate()
