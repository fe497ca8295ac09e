"""A training run of qorpo beside one of TRL's ORPOTrainer: pairs per second, and memory above the loaded model.

    python scripts/bench/train_vs_trl.py --base BASE --pairs pairs.jsonl
    python scripts/bench/train_vs_trl.py --base BASE --pairs dpo_en_demo.json --mix multi-turn

Both sides train on the same first usable pairs, in the file's order and on the same tokens (qorpo's; TRL's own would
hold the template's line break and a second stop token after each answer), from the same base, with LoRA rank 16 on
all linear layers, the same number of pairs to a step, torch's AdamW, no evaluation. Beyond that each keeps its
defaults: TRL recomputes every layer, qorpo as many as the memory at hand makes it (`--qorpo-checkpointing true`: all). TRL runs once for each micro-batch of `--trl-batches` with accumulation to match, and
qorpo is compared with TRL's fastest. Every run has a process of its own; the first step is warm-up and not timed.
Memory is the peak from the loaded model to the end of training, above the loaded model.

Mixes:
    as-is       pairs as they come, cut to `--max-length` (AlpacaEval's, for one)
    multi-turn  long shared prompts and short answers: conversations of more than two messages, each side cut to the
                same fraction of its words, so that prompt, chosen and rejected have `--mean-tokens` on average;
                lengths keep the spread of real conversations. A system turn is left out.

NF4 on the CPU: bitsandbytes' repacked kernel, which has no gradient, is kept off on both sides.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from _record import ExtraMemory, add_output_option, emit

from qorpo.data.records import PreferencePair
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import ChatFormat, Limits, TokenizedPair, tokenize_pairs
from qorpo.model.load import load_model, load_tokenizer
from qorpo.recipe import Recipe, load_recipe

TARGETS = {"as-is": {"speed": 2.0}, "multi-turn": {"speed": 3.0, "memory": 1.0}}
LEARNING_RATE = 1e-4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo", help="a model folder, or demo")
    parser.add_argument("--pairs", default="demo", help="a file of pairs, or demo")
    parser.add_argument("--mix", choices=list(TARGETS), default="as-is")
    parser.add_argument(
        "--mean-tokens", default="126,41,52", help="of prompt, chosen, rejected in multi-turn"
    )
    parser.add_argument("--max-pairs", type=int, default=80)
    parser.add_argument("--max-length", type=int, default=1024)
    parser.add_argument("--pairs-per-step", type=int, default=8)
    parser.add_argument(
        "--nll-tokens", choices=["all", "response"], default="all",
        help="qorpo's: all is the loss that TRL computes, response is qorpo's default",
    )  # fmt: skip
    parser.add_argument("--quantization", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--trl-batches", default="1,2,4,8", help="pairs per device batch, one run each")
    parser.add_argument(
        "--microbatch-tokens", default="auto", help="qorpo's, one run each: auto, or 512,1024"
    )
    parser.add_argument("--qorpo-checkpointing", choices=["auto", "true"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1, help="times that every run is made, in turn")
    parser.add_argument("--sides", default="qorpo,trl")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    add_output_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    sides = options.sides.split(",")
    each_run_has_its_own = ("output", "sides", "rounds", "trl_batches", "microbatch_tokens")
    settings = {key: value for key, value in vars(options).items() if key not in each_run_has_its_own}
    settings["base"], settings["pairs"] = Path(options.base).name, Path(options.pairs).name

    with tempfile.TemporaryDirectory() as scratch:
        prepared = Path(scratch) / "pairs.jsonl"
        settings["mean_tokens"] = prepare(options, prepared)
        runs: list[dict[str, Any]] = []
        if "qorpo" in sides:
            runs += [{"side": "qorpo", "microbatch_tokens": n} for n in options.microbatch_tokens.split(",")]
        if "trl" in sides:
            runs += [{"side": "trl", "batch": int(batch)} for batch in options.trl_batches.split(",")]
        results: list[list[dict[str, Any]]] = [[] for _ in runs]
        for number in range(options.rounds):
            for place, (run, found) in enumerate(zip(runs, results, strict=True)):
                folder = Path(scratch) / f"{number}-{place}"
                found.append(in_own_process(run, options, prepared, folder))
                print(f"round {number + 1}: {run}: {found[-1]}", file=sys.stderr, flush=True)

    medians = [median(found) for found in results]
    for run, figures in zip(runs, medians, strict=True):
        emit("train_vs_trl", {**settings, **run}, figures, options.device, options.output)
    trl = [(run, figures) for run, figures in zip(runs, medians, strict=True) if run["side"] == "trl"]
    for run, figures in zip(runs, medians, strict=True):
        ratios = compare(figures, trl, options.device)
        if run["side"] == "qorpo" and ratios:
            targets = TARGETS[options.mix]
            ratios |= {"targets": targets, "reached": reached(ratios, targets)}
            emit(
                "train_vs_trl", {**settings, **run, "side": "ratios"}, ratios, options.device, options.output
            )


# --- the pairs ---


def prepare(options: argparse.Namespace, prepared: Path) -> dict[str, float]:
    """Write the first usable pairs as prompt (messages), chosen and rejected; returns their mean token counts."""
    pairs = list(load_pairs(options.pairs))
    tokenizer = load_tokenizer(options.base)
    if options.mix == "multi-turn":
        wanted = [float(mean) for mean in options.mean_tokens.split(",")]
        pairs = cut_to_means(pairs, tokenizer, wanted, options.max_pairs)
    tokenized = tokens_of(pairs, ChatFormat(tokenizer), options.max_length)[: options.max_pairs]
    by_source = {pair.source: pair for pair in pairs}
    with prepared.open("w", encoding="utf-8") as file:
        for pair in (by_source[tokens.source] for tokens in tokenized):
            record = {"prompt": list(pair.prompt), "chosen": pair.chosen, "rejected": pair.rejected}
            file.write(json.dumps(record) + "\n")
    sides = ("prompt_ids", "chosen_ids", "rejected_ids")
    return {
        side.removesuffix("_ids"): round(statistics.mean(len(getattr(p, side)) for p in tokenized), 1)
        for side in sides
    }


def tokens_of(pairs: Sequence[PreferencePair], chat: ChatFormat, max_length: int) -> list[TokenizedPair]:
    return list(tokenize_pairs(pairs, chat, Limits(max_length, max_length // 2)).pairs)


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


# --- the runs ---


def in_own_process(
    run: dict[str, Any], options: argparse.Namespace, pairs: Path, folder: Path
) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=train, args=(run, options, pairs, folder, theirs))
    # qorpo bounds oneDNN's cache for its own process; TRL has what its users have.
    before = os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"]
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = "1024" if run["side"] == "trl" else before
    process.start()
    os.environ["ONEDNN_PRIMITIVE_CACHE_CAPACITY"] = before
    theirs.close()
    try:
        return mine.recv()
    except EOFError:
        return {"error": "the process ended; out of memory?"}
    finally:
        process.join()


def train(run: dict[str, Any], options: argparse.Namespace, pairs: Path, folder: Path, pipe: Any) -> None:
    """One run in this process; sends its figures."""
    os.dup2(2, 1)  # what the libraries print is no result
    torch.set_num_threads(options.threads)
    logging.getLogger("qorpo").setLevel(logging.WARNING)
    side = {"qorpo": run_qorpo, "trl": run_trl}[run["side"]]
    try:
        recipe = make_recipe(run, options, pairs, folder)
        tokenizer = load_tokenizer(options.base)
        model = load_model(options.base, quantization=options.quantization, device=options.device)
        step_ends, losses, memory = side(run, options, recipe, model, tokenizer)
        timed_pairs = options.pairs_per_step * (len(step_ends) - 1)
        seconds, cpu_seconds = (last - first for first, last in zip(step_ends[0], step_ends[-1], strict=True))
        pipe.send(
            {
                "pairs_per_second": timed_pairs / seconds,
                "pairs_per_cpu_second": timed_pairs / cpu_seconds,
                **memory.figures(),
                "first_loss": losses[0],
                "last_loss": losses[-1],
                "steps": len(step_ends),
            }
        )
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
        raise


def make_recipe(run: dict[str, Any], options: argparse.Namespace, pairs: Path, folder: Path) -> Recipe:
    return load_recipe(
        {
            "model": {"path": options.base, "quantization": options.quantization},
            "lora": {"rank": 16, "alpha": 32, "targets": "all-linear"},
            "data": {
                "train": str(pairs),
                "max_length": options.max_length,
                "max_prompt_length": options.max_length // 2,
            },
            "objective": {"nll_tokens": options.nll_tokens, "nll_average": "token"},
            "train": {
                "pairs_per_step": options.pairs_per_step,
                "learning_rate": LEARNING_RATE,
                "optimizer": "adamw_torch",
                "max_steps": options.max_pairs // options.pairs_per_step,
                "save_every": options.max_pairs,
                "log_every": options.max_pairs,
                "report_to": [],
            },
            "memory": {
                "microbatch_tokens": run.get("microbatch_tokens", "auto"),
                "activation_checkpointing": {"auto": "auto", "true": True}[options.qorpo_checkpointing],
            },
            "output": str(folder),
        }
    )


def run_qorpo(
    run: dict[str, Any], options: argparse.Namespace, recipe: Recipe, model: Any, tokenizer: Any
) -> tuple[list[tuple[float, float]], list[float], ExtraMemory]:
    import qorpo
    from qorpo.training.progress import Progress

    class Clock(Progress):
        def step(self, done_steps: int) -> None:
            step_ends.append(now(options.device))

    class InOrder(qorpo.Trainer):
        def pairs_of_step(self, step: int) -> list[TokenizedPair]:
            size = self.recipe.train.pairs_per_step
            return self.train_pairs[step * size : (step + 1) * size]

    step_ends: list[tuple[float, float]] = []
    memory = ExtraMemory(options.device)
    trainer = InOrder(model, tokenizer, recipe, load_pairs(recipe.data.train[0]), progress=Clock())
    trainer.train()
    metrics = trainer.folder.metrics.read_text(encoding="utf-8").splitlines()
    return step_ends, [json.loads(line)["loss"] for line in metrics], memory


def run_trl(
    run: dict[str, Any], options: argparse.Namespace, recipe: Recipe, model: Any, tokenizer: Any
) -> tuple[list[tuple[float, float]], list[float], ExtraMemory]:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer

    class Clock(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step_ends.append(now(options.device))

    class SameTokens(ORPOTrainer):
        def tokenize_row(self, feature: dict[str, Any], model: Any = None) -> dict[str, Any]:
            row = {
                "prompt_input_ids": feature["ids"][0],
                "prompt_attention_mask": [1] * len(feature["ids"][0]),
            }
            for name, answer in zip(("chosen", "rejected"), feature["ids"][1:], strict=True):
                ids = feature["ids"][0] + answer
                row[f"{name}_input_ids"], row[f"{name}_attention_mask"] = ids, [1] * len(ids)
                row[f"{name}_labels"] = [-100] * len(feature["ids"][0]) + answer
            return row

    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    pairs = tokens_of(load_pairs(recipe.data.train[0]), ChatFormat(tokenizer), options.max_length)
    rows = [
        {"prompt": "", "chosen": "", "rejected": "", "ids": [p.prompt_ids, p.chosen_ids, p.rejected_ids]}
        for p in pairs
    ]
    step_ends: list[tuple[float, float]] = []
    lora, steps = recipe.lora, recipe.train.max_steps
    config = ORPOConfig(
        output_dir=recipe.output,
        per_device_train_batch_size=run["batch"],
        gradient_accumulation_steps=options.pairs_per_step // run["batch"],
        max_steps=steps,
        max_length=options.max_length,
        learning_rate=LEARNING_RATE,
        optim="adamw_torch",
        lr_scheduler_type="cosine",
        warmup_steps=-(-steps // 10),
        train_sampling_strategy="sequential",
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=options.device == "cpu",
    )
    memory = ExtraMemory(options.device)
    trainer = SameTokens(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha, target_modules="all-linear"
        ),
        callbacks=[Clock()],
    )
    trainer.train()
    return step_ends, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry], memory


def now(device: str) -> tuple[float, float]:
    """Seconds, and the processors' seconds spent on this process, which others' load disturbs less."""
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


# --- the figures ---


def median(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure over the rounds; the speeds themselves beside it."""
    good = [figures for figures in found if "error" not in figures]
    if not good:
        return found[0]
    medians = {name: statistics.median(figures[name] for figures in good) for name in good[0]}
    return medians | {"pairs_per_second_of_each_round": [figures["pairs_per_second"] for figures in good]}


