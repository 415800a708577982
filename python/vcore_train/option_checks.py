"""What the options of a command may be, and which of them mean something beside which others.

Options are given by name as in ``vcore_train.commands``; None is one that was not given. Every
mistake is a ValueError of one line that names the option.
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

SHARPNESS = ("kl_budget", "tau", "temperature")
VCORE = (
    *(
        "direction",
        "direction_precondition",
        "direction_params",
        "utility_method",
        "epsilon",
        *SHARPNESS,
        "kl_scope",
        "variance_control",
    ),
    *("variance_cap", "every", "anchor_steps", "probe_batch_size", "probe_replacement"),
    *("probe_max_norm", "ema_decay", "ema_warmup", "reuse_forward"),
)


class Range(NamedTuple):
    low: float
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    def __contains__(self, value: object) -> bool:
        if not isinstance(value, int | float) or not math.isfinite(value):
            return False
        above = value > self.low if self.low_open else value >= self.low
        return above and (value < self.high if self.high_open else value <= self.high)

    def __str__(self) -> str:
        text = f"{'above' if self.low_open else 'at least'} {self.low}"
        if self.high < math.inf:
            return f"{text} and {'below' if self.high_open else 'at most'} {self.high}"
        return text if self.low_open else f"{text} and finite" if self.low == 0 else text


COUNT, TOKENS = Range(1), Range(2)
POSITIVE, NOT_NEGATIVE = Range(0, low_open=True), Range(0)
RANGES = {
    **dict.fromkeys(("steps", "batch_size", "accumulation", "save_every", "keep"), COUNT),
    **dict.fromkeys(("log_every", "limit", "eval_limit", "every", "anchor_steps"), COUNT),
    **dict.fromkeys(("probe_batch_size", "layers", "hidden", "heads", "kv_heads"), COUNT),
    "ema_warmup": COUNT,
    **dict.fromkeys(("intermediate", "lora_rank", "lora_alpha", "probe_rows"), COUNT),
    **dict.fromkeys(("max_length", "window"), TOKENS),
    **dict.fromkeys(("lr", "epochs", "temperature", "epsilon", "probe_max_norm"), POSITIVE),
    **dict.fromkeys(("warmup", "weight_decay", "max_grad_norm", "kl_budget", "tau"), NOT_NEGATIVE),
    **dict.fromkeys(("iw_temp", "variance_cap"), NOT_NEGATIVE),
    **dict.fromkeys(("lora_dropout", "ema_decay"), Range(0, 1, high_open=True)),
    "random_keep": Range(0, 1, low_open=True),
    **dict.fromkeys(("iterations", "prompts_per_iteration", "samples_per_prompt"), COUNT),
    **dict.fromkeys(("steps_per_iteration", "epochs_per_iteration", "max_new_tokens"), COUNT),
    **dict.fromkeys(("generation_batch_size", "eval_samples", "verifier_workers"), COUNT),
    **dict.fromkeys(("temperature", "verifier_seconds"), POSITIVE),
    **dict.fromkeys(("clip_low", "clip_high", "beta", "stage1_samples", "top_k"), NOT_NEGATIVE),
    **dict.fromkeys(("budget",), NOT_NEGATIVE),
    "top_p": Range(0, 1, low_open=True),
    "seed": Range(0, 2**32 - 1),
}
# Names in messages of the library, where the option is called otherwise.
FLAGS = {
    "checkpointing": "--gradient-checkpointing",
    "per_device_train_batch_size": "--batch-size",
    "gradient_accumulation_steps": "--accumulation",
    "learning_rate": "--lr",
    "max_steps": "--steps",
    "num_train_epochs": "--epochs",
    "warmup_steps": "--warmup",
    "lr_scheduler_type": "--schedule",
}
# Options of ``vcore gvm`` that are called as in GvmConfig.
GVM = (
    *("allocation", "allocation_options", "stage1_samples", "reuse_stage1", "objective"),
    *("samples_per_prompt", "prompts_per_iteration", "prompt_weighting", "aggregation", "beta"),
    *("dual_clip", "advantage_scale", "grad_norm_params", "max_new_tokens", "verifier"),
)


def flag(name: str) -> str:
    return FLAGS.get(name, f"--{name.replace('_', '-')}")


def check_numbers(options: Mapping[str, Any]) -> None:
    """Raises for a number out of its range, and for more than one way to say how sharp."""
    for name, allowed in RANGES.items():
        value = options.get(name)
        if value is not None and value not in allowed:
            raise ValueError(f"{flag(name)} must be {allowed}, got {value}.")
    sharp = [name for name in SHARPNESS if options.get(name) is not None]
    if len(sharp) > 1:
        raise ValueError(
            f"pass at most one of {', '.join(map(flag, SHARPNESS))}, got "
            f"{' and '.join(f'{flag(name)} {options[name]}' for name in sharp)}."
        )


def check_train(options: Mapping[str, Any]) -> None:
    """Raises for options of ``vcore train`` that are wrong or would be ignored."""
    check_numbers(options)
    options = {**options, "lora": options["lora"] or None}
    method, model = options["method"], options["model"]
    _needs(options, ("dtype", "lora"), model, "--model")
    _needs(
        options,
        ("lora_rank", "lora_alpha", "lora_dropout", "lora_targets"),
        options["lora"],
        "--lora",
    )
    _needs(options, ("eval_limit",), options["eval_data"], "--eval-data")
    _needs(options, VCORE, method == "vcore", "--method vcore")
    _needs(options, ("random_keep",), method == "random", "--method random")
    _needs(options, ("iw_level", "iw_temp", "iw_clip"), method == "iw_sft", "--method iw_sft")
    averaged = options["direction"] == "ema"
    _needs(options, ("ema_decay", "ema_warmup"), averaged, "--direction ema")
    differences = options["utility_method"] in ("central", "finite_difference")
    _needs(options, ("epsilon",), differences, "--utility-method central (or finite_difference)")
    _needs(options, ("reuse_forward",), not differences, "--utility-method jvp")
    _excludes(options, "steps", ("epochs",), "the steps are given")
    _excludes(options, "tau", ("kl_scope",), "there is no budget")
    _excludes(options, "temperature", ("kl_scope",), "there is no budget")
    size = ("layers", "hidden", "heads", "kv_heads", "intermediate", "window")
    _excludes(options, "model", ("model_config", *size), "the size is given by --model already")
    _excludes(options, "model_config", size, "the size is given by --model-config already")
    _excludes(options, "model", ("vocab_size",), "the model has a tokenizer")
    _excludes(options, "tokenizer", ("vocab_size",), "no tokenizer is trained")
    _needs(options, ("fsdp_config",), options["fsdp"], "--fsdp")


def check_profile(options: Mapping[str, Any]) -> None:
    """Raises for options of ``vcore profile`` that are wrong or would be ignored."""
    check_numbers(options)
    probing = ("every", "utility_method", "reuse_forward")
    _needs(options, probing, options["method"] == "vcore", "--method vcore")
    differences = options["utility_method"] in ("central", "finite_difference")
    _needs(options, ("reuse_forward",), not differences, "--utility-method jvp")
    _needs(options, ("lora_rank",), options["lora"], "--lora")
    _needs(options, ("dtype",), options["model"], "--model")
    _excludes(options, "model", ("layers", "hidden", "heads"), "the size is given by --model")


def check_gvm(options: Mapping[str, Any]) -> None:
    """Raises for options of ``vcore gvm`` that are wrong or would be ignored."""
    check_numbers(options)
    adapters = ("lora_rank", "lora_alpha", "lora_targets")
    _needs(options, adapters, options["lora"], "--lora")
    _needs(options, ("eval_limit",), options["eval_data"], "--eval-data")
    _needs(options, ("engine_options",), options["engine"] == "vllm", "--engine vllm")
    _needs(options, ("dual_clip",), options["objective"] == "grpo", "--objective grpo")


def in_options(message: str) -> str:
    """A message of the library's configuration or trainer in the words of the command line."""
    head, colon, text = message.partition(": ")
    sources = (
        *("VcoreConfig", "VcoreTrainer", "reuse_forward", "train_tokenizer", "dataset"),
        *("GvmConfig", "GvmTrainer"),
    )
    if not colon or head not in sources:
        return message

    def named(match: re.Match[str]) -> str:
        name, follows = match["name"], match["follows"] or ""
        known = name in FLAGS or name in (*VCORE, *GVM, "vocab_size", "iw_clip") or name in RANGES
        if not known or ("_" not in name and not follows):
            return match[0]
        return flag(name) + (" " if follows == "=" else follows)

    return re.sub(r"(?<![-\w])(?P<name>[a-z_][a-z_0-9]*)\b(?P<follows>=| must)?", named, text)


def _given(options: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [flag(name) for name in names if options[name] is not None]


def _needs(options: Mapping[str, Any], names: tuple[str, ...], there: object, needed: str) -> None:
    given = _given(options, names)
    if given and not there:
        many = len(given) > 1
        raise ValueError(
            f"{', '.join(given)} {'mean' if many else 'means'} nothing without {needed}: pass "
            f"{needed} too, or drop {'them' if many else 'it'}."
        )


def _excludes(options: Mapping[str, Any], with_: str, names: tuple[str, ...], reason: str) -> None:
    given = _given(options, names)
    if given and options[with_] is not None:
        raise ValueError(
            f"{', '.join(given)} beside {flag(with_)}: {reason}. Drop one or the other."
        )
