"""A run that was killed anywhere ends as an uninterrupted one, and samples nothing twice."""

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from rollouts import RandomEngine, logged, make_trainer, parameters, policy
from tiny import with_lora
from transformers import TrainerCallback
from vcore_train.gvm.run_file import alone_in

RUN = {
    "iterations": 3,
    "epochs_per_iteration": 2,
    "optim": "adamw_torch",
    "save_strategy": "steps",
    "lr_scheduler_type": "linear",
}
TOLD = ("loss", "ratio", "accept_rate", "rollouts", "grad_norm", "learning_rate")


class KillAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    engine = RandomEngine()
    trainer = make_trainer(tmp_path_factory.mktemp("whole"), engine=engine, **RUN)
    trainer.train()
    return trainer, engine


def assert_equal_runs(trainer, whole):
    found, expected = parameters(trainer), parameters(whole)
    for name, value in expected.items():
        assert torch.equal(value, found[name]), name
    for name in TOLD:
        assert logged(trainer, name) == logged(whole, name), name


def interrupted(folder, engine, **options):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(folder, engine=engine, **{**RUN, **options}).train()


@pytest.mark.parametrize("crash_at", [0, 1, 4, 8, 9, 16, 23])
def test_a_crash_while_sampling(tmp_path, whole, crash_at):
    expected, whole_engine = whole
    assert crash_at < whole_engine.calls
    first, second = RandomEngine(crash_at=crash_at), RandomEngine()
    interrupted(tmp_path, first)
    trainer = make_trainer(tmp_path, engine=second, model=policy(), **RUN)
    trainer.train(resume_from_checkpoint=True)
    assert first.sampled + second.sampled == whole_engine.sampled
    assert_equal_runs(trainer, expected)


@pytest.mark.parametrize("save_steps", [0, 3, 8, 100])
@pytest.mark.parametrize("step", [1, 4, 7])
def test_a_crash_in_an_m_step(tmp_path, whole, save_steps, step):
    """Between any two checkpoints, whole iterations apart or in the middle of one."""
    expected, whole_engine = whole
    first, second = RandomEngine(), RandomEngine()
    interrupted(tmp_path, first, callbacks=[KillAt(step)], save_steps=save_steps)
    trainer = make_trainer(tmp_path, engine=second, **{**RUN, "save_steps": save_steps})
    trainer.train(resume_from_checkpoint=True)
    assert first.sampled + second.sampled == whole_engine.sampled
    assert_equal_runs(trainer, expected)


def test_a_crash_between_sampling_and_the_update(tmp_path, whole, monkeypatch):
    expected, whole_engine = whole
    first, second = RandomEngine(), RandomEngine()
    with monkeypatch.context() as patch:
        patch.setattr("vcore_train.gvm.trainer.plan_m_step", _interrupt)
        interrupted(tmp_path, first)
    trainer = make_trainer(tmp_path, engine=second, **RUN)
    trainer.train(resume_from_checkpoint=True)
    assert first.sampled + second.sampled == whole_engine.sampled
    assert_equal_runs(trainer, expected)


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def test_an_earlier_checkpoint_repeats_the_run(tmp_path, whole):
    expected, _ = whole
    second = RandomEngine()
    make_trainer(tmp_path, **RUN).train()
    trainer = make_trainer(tmp_path, engine=second, **RUN)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert second.sampled == 0  # the same weights come again, and so do their responses
    assert_equal_runs(trainer, expected)


def test_responses_of_other_weights_are_not_used(tmp_path, caplog):
    make_trainer(tmp_path, **RUN).train()
    engine = RandomEngine()
    trainer = make_trainer(
        tmp_path, engine=engine, **{**RUN, "clip_high": 0.01, "max_grad_norm": 0.1}
    )
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    # Iteration 1 began at the checkpoint; iteration 2 begins with other weights than before.
    assert engine.sampled == 36
    assert "sampled by other weights and are set aside" in caplog.text
    assert (tmp_path / "rollouts" / "iteration-0002.replaced").is_dir()


def test_in_the_middle_of_an_m_step_responses_must_be_its_own(tmp_path):
    """An old checkpoint, after the run was repeated otherwise from an earlier one."""
    options = {**RUN, "save_steps": 2}
    make_trainer(tmp_path, **{**options, "iterations": 2}).train()
    other = {**options, "iterations": 2, "max_grad_norm": 0.01}
    again = make_trainer(tmp_path, callbacks=[KillAt(5)], **other)
    with pytest.raises(KeyboardInterrupt):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(ValueError, match="responses of other weights"):
        make_trainer(tmp_path, **options).train(
            resume_from_checkpoint=str(tmp_path / "checkpoint-6")
        )


def test_another_base_model_or_verifier_is_noticed(tmp_path):
    def adapted(seed):
        return with_lora(policy(seed=seed))

    options = {**RUN, "iterations": 1}
    interrupted(tmp_path, RandomEngine(), model=adapted(0), callbacks=[KillAt(1)], **options)
    with pytest.raises(ValueError, match="verifier was exact, is math-verify"):
        make_trainer(tmp_path, model=adapted(0), verifier="math-verify", **options).train(
            resume_from_checkpoint=True
        )
    engine = RandomEngine()
    trainer = make_trainer(tmp_path, model=adapted(5), engine=engine, **options)
    trainer.train(resume_from_checkpoint=True)
    assert engine.sampled == 36
    assert (tmp_path / "rollouts" / "iteration-0000.replaced").is_dir()


def test_another_reference_is_noticed(tmp_path):
    options = {**RUN, "objective": "grpo", "beta": 0.1}
    interrupted(tmp_path, RandomEngine(), callbacks=[KillAt(5)], **options)
    with pytest.raises(ValueError, match="reference was"):
        make_trainer(tmp_path, model=policy(seed=4), **options).train(resume_from_checkpoint=True)


