"""The recipe's keys with their defaults and bounds, section by section."""

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Annotated, Any

import yaml
from pydantic import (
    BeforeValidator,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from qorpo.recipe.objectives import DEFAULT, OBJECTIVES, ObjectiveRecipe
from qorpo.recipe.values import (
    Attention,
    AutoCount,
    AutoFlag,
    AutoLayers,
    AutoPositive,
    BelowOne,
    Columns,
    Count,
    Every,
    Flag,
    Fraction,
    Keys,
    LongPrompts,
    LongResponses,
    LoraInit,
    Names,
    NotNegative,
    OnBadRecord,
    Optimizer,
    Positive,
    Quantization,
    RankedPairs,
    Schedule,
    Seed,
    Shape,
    Sharding,
    Targets,
    Text,
    Trackers,
    TrainTurns,
    Tuning,
    expects,
    key,
    listed,
    shown,
)


class ModelRecipe(Keys):
    path: Text = key(..., "The base model: a local folder, a hub id, or demo (qorpo's own tiny one).")
    revision: Text | None = key(None, "Branch, tag or commit of a hub model; null: its default branch.")
    adapter: Text | None = key(
        None, "An adapter to go on from: a run's folder, an adapter's in PEFT's format, or a hub id."
    )
    quantization: Quantization = key(
        "auto", "Weights of the frozen base: nf4 (4 bits) or none; auto: nf4, or none for full."
    )
    attention: Attention = key("auto", "Attention over shared prompts; auto: chosen as the model loads.")
    liger: AutoFlag = key("auto", "liger-kernel's RMSNorm, RoPE, SwiGLU or GeGLU; auto: where CUDA is.")
    chat_template: Text | None = key(None, "A Jinja file to use in place of the tokenizer's template.")
    trust_remote_code: Flag = key(False, "Run Python code that comes with the model.")
    allow_pickle: Flag = key(False, "Where there is no safetensors, load .bin weights (tensors only).")


class LoraRecipe(Keys):
    rank: Count = key(16, "Rank of the adapters.")
    alpha: Count = key(32, "The adapters' output is scaled by alpha / rank.")
    dropout: BelowOne = key(0.0, "Dropout on the adapters' input.")
    targets: Targets = key(
        "all-linear",
        "Modules with an adapter: all-linear (but the head, routers and experts), all-linear+experts, or names.",
    )
    modules_to_save: Names = key((), "Modules to train whole and save too, such as embed_tokens.")
    use_rslora: Flag = key(False, "Scale the adapters' output by alpha / √rank instead (rsLoRA).")
    use_dora: Flag = key(False, "Train the length of weights' rows apart from their direction (DoRA).")
    init: LoraInit = key(
        "default", "How new adapters begin, as PEFT's init_lora_weights: default, gaussian, orthogonal."
    )


class SourceRecipe(Keys):
    """A source of pairs with more to it than its path."""

    path: Text
    config: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    weight: Positive = 1.0
    shape: Shape | None = None
    columns: Columns = key({}, "As data.columns.")


Sources = Annotated[tuple[Text | SourceRecipe, ...], Field(min_length=1), BeforeValidator(listed)]
_SOURCE = "a file, a folder, a hub id, demo, or a list of these, each also with keys " + ", ".join(
    SourceRecipe.model_fields
)
TrainSources = Annotated[Sources, expects(_SOURCE)]
EvalSources = Annotated[
    Fraction | Sources | None, expects(f"a fraction of train between 0 and 1, null, or {_SOURCE}")
]


class DataRecipe(Keys):
    train: TrainSources = key(
        ...,
        "Pairs (for sft and kto also rows of one answer) to train on: a file, folder, hub id, demo, or a list of these.",
    )
    eval: EvalSources = key(None, "Pairs to evaluate on: the same, or a fraction of train; null: none.")
    shape: Shape | None = key(None, "How records are laid out; null: told from their columns.")
    columns: Columns = key({}, "Names of columns, qorpo's to the records' own: {prompt: query}.")
    ranked_pairs: RankedPairs = key("best-worst", "Which of several ranked answers to a prompt make pairs.")
    min_margin: NotNegative = key(
        0.0, "Least difference of scores (or of a preference: 0 tie, 1 sure) to keep."
    )
    max_length: Count = key(2048, "Most tokens in a prompt with one of its answers.")
    max_prompt_length: Count = key(1024, "Most tokens in a prompt, under max_length.")
    long_prompts: LongPrompts = key(
        "drop", "A pair with a prompt over max_prompt_length: drop it, or keep_end."
    )
    long_responses: LongResponses = key("cut", "An answer over max_length: cut it, or drop the pair.")
    train_turns: TrainTurns | None = key(
        None, "Answers of a conversation that sft learns: last or all; null: all, but of a pair the last."
    )
    on_bad_record: OnBadRecord = key(
        "fail", "At a record that makes no sense: fail, or skip it and count it."
    )

    @field_validator("max_prompt_length")
    @classmethod
    def _leaves_room_for_an_answer(cls, prompt: int, info: ValidationInfo) -> int:
        # A field's validator, not the model's: it runs whatever is wrong with the section's other fields.
        longest = info.data.get("max_length")
        if longest is not None and prompt >= longest:
            text = f"max_prompt_length ({prompt}) must be less than max_length ({longest})"
            raise PydanticCustomError("section", "{text}; lower it or raise max_length", {"text": text})
        return prompt


class TrainRecipe(Keys):
    groups_per_step: Count | None = key(
        None,
        "pairs_per_step by its general name: for sft rows, each with one answer or several.",
        exclude=True,
    )
    pairs_per_step: Count = key(None, "Preference pairs to one optimizer step, over all GPUs; null: 32.")
    learning_rate: AutoPositive = key(
        "auto",
        "The highest learning rate, at the end of warm-up; auto: 1e-4, or the paper's for full: 8e-6, sft 1e-5, dpo 5e-6.",
    )
    epochs: AutoPositive = key(
        "auto",
        "Passes over the training pairs; auto: 1, or the paper's for full: 10, sft 1, dpo 3. Fractions are fine.",
    )
    max_steps: Count | None = key(None, "Optimizer steps to take; where given, it wins over epochs.")
    warmup_ratio: BelowOne = key(
        0.1, "Fraction of the steps over which the learning rate climbs; the first of them learns too."
    )
    schedule: Schedule = key("cosine", "The learning rate's course after warm-up.")
    optimizer: Optimizer = key(
        "auto",
        "AdamW of bitsandbytes or torch; auto: paged_adamw_8bit, or adamw_torch_fused for full or sharded.",
    )
    lora_plus_ratio: Positive | None = key(
        None, "Adapters' B matrices learn at so many times the rate (LoRA+, such as 16); null: at the same."
    )
    weight_decay: NotNegative = key(0.0, "AdamW's decoupled weight decay.")
    adam_beta1: BelowOne = key(0.9, "AdamW's decay of the gradient's running average.")
    adam_beta2: BelowOne = key(0.999, "AdamW's decay of the squared gradient's running average.")
    adam_epsilon: Positive = key(1e-8, "AdamW's term against division by zero.")
    max_grad_norm: NotNegative | None = key(
        1.0, "Longer gradients are clipped to this norm; 0 or null: never."
    )
    seed: Seed = key(42, "Seed of all that is random: adapters, order of pairs, evaluation split, dropout.")
    eval_every: Every = key(0.1, "How often to evaluate: below 1 in epochs, from 1 on in steps.")
    early_stopping: Count | None = key(
        None,
        "Evaluations in a row without a better one after which the run ends; null: it goes to its last step.",
    )
    save_every: Every = key(0.1, "How often to save a checkpoint: below 1 in epochs, from 1 on in steps.")
    log_every: Count = key(1, "Steps from one log line to the next; metrics.jsonl has every step.")
    keep_checkpoints: Count = key(2, "How many of the latest checkpoints to keep.")
    report_to: Trackers = key("auto", "Experiment trackers; auto: tensorboard where installed; []: none.")

    @field_validator("pairs_per_step", mode="before")
    @classmethod
    def _is_one_number_by_two_names(cls, pairs: Any, info: ValidationInfo) -> Any:
        groups = info.data.get("groups_per_step")
        if pairs is not None and groups is not None and groups != pairs:
            text = f"pairs_per_step ({shown(pairs)}) and groups_per_step ({groups}) are one key by two names"
            raise PydanticCustomError("section", "{text}; leave one out", {"text": text})
        if groups is not None:
            return groups
        return 32 if pairs is None else pairs  # 0 is refused after this


class MemoryRecipe(Keys):
    budget_gib: AutoPositive = key(
        "auto", "Memory to stay within, CUDA's own included; auto: all that is free on the card."
    )
    microbatch_tokens: AutoCount = key("auto", "Tokens in a forward pass; auto: planned, 4096 at most.")
    logprob_chunk_tokens: AutoCount = key("auto", "Tokens with logits at once; auto: planned, 1024 at most.")
    activation_checkpointing: AutoLayers = key(
        "auto", "Recompute layers in backward: true, false, or how many; auto: as many as the plan needs."
    )
    activation_offload: AutoFlag = key(
        "auto", "Keep recomputed layers' inputs in host memory; auto: only where the plan needs it."
    )
    sharding: Sharding = key(
        "auto",
        "Weights over several GPUs: none (each has all), full, hybrid (within nodes); auto: none, or full for --full.",
    )


class Recipe(Keys):
    model: ModelRecipe = key(..., "The base model.")
    tuning: Tuning = key(
        "lora", "What trains: lora adapters, or full, all of the model's parameters (--full)."
    )
    lora: LoraRecipe = key(..., "The adapters trained on it.")
    data: DataRecipe = key(..., "The preference pairs.")
    objective: ObjectiveRecipe = key(..., "The loss and its keys.", discriminator="name")
    train: TrainRecipe = key(..., "The optimization.")
    memory: MemoryRecipe = key(..., "Memory against speed; the result stays the same.")
    output: Text = key(..., "The run folder, which the run makes.")

    @model_validator(mode="before")
    @classmethod
    def _absent_sections_are_empty(cls, raw: dict[str, Any]) -> dict[str, Any]:
        # So that keys missing in them are named by their full path. YAML reads a heading without keys as null.
        sections = (name for name in cls.model_fields if name not in ("output", "tuning"))
        raw = {**raw, **{name: {} for name in sections if raw.get(name) is None}}
        if isinstance(raw["objective"], dict):
            raw["objective"] = {"name": DEFAULT, **raw["objective"]}
        return raw

    @field_validator("objective")
    @classmethod
    def _learns_the_turns_asked_for(cls, objective: Any, info: ValidationInfo) -> Any:
        data = info.data.get("data")
        if data is not None and data.train_turns and objective.name != "sft":
            text = f"{objective.name} learns the last answer, and data.train_turns is {data.train_turns}"
            raise PydanticCustomError(
                "section", "{text}; leave that out, or set the name to sft", {"text": text}
            )
        return objective

    def to_dict(self) -> dict[str, Any]:
        """The recipe as a YAML file holds it: plain values, `lambda` by that name."""
        return self.model_dump(mode="json", by_alias=True)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the recipe so that `load_recipe(path)` gives an equal one."""
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def replace(self, key: str, value: Any) -> "Recipe":
        """A copy with one key changed, checked anew: `recipe.replace("model.attention", "sdpa")`."""
        from qorpo.recipe.reading import load_recipe  # which makes Recipes

        raw = self.to_dict()
        set_key(raw, key, value)
        return load_recipe(raw)

    def values(self) -> list[tuple[str, Any]]:
        """Every key by its dotted path, with its plain value."""
        return list(_values(self.to_dict()))

    def differences(self, other: "Recipe", ignoring: Collection[str] = ()) -> list[str]:
        """What changed from this recipe, the saved run's, to `other`, the one given now; one line a key.

        `ignoring` names keys ("train.log_every") and whole sections ("memory").
        """
        saved, now = dict(self.values()), dict(other.values())
        # Objectives have different keys.
        was = {key: shown(saved[key]) if key in saved else "absent" for key in [*saved, *now]}
        is_now = {key: shown(now[key]) if key in now else "absent" for key in was}
        return [
            f"{key}: {was[key]} in the saved run, {is_now[key]} now"
            for key in was
            if saved.get(key) != now.get(key) and not {key, key.split(".")[0]} & set(ignoring)
        ]


OTHER_NAMES = {"groups_per_step": "pairs_per_step", "pairs_per_step": "groups_per_step"}


def set_key(raw: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    if not section:
        raw[key] = value
        return
    if raw.get(section) is None:
        raw[section] = {}
    if isinstance(raw[section], dict):  # else the section's own problem is reported
        raw[section].pop(OTHER_NAMES.get(key), None)
        raw[section][key] = value


def _values(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, field in Recipe.model_fields.items():
        yield name, field
        for keys in OBJECTIVES.values() if name == "objective" else [field.annotation]:
            if isinstance(keys, type) and issubclass(keys, Keys):
                yield from ((f"{name}.{key}", inner) for key, inner in keys.names().items())


FIELDS = dict(_fields())
"""Every key by its full path, a section before the keys in it, with pydantic's account: description, default."""
