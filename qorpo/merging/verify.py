"""Is the merged model the adapter on its base? Both score the same pairs, and every figure has a threshold.

One model at a time is in memory: of the first, the hidden states that its output head turns into distributions are
kept, and its head. Legend: S scored tokens, H hidden, V vocabulary, C a chunk of the scored tokens.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.nn.functional as F
from peft import PeftModel
from peft.tuners.lora import LoraLayer

from qorpo.build import build_objective, limits_of, load_data, reading_of
from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import Group, row_tokens
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import tokenize_pairs
from qorpo.engine.step import score_groups
from qorpo.merging.adapter import Adapter
from qorpo.merging.source import Base
from qorpo.model.adapters import compute_in_base_type, output_head
from qorpo.model.load import load_model, load_tokenizer
from qorpo.model.mixed_precision import compute_in_float32
from qorpo.model.scoring import Scorer, logit_scale, logit_softcap
from qorpo.model.selfcheck import make_scorer
from qorpo.model.targets import targets_as_given
from qorpo.objectives.base import Objective
from qorpo.ops.log_probs import next_token_logps
from qorpo.recipe import DataRecipe, Recipe

ROW_TOKENS = 2048
CHUNK_TOKENS = 128
# Rounding alone gave a mean of 6e-5 and a worst of 0.003 on a real run; one module of 56 left out, 5e-4 and 0.29.
THRESHOLDS = {
    "kl_mean": 0.001,
    "kl_worst": 0.1,
    "chosen_logps": 0.01,
    "rejected_logps": 0.01,
    "rewards/accuracies": 0.02,
    "nll": 0.01,
}


@dataclass(frozen=True)
class Comparison:
    """How far the merged model is from the adapter on a base.

    `figures`: the mean and the worst KL divergence of next-token distributions over the scored tokens, in nats,
    from the adapter on its base to the merged model, and the changes of the held-out metrics.
    """

    reference: str
    figures: dict[str, float]
    before: dict[str, float]
    after: dict[str, float]
    judged: bool

    @property
    def failed(self) -> list[str]:
        """What is over its threshold, or no number."""
        if not self.judged:
            return []
        return [name for name, most in self.thresholds.items() if not abs(self.figures[name]) <= most]

    @property
    def thresholds(self) -> dict[str, float]:
        """Those of the figures that the run's objective has."""
        return {name: most for name, most in THRESHOLDS.items() if name in self.figures}


@dataclass(frozen=True)
class Verification:
    """Comparisons with the adapter on the weights it was merged onto, and on those it was trained on."""

    pairs: int
    tokens: int  # scored: the responses', and the prompts' where the run's NLL is over them
    comparisons: list[Comparison]

    @property
    def passed(self) -> bool:
        return not any(comparison.failed for comparison in self.comparisons)

    def lines(self) -> list[str]:
        """The verdict and what it rests on, for a person."""
        lines = []
        for each in self.comparisons:
            lines.append(f"against the {each.reference}, {self.pairs} pairs:")
            for name, most in each.thresholds.items():
                verdict = ("too far" if name in each.failed else "ok") if each.judged else ""
                limit = f"  (at most {most:g})  {verdict}" if each.judged else ""
                lines.append(f"  {name}: {each.figures[name]:+.5f}{limit}")
        return [*lines, f"verification: {'passed' if self.passed else 'FAILED'}"]

    def as_dict(self) -> dict[str, Any]:
        return {
            "verdict": "pass" if self.passed else "fail",
            "thresholds": THRESHOLDS,
            **asdict(self),
        }


def evaluation_pairs(
    source: str | Path | None, recipe: Recipe | None, tokenizer_folder: str, trust_remote_code: bool = False
) -> list[Group]:
    """Pairs of a file, else of the run's own evaluation, as tokens; none where there is neither.

    Raises:
        DataError: where they can't be read.
    """
    chat = ChatFormat(load_tokenizer(tokenizer_folder, trust_remote_code=trust_remote_code))
    if source is not None:
        keys = recipe.data if recipe else DataRecipe(train=("none",))
        reading = reading_of(recipe) if recipe else {}
        responses = build_objective(recipe.objective).responses if recipe else 2
        found = load_pairs(source, **reading)
        return list(tokenize_pairs(found, chat, limits_of(keys), responses).groups)
    if recipe is None or recipe.data.eval is None:
        return []
    held_out = load_data(recipe, chat).eval
    return list(held_out.groups) if held_out else []


def memory_needed(
    parameters: int, vocabulary: int, hidden: int, pairs: Sequence[Group], *, in_float32: bool = False
) -> int:
    """Bytes that verifying takes: a model in bfloat16 or float32, two heads in float32, hidden states, and room to work."""
    scored = sum(map(row_tokens, pairs))  # the prompts too, where the run's NLL is over them
    heads = 2 * 4 * vocabulary * hidden
    working = 6 * 4 * CHUNK_TOKENS * vocabulary + (1 << 30)
    size = 4 if in_float32 else 2
    return size * parameters + heads + size * scored * hidden + working


