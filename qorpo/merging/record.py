"""What a merged folder says of itself: what it was merged from, and whether it was verified.

`verification.json` comes with the folder, says "not verified" first, and is replaced by the verdict. So an interrupted
verification can be finished later, and by nothing but the same merge.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qorpo.errors import DamageError, RunError
from qorpo.manifest import fingerprint
from qorpo.merging.source import Base, Trained
from qorpo.storage import write_json

VERIFICATION = "verification.json"
NOT_VERIFIED = {"verdict": "not verified"}


def merge_record(base: Base, trained: Sequence[Trained], *, onto: str, dtype: str | None) -> dict[str, Any]:
    """What decides a merged model: base and adapters by their weights, and how they were merged."""
    return {
        "base": _fingerprints(base.folder),
        "adapters": [[_fingerprints(each.adapter.folder), each.adapter.weight] for each in trained],
        "onto": onto,
        "dtype": dtype,
    }


def write_verification(folder: Path, record: Mapping[str, Any], verdict: Mapping[str, Any]) -> None:
    content = {**verdict, "merge": record}
    write_json(folder / VERIFICATION, {**content, "checksum": _checksum(content)})


def awaits_verification(output: Path, record: Mapping[str, Any], *, verify_only: bool) -> bool:
    """Whether the output holds the model of this very merge, and its verification is what is left to do.

    Args:
        verify_only: a verdict that is there is made again; and anything but such a model is an error.

    Raises:
        RunError: where it is not what `verify_only` needs. DamageError: where its verification.json is damaged.
    """
    path = output / VERIFICATION
    if not path.is_file():
        if verify_only:
            raise RunError(f"--verify-only: {output} holds no model that qorpo merged; leave it out to merge")
        return False
    found = _read(path)
    changed = [name for name in record if found["merge"].get(name) != record[name]]
    if verify_only and changed:
        raise RunError(
            f"--verify-only: {output} was merged from or by another {' and '.join(changed)}; give what it was merged "
            "with, or merge again into another output"
        )
    if not changed and not verify_only and found["verdict"] != NOT_VERIFIED["verdict"]:
        raise RunError(
            f"--output {output}: is there already, merged and verified; give another output, or verify it again with "
            "--verify-only"
        )
    return not changed


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        checksum = content.pop("checksum")
        if checksum == _checksum(content) and isinstance(content["merge"], dict) and content["verdict"]:
            return content
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DamageError(f"{path}: is damaged; remove {path.parent} and merge again")


def _fingerprints(folder: Path) -> dict[str, str]:
    """Of a model's or an adapter's weights."""
    paths = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("*.bin"))
    return {path.name: fingerprint(path) for path in paths}


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
