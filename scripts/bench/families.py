"""Which families are exact: tiny random models through 16 and 4 bits, each held to its own forward and to PEFT.

    python scripts/bench/families.py --output scripts/bench/results/families.jsonl
    python scripts/bench/families.py llama mixtral
    python scripts/bench/families.py --table      # write .github/docs/models.md's from the results

A JSON line a family and quantization. `logps`: the largest difference of log-probs from the model's own forward on each
sequence alone, in nats; `gradients`: that of any adapter's gradient, relative; `merged`: of the logits of qorpo's
merge from those of PEFT's, relative to the largest; `planned`: base weights by the plan over those that are loaded. In float32; the
4-bit layers compute in it too, since the figures are to show what is wrong, and not what is rounded.
"""

import argparse
import contextlib
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from _families import NAMES, tiny_model
from _record import ROOT, add_output_option, emit
from transformers.utils.logging import disable_progress_bar

import qorpo
from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.errors import QorpoError
from qorpo.model.adapters import attach_lora
from qorpo.model.load import load_config, load_model
from qorpo.model.quantizer import four_bit_parameters
from qorpo.model.selfcheck import make_scorer
from qorpo.planning.fake_model import make_fake_model
from qorpo.recipe import load_recipe, resolve

PAGE = ROOT / ".github" / "docs" / "models.md"
RESULTS = ROOT / "scripts" / "bench" / "results" / "families.jsonl"
BEGIN, END = "<!-- made by scripts/bench/families.py -->", "<!-- end of the table -->"
IDS = torch.arange(3, 43)[None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="families; none: all")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--table", action="store_true", help="measure nothing; write the table of the results"
    )
    add_output_option(parser)
    options = parser.parse_args()
    if options.table:
        lines = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
        PAGE.write_text(with_table(PAGE.read_text(encoding="utf-8"), table(lines)), encoding="utf-8")
        return
    torch.set_num_threads(options.threads)
    warnings.simplefilter("ignore")
    disable_progress_bar()
    logging.disable(logging.WARNING)
    failed = 0
    for name in options.names or NAMES:
        for quantization in ("none", "nf4"):
            figures = measured(name, quantization)
            failed += figures.get("verdict") in ("wrong", "fault")
            emit("families", {"family": name, "quantization": quantization}, figures, "cpu", options.output)
    sys.exit(bool(failed))


