"""What the studies share: a small model trained in place, its data, and where both are kept."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.progress import Progress
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from vcore_train.arithmetic import generate_problems
from vcore_train.collators import PaddingCollator, model_inputs
from vcore_train.data import Example, encode, plain_text, read_examples
from vcore_train.modeling import IGNORE_INDEX, token_nll, trainable_parameters
from vcore_train.models import Size, new_model
from vcore_train.tokenizer import train_tokenizer

Row = dict[str, list[int]]
Batch = dict[str, Any]
T = TypeVar("T")

SIZES = (  # of a configuration: what all architectures share
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings"),
)
# Scaled down with the model, so that they matter at these lengths and widths.
PECULIARITIES: dict[str, dict[str, Any]] = {
    "gemma2": {"sliding_window": 64, "query_pre_attn_scalar": 32}
}


@dataclass(frozen=True)
class Setting:
    """The model, its training by plain supervision, and how many seeds.

    ``length``: longer rows (prompt and response, in tokens) are left out. ``rows``: at most so many
    training rows are read or generated; ``held_out``: as many beside them, never trained on.
    A seed decides initial weights and the order of the rows, not the data or the tokenizer.
    """

    architecture: str = "qwen3"
    layers: int = 4
    hidden: int = 128
    heads: int = 4
    vocab: int = 2048
    length: int = 192
    train_steps: int = 160
    batch_size: int = 16
    lr: float = 3e-3
    warmup: int = 30
    rows: int = 8000
    held_out: int = 512
    seeds: int = 3

    @classmethod
    def full(cls, **changes: Any) -> "Setting":
        """For the record: minutes on two cores."""
        return replace(cls(), **changes)

    @classmethod
    def quick(cls, **changes: Any) -> "Setting":
        """For tests: seconds. The figures mean little."""
        small = cls(
            layers=2,
            hidden=32,
            heads=2,
            vocab=300,
            train_steps=12,
            batch_size=8,
            warmup=4,
            rows=192,
            held_out=32,
            seeds=2,
        )
        return replace(small, **changes)

    def config(self) -> PretrainedConfig:
        """Of the model: ``architecture`` is a model_type of transformers."""
        size = Size(layers=self.layers, hidden=self.hidden, heads=self.heads, window=self.length)
        qwen3 = size.config()
        if self.architecture == "qwen3":
            return qwen3
        values = {name: getattr(qwen3, name) for name in SIZES}
        return AutoConfig.for_model(
            self.architecture, **values, **PECULIARITIES.get(self.architecture, {})
        )


@dataclass
class Start:
    """A model after ``steps`` of plain supervision, ready to be studied or trained on.

    ``seen`` holds the rows that it was trained on, ``unseen`` those of the same split that it has
    not met, both in the order of the seed; ``held_out`` the other split. Where training went round
    the rows more than once, ``unseen`` is empty.
    """

    model: PreTrainedModel  # fp32, in training mode, every parameter trainable
    optimizer: torch.optim.AdamW  # its state as training left it
    tokenizer: PreTrainedTokenizerBase
    seen: list[Row]
    unseen: list[Row]
    held_out: list[Row]
    steps: int

    @property
    def held_in(self) -> list[Row]:
        """All rows of the training split, those not met yet first."""
        return [*self.unseen, *self.seen]


@dataclass
class Context:
    """One study's surroundings: its setting, its data, its folder and its progress bars."""

    setting: Setting
    out: Path
    data: Path | None = None
    eval_data: Path | None = None
    progress: Progress | None = None
    _read: "dict[Any, _Data]" = field(default_factory=dict)  # shared by variants

    @property
    def seeds(self) -> range:
        return range(self.setting.seeds)

    def track(self, items: Iterable[T], what: str, total: int | None = None) -> Iterator[T]:
        """``items``, with a progress bar while they last."""
        if total is None and isinstance(items, Sequence):
            total = len(items)
        with self.task(what, total) as advance:
            for item in items:
                yield item
                advance()

    @contextmanager
    def task(self, what: str, total: int | None = None) -> Iterator[Callable[[], None]]:
        """A progress bar; the function that it gives moves it by one."""
        if self.progress is None:
            yield lambda: None
            return
        task = self.progress.add_task(what, total=total)
        try:
            yield lambda: self.progress.advance(task)  # type: ignore[union-attr]
        finally:
            self.progress.remove_task(task)

    def variant(self, **changes: Any) -> "Context":
        """The same surroundings with another setting."""
        return replace(self, setting=replace(self.setting, **changes))

    def start(self, seed: int, *, steps: int | None = None) -> Start:
        """The model of ``seed`` after ``steps`` (None: the setting's), trained or from ``out``.

        Every call gives objects of its own. A start of fewer steps lies on the way of a longer one.
        """
        setting = replace(
            self.setting, train_steps=self.setting.train_steps if steps is None else steps
        )
        data = self._data()
        rows = data.in_order(seed)
        model = new_model(setting.config(), data.tokenizer, seed=seed).train()
        optimizer = adamw(model, setting.lr)
        kept = self.out / "starts" / f"{_key(setting, seed, data.fingerprint)}.pt"
        if kept.exists():
            state = torch.load(kept, weights_only=True)
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
        else:
            order = endless(rows, setting.batch_size)
            for step in self.track(range(setting.train_steps), f"Training, seed {seed}"):
                for group in optimizer.param_groups:
                    group["lr"] = setting.lr * min(1.0, (step + 1) / max(setting.warmup, 1))
                train_step(model, optimizer, next(order))
            kept.parent.mkdir(parents=True, exist_ok=True)
            partial = kept.with_suffix(f".{os.getpid()}.partial")
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, partial)
            os.replace(partial, kept)
        used = min(setting.train_steps * setting.batch_size, len(rows))
        return Start(
            model,
            optimizer,
            data.tokenizer,
            rows[:used],
            rows[used:],
            data.held_out,
            setting.train_steps,
        )

    def _data(self) -> "_Data":
        setting = self.setting
        key = (setting.vocab, setting.length, setting.rows, setting.held_out)
        if key not in self._read:
            self._read[key] = _read(*key, self.data, self.eval_data)
        return self._read[key]


