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
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from vcore_train.modeling import trainable_parameters


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

    Args:
        folder: made on first writing.
        policy: :func:`fingerprint` of the weights that sample. A folder that was written by
            another policy is renamed to ``*.replaced``: its responses are not this policy's. None
            takes what is there, as a run does that goes on in the middle of an M-step.
    """

    def __init__(self, folder: Path, policy: str | None):
        self.folder = folder
        self.replaced = False
        if policy is not None and self._policy() not in (None, policy):
            retired = folder.with_name(f"{folder.name}.replaced")
            shutil.rmtree(retired, ignore_errors=True)
            folder.rename(retired)
            self.replaced = True
        folder.mkdir(parents=True, exist_ok=True)
        if policy is not None:
            write_atomically(self._path("policy.json"), json.dumps({"policy": policy}))
        self.rounds: dict[tuple[int, int], list[Rollout]] = self._read()

    def _path(self, name: str) -> Path:
        return self.folder / name

    def _policy(self) -> str | None:
        try:
            return json.loads(self._path("policy.json").read_text(encoding="utf-8"))["policy"]
        except (OSError, ValueError, LookupError, TypeError):
            return None

    # ---- responses ----

    def chunk(self, round_: int, chunk: int) -> list[Rollout] | None:
        """What this chunk of this round brought, None where it has not been sampled."""
        return self.rounds.get((round_, chunk))

    def append(self, round_: int, chunk: int, rollouts: Sequence[Rollout]) -> None:
        """Adds a chunk; on return it is on the disk, or an error was raised and it is not there."""
        lines = [json.dumps(asdict(rollout)) for rollout in rollouts]
        lines.append(json.dumps({"round": round_, "chunk": chunk, "responses": len(rollouts)}))
        with self._path("responses.jsonl").open("ab") as file:
            file.write(("\n".join(lines) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())
        self.rounds[round_, chunk] = list(rollouts)

    def _read(self) -> dict[tuple[int, int], list[Rollout]]:
        """The whole chunks; what follows the last one, as a kill leaves it, is cut off."""
        if self._path("responses.parquet").exists():
            return self._read_parquet()
        path = self._path("responses.jsonl")
        rounds: dict[tuple[int, int], list[Rollout]] = {}
        if not path.exists():
            return rounds
        content = path.read_bytes()
        whole = place = 0
        pending: list[Rollout] = []
        while (end := content.find(b"\n", place)) >= 0:
            try:
                row = json.loads(content[place:end])
                if "chunk" in row:
                    if row["responses"] != len(pending):
                        break
                    rounds[row["round"], row["chunk"]] = pending
                    pending, whole = [], end + 1
                else:
                    pending.append(Rollout(**row))
            except (ValueError, LookupError, TypeError):
                break
            place = end + 1
        if whole < len(content):
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
        path = self._path("responses.parquet")
        written = path.with_name(f"{path.name}.tmp")
        keys = [[round_, chunk] for round_, chunk in self.rounds]
        table = pyarrow.Table.from_pylist(rows).replace_schema_metadata(
            {"chunks": json.dumps(keys)}
        )
        pyarrow.parquet.write_table(table, written)
        os.replace(written, path)
        self._path("responses.jsonl").unlink(missing_ok=True)

    def _read_parquet(self) -> dict[tuple[int, int], list[Rollout]]:
        import pyarrow.parquet

        table = pyarrow.parquet.read_table(self._path("responses.parquet"))
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
        path = self._path("grad_norms.json")
        if not path.exists():
            return None
        return torch.tensor(json.loads(path.read_text(encoding="utf-8")), dtype=torch.float64)

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
        return load_file(path) if path.exists() else None


def fingerprint(model: nn.Module) -> str:
    """Of the trainable parameters' bits: another after an optimizer step."""
    parts = [
        int(torch.hash_tensor(parameter.detach()).view(torch.int64))
        for parameter in trainable_parameters(model).values()
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def write_atomically(path: Path, text: str) -> None:
    written = path.with_name(f"{path.name}.tmp")
    with written.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(written, path)
