"""Which run a folder's responses belong to, and that one process at a time trains in it."""

import fcntl
import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from vcore_train.gvm.config import RUN_OPTIONS, GvmConfig
from vcore_train.gvm.sampling import Task
from vcore_train.gvm.store import fingerprint, read_json, write_atomically
from vcore_train.verifiers import Verifier

LOCK = ".lock"


def describe_run(
    args: GvmConfig,
    tasks: Sequence[Task],
    verifier: str | Verifier,
    reference: nn.Module | None,
) -> dict[str, Any]:
    """What a run must have in common with the one on disk to continue it, as JSON has it."""
    run: dict[str, Any] = {name: getattr(args, name) for name in RUN_OPTIONS}
    run["stage1_samples"] = args.stage1
    content = json.dumps([[task.tokens, task.answer] for task in tasks])
    run["prompts"] = hashlib.sha256(content.encode()).hexdigest()[:32]
    run["verifier"] = _name_of(verifier)
    if reference is not None:
        run["reference"] = fingerprint(reference)
    return json.loads(json.dumps(run))


def check_run(path: Path, run: dict[str, Any]) -> None:
    """Raises ValueError where ``path`` describes another run."""
    before = read_json(path)
    if before is None:
        return
    if not isinstance(before, dict):
        raise ValueError(f"{path}: not the record of a run. Remove it.")
    changed = [name for name in {**before, **run} if before.get(name) != run.get(name)]
    if changed:
        told = "; ".join(f"{n} was {before.get(n)}, is {run.get(n)}" for n in changed)
        raise ValueError(
            f"GvmTrainer: the run in {path.parent} was another one: {told}. Resume with the same "
            "options, prompts and models, or choose another output_dir."
        )


def keep_run(path: Path, run: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(run, indent=1))


def _name_of(verifier: str | Verifier) -> str:
    if isinstance(verifier, str):
        return verifier
    kind = verifier if hasattr(verifier, "__qualname__") else type(verifier)
    return f"{kind.__module__}.{kind.__qualname__}"


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Raises ValueError where another process trains in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(
                f"GvmTrainer: another process is training in {folder}. Choose another output_dir."
            ) from None
        yield
