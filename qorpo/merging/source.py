"""What goes into a merge: runs or adapters, and the base they were trained on."""

import json
import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from transformers import AutoConfig

from qorpo.build import with_remote_code
from qorpo.card import is_hub_id
from qorpo.data.chat_format import ChatFormat
from qorpo.errors import DamageError, ModelError, RunError
from qorpo.identity import base_identity, chat_identity, differences
from qorpo.manifest import MANIFEST, check_folder
from qorpo.merging.adapter import Adapter
from qorpo.model.load import (
    ask_hub_once,
    check_model_folder,
    load_tokenizer,
    model_source,
    read_chat_template,
)
from qorpo.recipe import Recipe, load_recipe
from qorpo.storage import read_note, recover

logger = logging.getLogger(__name__)

# Of a hub's model: what transformers opens, and what belongs to it.
FILES = [
    "*.json",
    "*.safetensors",
    "*.txt",
    "*.model",
    "*.jinja",
    "*.py",
    "*.tiktoken",
    "LICENSE*",
    "NOTICE*",
]
NOTES = re.compile(
    r"((generation|tokenizer)_)?config\.json|(special_tokens_map|added_tokens|tokenizer)\.json"
)
DOUBLES = ["consolidated*", "original/*"]  # the same weights in another format


@dataclass(frozen=True)
class Trained:
    """An adapter, and the run it came from where qorpo trained it."""

    adapter: Adapter
    run: Path | None
    recipe: Recipe | None = None
    belongs_to: Mapping[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> str | None:
        """Of what the adapter itself says, the path of its base."""
        recipe = self.recipe
        return recipe.model.path if recipe else self.adapter.config.base_model_name_or_path

    @property
    def base_revision(self) -> str | None:
        """The commit that the run noted, else the branch or commit that was asked for."""
        recipe, commit = self.recipe, self.note("environment.json").get("base_commit")
        return commit or (recipe.model.revision if recipe else self.adapter.config.revision)

    def note(self, name: str) -> dict[str, Any]:
        """A JSON file of the run; empty where there is none."""
        path = self.run / name if self.run else None
        return (read_note(path) if path and path.is_file() else None) or {}


def find_trained(path: str, *, allow_pickle: bool = False, trust_remote_code: bool = False) -> Trained:
    """A run folder, its adapter, one of its checkpoints, or an adapter alone; `path=0.5` merges half of its change.

    Raises:
        RunError: where there is none of these. DamageError: where its manifest says that it is damaged. RecipeError:
            where the run needed a model's own code, and the person does not trust it again.
    """
    folder, weight = _split_weight(path)
    of = folder.parent.parent if folder.parent.name == "checkpoints" else folder
    if _is_full(of):
        ready = (
            f"{of / 'model'} opens as it is, and"
            if (of / "model").is_dir()
            else "its model is not written yet;"
        )
        raise RunError(
            f"{folder}: a run of full tuning has no adapter to merge: {ready} qorpo export writes a checkpoint's model"
        )
    if (folder / "recipe.yaml").is_file():
        recover(folder)
        if not (folder / "adapter").is_dir():
            raise RunError(
                f"{folder}: the run has no adapter yet; finish it by --resume, or give a checkpoint"
            )
        run, folder = folder, folder / "adapter"
    elif (folder / "adapter_config.json").is_file():
        above = folder.absolute().parent
        homes = (above, above.parent) if above.name == "checkpoints" else (above,)
        run = next((home for home in homes if (home / "recipe.yaml").is_file()), None)  # type: ignore[assignment]
    else:
        raise RunError(
            f"{folder}: no run (recipe.yaml) and no adapter (adapter_config.json) there; give a run's folder"
        )
    recipe = None
    if run is not None:
        recipe = with_remote_code(load_recipe(run / "recipe.yaml"), run / "recipe.yaml", trust_remote_code)
    belongs_to = _check_whole(
        folder, is_checkpoint=run is not None and folder.absolute().parent != run.absolute()
    )
    return Trained(Adapter.open(folder, weight, allow_pickle=allow_pickle), run, recipe, belongs_to)


def _check_whole(folder: Path, *, is_checkpoint: bool) -> Mapping[str, Any]:
    """What an adapter belongs to, as its manifest says; PEFT's own have none."""
    if is_checkpoint:
        remedy = "give another checkpoint"
    else:
        remedy = (
            f"make it again (--resume without the folder), or remove {MANIFEST} if you changed it yourself"
        )
    manifest = check_folder(folder, remedy, for_people=["README.md"])
    if manifest is None and is_checkpoint:
        raise DamageError(f"{folder}: has no {MANIFEST}, which qorpo writes with every checkpoint; {remedy}")
    return manifest.belongs_to if manifest else {}


def _is_full(run: Path) -> bool:
    """Whether this is the folder of a run that trained all parameters."""
    file = run / "recipe.yaml"
    return file.is_file() and load_recipe(file).tuning == "full"


def _split_weight(path: str) -> tuple[Path, float]:
    name, equals, text = path.rpartition("=")
    if equals and not Path(path).expanduser().exists():
        try:
            return Path(name).expanduser(), float(text)
        except ValueError:
            pass
    return Path(path).expanduser(), 1.0


@dataclass(frozen=True)
class Base:
    """A base model's folder with its configuration, as transformers and as the file have it."""

    folder: Path
    name: str
    commit: str | None  # of a hub's snapshot
    config: Any
    raw_config: dict[str, Any]
    trust_remote_code: bool


def find_base(
    trained: Sequence[Trained],
    path: str | None,
    revision: str | None,
    *,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> Base:
    """The base that the adapters were trained on, or the one given instead, from a local folder or the hub's cache.

    Raises:
        ModelError: where it can't be had, or is not the one that an adapter was trained on.
    """
    bases = list(dict.fromkeys(each.base for each in trained if each.base))
    if path is None and len(bases) != 1:
        said = " and ".join(bases) if bases else "no base"
        raise ModelError(f"the adapters name {said}; say which to merge into with --base")
    is_given, path = path is not None, path or bases[0]
    source = model_source(path)
    revision = revision or next((each.base_revision for each in trained if each.base == path), None)
    folder = Path(source)
    if not folder.is_dir():
        patterns = [*FILES, "*.bin"] if allow_pickle else FILES
        ask_hub_once(source, revision)
        try:
            folder = Path(
                snapshot_download(source, revision=revision, allow_patterns=patterns, ignore_patterns=DOUBLES)
            )
        except Exception as error:  # of whichever HTTP library is underneath
            raise ModelError(
                f"{source}: neither a folder nor to be had from the hub: {str(error).splitlines()[0]}"
            ) from error
    commit = folder.name if folder.parent.name == "snapshots" else None
    _check_same(trained, path, commit)
    check_model_folder(folder)
    _check_unchanged(trained, folder, is_given)
    for home in (folder, *(each.adapter.folder for each in trained)):
        _check_notes(home)
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(f"{folder}: config.json can't be read: {str(error).splitlines()[0]}") from error
    if raw.get("quantization_config"):
        raise ModelError(f"{folder}: the base is quantized already; give the unquantized one with --base")
    return Base(folder, path, commit, config, raw, trust_remote_code)


def _check_unchanged(trained: Sequence[Trained], folder: Path, is_given: bool) -> None:
    """Holds the base to what each adapter was trained on; one that the person gives instead is only said to differ."""
    now = {"base": base_identity(folder) if any(each.belongs_to for each in trained) else None}
    for each in trained:
        chat_now = {}
        if each.recipe and each.belongs_to and not (each.adapter.folder / "tokenizer_config.json").is_file():
            model = each.recipe.model
            tokenizer = load_tokenizer(str(folder), trust_remote_code=model.trust_remote_code)
            chat_now = chat_identity(ChatFormat(tokenizer, read_chat_template(model.chat_template)))
        found = differences(each.belongs_to, {**now, **chat_now})
        if found and is_given:
            logger.warning("%s: %s", each.adapter.folder, "; ".join(found))
        elif found:
            raise ModelError(
                "\n  ".join(
                    [
                        f"{each.adapter.folder}: was trained on something else; give its base with --base:",
                        *found,
                    ]
                )
            )


def _check_notes(folder: Path) -> None:
    """Raises ModelError for a file of settings that can't be read: what is made of it would be as torn."""
    for path in sorted(folder.glob("*.json")):
        if not NOTES.fullmatch(path.name):
            continue
        try:
            if not isinstance(json.loads(path.read_text(encoding="utf-8")), dict):
                raise ValueError("it is no JSON object")
        except (OSError, ValueError, RecursionError) as error:
            reason = str(error).splitlines()[0]
            raise ModelError(f"{path}: can't be read ({reason}); put back a whole one") from error


def _check_same(trained: Sequence[Trained], path: str, commit: str | None) -> None:
    for each in trained:
        if each.base and each.base != path and is_hub_id(each.base) and is_hub_id(path):
            raise ModelError(
                f"{each.adapter.folder}: trained on {each.base}, not on {path}; to merge into that nonetheless, "
                "give its local folder with --base"
            )
        noted = each.note("environment.json").get("base_commit")
        if noted and commit and noted != commit:
            raise ModelError(
                f"{each.adapter.folder}: trained on commit {noted} of its base, and this is {commit}; "
                f"give --revision {noted}"
            )
