"""A tiny random base model, a file of pairs and a recipe for both: what the tests of whole runs stand on."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Read before torch and transformers are imported: no test may wait for a hub, and models of a few thousand weights
# lose more to threads than they gain.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Tokens that one test leaves must not be another's.
os.environ["HF_DATASETS_CACHE"] = tempfile.mkdtemp()
os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"
atexit.register(shutil.rmtree, os.environ["HF_DATASETS_CACHE"], ignore_errors=True)

import pytest  # noqa: E402
from helpers.tiny import make_base, preference_records, short_recipe, write_records  # noqa: E402


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base's folder; read it, copy it, don't change it."""
    return make_base(tmp_path_factory.mktemp("models") / "base")


@pytest.fixture
def base_copy(base: Path, tmp_path: Path) -> Path:
    """A copy of the tiny base to break."""
    return Path(shutil.copytree(base, tmp_path / "base"))


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_records(tmp_path_factory.mktemp("data") / "pairs.jsonl", preference_records())


@pytest.fixture
def recipe_dict(base: Path, pairs_file: Path, tmp_path: Path) -> dict[str, Any]:
    """A short run on the tiny base, into `tmp_path / "run"`."""
    return short_recipe(base, pairs_file, tmp_path / "run")


@pytest.fixture
def command(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """`qorpo` in this process: command("train", "r.yaml") is (exit code, stdout, stderr)."""
    from qorpo.cli import main

    def run(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["qorpo", *map(str, arguments)])
        # Handlers that libraries made at import hold on to an earlier test's stderr.
        monkeypatch.setattr(logging, "raiseExceptions", False)
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        out, err = capfd.readouterr()
        return code, out, err

    return run
