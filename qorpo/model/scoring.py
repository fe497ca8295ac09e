"""Token log-probabilities of packed groups, through the model's own forward. Legend: T row tokens, S scored, H hidden."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from torch import nn

from qorpo.data.pack import PackedGroups
from qorpo.errors import ModelError
from qorpo.model.adapters import output_head
from qorpo.model.attention import PACKED, Kernel, PackedLayout, dense_mask, expected_windows
from qorpo.model.mixed_precision import computed_in
from qorpo.model.parts import is_wrapper, language_model
from qorpo.model.sequences import own_logps, sequences
from qorpo.ops.log_probs import token_logps

Mode = Literal["flash", "varlen", "sdpa", "dense", "separate"]


class Scorer(nn.Module):
    """A causal language model as the function PackedGroups -> (S,) float32 log-probs of the scored tokens.

    The head is computed in chunks inside the model's own forward, where its output head is called, so wrappers'
    hooks (PEFT, accelerate, FSDP) run and no (T, V) logits exist. `mode` says how a row is attended:

    - flash, varlen, sdpa: each prompt once, the named kernel over gathered keys (`model/attention.py`);
    - dense: each prompt once, a (T, T) mask, for models without exchangeable attention;
    - separate: one sequence a forward, for models whose layers are no softmax attention.

    Forward and backward belong inside `with scorer.packed_attention():`, since checkpointing recomputes attention.
    """

    model: Any  # of transformers, with or without PEFT adapters

    def __init__(self, model: nn.Module, mode: Mode = "sdpa", chunk_tokens: int = 256):
        super().__init__()
        self.model = model
        self.mode = mode
        self.chunk_tokens = chunk_tokens
        self.fused_head: bool | None = None  # as `token_logps` has it
        self.compute_dtype: torch.dtype | None = (
            None  # what trained parameters are cast to; None: as they are
        )

    def tie_weights(self) -> None:
        """Asked for by accelerate when it shards. It would give the head a unit of its own where it could ask for that
        too; in the root's the head is gathered once for all chunks, and until the last backward is done.
        """
        self.model.tie_weights()

    @property
    def text_config(self) -> Any:
        return self.model.config.get_text_config()

    @contextmanager
    def packed_attention(self) -> Iterator[None]:
        """Put packed attention in place of the model's own, for as long as rows are scored and differentiated."""
        config = self.text_config
        own = config._attn_implementation
        if self.mode in get_args(Kernel):
            config._attn_implementation = PACKED
        try:
            with computed_in(self.model, self.compute_dtype):
                yield
        finally:
            config._attn_implementation = own

    def forward(self, packed: PackedGroups, by_own_logits: bool = False) -> torch.Tensor:
        """(S,) log-probs in the order of `packed.targets`; float64 for a float64 model.

        With `by_own_logits` they are `own_logps`.

        Raises:
            ModelError: where a layer did not see the packed layout, so its result would be wrong.
        """
        if by_own_logits:
            return own_logps(self.model, packed)
        if self.mode == "separate":
            return self._one_by_one(packed)
        expected = expected_windows(self.text_config)
        row: dict[str, Any] = {"input_ids": packed.input_ids, "position_ids": packed.position_ids}
        if self.mode == "dense":
            return self._score(
                row | {"attention_mask": self._masks(packed)}, packed.predictors, packed.targets
            )
        layout = PackedLayout.of(packed, self.mode)
        logps_S = self._score(row | {"packed_layout": layout}, packed.predictors, packed.targets)
        if layout.windows != expected:
            raise ModelError(
                f"{self.text_config.model_type}: attention saw the packed layout with windows {layout.windows}, "
                f"expected {expected}, one a layer; set model.attention: dense or separate"
            )
        return logps_S

    def _score(
        self, inputs: dict[str, Any], predictors_S: torch.Tensor, targets_S: torch.Tensor
    ) -> torch.Tensor:
        """One forward in which the output head is `token_logps` of the scored places."""
        head = output_head(self.model)
        scale, softcap = logit_scale(self.text_config), logit_softcap(self.text_config)
        logps: list[torch.Tensor] = []

        def score_in_place_of_logits(hidden_1TH: torch.Tensor) -> torch.Tensor:
            logps.append(
                token_logps(
                    hidden_1TH[0].index_select(0, predictors_S), head.weight, targets_S,
                    bias=head.bias, chunk_tokens=self.chunk_tokens, logit_scale=scale, logit_softcap=softcap,
                    fused=self.fused_head,
                )
            )  # fmt: skip
            return hidden_1TH[..., :0]  # what the model does to logits afterwards, it does to nothing

        with replaced_forward(head, score_in_place_of_logits):
            if is_wrapper(
                self.model
            ):  # whose own forward wants to be told in training that there is no image
                head(language_model(self.model)(**inputs, use_cache=False).last_hidden_state)
            else:
                self.model(**inputs, use_cache=False)
        assert len(logps) == 1, f"the output head was called {len(logps)} times in one forward"
        return logps[0]

    def _one_by_one(self, packed: PackedGroups) -> torch.Tensor:
        """The plain way: each sequence a forward of its own, prompts twice."""
        logps = [
            self._score({"input_ids": ids_1T}, predictors, targets)
            for ids_1T, predictors, targets in sequences(packed)
        ]
        return torch.cat(logps)

    def _masks(self, packed: PackedGroups) -> torch.Tensor | dict[str, torch.Tensor]:
        config, dtype = self.text_config, self.model.dtype
        kinds = getattr(config, "layer_types", None)
        window = getattr(config, "sliding_window", None)
        if kinds is None:
            return dense_mask(packed, dtype, window)
        masks = {
            kind: dense_mask(packed, dtype, window if kind == "sliding_attention" else None)
            for kind in sorted(set(kinds))
        }
        return masks if len(masks) > 1 else next(iter(masks.values()))


def logit_scale(config: Any) -> float:
    """The factor a model puts on its logits: Cohere multiplies by `logit_scale`, Granite divides by `logits_scaling`.

    MiniCPM-3 divides too, but before its head.
    """
    if config.model_type == "minicpm3":
        return 1.0
    return (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)


def logit_softcap(config: Any) -> float | None:
    """c of a model that squashes its logits to c · tanh(z / c) (Gemma-2)."""
    return getattr(config, "final_logit_softcapping", None)


@contextmanager
def replaced_forward(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Let `module(...)` call `forward`, its hooks included, and put back what was there."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before
