from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.lora_folders import add_adapter, load, save_base

Made = tuple[Path, Path]


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """make(model, **lora) is the folders of its base and of an adapter on it."""

    def make_both(model: Any, **settings: Any) -> Made:
        base = save_base(model, tmp_path / "base")
        return base, add_adapter(load(base), base, tmp_path / "adapter", **settings)

    return make_both
