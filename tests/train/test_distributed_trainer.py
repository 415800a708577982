"""VcoreTrainer under DDP and FSDP2 against one process: the same losses, figures, parameters."""

import json
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from fsdp_on_cpu import allow_fsdp_on_cpu
from ranks import run_ranks
from tiny import tiny_model, with_lora
from torch.distributed.tensor import DTensor
from training import example_rows, logged, make_trainer
from vcore_train.sharding import reshard

pytestmark = pytest.mark.distributed

FSDP = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
OPTIONS = {
    "optim": "adamw_torch",
    # Adam gives an entry whose gradient is nothing but rounding a step like any other.
    "adam_epsilon": 1e-5,
    "learning_rate": 0.003,
    "max_steps": 3,
    "kl_budget": 0.1,
    "max_grad_norm": 1.0,
}


def model_of(kind):
    return with_lora(tiny_model("qwen3")) if kind == "lora" else tiny_model("qwen3")


def _train(kind, folder, options, *, resume=None, rows=None):
    """Parameters and log of a run in this process, which may be one of several."""
    allow_fsdp_on_cpu()
    warnings.simplefilter("ignore", FutureWarning)
    trainer = make_trainer(
        folder, model=model_of(kind), rows=rows, eval_rows=example_rows(6, seed=9), **options
    )
    trainer.train(resume_from_checkpoint=resume)
    evaluated = trainer.evaluate()["eval_loss"]
    reshard(trainer.model)
    parameters = {
        n: (p.full_tensor() if isinstance(p, DTensor) else p).detach().clone()
        for n, p in trainer.model.named_parameters()
        if p.requires_grad
    }
    names = ("loss", "nll", "kl", "alpha", "tau", "ess", "utility_mean", "supervised_tokens")
    log = {name: values for name in names if (values := logged(trainer, name))}
    return parameters, log, evaluated


def _train_with(kind, folder, options, batch_size, resume, rows):
    options = {**options, "per_device_train_batch_size": batch_size}
    return _train(kind, folder, options, resume=resume, rows=rows)


def run(ranks, kind, folder, options, *, batch=8, resume=None, rows=None):
    """A run on so many ranks, each with its part of the batch."""
    args = (kind, str(folder), options, batch // ranks, resume, rows)
    return _train_with(*args) if ranks == 0 else run_ranks(ranks, _train_with, *args)[0]


def alone(kind, folder, options, *, batch=8, resume=None, rows=None):
    return _train_with(kind, str(folder), options, batch, resume, rows)


def same(actual, expected, rtol=1e-5):
    """A run on rank 0 and one in one process."""
    (parameters, log, evaluated), (its_parameters, its_log, its_evaluated) = actual, expected
    assert log.keys() == its_log.keys()
    for name, values in its_log.items():
        assert log[name] == pytest.approx(values, rel=10 * rtol, abs=1e-6), name
    assert evaluated == pytest.approx(its_evaluated, rel=rtol)
    assert parameters.keys() == its_parameters.keys()
    for name, value in its_parameters.items():
        error = float((parameters[name] - value).norm() / value.norm())
        assert error <= rtol, f"{name}: {error:.3g}, allowed {rtol:.3g}"


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["full", "lora"])
@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_run_is_that_of_one_process(tmp_path, ranks, kind, sharding):
    options = {**OPTIONS, **(FSDP if sharding == "fsdp" else {})}
    same(
        run(ranks, kind, tmp_path / "n", options),
        alone(kind, tmp_path / "1", OPTIONS),
    )


VARIANTS = {
    "ema": {"direction": "ema", "every": 2, "ema_warmup": 2, "kl_scope": "batch"},
    "adam": {"direction": "adam", "variance_control": "trajectory"},
    "preconditioned": {"direction_precondition": True, "variance_control": "ess"},
    "clipped": {"probe_max_norm": 1.0, "probe_batch_size": 5, "variance_control": "loss"},
    "central": {"utility_method": "central", "epsilon": 1e-3, "optim": "sgd"},
    "part": {"direction_params": "last_1_layers", "gradient_checkpointing": True},
    "packed": {"packing": True, "gradient_accumulation_steps": 2, "anchor_steps": 2},
    "dft": {"method": "dft"},
    "iw_sft": {"method": "iw_sft"},
    "sft": {"method": "sft", "gradient_accumulation_steps": 2},
}


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_option_is_that_of_one_process(tmp_path, name, sharding):
    options = {**OPTIONS, **VARIANTS[name]}
    several = {**options, **(FSDP if sharding == "fsdp" else {})}
    expected = alone("full", tmp_path / "1", options)
    # Differences of losses amplify the rounding of passes, which sum in another order.
    rtol = 1e-4 if name == "central" else 1e-5
    same(run(2, "full", tmp_path / "n", several), expected, rtol)


