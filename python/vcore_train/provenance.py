"""Where a file of results comes from: commit, versions and processor. Needs no other package."""

import importlib.metadata
import platform
import subprocess
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).resolve().parent
CPUINFO = Path("/proc/cpuinfo")


def checkout_state(folder: Path = HERE) -> tuple[str, int] | None:
    """The commit of the source checkout that ``folder`` is in, and how many of its tracked files
    are changed.

    None where that checkout is not the one this package runs from (installed packages may lie
    inside the repository of another project), without git, or before the first commit.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
        return done.stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != HERE.parents[1]:
            return None
        changed = git("status", "--porcelain", "--untracked-files=no").splitlines()
        return git("rev-parse", "HEAD"), len(changed)
    except (OSError, subprocess.SubprocessError):
        return None


def commit(folder: Path = HERE) -> str | None:
    """The commit of :func:`checkout_state`, with + where files are changed."""
    state = checkout_state(folder)
    return state and (f"{state[0]}+" if state[1] else state[0])


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Of the installed distributions, None for one that is not there."""
    return {name: version(name) for name in packages}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def cpuinfo() -> str:
    """The text of /proc/cpuinfo; empty where there is none."""
    return CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""


def processor() -> str:
    """The processor's name."""
    names = (x.split(":", 1)[1] for x in cpuinfo().splitlines() if x.startswith("model name"))
    return next(names, platform.processor()).strip()
