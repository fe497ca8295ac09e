"""A run, written down: the recipe's keys with their defaults and bounds, and how a YAML file becomes one.

`load_recipe` reads, `resolve` replaces every `auto` by what it stands for, `Recipe.save` writes it down again.
Every problem of a recipe is found before any is reported, in one RecipeError. Paths are kept as they were written,
relative to the folder qorpo is started in. No torch here, so the command line answers at once.
"""

import copy
import difflib
import importlib.util
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    ValidationInfo,
    WrapValidator,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticCustomError

from qorpo.errors import RecipeError

# --- kinds of value ---


def expects(text: str) -> WrapValidator:
    """Whatever is wrong with a value of this type, `text` says what belongs there."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("expects", "{text}", {"text": text}) from None

    return WrapValidator(check)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 8e-6 as text, and pydantic takes true for 1; here only the first is a number."""
    if isinstance(value, bool):
        raise ValueError("a truth value is no number")
    return float(value) if isinstance(value, str) else value


def _whole_from_1(every: float) -> float:
    if every >= 1 and every != int(every):
        raise ValueError("no whole number of steps")
    return int(every) if every >= 1 else every


def _text(value: Any) -> Any:
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _list(value: Any) -> Any:
    return [value] if isinstance(value, str | os.PathLike | dict) else value


Auto = Literal["auto"]
Flag = Annotated[StrictBool, expects("true or false")]
AutoFlag = Annotated[Auto | StrictBool, expects("auto, true or false")]

Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
Count = Annotated[Whole, Field(ge=1), expects("a whole number of at least 1")]
AutoCount = Annotated[Auto | Count, expects("auto, or a whole number of at least 1")]
AutoLayers = Annotated[
    Auto | StrictBool | Count, expects("auto, true, false, or how many layers, from the first")
]
Seed = Annotated[Whole, Field(ge=0, lt=2**32), expects("a whole number from 0 to 4294967295")]
Positive = Annotated[Real, Field(gt=0), expects("a number above 0")]
AutoPositive = Annotated[Auto | Positive, expects("auto, or a number above 0")]
NotNegative = Annotated[Real, Field(ge=0), expects("a number of at least 0")]
BelowOne = Annotated[Real, Field(ge=0, lt=1), expects("a number from 0 to below 1")]
Fraction = Annotated[Real, Field(gt=0, lt=1)]
Every = Annotated[Positive, AfterValidator(_whole_from_1), expects("a number above 0, and whole from 1 on")]

Text = Annotated[str, Field(min_length=1), BeforeValidator(_text), expects("text (quote a number or a date)")]
Texts = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(_list)]
Names = Annotated[tuple[Text, ...], BeforeValidator(_list), expects("a list of module names")]
Targets = Annotated[Literal["all-linear"] | Texts, expects("all-linear, or a list of module names")]
Columns = Annotated[
    dict[Text, Text], expects("names of qorpo's and the records' own, such as {prompt: query}")
]

Quantization = Literal["nf4", "none", "auto"]
Attention = Literal["auto", "flash", "varlen", "sdpa", "dense", "separate"]
Tuning = Literal["lora", "full"]
Sharding = Literal["auto", "none", "full", "hybrid"]
OnBadRecord = Literal["fail", "skip"]
Shape = Literal["chosen-rejected", "two-outputs", "scored", "ranked"]
RankedPairs = Literal["best-worst", "adjacent", "all"]
LongPrompts = Literal["drop", "keep_end"]
LongResponses = Literal["cut", "drop"]
NllTokens = Literal["response", "all"]
NllAverage = Literal["sequence", "token"]
Schedule = Literal["cosine", "linear", "inverse_sqrt", "constant"]
Optimizer = Literal[
    "auto", "paged_adamw_8bit", "paged_adamw_32bit", "adamw_8bit", "adamw_torch", "adamw_torch_fused"
]
# What accelerate can report to, each by the name of the module it needs.
TRACKERS = ("aim", "clearml", "comet_ml", "dvclive", "mlflow", "swanlab", "tensorboard", "trackio", "wandb")
Trackers = Annotated[
    Auto | Annotated[tuple[Literal[TRACKERS], ...], BeforeValidator(_list)],  # type: ignore[valid-type]
    expects(f"auto, [] for none, or a list of {', '.join(TRACKERS)}"),
]

# --- the keys ---


def key(default: Any, description: str, **options: Any) -> Any:
    """A key of the recipe; `...` for one that must be given. The description goes into messages and documentation."""
    return Field(default, description=description, **options)


