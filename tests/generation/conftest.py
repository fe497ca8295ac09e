"""One short run on the tiny base for all tests that ask a trained model."""

from pathlib import Path

import pytest
from helpers.tiny import preference_records, short_recipe

import qorpo


@pytest.fixture(scope="session")
def run(base: Path, pairs_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in NF4; read it, don't change it."""
    output = tmp_path_factory.mktemp("runs") / "run"
    qorpo.train(short_recipe(base, pairs_file, output))
    return output


@pytest.fixture(scope="session")
def merged(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("models") / "merged"
    qorpo.merge(run, output, verify=False)
    return output


@pytest.fixture(scope="session")
def questions() -> list[str]:
    """Of different lengths, so that batches are padded."""
    texts = [record["prompt"] for record in preference_records()[:12]]
    return [text * (1 + place % 4) for place, text in enumerate(texts)]
