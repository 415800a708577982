"""VcoreTrainer under DDP and FSDP2 against one process: the same losses, figures, parameters."""

import warnings

import pytest
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
