"""Where sharing a prompt begins to pay: forward and backward of a row with each prompt once, and with it twice.

    python scripts/bench/sharing.py --base BASE --prompts 1,4,16,64 --responses 50,100,200,400
    python scripts/bench/sharing.py --device cuda

Shared, a pair is P + C + R tokens, and rejected's keys and values are gathered behind the prompt's; twice, it is
2P + C + R tokens in the order in which they are attended, and nothing is gathered. The two take turns, and a time is
the least of `--repeats` turns (what others' load adds is left out), of the processors on the CPU. One JSON line a pair
of lengths: both times, and `saved`, the share of the time that sharing saves; where it is below 0, sharing loses. On
CUDA the model is four layers of Llama-3-8B's shape in NF4, of random weights. LoRA 16 on all linear layers, no layer
recomputed.
"""

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from _models import config_of, random_model
from _record import add_output_option, emit

from qorpo.data.groups import Group, GroupLengths
from qorpo.data.pack import PackedGroups, pack_groups
from qorpo.model import attention
from qorpo.model.adapters import attach_lora
from qorpo.model.load import load_model
from qorpo.model.scoring import Scorer
from qorpo.planning.fake_model import shortened


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--base", default="demo", help="a model folder, or demo; on the CPU")
    parser.add_argument("--prompts", default="1,4,16,64", help="tokens, one measurement each")
    parser.add_argument("--responses", default="50,100,200,400", help="tokens of either response")
    parser.add_argument(
        "--row-tokens", type=int, default=2048, help="about so many tokens of responses to a row"
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument(
        "--mode", choices=["sdpa", "varlen", "flash"], default=None, help="None: sdpa, or varlen on CUDA"
    )
    add_output_option(parser)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    mode = options.mode or ("varlen" if options.device == "cuda" else "sdpa")
    scorer = Scorer(attach_lora(make_model(options)), mode).train()
    for response in map(int, options.responses.split(",")):
        for prompt in map(int, options.prompts.split(",")):
            lengths = (prompt, response, response)
            pairs = max(1, options.row_tokens // (2 * response))
            figures = measure(scorer, lengths, pairs, torch.device(options.device), options.repeats)
            settings = {
                "prompt": prompt,
                "response": response,
                "pairs": pairs,
                "mode": mode,
                "base": Path(options.base).name if options.device == "cpu" else "random",
            }
            emit("sharing", settings, figures, options.device, options.output)


def make_model(options: argparse.Namespace) -> Any:
    if options.device == "cpu":
        return load_model(options.base)
    return random_model(shortened(config_of("llama-3-8b"), 4), torch.device("cuda"))


def measure(
    scorer: Scorer, lengths: GroupLengths, pairs: int, device: torch.device, repeats: int
) -> dict[str, Any]:
    rows = {"shared": row(lengths, pairs).to(device), "twice": row(lengths, pairs, twice=True).to(device)}
    seconds: dict[str, list[float]] = {name: [] for name in rows}
    for turn in range(repeats + 1):
        for name, packed in rows.items():
            with attended_in_order() if name == "twice" else attention_as_it_is(), scorer.packed_attention():
                taken = seconds_of(lambda packed=packed: scorer(packed).sum().backward(), device)
            if turn:  # the first is warm-up
                seconds[name].append(taken)
            scorer.zero_grad()
    shared, twice = (min(seconds[name]) for name in rows)
    return {"shared_s": shared, "twice_s": twice, "saved": round(1 - shared / twice, 4)}


def row(lengths: GroupLengths, pairs: int, twice: bool = False) -> PackedGroups:
    """Pairs as they train; `twice`: the same scored tokens, and a prompt of its own before either response."""
    prompt, *responses = lengths
    groups = [(prompt, response) for response in responses] if twice else [lengths]
    return pack_groups([Group.of(((5,) * tokens for tokens in each), "bench") for each in groups * pairs])


@contextmanager
def attended_in_order() -> Iterator[None]:
    """Nothing is gathered: each sequence's keys are where its queries are."""

    def as_they_are(layout, *tensors):
        return tuple(tensor[0].transpose(0, 1) for tensor in tensors)

    before, attention._gathered = attention._gathered, as_they_are
    try:
        yield
    finally:
        attention._gathered = before


@contextmanager
def attention_as_it_is() -> Iterator[None]:
    yield


def seconds_of(call: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cpu":
        started = time.process_time()
        call()
        return time.process_time() - started
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
