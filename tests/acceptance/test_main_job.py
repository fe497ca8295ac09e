"""The main job from the command line: adapters from preference data, merged into the base."""

from pathlib import Path

import pytest
from chain import Row, adapters, after_sft
from rows import AFTER_SFT, ROWS


@pytest.mark.parametrize("row", ROWS)
def test_adapters(row: Row, tmp_path: Path):
    adapters(row, tmp_path)


@pytest.mark.slow  # twice the main job
@pytest.mark.parametrize("row", AFTER_SFT)
def test_adapters_after_sft(row: Row, tmp_path: Path):
    after_sft(row, tmp_path)
