"""Attention over packed groups, in which responses share their prompt.

Legend: T tokens of the row, N sequences, one a response, K gathered keys, D head size.

Token j attends to i ≤ j where i is in its group's prompt or in its own response. As variable-length attention this is
one sequence a response: [prompt, first response] over its own keys, and each other response's queries over the keys
[prompt, response], causal and aligned at the end. Queries keep the row's order; keys and values are gathered, and
autograd sums the prompt's gradient. Within a sequence, index and position are one, so a sliding window is counted in keys.

`packed_attention` is registered with transformers under `PACKED`; the layout reaches it as the keyword
`packed_layout` of the model's forward. The dense twin is `dense_mask`.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate
from typing import Any, Literal

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from qorpo.data.groups import GroupLengths
from qorpo.data.pack import PackedGroups, moved
from qorpo.errors import ModelError

PACKED = "qorpo_packed"

Kernel = Literal["flash", "varlen", "sdpa"]


@dataclass(slots=True)
class PackedLayout:
    """Who attends to whom in one row, worked out once a micro-batch and handed to every layer."""

    kernel: Kernel
    lengths: tuple[GroupLengths, ...]
    key_index: torch.Tensor  # (K,) int64: places in the row of each sequence's keys, sequence after sequence
    query_ends: torch.Tensor  # (N + 1,) int32: cumulative query lengths
    key_ends: torch.Tensor  # (N + 1,) int32: cumulative key lengths
    max_queries: int
    max_keys: int
    windows: list[int | None] = field(
        default_factory=list
    )  # a call of the attention function each: its window
    masks: dict[tuple[int, int, int | None], torch.Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, packed: PackedGroups, kernel: Kernel) -> "PackedLayout":
        device = packed.input_ids.device
        query_lengths: list[int] = []
        key_lengths: list[int] = []
        keys: list[int] = []
        start = 0
        for prompt, first, *others in packed.lengths:
            query_lengths += [prompt + first, *others]
            key_lengths += [prompt + first, *(prompt + other for other in others)]
            end = start + prompt + first
            keys += range(start, end)
            for other in others:
                keys += [*range(start, start + prompt), *range(end, end + other)]
                end += other
            start = end

        def ends(lengths: list[int]) -> torch.Tensor:
            return moved(torch.tensor([0, *accumulate(lengths)], dtype=torch.int32), device)

        return cls(
            kernel=kernel,
            lengths=packed.lengths,
            key_index=moved(torch.tensor(keys), device),
            query_ends=ends(query_lengths),
            key_ends=ends(key_lengths),
            max_queries=max(query_lengths),
            max_keys=max(key_lengths),
        )

    def lower_right_mask(self, queries: int, keys: int, window: int | None) -> torch.Tensor:
        """(queries, keys) bool, True where attended: causal, aligned at the end, at most `window` keys back."""
        mask = self.masks.get((queries, keys, window))
        if mask is None:
            place = torch.arange(keys, device=self.key_index.device)
            behind = place[keys - queries :, None] - place
            mask = (behind >= 0) & (behind < (window or keys))
            self.masks[queries, keys, window] = mask
        return mask


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    packed_layout: PackedLayout | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention function for a packed row.

    Args:
        query: (1, heads, T, D); key and value (1, key heads, T, D), where key heads divides heads.
        attention_mask: None; the layout says it all.

    Returns:
        (1, T, heads, D) and no attention weights.

    Raises:
        ModelError: where a layer asks for something that would silently be left out.
    """
    if packed_layout is None:
        raise ModelError("a layer did not get the packed layout; set model.attention: dense or separate")
    if attention_mask is not None or kwargs.get("s_aux") is not None:
        raise ModelError(
            "a layer uses an attention mask or sinks of its own; set model.attention: dense or separate"
        )
    packed_layout.windows.append(sliding_window)
    attend = {"flash": _flash, "varlen": _varlen, "sdpa": _sequence_at_a_time}[packed_layout.kernel]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(packed_layout, query, key, value, scale, dropout, sliding_window, softcap), None


def _sequence_at_a_time(layout, query, key, value, scale, dropout, window, softcap) -> torch.Tensor:
    """The plain path, for every device and type: one call of scaled_dot_product_attention a sequence."""
    dtype = query.dtype
    if query.device.type == "cpu" and dtype == torch.bfloat16:
        # As fast there, more exact, and the bfloat16 kernel's backward keeps megabytes for every new length it meets.
        query, key, value = query.float(), key.float(), value.float()
    # Split, not sliced: its backward is one concatenation instead of a zero-filled row for every slice.
    parts = [tokens for prompt, first, *others in layout.lengths for tokens in (prompt + first, *others)]
    queries, keys, values = (iter(tensor.split(parts, dim=2)) for tensor in (query, key, value))
    options = (scale, dropout, window, softcap)
    outputs = []
    for prompt, _, *others in layout.lengths:
        own_key, own_value = next(keys), next(values)
        outputs.append(_attend_once(layout, next(queries), own_key, own_value, *options))
        for _ in others:
            shared_key = torch.cat([own_key[:, :, :prompt], next(keys)], dim=2)
            shared_value = torch.cat([own_value[:, :, :prompt], next(values)], dim=2)
            outputs.append(_attend_once(layout, next(queries), shared_key, shared_value, *options))
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)


