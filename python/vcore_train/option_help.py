"""How the commands declare their options."""

from typing import Any

import typer


def option(
    help: str, *names: str, panel: str | None = None, default: str | None = None, **kwargs: Any
) -> Any:
    """``default``: what leaving the option out means, where its own default is None."""
    if default is not None:
        help = f"{help.removesuffix('.')} (default: {default})."
    return typer.Option(*names, help=help, rich_help_panel=panel, **kwargs)
