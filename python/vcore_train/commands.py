"""The commands of ``vcore``. Heavy imports happen inside, so that ``vcore --help`` is quick."""

from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from vcore_train import (
    bench_commands,
    eval_commands,
    experiment_commands,
    gvm_commands,
    profile_commands,
)
from vcore_train.command_options import (
    DATA,
    MODEL,
    RUN,
    WEIGHTS,
    Accumulation,
    Bf16,
    Checkpointing,
    Cpu,
    EvalLimit,
    Every,
    Heads,
    Hidden,
    Keep,
    Layers,
    Limit,
    Lora,
    LoraAlpha,
    LoraRank,
    LoraTargets,
    MaxGradNorm,
    Objective,
    Optim,
    Overwrite,
    Pretrained,
    PretrainedDtype,
    PromptField,
    ReuseForward,
    Seed,
    Split,
    Utilities,
    Warmup,
    WeightDecay,
    option,
)
from vcore_train.console import console, quiet_other_libraries
from vcore_train.launch import process_count
from vcore_train.option_checks import check_numbers, check_train, in_options

app = typer.Typer(
    name="vcore",
    help="Token-weighted supervision for language models: VCORE, and the methods beside it.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(experiment_commands.app, name="experiment")
app.add_typer(gvm_commands.app, name="gvm")
app.command()(bench_commands.bench)
app.command(name="eval")(eval_commands.evaluate)
app.command()(profile_commands.profile)


@app.callback()
def common(
    context: typer.Context,
    debug: Annotated[bool, typer.Option(help="Show the traceback of an error.")] = False,
) -> None:
    """Options of every command."""
    if context.invoked_subcommand != "train" and process_count() > 1:
        raise ValueError(
            f"vcore {context.invoked_subcommand} works in one process, and the launcher started "
            f"{process_count()}. Call it without torchrun or accelerate launch."
        )


Direction = Literal["probe", "ema", "momentum", "adam"]
VarianceControl = Literal["utility", "trajectory", "ess", "loss", "none"]
KlScope = Literal["trajectory", "batch"]
IwLevel = Literal["sequence", "token"]
LongRows = Literal["error", "truncate", "skip"]
EmptyRows = Literal["error", "skip"]
Schedule = Literal["linear", "cosine", "constant_with_warmup"]


OTHERS = "Other methods"
Sharding = Literal["full_shard", "shard_grad_op"]


def options_of_file(context: typer.Context, value: Path | None) -> Path | None:
    """Takes the options in the file as defaults, so that the command line wins."""
    if value is not None:
        from vcore_train.config_file import read_options

        context.default_map = read_options(value, get_type_hints(train))
    return value


@app.command()
def train(
    data: Annotated[
        str,
        typer.Argument(
            help="A .jsonl, .json, .csv or .parquet file, a dataset folder, or a hub name[:config]."
        ),
    ],
    config: Annotated[
        Path | None,
        option(
            "YAML or JSON file of these options (data: too), as --out has it in config.yaml; the "
            "command line wins. Paths in it are relative to the working directory.",
            is_eager=True,
            callback=options_of_file,
        ),
    ] = None,
    method: Objective = "vcore",
    out: Annotated[Path, option("Folder for the model, metrics and plots.")] = Path("vcore-out"),
    resume: Annotated[
        bool, option("Continue from the newest checkpoint in --out.", "--resume")
    ] = False,
    overwrite: Overwrite = False,
    # data
    prompt_field: PromptField = None,
    response_field: Annotated[
        str | None, option("Field of the response; by default recognised.", panel=DATA)
    ] = None,
    split: Split = "train",
    limit: Limit = None,
    eval_data: Annotated[
        str | None, option("Held-out data, evaluated at the end.", panel=DATA)
    ] = None,
    eval_limit: EvalLimit = None,
    max_length: Annotated[
        int | None, option("Tokens a row may have.", default="the model's window", panel=DATA)
    ] = None,
    long_rows: Annotated[
        LongRows,
        option("What becomes of a longer row; truncate cuts the end of its response.", panel=DATA),
    ] = "error",
    empty_rows: Annotated[
        EmptyRows, option("What becomes of a row with an empty response.", panel=DATA)
    ] = "error",
    packing: Annotated[
        bool,
        option(
            "Concatenate the rows of a micro-batch instead of padding them.",
            "--packing",
            panel=DATA,
        ),
    ] = False,
    # model
    model: Pretrained = None,
    model_config: Annotated[
        str | None,
        option("JSON configuration (with model_type) of a model from scratch.", panel=MODEL),
    ] = None,
    layers: Layers = None,
    hidden: Hidden = None,
    heads: Heads = None,
    kv_heads: Annotated[
        int | None, option("Its key and value heads.", default="half the heads", panel=MODEL)
    ] = None,
    intermediate: Annotated[
        int | None, option("Width of its MLP.", default="3 x hidden", panel=MODEL)
    ] = None,
    window: Annotated[
        int | None, option("Its window in tokens.", default="2048", panel=MODEL)
    ] = None,
    tokenizer: Annotated[
        str | None,
        option(
            "Tokenizer of a model from scratch; by default one is trained on the data.", panel=MODEL
        ),
    ] = None,
    vocab_size: Annotated[
        int | None,
        option("Entries of a tokenizer trained on the data.", default="4096", panel=MODEL),
    ] = None,
    dtype: PretrainedDtype = None,
    lora: Lora = False,
    lora_rank: LoraRank = None,
    lora_alpha: LoraAlpha = None,
    lora_dropout: Annotated[
        float | None, option("Dropout before the adapters.", default="0", panel=MODEL)
    ] = None,
    lora_targets: LoraTargets = None,
    # vcore
    direction: Annotated[
        Direction | None,
        option("Where the descent direction comes from.", panel=WEIGHTS, default="probe"),
    ] = None,
    direction_precondition: Annotated[
        bool | None,
        option(
            "Divide the direction by the root of Adam's second moment.",
            "--direction-precondition/--no-direction-precondition",
            panel=WEIGHTS,
            default="False",
        ),
    ] = None,
    direction_params: Annotated[
        str | None,
        option(
            "Probed parameters: all, lm_head, last_<k>_layers, names or patterns, with commas.",
            panel=WEIGHTS,
            default="all",
        ),
    ] = None,
    utility_method: Utilities = None,
    epsilon: Annotated[
        float | None, option("Step of the difference methods; by default chosen.", panel=WEIGHTS)
    ] = None,
    kl_budget: Annotated[
        float | None,
        option(
            "Sharpest weights within this KL from uniform, nats.", default="0.02", panel=WEIGHTS
        ),
    ] = None,
    tau: Annotated[float | None, option("Instead: factor on the utilities.", panel=WEIGHTS)] = None,
    temperature: Annotated[float | None, option("Instead: 1 / tau.", panel=WEIGHTS)] = None,
    kl_scope: Annotated[
        KlScope | None, option("Where the budget holds.", panel=WEIGHTS, default="trajectory")
    ] = None,
    variance_control: Annotated[
        VarianceControl | None,
        option("How the scale alpha of a step is found.", panel=WEIGHTS, default="utility"),
    ] = None,
    variance_cap: Annotated[
        float | None, option("Upper bound of alpha; 0 for none.", panel=WEIGHTS, default="1.0")
    ] = None,
    every: Every = None,
    anchor_steps: Annotated[
        int | None, option("Weight only every k-th step.", panel=WEIGHTS, default="1")
    ] = None,
    probe_batch_size: Annotated[int | None, option("Rows in a probe batch.", panel=WEIGHTS)] = None,
    probe_replacement: Annotated[
        bool | None,
        option(
            "Draw probe rows with replacement, or go through all before any comes again.",
            "--probe-replacement/--no-probe-replacement",
            panel=WEIGHTS,
            default="True",
        ),
    ] = None,
    probe_max_norm: Annotated[
        float | None, option("Clip the direction to this norm.", panel=WEIGHTS)
    ] = None,
    ema_decay: Annotated[
        float | None, option("Decay of direction ema.", panel=WEIGHTS, default="0.9")
    ] = None,
    ema_warmup: Annotated[
        int | None,
        option("Probe batches in the first update of direction ema.", panel=WEIGHTS, default="1"),
    ] = None,
    reuse_forward: ReuseForward = None,
    # others
    random_keep: Annotated[
        float | None,
        option("Supervised share of a response for random.", panel=OTHERS, default="0.2"),
    ] = None,
    iw_level: Annotated[
        IwLevel | None,
        option("Importance weights for iw_sft.", panel=OTHERS, default="sequence"),
    ] = None,
    iw_temp: Annotated[
        float | None,
        option("Factor on iw_sft's log-ratio of a sequence.", panel=OTHERS, default="1.0"),
    ] = None,
    iw_clip: Annotated[
        tuple[float, float] | None,
        option("Lower and upper bound of iw_sft's weights.", panel=OTHERS),
    ] = None,
    # training
    steps: Annotated[int | None, option("Optimizer steps; instead of --epochs.", panel=RUN)] = None,
    epochs: Annotated[float | None, option("Passes over the data.", default="1", panel=RUN)] = None,
    batch_size: Annotated[int, option("Rows in a micro-batch of one process.", panel=RUN)] = 8,
    accumulation: Accumulation = 1,
    lr: Annotated[
        float | None,
        option("Learning rate.", default="1e-3 from scratch, 2e-5 for --model", panel=RUN),
    ] = None,
    schedule: Annotated[Schedule, option("Learning rate after warm-up.", panel=RUN)] = "linear",
    warmup: Warmup = 0.05,
    weight_decay: WeightDecay = 0.0,
    max_grad_norm: MaxGradNorm = 1.0,
    optim: Optim = "adamw_torch",
    bf16: Bf16 = False,
    checkpointing: Checkpointing = False,
    cpu: Cpu = False,
    fsdp: Annotated[
        Sharding | None,
        option(
            "Shard the model over the processes (FSDP2): everything, or all but the weights "
            "between forward and backward.",
            panel=RUN,
        ),
    ] = None,
    fsdp_config: Annotated[
        str | None, option("JSON file of more fsdp_config of transformers.", panel=RUN)
    ] = None,
    seed: Seed = 42,
    save_every: Annotated[
        int, option("Steps between checkpoints; the last step has one too.", panel=RUN)
    ] = 500,
    keep: Keep = 2,
    log_every: Annotated[
        int | None,
        option("Steps between lines of metrics.jsonl.", default="about 200 lines", panel=RUN),
    ] = None,
) -> None:
    """Train a model on prompts and responses; see --method for the objective.

    In several processes too, with torchrun or accelerate launch; --batch-size is of one process.
    """
    given = dict(locals())
    check_train(given)
    quiet_other_libraries()
    import torch

    from vcore_train.config_file import written_options
    from vcore_train.launch import leave
    from vcore_train.models import Size
    from vcore_train.training import (
        DataOptions,
        LoraOptions,
        ModelOptions,
        TrainOptions,
        sharding_arguments,
    )
    from vcore_train.training import train as run

    sizes = {
        "layers": layers,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "intermediate": intermediate,
        "window": window,
    }
    size = {name: value for name, value in sizes.items() if value is not None}
    chosen = {
        "direction": direction,
        "direction_precondition": direction_precondition,
        "direction_params": direction_params,
        "utility_method": utility_method,
        "epsilon": epsilon,
        "kl_budget": kl_budget,
        "tau": tau,
        "temperature": temperature,
        "kl_scope": kl_scope,
        "variance_control": variance_control,
        "variance_cap": variance_cap,
        "every": every,
        "anchor_steps": anchor_steps,
        "probe_batch_size": probe_batch_size,
        "probe_replacement": probe_replacement,
        "probe_max_norm": probe_max_norm,
        "ema_decay": ema_decay,
        "ema_warmup": ema_warmup,
        "reuse_forward": reuse_forward,
        "random_keep": random_keep,
        "iw_level": iw_level,
        "iw_temp": iw_temp,
        "iw_clip": None if iw_clip is None else list(iw_clip),
    }
    arguments: dict[str, Any] = {name: value for name, value in chosen.items() if value is not None}
    if variance_cap == 0:
        arguments["variance_cap"] = None
    arguments |= {
        "method": method,
        "packing": packing,
        "max_steps": -1 if steps is None else steps,
        "num_train_epochs": 1.0 if epochs is None else epochs,
        "per_device_train_batch_size": batch_size,
        "per_device_eval_batch_size": batch_size,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": (2e-5 if model else 1e-3) if lr is None else lr,
        "lr_scheduler_type": schedule,
        "warmup_steps": warmup,
        "weight_decay": weight_decay,
        "max_grad_norm": max_grad_norm,
        "optim": optim,
        "bf16": bf16,
        "gradient_checkpointing": checkpointing,
        "use_cpu": cpu or not torch.accelerator.is_available(),
        **sharding_arguments(fsdp, fsdp_config),
        "seed": seed,
        "save_strategy": "steps",
        "save_steps": save_every,
        "save_total_limit": keep,
        "logging_steps": log_every or (max(1, steps // 200) if steps else 10),
        "logging_first_step": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    adapter = {
        "rank": lora_rank,
        "alpha": lora_alpha,
        "dropout": lora_dropout,
        "targets": lora_targets,
    }
    adapters: dict[str, Any] = {name: v for name, v in adapter.items() if v is not None}
    options = TrainOptions(
        data=DataOptions(
            data=data,
            eval_data=eval_data,
            split=split,
            prompt_field=prompt_field,
            response_field=response_field,
            limit=limit,
            eval_limit=eval_limit,
            empty_rows=empty_rows,
            long_rows=long_rows,
            max_length=max_length,
        ),
        model=ModelOptions(
            model=model,
            config=model_config,
            size=Size(**size),
            tokenizer=tokenizer,
            vocab_size=4096 if vocab_size is None else vocab_size,
            dtype=dtype or "float32",
        ),
        out=out,
        arguments=arguments,
        lora=LoraOptions(**adapters) if lora else None,
        resume=resume,
        overwrite=overwrite,
        record=written_options(given),
    )
    try:
        summary = run(options, console)
    except ValueError as error:
        raise ValueError(in_options(str(error))) from error
    leave()
    if summary.interrupted:
        raise typer.Exit(130)


@app.command()
def demo(
    steps: Annotated[int | None, option("Steps of each method.", default="250")] = None,
    seed: Annotated[int, option("Of everything.")] = 0,
    out: Annotated[Path, option("Folder for figures, plots and the weights page.")] = Path(
        "vcore-demo"
    ),
    quick: Annotated[
        bool, option("Seconds instead of minutes: the figures mean nothing.", "--quick")
    ] = False,
) -> None:
    """Train a small model on arithmetic with SFT, DFT, iw-SFT and VCORE, and compare them."""
    check_numbers(dict(locals()))
    quiet_other_libraries()
    from vcore_train.demo import FULL, QUICK, run_demo

    run_demo(QUICK if quick else FULL, steps=steps, seed=seed, out=out, console=console)


@app.command(name="show-weights")
def show_weights(
    checkpoint: Annotated[str, typer.Argument(help="A model or adapter: path or name.")],
    data: Annotated[str, typer.Argument(help="Rows to probe with and to take the example from.")],
    row: Annotated[int, option("Which row, counted from 1.")] = 1,
    prompt: Annotated[str | None, option("Instead of a row: a prompt ...")] = None,
    response: Annotated[str | None, option("... and its response.")] = None,
    kl_budget: Annotated[float | None, option("KL from uniform, nats.", default="0.02")] = None,
    tau: Annotated[float | None, option("Instead: factor on the utilities.")] = None,
    temperature: Annotated[float | None, option("Instead: 1 / tau.")] = None,
    probe_rows: Annotated[int, option("Rows whose mean gradient is the descent direction.")] = 64,
    prompt_field: Annotated[
        str | None, option("Field of the prompt; by default recognised.")
    ] = None,
    response_field: Annotated[
        str | None, option("Field of the response; by default recognised.")
    ] = None,
    split: Annotated[str, option("Split of a dataset.")] = "train",
    html: Annotated[Path, option("Where to write the page.")] = Path("weights.html"),
    seed: Annotated[int, option("Of the choice of probe rows.")] = 0,
) -> None:
    """Colour the tokens of one response by the weight that VCORE gives them."""
    check_numbers(dict(locals()))
    quiet_other_libraries()
    from vcore_train.show_weights import show

    sharpness = {"kl_budget": kl_budget, "tau": tau, "temperature": temperature}
    show(
        checkpoint,
        data,
        row=row,
        pair=None if prompt is None and response is None else (prompt, response),
        sharpness={name: value for name, value in sharpness.items() if value is not None},
        probe_rows=probe_rows,
        prompt_field=prompt_field,
        response_field=response_field,
        split=split,
        html=html,
        seed=seed,
        console=console,
    )


@app.command()
def scale(
    model: Annotated[str, typer.Argument(help="A model, or the JSON file of its configuration.")],
    gpus: Annotated[str, option("Numbers of GPUs, with commas.")] = "8,16,32,64",
    tokens: Annotated[int, option("Tokens of a micro-batch of one GPU.")] = 16384,
    lora_rank: Annotated[int, option("Train LoRA adapters of this rank; 0 trains all.")] = 0,
    direction: Annotated[Direction, option("Descent direction.")] = "probe",
    every: Annotated[int, option("Steps that a direction is kept for.")] = 1,
    context_ranks: Annotated[int, option("GPUs that share a sequence.")] = 1,
) -> None:
    """What a step of a model sharded by FSDP2 would hold and send on each GPU, on paper."""
    quiet_other_libraries()
    from rich.table import Table
    from transformers import AutoConfig

    from vcore_train import scale as paper
    from vcore_train.models import read_config

    counts = [part.strip() for part in gpus.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in counts):
        raise ValueError(f"--gpus must be whole numbers of at least 1, got {gpus!r}.")
    for name, value, low in (
        ("--tokens", tokens, 1),
        ("--lora-rank", lora_rank, 0),
        ("--every", every, 1),
        ("--context-ranks", context_ranks, 1),
    ):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, got {value}.")
    figures = Table(box=None, title="GB a GPU", title_justify="left")
    for column in paper.COLUMNS:
        figures.add_column(column, justify="right", no_wrap=True)
    for row in paper.table(
        read_config(model) if model.endswith(".json") else AutoConfig.from_pretrained(model),
        [int(part) for part in counts],
        tokens,
        lora_rank=lora_rank,
        averaged=direction == "ema",
        every=every,
        context_ranks=context_ranks,
    ):
        figures.add_row(*row)
    console.print(figures)
    console.print("How each is counted: docs/scale.md. Activations are an estimate.")


@app.command()
def info() -> None:
    """Backends, versions and hardware, and why something is off."""
    quiet_other_libraries()
    from vcore_train.info import print_info

    print_info(console)