def adamw(model: torch.nn.Module, lr: float) -> torch.optim.AdamW:
    """The studies' optimizer over all trainable parameters, without weight decay."""
    parameters = trainable_parameters(model).values()
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)


def train_step(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    *,
    weights: torch.Tensor | None = None,
    max_norm: float = 1.0,
) -> float:
    """One step on the mean loss of the supervised tokens, gradients clipped; returns their norm.

    ``weights``: a factor on each token's loss, shaped like the labels. The divisor stays the number
    of supervised tokens.
    """
    nll = token_nll(model, batch)
    if weights is not None:
        nll = nll * weights
    (nll.sum() / supervised(batch).sum()).backward()
    norm = torch.nn.utils.clip_grad_norm_(trainable_parameters(model).values(), max_norm)
    optimizer.step()
    optimizer.zero_grad()
    return float(norm)


def supervised(batch: Batch) -> torch.Tensor:
    """[B, T]: True where a token of a padded batch has a loss."""
    mask = batch["labels"] != IGNORE_INDEX
    mask[:, 0] = False
    return mask


def collate(rows: Sequence[Row]) -> Batch:
    """A batch padded on the right, as the model takes it."""
    return model_inputs(PaddingCollator()(rows))


def batches(rows: Sequence[Row], size: int) -> list[Batch]:
    """``rows`` in their order as padded batches; the last may be smaller."""
    return [collate(rows[first : first + size]) for first in range(0, len(rows), size)]


def endless(rows: Sequence[Row], size: int) -> Iterator[Batch]:
    """Batches of ``rows`` in their order, from the beginning again after the last one."""
    place = 0
    while True:
        yield collate([rows[(place + i) % len(rows)] for i in range(size)])
        place += size


def drawn(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """``count`` of the rows at random, without replacement."""
    generator = torch.Generator().manual_seed(seed)
    return [rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist()]


@dataclass(frozen=True)
class _Data:
    tokenizer: PreTrainedTokenizerBase
    rows: list[Row]
    held_out: list[Row]
    fingerprint: str

    def in_order(self, seed: int) -> list[Row]:
        return drawn(self.rows, len(self.rows), seed)


def _read(
    vocab: int,
    length: int,
    most: int,
    most_held_out: int,
    data: Path | None,
    eval_data: Path | None,
) -> _Data:
    """Tokenised rows of ``data``, or of generated arithmetic where it is None.

    Without ``eval_data`` the last rows of ``data`` are held out, at most a quarter of them.
    """
    if data is None:
        if eval_data is not None:
            raise ValueError("--eval-data means nothing without --data.")
        train = _generated(most, held_out=False)
        held_out = _generated(most_held_out, held_out=True)
    else:
        train, _ = read_examples(data, limit=most)
        if eval_data is not None:
            held_out, _ = read_examples(eval_data)
        elif len(train) > 1:
            count = min(most_held_out, max(1, len(train) // 4))
            train, held_out = train[:-count], train[-count:]
        else:
            raise ValueError(f"{data}: one row cannot be split. Pass more rows or --eval-data.")
    texts = (text for e in train for text in (f"{plain_text(e.prompt)}\n", e.response))
    tokenizer = train_tokenizer(texts, vocab_size=vocab, window=length)

    def rows(examples: list[Example]) -> list[Row]:
        encoded = encode(examples, tokenizer, max_length=length, too_long="skip").rows
        return [{name: row[name] for name in ("input_ids", "labels")} for row in encoded]

    train_rows = rows(train)
    fingerprint = hashlib.sha256(json.dumps(train_rows).encode()).hexdigest()
    return _Data(tokenizer, train_rows, rows(held_out)[:most_held_out], fingerprint)


def _generated(count: int, *, held_out: bool) -> list[Example]:
    problems = generate_problems(count, held_out=held_out)
    return [Example(p.prompt, p.response, "generated arithmetic") for p in problems]


def _key(setting: Setting, seed: int, fingerprint: str) -> str:
    """Names a start by all that it depends on."""
    values = {part.name: getattr(setting, part.name) for part in fields(Setting)}
    values |= {"seeds": 0, "held_out": 0}
    text = json.dumps([values, seed, fingerprint, torch.__version__], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