def measured(name: str, quantization: str) -> dict[str, Any]:
    """What a family's tiny model comes to: exact and shared, exact and separate, refused, wrong, or a fault."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = _measured(name, quantization, Path(folder))
    except QorpoError as error:
        return {"verdict": "refused", "why": str(error).split("\n")[0].split("/base: ")[-1][:200]}
    except Exception as error:
        return {"verdict": "fault", "why": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    is_exact = (
        figures["logps"] < 2e-5
        and figures["gradients"] < 1e-4
        and figures.get("merged", 0) < 1e-5
        and not figures["without_gradient"]
        and figures["planned"] > 0.98
    )
    shared = "separate" if figures["attention"] == "separate" else "shared"
    above = f", planned {figures['planned'] - 1:.0%} too high" if figures["planned"] > 1.02 else ""
    return {"verdict": f"exact, {shared}{above}" if is_exact else "wrong", **figures}


def _measured(name: str, quantization: str, folder: Path) -> dict[str, Any]:
    base, adapter = folder / "base", folder / "adapter"
    tiny_model(name).to(torch.bfloat16).save_pretrained(base)
    loaded = load_model(str(base), quantization=quantization)
    loaded_bytes = sum(parameter.nbytes for parameter in loaded.parameters())
    model = in_float32(loaded).eval()
    packed_names = four_bit_parameters(model)
    peft_model = attach_lora(model, rank=4).eval()
    torch.manual_seed(1)
    trained = {name: weight for name, weight in peft_model.named_parameters() if weight.requires_grad}
    with torch.no_grad():
        for key, weight in trained.items():
            weight.normal_(std=0.1 if "lora_B" in key else 0.2)
    scorer = make_scorer(peft_model)
    row = groups()
    gradients: list[dict[str, Any]] = []
    scores = []
    for by_own_logits in (False, True):
        scorer.zero_grad()
        with scorer.packed_attention() if not by_own_logits else contextlib.nullcontext():
            logps = scorer(row, by_own_logits=by_own_logits)
            logps.sum().backward()
        scores.append(logps.detach())
        gradients.append({key: weight.grad for key, weight in trained.items()})
    mine, own = gradients
    missing = [key for key in trained if mine[key] is None]
    figures: dict[str, Any] = {
        "attention": scorer.mode,
        "logps": (scores[0] - scores[1]).abs().max().item(),
        "gradients": max(
            ((mine[key] - own[key]).norm() / own[key].norm().clamp(min=1e-3)).item() for key in trained if key not in missing
        ),
        "adapters": len(trained),
        "without_gradient": missing[:1],
        "in_4_bits": len(packed_names),
        "planned": planned_bytes(base, quantization) / loaded_bytes,
    }  # fmt: skip
    if quantization == "none":
        peft_model.save_pretrained(adapter)
        qorpo.merge(str(adapter), folder / "merged", base=str(base), dtype="float32", verify=False)
        # Made in float32 from the start: a model that was loaded in 16 bits has rounded buffers (Gemma's embedding scale).
        plain = type(model).from_pretrained(base, dtype=torch.float32).eval()
        pefts = attach_lora(plain, rank=4).eval()
        pefts.load_state_dict(trained, strict=False)
        with torch.no_grad():
            expected = pefts.merge_and_unload()(IDS, use_cache=False).logits
            merged = (
                type(model)
                .from_pretrained(folder / "merged", dtype=torch.float32)
                .eval()(IDS, use_cache=False)
                .logits
            )
        figures["merged"] = ((merged - expected).abs().max() / expected.abs().max()).item()
    return figures


def groups() -> Any:
    """Two pairs, longer than the families' windows."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, 97, (count,), generator=generator).tolist())

    return pack_groups([Group.of(map(tokens, lengths), "bench") for lengths in ((11, 7, 19), (5, 9, 4))])


def in_float32(model: Any) -> Any:
    """A loaded model whose 16-bit weights are float32, and whose 4-bit ones unpack to it."""
    for module in model.modules():
        weight = getattr(module, "weight", None)
        for state in (getattr(weight, "quant_state", None), vars(module).get("quant_state")):
            if state is not None:
                state.dtype = torch.float32
        if hasattr(module, "compute_dtype"):
            module.compute_dtype = torch.float32
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.float()
    return model


def planned_bytes(base: Path, quantization: str) -> int:
    """Weights of the base, as a plan counts them."""
    keys = {"path": str(base), "quantization": quantization}
    recipe = load_recipe({"model": keys, "data": {"train": "demo"}, "output": "unused"})
    recipe = resolve(recipe, device_type="cuda", installed=lambda module: True, can_page=True)
    model, _ = make_fake_model(load_config(str(base)), recipe)
    return sum(weight.nbytes for name, weight in model.named_parameters() if "lora_" not in name)


def table(lines: Iterable[dict[str, Any]]) -> str:
    """A row a verdict; of lines of the same family and quantization the last counts."""
    found: dict[str, dict[str, str]] = {}
    for line in lines:
        settings, figures = line["settings"], line["figures"]
        why = f"{figures['verdict']}: {figures['why']}" if "why" in figures else figures["verdict"]
        found.setdefault(settings["family"], {})[settings["quantization"]] = why
    rows: dict[str, list[str]] = {}
    for family, verdicts in sorted(found.items()):
        said = list(dict.fromkeys(verdicts.values()))
        rows.setdefault(
            said[0] if len(said) == 1 else "; ".join(f"{key}: {why}" for key, why in verdicts.items()), []
        ).append(family)
    head = ["in 16 bits and in 4 | families", "--- | ---"]
    return "\n".join(
        f"| {row} |"
        for row in [*head, *(f"{why} | {', '.join(names)}" for why, names in sorted(rows.items()))]
    )


def with_table(text: str, rows: str) -> str:
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{rows}\n{END}{rest.split(END)[1]}"


if __name__ == "__main__":
    main()
