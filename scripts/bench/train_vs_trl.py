"""A training run of qorpo beside one of TRL's ORPOTrainer: pairs per second, and memory above the loaded model.

    python scripts/bench/train_vs_trl.py --base BASE --pairs pairs.jsonl
    python scripts/bench/train_vs_trl.py --base BASE --pairs dpo_en_demo.json --mix multi-turn

Both sides train on the first usable pairs, in the file's order and on qorpo's tokens; `_peers.py` says what else is the
same. qorpo runs as `auto` has it and with every layer recomputed; TRL once for each micro-batch of `--trl-batches`, with
and without recomputing, and each run of qorpo is compared with TRL's fastest. `train_vs_peers.py` does the same on models
by their shape.

Mixes:
    as-is       pairs as they come, cut to `--max-length` (AlpacaEval's, for one)
    multi-turn  long shared prompts and short answers: conversations of more than two messages, each side cut to the
                same fraction of its words, so that prompt, chosen and rejected have `--mean-tokens` on average;
                lengths keep the spread of real conversations. A system turn is left out.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _peers import add_run_options, compare_runs_of, job_of, runs_of, settings_of
from _record import add_output_option, check_device, count

from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group
from qorpo.data.records import PreferencePair
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.model.load import load_tokenizer

TARGETS = {"as-is": {"speed": 2.0}, "multi-turn": {"speed": 3.0, "memory": 1.0}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo", help="a model folder, or demo")
    parser.add_argument("--pairs", default="demo", help="a file of pairs, or demo")
    parser.add_argument("--mix", choices=list(TARGETS), default="as-is")
    parser.add_argument(
        "--mean-tokens", default="126,41,52", help="of prompt, chosen, rejected in multi-turn"
    )
    parser.add_argument("--max-pairs", type=count, default=80)
    parser.add_argument("--max-length", type=count, default=1024)
    parser.add_argument("--threads", type=count, default=2)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_run_options(parser)
    parser.set_defaults(activation_checkpointing=["auto", True], trl_liger=[False])
    add_output_option(parser)
    options = parser.parse_args()
    check_device(parser, options.device)
    runs = runs_of(parser, options)
    torch.set_num_threads(options.threads)
    pairs = prepare(options)
    settings = settings_of(
        options, base=Path(options.base).name, pairs=Path(options.pairs).name, mean_tokens=mean_tokens(pairs)
    )
    compare_runs_of(
        "train_vs_trl", settings, runs, job_of(parser, options, pairs, base=options.base), TARGETS[options.mix],
        rounds=options.rounds, output=options.output,
    )  # fmt: skip


# --- the pairs ---


def prepare(options: argparse.Namespace) -> list[Group]:
    """The first usable pairs."""
    pairs = list(load_pairs(options.pairs))
    tokenizer = load_tokenizer(options.base)
    if options.mix == "multi-turn":
        wanted = [float(mean) for mean in options.mean_tokens.split(",")]
        pairs = cut_to_means(pairs, tokenizer, wanted, options.max_pairs)
    limits = Limits(options.max_length, options.max_length // 2)
    return list(tokenize_pairs(pairs, ChatFormat(tokenizer), limits).groups)[: options.max_pairs]


def mean_tokens(pairs: Sequence[Group]) -> dict[str, float]:
    lengths = [pair.lengths for pair in pairs]
    sides = zip(("prompt", "chosen", "rejected"), zip(*lengths, strict=True), strict=True)
    return {side: round(statistics.mean(tokens), 1) for side, tokens in sides}


def cut_to_means(
    pairs: list[PreferencePair], tokenizer: Any, wanted: list[float], num_pairs: int
) -> list[PreferencePair]:
    """Conversations of several turns, each text cut to its first words: a fraction for prompts, one for each answer."""
    talks = [
        PreferencePair(
            tuple(turn for turn in p.prompt if turn["role"] != "system"), p.chosen, p.rejected, p.source
        )
        for p in pairs
        if len([turn for turn in p.prompt if turn["role"] != "system"]) > 1
    ]
    chat = ChatFormat(tokenizer)

    def cut(fractions: Sequence[float]) -> list[PreferencePair]:
        prompt, chosen, rejected = fractions
        return [
            PreferencePair(
                tuple({**turn, "content": first_words(turn["content"], prompt)} for turn in talk.prompt),
                first_words(talk.chosen, chosen), first_words(talk.rejected, rejected), talk.source,
            )
            for talk in talks
        ]  # fmt: skip

    low, high = [0.0] * 3, [1.0] * 3
    for _ in range(10):
        middle = [(a + b) / 2 for a, b in zip(low, high, strict=True)]
        found = list(chat.encode([chat.texts(pair) for pair in cut(middle)]))[:num_pairs]
        means = [statistics.mean(len(ids[side]) for ids in found) for side in range(3)]
        low = [m if mean < want else a for a, m, mean, want in zip(low, middle, means, wanted, strict=True)]
        high = [
            m if mean >= want else b for b, m, mean, want in zip(high, middle, means, wanted, strict=True)
        ]
    return cut(middle)


def first_words(text: str, fraction: float) -> str:
    words = text.split(" ")
    return " ".join(words[: max(1, round(fraction * len(words)))])


if __name__ == "__main__":
    main()
