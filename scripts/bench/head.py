"""ORPO's head alone: from hidden states to the loss and back, of one pair, with a frozen output head.

    python scripts/bench/head.py --tokens 2048 --hidden 1024 --vocab 32000 --threads 2

Compared, each in a process of its own:

    plain        F.linear, log_softmax, gather; gradients by autograd
    liger        Liger's fused linear ORPO loss as it comes (torch.compile on), where liger-kernel is installed
    liger-eager  the same, not compiled
    qorpo        qorpo.token_logps and orpo_loss
    products     the two matrix products that none of them can do without, into memory that is there already

Half of the tokens are the chosen response's, half the rejected's. The processes take turns, so that a change in the
machine's speed meets all of them; a time is the median over `--repeats` turns, a ratio the median of the turns'
ratios. The processors' time stands beside it, which others' load disturbs less. Memory is the most held above the
inputs in a first full-size call, after a small one that loads libraries. One JSON line a side, then one with qorpo's
ratios and whether loss and gradient norm agree; exits with 1 where they don't.
"""

import argparse
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from _record import ExtraMemory, add_output_option, emit

from qorpo.objectives.orpo import orpo_loss
from qorpo.ops.log_probs import token_logps, token_logps_plain

# The most that qorpo's head may take of what the others take.
TARGETS = {
    "memory_of_plain": 0.10,
    "memory_of_liger": 0.10,
    "time_of_plain": 0.9,
    "time_of_liger": 0.8,
    "time_of_products": 1.3,
}
AGREEMENT = {"float32": 1e-5, "bfloat16": 1e-2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

# hidden (S, H), weight (V, H), targets (S,) -> loss
Side = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=2048, help="scored tokens of the pair, both halves")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--chunk-tokens", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--sides", default="plain,liger,liger-eager,qorpo,products")
    add_output_option(parser)
    settings = vars(parser.parse_args())
    output, names = settings.pop("output"), settings.pop("sides").split(",")
    torch.set_num_threads(settings["threads"])

    def say(name: str, figures: dict[str, Any]) -> None:
        emit("head", {"side": name, **settings}, figures, settings["device"], output)

    results = measure(names, settings, say)
    if "error" in results.get("qorpo", {"error": "not asked for"}):
        return 1 if "qorpo" in results else 0
    figures = compare(results, AGREEMENT[settings["dtype"]])
    emit("head", {"side": "ratios", **settings}, figures, settings["device"], output)
    return 0 if figures["agrees"] else 1


def measure(
    names: list[str], settings: dict[str, Any], on_measured: Callable[[str, dict[str, Any]], None]
) -> dict[str, dict[str, Any]]:
    """Figures of each side, by its name; {"error": …} where it can't run. Each is told as soon as it is whole."""
    context = multiprocessing.get_context("spawn")
    pipes, results, processes = {}, {}, []
    for name in names:  # one after the other: no two first calls at once
        pipes[name], theirs = context.Pipe()
        processes.append(context.Process(target=serve, args=(name, settings, theirs), daemon=True))
        processes[-1].start()
        theirs.close()
        results[name] = _receive(pipes[name])
        if "error" in results[name]:
            on_measured(name, results[name])
    running = [name for name in names if "error" not in results[name]]
    for turn in range(settings["repeats"]):
        for name in running:
            pipes[name].send(True)
            seconds, cpu_seconds = _receive(pipes[name])
            results[name].setdefault("seconds", []).append(seconds)
            results[name].setdefault("cpu_seconds", []).append(cpu_seconds)
            if turn == settings["repeats"] - 1:
                pipes[name].send(False)
                results[name]["seconds_median"] = statistics.median(results[name]["seconds"])
                on_measured(name, results[name])
    for process in processes:
        process.join()
    return results


def _receive(pipe: Any) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        return {"error": "the process ended; out of memory?"}


