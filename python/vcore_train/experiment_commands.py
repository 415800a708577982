"""``vcore experiment NAME``: the studies behind the library's claims, one command each."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from vcore_train.console import console, quiet_other_libraries
from vcore_train.experiments import STUDIES

app = typer.Typer(
    help="Measure what the documentation claims, on a small model trained in place.",
    no_args_is_help=True,
)


def _command(name: str) -> Callable[..., None]:
    def command(
        out: Annotated[
            Path, typer.Option(help="Folder of the results and of trained models to reuse.")
        ] = Path("vcore-experiments"),
        data: Annotated[
            Path | None,
            typer.Option(help="Rows to train and measure on (default: generated arithmetic)."),
        ] = None,
        eval_data: Annotated[
            Path | None, typer.Option(help="Held-out rows (default: the last ones of --data).")
        ] = None,
        seeds: Annotated[
            int | None, typer.Option(help="Repetitions, from which the intervals come.")
        ] = None,
        quick: Annotated[
            bool, typer.Option("--quick", help="Seconds instead of minutes: the figures mean less.")
        ] = False,
        threads: Annotated[
            int | None, typer.Option(help="CPU threads (default: PyTorch's choice).")
        ] = None,
        overwrite: Annotated[
            bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")
        ] = False,
    ) -> None:
        quiet_other_libraries()
        from vcore_train.experiments.study import StudyOptions, run_study

        options = StudyOptions(out, data, eval_data, seeds, quick, threads, overwrite)
        run_study(name, options, console)

    return command


for _name, _question in STUDIES.items():
    app.command(name=_name, help=_question)(_command(_name))
