"""Supervised trajectories: from a file or a dataset's name to ``input_ids`` and ``labels``.

A row is a prompt and a response. Their fields are named by the caller or recognised from the first
row: GSM8K's ``question``/``answer``, ``prompt`` with ``response`` or ``completion``,
``instruction``/``output``, ``problem``/``solution``, OpenMathReasoning's ``problem`` with
``generated_solution``, or a conversation in ``messages`` whose last turn, the assistant's, is the
response. A dotted name, ``reward_model.ground_truth``, reaches inside a field. Every complaint
about a row names the file and the row.
"""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from vcore_train.modeling import IGNORE_INDEX

if TYPE_CHECKING:
    import datasets

ANSWER_MARK = "####"
PROMPT_FIELDS = ("prompt", "question", "instruction", "problem", "query", "input")
RESPONSE_FIELDS = (
    *("response", "completion", "solution", "generated_solution", "output", "answer", "target"),
)
CONVERSATION_FIELDS = ("messages", "conversation", "conversations")
TABLES = {".json": "json", ".csv": "csv", ".parquet": "parquet", ".arrow": "arrow"}
ROWS_AT_ONCE = 1000  # taken out of a table; one at a time is 25 times slower

Conversation = list[dict[str, str]]  # turns with a role and a content


@dataclass(frozen=True)
class Example:
    """A prompt (text, or the turns of a conversation), its response, and where they stood."""

    prompt: str | Conversation
    response: str
    where: str


@dataclass(frozen=True)
class Encoded:
    """Token rows ready for the trainer, and how many examples were left out or cut short."""

    rows: list[dict[str, list[int]]]
    skipped: int = 0
    truncated: int = 0

    @property
    def tokens(self) -> int:
        return sum(len(row["input_ids"]) for row in self.rows)

    @property
    def supervised_tokens(self) -> int:
        return sum(label != IGNORE_INDEX for row in self.rows for label in row["labels"])


def read_examples(
    data: str | Path,
    *,
    split: str = "train",
    prompt_field: str | None = None,
    response_field: str | None = None,
    limit: int | None = None,
    empty: str = "error",
) -> tuple[list[Example], int]:
    """Reads the rows of ``data``; returns the examples and how many rows were skipped as empty.

    ``data``: a ``.jsonl`` file (one JSON object a line), a ``.json``, ``.csv``, ``.parquet`` or
    ``.arrow`` file, a dataset folder, or the name of a dataset on the Hugging Face hub, with an
    optional configuration after a colon (``openai/gsm8k:main``). ``split`` applies to datasets.
    ``limit``: only the first rows. ``empty``: ``"error"`` or ``"skip"`` for an empty response.

    Raises ValueError or FileNotFoundError with the file, the row and the mend.
    """
    if empty not in ("error", "skip"):
        raise ValueError(f"read_examples: empty must be 'error' or 'skip', got {empty!r}.")
    examples: list[Example] = []
    skipped = 0
    fields: _Fields | None = None
    for where, row in read_rows(data, split, limit):
        if fields is None:
            fields = _Fields.find(row, prompt_field, response_field, where)
        prompt, response = fields.take(row, where)
        check_characters(plain_text(prompt), fields.prompt, where)
        check_characters(response, fields.response, where)
        if response.strip():
            examples.append(Example(prompt, response, where))
        elif empty == "skip":
            skipped += 1
        else:
            raise ValueError(
                f"{where}: the response (field {fields.response!r}) is empty. Remove the row, or "
                "skip such rows with --empty-rows skip."
            )
    if not examples:
        raise ValueError(f"{data}: no rows to train on ({skipped} skipped as empty).")
    return examples, skipped


def plain_text(prompt: str | Conversation) -> str:
    """A prompt without any template: its text, or its turns one after the other."""
    if isinstance(prompt, str):
        return prompt
    return "\n".join(turn["content"] for turn in prompt)


