"""qorpo beside TRL's ORPOTrainer, at its best, and Unsloth, on a model of a published shape: speed and memory.

    python scripts/bench/train_vs_peers.py --shape llama-3-8b --mix ultrafeedback --cap-gib 24
    python scripts/bench/train_vs_peers.py --shape tiny --mix hh-rlhf --device cpu

All train on the same random tokens, from the same random weights; `_peers.py` says what else is the same and what the
sides are, `_lengths.py` how long the pairs of a mix are. TRL runs with every batch, with and without checkpointing and
Liger's trunk kernels (which need a GPU), and qorpo is compared with its fastest run: `padding` is r, TRL's padded tokens
over qorpo's, `speed` the ratio of pairs per second, `speed_over_padding` what is left of it beyond r. A run that runs
out of memory is a result: its line says so. A side that can't be imported has a line that says that.

`--cap-gib` is the card's size for every side: CUDA's own share is left out of what PyTorch may take.
"""

import multiprocessing

if multiprocessing.current_process().name == "unsloth":
    import unsloth  # noqa: F401 (it changes the libraries that are imported after it)

import argparse

import torch
from _lengths import MIXES, draw_lengths, random_pairs
from _models import SHAPES, config_of
from _peers import add_run_options, compare_runs_of, job_of, runs_of, settings_of
from _record import add_device_options, add_output_option, check_device, count, gib

# r, TRL's padded tokens over qorpo's, is won by counting; these are speeds beyond it, and the speeds aimed at.
BEYOND_PADDING = 1.2
AIMS = {"ultrafeedback": 2.5, "hh-rlhf": 3.5, "long-prompt": 2.5}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--mix", choices=list(MIXES), default="ultrafeedback")
    parser.add_argument("--steps", type=count, default=5, help="the first is not timed")
    parser.add_argument("--cap-gib", type=gib, help="the card's size; all that is free else")
    add_device_options(parser)
    add_run_options(parser)
    parser.set_defaults(sides=["qorpo", "trl", "unsloth"], pairs_per_step=None, microbatch_tokens=None)
    add_output_option(parser)
    options = parser.parse_args()
    check_device(parser, options.device)
    mix = MIXES[options.mix]
    options.pairs_per_step = options.pairs_per_step or mix.pairs_per_step
    options.microbatch_tokens = options.microbatch_tokens or [mix.microbatch_tokens]
    if options.device == "cpu":
        options.trl_liger = [False]  # its kernels need a GPU
    torch.set_num_threads(options.threads)
    lengths = draw_lengths(mix, options.steps * options.pairs_per_step)
    pairs = random_pairs(lengths, config_of(options.shape).vocab_size).groups
    targets = {"speed_over_padding": BEYOND_PADDING}
    if options.mix in AIMS:
        targets["speed"] = AIMS[options.mix]
    compare_runs_of(
        "train_vs_peers", settings_of(options), runs_of(parser, options),
        job_of(parser, options, pairs, shape=options.shape, cap_gib=options.cap_gib), targets,
        rounds=options.rounds, output=options.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
