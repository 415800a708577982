"""Checkpoints that are whole or not there, and the trainer's own state in them."""

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

STAGING = ".incomplete"
RETIRED = ".retired"
STATE = "vcore_state"


@contextmanager
def staged_folder(
    final: Path, *, main_process: bool = True, barrier: Callable[[], None] = lambda: None
) -> Iterator[Path]:
    """A folder to write into that takes the place of ``final`` once the body is done.

    The body writes into ``final.parent/.incomplete/final.name``. Afterwards everything is flushed
    to the disk and renamed to ``final``, whose former content is deleted last. If the body raises,
    a full disk for instance, what it wrote is deleted and ``final`` and its neighbours are as
    before.

    Args:
        main_process: whether this process prepares, renames and cleans up.
        barrier: waits for all processes that write into the folder.
    """
    staging = final.parent / STAGING / final.name
    retired = staging.with_name(f"{final.name}{RETIRED}")
    if main_process:
        _restore(retired, final)
        _remove(staging, retired)
        staging.mkdir(parents=True)
    barrier()
    try:
        yield staging
        _flush(staging)
        barrier()
        if main_process:
            _replace(final, staging, retired)
    finally:
        if main_process:
            _remove(staging, retired)
            with suppress(OSError):  # others may be at work in it
                staging.parent.rmdir()
    barrier()


def recover(folder: Path) -> None:
    """Cleans up what processes that were killed left of the checkpoints in ``folder``.

    A checkpoint that was about to be replaced comes back; unfinished ones are deleted.
    """
    staging = folder / STAGING
    for retired in staging.glob(f"*{RETIRED}"):
        _restore(retired, folder / retired.name.removesuffix(RETIRED))
    _remove(staging)


def _restore(retired: Path, final: Path) -> None:
    """Undoes the first of two renames, which a process may have ended between."""
    if retired.exists() and not final.exists():
        retired.rename(final)


def _replace(final: Path, new: Path, retired: Path) -> None:
    """Renames ``new`` to ``final``, whose former content goes to ``retired``."""
    if not final.exists():
        new.rename(final)
        return
    final.rename(retired)
    try:
        new.rename(final)
    except OSError:
        retired.rename(final)
        raise


def _remove(*folders: Path) -> None:
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)


def _flush(folder: Path) -> None:
    """Waits until every file is on the disk, where a full one reports late failures too."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())


def save_state(
    folder: Path, tensors: Mapping[str, Tensor], values: dict, *, main_process: bool = True
) -> None:
    """Writes ``vcore_state.safetensors`` and ``.json``, and DTensors into the folder
    ``vcore_state``, each rank its shards (``torch.distributed.checkpoint``).

    Every process calls it; tensors and values are the same on all of them.
    """
    sharded: dict[str, Any] = {n: t for n, t in tensors.items() if isinstance(t, DTensor)}
    if sharded:
        dcp.save(sharded, checkpoint_id=folder / STATE)
    if not main_process:
        return
    # safetensors refuses tensors that share memory, as a kept direction and its average may do.
    copies = {n: t.detach().cpu().clone() for n, t in tensors.items() if n not in sharded}
    save_file(copies, folder / f"{STATE}.safetensors")
    content = {
        "values": values,
        "order": list(tensors),
        "sharded": {n: [list(t.shape), str(t.dtype)] for n, t in sharded.items()},
    }
    (folder / f"{STATE}.json").write_text(json.dumps(content, indent=2) + "\n")


def load_state(
    folder: Path, like: Mapping[str, Tensor] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """What :func:`save_state` wrote, in the same order, or None where there is no such state.

    A tensor whose name ends in ``/`` and a name of ``like`` comes back sharded as that one is, or
    whole where it is not, however many processes wrote it and read it.
    """
    path = folder / f"{STATE}.json"
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    tensors: dict[str, Any] = dict(load_file(folder / f"{STATE}.safetensors"))
    placed = {n: (like or {}).get(n.partition("/")[2]) for n in content["order"]}
    for name, tensor in tensors.items():
        wanted = placed[name]
        if isinstance(wanted, DTensor):
            tensors[name] = distribute_tensor(
                tensor.to(wanted.device), wanted.device_mesh, wanted.placements, src_data_rank=None
            )
    sharded = {
        name: _empty(placed[name], shape, getattr(torch, dtype.removeprefix("torch.")))
        for name, (shape, dtype) in content.get("sharded", {}).items()
    }
    if sharded:
        dcp.load(sharded, checkpoint_id=folder / STATE)
    tensors |= sharded
    return {name: tensors[name] for name in content["order"]}, content["values"]


def _empty(like: Tensor | None, shape: list[int], dtype: torch.dtype) -> Tensor:
    if isinstance(like, DTensor) and list(like.shape) == shape:
        return torch.empty_like(like, dtype=dtype, requires_grad=False)
    return torch.empty(shape, dtype=dtype)


def with_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}/{name}": tensor for name, tensor in tensors.items()}


def under_prefix(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    start = f"{prefix}/"
    return {k.removeprefix(start): v for k, v in tensors.items() if k.startswith(start)}
