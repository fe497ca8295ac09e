"""One training step of qorpo on a model of a published shape: speed, the share of the device's matmul rate, memory.

    python scripts/bench/step.py --shape llama-3-8b --mix packed-8192 --cap-gib 24
    python scripts/bench/step.py --shape tiny --mix ultrafeedback --device cpu

The model has random weights, made on the device and held in NF4, with LoRA rank 16 on all linear layers, and trains as
`qorpo train` does, by the recipe's defaults, on random tokens; a mix says how long the pairs are (`_lengths.py`). Every
step has the same pairs, so times differ by noise alone and the loss falls where gradients are right. A step's time is
the median of `--repeats` after WARM_UP others, from one end of a step to the next, the optimizer's work included.

What is counted as the model's work, in FLOPs: for every weight of the decoder layers' linear maps and every token of a
row (each prompt once), 2 in the forward pass, 2 for the gradient of its input, and 2 more in the layers that are
recomputed. Nothing else is: not the output head, attention's scores, LoRA, norms or unpacking NF4. Its share is of the
fastest of several large matrix products in the compute type, on the same device after the steps.

Memory, in GiB: on CUDA the most that PyTorch reserved in training, base included, and beside it what qorpo's plan says;
on the CPU the peak resident set above the loaded model. `--cap-gib` is a card's size (`memory.budget_gib`): CUDA's own
share is left out of what PyTorch may take, and the paged optimizer states lie beside it.

Exits with 1 where memory does not suffice or the loss does not fall, 2 for a wrong option.
"""

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, get_args

import torch
from _lengths import MIXES, draw_lengths, random_pairs
from _models import SHAPES, config_of, plain_tokenizer, random_model
from _record import GIB, ExtraMemory, add_device_options, add_output_option, check_device, count, emit, gib
from _training import now, train
from torch import nn

from qorpo.data.groups import GroupLengths, row_tokens
from qorpo.data.token_table import longest_group
from qorpo.errors import RunError
from qorpo.model.parts import decoder_layers
from qorpo.out_of_memory import is_out_of_memory
from qorpo.planning.auto import cap_card, planned_bytes
from qorpo.recipe.values import Attention
from qorpo.training.loop import Trainer

WARM_UP = 2
LEARNING_RATE = 1e-3
MATMUL_SIZES = {"cuda": 8192, "cpu": 2048}
MATMUL_TURNS = 10

TARGETS: dict[tuple[str, str], dict[str, float]] = {
    ("llama-3-8b", "pair-2x2048"): {"peak_gib": 10.0},
    ("llama-3-8b", "packed-8192"): {"flops_share": 0.45},
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, required=True)
    parser.add_argument("--mix", choices=list(MIXES), default="ultrafeedback")
    parser.add_argument("--pairs-per-step", type=count, help="the mix's own else")
    parser.add_argument("--cap-gib", type=gib, help="the card's size; all that is free else")
    parser.add_argument("--repeats", type=count, default=5, help="steps that are timed")
    parser.add_argument("--attention", choices=get_args(Attention), default="auto")
    add_device_options(parser)
    add_output_option(parser)
    options = parser.parse_args()
    check_device(parser, options.device)
    settings = {key: value for key, value in vars(options).items() if key != "output"}
    settings["pairs_per_step"] = options.pairs_per_step or MIXES[options.mix].pairs_per_step
    torch.set_num_threads(options.threads)

    try:
        figures, memory = measure(settings)
    except (RunError, RuntimeError) as error:
        if not (isinstance(error, RunError) or is_out_of_memory(error)):
            raise
        emit("step", settings, {"error": str(error).splitlines()[0]}, options.device, options.output)
        return 1
    emit("step", settings | {"memory": memory}, figures, options.device, options.output)
    return 0 if figures["losses"][-1] < figures["losses"][0] else 1


