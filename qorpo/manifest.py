"""Manifests: what a folder held when it was written, and what it belongs to, so that damage is noticed.

`qorpo-manifest.json` holds each file's sha256, what the folder belongs to (recipe, base, tokenizer, template, data),
and a checksum of itself. A single flipped bit in any of it is an error with the file's name.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qorpo.errors import DamageError
from qorpo.storage import write_text

logger = logging.getLogger(__name__)

MANIFEST = "qorpo-manifest.json"
BLOCK_BYTES = 1 << 20
SMALL_BYTES = 64 << 20
"""A file up to this size is hashed whole by `fingerprint`."""
SAMPLES = 64
"""So many blocks of a larger file are."""


@dataclass(frozen=True)
class Manifest:
    """A folder's files by their path in it, each with its sha256; and what the folder belongs to."""

    files: dict[str, str]
    belongs_to: dict[str, Any]
    fingerprints: dict[str, str]  # of large files


def write_manifest(
    folder: Path, belongs_to: Mapping[str, Any], *, hashes: Mapping[str, str] | None = None
) -> None:
    """Write down what a folder holds.

    Args:
        belongs_to: JSON values by name, to be compared by who reads the folder.
        hashes: sha256 of files by their path in the folder, where they are known already.
    """
    hashes = hashes or {}
    paths = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path != folder / MANIFEST
    }
    files = {name: hashes.get(name) or sha256_of(path) for name, path in paths.items()}
    large = {name: fingerprint(path) for name, path in paths.items() if path.stat().st_size > SMALL_BYTES}
    content = {"belongs_to": dict(belongs_to), "files": files, "fingerprints": large}
    write_text(folder / MANIFEST, _text({**content, "checksum": _checksum(content)}))


def read_manifest(folder: Path, remedy: str) -> Manifest | None:
    """A folder's manifest; None where it has none.

    Raises:
        DamageError: where it is not as it was written, with the remedy.
    """
    path = folder / MANIFEST
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        return None
    try:
        content = json.loads(raw)
        checksum = content.pop("checksum")
        # By their bytes: a flipped space is damage too.
        if checksum == _checksum(content) and raw == _text({**content, "checksum": checksum}).encode():
            return Manifest(content["files"], content["belongs_to"], content["fingerprints"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        pass
    raise DamageError(f"{path}: is damaged (its checksum is wrong); {remedy}")


def check_folder(
    folder: Path,
    remedy: str,
    *,
    only: Sequence[str] | None = None,
    is_quick: bool = False,
    for_people: Sequence[str] = (),
) -> Manifest | None:
    """Hold a folder's files to its manifest, and return it; None where it has none.

    Args:
        remedy: what a person is to do where a file is damaged or missing.
        only: paths of the files to look at; None: all of them.
        is_quick: of large files read samples alone, as `fingerprint` does.
        for_people: paths of files that people may have edited: a change is a warning.

    Raises:
        DamageError: naming each file that is damaged or missing, with the remedy.
    """
    manifest = read_manifest(folder, remedy)
    if manifest is None:
        return None
    problems = []
    for name, expected in manifest.files.items():
        path = folder / name
        if only is not None and name not in only:
            continue
        sampled = manifest.fingerprints.get(name) if is_quick else None
        if not path.is_file():
            problem = "is missing"
        elif sampled and fingerprint(path) != sampled:
            problem = "is damaged (its size and samples are not those it was written with)"
        elif not sampled and sha256_of(path) != expected:
            problem = "is damaged (its sha256 is not the one it was written with)"
        else:
            continue
        if name in for_people:
            logger.warning("%s: is not as qorpo wrote it", path)
        else:
            problems.append(f"{path}: {problem}")
    if problems:
        raise DamageError("\n  ".join([f"{problems[0]}; {remedy}", *problems[1:]]))
    return manifest


def sha256_of(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else _read(file)
        )


def fingerprint(path: Path) -> str:
    """Tells files apart without reading large ones whole: by size, first and last block, and blocks between.

    Up to 64 MiB it is the sha256 of the whole; of a larger file, such as a base's weights, that of its size and of
    66 blocks of 1 MiB, spread evenly. A changed model is noticed, a single flipped bit may not be.
    """
    size = path.stat().st_size
    if size <= SMALL_BYTES:
        return sha256_of(path)
    sha = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for number in range(SAMPLES + 2):
            file.seek((size - BLOCK_BYTES) * number // (SAMPLES + 1))
            sha.update(file.read(BLOCK_BYTES))
    return f"sampled:{sha.hexdigest()}"


def _read(file: Any) -> str:  # Python 3.10
    sha = hashlib.sha256()
    while block := file.read(BLOCK_BYTES):
        sha.update(block)
    return sha.hexdigest()


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(_text(content).encode()).hexdigest()


def _text(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"
