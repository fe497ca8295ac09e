"""What a merge will write, before any of it is written: every tensor with where its values come from."""

import importlib.util
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, Literal

import torch

from qorpo.errors import ModelError
from qorpo.merging.adapter import Change, Replaced, Weighted
from qorpo.merging.dequantize import BLOCK_SIZE, StackScales, dequantized, dequantized_part
from qorpo.merging.shards import Blocks, Planned, Shard, Stored, plan_shards, read_checkpoint
from qorpo.merging.skeleton import Place, Skeleton, embedding_names
from qorpo.merging.source import Base, Trained

Onto = Literal["original", "dequantized"]


@dataclass(frozen=True)
class Plan:
    """Shards to write and the configuration that goes with them."""

    shards: list[Shard]
    config: dict[str, Any]
    changed: int  # tensors that the adapters change

    @property
    def total_bytes(self) -> int:
        return sum(tensor.nbytes for shard in self.shards for tensor in shard.tensors)


def make_plan(
    base: Base,
    trained: Sequence[Trained],
    *,
    onto: Onto,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    allow_pickle: bool = False,
) -> Plan:
    """Check adapters and base against each other, and lay out what comes of them.

    Raises:
        ModelError: for a checkpoint that is broken or not the configuration's, and adapters that don't fit it.
    """
    stored = read_checkpoint(base.folder, allow_pickle=allow_pickle)
    skeleton = Skeleton.of(base.config, trust_remote_code=base.trust_remote_code)
    places = skeleton.places(stored)
    _check_base(base.folder, skeleton, places, stored)
    changes, vocabulary = _all_changes(base, trained, skeleton)
    shared = skeleton.tied.keys() & changes.keys() - {*embedding_names(skeleton.model)}
    if shared:  # of Zamba's layers, each of which has an adapter of its own
        raise ModelError(
            f"{base.folder}: several layers share {min(shared)}, so their adapters can't be merged; use the adapter as it is"
        )
    tied = _tied_apart(skeleton, changes)
    to_quantize = _nf4_parameters(base) if onto == "dequantized" else {}

    stacks = _stacks(stored, places, to_quantize)
    planned: list[Planned] = []
    num_changed = 0
    for name, tensor in _with_untied(stored, places, tied):
        place = places.get(name, Place(name))
        source: Blocks = tensor.blocks
        of_parameter = changes.get(place.parameter, [])
        is_requantized = place.parameter in to_quantize
        if (of_parameter or is_requantized) and place.is_opaque:
            raise ModelError(
                f"{name}: transformers puts it into {place.parameter} in a way that qorpo can't take apart; save the "
                "base anew with save_pretrained"
            )
        if is_requantized and place.parameter in stacks:
            source = dequantized_part(tensor, stacks[place.parameter])
        elif is_requantized:
            source = dequantized(tensor, transposed=to_quantize[place.parameter])
        elif of_parameter:
            source = tensor.float_blocks
        shape, num_changed = tensor.shape, num_changed + bool(of_parameter)
        for change in of_parameter:
            shape = _shape_after(change, name, shape, place)
            source = _then(change, source, place)
        kept = tensor.dtype if dtype is None or not tensor.dtype.is_floating_point else dtype
        planned.append(Planned(name, kept, shape, source))
    return Plan(
        shards=plan_shards(planned, max_shard_bytes),
        config=_config(base.raw_config, dtype, vocabulary, untied=bool(tied)),
        changed=num_changed,
    )


def _check_base(
    folder: Path, skeleton: Skeleton, places: Mapping[str, Place], stored: Mapping[str, Stored]
) -> None:
    problems = skeleton.misshapen(places, stored)
    if missing := skeleton.missing(places):
        problems.append(
            f"{len(missing)} tensors are missing, such as {missing[0]}; is the download complete?"
        )
    if problems:
        raise ModelError(
            "\n  ".join([f"{folder}: config.json and weights are not one model's", *problems[:6]])
        )


def _all_changes(
    base: Base, trained: Sequence[Trained], skeleton: Skeleton
) -> tuple[dict[str, list[Change]], int | None]:
    """Every adapter's changes, in turn, and how many tokens the model has after them, where that changes."""
    problems, changes = [], dict[str, list[Change]]()
    tokens = base.config.get_text_config().vocab_size
    vocabulary = tokens
    for each in trained:
        vocabulary = each.adapter.vocabulary(skeleton.model) or vocabulary
        config = deepcopy(base.config)
        config.get_text_config().vocab_size = vocabulary
        try:
            made = each.adapter.changes(Skeleton.of(config, trust_remote_code=base.trust_remote_code))
        except ModelError as error:
            problems.append(str(error))
            continue
        for parameter, entries in made.items():
            changes.setdefault(parameter, []).extend(entries)
    if vocabulary != tokens and not problems:
        left = [
            name for name in embedding_names(skeleton.model) if not _grows(changes.get(name, []), vocabulary)
        ]
        tied_to = {other for name in changes for other in skeleton.tied.get(name, ())}
        if left := [name for name in left if name not in tied_to]:
            problems.append(
                f"the adapter has {vocabulary} tokens and the base {tokens}, but {left[0]} is not in it"
            )
    if problems:
        raise ModelError("\n".join(problems))
    return changes, vocabulary if vocabulary != tokens else None


