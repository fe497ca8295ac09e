"""The commands that make pages to look at."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qorpo.cli.common import Debug, app, log_to, say


@app.command()
def report(
    runs: Annotated[list[str], typer.Argument(metavar="RUN...", help="Run folders; several are compared.")],
    output: Annotated[
        Path | None,
        typer.Option(
            help="The .html, .png or .json to write; else report.html in the run's folder, or here."
        ),
    ] = None,
    debug: Debug = False,
) -> None:
    """Draw a run, or compare several: a page with a verdict, curves, and what was trained on what."""
    log_to(Console(stderr=True), logging.WARNING)
    from qorpo.reports.write import write_report

    written, verdicts = write_report(runs, output)
    for line in verdicts:
        say(line)
    say(f"report: {written}")
