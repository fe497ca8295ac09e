"""A YAML file or a mapping becomes a Recipe; what is wrong with it is said in plain words, all of it at once."""

import copy
import difflib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError
from pydantic_core import ErrorDetails

from qorpo.errors import RecipeError
from qorpo.recipe.foreign import recognised
from qorpo.recipe.keys import FIELDS, Recipe, set_key
from qorpo.recipe.objectives import belongs_to, unknown_objective
from qorpo.recipe.values import shown


def load_recipe(source: str | os.PathLike[str] | Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe from a YAML file or a mapping, then set `key.sub=value` overrides, whose values are YAML too.

    Raises RecipeError with every problem found in the file, the overrides and their combination.
    """
    problems: list[str] = []
    if isinstance(source, Mapping):
        where, raw = "recipe", copy.deepcopy(dict(source))
    else:
        where, raw = os.fspath(source), _read_file(Path(source), problems)
    if foreign := recognised(raw):
        raise RecipeError(f"{where}: " + "\n  ".join(foreign))
    for override in overrides:
        _override(raw, override, problems)
    try:
        recipe = Recipe.model_validate(raw)
    except ValidationError as error:
        details = error.errors(include_url=False)
        problems += [_explain(each) if n < MOST_PROBLEMS else "" for n, each in enumerate(details)]
    if problems:
        raise recipe_error(where, problems)
    return recipe


# A recipe is a page. What is far beyond that is no recipe, and reading it takes a long time.
MOST_BYTES = 256 * 1024
MOST_CHARACTERS_OF_A_VALUE = 2048
MOST_PROBLEMS = 20
_YAML_TAG = "tag:yaml.org,2002:"


class _NotForRecipes(yaml.MarkedYAMLError):
    """YAML that a recipe doesn't take."""


class _Loader(yaml.SafeLoader):
    """YAML without aliases and tags, noting keys given twice, of which YAML would silently take the last.

    A few aliases (*name) can stand for billions of values, and a tag (!!float) makes a value of what is none.
    """

    problems: list[str]

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            problem = f"a recipe takes no aliases (*{event.anchor}); write the value itself"
        elif event.tag not in (None, "!"):
            tag = event.tag.replace(_YAML_TAG, "!!")
            problem = f"a recipe takes no tags ({tag}); leave it out, and quote what is text"
        elif len(getattr(event, "value", "")) > MOST_CHARACTERS_OF_A_VALUE:
            problem = f"a value of {len(event.value):,} characters; {MOST_CHARACTERS_OF_A_VALUE:,} at most"
        else:
            return super().compose_node(parent, index)
        raise _NotForRecipes(None, None, problem, event.start_mark)

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
        what = "" if isinstance(error, _NotForRecipes) else "not valid YAML: "
        raise ValueError(f"{line}{what}{error.problem}") from None
    except RecursionError:
        raise ValueError("nested too deeply; a recipe has sections, and keys in them") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2024-13-01
        raise ValueError(f"not valid YAML: {' '.join(str(error).split())}") from None


def _read_file(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
        if len(data) > MOST_BYTES:
            raise ValueError(f"over {MOST_BYTES // 1024} KiB; give the path of a recipe, a YAML file")
        raw = _parse(data.decode(), problems)
    except OSError as error:  # missing, a folder, not ours to read
        raise RecipeError(f"{path}: {error.strerror}; give the path of a recipe, a YAML file") from None
    except UnicodeDecodeError:
        raise RecipeError(f"{path}: not text in UTF-8; give the path of a recipe, a YAML file") from None
    except ValueError as error:
        raise recipe_error(str(path), [str(error)]) from None
    if not isinstance(raw, dict | None):
        text = f"got {shown(raw)}; expected keys and values, such as output: runs/first"
        raise recipe_error(str(path), [text])
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
            set_key(raw, key, _parse(text, problems))
        except ValueError as error:
            problems.append(f"override {override!r}: {error}; quote the value")


# --- what is wrong, in plain words ---


def recipe_error(where: str, problems: Sequence[str]) -> RecipeError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    more = [f"and {len(problems) - MOST_PROBLEMS:,} more"] if len(problems) > MOST_PROBLEMS else []
    return RecipeError("\n  ".join([f"{where}: {count}", *problems[:MOST_PROBLEMS], *more]))


def _explain(error: ErrorDetails) -> str:
    section, *place = error["loc"]
    objective = place.pop(0) if section == "objective" and place else None  # pydantic puts its name there
    path = ".".join(str(part) for part in (section, *place))
    expected = error["msg"]
    match error["type"]:
        case "extra_forbidden" | "invalid_key":
            others = belongs_to(str(place[0])) if objective else []
            if others:
                return f"{path}: belongs to {', '.join(others)}; objective.name is {objective}; leave it out"
            return _unknown(path)
        case "union_tag_invalid":
            return unknown_objective(error["input"]["name"])
        case "missing":
            what = str(FIELDS[path].description).rstrip(".")
            return f"{path}: missing; give {what[0].lower()}{what[1:]}"
        case "section":
            return f"{path.rpartition('.')[0] or path}: {error['msg']}"
        case "literal_error":
            expected = error["ctx"]["expected"].replace("'", "")
        case "model_type" | "model_attributes_type":
            expected = "a section, with keys of its own"
    return f"{path}: got {shown(error['input'])}; expected {expected}"


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