class _Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class ModelRecipe(_Keys):
    path: Text = key(..., "The base model: a local folder, a hub id, or demo (qorpo's own tiny one).")
    revision: Text | None = key(None, "Branch, tag or commit of a hub model; null: its default branch.")
    quantization: Quantization = key(
        "auto", "Weights of the frozen base: nf4 (4 bits) or none; auto: nf4, or none for full."
    )
    attention: Attention = key("auto", "Attention over shared prompts; auto: chosen as the model loads.")
    liger: AutoFlag = key("auto", "liger-kernel's RMSNorm, RoPE, SwiGLU or GeGLU; auto: where CUDA is.")
    chat_template: Text | None = key(None, "A Jinja file to use in place of the tokenizer's template.")
    trust_remote_code: Flag = key(False, "Run Python code that comes with the model.")
    allow_pickle: Flag = key(False, "Where there is no safetensors, load .bin weights (tensors only).")


class LoraRecipe(_Keys):
    rank: Count = key(16, "Rank of the adapters.")
    alpha: Count = key(32, "The adapters' output is scaled by alpha / rank.")
    dropout: BelowOne = key(0.0, "Dropout on the adapters' input.")
    targets: Targets = key("all-linear", "Modules with an adapter: all-linear (all but the head), or names.")
    modules_to_save: Names = key((), "Modules to train whole and save too, such as embed_tokens.")


class SourceRecipe(_Keys):
    """A source of pairs with more to it than its path."""

    path: Text
    config: Text | None = None
    split: Text | None = None
    revision: Text | None = None
    weight: Positive = 1.0
    shape: Shape | None = None
    columns: Columns = {}


Sources = Annotated[tuple[Text | SourceRecipe, ...], Field(min_length=1), BeforeValidator(_list)]
_SOURCE = "a file, a folder, a hub id, demo, or a list of these, each also with keys " + ", ".join(
    SourceRecipe.model_fields
)
TrainSources = Annotated[Sources, expects(_SOURCE)]
EvalSources = Annotated[
    Fraction | Sources | None, expects(f"a fraction of train between 0 and 1, null, or {_SOURCE}")
]


