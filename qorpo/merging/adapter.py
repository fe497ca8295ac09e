"""What an adapter changes, tensor by tensor: read from PEFT's own model without weights, applied to streams of blocks.

PEFT is asked what its configuration means (targets, ranks and alphas by pattern, rsLoRA, which way a layer keeps its
matrix), so nothing of that is guessed here. Legend: r rank, E experts.
"""

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.lora import layer as lora
from peft.tuners.lora.variants import DoraEmbeddingVariant, DoraLinearVariant
from peft.utils import TrainableTokensWrapper

from qorpo.errors import ModelError
from qorpo.merging.shards import Block, Blocks, Stored, read_tensors
from qorpo.merging.skeleton import Place, Skeleton, embedding_names
from qorpo.model.targets import targets_as_given

PREFIX = "base_model.model."
NAME = "default"
# Where PEFT saves embeddings too, it writes those of modules to save again, by the names that they have in its model.
_COPIES = re.compile(r"\.(modules_to_save|original_module)\.")
# Other ways to begin change the base's own weights, which a saved adapter does not hold.
KNOWN_BEGINNINGS = (True, False, "gaussian", "eva", "orthogonal")


# --- changes ---


@dataclass(frozen=True)
class LowRank:
    """W + scaling · B A, and DoRA's magnitude over the norm of that where there is one."""

    a: Stored  # (r, in)
    b: Stored  # (out, r)
    scaling: float
    is_transposed: bool  # the matrix is kept (in, out): GPT-2's Conv1D, embeddings
    magnitude: Stored | None = None  # (out,)

    def apply(self, base: Blocks, place: Place) -> Blocks:
        a, b = self.a.load(), self.b.load()
        left, right = (a.T, b.T) if self.is_transposed else (b, a)

        def added() -> Iterator[Block]:
            for start, values in base():
                yield Block(
                    start, values.addmm_(left[start : start + len(values)], right, alpha=self.scaling)
                )

        if self.magnitude is None:
            return added
        magnitude = self.magnitude.load()

        def scaled() -> Iterator[Block]:
            if self.is_transposed:
                # An output's norm runs over all rows, so the first pass is for norms alone.
                squares = torch.stack([values.square().sum(0) for _, values in added()]).sum(0)
                for start, values in added():
                    yield Block(start, values.mul_(magnitude / torch.sqrt(squares)))
                return
            for start, values in added():
                of_rows = magnitude[start : start + len(values)] / torch.linalg.norm(values, dim=1)
                yield Block(start, values.mul_(of_rows[:, None]))

        return scaled


@dataclass(frozen=True)
class ExpertsLowRank:
    """LoRA on a parameter that stacks E experts' matrices."""

    a: Stored  # (r·E, in), an expert's rows together
    b: Stored  # (out, r·E), a rank's columns together
    scaling: float
    num_experts: int
    is_transposed: bool  # the matrices are kept (in, out)

    def apply(self, base: Blocks, place: Place) -> Blocks:
        a, b = self.a.load(), self.b.load()
        a = a.reshape(self.num_experts, -1, a.shape[-1])  # (E, r, in)
        b = b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)  # (E, out, r)
        left, right = (a.mT, b.mT) if self.is_transposed else (b, a)
        if place.expert is not None:
            left, right = left[place.expert].chunk(place.parts)[place.part], right[place.expert]

        def added() -> Iterator[Block]:
            for start, values in base():
                rows = slice(start, start + len(values))
                if place.expert is not None:
                    yield Block(start, values.addmm_(left[rows], right, alpha=self.scaling))
                else:
                    yield Block(start, values.baddbmm_(left[rows], right[rows], alpha=self.scaling))

        return added


@dataclass(frozen=True)
class Replaced:
    """A tensor trained whole: a module to save, a bias, resized embeddings."""

    by: Stored

    def apply(self, base: Blocks, place: Place) -> Blocks:
        return self.by.float_blocks


@dataclass(frozen=True)
class RowsReplaced:
    """Embeddings of single tokens."""

    by: Stored  # (tokens, width)
    rows: tuple[int, ...]

    def apply(self, base: Blocks, place: Place) -> Blocks:
        rows, trained = torch.tensor(self.rows), self.by.load()

        def replaced() -> Iterator[Block]:
            for start, values in base():
                here = (rows >= start) & (rows < start + len(values))
                values[rows[here] - start] = trained[here]
                yield Block(start, values)

        return replaced


@dataclass(frozen=True)
class BiasAdded:
    """A bias on LoRA's second matrix."""

    by: Stored  # (out,)
    scaling: float

    def apply(self, base: Blocks, place: Place) -> Blocks:
        added = self.by.load() * self.scaling
        return lambda: (
            Block(start, values.add_(added[start : start + len(values)])) for start, values in base()
        )


