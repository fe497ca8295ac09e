"""What every command shares: the app, options, printing and logging."""

import contextlib
import logging
import os
import sys
import traceback
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.logging import RichHandler

from qorpo.printable import printable

app = typer.Typer(
    help="Align a language model with ORPO on one GPU: LoRA adapters on a 4-bit base, trained on preference pairs.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

RecipePath = Annotated[str, typer.Argument(help="A recipe in YAML, such as configs/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY.SUB=VALUE", help="Changes to the recipe.")
]
FULL = ["tuning=full"]
RemoteCode = Annotated[
    bool,
    typer.Option("--trust-remote-code", help="Run Python code that comes with the model, as the run did."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def say(text: object, *, err: bool = False) -> None:
    """Print what may quote a file, row or name, none of which may reach the terminal's controls."""
    typer.echo(printable(str(text)), err=err)


def printable_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """Log lines of all libraries too quote what a model's folder or a row says."""
    record = logging.LogRecord(*args, **kwargs)
    with contextlib.suppress(
        TypeError, ValueError, KeyError
    ):  # arguments that don't fit the library's own text
        record.msg, record.args = printable(record.getMessage()), None
    return record


def print_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int,
    file: Any = None, line: str | None = None,
) -> None:  # fmt: skip
    """Warnings of all libraries, too."""
    say(warnings.formatwarning(message, category, filename, lineno, line).rstrip("\n"), err=True)


def print_traceback(*error: Any) -> None:
    say("".join(traceback.format_exception(*error)), err=True)


def log_to(console: Console, level: int = logging.INFO) -> None:
    """qorpo's log lines to the console: above the bar on a terminal, unwrapped elsewhere."""
    handler: logging.Handler = logging.StreamHandler(console.file)
    if console.is_terminal:
        handler = RichHandler(console=console, show_time=False, show_path=False, show_level=False)
    if int(os.environ.get("RANK", "0")):
        level = logging.ERROR  # of several ranks the first one tells
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler])
    logging.getLogger("qorpo").setLevel(level)


def progress_console(level: int = logging.INFO) -> Console:
    """stderr's console, with qorpo's log lines on it, and no library's bars where it is no terminal."""
    console = Console(stderr=True)
    log_to(console, level)
    quiet_bars_where_no_terminal()
    return console


def quiet_bars_where_no_terminal() -> None:
    """The libraries' bars redraw their line, which is noise in a file."""
    if sys.stderr.isatty():
        return
    import datasets
    import transformers

    datasets.disable_progress_bars()
    transformers.utils.logging.disable_progress_bar()