def _half_supervised(folder, options, batch_size):
    """Of every 8 examples the last 4 have no supervised token: with 2 ranks, all of rank 1."""
    allow_fsdp_on_cpu()
    warnings.simplefilter("ignore", FutureWarning)
    options = {**options, "per_device_train_batch_size": batch_size}
    trainer = make_trainer(folder, **options)
    own = trainer.data_collator

    def collate(rows):
        batch = own(rows)
        batch["labels"][4 if batch_size == 8 else 0 if dist.get_rank() else 4 :] = -100
        return batch

    trainer.data_collator = collate
    trainer.train()
    return logged(trainer, "loss"), logged(trainer, "alpha"), logged(trainer, "nll")


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_a_rank_without_supervised_tokens_takes_part(tmp_path, sharding):
    several = {**OPTIONS, **(FSDP if sharding == "fsdp" else {})}
    expected = _half_supervised(str(tmp_path / "1"), OPTIONS, 8)
    for result in run_ranks(2, _half_supervised, str(tmp_path / "n"), several, 4, timeout=90):
        for values, its_values in zip(result, expected, strict=True):
            assert values == pytest.approx(its_values, rel=1e-4)


@pytest.mark.parametrize("sharding", ["ddp", "fsdp"])
def test_bfloat16_trains_alike(tmp_path, sharding):
    """FSDP2 gathers, computes and reduces in bfloat16; losses are not rounded to it."""
    options = {**OPTIONS, "bf16": True, "reuse_forward": False}  # which rounds elsewhere
    several = {**options, **(FSDP if sharding == "fsdp" else {})}
    parameters, log, evaluated = run(2, "lora", tmp_path / "n", several)
    its_parameters, its_log, its_evaluated = alone("lora", tmp_path / "1", options)
    assert evaluated == pytest.approx(its_evaluated, rel=1e-2)
    assert log["loss"] == pytest.approx(its_log["loss"], rel=1e-2)
    assert log["kl"] == pytest.approx(its_log["kl"], rel=1e-3)
    assert any(loss != torch.tensor(loss).bfloat16().item() for loss in log["loss"])
    start = {n: p.detach() for n, p in model_of("lora").named_parameters() if p.requires_grad}
    moved = torch.cat([(parameters[n] - start[n]).flatten() for n in start])
    expected = torch.cat([(its_parameters[n] - start[n]).flatten() for n in start])
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.98


def _mistakes(folder):
    trainer = make_trainer(folder, eval_rows=example_rows(4), **OPTIONS)
    trainer.evaluate()
    with pytest.raises(ValueError, match=r"evaluate\(\) or predict\(\) came before train\(\)"):
        trainer.train()
    with pytest.raises(ValueError, match="average_tokens_across_devices=False"):
        make_trainer(folder, average_tokens_across_devices=False, **OPTIONS)


def test_what_would_let_processes_drift_apart_is_refused(tmp_path):
    run_ranks(2, _mistakes, str(tmp_path))


# ---- checkpoints ----

KEPT = {**OPTIONS, "direction": "ema", "every": 2, "save_strategy": "steps", "save_steps": 3}
# Six steps of which the checkpoint is in the middle; the direction is kept over it.
WHOLE = {**KEPT, "max_steps": 6, "save_only_model": False}


def test_a_sharded_checkpoint_goes_on_with_any_number_of_ranks(tmp_path):
    folder = tmp_path / "run"
    expected = alone("full", tmp_path / "alone", {**WHOLE, "save_strategy": "no"})
    run(2, "full", folder, {**WHOLE, **FSDP, "max_steps": 3})
    checkpoint = folder / "checkpoint-3"
    state = json.loads((checkpoint / "vcore_state.json").read_text())
    assert state["sharded"].keys() == {n for n in state["order"] if n.startswith("direction/")}
    for ranks in (4, 1):
        resumed = run(
            ranks, "full", tmp_path / f"on{ranks}", {**WHOLE, **FSDP}, resume=str(checkpoint)
        )
        same(resumed, expected)


def test_a_checkpoint_of_ddp_goes_on_with_any_number_of_ranks(tmp_path):
    folder = tmp_path / "run"
    expected = alone("lora", tmp_path / "alone", {**WHOLE, "save_strategy": "no"})
    run(2, "lora", folder, {**WHOLE, "max_steps": 3})
    checkpoint = folder / "checkpoint-3"
    assert not list(checkpoint.glob("vcore_state_*"))
    same(run(4, "lora", tmp_path / "on4", WHOLE, resume=str(checkpoint)), expected)
    same(alone("lora", tmp_path / "on1", WHOLE, resume=str(checkpoint)), expected)


KILLED = """
import os, signal, sys
import torch.distributed as dist
import vcore_train.mixin as mixin
from test_distributed_trainer import FSDP, WHOLE, _train_with

real, calls = mixin.token_utilities_and_nll, []

def utilities(*args, **options):
    calls.append(1)
    if len(calls) == 5 and dist.get_rank() == 1:  # in the probe of the fifth step
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **options)

if __name__ == "__main__":
    mixin.token_utilities_and_nll = utilities
    _train_with("full", sys.argv[1], {**WHOLE, **FSDP, "ddp_timeout": 30}, 4, None, None)
"""


def test_a_rank_killed_in_a_probe_ends_the_job(tmp_path):
    script = tmp_path / "killed.py"
    script.write_text(KILLED)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, str(script), str(tmp_path / "run")],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0
    assert "Signal 9 (SIGKILL)" in done.stderr
    checkpoint = tmp_path / "run" / "checkpoint-3"
    assert sorted((tmp_path / "run").glob("checkpoint-*")) == [checkpoint]
    expected = alone("full", tmp_path / "alone", {**WHOLE, "save_strategy": "no"})
    options = {**WHOLE, **FSDP}
    same(run(2, "full", tmp_path / "again", options, resume=str(checkpoint)), expected)
