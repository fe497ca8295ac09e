"""README.md of what a run leaves: how to use it, what it was made of and with, and how it measured before and after."""

import contextlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import yaml
from huggingface_hub import try_to_load_from_cache

from qorpo.data.counts import DataReport
from qorpo.errors import QorpoError
from qorpo.model.load import model_source
from qorpo.recipe import Recipe
from qorpo.storage import read_note

Kind = Literal["adapter", "model"]
VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM's max_lora_rank takes


def write_run_card(folder: Path, run: Path, recipe: Recipe) -> None:
    """The card of a run's adapter or model, from the notes in its folder; where they are missing it is poorer."""
    base, kind = recipe.model.path, cast(Kind, "model" if recipe.tuning == "full" else "adapter")
    made = "A LoRA adapter" if kind == "adapter" else "All parameters, fine-tuned"
    lines = [
        *front_matter([base], recipe.model.revision, is_adapter=kind == "adapter"),
        f"# {run.name}", "",
        f"{made} by qorpo with the {recipe.objective.name} objective.", "",
        f"- base: `{shown_base(base)}`",
        *licence_lines(base, recipe.model.revision),
        *use(kind, shown_base(base), rank=recipe.lora.rank),
        *run_section(run, recipe),
    ]  # fmt: skip
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def front_matter(bases: Sequence[str], revision: str | None = None, *, is_adapter: bool) -> list[str]:
    """What a hub reads of a card; a base is named where it is a hub's, and its licence where its own card names one."""
    front: dict[str, Any] = {"library_name": "peft" if is_adapter else "transformers"}
    front["tags"] = ["orpo", "qorpo", *(["lora"] if is_adapter else [])]
    for base in bases:
        if is_hub_id(base):
            front["base_model"] = base
        if found := licence(base, revision):
            front["license"] = found
    return ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", ""]


def use(kind: Kind, base: str, rank: int) -> list[str]:
    """How to load it: in Python, with vLLM, and with qorpo."""
    here = "PATH"
    if kind == "adapter":
        python = [
            f'base = AutoModelForCausalLM.from_pretrained("{base}", device_map="auto")',
            f'model = PeftModel.from_pretrained(base, "{here}")   # and AutoTokenizer.from_pretrained("{here}")',
        ]
        most = next((each for each in VLLM_RANKS if each >= rank), rank)
        serve = f"vllm serve {base} --enable-lora --max-lora-rank {most} --lora-modules mine={here}"
    else:
        python = [
            f'model = AutoModelForCausalLM.from_pretrained("{here}", device_map="auto")',
            f'tokenizer = AutoTokenizer.from_pretrained("{here}")',
        ]
        serve = f"vllm serve {here}"
    return [
        "", "## Use", "", f"`{here}` is this folder or its name on a hub.", "",
        "```python", *python, "```", "", "```bash", f"qorpo chat {here}", serve, "```",
    ]  # fmt: skip


def run_section(run: Path, recipe: Recipe) -> list[str]:
    """Data with what was dropped, held-out metrics before and after, and the recipe."""
    lines = ["", f"## {run.name}", ""]
    data = (read_note(run / "data.json") if (run / "data.json").is_file() else None) or {}
    for part in ("split_from", "train", "eval"):
        # The card of torn notes is poorer.
        with contextlib.suppress(AttributeError, KeyError, TypeError, ValueError):
            lines += _data_lines(part, data.get(part))
    lines += _metrics_table(run / "metrics.jsonl")
    return [*lines, "", "```yaml", _portable_yaml(recipe), "```"]


def _portable_yaml(recipe: Recipe) -> str:
    """The recipe with the names alone of folders and files on one machine."""

    def portable(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: portable(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return [portable(each) for each in value]
        return Path(value).name if isinstance(value, str) and value.startswith(("/", "~", ".")) else value

    content = portable(recipe.to_dict()) | {"output": Path(recipe.output).name}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True).strip()


def _data_lines(part: str, values: Mapping[str, Any] | None) -> list[str]:
    if not values:
        return []
    report = DataReport(**{name: values[name] for name in ("kept", "dropped", "sources")})
    lines = [f"- {part.replace('_', ' ')} data: {report.summary()}, kept {report.kept:,}"]
    for source in report.sources:
        lines.append(f"  - `{Path(source['path']).name}`, sha256 `{source['sha256']}`")
    return lines


def _metrics_table(path: Path) -> list[str]:
    """Held-out metrics at the start and of the weights that were kept: those of the lowest evaluation loss."""
    rows = []
    for line in path.read_bytes().splitlines() if path.is_file() else []:
        with contextlib.suppress(ValueError, RecursionError):  # a torn line
            row = json.loads(line)
            if isinstance(row, dict) and all(isinstance(row[name], int | float) for name in row):
                rows += [row] if "eval_loss" in row and "step" in row else []
    if not rows:
        return []
    first, best = (
        rows[0],
        min(rows, key=lambda row: row["eval_loss"] if math.isfinite(row["eval_loss"]) else math.inf),
    )
    names = sorted(name for name in best if name.startswith("eval_") and not name.endswith("_per_second"))
    table = ["", f"| held out | step {first['step']} | step {best['step']}, kept |", "|---|---|---|"]
    for name in names:
        before = f"{first[name]:.4f}" if name in first else ""
        table.append(f"| {name} | {before} | {best[name]:.4f} |")
    return table


def licence_lines(base: str, revision: str | None = None) -> list[str]:
    found = licence(base, revision)
    return [
        f"- licence of the base: {found}"
        if found
        else "- licence of the base: not known; look at its own card"
    ]


def licence(base: str, revision: str | None = None) -> str | None:
    """What the base's own card names as its licence; None where there is no card, or it names none."""
    try:
        source = model_source(base)
        path: Any = Path(source, "README.md")
        if not Path(source).is_dir():
            path = try_to_load_from_cache(source, "README.md", revision=revision)
        text = Path(path).read_text(encoding="utf-8")
        front = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
    except (OSError, ValueError, TypeError, IndexError, yaml.YAMLError, QorpoError):  # no card, or an odd one
        return None
    found = front.get("license") if isinstance(front, dict) else None
    return found if isinstance(found, str) else None


def shown_base(base: str) -> str:
    """A hub's id as it is; of a folder its name, for the rest is of one machine."""
    return base if is_hub_id(base) or base == "demo" else Path(base).name


def is_hub_id(path: str) -> bool:
    return path.count("/") == 1 and not path.startswith((".", "/", "~")) and not Path(path).is_dir()
