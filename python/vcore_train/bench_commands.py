"""``vcore bench``: run the benchmarks, or compare two records of them."""

from pathlib import Path
from typing import Annotated

import typer

from vcore_train.console import console


def bench(
    select: Annotated[
        list[str] | None,
        typer.Option(help="Only this suite (head, step, ...); may be given several times."),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, seconds: the figures mean nothing.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder of the results (default: benchmarks/results of the checkout)."),
    ] = None,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(help="Two JSON files of earlier runs: say what moved from A to B."),
    ] = None,
    fail_over: Annotated[
        str | None,
        typer.Option(
            help="With --compare: exit with 1 if something of ours slowed by more, as 10%, is "
            "wrong, or has no time any more."
        ),
    ] = None,
) -> None:
    """Benchmarks beside the peers, with a table, JSON and a roofline; needs a source checkout."""
    if compare is not None:
        if select or quick or out is not None:
            raise ValueError("--compare runs nothing. Drop --select, --quick and --out.")
        from vcore_train.bench_compare import compare_files, lines, share

        limit = None if fail_over is None else share(fail_over)
        result = compare_files(*compare)
        for line in lines(result):
            console.print(line, markup=False, soft_wrap=True)
        if limit is not None and (faults := result.faults(limit)):
            console.print("; ".join(faults), markup=False, soft_wrap=True)
            raise typer.Exit(1)
        return
    if fail_over is not None:
        raise ValueError("--fail-over judges a comparison. Pass --compare A B with it.")
    from vcore_train.bench import run_suite

    code = run_suite(select or [], quick=quick, out=out)
    if code:
        raise typer.Exit(code)
