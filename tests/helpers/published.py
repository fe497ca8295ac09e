"""Models by their hub ids, from the values that their config.json publishes: a plan needs no more."""

import json
from pathlib import Path

from transformers import PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

CONFIGS = Path(__file__).parents[2] / "configs"
PUBLISHED = json.loads((CONFIGS / "published.json").read_text(encoding="utf-8"))


def published_config(path: str) -> PretrainedConfig:
    return CONFIG_MAPPING[PUBLISHED[path]["model_type"]](**PUBLISHED[path])
