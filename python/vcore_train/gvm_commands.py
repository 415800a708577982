"""``vcore gvm`` and ``vcore gvm allocate``."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer
from typer.core import TyperGroup

from vcore_train.command_options import (
    DATA,
    MODEL,
    RUN,
    AnswerField,
    Bf16,
    Checkpointing,
    Cpu,
    EvalLimit,
    Keep,
    Limit,
    Lora,
    LoraAlpha,
    LoraRank,
    LoraTargets,
    MaxGradNorm,
    Optim,
    Overwrite,
    PromptField,
    Split,
    Unanswered,
    Warmup,
    WeightDecay,
    option,
)
from vcore_train.console import console, quiet_other_libraries
from vcore_train.option_checks import check_gvm, check_numbers, in_options

Objective = Literal["raft", "raft++", "grpo"]
Rule = Literal["gvm", "uniform", "neyman", "knapsack", "reinforce_ada"]
Weighting = Literal["lemma1", "algorithm1", "token_mean"]
Aggregation = Literal[
    "token-mean",
    "dapo",
    "seq-mean-token-sum",
    "seq-mean-token-mean",
    "seq-mean-token-sum-norm",
    "dr-grpo",
]
Engine = Literal["transformers", "vllm"]
Norm = Literal["mean", "rms"]
Scale = Literal["group", "batch", "none"]
Schedule = Literal["linear", "cosine", "constant", "constant_with_warmup"]
Format = Literal["jsonl", "parquet"]

SAMPLING, LOSS = "Sampling", "Loss"


class TrainByDefault(TyperGroup):
    """``vcore gvm PROMPTS`` is ``vcore gvm train PROMPTS``."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        return super().resolve_command(ctx, args if args[0] in self.commands else ["train", *args])

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        # An option before the prompts is one of train: the group has none but --help.
        if args and args[0].startswith("-") and args[0] not in ctx.help_option_names:
            args = ["train", *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=TrainByDefault,
    help="Sample responses where they teach most (GVM), and train on them: RAFT++, GRPO.",
    no_args_is_help=True,
)


def options_of_file(context: typer.Context, value: Path | None) -> Path | None:
    """Takes the options in the file as defaults, so that the command line wins."""
    if value is not None:
        from vcore_train.config_file import read_options

        context.default_map = read_options(value, get_type_hints(train), "vcore gvm")
    return value