def _grows(changes: Sequence[Change], vocabulary: int) -> bool:
    inner = [change.change if isinstance(change, Weighted) else change for change in changes]
    return any(isinstance(change, Replaced) and change.by.shape[0] == vocabulary for change in inner)


def _tied_apart(skeleton: Skeleton, changes: Mapping[str, list[Change]]) -> dict[str, str]:
    """Names that no longer share a parameter after the changes, each with the one it shared it with."""
    apart = {}
    for name, names in skeleton.tied.items():
        first = names[0]
        if name != first and changes.get(name, []) != changes.get(first, []):
            apart[name] = first
    return apart


def _with_untied(
    stored: Mapping[str, Stored], places: dict[str, Place], tied: Mapping[str, str]
) -> list[tuple[str, Stored]]:
    """The checkpoint's tensors, and those that had no tensor of their own as long as they were tied."""
    tensors = list(stored.items())
    homes = {place.parameter: name for name, place in places.items()}
    for name, first in tied.items():
        for new, old in ((name, first), (first, name)):
            if new not in homes:
                places[new] = Place(new)
                tensors.append((new, stored[homes[old]]))
    return tensors


def _nf4_parameters(base: Base) -> dict[str, bool]:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            "--onto dequantized needs bitsandbytes, which is not installed; pip install bitsandbytes"
        )
    return Skeleton.of(base.config, trust_remote_code=base.trust_remote_code).quantized()


def _stacks(
    stored: Mapping[str, Stored], places: Mapping[str, Place], to_quantize: Mapping[str, bool]
) -> dict[str, StackScales]:
    """Parameters in 4 bits that the checkpoint keeps in parts, with the scales that the whole of each has."""
    parts: dict[str, list[tuple[int, int, Stored]]] = {}
    for name, place in places.items():
        of_one = prod(stored[name].shape[-2:])
        is_stack = place.expert is not None or len(stored[name].shape) == 3
        if is_stack and place.parameter in to_quantize and of_one % BLOCK_SIZE:
            raise ModelError(
                f"{name}: an expert's {of_one} weights are no whole number of blocks of {BLOCK_SIZE}; merge onto the original"
            )
        if place.expert is not None and place.parameter in to_quantize:
            parts.setdefault(place.parameter, []).append((place.expert, place.part, stored[name]))
    return {
        name: StackScales([tensor for *_, tensor in sorted(found, key=lambda part: part[:2])])
        for name, found in parts.items()
    }


def _shape_after(change: Change, name: str, shape: tuple[int, ...], place: Place) -> tuple[int, ...]:
    inner = change.change if isinstance(change, Weighted) else change
    if not isinstance(inner, Replaced):
        return shape
    if place.expert is not None:
        raise ModelError(
            f"{name}: experts trained whole can't be merged into a checkpoint that keeps them apart"
        )
    if isinstance(change, Weighted) and inner.by.shape != shape:
        raise ModelError(
            f"{name}: {inner.by.shape} can't be weighed against the base's {shape}; merge it whole"
        )
    return inner.by.shape


def _then(change: Change, source: Blocks, place: Place) -> Blocks:
    """The change applied when it is streamed, so that an adapter's matrices are read one tensor at a time."""
    return lambda: change.apply(source, place)()


def _config(
    raw: dict[str, Any], dtype: torch.dtype | None, vocabulary: int | None, *, untied: bool
) -> dict[str, Any]:
    config = deepcopy(raw)
    for section in (config, config.get("text_config") or {}):
        if dtype is not None and (section is config or "torch_dtype" in section or "dtype" in section):
            for key in [key for key in ("dtype", "torch_dtype") if key in section] or ["torch_dtype"]:
                section[key] = str(dtype).removeprefix("torch.")
        if vocabulary is not None and "vocab_size" in section:
            section["vocab_size"] = vocabulary
        if untied and (section is config or "tie_word_embeddings" in section):
            section["tie_word_embeddings"] = False
    return config
