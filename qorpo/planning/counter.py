"""Peaks of one recipe's step under any memory settings: counted over every layer, or estimated from a few."""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers import PretrainedConfig

from qorpo.data.groups import GroupLengths
from qorpo.errors import ModelError, PlanError
from qorpo.model.parts import decoder_layers
from qorpo.model.scoring import Mode
from qorpo.model.selfcheck import varlen_has_all
from qorpo.planning.fake_model import make_fake_model, shortened
from qorpo.planning.foreign import foreign_code
from qorpo.planning.live_bytes import Peak
from qorpo.planning.step_memory import HEAD, StepMemory, StepShape, step_memory
from qorpo.recipe import Recipe

FEW_LAYERS = 6
"""Models of no more layers are always counted whole."""


@dataclass(frozen=True)
class MemorySettings:
    """What the recipe's memory section comes to, once nothing in it is `auto`."""

    microbatch_tokens: int
    chunk_tokens: int
    checkpointed_layers: int  # from the first layer on
    offload: bool


class StepCounter:
    """Counts steps of a model that trains by a recipe.

    Args:
        config: the model's.
        recipe: resolved; its memory section is not read.
        longest: the longest group there can be; rows are filled with groups as long.
        dtype: of the base's weights that are not quantized.
        ranks: processes that share each step's pairs; under `memory.sharding: full` they share the weights too.
        modes: ways to attend, of which the first that the model takes is counted; None: as its load would try them.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        recipe: Recipe,
        *,
        longest: GroupLengths,
        modes: list[Mode] | None = None,
        on_cuda: bool,
        dtype: torch.dtype = torch.bfloat16,
        ranks: int = 1,
    ):
        self.ranks = ranks
        self.config, self.recipe, self.longest = config, recipe, longest
        self.on_cuda, self.dtype = on_cuda, dtype
        with foreign_code():  # a config may compute what it is asked for
            self.modes = modes or likely_modes(config, recipe.model.attention, on_cuda=on_cuda)
            layers_told = getattr(config.get_text_config(), "num_hidden_layers", None)
        model, _ = make_fake_model(config, recipe)
        layers = decoder_layers(model)
        shapes = [[parameter.shape for parameter in layer.parameters()] for layer in layers]
        self.num_layers = len(layers)
        # Else layers of the model are not what its config counts, or not worth the same.
        self.can_shorten = len(layers) == layers_told and all(shape == shapes[0] for shape in shapes)
        self.num_trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        self._counted: dict[tuple[Any, ...], StepMemory] = {}

    def changed(
        self,
        recipe: Recipe | None = None,
        longest: GroupLengths | None = None,
        ranks: int | None = None,
    ) -> "StepCounter":
        """The same for another recipe (its rank, optimizer, quantization), longest group or number of ranks."""
        other = copy.copy(self)
        other.recipe, other.longest = recipe or self.recipe, longest or self.longest
        other.ranks = ranks or self.ranks
        other._counted = {}
        return other

    def rows(self, settings: MemorySettings) -> tuple[GroupLengths, ...]:
        """The groups of the largest micro-batch there can be: the longest, and another in what room they leave."""
        num_whole, left = divmod(settings.microbatch_tokens, sum(self.longest))
        rows = [self.longest] * max(1, num_whole)
        if num_whole and left >= len(self.longest):
            rows.append(group_of(left, self.num_responses))
        return tuple(rows[: self.pairs_per_rank])

    @property
    def num_responses(self) -> int:
        return len(self.longest) - 1

    @property
    def pairs_per_rank(self) -> int:
        """Of one step, at the rank that has most."""
        return -(-self.recipe.train.pairs_per_step // self.ranks)

    @property
    def _shards(self) -> int:
        return 1 if self.recipe.memory.sharding == "none" else self.ranks

    def count(self, settings: MemorySettings) -> StepMemory:
        """The step of the whole model."""
        return self._count(settings, self.num_layers)

    def peak_bytes(self, settings: MemorySettings) -> int:
        """The step's peak, from `peaks`."""
        return max(self.peaks(settings).values())

    def peaks(self, settings: MemorySettings) -> dict[str, int]:
        """Bytes by stretch of the step, from `estimate`."""
        return {name: peak.total_bytes for name, peak in self.estimate(settings).peaks.items()}

    def estimate(self, settings: MemorySettings) -> StepMemory:
        """The step of the whole model, from steps of models of its first two to six layers.

        Equal layers need the same each, so each stretch named by `layer_place` grows in a line with the layers that
        are recomputed and with those that are kept, and so does each kind in it. Small models, and those of unequal
        layers, are counted whole.
        """
        recomputed, kept = settings.checkpointed_layers, self.num_layers - settings.checkpointed_layers
        if self.num_layers <= FEW_LAYERS or not self.can_shorten:
            return self.count(settings)
        # Sharded, a layer between others needs most: weights of the one after it are there, and of the one before it.
        most = 3 if self._shards > 1 else 2
        few_checkpointed, few_kept = min(recomputed, most), min(kept, most - 1 if recomputed else most)

        def of(recomputed: int, kept: int) -> StepMemory:
            return self._count(replace(settings, checkpointed_layers=recomputed), recomputed + kept)

        found = of(few_checkpointed, few_kept)
        if kept > few_kept:
            found = _continued(found, found, of(few_checkpointed, few_kept + 1), kept - few_kept)
        if recomputed > few_checkpointed:
            # Counted without kept layers, for which every number of recomputed ones comes in handy.
            one, two = of(few_checkpointed, 0), of(few_checkpointed + 1, 0)
            found = _continued(found, one, two, recomputed - few_checkpointed)
        return found

    def _count(self, settings: MemorySettings, num_layers: int) -> StepMemory:
        rows = self.rows(settings)
        key = rows, replace(settings, microbatch_tokens=0), num_layers
        if key not in self._counted:
            self._counted[key] = self._count_anew(rows, settings, shortened(self.config, num_layers))
        return self._counted[key]

    def _count_anew(
        self, rows: tuple[GroupLengths, ...], settings: MemorySettings, config: PretrainedConfig
    ) -> StepMemory:
        failures = []
        for mode in self.modes:
            shape = StepShape(
                rows=rows,
                accumulates=len(rows) < self.pairs_per_rank,
                attention=mode,
                chunk_tokens=settings.chunk_tokens,
                checkpointed_layers=settings.checkpointed_layers,
                offload=settings.offload,
                on_cuda=self.on_cuda,
                dtype=self.dtype,
                shards=self._shards,
            )
            try:
                step = step_memory(config, self.recipe, shape)
            except ModelError as error:
                failures.append(f"{mode}: {error}")
            else:
                self.modes = [mode]
                return step
        raise PlanError(f"{config.model_type}: no step of this model can be planned. " + "; ".join(failures))


