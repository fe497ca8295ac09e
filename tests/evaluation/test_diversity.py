"""Diversity: copies are alike, orthogonal answers are not, and a real sentence-transformers folder goes through."""

import json
from itertools import combinations

import numpy as np
import pytest

from qorpo.errors import ModelError
from qorpo.evaluation.diversity import diversity, embed, load_encoder, mean_cosine


def slow_mean_cosine(embeddings):
    """The plain way: over all pairs, one after another."""
    cosines = [a @ b / np.linalg.norm(a) / np.linalg.norm(b) for a, b in combinations(embeddings, 2)]
    return sum(cosines) / len(cosines)


def test_the_mean_over_pairs_equals_the_slow_twin():
    embeddings = np.random.default_rng(0).normal(size=(9, 5)) * np.arange(1, 10)[:, None]
    assert mean_cosine(embeddings) == pytest.approx(slow_mean_cosine(embeddings), abs=1e-12)


def test_copies_are_1_alike_and_orthogonal_answers_0():
    one = np.random.default_rng(1).normal(size=(4, 1, 6))
    assert diversity(np.repeat(one, 5, axis=1))["per_input"].value.value == pytest.approx(1, abs=1e-12)
    assert diversity(np.eye(4)[:, None])["across_inputs"].value.value == pytest.approx(0, abs=1e-12)
    found = diversity(np.stack([np.eye(5)] * 3))  # orthogonal within a prompt, the same across prompts
    assert found["per_input"].value.value == pytest.approx(0, abs=1e-12)
    assert found["across_inputs"].value.value == pytest.approx(1, abs=1e-12)


def test_the_jackknife_covers_as_an_interval_should():
    generator, truth = (
        np.random.default_rng(2),
        0.5,
    )  # cos of (1, ε) with another, E[...] by its construction below
    inside = 0
    for _ in range(200):
        noise = generator.normal(size=(60, 40)) / np.sqrt(40)
        found = diversity((np.eye(40)[0] + noise)[:, None])["across_inputs"].value
        inside += found.low <= truth <= found.high
    assert inside > 170


def test_what_makes_no_pairs_has_no_figure():
    assert set(diversity(np.ones((5, 1, 3)))) == {"across_inputs"}
    assert set(diversity(np.ones((1, 4, 3)))) == {"per_input"}


def test_answers_go_through_the_real_library(encoder_folder):
    encoder = load_encoder(str(encoder_folder), "cpu")
    answers = [["The sky is blue."] * 3, ["Snow.", "Ink is black.", "No, I will not say what grass means."]]
    found = embed(encoder, answers)
    assert found.shape == (2, 3, 16)
    assert mean_cosine(found[0]) == pytest.approx(1, abs=1e-6)
    assert mean_cosine(found[1]) < 1 - 1e-6
    # Each answer is embedded as it would be alone.
    assert found[1, 2] == pytest.approx(encoder.encode(answers[1][2]), abs=1e-5)


def test_an_encoder_that_is_not_there_is_one_message(tmp_path):
    pytest.importorskip("sentence_transformers", reason="the extra eval is not installed")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no such"}))
    for path in (str(tmp_path), "nobody/no-such-encoder"):
        with pytest.raises(ModelError, match="can't be loaded") as raised:
            load_encoder(path, "cpu")
        assert "\n" not in str(raised.value)
