"""What can be said of the keys without a recipe: a list for people, a schema for editors, a commented recipe to begin with."""

import json
from typing import Any, Literal, get_args, get_origin

from qorpo.errors import RecipeError
from qorpo.recipe.keys import FIELDS, Recipe
from qorpo.recipe.values import Keys, shown

SECTIONS = [name for name in FIELDS if "." not in name]


def describe_keys(section: str | None = None) -> list[str]:
    """Each key with its default, what it takes and what it means; of one section, or of all.

    Raises:
        RecipeError: for a section that is none.
    """
    if section is not None and section not in SECTIONS:
        raise RecipeError(f"qorpo keys {section}: no such section; there are {', '.join(SECTIONS)}")
    lines: list[str] = []
    for name, info in FIELDS.items():
        if section not in (None, name.split(".")[0]):
            continue
        if name in SECTIONS and (_is_section(info.annotation) or name == "objective"):
            lines += ["", f"{name}: {info.description}"]
            continue
        default = (
            "must be given" if info.is_required() else shown(info.get_default(call_default_factory=True))
        )
        takes = f" ({bound})" if (bound := bound_of(info)) else ""
        lines.append(f"  {name}: {default}{takes}")
        lines.append(f"      {info.description}")
    return lines[1:] if lines and not lines[0] else lines


def _is_section(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Keys)


def bound_of(info: Any) -> str:
    """What a message would say that belongs there; empty where the type says it all."""
    for entry in reversed(info.metadata):
        if text := getattr(getattr(entry, "func", None), "expected", None):
            return text
    if get_origin(info.annotation) is Literal:
        return ", ".join(map(str, get_args(info.annotation)))
    return ""


def json_schema() -> dict[str, Any]:
    """A JSON schema of recipes, as editors read one; sections that have only defaults may be left out."""
    schema = Recipe.model_json_schema(by_alias=True)
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["required"] = ["model", "data", "output"]
    return schema


def commented_recipe(model: str, train: str, eval: str | None, output: str, *, full: bool = False) -> str:
    """A recipe to begin with: what has to be said, and the keys that people change first, each with its meaning."""

    def line(key: str, value: Any, indent: str = "  ") -> str:
        name = key.split(".")[-1]
        return f"{indent}{name}: {json.dumps(value)}   # {FIELDS[key].description}"

    first = ["data.max_length", "data.max_prompt_length"], ["train.learning_rate", "train.epochs"]
    return "\n".join(
        [
            "# A recipe of qorpo's. `qorpo keys` says every key; what is left out has its default.",
            "model:", line("model.path", model),
            line("tuning", "full" if full else "lora", ""),
            "data:", line("data.train", train), line("data.eval", _number_or_text(eval)),
            *(line(key, FIELDS[key].default) for key in first[0]),
            "objective:", '  name: "orpo"   # The loss; `qorpo keys objective` lists the others.',
            line("objective.lambda", FIELDS["objective.lambda"].default),
            "train:", *(line(key, FIELDS[key].default) for key in first[1]),
            line("output", output, ""),
            "",
        ]
    )  # fmt: skip


def _number_or_text(value: str | None) -> float | str | None:
    try:
        return None if value is None else float(value)
    except ValueError:
        return value
