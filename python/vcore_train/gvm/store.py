"""What an iteration leaves on disk, written so that a kill at any moment loses only what was under
way: every sampled response once, what was measured of its prompts, and log-probabilities.

``rollouts/iteration-0007/`` holds ``responses.jsonl`` (or ``.parquet`` when it is done),
``grad_norms.json``, ``prompts.jsonl`` (p, G, samples of each prompt), ``logp.safetensors`` and at
the end ``metrics.json``.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Rollout:
    """A response that was sampled and verified. ``prompt``: its place among the iteration's."""

    prompt: int
    stage: int  # 1 or 2
    tokens: list[int]
    finished: bool  # False: cut at the length limit
    text: str
    reward: float
    problem: str | None  # why the verifier had no verdict; the reward is then 0

    @property
    def accepted(self) -> bool:
        return self.reward > 0


class IterationStore:
    """The folder of one iteration.

    Files that are there and cannot be read raise ValueError with their path.

    Args:
        folder: made where it is not there.
        policy: :func:`fingerprint` of the weights that sample. A folder that was written by
            another policy is renamed to ``*.replaced``: its responses are not this policy's.
        reading: in the middle of an M-step: the folder is taken as it is, whatever is missing, and
            of another policy raises ValueError.
    """

    def __init__(self, folder: Path, policy: str | None, *, reading: bool = False):
        self.folder = folder
        self.replaced = False
        same = self._policy() == policy
        used = folder.exists() and any(folder.iterdir())
        if reading:
            if used and policy is not None and not same:
                raise ValueError(
                    f"{folder} holds responses of other weights than those that this M-step began "
                    "with. Resume from the checkpoint at the start of the iteration."
                )
        else:
            if used and not same:
                retired = folder.with_name(f"{folder.name}.replaced")
                shutil.rmtree(retired, ignore_errors=True)
                folder.rename(retired)
                self.replaced = True
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(self._path("policy.json"), json.dumps({"policy": policy}))
        self.rounds = self._read_parquet() if self._parquet.exists() else self._read(reading)

    def _path(self, name: str) -> Path:
        return self.folder / name

    @property
    def _parquet(self) -> Path:
        return self._path("responses.parquet")

    def _policy(self) -> str | None:
        content = read_json(self._path("policy.json"))
        return content.get("policy") if isinstance(content, dict) else None

    # ---- responses ----

    def chunk(self, round_: int, chunk: int) -> list[Rollout] | None:
        """What this chunk of this round brought, None where it has not been sampled."""
        return self.rounds.get((round_, chunk))

    def append(self, round_: int, chunk: int, rollouts: Sequence[Rollout]) -> None:
        """Adds a chunk; on return it is on the disk."""
        lines = [json.dumps(asdict(rollout)) for rollout in rollouts]
        lines.append(json.dumps({"round": round_, "chunk": chunk, "responses": len(rollouts)}))
        with self._path("responses.jsonl").open("ab") as file:
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.rounds[round_, chunk] = list(rollouts)

    def _read(self, reading: bool) -> dict[tuple[int, int], list[Rollout]]:
        """The whole chunks. What follows the last one, as a kill leaves it, is cut off."""
        path = self._path("responses.jsonl")
        rounds: dict[tuple[int, int], list[Rollout]] = {}
        content = path.read_bytes() if path.exists() else b""
        place = whole = 0  # bytes read, and those up to the end of the last whole chunk
        pending: list[Rollout] = []
        bad: str | None = None
        for number, line in enumerate(content.splitlines(keepends=True), start=1):
            place += len(line)
            row = _parsed(line)
            if row is None or not line.endswith(b"\n"):
                bad = bad or f"line {number} is not one that was written there"
            elif "chunk" not in row:
                pending.append(Rollout(**row))
            elif bad is None and row["responses"] == len(pending):
                rounds[row["round"], row["chunk"]], pending = pending, []
                whole = place
            else:  # a whole chunk after something that no kill leaves
                raise ValueError(
                    f"{path}: {bad or f'the chunk that ends in line {number} lacks responses'}. "
                    "Repair the file, or remove the folder to sample the iteration again."
                )
        if whole < len(content) and not reading:
            with path.open("r+b") as file:
                file.truncate(whole)
        return rounds

    def to_parquet(self) -> None:
        """``responses.jsonl`` as one compressed table, chunk and round as columns."""
        import pyarrow
        import pyarrow.parquet

        rows = [
            {"round": round_, "chunk": chunk, **asdict(rollout)}
            for (round_, chunk), rollouts in self.rounds.items()
            for rollout in rollouts
        ]
        path = self._parquet
        written = path.with_name(f"{path.name}.tmp")
        keys = [[round_, chunk] for round_, chunk in self.rounds]
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
            {"chunks": json.dumps(keys)}
        )
        pyarrow.parquet.write_table(table, written)
        os.replace(written, path)
        self._path("responses.jsonl").unlink(missing_ok=True)

    def _read_parquet(self) -> dict[tuple[int, int], list[Rollout]]:
        import pyarrow
        import pyarrow.parquet

        try:
            table = pyarrow.parquet.read_table(self._parquet)
        except (OSError, pyarrow.ArrowException) as error:
            raise ValueError(f"{self._parquet}: not readable ({error}).") from error
        keys = json.loads((table.schema.metadata or {})[b"chunks"])
        rounds: dict[tuple[int, int], list[Rollout]] = {tuple(key): [] for key in keys}
        for row in table.to_pylist():
            rounds[row.pop("round"), row.pop("chunk")].append(Rollout(**row))
        self._path("responses.jsonl").unlink(missing_ok=True)
        return rounds

    # ---- what is known of the prompts, and log-probabilities ----

    def save_grad_norms(self, norms: Tensor) -> None:
        write_atomically(self._path("grad_norms.json"), json.dumps(norms.tolist()))

    def grad_norms(self) -> Tensor | None:
        content = read_json(self._path("grad_norms.json"))
        return None if content is None else torch.tensor(content, dtype=torch.float64)

    def save_prompts(self, rows: Sequence[Mapping[str, Any]]) -> None:
        write_atomically(
            self._path("prompts.jsonl"), "".join(f"{json.dumps(row)}\n" for row in rows)
        )

    def save_metrics(self, figures: Mapping[str, float]) -> None:
        write_atomically(self._path("metrics.json"), json.dumps(dict(figures), indent=1))

    def save_logp(self, tensors: Mapping[str, Tensor]) -> None:
        path = self._path("logp.safetensors")
        written = path.with_name(f"{path.name}.tmp")
        save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, written)
        os.replace(written, path)

    def logp(self) -> dict[str, Tensor] | None:
        path = self._path("logp.safetensors")
        if not path.exists():
            return None
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"{path}: not readable ({error}). Remove it.") from error


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A line of ``responses.jsonl``: what a Rollout is made from, or the end of a chunk."""
    try:
        row = json.loads(line)
        if "chunk" in row:
            return {name: int(row[name]) for name in ("round", "chunk", "responses")}
        return {name: row[name] for name in Rollout.__dataclass_fields__}
    except (ValueError, LookupError, TypeError):
        return None


def fingerprint(model: nn.Module) -> str:
    """Of all parameters: another after an optimizer step, and over another base model."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        if values.dim() > 1:  # by column, on the device
            values = torch.hash_tensor(values.flatten(1), dim=0).view(torch.int64)
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)}".encode())
        digest.update(values.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:32]


def read_json(path: Path) -> Any:
    """What the file holds, None where there is none. ValueError with the path if unreadable."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not readable ({error}). Remove it.") from error


def write_atomically(path: Path, text: str) -> None:
    written = path.with_name(f"{path.name}.tmp")
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)
