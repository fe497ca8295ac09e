"""The commands that make pages to look at."""

import logging
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from qorpo.cli.common import Debug, RecipePath, app, log_to, progress_console, say
from qorpo.errors import Interrupted


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


@app.command()
def sweep(
    recipe: RecipePath,
    values: Annotated[
        list[str],
        typer.Argument(metavar="KEY.SUB=VALUE,VALUE...", help="Values to try; one value changes all runs."),
    ],
    stop_early: Annotated[
        bool,
        typer.Option("--stop-early", help="End a run that is worse than the median of those before it."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Train once for each of several values, in turn, and compare the runs. Started again, it goes on where it was."""
    console = progress_console()
    from qorpo.training.progress import ConsoleProgress
    from qorpo.training.sweep import sweep as run

    try:
        result = run(recipe, values, stop_early=stop_early, progress=ConsoleProgress(console))
    except Interrupted as stopped:
        say(f"qorpo: {stopped}; the same command goes on with the sweep", err=True)
        raise typer.Exit(128 + stopped.signal) from None
    except KeyboardInterrupt:
        say("qorpo: stopped; the same command goes on with the sweep", err=True)
        raise typer.Exit(130) from None
    for line in result.verdicts:
        say(line)
    for name, reason in result.stopped.items():
        say(f"{name} was ended early: {reason}")
    if result.report:
        say(f"report: {result.report}")
