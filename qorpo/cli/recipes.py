"""Commands about recipes themselves: one to begin with, and every key."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
import yaml

from qorpo.cli.common import Debug, app, say
from qorpo.errors import RunError


@app.command()
def init(
    recipe: Annotated[Path, typer.Argument(help="The file to write.")] = Path("recipe.yaml"),
    model: Annotated[str | None, typer.Option(help="The base: a local folder, a hub id, or demo.")] = None,
    train: Annotated[str | None, typer.Option(help="Your pairs: a file, a folder, or a hub id.")] = None,
    eval: Annotated[str | None, typer.Option(help="Held-out pairs, or a fraction of your pairs.")] = None,
    output: Annotated[str | None, typer.Option(help="The run folder.")] = None,
    full: Annotated[bool, typer.Option("--full", help="Train all parameters.")] = False,
    debug: Debug = False,
) -> None:
    """Write a commented recipe; on a terminal it asks for what is not given."""
    from qorpo.recipe import load_recipe
    from qorpo.recipe.describe import commented_recipe
    from qorpo.storage import write_text

    if recipe.exists():
        raise RunError(f"{recipe}: is there already; give another name, or remove it")

    def asked(value: str | None, question: str, default: str) -> str:
        if value is not None:
            return value
        return typer.prompt(question, default=default) if sys.stdin.isatty() else default

    model = asked(model, "base model (a folder, a hub id, or demo)", "demo")
    train = asked(
        train, "training pairs (a file, a folder, or a hub id)", "demo" if model == "demo" else "pairs.jsonl"
    )
    eval = asked(eval, "held-out pairs (a file, or a fraction)", "demo:eval" if train == "demo" else "0.02")
    output = asked(output, "run folder", f"runs/{recipe.stem}")
    text = commented_recipe(model, train, eval, output, full=full)
    load_recipe(yaml.safe_load(text))  # says what is wrong with what was given
    write_text(recipe, text)
    say(
        f"recipe: {recipe}\n\nnext:\n  qorpo data {recipe}   # look at the pairs\n  qorpo train {recipe} --dry-run"
    )


@app.command()
def keys(
    section: Annotated[
        str | None, typer.Argument(help="model, lora, data, objective, train or memory; else all.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print a JSON schema for editors instead.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Say every key of a recipe: its default, what it takes, what it means."""
    from qorpo.recipe.describe import describe_keys, json_schema

    if schema:
        say(json.dumps(json_schema(), indent=2))
        return
    for line in describe_keys(section):
        say(line)
