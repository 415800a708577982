"""The folder of a training run: what of a run is in it, and how an earlier run is replaced."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from vcore_train.checkpoint import STAGING, recover
from vcore_train.config_file import RECORD

METRICS, PLOTS, SUMMARY, ROLLOUTS = "metrics.jsonl", "plots", "summary.json", "rollouts"
# What save_model leaves: weights, adapters, configurations, tokenizer.
MODEL_FILES = (
    *("*model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", "training_args.bin"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)

S = TypeVar("S", bound="Summary")


def last_checkpoint(out: Path) -> str | None:
    """The newest ``checkpoint-*`` in ``out``."""
    return get_last_checkpoint(str(out)) if out.is_dir() else None


def holds_a_run(out: Path) -> bool:
    """Whether ``out`` has a checkpoint, sampled responses, or metrics with a line in them."""
    metrics = out / METRICS
    return (
        last_checkpoint(out) is not None
        or (out / ROLLOUTS).is_dir()
        or (metrics.is_file() and metrics.stat().st_size > 0)
    )


def claim(out: Path, *, resume: bool, overwrite: bool, inputs: Mapping[str, str | None]) -> None:
    """Refuses to mix two runs in one folder.

    ``inputs``: what the run reads, by option, and so must not be overwritten. Raises ValueError.
    """
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out}: is a file, expected a folder.")
    if resume and overwrite:
        raise ValueError("--resume continues a run, --overwrite replaces it: pass one of them.")
    if resume:
        recover(out)
    elif not overwrite:
        if holds_a_run(out):
            raise ValueError(
                f"{out} holds an earlier run. Continue it with --resume, replace it with "
                "--overwrite, or choose another --out."
            )
        return
    for option, name in inputs.items():
        if overwrite and name is not None:
            used = Path(name).resolve()
            if out.resolve() in (used, *used.parents):
                raise ValueError(f"--overwrite would remove {option} {name}: choose another --out.")


def steps_done(checkpoint: str) -> int:
    """The optimizer steps behind a checkpoint; ValueError where it does not say."""
    path = Path(checkpoint) / TRAINER_STATE_NAME
    try:
        return int(json.loads(path.read_text(encoding="utf-8"))["global_step"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"--resume: {path} is not readable ({error}). Remove that checkpoint to continue from "
            "the one before."
        ) from error


class Summary(Protocol):
    """What a run says of itself in ``summary.json``: a dataclass with these fields at least."""

    @property
    def steps(self) -> int: ...

    @property
    def interrupted(self) -> bool: ...


def finished_summary(out: Path, kind: Callable[..., S], done: int) -> S | None:
    """The summary of a run that ended after ``done`` steps or more, None where it was stopped
    before it wrote its results."""
    try:
        record = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        names = [f.name for f in fields(cast(Any, kind))]
        summary = kind(**{name: record[name] for name in names})
    except (FileNotFoundError, json.JSONDecodeError, LookupError, TypeError):
        return None
    return summary if summary.steps >= done and not summary.interrupted else None


def clear(out: Path) -> None:
    """Removes what an earlier run left in ``out``, and nothing else."""
    for path in out.iterdir():
        if path.is_dir() and (path.name in (STAGING, PLOTS, ROLLOUTS) or _is_checkpoint(path)):
            shutil.rmtree(path)
    for pattern in (METRICS, SUMMARY, *MODEL_FILES):
        for path in out.glob(pattern):
            path.unlink()


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


class BeginRun(TrainerCallback):
    """Takes over the folder once everything is ready for the first step: in the main process.

    ``overwrite``: removes an earlier run. ``record``: the text of the run's own options file.
    """

    def __init__(self, out: Path, *, overwrite: bool, record: str | None):
        self.out, self.overwrite, self.record = out, overwrite, record

    def on_train_begin(self, args, state, control, **kwargs):
        if not state.is_world_process_zero:
            return
        self.out.mkdir(parents=True, exist_ok=True)
        if self.overwrite:
            clear(self.out)
        if self.record is not None:
            (self.out / RECORD).write_text(self.record, encoding="utf-8")
