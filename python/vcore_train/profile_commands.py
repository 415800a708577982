"""``vcore profile``: where the time and the memory of a training step go."""

from pathlib import Path
from typing import Annotated, Any

from vcore_train.command_options import (
    DATA,
    MODEL,
    RUN,
    Accumulation,
    Bf16,
    Checkpointing,
    Cpu,
    Every,
    Heads,
    Hidden,
    Layers,
    Limit,
    LoraRank,
    Objective,
    Optim,
    Pretrained,
    PretrainedDtype,
    ReuseForward,
    Seed,
    Split,
    Utilities,
    option,
)
from vcore_train.console import console, quiet_other_libraries
from vcore_train.option_checks import check_profile, in_options


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
    method: Objective = "vcore",
    proton: Annotated[
        bool,
        option("Also Triton's Proton: each kernel's flops and bytes. Needs a GPU.", "--proton"),
    ] = False,
    model: Pretrained = None,
    dtype: PretrainedDtype = None,
    layers: Layers = None,
    hidden: Hidden = None,
    heads: Heads = None,
    lora: Annotated[bool, option("Train LoRA adapters.", "--lora", panel=MODEL)] = False,
    lora_rank: LoraRank = None,
    every: Every = None,
    utility_method: Utilities = None,
    reuse_forward: ReuseForward = None,
    steps: Annotated[int, option("Steps in the profile; two more come before.", panel=RUN)] = 3,
    batch_size: Annotated[int, option("Rows in a micro-batch.", panel=RUN)] = 8,
    accumulation: Accumulation = 1,
    optim: Optim = "adamw_torch",
    bf16: Bf16 = False,
    checkpointing: Checkpointing = False,
    cpu: Cpu = False,
    seed: Seed = 42,
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
        "reuse_forward": reuse_forward,
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
