import pytest
from vcore_train import GvmConfig


def config(**options):
    return GvmConfig(output_dir="unused", use_cpu=True, report_to="none", **options)


def test_what_follows_from_the_options():
    args = config(iterations=3, steps_per_iteration=4, epochs_per_iteration=2)
    assert args.max_steps == 24
    assert args.steps_of_iteration == args.save_steps == args.eval_steps == 8
    assert args.stage1 == 4
    assert (args.weighting, args.loss_aggregation) == ("lemma1", "dr-grpo")
    assert config(allocation="uniform").stage1 == 0
    assert config(allocation="uniform", stage1_samples=2).stage1 == 2
    assert config(objective="grpo").weighting == "algorithm1"
    assert config(prompt_weighting="token_mean").loss_aggregation == "token-mean"
    assert config(save_steps=3, eval_steps=5).save_steps == 3
    assert config(allocation_options='{"alpha": 0.5}').allocation_options == {"alpha": 0.5}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be a whole number of at least 1, got 0"),
        ({"samples_per_prompt": 2.5}, "samples_per_prompt must be a whole number"),
        ({"steps_per_iteration": True}, "steps_per_iteration must be a whole number"),
        ({"temperature": 0}, "temperature must be a finite number above 0"),
        ({"temperature": float("nan")}, "temperature must be a finite number above 0"),
        ({"top_p": 1.5}, "top_p must be a finite number above 0 and at most 1, got 1.5"),
        ({"clip_low": -0.1}, "clip_low must be a finite number of at least 0"),
        ({"beta": float("inf")}, "beta must be a finite number"),
        ({"dual_clip": 1.0}, "dual_clip must be a finite number above 1"),
        ({"objective": "ppo"}, "objective must be one of raft, raft[+][+], grpo, got 'ppo'"),
        ({"allocation": "best"}, "allocation must be one of uniform, gvm"),
        ({"allocation_options": [1]}, "allocation_options must be a dictionary"),
        ({"allocation_options": {"enough": 2}}, "no option 'enough'; it has alpha"),
        ({"allocation_options": {"alpha": "much"}}, "allocation_options {'alpha': 'much'}"),
        ({"allocation_options": {"alpha": -1.0}}, "alpha must be"),
        ({"grad_norm_average": "max"}, "grad_norm_average must be one of mean, rms"),
        ({"rollout_format": "csv"}, "rollout_format must be one of jsonl, parquet"),
        ({"mask_truncated": 1}, "mask_truncated must be True or False"),
        ({"max_steps": 7}, "max_steps must be left out"),
        ({"gradient_accumulation_steps": 2}, "gradient_accumulation_steps must be 1"),
        ({"fp16": True}, "fp16"),
        ({"num_train_epochs": 9}, "num_train_epochs must be 3.0: it has no meaning here"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha must be None"),
        ({"allocation": "reinforce_ada", "allocation_options": {"round_size": 1.5}}, "round_size"),
        ({"save_strategy": "epoch"}, "save_strategy must be 'steps' or 'no'"),
        ({"stage1_samples": 0}, "stage1_samples=0 measures none"),
        ({"samples_per_prompt": 4}, "leaves none to train on"),
        ({"samples_per_prompt": 3, "reuse_stage1": True}, "leaves none to train on"),
        ({"aggregation": "token-mean"}, "divides by tokens"),
        ({"objective": "grpo", "prompt_weighting": "lemma1"}, "learns from rejected ones too"),
        ({"beta": 0.1}, "beta belongs to GRPO"),
        ({"dual_clip": 3.0}, "dual_clip belongs to GRPO"),
        ({"advantage_scale": "batch"}, "advantage_scale belongs to GRPO"),
    ],
    ids=str,
)
def test_bad_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        config(**options)


def test_the_options_parse_from_a_command_line():
    from transformers import HfArgumentParser

    words = ["--output_dir", "unused", "--report_to", "none", "--use_cpu", "--iterations", "3"]
    words += ["--allocation_options", '{"alpha": 0.5}', "--reuse_stage1", "--top_p", "0.9"]
    (args,) = HfArgumentParser(GvmConfig).parse_args_into_dataclasses(words)
    assert (args.iterations, args.reuse_stage1, args.top_p) == (3, True, 0.9)
    assert args.allocation_options == {"alpha": 0.5}


def test_the_budget_may_be_all_first_stage_where_it_is_reused():
    assert config(samples_per_prompt=4, reuse_stage1=True).stage1 == 4
