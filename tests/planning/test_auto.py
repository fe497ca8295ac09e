"""The plan at work in a run: what `auto` becomes, where it is written down, and a card that is capped."""

import ast
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.tiny import changed
from torch._subclasses.fake_tensor import DataDependentOutputException
from torch.cuda._utils import _get_device_index
from transformers.models.llama.modeling_llama import LlamaMLP

import qorpo
from qorpo import Trainer, load_pairs
from qorpo.model.checkpointing import _Recomputed
from qorpo.model.load import load_model, load_tokenizer
from qorpo.model.parts import decoder_layers
from qorpo.planning import auto, fake_model, live_bytes
from qorpo.planning.settings import CONTEXT_BYTES, GIB
from qorpo.recipe import load_recipe
from qorpo.training.run import train


def trainer_of(recipe_dict, base, pairs_file, **changes) -> Trainer:
    recipe = load_recipe(changed(recipe_dict, **changes))
    return Trainer(load_model(str(base)), load_tokenizer(str(base)), recipe, load_pairs(str(pairs_file)))


def checkpointed_layers(trainer: Trainer) -> list[bool]:
    return [isinstance(layer.forward, _Recomputed) for layer in decoder_layers(trainer.model)]


def test_off_cuda_and_without_a_budget_auto_is_fixed(recipe_dict, base, pairs_file, monkeypatch):
    monkeypatch.setattr(auto, "StepCounter", None)  # nothing is counted
    trainer = trainer_of(recipe_dict, base, pairs_file)
    memory = trainer.recipe.memory
    assert (memory.microbatch_tokens, memory.logprob_chunk_tokens) == (2048, 256)
    assert (memory.activation_checkpointing, memory.activation_offload) == (False, False)
    assert trainer.session.unwrapped.chunk_tokens == 256
    assert checkpointed_layers(trainer) == [False, False]


@pytest.mark.parametrize(("layers_that_fit", "recomputed"), [(0.9, True), (1.1, 1), (2.1, False)])
def test_on_the_cpu_layers_are_spared_recomputation_while_memory_is_plenty(
    recipe_dict, base, pairs_file, monkeypatch, layers_that_fit, recomputed
):
    longest = (30, 20, 10)
    trainer = trainer_of(recipe_dict, base, pairs_file, memory__activation_checkpointing=False)
    kept = auto.kept_bytes(trainer.model, "sdpa", longest)
    available = layers_that_fit / 2 * kept * 2048 / 60 / auto.HOST_SHARE
    monkeypatch.setattr(auto.psutil, "virtual_memory", lambda: type("Memory", (), {"available": available}))
    recipe = trainer.recipe.replace("memory.activation_checkpointing", "auto")
    resolved = auto.resolve_memory(
        recipe, trainer.model, longest, device=torch.device("cpu"), dtype=torch.bfloat16
    )
    assert resolved.memory.activation_checkpointing == recomputed


def test_what_a_forward_keeps_is_counted_once_and_without_the_model(recipe_dict, base, pairs_file):
    trainer = trainer_of(recipe_dict, base, pairs_file, memory__activation_checkpointing=False)
    short, long = (
        auto.kept_bytes(trainer.model, "sdpa", tuple(lengths)) for lengths in ((9, 6, 5), (90, 60, 50))
    )
    constant = (10 * short - long) / 9  # the adapters' casts, whatever the tokens
    assert 0 <= constant < 4 * sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    assert long > 200 * 2 * 2 * 64 * 2  # at the least each layer's input and the MLP's


@pytest.mark.parametrize(
    ("budget_mib", "checkpointing", "recomputed"),
    [(400, False, [False, False]), (0.1, True, [True, True])],
)
def test_within_a_budget_auto_is_planned(
    recipe_dict, base, pairs_file, caplog, budget_mib, checkpointing, recomputed
):
    caplog.set_level(logging.INFO, "qorpo")
    trainer = trainer_of(recipe_dict, base, pairs_file, memory__budget_gib=budget_mib / 1024)
    memory = trainer.recipe.memory
    assert memory.activation_checkpointing == checkpointing
    assert checkpointed_layers(trainer) == recomputed
    assert "auto" not in memory.model_dump().values()
    text = caplog.text
    assert f"memory: microbatch_tokens {memory.microbatch_tokens}" in text
    assert ("does not fit: the plan advises" in text) == (budget_mib < 1)


def test_what_auto_became_is_saved_and_what_was_given_is_kept(recipe_dict):
    result = train(
        changed(recipe_dict, train__max_steps=1, memory__budget_gib=0.4, memory__activation_checkpointing=1,
                memory__logprob_chunk_tokens=33)
    )  # fmt: skip
    saved = load_recipe(result.output / "recipe.yaml")
    assert saved == result.trainer.recipe
    assert saved.memory.budget_gib == 0.4
    assert (saved.memory.activation_checkpointing, saved.memory.logprob_chunk_tokens) == (1, 33)
    assert checkpointed_layers(result.trainer) == [True, False]


