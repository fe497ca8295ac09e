"""The merged model's folder: made beside its place and renamed, so that a folder of its name is always a whole one."""

import glob
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qorpo.card import front_matter, licence_lines, run_section, shown_base, use
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
    title = " + ".join((each.run or each.adapter.folder).name for each in trained)
    weights = "the base's own weights" if onto == "original" else "the base's NF4 weights, dequantized"
    name = base.name if base.commit is not None else str(base.folder)
    lines = [
        *front_matter([name], base.commit, is_adapter=False),
        f"# {title}", "",
        f"LoRA adapters merged by qorpo into {weights}.", "",
        f"- base: `{shown_base(base.name)}` ({base.commit or 'a local folder'})",
        *licence_lines(name, base.commit),
    ]  # fmt: skip
    for each in trained:
        weight = f" × {each.adapter.weight:g}" if each.adapter.weight != 1.0 else ""
        lines.append(f"- adapter: `{(each.run or each.adapter.folder).name}`{weight}")
    lines += ["- verification: `verification.json`", *use("model", shown_base(base.name), rank=0)]
    for each in trained:
        if each.run is not None and each.recipe is not None:
            lines += run_section(each.run, each.recipe)
    (folder / "README.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


def gib(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.2f} GiB"
