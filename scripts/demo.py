"""Train the embedded demo and show what it changed: held-out figures before and after, and answers side by side.

Usage: python scripts/demo.py [key.sub=value …]; every run gets a folder of its own under runs/.
"""

import json
import logging
import sys
import time
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers.utils.logging import disable_progress_bar

import qorpo
from qorpo.errors import QorpoError
from qorpo.training.progress import ConsoleProgress

RECIPE = Path(__file__).parent.parent / "configs" / "demo.yaml"
FIGURES = {
    "rewards/accuracies": "reward accuracy (chosen likelier than rejected)",
    "chosen_logps": "mean log-prob of chosen, a token",
    "rejected_logps": "mean log-prob of rejected, a token",
    "log_odds_ratio": "log odds ratio",
}


def main(overrides: list[str]) -> None:
    console = Console()
    torch.set_num_threads(1)  # a model this small is done before a second thread has started
    disable_progress_bar()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("qorpo").setLevel(logging.INFO)
    output = f"runs/demo-{time.strftime('%Y%m%d-%H%M%S')}"
    started = time.monotonic()
    result = qorpo.train(RECIPE, [f"output={output}", *overrides], progress=ConsoleProgress(console))
    seconds = time.monotonic() - started

    rows = [json.loads(line) for line in (result.output / "metrics.jsonl").read_text().splitlines()]
    before = next(row for row in rows if "eval_loss" in row)
    after = next(row for row in rows if "eval_loss" in row and row["step"] == result.best_step)
    num_pairs = len(result.trainer.eval_pairs)
    figures = Table(title=f"{num_pairs} held-out pairs, prompts unseen in training", title_justify="left")
    figures.add_column("")
    figures.add_column("before", justify="right")
    figures.add_column("after", justify="right")
    for name, label in FIGURES.items():
        figures.add_row(label, f"{before['eval_' + name]:.3f}", f"{after['eval_' + name]:.3f}")
    console.print(figures)

    answers = Table(title="greedy answers", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after"):
        answers.add_column(column, overflow="fold")
    prompts, trainer = held_out_prompts(6), result.trainer
    with trainer.model.disable_adapter():
        base = answers_of(trainer, prompts)
    for row in zip(prompts, base, answers_of(trainer, prompts), strict=True):
        answers.add_row(*row)
    console.print(answers)
    console.print(f"{result.steps} steps in {seconds:.0f} s; adapter: {result.trained}", soft_wrap=True)


def held_out_prompts(count: int) -> list[str]:
    """Prompts spread over the held-out pairs."""
    prompts = [pair.prompt[-1]["content"] for pair in qorpo.load_pairs("demo:eval")]
    return prompts[:: max(1, len(prompts) // count)][:count]


def answers_of(trainer: qorpo.Trainer, prompts: list[str]) -> list[str]:
    """The likeliest answer to each."""
    made = qorpo.generate((trainer.model, trainer.tokenizer), prompts, max_new_tokens=60)
    return [answer.text.strip() for answer in made.answers]


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except QorpoError as error:
        print(f"qorpo: {error}", file=sys.stderr)
        sys.exit(2)
