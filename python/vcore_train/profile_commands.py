"""``vcore profile``: where the time and the memory of a training step go."""

from pathlib import Path
from typing import Annotated, Any, Literal

from vcore_train.command_options import (
    DATA,
    MODEL,
    RUN,
    Bf16,
    Checkpointing,
    Cpu,
    Limit,
    LoraRank,
    Optim,
    Split,
    option,
)
from vcore_train.console import console, quiet_other_libraries
from vcore_train.option_checks import check_profile, in_options

Method = Literal["sft", "random", "dft", "iw_sft", "vcore"]
UtilityMethod = Literal["jvp", "central", "finite_difference"]
WEIGHTS = "VCORE: direction, utilities, weights"


def profile(
    data: Annotated[
        str | None,
        option(
            "Rows to train on, in any form that vcore train reads; by default generated "
            "arithmetic.",
            panel=DATA,
        ),
    ] = None,
    split: Split = "train",
    limit: Limit = None,
    out: Annotated[Path, option("Folder for trace, table and picture.")] = Path("vcore-profile"),
    overwrite: Annotated[bool, option("Replace an earlier profile in --out.", "--overwrite")] = (
        False
    ),
    method: Annotated[Method, option("Objective.")] = "vcore",
    proton: Annotated[
        bool,
        option("Also Triton's Proton: each kernel's flops and bytes. Needs a GPU.", "--proton"),
    ] = False,
    model: Annotated[
        str | None,
        option(
            "Pretrained model: path or name. Without it, a small one from scratch.", panel=MODEL
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        option(
            "Precision of pretrained weights: float32, bfloat16, float16, auto.",
            default="float32",
            panel=MODEL,
        ),
    ] = None,
    layers: Annotated[
        int | None, option("Layers of a Qwen3 model from scratch.", default="6", panel=MODEL)
    ] = None,
    hidden: Annotated[int | None, option("Its width.", default="256", panel=MODEL)] = None,
    heads: Annotated[int | None, option("Its attention heads.", default="4", panel=MODEL)] = None,
    lora: Annotated[bool, option("Train LoRA adapters.", "--lora", panel=MODEL)] = False,
    lora_rank: LoraRank = None,
    every: Annotated[
        int | None, option("Steps that a direction is kept for.", panel=WEIGHTS, default="1")
    ] = None,
    utility_method: Annotated[
        UtilityMethod | None,
        option("How utilities are computed.", panel=WEIGHTS, default="jvp"),
    ] = None,
    reuse_forward: Annotated[
        bool,
        option(
            "Train by the probe's forward pass, not by a second one.",
            "--reuse-forward",
            panel=WEIGHTS,
        ),
    ] = False,
    steps: Annotated[int, option("Steps in the profile; two more come before.", panel=RUN)] = 3,
    batch_size: Annotated[int, option("Rows in a micro-batch.", panel=RUN)] = 8,
    accumulation: Annotated[int, option("Micro-batches in an optimizer step.", panel=RUN)] = 1,
    optim: Optim = "adamw_torch",
    bf16: Bf16 = False,
    checkpointing: Checkpointing = False,
    cpu: Cpu = False,
    seed: Annotated[int, option("Of weights, data order and probes.", panel=RUN)] = 42,
) -> None:
    """Where the time and the memory of a training step go: a trace, a table, a picture.

    Profiles a few steps of VcoreTrainer. docs/profiling.md says how to read the result.
    """
    given = dict(locals())
    check_profile(given)
    quiet_other_libraries()
    import torch

    from vcore_train.models import Size
    from vcore_train.profiling import ProfileOptions, run_profile
    from vcore_train.training import LoraOptions

    size = {"layers": layers, "hidden": hidden, "heads": heads}
    chosen = {
        "every": every,
        "utility_method": utility_method,
        "reuse_forward": reuse_forward or None,
    }
    arguments: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    arguments |= {
        "method": method,
        "per_device_train_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "optim": optim,
        "bf16": bf16,
        "gradient_checkpointing": checkpointing,
        "use_cpu": cpu or not torch.accelerator.is_available(),
        "seed": seed,
    }
    adapter = LoraOptions() if lora_rank is None else LoraOptions(rank=lora_rank)
    options = ProfileOptions(
        out=out,
        steps=steps,
        arguments=arguments,
        data=data,
        split=split,
        limit=limit,
        model=model,
        dtype=dtype or "float32",
        size=Size(**{name: value for name, value in size.items() if value is not None}),
        lora=adapter if lora else None,
        proton=proton,
        overwrite=overwrite,
    )
    try:
        run_profile(options, console)
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error
