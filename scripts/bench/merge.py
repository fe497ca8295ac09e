"""`qorpo merge`: its speed and memory beside a plain copy, and which base is the better one to merge onto.

    python scripts/bench/merge.py speed --shape 7b --folder /tmp/bench [--onto dequantized]
    python scripts/bench/merge.py onto runs/lambda-1 runs/lambda-0 [--pairs eval.jsonl]

`speed` writes a Llama-shaped base of random weights and a LoRA adapter of rank 16 on all linear layers, then takes
turns: the base's shards copied in blocks of 16 MiB and flushed to disk, and merged, each from files that are not in
memory. Memory is the most anonymous resident memory (RssAnon) of the merging process, looked at every 10 ms. Needs
twice the base on disk, and removes it.

`onto` merges each run onto the original and onto the dequantized weights, and scores the run's evaluation pairs: how
far each merged model is from the adapter on its base as trained (KL, held-out metrics), and how the two differ from
each other, with the middle 95% of means over resampled prompts.
"""

import argparse
import json
import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from _record import add_output_option, emit
from compare_runs import by_prompt, interval, score

import qorpo
from qorpo.merging.shards import Block, Planned, plan_shards, write_shards

MIB = 2**20
SHAPES = {
    "7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "vocab_size": 32000},
    "1b": {"hidden_size": 2048, "intermediate_size": 5504, "num_hidden_layers": 22, "vocab_size": 32000},
    "tiny": {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 300},
}  # fmt: skip
RANK = 16


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parts = parser.add_subparsers(dest="part", required=True)
    speed = parts.add_parser("speed")
    speed.add_argument("--shape", choices=list(SHAPES), default="1b")
    speed.add_argument("--folder", type=Path, help="where to write; a temporary folder else")
    speed.add_argument("--onto", choices=["original", "dequantized"], default="original")
    speed.add_argument("--threads", type=int, default=2)
    speed.add_argument("--repeats", type=int, default=3)
    onto = parts.add_parser("onto")
    onto.add_argument("runs", type=Path, nargs="+")
    onto.add_argument("--pairs", help="pairs to score; the run's evaluation pairs else")
    onto.add_argument("--base", help="the base, where it is not where the run says")
    for part in (speed, onto):
        add_output_option(part)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=getattr(args, "folder", None)) as folder:
        if args.part == "speed":
            measure_speed(args, Path(folder))
        else:
            for run in args.runs:
                measure_onto(run, args, Path(folder))


# --- speed and memory ---


def measure_speed(args: argparse.Namespace, folder: Path) -> None:
    torch.set_num_threads(args.threads)
    base, adapter = folder / "base", folder / "adapter"
    num_bytes = make_base(base, SHAPES[args.shape])
    make_adapter(adapter, base, SHAPES[args.shape])
    context = multiprocessing.get_context("spawn")
    turns: list[dict[str, float]] = []
    for _ in range(args.repeats):
        forget(base)
        copy_s = copy(base, folder / "copy")
        shutil.rmtree(folder / "copy")
        forget(base)
        here, there = context.Pipe()
        process = context.Process(
            target=merge_once, args=(there, base, adapter, folder / "out", args.onto, args.threads)
        )
        process.start()
        turn = here.recv()
        process.join()
        shutil.rmtree(folder / "out")
        turns.append({"copy_seconds": copy_s, **turn})
    figures = {name: round(statistics.median(turn[name] for turn in turns), 3) for name in turns[0]}
    figures["peak_rss_anon_mib"] = max(turn["peak_rss_anon_mib"] for turn in turns)
    figures["speed_of_copy"] = round(
        statistics.median(turn["copy_seconds"] / turn["merge_seconds"] for turn in turns), 3
    )
    settings = {"part": "speed", "shape": args.shape, "gigabytes": round(num_bytes / 1e9, 3), "rank": RANK,
                "onto": args.onto, "repeats": args.repeats, "turns": turns}  # fmt: skip
    emit("merge", settings, figures, "cpu", args.output)


