"""TRL's losses on fixed pairs, as numbers: `python scripts/bench/trl_values.py tests/objectives/trl_values.json`.

TRL's own trainers compute each loss on a tiny random model, all pairs in one batch, in float32. Beside it stand the
log-probs of every token of that batch, from the model's plain forward on each sequence alone, and the reference's sums.
A test gives these to qorpo's objectives and asks for the same loss: so parity needs neither TRL nor a model, and holds
when TRL drops a trainer.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from trl.experimental import cpo, orpo

# Uneven in prompts and in responses, so that padding, and what a mean is over, matter.
PAIRS = [
    {"prompt": "w1 w2 w3 w4 w5 w6 w7", "chosen": " w8 w9", "rejected": " w10 w11 w12 w13 w14 w15"},
    {"prompt": "w16", "chosen": " w17 w18 w19 w20 w21 w22 w23 w24 w25", "rejected": " w26"},
    {"prompt": "w27 w28 w29", "chosen": " w30 w31 w32", "rejected": " w33 w34 w30"},
    {"prompt": "w35 w36 w37 w38", "chosen": " w39", "rejected": " w40 w41 w42 w43 w39"},
]
ROWS = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair, side in zip(PAIRS, ("chosen", "rejected", "chosen", "chosen"), strict=True)
]
NOISE, NOISE_SEED = 0.02, 2  # of a reference whose KL estimate for kto is above 0
ORPO_NLL = {"nll_tokens": "all", "nll_average": "token"}
CPO_NLL = {"nll_tokens": "response", "nll_average": "token"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.write_text(json.dumps(measure(), indent=1) + "\n", encoding="utf-8")


def measure() -> dict[str, Any]:
    """TRL's version, and per case: qorpo's objective, the groups' log-probs, TRL's loss."""
    versions = {"trl": trl.__version__, "torch": torch.__version__.split("+")[0]}
    return {"versions": versions, "cases": [*without_reference(), *with_reference(), kto()]}


# --- the trainers, on the CPU, for one step of everything at once ---


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{index}" for index in range(60))]
    backend = Tokenizer(
        models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def model(noise: float = 0.0) -> LlamaForCausalLM:
    """The same random model each time; with noise, a reference near it."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
    )  # fmt: skip
    made = LlamaForCausalLM(config).float().eval()
    torch.manual_seed(NOISE_SEED)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
    return made


def options(folder: str, **more: Any) -> dict[str, Any]:
    return {
        "output_dir": folder, "per_device_train_batch_size": len(PAIRS), "max_steps": 1, "report_to": "none",
        "max_length": 64, "bf16": False, "fp16": False, "use_cpu": True, "gradient_checkpointing": False, "seed": 0,
        "dataloader_pin_memory": False, "disable_tqdm": True, "save_strategy": "no", **more,
    }  # fmt: skip


def made(trainer: type, config: type, rows: list[dict[str, Any]], **more: Any) -> tuple[Any, dict[str, Any]]:
    """A trainer of TRL's and its one batch."""
    reference = {"ref_model": more.pop("ref_model")} if "ref_model" in more else {}
    with tempfile.TemporaryDirectory() as folder:
        found = trainer(
            model=model(), **reference, args=config(**options(folder, **more)),
            train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer(),
        )  # fmt: skip
        found.model.eval()
        (batch,) = found.get_train_dataloader()
    return found, batch


# --- log-probs from the models' own plain forward ---


def token_logps(scored_by: LlamaForCausalLM, ids: torch.Tensor) -> list[float]:
    """Of every token but the first."""
    with torch.no_grad():
        logits = scored_by(ids[None]).logits[0, :-1].float()
    return logits.log_softmax(-1).gather(-1, ids[1:, None])[:, 0].tolist()


def scored(
    ids: torch.Tensor, is_response: torch.Tensor, attended: torch.Tensor
) -> tuple[list[float], list[float], float]:
    """Log-probs of the prompt's tokens (after its first) and of the response's, and the reference's sum of these."""
    ids, is_response = ids[attended.bool()], is_response[attended.bool()].bool()
    prompt_tokens = int((~is_response).sum())
    assert is_response[prompt_tokens:].all()
    own = token_logps(model(), ids)
    reference = sum(token_logps(model(NOISE), ids)[prompt_tokens - 1 :])
    return own[: prompt_tokens - 1], own[prompt_tokens - 1 :], reference


