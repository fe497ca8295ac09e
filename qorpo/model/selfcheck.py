"""The check at load: does a packed row score as the model scores each sequence alone? Nothing is trained before it holds."""

import importlib.util
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from qorpo.data.pack import PackedGroups
from qorpo.errors import ModelError
from qorpo.model.liger import has_liger, own_modules, remove_liger
from qorpo.model.probe import Observed, Probe, observed, probe_rows
from qorpo.model.scoring import Mode, Scorer
from qorpo.out_of_memory import is_out_of_memory

logger = logging.getLogger(__name__)

# What two right ways may be apart where the model's own noise says nothing: in log-probs (nats, mean) and in gradients
# (relative). A row attended wrongly is off by tenths in its gradients, whatever its weights; by how much in its log-probs
# depends on how strongly the model attends. (Models compute norms in float32 even where they are float64.)
FLOORS = {
    torch.float64: (1e-5, 1e-4),
    torch.float32: (1e-4, 1e-3),
    torch.bfloat16: (0.05, 0.1),
    torch.float16: (0.05, 0.1),
}
NOISE = 4.0
"""So many times its own noise may a way of attending be off: the model's, in rows of another length."""


def make_scorer(model: Any, attention: str = "auto", chunk_tokens: int = 256) -> Scorer:
    """A scorer whose log-probs were found equal to the model's own; see `resolve_mode`."""
    scorer = Scorer(model, chunk_tokens=chunk_tokens)
    resolve_mode(scorer, scorer, attention)
    return scorer


def resolve_mode(
    scorer: Scorer,
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
    scorer: Scorer, call: Callable[..., torch.Tensor], attention: str, dtype: torch.dtype | None
) -> None:
    model, config = scorer.model, scorer.text_config
    dtype = dtype or model.dtype
    if getattr(config, "attn_logit_softcapping", None) and config._attn_implementation == "sdpa":
        # Before 5.23 transformers runs Gemma-2 on SDPA, which leaves the soft cap out without a word.
        config._attn_implementation = "eager"
    probe, longer = probe_rows(model)
    was_training = model.training
    model.eval()
    try:
        scorer.mode = "separate"  # the model's own attention
        with own_modules(model):
            own = observed(scorer, call, probe, by_own_logits=True)
            noises = observed(scorer, call, longer, by_own_logits=True).errors(own)
        allowed = [max(floor, NOISE * noise) for floor, noise in zip(FLOORS[dtype], noises, strict=True)]
        failures: list[str] = []
        for mode in candidates(model, dtype) if attention == "auto" else [attention]:
            scorer.mode = mode  # type: ignore[assignment]
            failure = _difference(scorer, call, probe, own, allowed)
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
    scorer: Scorer,
    call: Callable[..., torch.Tensor],
    probe: Probe,
    own: Observed,
    allowed: Sequence[float],
) -> str | None:
    """Why the scorer's log-probs can't be trusted, or None."""
    try:
        found = observed(scorer, call, probe)
        with torch.no_grad(), scorer.packed_attention():
            others_changed_S = call(_with_other_tokens_changed(probe.packed))
    except Exception as error:  # a kernel can fail to be compiled in any way
        if is_out_of_memory(error):
            raise
        return str(error).strip().split("\n")[0] or type(error).__name__
    logps, gradients = found.errors(own)
    if not logps <= allowed[0]:
        return f"log-probs differ from the model's own by {logps:.2g} nats on average"
    if not gradients <= allowed[1]:
        return f"gradients differ from the model's own by {gradients:.2g} of their size"
    last_response = probe.packed.segments == probe.packed.segments.max()
    leak = (found.logps_S - others_changed_S)[last_response].abs().mean().item()
    if not leak <= FLOORS[torch.float64][0]:
        return f"a response's log-probs change by {leak:.2g} nats with other sequences' tokens"
    return None


def _with_other_tokens_changed(packed: PackedGroups) -> PackedGroups:
    """The same row but for every token that the last response must not see: nothing of it may change.

    The sharper half of the check: no rounding stands between the two, so a leak shows however weakly a model attends.
    """
    prompt, *responses = packed.lengths[-1]
    ids_T = packed.input_ids[0].clone()
    in_group = sum(responses)
    for hidden_from_it in (ids_T[: -(prompt + in_group)], ids_T[-in_group : -responses[-1]]):
        hidden_from_it.copy_(hidden_from_it.flip(0))
    return replace(packed, input_ids=ids_T[None])


def _report(mode: Mode, failures: list[str]) -> None:
    reasons = f" ({'; '.join(failures)})" if failures else ""
    if mode == "separate":
        logger.warning("attention: separate, one sequence a forward, prompts computed twice%s", reasons)
    else:
        logger.info("attention: %s, each prompt once%s", mode, reasons)
