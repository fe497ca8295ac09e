"""The main job with --full: all parameters trained, and a checkpoint exported."""

from pathlib import Path

import pytest
from chain import Row, all_parameters
from rows import ROWS_FOR_FULL


@pytest.mark.parametrize("row", ROWS_FOR_FULL)
def test_all_parameters(row: Row, tmp_path: Path):
    all_parameters(row, tmp_path)