def test_steps_are_counted_by_the_state(tmp_path, whole):
    expected, _ = whole
    interrupted(tmp_path, RandomEngine(), callbacks=[KillAt(6)])
    trainer = make_trainer(tmp_path, **{**RUN, "ignore_data_skip": True})
    trainer.train(resume_from_checkpoint=True)
    for name, value in parameters(expected).items():
        assert torch.equal(value, parameters(trainer)[name])


def test_two_processes_in_one_folder(tmp_path):
    trainer = make_trainer(tmp_path, **RUN)
    with alone_in(tmp_path), pytest.raises(ValueError, match="another process is training in"):
        trainer.train()
    trainer.train()


def test_a_failure_before_sampling_leaves_no_run(tmp_path):
    trainer = make_trainer(tmp_path, **RUN)
    tasks, trainer.tasks = trainer.tasks, []
    with pytest.raises(ValueError, match="needs a train_dataset"):
        trainer.train()
    trainer.tasks = tasks
    trainer.train()


def test_a_folder_is_not_mixed_up(tmp_path):
    make_trainer(tmp_path, **RUN).train()
    with pytest.raises(ValueError, match="holds responses of an earlier run"):
        make_trainer(tmp_path, **RUN).train()
    other = make_trainer(tmp_path, **{**RUN, "temperature": 0.5, "allocation": "uniform"})
    with pytest.raises(ValueError, match=r"allocation was gvm, is uniform; temperature was 1\.0"):
        other.train(resume_from_checkpoint=True)
    other = make_trainer(tmp_path, **{**RUN, "epochs_per_iteration": 1})
    with pytest.raises(ValueError, match="epochs_per_iteration was 2, is 1"):
        other.train(resume_from_checkpoint=True)
    with pytest.raises(ValueError, match="was another one: prompts was"):
        make_trainer(tmp_path, data=[{"prompt": "b", "answer": "1"}] * 6, **RUN).train(
            resume_from_checkpoint=True
        )


def test_a_checkpoint_in_the_middle_needs_its_responses(tmp_path):
    import shutil

    make_trainer(tmp_path, **{**RUN, "save_steps": 2}).train()
    folder = tmp_path / "rollouts" / "iteration-0001"
    (folder / "logp.safetensors").unlink()
    trainer = make_trainer(tmp_path, **{**RUN, "save_steps": 2})
    with pytest.raises(ValueError, match="without the log-probabilities of the responses"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    shutil.rmtree(folder)
    trainer = make_trainer(tmp_path, **{**RUN, "save_steps": 2})
    with pytest.raises(ValueError, match="Resume from the checkpoint at its start"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_parquet_resumes(tmp_path, whole):
    expected, _ = whole
    options = {**RUN, "rollout_format": "parquet"}
    interrupted(tmp_path, RandomEngine(), callbacks=[KillAt(6)], rollout_format="parquet")
    engine = RandomEngine()
    trainer = make_trainer(tmp_path, engine=engine, **options)
    trainer.train(resume_from_checkpoint=True)
    assert engine.sampled == 36
    assert_equal_runs(trainer, expected)


@pytest.mark.slow
def test_a_killed_process(tmp_path, whole):
    """SIGKILL while a chunk is being sampled, twice, by the real engine and worker processes."""
    script = textwrap.dedent(
        """
        import os, signal, sys
        sys.path[:0] = sys.argv[3:]
        import torch
        torch.set_num_threads(1)
        from rollouts import TOKENIZER, make_trainer, parameters
        from vcore_train.gvm.engines import TransformersEngine

        class Killed(TransformersEngine):
            left = int(sys.argv[2])

            def sample(self, *args, **kwargs):
                found = super().sample(*args, **kwargs)
                if self.left == 0:
                    os.kill(os.getpid(), signal.SIGKILL)
                self.left -= 1
                return found

        trainer = make_trainer(
            sys.argv[1], engine=Killed(TOKENIZER), save_strategy="steps",
            verifier=lambda text, answer: len(text) % 2,
        )
        trainer.train(resume_from_checkpoint=True)
        torch.save(parameters(trainer), sys.argv[1] + "/end.pt")
        """
    )
    root = Path(__file__).parents[2]
    paths = [str(root / part) for part in ("", "python", "tests", "tests/train")]

    def run(folder, left):
        command = [sys.executable, "-c", script, str(folder), str(left), *paths]
        return subprocess.run(
            command, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
        )

    done = run(tmp_path / "whole", -1)
    assert done.returncode == 0, done.stderr
    for left in (2, 9):
        assert run(tmp_path / "parts", left).returncode == -signal.SIGKILL
    done = run(tmp_path / "parts", -1)
    assert done.returncode == 0, done.stderr
    expected, found = (torch.load(tmp_path / name / "end.pt") for name in ("whole", "parts"))
    assert all(torch.equal(value, found[name]) for name, value in expected.items())


def test_more_iterations_of_a_finished_run(tmp_path, whole):
    expected, _ = whole
    options = {**RUN, "lr_scheduler_type": "constant"}
    make_trainer(tmp_path / "whole", **options).train()
    make_trainer(tmp_path / "parts", **{**options, "iterations": 2}).train()
    trainer = make_trainer(tmp_path / "parts", **options)
    trainer.train(resume_from_checkpoint=True)
    assert logged(trainer, "rollouts") == logged(expected, "rollouts")
    again = make_trainer(tmp_path / "whole", **options)
    again.train(resume_from_checkpoint=True)  # nothing is left to do
    assert all(
        torch.equal(value, parameters(trainer)[name]) for name, value in parameters(again).items()
    )
