"""How the commands declare their options, and the ones that two of them share."""

from typing import Annotated, Any, Literal

import typer

DATA, MODEL, RUN = "Data", "Model", "Training"
WEIGHTS = "VCORE: direction, utilities, weights"

Method = Literal["sft", "random", "dft", "iw_sft", "vcore"]
UtilityMethod = Literal["jvp", "central", "finite_difference"]


def option(
    help: str, *names: str, panel: str | None = None, default: str | None = None, **kwargs: Any
) -> Any:
    """``default``: what leaving the option out means, where its own default is None."""
    if default is not None:
        help = f"{help.removesuffix('.')} (default: {default})."
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)


PromptField = Annotated[
    str | None, option("Field of the prompt; by default recognised.", panel=DATA)
]
AnswerField = Annotated[
    str | None, option("Field of the answer; by default recognised.", panel=DATA)
]
Unanswered = Annotated[
    Literal["error", "skip"],
    option("What becomes of a row without a reference answer.", panel=DATA),
]
Split = Annotated[str, option("Split of a dataset.", panel=DATA)]
Limit = Annotated[int | None, option("Only the first rows.", panel=DATA)]
EvalLimit = Annotated[int | None, option("Only the first held-out rows.", panel=DATA)]
Objective = Annotated[Method, option("Objective.")]
Pretrained = Annotated[
    str | None,
    option("Pretrained model: path or name. Without it, a small one from scratch.", panel=MODEL),
]
PretrainedDtype = Annotated[
    str | None,
    option(
        "Precision of pretrained weights: float32, bfloat16, float16, auto.",
        default="float32",
        panel=MODEL,
    ),
]
Layers = Annotated[
    int | None, option("Layers of a Qwen3 model from scratch.", default="6", panel=MODEL)
]
Hidden = Annotated[int | None, option("Its width.", default="256", panel=MODEL)]
Heads = Annotated[int | None, option("Its attention heads.", default="4", panel=MODEL)]
Lora = Annotated[bool, option("Train LoRA adapters over --model.", "--lora", panel=MODEL)]
LoraRank = Annotated[int | None, option("Rank of the adapters.", default="8", panel=MODEL)]
LoraAlpha = Annotated[int | None, option("Scale of the adapters.", default="16", panel=MODEL)]
LoraTargets = Annotated[
    str | None,
    option("Adapted modules, comma-separated, or all-linear.", default="all-linear", panel=MODEL),
]
Utilities = Annotated[
    UtilityMethod | None, option("How utilities are computed.", panel=WEIGHTS, default="jvp")
]
Every = Annotated[
    int | None, option("Steps that a direction is kept for.", panel=WEIGHTS, default="1")
]
ReuseForward = Annotated[
    bool | None,
    option(
        "Train by the probe's forward pass, not by a second one.",
        "--reuse-forward/--no-reuse-forward",
        panel=WEIGHTS,
        default="where it takes little memory",
    ),
]
Overwrite = Annotated[bool, option("Replace an earlier run in --out.", "--overwrite")]
Accumulation = Annotated[int, option("Micro-batches in an optimizer step.", panel=RUN)]
Seed = Annotated[int, option("Of weights, data order and probes.", panel=RUN)]
Warmup = Annotated[float, option("Warm-up: steps, or below 1 a share of all.", panel=RUN)]
WeightDecay = Annotated[float, option("Weight decay.", panel=RUN)]
MaxGradNorm = Annotated[float, option("Gradients are clipped to this norm; 0 for none.", panel=RUN)]
Optim = Annotated[str, option("Optimizer, by its name in transformers.", panel=RUN)]
Bf16 = Annotated[bool, option("Compute in bfloat16 (autocast).", "--bf16", panel=RUN)]
Checkpointing = Annotated[
    bool, option("Gradient checkpointing.", "--gradient-checkpointing", panel=RUN)
]
Cpu = Annotated[bool, option("Use the CPU where there is a GPU too.", "--cpu", panel=RUN)]
Keep = Annotated[int, option("Checkpoints to keep.", panel=RUN)]
