"""The `qorpo` command: each command calls the library, prints what it returns, and names its errors."""

import json
import logging
import os
import shlex
import sys
import time
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from qorpo.cli.common import (
    FULL,
    Debug,
    Overrides,
    RecipePath,
    RemoteCode,
    app,
    print_traceback,
    print_warning,
    printable_record,
    progress_console,
    quiet_bars_where_no_terminal,
    say,
)
from qorpo.console import closing
from qorpo.errors import Interrupted, QorpoError
from qorpo.out_of_memory import advised

if TYPE_CHECKING:
    from qorpo.recipe import Recipe


def _say_version(is_asked: bool) -> None:
    if is_asked:
        from qorpo.version import installed_version

        say(f"qorpo {installed_version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_say_version, is_eager=True, help="Say qorpo's version.")
    ] = False,
) -> None:
    pass


@app.command()
def train(
    recipe: RecipePath,
    overrides: Overrides = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Go on with the run in the recipe's output, from its last checkpoint."),
    ] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Train all parameters, sharded over the GPUs of torchrun's processes."),
    ] = False,
    output: Annotated[str | None, typer.Option(help="The run folder: the same as output=….")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, data and memory too, and train nothing.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Train on preference pairs, and leave a folder that explains the run."""
    from qorpo.training.progress import ConsoleProgress

    console = progress_console()
    # Imported here: torch and transformers take seconds that --help should not.
    from qorpo.recipe import load_recipe
    from qorpo.training.run import train as run
    from qorpo.training.run_folder import RunFolder

    changes = [*(overrides or []), *(FULL if full else []), *([f"output={output}"] if output else [])]
    settings = load_recipe(recipe, changes)
    if dry_run:
        _say_dry_run(settings, resume, [recipe, *changes])
        return
    try:
        # Started again by torchrun after a rank failed.
        was_restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        resume = resume or (was_restarted and Path(settings.output, "recipe.yaml").expanduser().exists())
        result = run(settings, resume=resume, progress=ConsoleProgress(console))
    except Interrupted as stopped:
        if not int(os.environ.get("RANK", "0")):
            say(f"qorpo: {stopped}", err=True)
        raise typer.Exit(128 + stopped.signal) from None
    except KeyboardInterrupt:  # typer would end without a word
        say(f"qorpo: stopped; {RunFolder(settings.output).way_on()}", err=True)
        raise typer.Exit(130) from None
    if not int(os.environ.get("RANK", "0")):
        for line in closing(result):
            say(line)


def _say_dry_run(settings: "Recipe", resume: bool, arguments: list[str]) -> None:
    from qorpo.planning.summary import summary
    from qorpo.training.dry_run import dry_run

    found = dry_run(settings, resume=resume)
    say("\n".join([*found.lines(), summary(found.plan), "nothing was written", "", "next:"]))
    say(f"  qorpo train {shlex.join(arguments)}{' --resume' if resume else ''}")


@app.command()
def export(
    run: Annotated[
        str, typer.Argument(help="The folder of a run of full tuning, or of one of its checkpoints.")
    ],
    output: Annotated[Path, typer.Option(help="The folder to make.")],
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, or float32.")] = "bfloat16",
    trust_remote_code: RemoteCode = False,
    debug: Debug = False,
) -> None:
    """Write the model of a sharded checkpoint as a folder that transformers opens."""
    quiet_bars_where_no_terminal()
    from qorpo.training.export import export_model

    say(f"model: {export_model(run, output, dtype=dtype, trust_remote_code=trust_remote_code)}")


@app.command()
def push(
    path: Annotated[
        str, typer.Argument(metavar="RUN", help="A run's folder, an adapter's, or a merged model's.")
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="owner/name on the hub; made where it is not there.")
    ],
    public: Annotated[bool, typer.Option("--public", help="Let everybody read it.")] = False,
    debug: Debug = False,
) -> None:
    """Upload an adapter or a model with its card to the Hugging Face hub, privately by default."""
    progress_console(logging.WARNING)
    from qorpo.training.push import push as run

    say(f"pushed: {run(path, repo, public=public)} ({'public' if public else 'private'})")


@app.command()
def data(
    recipe: RecipePath,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON object instead of tables.")] = False,
    show: Annotated[int, typer.Option(min=0, help="Pairs to show as the model sees them.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Also write all this as .html, or the histograms as .png.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Say what a recipe's data holds: kept, dropped and why, lengths, and pairs as the model sees them."""
    progress_console(logging.WARNING)
    from qorpo.build import build_objective, chat_format_of, load_data
    from qorpo.data.inspect import as_dict, show_groups
    from qorpo.recipe import load_recipe
    from qorpo.reports.data_report import ENDINGS, draw, save
    from qorpo.reports.page import check_output

    settings = load_recipe(recipe, overrides or [])
    if output is not None:
        check_output(output, ENDINGS)
    chat = chat_format_of(settings)
    found = load_data(settings, chat)
    learn_prompt = build_objective(settings.objective).scores_prompts
    shown = show_groups(found.train.groups, show, chat, learn_prompt=learn_prompt)
    if output is not None:
        save(output, found, shown)
    if as_json:
        say(json.dumps(as_dict(found, shown)))
    else:
        Console().print(draw(found, shown), crop=False)


@app.command()
def merge(
    adapter: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="A run's folder, or an adapter in PEFT's format.")
    ],
    output: Annotated[str | None, typer.Option(help="The folder to make.")] = None,
    adapters: Annotated[
        list[str] | None,
        typer.Option(
            "--adapter",
            metavar="PATH[=WEIGHT]",
            help="One more to merge after it, by a weight (the first takes one too); may be repeated.",
        ),
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base, where it is not where the run says.")] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub's base.")] = None,
    onto: Annotated[
        str, typer.Option(help="The base's original weights, or its NF4 weights dequantized.")
    ] = "original",
    dtype: Annotated[
        str | None, typer.Option(help="float32, bfloat16 or float16; else each tensor keeps the base's.")
    ] = None,
    max_shard_size: Annotated[float, typer.Option(help="The most in one file, in GB.")] = 5.0,
    verify: Annotated[
        str | None,
        typer.Option(metavar="PAIRS", help="Pairs to verify by; else the run's own evaluation pairs."),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Merge only.")] = False,
    verify_only: Annotated[
        bool, typer.Option("--verify-only", help="Verify what such a merge wrote before.")
    ] = False,
    check_only: Annotated[
        bool, typer.Option("--check-only", help="Check everything, write nothing.")
    ] = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weights too (tensors only, no code).")
    ] = False,
    trust_remote_code: RemoteCode = False,
    debug: Debug = False,
) -> None:
    """Merge a run's adapter into its base, tensor by tensor, and verify the result."""
    console = progress_console()
    from qorpo.merging.bytes_written import bytes_written
    from qorpo.merging.merge import merge as run

    try:
        with bytes_written(console) as progress:
            result = run(
                adapter, output, adapters=adapters or [], base=base, revision=revision, onto=onto, dtype=dtype,
                max_shard_bytes=round(max_shard_size * 1e9), verify=verify or not no_verify,
                verify_only=verify_only, check_only=check_only, allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
                progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt as stop:
        say("qorpo: " + "; ".join(["stopped", *map(str, stop.args)]), err=True)
        raise typer.Exit(130) from None
    if result.output is None:
        say(f"nothing written; {result.changed} tensors would change")
        return
    say(f"merged: {result.output}")
    for line in result.verification.lines() if result.verification else []:
        say(line)
    if result.verification and not result.verification.passed:
        raise typer.Exit(1)
    say(f"\nnext:\n  qorpo chat {shlex.quote(str(result.output))}   # ask it something")


@app.command()
def plan(
    recipes: Annotated[
        list[str],
        typer.Argument(metavar="RECIPE... [KEY.SUB=VALUE...]", help="Recipes in YAML, and changes to them."),
    ],
    budgets: Annotated[
        str | None, typer.Option("--budgets", metavar="GIB,GIB,…", help="Cards to plan for: 12,16,24,48.")
    ] = None,
    full: Annotated[bool, typer.Option("--full", help="Plan for training all parameters.")] = False,
    ranks: Annotated[
        int, typer.Option(min=1, help="With --full: the cards to shard over; the plan is each one's.")
    ] = 1,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the plan as JSON, a list where several.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Say whether a recipe's training fits a card, and what to change if not; needs no GPU, weights or data."""
    from qorpo.planning.plan import plan_budgets, read_budgets
    from qorpo.planning.summary import summary, table

    changes = [argument for argument in recipes if "=" in argument]
    overrides = [*changes, *FULL] if full else changes
    plans = [
        found
        for recipe in recipes
        if recipe not in changes
        for found in plan_budgets(recipe, overrides, budgets_gib=read_budgets(budgets), ranks=ranks)
    ]
    if as_json:
        found = [each.to_dict() for each in plans]
        say(json.dumps(found[0] if len(found) == 1 else found, indent=2))
    else:
        say(summary(plans[0]) if len(plans) == 1 else table(plans))


def main() -> None:
    """Run the command line: 2 for what the user can fix, 1 for a fault of qorpo's own, 130 when interrupted."""
    logging.setLogRecordFactory(printable_record)
    sys.excepthook = print_traceback
    warnings.showwarning = print_warning
    try:
        with advised("close what else needs memory, or take a machine with more"):
            app()
    except QorpoError as error:
        if "--debug" in sys.argv:
            raise
        if rank := int(os.environ.get("RANK", "0")):
            # What all ranks find wrong the first one says, and torchrun ends the others meanwhile.
            time.sleep(SECONDS_FOR_THE_FIRST_RANK)
            error = f"rank {rank}: {error}"  # type: ignore[assignment]
        say(f"qorpo: {error}", err=True)
        sys.exit(2)


SECONDS_FOR_THE_FIRST_RANK = 20


import qorpo.cli.answering  # noqa: E402 (last: its commands come after these in the help)
import qorpo.cli.evaluating  # noqa: E402
import qorpo.cli.recipes  # noqa: E402
import qorpo.cli.reporting  # noqa: E402, F401
