"""What a recipe's sections are made of: keys, and the kinds of value they take, each with what a message says of it."""

import os
from collections.abc import Callable
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    ValidationError,
    WrapValidator,
)
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError


def expects(text: str) -> WrapValidator:
    """Whatever is wrong with a value of this type, `text` says what belongs there."""

    def check(value: Any, validate: Callable[[Any], Any]) -> Any:
        try:
            return validate(value)
        except ValidationError:
            raise PydanticCustomError("expects", "{text}", {"text": text}) from None

    setattr(check, "expected", text)  # noqa: B010 (for who lists the keys)
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


def names_listed(value: Any) -> Any:
    """Names, as they are written on a command line: q_proj, or q_proj,v_proj."""
    return [name.strip() for name in value.split(",")] if isinstance(value, str) else value


def trackers_listed(value: Any) -> Any:
    return [] if value == "none" else names_listed(value)


def listed(value: Any) -> Any:
    return [value] if isinstance(value, str | os.PathLike | dict) else value


Auto = Literal["auto"]
Flag = Annotated[StrictBool, expects("true or false")]
AutoFlag = Annotated[Auto | StrictBool, expects("auto, true or false")]

Whole = Annotated[int, BeforeValidator(_number)]
Real = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_number)]
# Above 2**53 a number is no longer exact as a float, which is how YAML's 1e3 comes.
Count = Annotated[Whole, Field(ge=1, le=2**53), expects("a whole number of at least 1")]
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
Texts = Annotated[tuple[Text, ...], Field(min_length=1), BeforeValidator(names_listed)]
Names = Annotated[tuple[Text, ...], BeforeValidator(names_listed), expects("a list of module names")]
Targets = Annotated[
    Literal["all-linear", "all-linear+experts"] | Texts,
    expects("all-linear, all-linear+experts, or a list of module names"),
]
# PEFT's others change the base's weights, which an adapter's folder does not hold, or look at data first.
LoraInit = Annotated[
    Literal["default", "gaussian", "orthogonal"],
    expects("default, gaussian or orthogonal (what changes the base's weights or needs data is not taken)"),
]
Columns = Annotated[
    dict[Text, Text], expects("names of qorpo's and the records' own, such as {prompt: query}")
]

Quantization = Literal["nf4", "none", "auto"]
Attention = Literal["auto", "flash", "varlen", "sdpa", "dense", "separate"]
Tuning = Literal["lora", "full"]
Sharding = Literal["auto", "none", "full", "hybrid"]
OnBadRecord = Literal["fail", "skip"]
TrainTurns = Literal["last", "all"]
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
    Auto | Annotated[tuple[Literal[TRACKERS], ...], BeforeValidator(trackers_listed)],  # type: ignore[valid-type]
    expects(f"auto, [] for none, or a list of {', '.join(TRACKERS)}"),
]


def key(default: Any, description: str, **options: Any) -> Any:
    """A key of the recipe; `...` for one that must be given. The description goes into messages and documentation."""
    return Field(default, description=description, **options)


class Keys(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @classmethod
    def names(cls) -> dict[str, FieldInfo]:
        """Every key by its name in a recipe, with pydantic's account of it."""
        return {field.alias or name: field for name, field in cls.model_fields.items()}


def shown(value: Any) -> str:
    """A value as a recipe would have it, cut where it is long."""
    if value is None or isinstance(value, bool):
        text = {None: "null", True: "true", False: "false"}[value]
    else:
        try:
            text = repr(value) if isinstance(value, str) else str(value)
        except (ValueError, RecursionError):  # Python writes no number of over 4,300 digits
            text = f"{type(value).__name__} that is too long to show"
    return text if len(text) <= 80 else text[:77] + "..."
