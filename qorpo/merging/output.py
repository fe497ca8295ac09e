"""The merged model's folder: made beside its place and renamed, so that a folder of its name is always a whole one."""

import contextlib
import glob
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from qorpo.errors import RunError
from qorpo.merging.links import check_copied
from qorpo.merging.source import Base, Trained
from qorpo.storage import sweep, write_json

MARGIN_BYTES = 64 << 20  # tokenizer, configuration, and what a file system takes for itself
WEIGHTS = re.compile(
    r".*\.(safetensors|bin|pt|pth|gguf|h5|msgpack|onnx|ot)|.*\.(safetensors|bin)\.index\.json"
)
TOKENIZER = re.compile(
    r"tokenizer.*\.json|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|chat_template\..*"
)
KEPT = re.compile(r".*\.(py|json|txt|jinja|model|tiktoken)|(LICENSE|NOTICE|USE_POLICY).*")


def check_output(output: Path, needed_bytes: int) -> None:
    """Raises RunError where the output is in the way, can't be made, or there is too little disk."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise RunError(f"--output {output}: something is there already; give another output, or remove it")
    home = output.absolute().parent
    while not home.exists():
        home = home.parent
    if not (home.is_dir() and os.access(home, os.W_OK | os.X_OK)):
        raise RunError(f"--output {output}: {home} takes no files; give another output")
    sweep(output.absolute().parent, glob.escape(output.name))
    free = shutil.disk_usage(home).free
    if free < needed_bytes + MARGIN_BYTES:
        raise RunError(
            f"--output {output}: {gib(needed_bytes + MARGIN_BYTES)} are needed, {gib(free)} are free; make room, or "
            "give an output on another disk"
        )


def write_files(folder: Path, base: Base, trained: Sequence[Trained], config: dict[str, Any]) -> None:
    """Everything but the weights: configuration, tokenizer, chat template, tokens to stop at, code of the base's own.

    The last adapter that brings a tokenizer or a generation_config.json has the word: its stop token was learned.
    """
    tokenizer = tokenizer_folder(base, trained)
    for path in sorted(base.folder.iterdir()):
        if not KEPT.fullmatch(path.name) or WEIGHTS.fullmatch(path.name) or path.name.startswith("."):
            continue
        if path.is_file() and (tokenizer == base.folder or not TOKENIZER.fullmatch(path.name)):
            check_copied(path, base.folder)
            shutil.copyfile(path, folder / path.name)
    for path in sorted(tokenizer.iterdir()):
        if path.is_file() and (TOKENIZER.fullmatch(path.name) or path.name == "tokenizer.model"):
            check_copied(path, tokenizer)
            shutil.copyfile(path, folder / path.name)
    generation: dict[str, Any] = {}
    for home in (base.folder, *(each.adapter.folder for each in trained)):
        if (home / "generation_config.json").is_file():
            generation |= json.loads((home / "generation_config.json").read_text(encoding="utf-8"))
    generation.pop("_from_model_config", None)  # it is not any more
    if generation:
        write_json(folder / "generation_config.json", generation)
    write_json(folder / "config.json", config)


def tokenizer_folder(base: Base, trained: Sequence[Trained]) -> Path:
    """Where the merged model's tokenizer comes from: the last adapter that brings one, else the base."""
    folders = [each.adapter.folder for each in trained[::-1]]
    return next((folder for folder in folders if (folder / "tokenizer_config.json").is_file()), base.folder)


def write_card(folder: Path, base: Base, trained: Sequence[Trained], onto: str) -> None:
    """README.md: what was merged into what, trained on which data, with which recipe, and how it measured."""
    is_hub_id = base.commit is not None and base.name.count("/") == 1
    front = {"library_name": "transformers", "tags": ["orpo", "qorpo"]} | (
        {"base_model": base.name} if is_hub_id else {}
    )
    title = " + ".join((each.run or each.adapter.folder).name for each in trained)
    lines = ["---", yaml.safe_dump(front, sort_keys=False).strip(), "---", "", f"# {title}", ""]
    weights = "the base's own weights" if onto == "original" else "the base's NF4 weights, dequantized"
    lines += [
        f"LoRA adapters merged by qorpo into {weights}.",
        "",
        f"- base: `{base.name}` ({base.commit or 'a local folder'})",
    ]
    for each in trained:
        weight = f" × {each.adapter.weight:g}" if each.adapter.weight != 1.0 else ""
        lines.append(f"- adapter: `{(each.run or each.adapter.folder).name}`{weight}")
    lines.append("- verification: `verification.json`")
    for each in trained:
        lines += _run_section(each)
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _run_section(trained: Trained) -> list[str]:
    if trained.run is None or trained.recipe is None:
        return []
    lines = ["", f"## {trained.run.name}", ""]
    data = trained.note("data.json")
    for part in ("train", "eval"):
        with contextlib.suppress(AttributeError, KeyError, TypeError):  # the card of torn notes is poorer
            for source in (data.get(part) or {}).get("sources", []):
                lines.append(f"- {part} data: `{Path(source['path']).name}`, sha256 `{source['sha256']}`")
    measured = _last_evaluation(trained.run / "metrics.jsonl")
    if measured:
        lines += ["", "| held out | |", "|---|---|"]
        lines += [
            f"| {name} | {value:.4f} |"
            for name, value in sorted(measured.items())
            if not name.endswith("_per_second")
        ]
    return [*lines, "", "```yaml", trained.recipe.to_yaml().strip(), "```"]


def _last_evaluation(metrics: Path) -> dict[str, float]:
    """Of the adapter that was kept: the lowest evaluation loss."""
    if not metrics.is_file():
        return {}
    rows = []
    for line in metrics.read_bytes().splitlines():
        with contextlib.suppress(ValueError, RecursionError):  # a torn line
            row = json.loads(line)
            if isinstance(row, dict) and all(isinstance(row[name], int | float) for name in row):
                rows += [row] if "eval_loss" in row else []
    return min(rows, key=lambda row: row["eval_loss"], default={})


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