def make_base(folder: Path, shape: dict[str, int]) -> int:
    """A Llama's folder of random bfloat16 weights, a block in memory at a time; returns their bytes."""
    from qorpo.merging.skeleton import Skeleton

    config = llama_config(shape)
    config.save_pretrained(folder)

    def random(size: tuple[int, ...]) -> Iterator[Block]:
        num_rows, *rest = size
        step = max(1, (1 << 22) // max(1, *rest, 1))
        for start in range(0, num_rows, step):
            rows = (min(step, num_rows - start), *rest)
            yield Block(start, torch.randn(rows, dtype=torch.bfloat16) * 0.02)

    shapes = Skeleton.of(config).shapes
    tensors = [
        Planned(name, torch.bfloat16, size, lambda size=size: random(size)) for name, size in shapes.items()
    ]
    write_shards(folder, plan_shards(tensors, 5 * 10**9), lambda _: None)
    return sum(tensor.nbytes for tensor in tensors)


def llama_config(shape: dict[str, int]) -> Any:
    from transformers import LlamaConfig

    heads = max(1, shape["hidden_size"] // 128)
    return LlamaConfig(
        **shape, num_attention_heads=heads, num_key_value_heads=heads, architectures=["LlamaForCausalLM"],
        dtype="bfloat16",
    )  # fmt: skip


def make_adapter(folder: Path, base: Path, shape: dict[str, int]) -> None:
    from peft import LoraConfig, PeftModel, get_peft_model_state_dict
    from safetensors.torch import save_file

    from qorpo.merging.skeleton import Skeleton

    config = LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, target_modules="all-linear",
        base_model_name_or_path=str(base),
    )  # fmt: skip
    model = PeftModel(Skeleton.of(llama_config(shape)).model, config, low_cpu_mem_usage=True)
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    config.save_pretrained(folder)
    save_file(
        {name: torch.randn(tensor.shape) * 0.01 for name, tensor in state.items()},
        folder / "adapter_model.safetensors",
    )


def copy(base: Path, target: Path) -> float:
    """Seconds to copy the shards in blocks of 16 MiB and flush them."""
    target.mkdir()
    started = time.perf_counter()
    block = bytearray(16 * MIB)
    for path in sorted(base.glob("*.safetensors")):
        with path.open("rb", buffering=0) as source, (target / path.name).open("wb", buffering=0) as sink:
            while count := source.readinto(block):
                sink.write(memoryview(block)[:count])
            os.fsync(sink.fileno())
    return time.perf_counter() - started


def forget(folder: Path) -> None:
    """Have the next reading come from the disk."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def merge_once(pipe: Any, base: Path, adapter: Path, output: Path, onto: str, threads: int) -> None:
    from qorpo.merging.merge import merge  # outside the time, as the copy's imports are; inside the memory

    torch.set_num_threads(threads)
    peak, done = 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    started = time.perf_counter()
    merge(adapter, output, base=base, onto=onto, verify=False)
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    pipe.send({"merge_seconds": seconds, "peak_rss_anon_mib": round(peak / MIB, 1)})


def rss_anon() -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("RssAnon:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no RssAnon")


# --- which base ---


def measure_onto(run: Path, args: argparse.Namespace, folder: Path) -> None:
    from qorpo.build import build_objective
    from qorpo.merging.source import find_base, find_trained
    from qorpo.merging.verify import evaluation_pairs, verify_merged
    from qorpo.model.load import load_model
    from qorpo.model.selfcheck import make_scorer

    trained = find_trained(str(run))
    base = find_base([trained], args.base, None)
    objective = build_objective(trained.recipe.objective)
    figures: dict[str, Any] = {}
    scores = {}
    for onto in ("original", "dequantized"):
        output = folder / f"{run.name}-{onto}"
        qorpo.merge(run, output, base=args.base, onto=onto, verify=False)
        pairs = evaluation_pairs(args.pairs, trained.recipe, str(output))
        verification = verify_merged(
            output, base, [trained.adapter], pairs, references=["nf4"], objective=objective, device=torch.device("cpu")
        )  # fmt: skip
        (comparison,) = verification.comparisons
        figures[onto] = {"against_adapter_on_nf4": comparison.figures, "held_out": comparison.after}
        figures["adapter_on_nf4"] = comparison.before
        scorer = make_scorer(load_model(str(output), quantization="none"))
        scores[onto] = score(scorer, pairs, objective)
        shutil.rmtree(output)
    prompts = by_prompt(pairs)
    figures["original-dequantized"] = {
        name: interval(scores["original"][name] - scores["dequantized"][name], prompts)
        for name in objective.metrics
    }
    settings = {"part": "onto", "run": run.name, "pairs": len(pairs), "prompts": len(prompts),
                "objective": trained.recipe.to_dict()["objective"]}  # fmt: skip
    emit("merge", settings, json.loads(json.dumps(figures)), "cpu", args.output)


if __name__ == "__main__":
    main()
