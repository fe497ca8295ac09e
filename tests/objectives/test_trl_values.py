"""qorpo's objectives against TRL's losses on the same tokens, as numbers that scripts/bench/trl_values.py made."""

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qorpo.build import build_objective
from qorpo.objectives.base import Scores
from qorpo.recipe import load_recipe

FOUND = json.loads(Path(__file__).with_name("trl_values.json").read_text(encoding="utf-8"))
CASES = {case["objective"]["name"]: case for case in FOUND["cases"]}
COMPARED = {"orpo", "cpo", "simpo", "dpo", "sppo", "ipo", "kto"}
TOLERANCE = 1e-5  # float32, and TRL computes a padded batch
SCRIPT = Path(__file__).parents[2] / "scripts" / "bench" / "trl_values.py"


def loss_of(case: dict[str, Any], **changes: Any) -> float:
    """qorpo's loss on a case's groups, all in one micro-batch, from log-probs in float32; the objective as a recipe builds it."""
    keys = {**case["objective"], **changes}
    if "weight" in keys:
        keys["lambda"] = keys.pop("weight")
    recipe = {"model": {"path": "demo"}, "data": {"train": "demo"}, "objective": keys, "output": "unused"}
    objective = build_objective(load_recipe(recipe).objective)
    parts = [[group["prompt"], *group["responses"]] for group in case["groups"]]
    num_parts = len(parts[0])
    logps_S = torch.tensor([logp for group in parts for part in group for logp in part])
    segments_S = torch.tensor(
        [
            index * num_parts + place
            for index, group in enumerate(parts)
            for place, part in enumerate(group)
            for _ in part
        ]
    )
    # The prompt's first token is there, though nothing predicts it.
    lengths = [[len(prompt) + 1, *map(len, responses)] for prompt, *responses in parts]
    scores = Scores.of_tokens(
        logps_S,
        segments_S,
        torch.tensor(lengths, dtype=torch.float64),
        reference_logps_PN=torch.tensor([group["reference"] for group in case["groups"]]).double(),
        desirable_P=torch.tensor([group.get("desirable", False) for group in case["groups"]]),
    )
    totals = objective.totals(lengths)
    if ratios := case.get("mismatched_log_ratios"):
        totals = totals._replace(kl=max(sum(ratios) / len(ratios), 0.0))
    return objective(scores, totals).loss.item() / totals.groups


def test_every_objective_that_trl_has_is_compared():
    assert CASES.keys() == COMPARED
    assert FOUND["versions"]["trl"] == "1.16.0"
    for case in CASES.values():
        assert len(case["groups"]) == 4
        lengths = [tuple(map(len, group["responses"])) for group in case["groups"]]
        assert len(set(lengths)) > 1, "of one length, means over tokens and over sequences would be the same"


@pytest.mark.parametrize("name", CASES)
def test_the_loss_is_trls(name):
    # TRL's sppo_hard is without the half that the paper and its authors' code have.
    ours = loss_of(CASES[name]) * (2 if name == "sppo" else 1)
    assert ours == pytest.approx(CASES[name]["trl_loss"], rel=TOLERANCE)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("orpo", {"nll_tokens": "response"}),
        ("orpo", {"nll_average": "sequence"}),
        ("orpo", {"weight": 0.4}),
        ("cpo", {"nll_tokens": "all"}),
        ("cpo", {"nll_average": "sequence"}),
        ("cpo", {"alpha": 0.71}),
        ("simpo", {"gamma_beta_ratio": 0.81}),
        ("dpo", {"beta": 0.31}),
        ("sppo", {"beta": 0.0101}),
        ("ipo", {"beta": 0.51}),
        ("kto", {"undesirable_weight": 1.0}),
    ],
)
def test_another_convention_is_not_trls(name, changes):
    # So the one that is makes a difference on these pairs, far above the tolerance.
    ours = loss_of(CASES[name], **changes) * (2 if name == "sppo" else 1)
    assert ours != pytest.approx(CASES[name]["trl_loss"], rel=100 * TOLERANCE)


def test_ktos_kl_counts():
    case = CASES["kto"]
    assert sum(case["mismatched_log_ratios"]) > 0
    without = {**case, "mismatched_log_ratios": []}
    assert loss_of(without) != pytest.approx(case["trl_loss"], rel=100 * TOLERANCE)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_installed_trl_gives_the_same_numbers(monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    for library in ("trl.experimental.orpo", "trl.experimental.cpo"):
        pytest.importorskip(library, reason="TRL, to compare with, is not installed")
    spec = importlib.util.spec_from_file_location("trl_values", SCRIPT)
    script = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "trl_values", script)
    spec.loader.exec_module(script)
    from accelerate.state import AcceleratorState, GradientState

    try:
        now = {case["objective"]["name"]: case for case in script.measure()["cases"]}
    finally:  # Accelerate's states are the process's: the next test's are its own
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    for name, case in CASES.items():
        assert now[name]["objective"] == case["objective"]
        assert now[name]["trl_loss"] == pytest.approx(case["trl_loss"], rel=TOLERANCE), name
        assert loss_of(now[name]) == pytest.approx(loss_of(case), rel=TOLERANCE), name