LONGEST = (9, 6, 5)


def planned(recipe_dict, base, longest=LONGEST):
    """A recipe's memory resolved within a budget, and the advice for it."""
    recipe, model = load_recipe(changed(recipe_dict, memory__budget_gib=0.4)), load_model(str(base))
    resolved = auto.resolve_memory(recipe, model, longest, device=torch.device("cpu"), dtype=torch.bfloat16)
    return resolved.memory, auto.advice_for(resolved, model, longest, torch.bfloat16)


@pytest.mark.parametrize("error", [KeyError, NotImplementedError, DataDependentOutputException, ImportError])
def test_a_model_that_can_not_be_planned_trains_with_fixed_values(
    recipe_dict, base, monkeypatch, caplog, error
):
    def branches_on_a_value(self, hidden):
        raise error("odd")

    monkeypatch.setattr(LlamaMLP, "forward", branches_on_a_value)
    memory, advice = planned(recipe_dict, base)
    assert (memory.microbatch_tokens, memory.activation_checkpointing) == (2048, True)
    (line,) = [record.getMessage() for record in caplog.records if "no plan" in record.getMessage()]
    assert "fixed values are taken" in line
    assert f"llama: no step of this model can be planned. sdpa: {error.__name__} in test_auto.py:" in line
    assert advice.startswith("lower data.max_length")


@pytest.mark.parametrize("place", ["lengths of a pair", "counting of bytes", "stand-in for NF4"])
def test_a_fault_of_the_plan_itself_is_not_taken_for_the_models(recipe_dict, base, monkeypatch, place):
    longest = LONGEST
    if place == "lengths of a pair":
        longest = (9.0, 6.0, 5.0)  # as nulls in a column once made them
    elif place == "counting of bytes":
        monkeypatch.setattr(live_bytes, "BLOCK", None)
    else:
        monkeypatch.setattr(fake_model, "WEIGHTS_PER_ABSMAX", 0)
    with pytest.raises((TypeError, ZeroDivisionError)):
        planned(recipe_dict, base, longest)


class Card:
    """torch.cuda as far as free memory is asked for, of a card of 80 GiB with 70 free and 3 of PyTorch's own."""

    def __init__(self, monkeypatch):
        self.fraction = None
        self.total_memory = 80 * GIB
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (70 * GIB, 80 * GIB))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * GIB)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: self)
        monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", self.cap)

    def cap(self, fraction, device=None):
        assert device is None or _get_device_index(device) == 0  # as the real one looks for its card
        self.fraction = fraction


def test_a_card_gives_what_is_free_within_the_budget(recipe_dict, monkeypatch):
    Card(monkeypatch)
    device = torch.device("cuda")
    assert auto.free_bytes(load_recipe(recipe_dict), device) == 73 * GIB - auto.LATER_BYTES
    budget = load_recipe(changed(recipe_dict, memory__budget_gib=24))
    assert auto.free_bytes(budget, device) == 24 * GIB - CONTEXT_BYTES
    more = load_recipe(changed(recipe_dict, memory__budget_gib=100))
    assert auto.free_bytes(more, device) == 73 * GIB - auto.LATER_BYTES


@pytest.mark.parametrize(
    ("budget", "fraction"), [("auto", 72.75 / 80), (24, (24 - 0.6) / 80), (100, 72.75 / 80), (0.1, 0.0)]
)
def test_a_card_is_capped_at_the_budget_and_at_what_is_free(monkeypatch, budget, fraction):
    card = Card(monkeypatch)
    auto.cap_card(budget, torch.device("cpu"))
    assert card.fraction is None
    for device in ("cuda", "cuda:0"):
        card.fraction = None
        auto.cap_card(budget, torch.device(device))
        assert card.fraction == (fraction if fraction is None else pytest.approx(fraction))


@pytest.mark.skipif(sys.platform != "linux", reason="CUDA's allocator has no expandable segments elsewhere")
@pytest.mark.parametrize("own", [{}, {"PYTORCH_ALLOC_CONF": "x:1"}, {"PYTORCH_CUDA_ALLOC_CONF": "y:2"}])
def test_fragmentation_is_seen_to_before_cuda_starts_unless_the_user_did(own):
    names = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
    others = {name: value for name, value in os.environ.items() if name not in names}
    script = f"import os, qorpo; print({{name: os.environ[name] for name in {names} if name in os.environ}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True,
        env={**others, **own, "PYTHONPATH": str(Path(qorpo.__file__).parents[1])},
    )  # fmt: skip
    assert ast.literal_eval(done.stdout) == (own or {"PYTORCH_ALLOC_CONF": "expandable_segments:True"})
