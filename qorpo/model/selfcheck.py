"""The check at load: does a packed row score as the model scores each sequence alone? Nothing is trained before it holds."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qorpo.data.pack import PackedPairs, pack_pairs
from qorpo.data.tokenize import TokenizedPair
from qorpo.errors import ModelError
from qorpo.model.liger import has_liger, own_modules, remove_liger
from qorpo.model.scoring import Mode, PairScorer

logger = logging.getLogger(__name__)

# Mean absolute difference of log-probs. A row attended wrongly is off by tenths on a trained model; two right ways
# in half precision differ by hundredths. (Models compute norms in float32 even where they are float64.)
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


def make_scorer(model: Any, attention: str = "auto", chunk_tokens: int = 256) -> PairScorer:
    """A scorer whose log-probs were found equal to the model's own; see `resolve_mode`."""
    scorer = PairScorer(model, chunk_tokens=chunk_tokens)
    resolve_mode(scorer, scorer, attention)
    return scorer


def resolve_mode(
    scorer: PairScorer,
    call: Callable[..., torch.Tensor],
    attention: str = "auto",
    dtype: torch.dtype | None = None,
    liger: bool | str = "auto",
) -> None:
    """Give a scorer the best way of attending that scores as its model does on its own, by its own modules.

    Args:
        scorer: of a causal language model of transformers, with or without PEFT adapters.
        call: the scorer as it is called, itself or what wraps it (all ranks of a sharded one together).
        attention: auto tries each mode and takes the first that holds; a named mode is taken or refused.
        dtype: what the model computes in; None: its weights' own type.
        liger: whether liger's modules, where the model has them (`apply_liger`), are asked for (true) or are taken
            out again where log-probs differ with them (auto).

    Raises:
        ModelError: where no mode, or not the named one, gives the model's own log-probs; says why for each.
    """
    try:
        _resolve_mode(scorer, call, attention, dtype)
    except ModelError as error:
        if not has_liger(scorer.model):
            raise
        if liger is True:
            raise ModelError(f"{error}. Or it is liger-kernel's modules: set model.liger: auto") from error
        logger.warning("liger: off, the model's own modules in its place (%s)", error)
        remove_liger(scorer.model)
        _resolve_mode(scorer, call, attention, dtype)


def _resolve_mode(
    scorer: PairScorer, call: Callable[..., torch.Tensor], attention: str, dtype: torch.dtype | None
) -> None:
    model, config = scorer.model, scorer.text_config
    dtype = dtype or model.dtype
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        # Before 5.23 transformers runs Gemma-2 on SDPA, which leaves the soft cap out without a word.
        config._attn_implementation = "eager"
    packed = _probe_pairs(model)
    with torch.no_grad():
        was_training = model.training
        model.eval()
        try:
            scorer.mode = "separate"  # the model's own attention
            with scorer.packed_attention(), own_modules(model):
                own_S = call(packed, by_own_logits=True)
            failures: list[str] = []
            for mode in candidates(model, dtype) if attention == "auto" else [attention]:
                scorer.mode = mode  # type: ignore[assignment]
                failure = _difference(scorer, call, packed, own_S, TOLERANCES[dtype])
                if failure is None:
                    _report(scorer.mode, failures)
                    return
                failures.append(f"{mode}: {failure}")
        finally:
            model.train(was_training)
    raise ModelError(
        f"{model.config.model_type}: qorpo can't score this model exactly. " + "; ".join(failures)
        + ("" if attention == "auto" else f". Set model.attention: auto instead of {attention}")
    )  # fmt: skip


def candidates(model: Any, dtype: torch.dtype) -> Sequence[Mode]:
    """Modes to try, best first: kernels that are here and have what the model needs, then the plain ones."""
    plain: list[Mode] = ["sdpa", "dense", "separate"]
    if model.device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return plain
    kernels: list[Mode] = []
    if importlib.util.find_spec("flash_attn"):
        kernels.append("flash")
    if varlen_has_all(model.config.get_text_config()):
        kernels.append("varlen")
    return [*kernels, *plain]


def varlen_has_all(config: Any) -> bool:
    """Whether PyTorch's variable-length kernel has what a model's attention needs: no dropout, no soft cap."""
    drops = getattr(config, "attention_dropout", 0.0) or getattr(config, "attn_pdrop", 0.0)
    return not drops and getattr(config, "attn_logit_softcapping", None) is None


def _difference(
    scorer: PairScorer,
    call: Callable[..., torch.Tensor],
    packed: PackedPairs,
    own_S: torch.Tensor,
    tolerance: float,
) -> str | None:
    """Why the scorer's log-probs can't be trusted, or None."""
    try:
        with scorer.packed_attention():
            logps_S = call(packed)
            others_changed_S = call(_with_other_tokens_changed(packed))
    except Exception as error:  # a kernel can fail to be compiled in any way
        return str(error).strip().split("\n")[0] or type(error).__name__
    difference = (logps_S - own_S).abs().mean().item()
    if not difference <= tolerance:
        return f"log-probs differ from the model's own by {difference:.2g} nats on average"
    last_rejected = packed.sides == packed.sides.max()
    leak = (logps_S - others_changed_S)[last_rejected].abs().mean().item()
    if not leak <= tolerance / 10:
        return f"a response's log-probs change by {leak:.2g} nats with other sequences' tokens"
    return None


def _with_other_tokens_changed(packed: PackedPairs) -> PackedPairs:
    """The same row but for every token that the last rejected response must not see: nothing of it may change.

    The sharper half of the check: no rounding stands between the two, so a leak shows however weakly a model attends.
    """
    prompt, chosen, rejected = packed.lengths[-1]
    ids_T = packed.input_ids[0].clone()
    for hidden_from_it in (ids_T[: -(prompt + chosen + rejected)], ids_T[-(chosen + rejected) : -rejected]):
        hidden_from_it.copy_(hidden_from_it.flip(0))
    return replace(packed, input_ids=ids_T[None])


def _report(mode: Mode, failures: list[str]) -> None:
    reasons = f" ({'; '.join(failures)})" if failures else ""
    if mode == "separate":
        logger.warning("attention: separate, one sequence a forward, prompts computed twice%s", reasons)
    else:
        logger.info("attention: %s, each prompt once%s", mode, reasons)


def _probe_pairs(model: Any) -> PackedPairs:
    """Two short pairs of fixed pseudo-random tokens."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(vocab_size, (count,), generator=generator).tolist())

    pairs = [
        TokenizedPair(tokens(prompt), tokens(chosen), tokens(rejected), "self-check")
        for prompt, chosen, rejected in ((9, 7, 5), (6, 4, 8))
    ]
    return pack_pairs(pairs, score_prompts=True).to(model.device)
