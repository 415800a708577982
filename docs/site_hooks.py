"""What the site needs beside its pages: files of the repository, the options of the commands, and
docstrings as Markdown.

Links lead from ``docs/`` to other files of the repository as they do on disk. Each file that a page
links to becomes part of the site, so that the same links work there, and offline.
"""

import inspect
import posixpath
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from griffe import Extension, GriffeLoader, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "python")]
DOCS = "docs/"
PAGES_OF_THE_ROOT = ("CHANGELOG.md",)  # in the navigation
COMMANDS = "api/command.md"
LINK = re.compile(r"(\]\()([^)#\s]+)((?:#[^)\s]*)?\))")


# ---------------------------------------------------------------------------------------------
# Links out of docs/


def in_repository(uri: str) -> str:
    """The path in the repository of the site's file ``uri``."""
    return DOCS + uri if (ROOT / DOCS / uri).exists() else uri


def target_of(page: str, link: str) -> str | None:
    """The repository's file that ``link`` on ``page`` leads to, both as paths in it."""
    if re.match(r"[a-z]+:|/", link):
        return None
    path = posixpath.normpath(posixpath.join(posixpath.dirname(page), link))
    return path if (ROOT / path).is_file() else None


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to, and what those pages link to in turn."""
    for path in PAGES_OF_THE_ROOT:
        files.append(File.generated(config, path, abs_src_path=str(ROOT / path)))
    waiting = list(files.documentation_pages())
    while waiting:
        page = waiting.pop()
        for _, link, _ in LINK.findall(page.content_string):
            target = target_of(in_repository(page.src_uri), link)
            if target is None or target.startswith(DOCS) or files.get_file_from_path(target):
                continue
            file = File.generated(config, target, abs_src_path=str(ROOT / target))
            files.append(file)
            if file.is_documentation_page():
                waiting.append(file)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Links as they are between the files of the site."""

    def rewritten(match: re.Match[str]) -> str:
        target = target_of(in_repository(page.file.src_uri), match[2])
        if target is None:
            return match[0]
        uri = target.removeprefix(DOCS)
        link = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or ".")
        return match[1] + link + match[3]

    if page.file.src_uri == COMMANDS:
        markdown += options_of_commands()
    return LINK.sub(rewritten, markdown)


# ---------------------------------------------------------------------------------------------
# Options, as the commands themselves know them


def options_of_commands() -> str:
    """A section for each command, with a table of its options."""
    import typer
    from vcore_train.commands import app

    return "\n".join(sections(typer.main.get_command(app), "vcore"))


def sections(command: Any, name: str) -> list[str]:
    nested = getattr(command, "commands", None)
    if nested is not None:
        return [part for sub in nested for part in sections(nested[sub], f"{name} {sub}")]
    hints = get_type_hints(command.callback, include_extras=True)
    parameters = inspect.signature(command.callback).parameters.values()
    rows = [row(p, hints[p.name]) for p in parameters if get_origin(hints[p.name]) is Annotated]
    return [f"\n## {name}\n", plain(command.help or ""), "", "| | | |", "|---|---|---|", *rows]


def row(parameter: inspect.Parameter, hint: Any) -> str:
    """Name, meaning and default of one option or argument."""
    kind, info = get_args(hint)[:2]
    if type(info).__name__ == "ArgumentInfo":
        names = [parameter.name.upper()]
    else:
        names = [*info.param_decls] or ["--" + parameter.name.replace("_", "-")]
    choices = [
        choice
        for part in (kind, *get_args(kind))
        if get_origin(part) is Literal
        for choice in get_args(part)
    ]
    meaning = plain(info.help or "") + (f" One of {', '.join(choices)}." if choices else "")
    default = "" if parameter.default is inspect.Parameter.empty else parameter.default
    shown = "" if default in (None, "", False) else f"`{default}`"
    return f"| {', '.join(f'`{name}`' for name in names)} | {meaning} | {shown} |"


def plain(text: str) -> str:
    return re.sub(r"\s+", " ", text).replace("|", r"\|").replace("<", "&lt;")


# ---------------------------------------------------------------------------------------------
# Docstrings, which are written for a terminal, with roles and tables of reStructuredText

SECTIONS = ("Args", "Attributes", "Raises", "Returns", "Yields")
ROLE = re.compile(r":(?:func|class|meth|mod|data):`([^`]+)`")
# From one rule of a simple table to its last.
TABLE = re.compile(r"^(?P<indent> *)=+(?: +=+)+\n(?:.*\S.*\n)*? *=+(?: +=+)+$(?!\n *\S)", re.M)
ITEM = re.compile(r"    ([a-z_][a-z0-9_, ]*): (.*)")
TITLE = re.compile(r"(?P<title>\w[^:]*):$")


def as_markdown(text: str) -> str:
    """A docstring with its roles, tables, definitions and literal blocks in Markdown."""
    text = ROLE.sub(lambda m: f"`{m[1].split('.')[-1] if m[1][0] == '~' else m[1]}`", text)
    text = TABLE.sub(r"\g<indent>```text\n\g<0>\n\g<indent>```", text)
    lines: list[str] = []
    section = listed = fenced = False
    for line in text.splitlines():
        if line.strip().startswith("```"):
            fenced = not fenced
        title = TITLE.match(line)
        if line and not line.startswith(" "):
            section = title is not None and title["title"] in SECTIONS
            listed = False
        item = None if section or fenced else ITEM.match(line)
        if item:
            lines += [] if listed else [""]
            lines.append(f"- `{item[1].replace(', ', '`, `')}`: {item[2]}")
            listed = True
        elif listed and line.startswith("        "):
            lines.append("  " + line.strip())
        elif title and not section and not line.startswith(" ") and not line.endswith("::"):
            lines.append(f"**{title['title']}**")
        else:
            lines.append(re.sub("::$", ":", line))
    return "\n".join(lines)


class Docstrings(Extension):
    """Called by mkdocstrings for each object that it reads."""

    def on_object(self, *, obj: Object, loader: GriffeLoader, **kwargs: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)