def serve(name: str, settings: dict[str, Any], pipe: Any) -> None:
    """One side's process: the first call's figures, then a time for every message that asks for one."""
    os.dup2(2, 1)  # what the libraries print is no result
    torch.set_num_threads(settings["threads"])
    try:
        run = make_call(name, settings)
        run(8)
        memory = ExtraMemory(settings["device"])
        loss, grad_SH = run(settings["tokens"])
        figures = memory.figures()
        if name != "products":
            figures |= {"loss": loss.item(), "grad_norm": grad_SH.norm(dtype=torch.float64).item()}
        del loss, grad_SH
        pipe.send(figures)
        while pipe.recv():
            pipe.send(seconds_of(lambda: run(settings["tokens"]), settings["device"] == "cuda"))
    except Exception as error:
        pipe.send({"error": f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"})
        raise


def seconds_of(call: Callable[[], Any], cuda: bool) -> tuple[float, float]:
    """Seconds, and the processors' seconds spent on this process."""
    if cuda:
        call()  # the allocator's cache was given back for the other processes: fill it again
        torch.cuda.synchronize()
    started, cpu_started = time.perf_counter(), time.process_time()
    call()
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started, time.process_time() - cpu_started
    if cuda:
        torch.cuda.empty_cache()
    return seconds


def make_call(name: str, settings: dict[str, Any]) -> Callable[[int], tuple[torch.Tensor, torch.Tensor]]:
    """A function that does forward and backward of the first so many tokens: loss and gradient, or the products."""
    generator = torch.Generator(settings["device"]).manual_seed(0)
    options: dict[str, Any] = {"generator": generator, "device": settings["device"]}
    dtype, vocab, hidden = DTYPES[settings["dtype"]], settings["vocab"], settings["hidden"]
    hidden_SH = torch.randn(settings["tokens"], hidden, dtype=dtype, **options)
    weight_VH = torch.randn(vocab, hidden, dtype=dtype, **options).mul_(hidden**-0.5)
    targets_S = torch.randint(vocab, (settings["tokens"],), **options)

    def products(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        torch.mm(hidden_SH[:tokens], weight_VH.T, out=logits_SV[:tokens])
        torch.mm(logits_SV[:tokens], weight_VH, out=grad_SH[:tokens])
        return logits_SV, grad_SH

    if name == "products":
        logits_SV, grad_SH = hidden_SH.new_zeros(settings["tokens"], vocab), torch.zeros_like(hidden_SH)
        return products
    loss_of = make_side(name, settings["chunk_tokens"])

    def forward_backward(tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
        leaf_SH = hidden_SH[:tokens].detach().requires_grad_()
        loss = loss_of(leaf_SH, weight_VH, targets_S[:tokens])
        return loss, *torch.autograd.grad(loss, leaf_SH)

    return forward_backward


def make_side(name: str, chunk_tokens: int) -> Side:
    def orpo(logps_S: torch.Tensor) -> torch.Tensor:
        chosen, rejected = logps_S.view(2, 1, -1).mean(-1)
        return orpo_loss(chosen, rejected, -chosen).loss

    match name:
        case "plain":
            return lambda *inputs: orpo(token_logps_plain(*inputs))
        case "qorpo":
            return lambda *inputs: orpo(token_logps(*inputs, chunk_tokens=chunk_tokens))
        case "liger" | "liger-eager":
            from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss

            fused = LigerFusedLinearORPOLoss(compiled=name == "liger")
            return lambda hidden_SH, weight_VH, targets_S: fused(
                weight_VH, hidden_SH.view(2, -1, hidden_SH.shape[-1]), targets_S.view(2, -1)
            )[0]
    raise ValueError(f"unknown side {name!r}")


def compare(results: dict[str, dict[str, Any]], tolerance: float) -> dict[str, Any]:
    """qorpo's share of what the others take, against the targets; of Liger's two, the faster and the leaner."""
    mine = results["qorpo"]
    others = {name: result for name, result in results.items() if "error" not in result and name != "qorpo"}
    time_of, cpu_time_of, memory_of = {}, {}, {}
    for name, other in others.items():
        for key, shares in (("seconds", time_of), ("cpu_seconds", cpu_time_of)):
            turns = zip(mine[key], other[key], strict=True)
            shares[name] = round(statistics.median(my_s / other_s for my_s, other_s in turns), 3)
        memory_of[name] = mine["extra_memory_mib"] / max(other["extra_memory_mib"], 1e-9)
    ratios = {}
    for target in TARGETS:
        what, _, whom = target.partition("_of_")
        shares = time_of if what == "time" else memory_of
        found = [share for name, share in shares.items() if name.startswith(whom)]
        if found:
            ratios[target] = round(max(found), 3)
    differences = {
        name: {key: abs(mine[key] / other[key] - 1) for key in ("loss", "grad_norm")}
        for name, other in others.items()
        if "loss" in other
    }
    return {
        "ratios": ratios,
        "cpu_time_of": cpu_time_of,
        "targets": TARGETS,
        "reached": {target: ratio <= TARGETS[target] for target, ratio in ratios.items()},
        "relative_differences": differences,
        "agrees": all(d <= tolerance for found in differences.values() for d in found.values()),
        "tolerance": tolerance,
    }


if __name__ == "__main__":
    sys.exit(main())
