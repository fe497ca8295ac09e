"""Commands that say how good a model is: by evaluations, or by a judge's verdicts."""

from pathlib import Path
from typing import Annotated

import typer

from qorpo.cli.answering import AllowPickle, Base, Dtype, Model, Quantization, Revision, Seed
from qorpo.cli.common import Debug, RemoteCode, app, progress_console, say


@app.command()
def evaluate(
    model: Model,
    on: Annotated[
        list[str],
        typer.Option(
            metavar="WHAT",
            help="pairs:FILE, ifeval, ifeval:FILE, lm-eval:TASK,… or diversity:PROMPTS; may be repeated.",
        ),
    ],
    output: Annotated[Path | None, typer.Option(help="Also write the results to this .json.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Of pairs: the model to compare with, or none; else the base.")
    ] = None,
    limit: Annotated[int | None, typer.Option(help="The first so many pairs, prompts or documents.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of diversity: answers a prompt.")] = 5,
    temperature: Annotated[float, typer.Option(help="Of diversity: how its answers are drawn.")] = 1.0,
    seed: Seed = 0,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(help="The most tokens of an answer; else 1280 for ifeval, 512 for diversity."),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="The most answers or requests at once.")] = 64,
    nltk_data: Annotated[Path | None, typer.Option(help="Of ifeval: NLTK's data folder.")] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Of diversity: a sentence-transformers model; else all-mpnet-base-v2.")
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(help="Of lm-eval: a folder with tasks of yours.")
    ] = None,
    quantization: Quantization = "auto",
    dtype: Dtype = "auto",
    base: Base = None,
    revision: Revision = None,
    allow_pickle: AllowPickle = False,
    trust_remote_code: RemoteCode = False,
    debug: Debug = False,
) -> None:
    """Evaluate a model: held-out pairs, instructions followed, benchmarks' tasks, how alike its answers are."""
    console = progress_console()
    from qorpo.evaluation.diversity import ENCODER
    from qorpo.evaluation.evaluate import evaluate as run
    from qorpo.generation.progress import answers_made

    try:
        with answers_made(console) as progress:
            done = run(
                model, on, output=output, against=against, limit=limit, samples=samples, temperature=temperature,
                seed=seed, max_new_tokens=max_new_tokens, batch_size=batch_size, nltk_data=nltk_data,
                encoder=encoder or ENCODER, task_folder=task_folder, progress=progress, quantization=quantization,
                dtype=dtype, base=base, revision=revision, allow_pickle=allow_pickle,
                trust_remote_code=trust_remote_code,
            )  # fmt: skip
    except KeyboardInterrupt:
        say(
            "qorpo: stopped; answers so far are kept where results go, and the same command goes on", err=True
        )
        raise typer.Exit(130) from None
    for result in done.results:
        for line in result.lines():
            say(line)
    for path in done.written:
        say(f"results: {path}")


@app.command()
def judge(
    annotations: Annotated[
        list[Path],
        typer.Option(metavar="FILE", help="A judge's verdicts, as AlpacaEval writes them; may be repeated."),
    ],
    output: Annotated[Path | None, typer.Option(help="Also write the win rates to this .json.")] = None,
    debug: Debug = False,
) -> None:
    """Say how often a judge preferred a model to its reference, with standard error and 95% interval."""
    from qorpo.evaluation.judge import as_table, judge_annotations
    from qorpo.evaluation.results import check_output, write_results

    if output is not None:
        check_output(output)
    found = [judge_annotations(path) for path in annotations]
    if output is not None:
        write_results(output, [each.as_dict() for each in found])
    for line in as_table(found):
        say(line)
