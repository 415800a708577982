"""A file of options for a command, YAML or JSON, and the one that a run leaves in its folder."""

import difflib
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from vcore_train.option_checks import flag

RECORD = "config.yaml"
HEADER = "# The options of the run in this folder, written by vcore train.\n"
# Of one call, not of a run; a file does not name another.
NOT_RECORDED = ("config", "resume", "overwrite")


def read_options(
    path: Path, types_of: Mapping[str, Any], command: str = "vcore train"
) -> dict[str, Any]:
    """The options in a YAML (``.yaml``, ``.yml``) or JSON (``.json``) file, by parameter name.

    ``types_of``: the parameters of the ``command`` and their annotations. Keys are spelt as on the
    command line, with dashes or underscores. None (``null``) stands for an option not given.

    Raises ValueError or OSError naming the file, the key and the nearest valid one.
    """
    names = {flag(name).lstrip("-"): name for name in types_of if name != "config"}
    options: dict[str, Any] = {}
    for key, value in _content(path).items():
        option = str(key).replace("_", "-")
        if option not in names:
            raise ValueError(f"{path}: {_unknown(str(key), option, list(names), command)}")
        name = names[option]
        if name in options:
            raise ValueError(f"{path}: {key} is given twice. Drop one of them.")
        options[name] = None if value is None else _checked(path, key, value, types_of[name])
    return {name: value for name, value in options.items() if value is not None}


def written_options(options: Mapping[str, Any]) -> str:
    """The text of a file from which :func:`read_options` reads these options, None left out."""
    record = {
        flag(name).lstrip("-"): _plain(value)
        for name, value in options.items()
        if value is not None and name not in NOT_RECORDED
    }
    return HEADER + yaml.safe_dump(record, sort_keys=False, allow_unicode=True)


def check_record(folder: Path) -> None:
    """Raises ValueError where the record of a run would take the place of another file."""
    path = folder / RECORD
    if path.exists() and not path.read_text(encoding="utf-8", errors="replace").startswith(HEADER):
        raise ValueError(
            f"{path} was not written by vcore train, which keeps a run's options under this name. "
            "Rename it, or choose another --out."
        )


class _Loader(yaml.SafeLoader):
    """Refuses a key that comes twice, of which YAML itself takes the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        # Before merging (<<), which may repeat them.
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        mapping = super().construct_mapping(node, deep)
        _once((self.construct_object(key, deep=True), None) for key in keys)
        return mapping


def _once(pairs: Any) -> dict:
    found: dict = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{key} is given twice. Drop one of them.")
        found[key] = value
    return found


def _content(path: Path) -> dict:
    suffix = path.suffix.lower()
    if suffix not in (".yaml", ".yml", ".json"):
        raise ValueError(f"--config {path}: expected a .yaml, .yml or .json file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
        if suffix == ".json":
            content = json.loads(text, object_pairs_hook=_once)
        else:
            content = yaml.load(text, _Loader)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"--config {path}: no such file.") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        problem = getattr(error, "problem", None) or "not readable"
        raise ValueError(f"{path}{line}: not valid YAML ({problem}).") from error
    except RecursionError as error:
        raise ValueError(f"{path}: nested too deeply.") from error
    except IsADirectoryError as error:
        raise ValueError(f"--config {path}: expected a file, got a folder.") from error
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if content is None:  # empty, or comments alone
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected options as 'name: value', got {content!r:.60}.")
    if "model_type" in content:
        raise ValueError(
            f"{path} is the configuration of a model: pass it as --model-config. --config takes a "
            "file of options."
        )
    return content


def _unknown(key: str, option: str, known: list[str], command: str) -> str:
    if option == "config":
        return "config: a file of options does not name another. Drop it."
    nearest = difflib.get_close_matches(option, known, n=1)
    hint = f"Did you mean {nearest[0]}?" if nearest else f"{command} --help lists the options."
    return f"no option is called {key!r}. {hint}"


def _checked(path: Path, key: Any, value: Any, annotation: Any) -> Any:
    """``value`` as the command line would have it; raises ValueError where it is no such thing."""
    kind = annotation
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(member for member in get_args(kind) if member is not type(None))
    allowed, good = "text", isinstance(value, str)
    if get_origin(kind) is Literal:
        allowed, good = f"one of {', '.join(get_args(kind))}", value in get_args(kind)
    elif get_origin(kind) is tuple:
        allowed = f"a list of {len(get_args(kind))} numbers"
        numbers = [_number(item) for item in value] if isinstance(value, list) else []
        good = len(numbers) == len(get_args(kind)) and None not in numbers
        value = numbers if good else value
    elif kind is bool:
        allowed, good = "true or false", isinstance(value, bool)
    elif kind is int:
        allowed, good = "a whole number", isinstance(value, int) and not isinstance(value, bool)
    elif kind is float:
        allowed, good = "a number", _number(value) is not None
        value = _number(value) if good else value
    if not good:
        raise ValueError(f"{path}: {key} must be {allowed}, got {value!r}.")
    return value


def _number(value: Any) -> float | None:
    """A number; also of text, since YAML reads 1e-3 as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    return list(value) if isinstance(value, tuple) else value
