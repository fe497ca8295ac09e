"""qorpo's training runs beside its peers': which are made, and how they compare. `_sides.py` makes them."""

import argparse
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from _record import count, emit
from _sides import NEEDS, Figures, Job, Settings, in_own_process, missing

from qorpo.data.groups import Group, GroupLengths

SWITCH = {"on": True, "off": False}

# --- which runs ---


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """For `runs_of` and `job_of`; lists have a run for each value, and for each of theirs together."""
    parser.add_argument("--sides", type=listed({name: name for name in NEEDS}), default="qorpo,trl")
    parser.add_argument("--pairs-per-step", type=count, default=8)
    parser.add_argument(
        "--nll-tokens", choices=["all", "response"], default="all",
        help="qorpo's: all is the loss that TRL computes, response is qorpo's default",
    )  # fmt: skip
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--microbatch-tokens", type=listed({"auto": "auto"}, count), default="auto")
    parser.add_argument(
        "--activation-checkpointing", type=listed({"auto": "auto", "true": True, "false": False}, count),
        default="auto", metavar="LAYERS", help="qorpo's: auto, true, false, or of how many layers",
    )  # fmt: skip
    parser.add_argument("--trl-batches", type=listed({}, count), default="1,2,4,8", help="pairs to a forward")
    parser.add_argument("--trl-checkpointing", type=listed(SWITCH), default="on,off")
    parser.add_argument("--trl-liger", type=listed(SWITCH), default="on,off", help="Liger's trunk kernels")
    parser.add_argument("--rounds", type=count, default=1, help="times that every run is made, in turn")


def listed(named: Mapping[str, Any], other: Callable[[str], Any] | None = None) -> Callable[[str], list[Any]]:
    """An option's type: values with commas between them, by name or, where `other` is given, as it reads them."""

    def values(text: str) -> list[Any]:
        try:
            return [other(each) if other and each not in named else named[each] for each in text.split(",")]
        except (KeyError, ValueError):
            expected = [*named, *(["whole numbers of at least 1"] if other else [])]
            raise argparse.ArgumentTypeError(f"{text!r}; expected {', '.join(expected)}") from None

    return values


def runs_of(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Settings]:
    """The runs asked for; ends the program where a batch is no part of a step."""
    for batch in options.trl_batches:
        if options.pairs_per_step % batch:
            parser.error(
                f"argument --trl-batches: {batch} is no part of --pairs-per-step {options.pairs_per_step}"
            )
    choices = {
        "qorpo": {
            "microbatch_tokens": options.microbatch_tokens,
            "activation_checkpointing": options.activation_checkpointing,
        },
        "trl": {
            "batch": options.trl_batches,
            "checkpointing": options.trl_checkpointing,
            "liger": options.trl_liger,
        },
        "unsloth": {"batch": options.trl_batches, "checkpointing": options.trl_checkpointing},
    }
    runs = []
    for side in options.sides:
        its = {} if missing(side) else choices[side]  # one line is enough to say so
        runs += [{"side": side, **dict(zip(its, values, strict=True))} for values in product(*its.values())]
    return runs


