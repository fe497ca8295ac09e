"""Models by their hub ids, from the values that their config.json publishes: a plan needs no more."""

import json
from pathlib import Path

import pytest
from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from qorpo.planning import plan as plan_module

PUBLISHED = json.loads((Path(__file__).parent / "published_configs.json").read_text(encoding="utf-8"))


def published_config(path: str, **kwargs) -> PretrainedConfig:
    return CONFIG_MAPPING[PUBLISHED[path]["model_type"]](**PUBLISHED[path])


@pytest.fixture
def hub(monkeypatch):
    """Hub ids resolve to the published configs."""
    monkeypatch.setattr(plan_module, "load_config", published_config)


@pytest.fixture
def hub_folder(tmp_path):
    """hub_folder("org/name"): a folder with that config.json and nothing else."""

    def make(name: str) -> Path:
        folder = tmp_path / name.replace("/", "--")
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(PUBLISHED[name]), encoding="utf-8")
        return folder

    return make