def pair_groups(sides: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> list[dict[str, Any]]:
    """Pairs from a batch's chosen and then its rejected sequences."""
    found = [[scored(*row) for row in zip(*side, strict=True)] for side in sides]
    return [
        {
            "prompt": [round(logp, 9) for logp in chosen[0]],
            "responses": [[round(logp, 9) for logp in side[1]] for side in (chosen, rejected)],
            "reference": [round(side[2], 9) for side in (chosen, rejected)],
        }
        for chosen, rejected in zip(*found, strict=True)
    ]


# --- the cases ---


def without_reference() -> Iterator[dict[str, Any]]:
    cases = [
        (orpo.ORPOTrainer, orpo.ORPOConfig, {"beta": 0.3}, {"name": "orpo", "weight": 0.3, **ORPO_NLL}),
        (cpo.CPOTrainer, cpo.CPOConfig, {"beta": 0.2, "cpo_alpha": 0.7, "loss_type": "sigmoid"},
         {"name": "cpo", "beta": 0.2, "alpha": 0.7, **CPO_NLL}),
        (cpo.CPOTrainer, cpo.CPOConfig,
         {"beta": 2.0, "cpo_alpha": 0.0, "loss_type": "simpo", "simpo_gamma": 1.6},
         {"name": "simpo", "beta": 2.0, "gamma_beta_ratio": 0.8}),
    ]  # fmt: skip
    for trainer, config, keys, objective in cases:
        made_by, batch = made(trainer, config, PAIRS, remove_unused_columns=False, **keys)
        loss, _ = made_by.get_batch_loss_metrics(made_by.model, batch)
        sides = [
            (
                batch[f"{side}_input_ids"],
                batch[f"{side}_labels"] != -100,
                batch[f"{side}_attention_mask"],
            )
            for side in ("chosen", "rejected")
        ]
        yield {"objective": objective, "trl_loss": loss.item(), "groups": pair_groups(sides)}


def with_reference() -> Iterator[dict[str, Any]]:
    made_by, batch = made(trl.DPOTrainer, trl.DPOConfig, PAIRS, ref_model=model(NOISE))
    tensors = batch["input_ids"], batch["completion_mask"], batch["attention_mask"]
    groups = pair_groups(list(zip(*(tensor.chunk(2) for tensor in tensors), strict=True)))
    for name, loss_type, beta in (("dpo", "sigmoid", 0.3), ("sppo", "sppo_hard", 0.01), ("ipo", "ipo", 0.5)):
        made_by.loss_types, made_by.beta = [loss_type], beta
        loss = made_by.compute_loss(made_by.model, batch).item()
        yield {"objective": {"name": name, "beta": beta}, "trl_loss": loss, "groups": groups}


def kto() -> dict[str, Any]:
    keys = {"beta": 0.3, "desirable_weight": 1.0, "undesirable_weight": 1.5}
    made_by, batch = made(trl.KTOTrainer, trl.KTOConfig, ROWS, ref_model=model(NOISE), **keys)
    loss = made_by.compute_loss(made_by.model, batch).item()
    rows = zip(batch["input_ids"], batch["completion_mask"], batch["attention_mask"], strict=True)
    others = zip(batch["KL_input_ids"], batch["KL_completion_mask"], batch["KL_attention_mask"], strict=True)
    groups = [
        {"prompt": prompt, "responses": [response], "reference": [reference], "desirable": bool(label)}
        for (prompt, response, reference), label in zip(
            (scored(*row) for row in rows), batch["label"], strict=True
        )
    ]
    mismatched = [sum(response) - reference for _, response, reference in (scored(*row) for row in others)]
    return {
        "objective": {"name": "kto", **keys},
        "trl_loss": loss,
        "mismatched_log_ratios": mismatched,
        "groups": groups,
    }


if __name__ == "__main__":
    main()
