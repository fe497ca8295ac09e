"""Commands that have a model answer: a file of prompts, or a person."""

import io
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, cast

import typer
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from qorpo.cli.common import Debug, RemoteCode, app, progress_console, say
from qorpo.errors import DataError
from qorpo.printable import printable

Model = Annotated[
    str,
    typer.Argument(
        help="A run's folder, an adapter, a merged folder, or any model: folder, hub id, or demo."
    ),
]
Quantization = Annotated[
    str, typer.Option(help="nf4, none, or auto: a run's base as it was trained, any other model none.")
]
Dtype = Annotated[
    str, typer.Option(help="bfloat16, float32, or auto: float32 on the CPU, bfloat16 on a GPU.")
]
Base = Annotated[str | None, typer.Option(help="An adapter's base, where it is not where the adapter says.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub's model.")]
AllowPickle = Annotated[
    bool, typer.Option("--allow-pickle", help="Read .bin weights too (tensors only, no code).")
]
TopP = Annotated[float, typer.Option(help="Draw from the likeliest tokens of this probability together.")]
Seed = Annotated[int, typer.Option(help="Of all draws; an answer's own depends on no other's.")]


@app.command()
def generate(
    model: Model,
    prompts: Annotated[Path, typer.Option(help="A file of records with a prompt or messages each.")],
    output: Annotated[Path, typer.Option(help="The file to write; after a kill the same command goes on.")],
    format: Annotated[
        str, typer.Option(help="jsonl, or a benchmark's files: alpaca_eval, mt_bench, ifeval.")
    ] = "jsonl",
    samples: Annotated[int, typer.Option(help="Answers a prompt.")] = 1,
    temperature: Annotated[
        float | None, typer.Option(help="0: the likeliest token; else as the format has it (jsonl: 0).")
    ] = None,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="The most tokens of an answer; else as the format has it (jsonl: 1024)."),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="transformers, or vllm where it is installed.")
    ] = "transformers",
    batch_size: Annotated[int, typer.Option(min=1, help="The most answers at once.")] = 64,
    quantization: Quantization = "auto",
    dtype: Dtype = "auto",
    base: Base = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    debug: Debug = False,
) -> None:
    """Answer a file of prompts, each as a benchmark or a person asks it."""
    console = progress_console()
    from qorpo.generation.answers_file import part_of
    from qorpo.generation.generate import generate as run
    from qorpo.generation.progress import answers_made

    try:
        with answers_made(console) as progress:
            made = run(
                model, prompts, output, format=format, samples=samples, temperature=temperature, top_p=top_p,
                seed=seed, max_new_tokens=max_new_tokens, engine=engine, batch_size=batch_size,
                quantization=quantization, dtype=dtype, base=base, revision=revision, allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code, progress=progress,
            )  # fmt: skip
    except KeyboardInterrupt:
        kept = part_of(output)
        way_on = f"; the same command goes on from {kept}" if kept.exists() else ""
        say(f"qorpo: stopped{way_on}", err=True)
        raise typer.Exit(130) from None
    cut = sum(not answer.is_finished for answer in made.answers)
    say(
        f"answers: {made.output}"
        + (f" ({cut} of {len(made.answers)} cut at the longest length)" if cut else "")
    )
    if made.seconds:
        say(f"{made.tokens:,} tokens in {made.seconds:.0f} s, {made.tokens / made.seconds:,.0f} a second")
    for command in ["", "next:", *(f"  {each}" for each in made.next_commands)] if made.next_commands else []:
        say(command)


@app.command()
def chat(
    model: Model,
    beside: Annotated[
        str | None,
        typer.Option(
            metavar="base|MODEL", help="Have another answer too: the base without the adapter, or any model."
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system turn to open with.")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0: the likeliest token, the same answer each time.")
    ] = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="The most tokens of an answer.")] = 1024,
    quantization: Quantization = "auto",
    dtype: Dtype = "auto",
    base: Base = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    debug: Debug = False,
) -> None:
    """Talk to a model; /reset begins anew, /quit ends. Questions may also come through a pipe, a line each."""
    console = Console()
    progress_console(logging.WARNING)
    from qorpo.generation.chat import open_speakers
    from qorpo.generation.generate import Settings

    Settings(temperature=temperature, top_p=top_p)  # says what is wrong with them
    speakers = open_speakers(
        model, beside,
        {
            "quantization": quantization, "dtype": dtype, "base": base, "revision": revision,
            "allow_pickle": allow_pickle, "trust_remote_code": trust_remote_code,
        },
        system=system, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed,
    )  # fmt: skip
    for question in _questions():
        if question == "/quit":
            break
        if question == "/reset":
            for speaker in speakers:
                speaker.reset()
            continue
        try:
            _answer(console, speakers, question)
        except DataError as error:
            say(f"qorpo: {error}", err=True)
        except KeyboardInterrupt:
            say("\n(stopped; the question is taken back)")


def _questions() -> Iterator[str]:
    """Lines that say something, from a person who is asked for them, or from a pipe."""
    cast(io.TextIOWrapper, sys.stdin).reconfigure(errors="replace")
    while True:
        try:
            line = input("\nyou: ") if sys.stdin.isatty() else next(sys.stdin)
        except (EOFError, StopIteration, KeyboardInterrupt):
            return
        if line.strip():
            yield line.strip()


def _answer(console: Console, speakers: Sequence[Any], question: str) -> None:
    """Streams the answers: one below its name, two in columns on a terminal."""
    if len(speakers) > 1 and console.is_terminal:
        texts = {speaker.name: "" for speaker in speakers}
        with Live(_columns(texts), console=console, vertical_overflow="visible") as live:
            for speaker in speakers:

                def add(piece: str, name: str = speaker.name) -> None:
                    texts[name] += printable(piece)
                    live.update(_columns(texts))

                speaker.answer(question, add)
        return
    for speaker in speakers:
        typer.echo(f"{printable(speaker.name)}: ", nl=False)
        speaker.answer(question, lambda piece: typer.echo(printable(piece), nl=False))
        typer.echo()


def _columns(texts: Mapping[str, str]) -> Table:
    table = Table(*map(printable, texts), expand=True)
    table.add_row(*map(Text, texts.values()))
    return table