def _attend_once(layout, query, key, value, scale, dropout, window, softcap) -> torch.Tensor:
    num_queries, num_keys = query.shape[2], key.shape[2]
    grouped = query.shape[1] != key.shape[1]
    if softcap is None:
        causal = num_queries == num_keys and (window is None or window >= num_keys)
        # SDPA's is_causal is aligned at the top left, which is right only for as many queries as keys.
        mask = None if causal else layout.lower_right_mask(num_queries, num_keys, window)
        return F.scaled_dot_product_attention(
            query, key, value, mask, dropout, is_causal=causal, scale=scale, enable_gqa=grouped
        )
    if grouped:
        repeats = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    scores = softcap * torch.tanh(query @ key.transpose(2, 3) * scale / softcap)
    scores = scores.masked_fill(~layout.lower_right_mask(num_queries, num_keys, window), float("-inf"))
    weights = F.dropout(scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)), dropout)
    return weights.to(query.dtype) @ value


def _gathered(layout, query, key, value) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Queries (T, heads, D) in the row's order; keys and values (K, key heads, D) by sequence."""
    query = query[0].transpose(0, 1)
    key, value = (tensor[0].transpose(0, 1).index_select(0, layout.key_index) for tensor in (key, value))
    return query, key, value


def _flash(layout, query, key, value, scale, dropout, window, softcap) -> torch.Tensor:
    """flash-attn's kernel, which aligns causal at the bottom right; windows are (keys back, keys ahead)."""
    from flash_attn import flash_attn_varlen_func

    query, key, value = _gathered(layout, query, key, value)
    output = flash_attn_varlen_func(
        query, key, value, layout.query_ends, layout.key_ends, layout.max_queries, layout.max_keys,
        dropout_p=dropout, softmax_scale=scale, causal=True, softcap=softcap or 0.0,
        window_size=(-1, -1) if window is None else (window - 1, 0),
    )  # fmt: skip
    return output[None]


def _varlen(layout, query, key, value, scale, dropout, window, softcap) -> torch.Tensor:
    """PyTorch's own variable-length kernel: CUDA, half precision, no dropout, no soft cap."""
    varlen_attn, options = _torch_varlen()
    if dropout or softcap is not None:
        raise ModelError(
            "PyTorch's varlen_attn has neither attention dropout nor soft cap; set model.attention: sdpa"
        )
    query, key, value = _gathered(layout, query, key, value)
    arguments: dict[str, Any] = {}
    if "window_size" in options:
        arguments["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None:
        arguments["is_causal"] = True
    else:
        raise ModelError(
            "this PyTorch's varlen_attn has no sliding window; set model.attention: sdpa, or update torch"
        )
    if "scale" in options:
        arguments["scale"] = scale
    else:
        query = query * (scale * query.shape[-1] ** 0.5)
    if query.shape[1] != key.shape[1]:
        if "enable_gqa" in options:
            arguments["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, 1), value.repeat_interleave(repeats, 1)
    output = varlen_attn(
        query,
        key,
        value,
        layout.query_ends,
        layout.key_ends,
        layout.max_queries,
        layout.max_keys,
        **arguments,
    )
    return output[None]


@cache
def _torch_varlen() -> tuple[Callable[..., Any], frozenset[str]]:
    """The function and its options: window, scale and grouped heads came release by release."""
    from torch.nn.attention.varlen import varlen_attn

    return varlen_attn, frozenset(inspect.signature(varlen_attn).parameters)


def expected_windows(config: Any) -> list[int | None]:
    """The window with which each layer of a model should call attention, None for all keys.

    Raises:
        ModelError: for layers that are no softmax attention (recurrent, linear, convolutional, chunked): what they
            carry along a row would leak from one sequence into the next.
    """
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return [window] * config.num_hidden_layers
    windows = {"full_attention": None, "sliding_attention": window}
    if strange := sorted(set(kinds) - set(windows)):
        raise ModelError(
            f"{config.model_type} has layers of kind {', '.join(strange)}, which can't share a row"
        )
    return [windows[kind] for kind in kinds]


def dense_mask(packed: PackedGroups, dtype: torch.dtype, window: int | None = None) -> torch.Tensor:
    """(1, 1, T, T) additive mask that says the same as the layout, for models without exchangeable attention.

    0 where token j may attend to i, the type's lowest value elsewhere. Costs T² memory a micro-batch.
    """
    device = packed.input_ids.device
    segments = [(tokens, part) for lengths in packed.lengths for part, tokens in enumerate(lengths)]
    tokens_N, part_N = torch.tensor(segments).unbind(1)
    segment_N = torch.arange(len(segments))

    def of_tokens(value_N: torch.Tensor) -> torch.Tensor:
        value_T = torch.repeat_interleave(value_N, tokens_N, output_size=packed.input_ids.shape[1])
        return moved(value_T, device)

    segment_T, prompt_T = (
        of_tokens(segment_N),
        of_tokens(segment_N - part_N),
    )  # its own, and its group's prompt
    position_T = packed.position_ids[0]
    behind = position_T[:, None] - position_T
    allowed = ((segment_T[:, None] == segment_T) | (prompt_T[:, None] == segment_T)) & (behind >= 0)
    if window is not None:
        allowed &= behind < window
    blocked = torch.finfo(dtype).min
    return torch.zeros(allowed.shape, dtype=dtype, device=device).masked_fill(~allowed, blocked)[None, None]


# No mask function beside it: for attention that has one transformers asks the device, in every forward, whether positions
# start anew in a row; for attention that has none it makes no mask.
AttentionInterface.register(PACKED, packed_attention)