def job_of(
    parser: argparse.ArgumentParser, options: argparse.Namespace, pairs: Sequence[Group], **rest: Any
) -> Job:
    """The whole steps of `pairs`; ends the program where there is but one."""
    size = options.pairs_per_step
    if len(pairs) < 2 * size:
        parser.error(f"argument --pairs-per-step: {len(pairs)} pairs make no two steps of {size}")
    return Job(
        pairs[: len(pairs) // size * size], size, nll_tokens=options.nll_tokens, quantization=options.quantization,
        device=options.device, threads=options.threads, **rest,
    )  # fmt: skip


def settings_of(options: argparse.Namespace, **changes: Any) -> Settings:
    """What all runs have in common, for their JSON lines."""
    each_run_has_its_own = {
        "output", "sides", "rounds", "microbatch_tokens", "activation_checkpointing", "trl_batches",
        "trl_checkpointing", "trl_liger",
    }  # fmt: skip
    return {key: value for key, value in vars(options).items() if key not in each_run_has_its_own} | changes


def compare_runs_of(
    bench: str,
    settings: Settings,
    runs: Sequence[Settings],
    job: Job,
    targets: dict[str, float],
    *,
    rounds: int = 1,
    output: Path | None = None,
) -> None:
    """Make every run, in turn, `rounds` times; a JSON line each, with medians, then one for qorpo against each peer."""
    results: list[list[Figures]] = [[] for _ in runs]
    medians: list[Figures] = []
    for number in range(1, rounds + 1):
        for run, found in zip(runs, results, strict=True):
            found.append(in_own_process(run, job))
            print(f"round {number}: {run}: {found[-1]}", file=sys.stderr, flush=True)
            if number == rounds:
                medians.append(median(found))
                emit(bench, {**settings, **run}, medians[-1], job.device, output)
    made = list(zip(runs, medians, strict=True))
    for run, figures in made:
        for peer in ("trl", "unsloth"):
            others = [(run, figures) for run, figures in made if run["side"] == peer]
            if run["side"] == "qorpo" and (ratios := compare(figures, others, job)):
                ratios |= {"targets": targets, "reached": reached(ratios, targets)}
                emit(bench, {**settings, **run, "side": "ratios"}, ratios, job.device, output)


# --- the figures ---


def median(found: list[Figures]) -> Figures:
    """Of every figure over the rounds; the speeds themselves beside it."""
    good = [figures for figures in found if "error" not in figures]
    if not good:
        return found[0]
    medians = {name: statistics.median(figures[name] for figures in good) for name in good[0]}
    return medians | {"pairs_per_second_of_each_round": [figures["pairs_per_second"] for figures in good]}


def padded_tokens(lengths: Sequence[GroupLengths], batch: int) -> int:
    """Tokens that TRL computes: each prompt twice, both answers padded to the longest sequence of their batch."""
    batches = [lengths[start : start + batch] for start in range(0, len(lengths), batch)]
    return sum(2 * len(each) * max(prompt + max(answers) for prompt, *answers in each) for each in batches)


def compare(mine: Figures, others: Sequence[tuple[Settings, Figures]], job: Job) -> Figures:
    """qorpo against a peer's fastest run; the first loss against the run whose batch is nearest to a whole step.

    `padding` is r, the tokens that the fastest run computes over qorpo's: what a speed owes to fewer tokens alone.
    Which is the fastest, and so whose memory counts, on the CPU its own time says: others' load disturbs it less.
    """
    pace = "pairs_per_second" if job.device == "cuda" else "pairs_per_cpu_second"
    ran = [(run, figures) for run, figures in others if "error" not in figures]
    if "error" in mine or not ran:
        return {}
    best, fastest = max(ran, key=lambda entry: entry[1][pace])
    _, whole = max(ran, key=lambda entry: entry[0]["batch"])
    speed = mine["pairs_per_second"] / max(figures["pairs_per_second"] for _, figures in ran)
    padding = padded_tokens(job.timed_lengths, best["batch"]) / sum(map(sum, job.timed_lengths))
    ratios = {
        "peer": best,
        "speed": round(speed, 3),
        "speed_by_cpu_time": round(mine["pairs_per_cpu_second"] / fastest["pairs_per_cpu_second"], 3),
        "padding": round(padding, 3),
        "speed_over_padding": round(speed / padding, 3),
        "memory": round(mine["extra_memory_mib"] / fastest["extra_memory_mib"], 3),
        "first_loss_difference": round(mine["first_loss"] - whole["first_loss"], 5),
    }
    if job.device == "cuda":
        ratios["peak"] = round(mine["peak_gib"] / fastest["peak_gib"], 3)
    return ratios


def reached(ratios: Figures, targets: dict[str, float]) -> dict[str, bool]:
    """Of memory at most so much, of the rest at least."""
    return {
        name: ratios[name] <= target if name == "memory" else ratios[name] >= target
        for name, target in targets.items()
    }