@dataclass(frozen=True)
class Weighted:
    """Another change by a fraction: W + weight · (changed W − W)."""

    change: Any
    weight: float

    def apply(self, base: Blocks, place: Place) -> Blocks:
        changed = self.change.apply(base, place)
        return lambda: (
            Block(start, before.lerp_(after, self.weight))
            for (start, before), (_, after) in zip(base(), changed(), strict=True)
        )


Change = LowRank | ExpertsLowRank | Replaced | RowsReplaced | BiasAdded | Weighted

# --- an adapter's folder ---


@dataclass(frozen=True)
class Adapter:
    """A folder in PEFT's format; only its headers are read."""

    folder: Path
    config: Any  # of peft
    stored: Mapping[str, Stored]
    weight: float = 1.0

    @classmethod
    def open(cls, folder: Path, weight: float = 1.0, *, allow_pickle: bool = False) -> "Adapter":
        """Raises ModelError for a folder that holds no adapter, or one that is not LoRA."""
        try:
            raw = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
            if raw["peft_type"] != "LORA":
                raise ModelError(f"{folder}: a {raw['peft_type']} adapter; qorpo merges LoRA")
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = PeftConfig.from_pretrained(str(folder))
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise ModelError(f"{folder}: adapter_config.json can't be read: {error}") from error
        safe, pickled = folder / "adapter_model.safetensors", folder / "adapter_model.bin"
        if not safe.is_file() and not (allow_pickle and pickled.is_file()):
            raise ModelError(f"{folder}: no adapter_model.safetensors; is the adapter whole?")
        return cls(folder, config, read_tensors(safe if safe.is_file() else pickled), weight)

    @property
    def is_plain(self) -> bool:
        """Nothing but LoRA's two matrices: the sum of several is each one's."""
        return not self.config.use_dora and all("lora_" in key for key in self.stored)

    def vocabulary(self, model: Any) -> int | None:
        """Rows of the embeddings or the output head that it holds whole; None where it holds neither."""
        names = embedding_names(model)
        rows = [tensor.shape[0] for key, tensor in self.stored.items() if _whole_parameter(key) in names]
        return rows[0] if rows else None

    def changes(self, skeleton: Skeleton) -> dict[str, list[Change]]:
        """What it does to each of the model's parameters, in order.

        Args:
            skeleton: the base's, with as many tokens as the adapter has; it is used up.

        Raises:
            ModelError: with all that is not supported, or does not fit the base.
        """
        shapes, tied = skeleton.shapes, skeleton.tied
        model = self._attached(skeleton)
        expected = get_peft_model_state_dict(model, save_embedding_layers=False)
        problems = self._misfits({key: tuple(value.shape) for key, value in expected.items()}, shapes)
        changes: dict[str, list[Change]] = {}

        def change(parameter: str, by: Change) -> None:
            changes.setdefault(parameter, []).append(by)

        for key, tensor in self.stored.items():
            parameter = _whole_parameter(key)
            if parameter in shapes and key in expected:
                change(parameter, Replaced(tensor))
            elif parameter in shapes and not any(name in changes for name in tied.get(parameter, ())):
                # Not trained, but the base's own embeddings with tokens added: all that are tied to them share it.
                for name in tied.get(parameter, (parameter,)):
                    change(name, Replaced(tensor))
        if self.config.ensure_weight_tying:  # saved once under each name, and equal
            changes |= {name: [*changes[names[0]]] for name, names in tied.items() if names[0] in changes}
        token_keys: dict[int, str] = {}
        for name, module in model.base_model.model.named_modules():
            if isinstance(module, TrainableTokensWrapper):
                layer = module.token_adapter
                key = token_keys.setdefault(
                    id(layer.tied_adapter or layer), f"{PREFIX}{name}.token_adapter.trainable_tokens_delta"
                )
                if key in self.stored:
                    rows = tuple(layer.token_indices[NAME])
                    change(f"{_plain(name)}.weight", RowsReplaced(self.stored[key], rows))
            elif isinstance(module, LoraLayer) and NAME in module.r:
                refusal = _refusal(module)
                if refusal is None and self.config.ensure_weight_tying and f"{_plain(name)}.weight" in tied:
                    refusal = "LoRA on tied embeddings with ensure_weight_tying"
                if refusal is not None:
                    problems.append(f"{name}: {refusal} is not supported")
                elif all(key in self.stored for key in expected if key.startswith(f"{PREFIX}{name}.lora_")):
                    for parameter, by in self._low_rank(name, module, shapes):
                        change(parameter, by)
        if problems:
            raise ModelError("\n  ".join([f"{self.folder}: does not fit the base", *_few(problems)]))
        return {name: [self._weighted(each) for each in entries] for name, entries in changes.items()}

    def _attached(self, skeleton: Skeleton) -> Any:
        """PEFT's model with this adapter, without weights."""
        config = deepcopy(self.config)
        unsupported = [
            f"{key} ({value})"
            for key, value in (
                ("layer_replication", config.layer_replication),
                ("megatron_config", config.megatron_config),
                ("init_lora_weights", None if config.init_lora_weights in KNOWN_BEGINNINGS else config.init_lora_weights),
            )
            if value
        ]  # fmt: skip
        if unsupported:
            raise ModelError(
                f"{self.folder}: adapter_config.json has {', '.join(unsupported)}, which qorpo can't merge"
            )
        config.init_lora_weights = True
        config.inference_mode = True
        try:
            with warnings.catch_warnings(), targets_as_given(skeleton.model, self.stored):
                warnings.simplefilter("ignore")
                return PeftModel(skeleton.model, config, adapter_name=NAME, low_cpu_mem_usage=True)
        except (ValueError, KeyError, TypeError, NotImplementedError) as error:  # PEFT's ways to refuse
            raise ModelError(f"{self.folder}: does not fit the base: {str(error).splitlines()[0]}") from error

    def _misfits(
        self, expected: Mapping[str, tuple[int, ...]], shapes: Mapping[str, tuple[int, ...]]
    ) -> list[str]:
        """A line for each tensor that is missing, unknown, or of another shape than the base asks for."""
        problems = []
        for key, shape in expected.items():
            if key not in self.stored:
                problems.append(f"{key} is missing from the adapter")
            elif self.stored[key].shape != shape:
                problems.append(f"{key} is {self.stored[key].shape}, and by the base {shape}")
        for key in sorted(self.stored.keys() - expected.keys()):
            if _COPIES.search(key):
                continue
            parameter = _whole_parameter(key)
            if parameter is None or parameter not in shapes:
                problems.append(f"{key} belongs to nothing in the base")
            elif self.stored[key].shape != shapes[parameter]:
                problems.append(f"{key} is {self.stored[key].shape}, and by the base {shapes[parameter]}")
        return problems

    def _low_rank(
        self, name: str, module: Any, shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Change]]:
        def stored(suffix: str) -> Stored:
            return self.stored[f"{PREFIX}{name}.{suffix}"]

        path, scaling = _plain(name), module.scaling[NAME]
        if isinstance(module, lora.ParamWrapper):
            parameter = f"{path}.{module.parameter_name}"
            a, b = stored("lora_A.weight"), stored("lora_B.weight")
            if len(shapes[parameter]) == 2:
                yield parameter, LowRank(a, b, scaling, False)
            else:
                is_transposed = not getattr(module, "_did_swap_in_out_features", False)
                yield parameter, ExpertsLowRank(a, b, scaling, module.num_experts, is_transposed)
            return
        magnitude = stored("lora_magnitude_vector") if module.use_dora[NAME] else None
        if isinstance(module, lora.Embedding):
            a, b = stored("lora_embedding_A"), stored("lora_embedding_B")
            yield f"{path}.weight", LowRank(a, b, scaling, True, magnitude)
            return
        a, b = stored("lora_A.weight"), stored("lora_B.weight")
        yield f"{path}.weight", LowRank(a, b, scaling, bool(module.fan_in_fan_out), magnitude)
        if module.lora_bias[NAME]:
            yield f"{path}.bias", BiasAdded(stored("lora_B.bias"), scaling)

    def _weighted(self, change: Change) -> Change:
        if self.weight == 1.0:
            return change
        if isinstance(change, LowRank | ExpertsLowRank | BiasAdded) and not getattr(
            change, "magnitude", None
        ):
            return replace(change, scaling=change.scaling * self.weight)
        return Weighted(change, self.weight)


def _refusal(module: Any) -> str | None:
    """What of a LoRA layer is not supported, by its name."""
    if type(module) not in (lora.Linear, lora.Embedding, lora.ParamWrapper):
        return f"LoRA on {type(module.get_base_layer()).__name__}"
    variant = module.lora_variant.get(NAME)
    variant = variant if isinstance(variant, type) or variant is None else type(variant)
    return None if variant in (None, DoraLinearVariant, DoraEmbeddingVariant) else variant.__name__


def _plain(name: str) -> str:
    """A module's name in the base: without PEFT's wrappers."""
    return name.replace(".base_layer", "").replace(".token_adapter", "")


def _whole_parameter(key: str) -> str | None:
    """The parameter that an adapter's tensor takes the place of; None for LoRA's own."""
    if "lora_" in key or "trainable_tokens_" in key or _COPIES.search(key):
        return None
    return _plain(key.removeprefix(PREFIX))


def _few(problems: list[str], shown: int = 6) -> list[str]:
    rest = len(problems) - shown
    return [*problems[:shown], *([f"and {rest} more"] if rest > 0 else [])]
