"""The folder of a training run: what of a run is in it, and how an earlier run is replaced."""

import json
import re
import shutil
from pathlib import Path

from transformers import TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from vcore_train.checkpoint import STAGING

METRICS, PLOTS, SUMMARY = "metrics.jsonl", "plots", "summary.json"
# What save_model leaves: weights, adapters, configurations, tokenizer.
MODEL_FILES = (
    *("*model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"),
    *("config.json", "generation_config.json", "adapter_config.json", "training_args.bin"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"),
)


def last_checkpoint(out: Path) -> str | None:
    """The newest ``checkpoint-*`` in ``out``."""
    return get_last_checkpoint(str(out)) if out.is_dir() else None


def holds_a_run(out: Path) -> bool:
    """Whether ``out`` has a checkpoint, or metrics with a line in them."""
    metrics = out / METRICS
    return last_checkpoint(out) is not None or (metrics.is_file() and metrics.stat().st_size > 0)


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


def clear(out: Path) -> None:
    """Removes what an earlier run left in ``out``, and nothing else."""
    for path in out.iterdir():
        if path.is_dir() and (path.name in (STAGING, PLOTS) or _is_checkpoint(path)):
            shutil.rmtree(path)
    for pattern in (METRICS, SUMMARY, *MODEL_FILES):
        for path in out.glob(pattern):
            path.unlink()


def _is_checkpoint(path: Path) -> bool:
    return re.fullmatch(r"checkpoint-\d+", path.name) is not None


class ClearFolder(TrainerCallback):
    """Replaces an earlier run once everything is ready for the first step."""

    def __init__(self, out: Path):
        self.out = out

    def on_train_begin(self, args, state, control, **kwargs):
        clear(self.out)