def reached(ratios: dict[str, Any], targets: dict[str, float]) -> dict[str, bool]:
    """Of speed at least so much, of memory at most."""
    return {
        name: ratios[name] >= target if name == "speed" else ratios[name] <= target
        for name, target in targets.items()
    }


def compare(
    mine: dict[str, Any], others: list[tuple[dict[str, Any], dict[str, Any]]], device: str
) -> dict[str, Any]:
    """qorpo against TRL's fastest run; the first loss against the run whose batch is a whole step.

    Which is the fastest, and so whose memory counts, on the CPU its own time says: others' load disturbs it less.
    """
    pace = "pairs_per_second" if device == "cuda" else "pairs_per_cpu_second"
    ran = [(run, figures) for run, figures in others if "error" not in figures]
    if "error" in mine or not ran:
        return {}
    best, fastest = max(ran, key=lambda entry: entry[1][pace])
    _, whole = max(ran, key=lambda entry: entry[0]["batch"])
    speed = max(figures["pairs_per_second"] for _, figures in ran)
    return {
        "speed": round(mine["pairs_per_second"] / speed, 3),
        "speed_by_cpu_time": round(mine["pairs_per_cpu_second"] / fastest["pairs_per_cpu_second"], 3),
        "memory": round(mine["extra_memory_mib"] / fastest["extra_memory_mib"], 3),
        "trl_batch": best["batch"],
        "first_loss_difference": round(mine["first_loss"] - whole["first_loss"], 5),
    }


if __name__ == "__main__":
    main()