def _continued(step: StepMemory, one: StepMemory, two: StepMemory, more: int) -> StepMemory:
    """`step` with so many layers more as `two` has one more than `one`."""

    def peak_of(name: str, peak: Peak) -> Peak:
        # At the peaks of kept layers, of which there may be none in these, all inputs are there, as in the head.
        name = name if name in one.peaks else HEAD
        before, after = one.peaks[name].by_kind, two.peaks[name].by_kind
        kinds = peak.by_kind.keys() | before.keys() | after.keys()
        by_kind = {
            kind: peak.by_kind.get(kind, 0) + more * (after.get(kind, 0) - before.get(kind, 0))
            for kind in kinds
        }
        return Peak(sum(by_kind.values()), {kind: size for kind, size in by_kind.items() if size}, peak.where)

    def sum_of(field: str) -> int:
        return getattr(step, field) + more * (getattr(two, field) - getattr(one, field))

    return StepMemory(
        {name: peak_of(name, peak) for name, peak in step.peaks.items()},
        *(sum_of(field) for field in ("host_bytes", "paged_bytes", "num_layers", "traffic_bytes")),
    )


def likely_modes(config: PretrainedConfig, attention: str, *, on_cuda: bool) -> list[Mode]:
    """Ways of attending in the order in which the check at load tries them."""
    if attention != "auto":
        # flash-attn need not be installed here; PyTorch's own kernel keeps the same tensors.
        return ["varlen" if attention == "flash" else attention]  # type: ignore[list-item]
    has_kernel = on_cuda and varlen_has_all(config.get_text_config())
    return [*(["varlen"] if has_kernel else []), "sdpa", "dense", "separate"]  # type: ignore[list-item]


def group_of(row_tokens: int, num_responses: int) -> GroupLengths:
    """The group of so many row tokens that needs most: next to no prompt, so that most of its tokens are scored."""
    size, more = divmod(row_tokens - 1, num_responses)
    return 1, *(size + (number < more) for number in range(num_responses))


def length_within(row_tokens: int, num_responses: int) -> int:
    """The data.max_length whose longest group takes at most so many row tokens; 0 for none."""
    return (row_tokens - 1) // num_responses + 1