class DataRecipe(_Keys):
    train: TrainSources = key(
        ..., "Preference pairs to train on: a file, folder, hub id, demo, or a list of these."
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


class ObjectiveRecipe(_Keys):
    name: Literal["orpo"] = key("orpo", "The loss.")
    weight: NotNegative = key(0.1, "λ, the weight of the odds ratio term beside the NLL.", alias="lambda")
    nll_tokens: NllTokens = key(
        "response", "The NLL is over the response (the paper), or over all: the prompt too."
    )
    nll_average: NllAverage = key(
        "sequence", "The NLL's mean: by sequence, then pair (the paper), or by token."
    )


class TrainRecipe(_Keys):
    pairs_per_step: Count = key(32, "Preference pairs to one optimizer step, over all GPUs.")
    learning_rate: AutoPositive = key(
        "auto", "The highest learning rate, at the end of warm-up; auto: 1e-4, or 8e-6 for full."
    )
    epochs: Positive = key(1.0, "Passes over the training pairs; fractions are fine.")
    max_steps: Count | None = key(None, "Optimizer steps to take; where given, it wins over epochs.")
    warmup_ratio: BelowOne = key(0.1, "Fraction of the steps over which the learning rate climbs from 0.")
    schedule: Schedule = key("cosine", "The learning rate's course after warm-up.")
    optimizer: Optimizer = key(
        "auto",
        "AdamW of bitsandbytes or torch; auto: paged_adamw_8bit, or adamw_torch_fused for full or sharded.",
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
    save_every: Every = key(0.1, "How often to save a checkpoint: below 1 in epochs, from 1 on in steps.")
    log_every: Count = key(1, "Steps from one log line to the next; metrics.jsonl has every step.")
    keep_checkpoints: Count = key(2, "How many of the latest checkpoints to keep.")
    report_to: Trackers = key("auto", "Experiment trackers; auto: tensorboard where installed; []: none.")


class MemoryRecipe(_Keys):
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


class Recipe(_Keys):
    model: ModelRecipe = key(..., "The base model.")
    tuning: Tuning = key(
        "lora", "What trains: lora adapters, or full, all of the model's parameters (--full)."
    )
    lora: LoraRecipe = key(..., "The adapters trained on it.")
    data: DataRecipe = key(..., "The preference pairs.")
    objective: ObjectiveRecipe = key(..., "The loss.")
    train: TrainRecipe = key(..., "The optimization.")
    memory: MemoryRecipe = key(..., "Memory against speed; the result stays the same.")
    output: Text = key(..., "The run folder, which the run makes.")

    @model_validator(mode="before")
    @classmethod
    def _absent_sections_are_empty(cls, raw: dict[str, Any]) -> dict[str, Any]:
        # So that keys missing in them are named by their full path. YAML reads a heading without keys as null.
        sections = (name for name in cls.model_fields if name not in ("output", "tuning"))
        return {**raw, **{name: {} for name in sections if raw.get(name) is None}}

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
        raw = self.to_dict()
        _set(raw, key, value)
        return load_recipe(raw)

    def values(self) -> list[tuple[str, Any]]:
        """Every key by its dotted path, with its plain value."""
        return list(_values(self.to_dict()))

    def differences(self, other: "Recipe", ignoring: Collection[str] = ()) -> list[str]:
        """What changed from this recipe, the saved run's, to `other`, the one given now; one line a key.

        `ignoring` names keys ("train.log_every") and whole sections ("memory").
        """
        now = dict(other.values())
        return [
            f"{key}: {_shown(saved)} in the saved run, {_shown(now[key])} now"
            for key, saved in self.values()
            if saved != now[key] and not {key, key.split(".")[0]} & set(ignoring)
        ]


def _fields() -> Iterator[tuple[str, FieldInfo]]:
    for name, field in Recipe.model_fields.items():
        yield name, field
        if isinstance(field.annotation, type) and issubclass(field.annotation, _Keys):
            for key, inner in field.annotation.model_fields.items():
                yield f"{name}.{inner.alias or key}", inner


FIELDS = dict(_fields())
"""Every key by its full path, a section before the keys in it, with pydantic's account: description, default."""

# --- reading ---


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file or a mapping, then set `key.sub=value` overrides, whose values are YAML too.

    Raises RecipeError with every problem found in the file, the overrides and their combination.
    """
    problems: list[str] = []
    if isinstance(source, Mapping):
        where, raw = "recipe", copy.deepcopy(dict(source))
    else:
        where, raw = os.fspath(source), _read_file(Path(source), problems)
    for override in overrides:
        _override(raw, override, problems)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        problems += [_explain(detail) for detail in error.errors()]
    if problems:
        raise _recipe_error(where, problems)
    return recipe


class _Loader(yaml.SafeLoader):
    """YAML's safe subset, noting keys given twice, of which YAML would silently take the last."""

    problems: list[str]

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        lines: dict[str, int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            line = key.start_mark.line + 1
            if key.value in lines:
                first = lines[key.value]
                self.problems.append(
                    f"line {line}: {key.value} given again (first on line {first}); keep one"
                )
            lines.setdefault(key.value, line)
        return super().construct_mapping(node, deep)


def _parse(text: str, problems: list[str]) -> Any:
    """The value of a YAML text; keys given twice go to `problems`. Raises ValueError where it is no YAML."""
    try:
        loader = _Loader(text)
        loader.problems = problems
        return loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        line = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise ValueError(f"{line}not valid YAML: {error.problem}") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        raw = _parse(path.read_text(encoding="utf-8"), problems)
    except OSError as error:  # missing, a folder, not ours to read
        raise RecipeError(f"{path}: {error.strerror}; give the path of a recipe, a YAML file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not text in UTF-8; give the path of a recipe, a YAML file") from None
    except ValueError as error:
        raise _recipe_error(str(path), [str(error)]) from None
    if not isinstance(raw, dict | None):
        text = f"got {_shown(raw)}; expected keys and values, such as output: runs/first"
        raise _recipe_error(str(path), [text])
    return raw or {}


def _override(raw: dict[str, Any], override: str, problems: list[str]) -> None:
    """Set one `key.sub=value` in `raw`, or say in `problems` why not."""
    key, equals, text = (part.strip() for part in override.partition("="))
    if not equals:
        problems.append(f"override {override!r}: expected key=value, such as train.epochs=2")
    elif key not in FIELDS:
        problems.append(_unknown(key))
    else:
        try:
            _set(raw, key, _parse(text, problems))
        except ValueError as error:
            problems.append(f"override {override!r}: {error}; quote the value")


def _set(raw: dict[str, Any], path: str, value: Any) -> None:
    section, _, key = path.rpartition(".")
    if not section:
        raw[key] = value
        return
    if raw.get(section) is None:
        raw[section] = {}
    if isinstance(raw[section], dict):  # else the section's own problem is reported
        raw[section][key] = value


def _values(raw: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, value in raw.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{key}", inner) for key, inner in value.items())
        else:
            yield name, value


# --- what is wrong, in plain words ---


def _recipe_error(where: str, problems: Sequence[str]) -> RecipeError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return RecipeError("\n  ".join([f"{where}: {count}", *problems]))


def _explain(error: ErrorDetails) -> str:
    path = ".".join(str(part) for part in error["loc"])
    expected = error["msg"]
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            return _unknown(path)
        case "missing":
            what = str(FIELDS[path].description).rstrip(".")
            return f"{path}: missing; give {what[0].lower()}{what[1:]}"
        case "section":
            return f"{path.rpartition('.')[0]}: {error['msg']}"
        case "literal_error":
            expected = error["ctx"]["expected"].replace("'", "")
        case "model_type":
            expected = "a section, with keys of its own"
    return f"{path}: got {_shown(error['input'])}; expected {expected}"


def _unknown(path: str) -> str:
    """An unknown key, with the nearest known one wherever it is; in the same section it is nearer."""
    section, _, wrong = path.rpartition(".")

    def nearness(known: str) -> float:
        home, _, key = known.rpartition(".")
        likeness = difflib.SequenceMatcher(None, wrong.lower(), key).ratio()
        return likeness + 0.1 * (home == section) if likeness >= 0.7 else 0

    nearest = max(FIELDS, key=nearness)
    if nearness(nearest):
        return f"{path}: unknown key; did you mean {nearest}?"
    siblings = [known for known in FIELDS if known.rpartition(".")[0] == section]
    return f"{path}: unknown key; known are {', '.join(siblings or Recipe.model_fields)}"


def _shown(value: Any) -> str:
    """A value as a recipe would have it, cut where it is long."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        text = repr(value) if isinstance(value, str) else str(value)
    return text if len(text) <= 80 else text[:77] + "..."


# --- what auto stands for ---


def resolve(
    recipe: Recipe,
    *,
    device_type: str,
    installed: Callable[[str], bool] | None = None,
) -> Recipe:
    """A copy with every `auto` replaced but those of model.attention, memory and (where it may be) model.liger, which
    are resolved as the model loads.

    `device_type` is torch's ("cuda", "cpu", …). `installed` tells whether a module can be imported. Raises RecipeError where the recipe needs one that can't.
    """
    installed = installed or _importable
    full = recipe.tuning == "full"
    is_sharded = full or recipe.memory.sharding in ("full", "hybrid")  # bitsandbytes' optimizers can't be
    meaning = {
        "model.quantization": "none" if full else "nf4",
        "memory.sharding": "full" if full else "none",
        "train.learning_rate": 8e-6 if full else 1e-4,
        "train.optimizer": "adamw_torch_fused" if is_sharded else "paged_adamw_8bit",
        "train.report_to": ["tensorboard"] if installed("tensorboard") else [],
    }
    liger_needs = {
        f"a CUDA device, and this is {device_type}": device_type == "cuda",
        "liger-kernel, which is not installed (pip install liger-kernel)": installed("liger_kernel"),
        "Triton, which is not installed (pip install triton)": installed("triton"),
    }
    liger_lacks = [need for need, is_met in liger_needs.items() if not is_met]
    if liger_lacks:
        meaning["model.liger"] = False
    for key, value in recipe.values():
        if value == "auto" and key in meaning:
            recipe = recipe.replace(key, meaning[key])

    problems = []
    if recipe.model.liger is True and liger_lacks:
        problems.append(f"model.liger: true needs {liger_lacks[0]}; set it to auto")
    if full and recipe.model.quantization == "nf4":
        problems.append(
            "model.quantization: nf4 weights can't be trained; leave out --full (tuning: full), or set it to auto or none"
        )
    if recipe.memory.activation_offload is True and device_type != "cuda":
        problems.append(
            f"memory.activation_offload: true needs a CUDA device, and this is {device_type}; set it to auto"
        )
    for tracker in recipe.train.report_to:
        if not installed(tracker):
            package = "'qorpo[tracking]'" if tracker in ("tensorboard", "wandb") else tracker
            problems.append(
                f"train.report_to: {tracker} is not installed; pip install {package}, or leave it out"
            )
    if not installed("bitsandbytes"):
        quantization, optimizer = recipe.model.quantization, recipe.train.optimizer
        missing = "needs bitsandbytes, which is not installed; pip install bitsandbytes, or set"
        if quantization == "nf4":
            problems.append(f"model.quantization: {quantization} {missing} model.quantization: none")
        if not optimizer.startswith("adamw_torch"):
            problems.append(f"train.optimizer: {optimizer} {missing} train.optimizer: adamw_torch")
    if problems:
        raise _recipe_error("recipe", problems)
    return recipe


def _importable(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    # Without an origin it is a mere folder of that name, such as the ./wandb that wandb writes.
    return spec is not None and spec.origin is not None