def measure(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The figures, and what `auto` became in the recipe's memory section."""
    device, cuda = torch.device(settings["device"]), settings["device"] == "cuda"
    mix, config = MIXES[settings["mix"]], config_of(settings["shape"])
    pairs = random_pairs(draw_lengths(mix, settings["pairs_per_step"]), config.vocab_size)
    if settings["cap_gib"] is not None:
        cap_card(settings["cap_gib"], device)
    model = random_model(config, device)
    weights = layer_weights(model)
    memory = ExtraMemory(settings["device"])
    run = train(
        model, plain_tokenizer(), pairs, steps=WARM_UP + settings["repeats"],
        pairs_per_step=settings["pairs_per_step"],
        recipe={
            "model": {"attention": settings["attention"]},
            "train": {"learning_rate": LEARNING_RATE},
            "memory": {
                "budget_gib": settings["cap_gib"] or "auto", "microbatch_tokens": mix.microbatch_tokens,
            },
        },
    )  # fmt: skip
    figures = memory.figures()
    if cuda:
        figures |= planned_and_paged(run.trainer, model, longest_group(pairs.groups))

    ends_s = [seconds for seconds, _ in run.step_ends]
    steps_s = [end - start for start, end in pairwise(ends_s[WARM_UP - 1 :])]
    tokens, step_s = sum(map(row_tokens, pairs.groups)), statistics.median(steps_s)
    recomputed = run.trainer.recipe.memory.activation_checkpointing
    checkpointed_layers = len(weights) if recomputed is True else int(recomputed)
    flops = step_flops(weights, tokens, checkpointed_layers)
    matmul_flops_s = matmul_rate(settings["device"], model.dtype)
    figures |= {
        "row_tokens": tokens,
        "step_seconds": steps_s,
        "step_seconds_median": step_s,
        "tokens_per_second": tokens / step_s,
        "pairs_per_second": settings["pairs_per_step"] / step_s,
        "checkpointed_layers": checkpointed_layers,
        "teraflops_per_step": flops / 1e12,
        "matmul_teraflops_per_second": matmul_flops_s / 1e12,
        "flops_share": flops / step_s / matmul_flops_s,
        "attention": run.trainer.recipe.model.attention,
        "losses": run.losses,
    }
    if cuda and (targets := TARGETS.get((settings["shape"], settings["mix"]))):
        figures |= {"targets": targets, "reached": reached(figures, targets)}
    return figures, run.trainer.recipe.memory.model_dump()


def layer_weights(model: nn.Module) -> list[int]:
    """Weights of each decoder layer's linear maps, in a model without adapters."""
    return [
        sum(map_.in_features * map_.out_features for map_ in layer.modules() if isinstance(map_, nn.Linear))
        for layer in decoder_layers(model)
    ]


def step_flops(layer_weights: Sequence[int], tokens: int, checkpointed_layers: int) -> int:
    """As the top of this file counts them; the first `checkpointed_layers` are computed again in backward."""
    return tokens * (4 * sum(layer_weights) + 2 * sum(layer_weights[:checkpointed_layers]))


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOPs a second in the fastest of several products of large square matrices."""
    size = MATMUL_SIZES[device]
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = a @ b
    times_s = []
    for _ in range(MATMUL_TURNS):
        started_s, _ = now(device)
        torch.mm(a, b, out=product)
        times_s.append(now(device)[0] - started_s)
    return 2 * size**3 / min(times_s)


def planned_and_paged(trainer: Trainer, model: nn.Module, longest: GroupLengths) -> dict[str, float]:
    states = (
        tensor for state in trainer.session.optimizer.optimizer.state.values() for tensor in state.values()
    )
    paged_bytes = sum(tensor.nbytes for tensor in states if getattr(tensor, "is_paged", False))
    return {
        "planned_gib": planned_bytes(trainer.recipe, model, longest) / GIB,
        "paged_states_gib": paged_bytes / GIB,
    }


def reached(figures: Mapping[str, float], targets: Mapping[str, float]) -> dict[str, bool]:
    """Of memory at most so much, of the matmul rate at least."""
    return {
        name: figures[name] <= target if name == "peak_gib" else figures[name] >= target
        for name, target in targets.items()
    }


if __name__ == "__main__":
    sys.exit(main())
