"""Tokens per second of `qorpo generate`'s batches beside one prompt after the other by transformers' own `generate`.

    python scripts/bench/generate.py --base ../shared/base --prompts ../shared/data/alpaca_eval/instructions.jsonl

Both sides answer the same prompts by the same loaded model, greedily, with the same longest answer, and end at the same
tokens; their turns alternate. A JSON line with every turn's rate, their medians' ratio, and how many answers are equal.
"""

import argparse
import statistics
import time
from pathlib import Path

import torch
from _record import add_output_option, count, emit

import qorpo
from qorpo.data.chat_format import ChatFormat
from qorpo.generation.formats import format_of
from qorpo.generation.generate import prompt_ids
from qorpo.generation.prompts import read_prompts

TARGET = 4.0  # times the tokens per second


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo", help="a model's folder, a hub id, or demo")
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--count", type=count, default=64, help="prompts")
    parser.add_argument("--max-new-tokens", type=count, default=128)
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--threads", type=count, default=2)
    add_output_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    model, tokenizer = qorpo.load(options.base, dtype=options.dtype)
    prompts = read_prompts(options.prompts, format_of("jsonl"))[: options.count]
    conversations = [list(prompt.messages) for prompt in prompts]
    ids = prompt_ids(ChatFormat(tokenizer), conversations)
    rates: dict[str, list[float]] = {"batches": [], "one by one": []}
    for _ in range(options.repeats):
        batches = qorpo.generate((model, tokenizer), conversations, max_new_tokens=options.max_new_tokens)
        rates["batches"].append(batches.tokens / batches.seconds)
        started, tokens, texts = time.perf_counter(), 0, []
        for prompt in ids:
            made = model.generate(
                torch.tensor([prompt], device=model.device), do_sample=False,
                attention_mask=torch.ones(1, len(prompt), dtype=torch.long, device=model.device),
                max_new_tokens=options.max_new_tokens,
            )[0, len(prompt) :]  # fmt: skip
            tokens += len(made)
            texts.append(tokenizer.decode(made, skip_special_tokens=True).strip())
        rates["one by one"].append(tokens / (time.perf_counter() - started))
    medians = {name: statistics.median(each) for name, each in rates.items()}
    ratio = medians["batches"] / medians["one by one"]
    settings = {
        "base": Path(options.base).name, "prompts": len(prompts), "dtype": options.dtype,
        "prompt_tokens": sum(map(len, ids)), "max_new_tokens": options.max_new_tokens, "repeats": options.repeats,
    }  # fmt: skip
    figures = {
        "tokens_per_second": {name: [round(rate, 1) for rate in each] for name, each in rates.items()},
        "ratio": round(ratio, 2), "target": TARGET, "reached": ratio >= TARGET,
        "equal_answers": sum(own.text == other for own, other in zip(batches.answers, texts, strict=True)),
    }  # fmt: skip
    emit("generate", settings, figures, model.device.type, options.output)


if __name__ == "__main__":
    main()
