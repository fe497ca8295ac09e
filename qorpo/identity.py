"""What checkpoints, adapters and models belong to: recipe, base, tokenizer, chat template and data, to be compared later.

An identity is JSON: hashes and short values by name, kept in the folder's manifest. Files count by their content,
wherever they are.
"""

import hashlib
import json
import logging
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from qorpo.data.chat_format import ChatFormat
from qorpo.data.groups import TokenizedData
from qorpo.errors import ModelError
from qorpo.manifest import fingerprint
from qorpo.model.adapter_folder import WEIGHTS, find_adapter
from qorpo.model.load import model_source
from qorpo.recipe import Recipe

logger = logging.getLogger(__name__)

# What may change from a run to its resumption: its length, and what doesn't change its result, but for dropout's draws.
LENGTHS = ("train.epochs", "train.max_steps", "train.early_stopping")
MAY_CHANGE = (
    "output", "memory.budget_gib", "memory.microbatch_tokens", "memory.logprob_chunk_tokens",
    "memory.activation_checkpointing", "memory.activation_offload", "memory.sharding",
    "train.log_every", "train.keep_checkpoints", "train.report_to",
    *LENGTHS,
)  # fmt: skip
# Not of a run's identity either: where things are.
_ELSEWHERE = (
    "model.path", "model.revision", "model.adapter", "model.chat_template", "model.trust_remote_code", "model.allow_pickle",
    "data.train", "data.eval",
)  # fmt: skip


def run_identity(
    recipe: Recipe,
    chat: ChatFormat,
    train: Any,
    eval: Any,
) -> dict[str, Any]:
    """What a run of a resolved recipe belongs to; base and data are null where they are in memory alone.

    Args:
        train, eval: pairs as Trainer takes them; those of `load_data` know their files.
    """
    data = {name: _files_of(pairs) for name, pairs in (("train", train), ("eval", eval))}
    adapter = recipe.model.adapter
    began_from = {"adapter": _fingerprint(find_adapter(adapter) / WEIGHTS)} if adapter else {}
    return {
        "recipe": recipe_identity(recipe),
        **began_from,
        "base": base_identity(recipe.model.path, recipe.model.revision),
        **chat_identity(chat),
        "data": data,
    }


def recipe_identity(recipe: Recipe) -> dict[str, Any]:
    """The keys of a resolved recipe that decide what comes of a step."""
    return {key: value for key, value in recipe.values() if key not in (*MAY_CHANGE, *_ELSEWHERE)}


def base_identity(path: str | Path, revision: str | None = None) -> dict[str, Any] | None:
    """Fingerprints of a model's config.json and weights, and its commit if it is a hub's; None where it has no files here."""
    try:
        source = model_source(str(path))
        if not Path(source).is_dir():
            config = try_to_load_from_cache(source, "config.json", revision=revision)
            source = str(Path(config).parent) if isinstance(config, str) else ""
        folder = Path(source)
        if not source or not (folder / "config.json").is_file():
            return None
        paths = [folder / "config.json", *_weights(folder)]
        commit = folder.name if folder.parent.name == "snapshots" else None
        return {"commit": commit, "files": {path.name: _fingerprint(path) for path in paths}}
    except (OSError, ModelError) as error:
        logger.warning("the base's files can't be told from others later: %s", error)
        return None


def chat_identity(chat: ChatFormat) -> dict[str, Any]:
    """A tokenizer, and the chat template that is set on it with the token to stop at."""
    tokenizer = chat.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    vocabulary = backend.to_str() if backend else sorted(tokenizer.get_vocab().items())
    return {
        "tokenizer": _hash([vocabulary, type(tokenizer).__name__, str(tokenizer.special_tokens_map)]),
        "template": _hash([tokenizer.chat_template, chat.stop_token_id]),
    }


def differences(made_with: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What has changed from one identity to another, a line each; only what both know is compared."""
    found = []
    saved, current = made_with.get("recipe") or {}, now.get("recipe") or {}
    for key in sorted(saved.keys() & current.keys()):
        if saved[key] != current[key]:
            found.append(f"{key}: it was made with {saved[key]}, and the recipe says {current[key]}")
    found += base_differences(made_with.get("base"), now.get("base"))
    for part, name in (
        ("adapter", "the adapter that it began from (model.adapter)"),
        ("tokenizer", "the tokenizer"),
        ("template", "the chat template or its stop token"),
    ):
        if made_with.get(part) and now.get(part) and made_with[part] != now[part]:
            found.append(f"{name} is not the one that it was made with")
    saved, current = made_with.get("data") or {}, now.get("data") or {}
    for part in sorted(saved.keys() & current.keys()):
        if saved[part] and current[part] and saved[part] != current[part]:
            found.append(f"data.{part}: the files are not those that it was made with")
    return found


def base_differences(made_with: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> list[str]:
    """The same of two bases alone."""
    if not made_with or not now:
        return []
    if made_with.get("commit") and now.get("commit") and made_with["commit"] != now["commit"]:
        return [f"the base is commit {now['commit']}, and it was made with {made_with['commit']}"]
    there = now["files"]
    names = made_with["files"] if len(there) > 1 else ["config.json"]  # the weights need not be there for all
    changed = [name for name in names if made_with["files"].get(name) != there.get(name)]
    return [f"the base's {', '.join(changed)}: not what it was made with"] if changed else []


def _weights(folder: Path) -> list[Path]:
    safe = [path for path in folder.glob("*.safetensors") if not path.name.startswith("consolidated")]
    return sorted(safe or folder.glob("*.bin"))


def _fingerprint(path: Path) -> str:
    found = path.stat()
    return _of_file(path, found.st_size, found.st_mtime_ns, found.st_ino)


@lru_cache(maxsize=4096)
def _of_file(path: Path, *_: int) -> str:
    return fingerprint(path)


def _files_of(pairs: Any) -> list[str] | None:
    return [each["sha256"] for each in pairs.report.sources] if isinstance(pairs, TokenizedData) else None


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
