"""From a file of preference pairs to tokens: seconds and memory the first time, and the second.

    python scripts/bench/data.py --tokenizer demo

The pairs are generated: 61,000 of them, as many as UltraFeedback binarized has, of about its lengths (`_lengths.py`), in
words drawn from qorpo's demo. Each time runs in a process of its own, with the tokenizer loaded before the clock starts;
memory is the most that the process and its children hold together, libraries included, looked at twice a second. A JSON
line each.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from _lengths import MIXES, LogNormal
from _record import MIB, add_output_option, emit

from qorpo.data.locate import DEMO_FOLDER

TARGETS = {"first": {"seconds": 90, "peak_memory_mib": 1536}, "second": {"seconds": 2}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=61_000)
    parser.add_argument("--tokenizer", default="demo", help="a model's folder, a hub id, or demo")
    add_output_option(parser)
    options = parser.parse_args()
    settings = {"pairs": options.pairs, "tokenizer": Path(options.tokenizer).name}
    with tempfile.TemporaryDirectory() as scratch:
        pairs = Path(scratch) / "pairs.jsonl"
        generate(pairs, options.pairs, options.tokenizer)
        settings["file_mib"] = round(pairs.stat().st_size / MIB)
        os.environ["HF_DATASETS_CACHE"] = scratch
        for turn, targets in TARGETS.items():
            figures = in_own_process(pairs, options.tokenizer)
            figures["targets"] = targets
            figures["reached"] = {name: figures[name] <= most for name, most in targets.items()}
            emit("data", {**settings, "turn": turn}, figures, "cpu", options.output)


def generate(path: Path, count: int, tokenizer_name: str) -> None:
    from qorpo.model.load import load_tokenizer

    lines = (DEMO_FOLDER / "train.jsonl").read_text(encoding="utf-8").splitlines()
    words = " ".join(text for line in lines for text in json.loads(line).values()).split()
    words_per_token = len(words) / len(load_tokenizer(tokenizer_name)(" ".join(words))["input_ids"])
    draw = random.Random(0)

    def text(length: LogNormal) -> str:
        return " ".join(draw.choices(words, k=max(1, round(length.draw(draw) * words_per_token))))

    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            prompt, chosen, rejected = map(text, MIXES["ultrafeedback"][:3])
            file.write(json.dumps({"prompt": prompt, "chosen": chosen, "rejected": rejected}) + "\n")


def in_own_process(pairs: Path, tokenizer: str) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=prepare, args=(pairs, tokenizer, theirs))
    process.start()
    theirs.close()
    figures = mine.recv()
    process.join()
    return figures


def prepare(pairs: Path, tokenizer: str, pipe: Any) -> None:
    import datasets  # noqa: F401 (imports are not what is measured)

    from qorpo.build import chat_format_of, load_data
    from qorpo.recipe import load_recipe

    recipe = load_recipe({"model": {"path": tokenizer}, "data": {"train": str(pairs)}, "output": "unused"})
    chat_format = chat_format_of(recipe)
    peak = Peak()
    started = time.perf_counter()
    data = load_data(recipe, chat_format)
    seconds = time.perf_counter() - started
    pipe.send(
        {
            "seconds": round(seconds, 2),
            "peak_memory_mib": peak.stop(),
            "kept": data.train.report.kept,
            "dropped": data.train.report.dropped,
            "tokens": data.train.report.tokens,
        }
    )


class Peak:
    """The most memory that this process and its children hold, shared pages counted once for each."""

    def __init__(self) -> None:
        self.bytes, self.is_over = 0, threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()

    def watch(self) -> None:
        self.look()
        while not self.is_over.wait(0.5):
            self.look()

    def look(self) -> None:
        me, held = psutil.Process(), 0
        for process in [me, *me.children(recursive=True)]:
            with contextlib.suppress(psutil.Error):  # just ended
                held += process.memory_full_info().pss
        self.bytes = max(self.bytes, held)

    def stop(self) -> int:
        self.is_over.set()
        self.thread.join()
        self.look()
        return round(self.bytes / MIB)


if __name__ == "__main__":
    main()
