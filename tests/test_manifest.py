"""Manifests: every flipped bit is noticed, in the files and in the manifest itself."""

import random
from pathlib import Path

import pytest

from qorpo.errors import DamageError
from qorpo.manifest import BLOCK_BYTES, MANIFEST, SMALL_BYTES, check_folder, fingerprint, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "part").mkdir()
    (tmp_path / "weights").write_bytes(random.Random(0).randbytes(5000))
    (tmp_path / "part" / "note.txt").write_text("a note\n")
    write_manifest(tmp_path, {"base": "abc", "λ": [1, None]})
    return tmp_path


def test_a_folder_as_it_was_written_is_right(folder):
    manifest = check_folder(folder, "make it again")
    assert manifest is not None
    assert manifest.belongs_to == {"base": "abc", "λ": [1, None]}
    assert sorted(manifest.files) == ["part/note.txt", "weights"]


def test_any_flipped_bit_is_named_with_the_remedy(folder):
    chance = random.Random(1)
    for name in ("weights", "part/note.txt", MANIFEST):
        path = folder / name
        good = path.read_bytes()
        places = range(8 * len(good)) if len(good) < 500 else chance.sample(range(8 * len(good)), 400)
        for place in places:
            bad = bytearray(good)
            bad[place // 8] ^= 1 << place % 8
            path.write_bytes(bad)
            with pytest.raises(DamageError, match=f"{name}: is damaged .*; make it again"):
                check_folder(folder, "make it again")
        path.write_bytes(good)
    assert check_folder(folder, "")


def test_all_that_is_missing_comes_in_one_message(folder):
    (folder / "weights").unlink()
    (folder / "part" / "note.txt").write_text("another\n")
    with pytest.raises(
        DamageError, match=r"(?s)note.txt: is damaged .*; copy it anew\n.*weights: is missing"
    ):
        check_folder(folder, "copy it anew")
    assert check_folder(folder, "copy it anew", only=[]) is not None


@pytest.mark.parametrize(
    "text", ["", "null", "[]", '"text"', "{}", '{"checksum": 1}', "[" * 100_000], ids=range(7)
)
def test_a_manifest_of_anything_else_is_damaged(folder, text):
    (folder / MANIFEST).write_text(text)
    with pytest.raises(DamageError, match=MANIFEST):
        check_folder(folder, "")


def test_a_folder_without_one_has_none(tmp_path):
    assert check_folder(tmp_path, "") is None


def test_hashes_that_are_known_are_taken(tmp_path):
    (tmp_path / "shard").write_bytes(b"1")
    write_manifest(tmp_path, {}, hashes={"shard": "0" * 64})
    with pytest.raises(DamageError, match="shard: is damaged"):
        check_folder(tmp_path, "")


def test_a_fingerprint_tells_large_files_apart_by_samples(tmp_path):
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.truncate(SMALL_BYTES + 3 * BLOCK_BYTES)
    first = fingerprint(path)
    assert first.startswith("sampled:")
    for place in (0, path.stat().st_size - 1):
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"1")
        assert fingerprint(path) != first
        with path.open("r+b") as file:
            file.seek(place)
            file.write(b"\0")
    assert fingerprint(path) == first
    with path.open("r+b") as file:
        file.truncate(SMALL_BYTES + 2 * BLOCK_BYTES)
    assert fingerprint(path) != first
