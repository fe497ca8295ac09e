"""The main job from the command line: adapters from preference data, merged into the base."""

from pathlib import Path

import pytest
from chain import Row, adapters
from rows import ROWS


@pytest.mark.parametrize("row", ROWS)
def test_adapters(row: Row, tmp_path: Path):
    adapters(row, tmp_path)
