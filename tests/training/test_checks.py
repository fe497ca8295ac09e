"""Data against a model: longer than its positions."""

import logging
from types import SimpleNamespace

import pytest
from transformers import BloomConfig, GPT2Config, LlamaConfig

from qorpo.data.groups import Group
from qorpo.errors import DataError
from qorpo.training.checks import check_positions

GROUPS = [
    Group.of([[1] * 40, [2] * 5, [3] * 25], "a:1"),
    Group.of([[1] * 10, [2] * 30, [3]], "a:2"),
]  # up to 65


def model(config):
    return SimpleNamespace(config=config)


def test_a_table_of_positions_ends():
    check_positions(model(GPT2Config(n_positions=65)), GROUPS)
    check_positions(model(GPT2Config(n_positions=2)), [])
    with pytest.raises(
        DataError, match=r"response has 65 tokens, but the model has 64 positions; set it to 64 at"
    ):
        check_positions(model(GPT2Config(n_positions=64)), GROUPS)


def test_rotated_positions_go_on_with_a_warning(caplog):
    caplog.set_level(logging.INFO)
    check_positions(model(LlamaConfig(max_position_embeddings=65)), GROUPS)
    check_positions(model(BloomConfig()), GROUPS)  # has none
    assert not caplog.records
    check_positions(model(LlamaConfig(max_position_embeddings=64)), GROUPS)
    assert "has 65 tokens, and the model was made for 64" in caplog.text