@app.command()
def train(
    prompts: Annotated[
        str,
        typer.Argument(
            help="Prompts with answers: a .jsonl, .json, .csv or .parquet file, a dataset folder, "
            "or a hub name[:config]."
        ),
    ],
    model: Annotated[str, option("The policy to start from: path or name.", panel=MODEL)],
    config: Annotated[
        Path | None,
        option(
            "YAML or JSON file of these options (prompts: and model: too); the command line wins. "
            "Paths in it are relative to the working directory.",
            is_eager=True,
            callback=options_of_file,
        ),
    ] = None,
    out: Annotated[Path, option("Folder for model, rollouts, metrics, plots.")] = Path("gvm-out"),
    resume: Annotated[
        bool, option("Continue the run in --out; nothing is sampled twice.", "--resume")
    ] = False,
    overwrite: Overwrite = False,
    # data
    prompt_field: PromptField = None,
    answer_field: AnswerField = None,
    split: Split = "train",
    limit: Limit = None,
    unanswered: Unanswered = "error",
    suffix: Annotated[
        str, option(r"Appended to each prompt; \n in it is a line break.", panel=DATA)
    ] = "",
    eval_data: Annotated[
        str | None, option("Held-out prompts, evaluated after each iteration.", panel=DATA)
    ] = None,
    eval_limit: EvalLimit = None,
    eval_samples: Annotated[
        int, option("Responses of a held-out prompt; 1 is greedy.", panel=DATA)
    ] = 1,
    # model
    tokenizer: Annotated[str | None, option("Tokenizer, if not the model's.", panel=MODEL)] = None,
    dtype: Annotated[
        str, option("Precision of the weights: float32, bfloat16, float16, auto.", panel=MODEL)
    ] = "float32",
    lora: Lora = False,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_targets: LoraTargets = None,
    # sampling
    iterations: Annotated[int, option("E- and M-steps.", panel=SAMPLING)] = 10,
    prompts_per_iteration: Annotated[
        int | None, option("Prompts of an iteration.", default="all", panel=SAMPLING)
    ] = None,
    samples_per_prompt: Annotated[
        int, option("Responses a prompt on average, stage 1 included.", panel=SAMPLING)
    ] = 8,
    allocation: Annotated[
        Rule, option("How the samples are distributed over the prompts.", panel=SAMPLING)
    ] = "gvm",
    allocation_options: Annotated[
        str | None,
        option('Options of the rule as JSON: {"max_accept_rate": 0.9}.', panel=SAMPLING),
    ] = None,
    stage1_samples: Annotated[
        int | None,
        option(
            "Responses a prompt that measure its acceptance rate.",
            default="4 where the rule needs it",
            panel=SAMPLING,
        ),
    ] = None,
    reuse_stage1: Annotated[
        bool,
        option("Train on the first stage too (biased).", "--reuse-stage1", panel=SAMPLING),
    ] = False,
    grad_norm_params: Annotated[
        str, option("Parameters of G: embeddings, lm_head, all-linear.", panel=SAMPLING)
    ] = "embeddings",
    grad_norm_average: Annotated[
        Norm, option("G over a prompt's accepted responses.", panel=SAMPLING)
    ] = "mean",
    max_new_tokens: Annotated[int, option("Length limit of a response.", panel=SAMPLING)] = 256,
    temperature: Annotated[float, option("Of sampling.", panel=SAMPLING)] = 1.0,
    top_p: Annotated[float, option("Of sampling; 1 for all tokens.", panel=SAMPLING)] = 1.0,
    top_k: Annotated[int, option("Of sampling; 0 for all tokens.", panel=SAMPLING)] = 0,
    generation_batch_size: Annotated[
        int, option("Responses sampled at once.", panel=SAMPLING)
    ] = 64,
    engine: Annotated[Engine, option("What samples.", panel=SAMPLING)] = "transformers",
    engine_options: Annotated[
        str | None, option("Options of vllm.LLM as JSON.", panel=SAMPLING)
    ] = None,
    verifier: Annotated[
        str, option("exact, math-verify, or module:function.", panel=SAMPLING)
    ] = "math-verify",
    verifier_seconds: Annotated[
        float, option("Time limit of one answer, which then scores 0.", panel=SAMPLING)
    ] = 5.0,
    verifier_workers: Annotated[
        int | None, option("Processes that check answers.", default="up to 4", panel=SAMPLING)
    ] = None,
    rollout_format: Annotated[
        Format, option("What responses are kept as.", panel=SAMPLING)
    ] = "jsonl",
    # loss
    objective: Annotated[Objective, option("What is minimised.", panel=LOSS)] = "raft++",
    prompt_weighting: Annotated[
        Weighting | None,
        option("What each prompt counts.", default="lemma1, for grpo algorithm1", panel=LOSS),
    ] = None,
    aggregation: Annotated[
        Aggregation | None,
        option("From tokens to a loss.", default="dr-grpo, for token_mean token-mean", panel=LOSS),
    ] = None,
    clip_low: Annotated[float, option("Lower clip of the ratio.", panel=LOSS)] = 0.2,
    clip_high: Annotated[float, option("Upper clip of the ratio.", panel=LOSS)] = 0.2,
    dual_clip: Annotated[
        float | None, option("Bound where the advantage is negative (grpo).", panel=LOSS)
    ] = None,
    advantage_scale: Annotated[
        Scale, option("Standard deviation that divides advantages (grpo).", panel=LOSS)
    ] = "group",
    beta: Annotated[float, option("Weight of the KL from the start (grpo).", panel=LOSS)] = 0.0,
    mask_truncated: Annotated[
        bool,
        option("Leave responses cut at the limit out.", "--mask-truncated", panel=LOSS),
    ] = False,
    # training
    steps_per_iteration: Annotated[
        int, option("Optimizer steps that go through the responses once.", panel=RUN)
    ] = 4,
    epochs_per_iteration: Annotated[
        int, option("How often an M-step goes through them.", panel=RUN)
    ] = 1,
    batch_size: Annotated[int, option("Responses in a micro-batch.", panel=RUN)] = 8,
    lr: Annotated[float, option("Learning rate.", panel=RUN)] = 1e-6,
    schedule: Annotated[Schedule, option("Learning rate after warm-up.", panel=RUN)] = "constant",
    warmup: Warmup = 0.0,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    optim: Optim = "adamw_torch",
    bf16: Bf16 = False,
    checkpointing: Checkpointing = False,
    cpu: Cpu = False,
    seed: Annotated[int, option("Of sampling and of the order of prompts.", panel=RUN)] = 42,
    save_every: Annotated[
        int | None,
        option("Optimizer steps between checkpoints.", default="one an iteration", panel=RUN),
    ] = None,
    keep: Keep = 2,
) -> None:
    """Sample, verify, allocate, train, again and again (the default command)."""
    given = dict(locals())
    check_gvm(given)
    quiet_other_libraries()
    import torch

    from vcore_train.gvm.config import GvmConfig
    from vcore_train.gvm.run import GvmOptions, PromptOptions, run
    from vcore_train.training import LoraOptions

    names = {field.name for field in dataclasses.fields(GvmConfig)}
    arguments: dict[str, Any] = {name: v for name, v in given.items() if name in names}
    arguments |= {
        "allocation_options": _json(allocation_options, "--allocation-options"),
        "per_device_train_batch_size": batch_size,
        "learning_rate": lr,
        "lr_scheduler_type": schedule,
        "warmup_steps": warmup,
        "gradient_checkpointing": checkpointing,
        "use_cpu": cpu or not torch.accelerator.is_available(),
        "save_strategy": "steps",
        "save_steps": save_every or 0,
        "save_total_limit": keep,
        "eval_strategy": "steps" if eval_data else "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    adapter = {"rank": lora_rank, "alpha": lora_alpha, "targets": lora_targets}
    adapters: dict[str, Any] = {name: v for name, v in adapter.items() if v is not None}
    options = GvmOptions(
        prompts=PromptOptions(
            data=prompts,
            eval_data=eval_data,
            split=split,
            prompt_field=prompt_field,
            answer_field=answer_field,
            limit=limit,
            eval_limit=eval_limit,
            unanswered=unanswered,
            suffix=suffix.replace("\\n", "\n"),
        ),
        model=model,
        out=out,
        arguments=arguments,
        tokenizer=tokenizer,
        dtype=dtype,
        lora=LoraOptions(**adapters) if lora else None,
        verifier=verifier,
        engine=engine,
        engine_options=_json(engine_options, "--engine-options"),
        resume=resume,
        overwrite=overwrite,
    )
    try:
        summary = run(options, console)
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error
    if summary.interrupted:
        raise typer.Exit(130)


@app.command()
def allocate(
    table: Annotated[
        Path,
        typer.Argument(
            help="A row a prompt (.jsonl, .json, .csv, .parquet) with accept_rate or p (or "
            "accepted and sampled) and grad_norm or G, such as a run's rollouts/*/prompts.jsonl."
        ),
    ],
    budget: Annotated[int, option("Samples to distribute.")],
    rule: Annotated[Rule, option("How.")] = "gvm",
    options: Annotated[
        str | None, option('Options of the rule as JSON: {"max_accept_rate": 0.9}.')
    ] = None,
    rate_field: Annotated[
        str | None, option("Field of the acceptance rate; by default recognised.")
    ] = None,
    norm_field: Annotated[
        str | None, option("Field of the gradient norm; by default recognised.")
    ] = None,
    out: Annotated[
        Path | None, option("Where to write the rows with their count (.jsonl, .csv, .parquet).")
    ] = None,
) -> None:
    """Distribute samples over prompts whose acceptance rate and gradient norm are known."""
    check_numbers({"budget": budget})
    quiet_other_libraries()
    from vcore_train.allocation_table import allocate_table

    allocate_table(
        table,
        budget,
        rule=rule,
        rate_field=rate_field,
        norm_field=norm_field,
        out=out,
        options=_json(options, "--options"),
        console=console,
    )


def _json(text: str | None, flag: str) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{flag} {text}: not valid JSON ({error.msg}).") from error
    if not isinstance(value, dict):
        raise ValueError(f"{flag} {text}: expected a JSON object, such as {{}}.")
    return value
