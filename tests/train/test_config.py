import pytest
from vcore_train import VcoreConfig


def config(tmp_path, **options):
    return VcoreConfig(output_dir=str(tmp_path), **options)


def test_defaults(tmp_path):
    args = config(tmp_path, per_device_train_batch_size=3)
    assert args.method == "vcore"
    assert args.sharpness == {"kl_budget": 0.02}
    assert args.probe_batch_size == 3
    assert args.remove_unused_columns is False


@pytest.mark.parametrize("name", ["tau", "temperature", "kl_budget"])
def test_one_sharpness(tmp_path, name):
    assert config(tmp_path, **{name: 2.0}).sharpness == {name: 2.0}


@pytest.mark.parametrize("name", ["tau", "kl_budget"])
def test_zero_sharpness_is_uniform(tmp_path, name):
    assert config(tmp_path, **{name: 0}).sharpness == {name: 0}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "dpo"}, r"method must be one of sft, random, .* got 'dpo'"),
        ({"direction": "sgd"}, r"direction must be one of probe, ema, momentum, adam, got 'sgd'"),
        ({"utility_method": "exact"}, r"utility_method must be one of jvp"),
        ({"variance_control": "both"}, r"variance_control must be one of"),
        ({"kl_scope": "epoch"}, r"kl_scope must be one of trajectory, batch"),
        ({"iw_level": "word"}, r"iw_level must be one of"),
        ({"tau": 1.0, "kl_budget": 0.1}, r"at most one of .* got tau=1.0, kl_budget=0.1"),
        ({"kl_budget": -0.1}, r"kl_budget must be a finite number of at least 0, got -0.1"),
        ({"temperature": 0.0}, r"temperature must be a finite number above 0, got 0.0"),
        ({"tau": float("nan")}, r"tau must be a finite number"),
        ({"epsilon": 0.0, "utility_method": "central"}, r"epsilon must be .* above 0, got 0.0"),
        ({"epsilon": 1e-3}, r"epsilon=0.001 has no meaning for utility_method='jvp'"),
        ({"variance_cap": 0.0}, r"variance_cap must be .* above 0"),
        ({"probe_max_norm": -1.0}, r"probe_max_norm must be .* above 0"),
        ({"every": 0}, r"every must be a whole number of at least 1, got 0"),
        ({"every": 1.5}, r"every must be a whole number"),
        ({"anchor_steps": -1}, r"anchor_steps must be a whole number"),
        ({"probe_batch_size": 0}, r"probe_batch_size must be a whole number"),
        ({"max_length": 1}, r"max_length must be a whole number of at least 2"),
        ({"ema_decay": 1.0}, r"ema_decay must be .* below 1, got 1.0"),
        ({"ema_warmup": 0}, r"ema_warmup must be a whole number of at least 1, got 0"),
        ({"direction_precondition": "yes"}, r"direction_precondition must be True or False"),
        ({"direction_params": ""}, r"direction_params must be 'all', 'lm_head'.*got ''"),
        ({"direction_params": ["lm_head", 3]}, r"direction_params must be .* got \['lm_head', 3\]"),
        (
            {"direction_precondition": True, "direction": "adam"},
            r"direction='adam' is preconditioned already.*direction='momentum'",
        ),
        (
            {"direction_precondition": True, "direction": "ema", "optim": "sgd"},
            r"direction_precondition=True reads Adam's second moment, and optim='sgd' has none",
        ),
        ({"random_keep": 0.0}, r"random_keep must be .* above 0 and at most 1"),
        ({"iw_temp": -1.0}, r"iw_temp must be"),
        ({"iw_clip": [2.0, 1.0]}, r"iw_clip must be a lower bound that is not above"),
        ({"iw_clip": [1.0]}, r"iw_clip must be a lower and an upper bound"),
        ({"packing": "yes"}, r"packing must be True or False, got 'yes'"),
        ({"reuse_forward": 1}, r"reuse_forward must be True, False or None, got 1"),
        (
            {"reuse_forward": True, "utility_method": "central"},
            r"reuse_forward=True has no pass to reuse with utility_method='central'",
        ),
        ({"label_smoothing_factor": 0.1}, r"label_smoothing_factor must be 0"),
        ({"torch_compile": True}, r"torch_compile must be False"),
        (
            {"direction": "adam", "optim": "adamw_bnb_8bit"},
            r"optim='adamw_bnb_8bit' has none .*'probe'",
        ),
        ({"direction": "adam", "optim": "sgd"}, r"Use optim=adamw_torch or"),
        ({"direction": "momentum", "optim": "adafactor"}, r"optim='adafactor' has none"),
        (
            {"variance_control": "trajectory", "per_device_train_batch_size": 1},
            r"variance_control='trajectory' .* at least 2 trajectories",
        ),
    ],
)
def test_bad_options(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


@pytest.mark.parametrize(
    ("params", "choice"),
    [
        ("all", "all"),
        ("last_2_layers, lm_head", ["last_2_layers", "lm_head"]),
        (["*.mlp.*"], "*.mlp.*"),
    ],
)
def test_direction_params(tmp_path, params, choice):
    assert config(tmp_path, direction_params=params).direction_choice == choice


def test_fp16_is_refused_for_vcore_only(tmp_path):
    with pytest.raises(ValueError, match=r"fp16=True does not work .* bf16=True"):
        config(tmp_path, fp16=True)


def test_optimizer_does_not_matter_where_it_is_not_read(tmp_path):
    assert config(tmp_path, optim="adafactor", direction="ema").direction == "ema"
    assert config(tmp_path, optim="adafactor", direction="adam", method="sft").method == "sft"


def test_is_parsed_from_a_command_line(tmp_path):
    from transformers import HfArgumentParser

    (args,) = HfArgumentParser(VcoreConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--tau", "3", "--packing", "--iw_clip", "0.5", "2"]
    )
    assert args.sharpness == {"tau": 3.0}
    assert args.packing is True
    assert args.iw_clip == [0.5, 2.0]