def prompt_tokens(
    prompts: Sequence[str | Conversation], tokenizer: PreTrainedTokenizerBase
) -> list[list[int]]:
    """The prompts as the model sees them, up to where the response begins.

    With the tokenizer's chat template and its generation prompt where there is one, otherwise the
    plain text and a line break, after the tokenizer's own beginning-of-sequence token.
    """
    if tokenizer.chat_template is not None:
        conversations = [
            [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
            for prompt in prompts
        ]
        texts = [
            tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
            for turns in conversations
        ]
        return tokenizer(texts, add_special_tokens=False)["input_ids"]
    texts = [f"{plain_text(prompt)}\n" for prompt in prompts]
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    first = tokenizer("")["input_ids"][:1]
    starts = bool(first) and first[0] == tokenizer.bos_token_id
    return [[*first, *row] for row in ids] if starts else ids


def encode(
    examples: Sequence[Example],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    too_long: str = "error",
) -> Encoded:
    """Token rows: prompt, response, end-of-sequence; ``labels`` are -100 on the prompt.

    ``answer_mask`` is 1 from a response's last ``####`` on, as in GSM8K: the answer, which the
    random-mask method always supervises. It is 0 everywhere in a response without one.

    ``max_length``: tokens a row may have, at most the model's window. ``too_long`` says what
    becomes of a longer one: ``"error"`` names it, ``"truncate"`` cuts the end of its response (and
    skips it if its prompt alone is too long), ``"skip"`` leaves it out; both are counted.
    """
    if too_long not in ("error", "truncate", "skip"):
        raise ValueError(
            f"encode: too_long must be 'error', 'truncate' or 'skip', got {too_long!r}."
        )
    if tokenizer.eos_token_id is None:
        raise ValueError("the tokenizer has no end-of-sequence token to end a response.")
    rows = []
    skipped = truncated = 0
    prompts = prompt_tokens([example.prompt for example in examples], tokenizer)
    responses = _response_tokens([example.response for example in examples], tokenizer)
    for example, prompt, (response, is_answer) in zip(examples, prompts, responses, strict=True):
        ids = [*prompt, *response, tokenizer.eos_token_id]
        if len(ids) > max_length:
            if too_long == "error":
                raise ValueError(
                    f"{example.where}: the trajectory has {len(ids)} tokens, {max_length} fit. "
                    "Raise --max-length (up to the model's window), or pass --long-rows "
                    "truncate or --long-rows skip."
                )
            if too_long == "skip" or len(prompt) >= max_length:
                skipped += 1
                continue
            truncated += 1
            ids = ids[:max_length]
        labels = [IGNORE_INDEX] * len(prompt) + ids[len(prompt) :]
        answer = [*[0] * len(prompt), *is_answer, max(is_answer, default=0)][: len(ids)]
        rows.append({"input_ids": ids, "labels": labels, "answer_mask": answer})
    if not rows:
        raise ValueError(f"none of the rows fits into {max_length} tokens. Raise --max-length.")
    return Encoded(rows, skipped, truncated)


def _response_tokens(
    responses: Sequence[str], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens of each response, and 1 for those that reach into its answer."""
    fast = tokenizer.is_fast  # only these know where in the text a token stands
    found = tokenizer(list(responses), add_special_tokens=False, return_offsets_mapping=fast)
    for place, (response, ids) in enumerate(zip(responses, found["input_ids"], strict=True)):
        start = response.rfind(ANSWER_MARK) if fast else -1
        spans = found["offset_mapping"][place] if fast else []
        yield ids, [int(end > start) for _, end in spans] if start >= 0 else [0] * len(ids)


@dataclass(frozen=True)
class _Fields:
    """Which fields hold the prompt and the response; one name for both means a conversation."""

    prompt: str
    response: str
    detected: bool

    @classmethod
    def find(
        cls, row: Mapping[str, Any], prompt: str | None, response: str | None, where: str
    ) -> "_Fields":
        if prompt is None and response is None:
            for name in CONVERSATION_FIELDS:
                if name in row:
                    return cls(name, name, True)
        return cls(
            prompt or recognise(row, PROMPT_FIELDS, "prompt", where),
            response or recognise(row, RESPONSE_FIELDS, "response", where),
            prompt is None,
        )

    def take(self, row: Mapping[str, Any], where: str) -> tuple[str | Conversation, str]:
        prompt = take_prompt(row, self.prompt, where, detected=self.detected)
        if self.prompt == self.response:
            return split_conversation(prompt, self.prompt, where)
        response = value_of(row, self.response)
        if response is None:
            raise _missing(row, "response", self.response, where)
        if isinstance(response, list):
            turns = check_turns(response, self.response, where)
            if len(turns) != 1:
                raise ValueError(f"{where}: {self.response!r} holds {len(turns)} turns, not one.")
            response = turns[0]["content"]
        if not isinstance(response, str):
            raise ValueError(
                f"{where}: field {self.response!r} is {type(response).__name__}, expected text."
            )
        return prompt, response


def recognise(row: Mapping[str, Any], names: Iterable[str], side: str, where: str) -> str:
    """The first of ``names`` that is a field of the row, for the option ``--{side}-field``."""
    absent = object()
    for name in names:
        if value_of(row, name, absent) is not absent:
            return name
    raise ValueError(
        f"{where}: no field looks like the {side}; the row has {listed(row)}. Name it with "
        f"--{side}-field."
    )


def value_of(row: Mapping[str, Any], name: str, default: Any = None) -> Any:
    """The value of a field; a dotted name reaches inside."""
    if name in row:
        return row[name]
    outer, _, inner = name.partition(".")
    within = row.get(outer)
    return value_of(within, inner, default) if isinstance(within, Mapping) else default


def take_prompt(
    row: Mapping[str, Any], name: str, where: str, *, detected: bool
) -> str | Conversation:
    """A prompt's text or turns; ``instruction``, where it was detected, goes with ``input``."""
    prompt = value_of(row, name)
    if prompt is None:
        raise _missing(row, "prompt", name, where)
    if isinstance(prompt, list):
        return check_turns(prompt, name, where)
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: field {name!r} is {type(prompt).__name__}, expected text.")
    if detected and name == "instruction" and row.get("input"):
        return f"{prompt}\n{row['input']}"
    return prompt


def split_conversation(
    turns: str | Conversation, name: str, where: str
) -> tuple[Conversation, str]:
    """The turns before the last, and what the assistant says in the last."""
    turns = check_turns(turns, name, where)
    if turns[-1]["role"] != "assistant" or len(turns) < 2:
        raise ValueError(
            f"{where}: a conversation must end with an assistant turn after another turn, "
            f"the roles are {', '.join(turn['role'] for turn in turns)}."
        )
    return turns[:-1], turns[-1]["content"]


def check_turns(value: Any, name: str, where: str) -> Conversation:
    """Checks the turns of a conversation; reads the older ``from``/``value`` spelling too."""
    roles = {"human": "user", "gpt": "assistant"}
    turns = []
    for turn in value if isinstance(value, list) else []:
        if not isinstance(turn, dict):
            break
        role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or not isinstance(content, str):
            break
        turns.append({"role": roles.get(role, role), "content": content})
    if not turns or len(turns) != len(value):
        raise ValueError(
            f"{where}: expected a list of turns, each with a text 'role' and a text 'content', "
            f"in field {name!r}."
        )
    return turns


def check_characters(text: str, name: str, where: str) -> None:
    """JSON can spell half of a surrogate pair, which is no character and has no encoding."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{where}: field {name!r} holds \\u{ord(text[error.start]):04x} at character "
            f"{error.start + 1}, half of a surrogate pair. Repair or remove it."
        ) from error


def listed(row: Mapping[str, Any]) -> str:
    """The names of a row's fields, for a message."""
    return ", ".join(repr(name) for name in _names(row)) or "no fields"


def _names(row: Mapping[str, Any], outer: str = "") -> Iterator[str]:
    for name, value in row.items():
        if isinstance(value, Mapping) and value:
            yield from _names(value, f"{outer}{name}.")
        else:
            yield f"{outer}{name}"


def _missing(row: Mapping[str, Any], side: str, name: str, where: str) -> ValueError:
    return ValueError(f"{where}: the {side} field {name!r} is missing; the row has {listed(row)}.")


def read_rows(
    data: str | Path, split: str = "train", limit: int | None = None
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Pairs (where it stands, the row), of the first ``limit`` rows; see :func:`read_examples`."""
    if limit is not None and limit < 1:
        raise ValueError(f"the limit on rows must be at least 1, got {limit}.")
    return islice(_rows(str(data), split), limit)


def _rows(data: str, split: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    path = Path(data)
    if path.is_file() and path.suffix not in TABLES:
        yield from _json_lines(path)
    elif path.exists() or not _looks_like_a_file(data):
        batches = _dataset(data, split).iter(ROWS_AT_ONCE)
        rows = (
            dict(zip(columns, values, strict=True))
            for columns in batches
            for values in zip(*columns.values(), strict=True)
        )
        for number, row in enumerate(rows, start=1):
            yield f"{data}, row {number}", row
    else:
        raise FileNotFoundError(f"{data}: no such file.")


def _looks_like_a_file(data: str) -> bool:
    return Path(data).suffix in (".jsonl", ".txt", ".gz", *TABLES) or data.startswith(("/", "."))


def _json_lines(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            where = f"{path}, row {number}"
            try:
                row = json.loads(line.rstrip().decode("utf-8-sig" if number == 1 else "utf-8"))
            except UnicodeDecodeError as error:
                raise ValueError(f"{where}: not UTF-8 text ({error.reason}).") from error
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{where}: not valid JSON ({error.msg} at column {error.colno}). Expected one "
                    "JSON object a line."
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{where}: holds a JSON {type(row).__name__}, expected an object with fields."
                )
            yield where, row


def _dataset(data: str, split: str) -> "datasets.Dataset":
    """A table, a saved dataset, or a dataset by name through ``datasets``."""
    import datasets  # slow to import, and a JSONL file does not need it

    path = Path(data)
    if path.is_file():
        kind = TABLES[path.suffix]
        try:
            return datasets.load_dataset(kind, data_files=data, split="train")
        except (datasets.exceptions.DatasetGenerationError, ValueError, RuntimeError) as error:
            reason = (str(error.__cause__ or "") or str(error)).strip()
            raise ValueError(f"{data}: empty, or not a {kind} table ({reason}).") from error
    if path.is_dir() and ((path / "state.json").exists() or (path / "dataset_dict.json").exists()):
        saved = datasets.load_from_disk(data)
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        if split not in saved:
            raise ValueError(f"{data}: no split {split!r}; it has {', '.join(saved)}.")
        return saved[split]
    name, _, configuration = data.partition(":")
    try:
        return datasets.load_dataset(name, configuration or None, split=split)
    except (ConnectionError, FileNotFoundError) as error:
        raise FileNotFoundError(
            f"{data}: neither a file here nor a dataset that can be reached ({error})."
        ) from error