def memory_free(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


def verify_merged(
    merged: Path,
    base: Base,
    adapters: Sequence[Adapter],
    pairs: Sequence[Group],
    *,
    references: Sequence[str],
    objective: Objective,
    device: torch.device,
    in_float32: bool = False,
) -> Verification:
    """Score pairs by the merged model and by the adapters on their base, in training's arithmetic (bfloat16).

    Args:
        in_float32: compute in float32, as a model merged to that type is for: bfloat16 would drop what it holds.
        references: the base's quantization (none or nf4), each a comparison; the first is judged.
    """
    options: dict[str, Any] = {
        "device": device,
        "trust_remote_code": base.trust_remote_code,
        "allow_pickle": True,
    }
    dtype = torch.float32 if in_float32 else torch.bfloat16
    model = load_model(str(merged), quantization="none", dtype=dtype, **options)
    scores = _Scores.of(model, pairs, objective)
    comparisons = []
    for quantization in references:
        model = load_model(str(base.folder), quantization=quantization, **options)
        if in_float32:
            compute_in_float32(model)
        reference = _Scores.of(with_adapters(model, adapters), pairs, objective)
        del model
        name = "adapter on the NF4 base" if quantization == "nf4" else "adapter on the original base"
        comparisons.append(reference.compared_with(scores, name, judged=quantization == references[0]))
    return Verification(len(pairs), len(scores.hidden_SH), comparisons)


def unverifiable(adapters: Sequence[Adapter]) -> str | None:
    """Why PEFT can't run these adapters together on a base, or None."""
    if (len(adapters) == 1 and adapters[0].weight == 1.0) or all(each.is_plain for each in adapters):
        return None
    return "several or weighted adapters can be verified only where all are plain LoRA; give --no-verify"


def with_adapters(model: Any, adapters: Sequence[Adapter]) -> PeftModel:
    """The base with adapters on it, computing as in training; each with its weight."""
    if rows := next((rows for each in adapters if (rows := each.vocabulary(model))), None):
        model.resize_token_embeddings(rows, mean_resizing=False)
    peft_model: Any = None
    for number, each in enumerate(adapters):
        name = f"adapter{number}"
        with targets_as_given(model, each.stored):
            if peft_model is None:
                peft_model = PeftModel.from_pretrained(model, each.folder, adapter_name=name)
            else:
                peft_model.load_adapter(each.folder, adapter_name=name)
        for module in peft_model.modules():
            if isinstance(module, LoraLayer) and name in module.scaling:
                module.scaling[name] *= each.weight
    peft_model.base_model.set_adapter([f"adapter{number}" for number in range(len(adapters))])
    compute_in_base_type(peft_model)
    return peft_model.requires_grad_(False)


class _KeepingScorer(Scorer):
    """Keeps the hidden states of the scored places on their way into the head."""

    hidden: list[torch.Tensor]

    def _score(
        self, inputs: dict[str, Any], predictors_S: torch.Tensor, targets_S: torch.Tensor
    ) -> torch.Tensor:
        def keep(_: Any, arguments: tuple[torch.Tensor, ...]) -> None:
            self.hidden.append(arguments[0][0].index_select(0, predictors_S).cpu())

        hook = output_head(self.model).register_forward_pre_hook(keep)
        try:
            return super()._score(inputs, predictors_S, targets_S)
        finally:
            hook.remove()


@dataclass(frozen=True)
class _Scores:
    """One model's view of the pairs: metrics, and what its next-token distributions are made of."""

    metrics: dict[str, float]
    hidden_SH: torch.Tensor
    weight_VH: torch.Tensor
    bias_V: torch.Tensor | None
    scale: float
    softcap: float | None

    @classmethod
    @torch.no_grad()
    def of(cls, model: Any, pairs: Sequence[Group], objective: Objective) -> "_Scores":
        model.eval()
        scorer = _KeepingScorer(model, make_scorer(model).mode)
        scorer.hidden = []
        with scorer.packed_attention():
            found = score_groups(scorer, pairs, objective, microbatch_tokens=ROW_TOKENS, device=model.device)
        head, config = output_head(model), model.config.get_text_config()
        return cls(
            {name: value_P.mean().item() for name, value_P in found.items()},
            torch.cat(scorer.hidden), head.weight.detach().float(),
            None if head.bias is None else head.bias.detach().float(), logit_scale(config), logit_softcap(config),
        )  # fmt: skip

    def log_probs(self, start: int) -> torch.Tensor:
        """(C, V) of the next CHUNK_TOKENS scored places."""
        return next_token_logps(
            self.hidden_SH[start : start + CHUNK_TOKENS].to(self.weight_VH), self.weight_VH,
            bias=self.bias_V, logit_scale=self.scale, logit_softcap=self.softcap,
        )  # fmt: skip

    @torch.no_grad()
    def compared_with(self, merged: "_Scores", reference: str, *, judged: bool) -> Comparison:
        divergences = []
        for start in range(0, len(self.hidden_SH), CHUNK_TOKENS):
            own_CV, others_CV = self.log_probs(start), merged.log_probs(start)
            divergences.append(F.kl_div(others_CV, own_CV, reduction="none", log_target=True).sum(-1))
        kl_S = torch.cat(divergences)
        figures = {"kl_mean": kl_S.mean().item(), "kl_worst": kl_S.max().item()}
        figures |= {name: merged.metrics[name] - value for name, value in self.metrics.items()}
        return Comparison(reference, figures, self.metrics, merged.metrics, judged)
