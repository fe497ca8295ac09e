"""liger's modules: in the model that asked for them and nowhere else, never its loss, and out again where they differ."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.architectures import SHARED, build
from transformers.models.llama import modeling_llama

from qorpo.errors import ModelError
from qorpo.model.adapters import attach_lora
from qorpo.model.liger import apply_liger, has_liger, own_modules, remove_liger
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import resolve_mode

monkey_patch = pytest.importorskip("liger_kernel.transformers.monkey_patch")

SUPPORTED = [name for name, (kind, _) in SHARED.items() if kind in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN]


def attributes(model):
    return {name: set(vars(module)) for name, module in model.named_modules()}


def patched(model):
    return {type(module).__name__ for module in model.modules() if "forward" in vars(module)}


@pytest.mark.parametrize("name", SUPPORTED)
def test_norms_mlps_and_attention_of_this_model_alone_are_changed(name):
    model, other = build(name), build(name)
    file = sys.modules[type(model).__module__]
    names, classes = dict(vars(file)), {type(module): type(module).forward for module in model.modules()}
    before = attributes(other)
    assert apply_liger(model, True)
    assert {kind.removeprefix(type(model).__name__.removesuffix("ForCausalLM")) for kind in patched(model)} == {
        "RMSNorm", "MLP", "Attention",
    }  # fmt: skip
    assert vars(file) == names
    assert all(vars(file)[key] is value for key, value in names.items())
    assert all(kind.forward is forward for kind, forward in classes.items())
    assert attributes(other) == attributes(build(name)) == before
    assert patched(other) == set()


def test_rope_is_ligers_in_this_model_and_the_files_own_elsewhere():
    model, other = build("llama"), build("llama")
    apply_liger(model, True)
    ours, theirs = (each.model.layers[0].self_attn.forward.__func__ for each in (model, other))
    assert ours.__globals__["apply_rotary_pos_emb"].__module__.startswith("liger_kernel")
    assert theirs.__globals__["apply_rotary_pos_emb"] is modeling_llama.apply_rotary_pos_emb
    assert modeling_llama.apply_rotary_pos_emb.__module__ == modeling_llama.__name__


@pytest.mark.parametrize("name", SUPPORTED)
def test_its_loss_is_never_applied(name, monkeypatch):
    asked = []
    real = monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN[SHARED[name][0]]

    def noted(model, cross_entropy, fused_linear_cross_entropy):
        asked.append((cross_entropy, fused_linear_cross_entropy))
        real(model=model, cross_entropy=cross_entropy, fused_linear_cross_entropy=fused_linear_cross_entropy)

    monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, SHARED[name][0], noted)
    model, cross_entropy = build(name), torch.nn.functional.cross_entropy
    forward, loss = type(model).forward, model.loss_function
    apply_liger(model, True)
    assert asked == [(False, False)]
    assert torch.nn.functional.cross_entropy is cross_entropy
    assert "forward" not in vars(model)
    assert (type(model).forward, model.loss_function) == (forward, loss)


def test_the_models_own_modules_come_back_for_a_while_and_for_good():
    model, ids = build("llama"), torch.arange(9)[None]
    before, logits = attributes(model), model(ids).logits
    apply_liger(model, "auto")
    given = attributes(model)
    with own_modules(model):
        assert attributes(model) == before
        assert torch.equal(model(ids).logits, logits)
    assert attributes(model) == given != before
    remove_liger(model)
    assert attributes(model) == before
    assert not has_liger(model)


def test_a_copy_that_adapters_train_is_ligers_too_and_its_own_again():
    model = build("llama")
    apply_liger(model, True)
    peft_model = attach_lora(model, rank=2, modules_to_save=["norm"])
    norm = model.model.norm
    trained = norm.modules_to_save["default"]
    assert trained.forward.__self__ is trained is not norm.original_module
    remove_liger(peft_model)
    assert not has_liger(peft_model)
    assert "forward" not in vars(trained)
    assert patched(peft_model) == {"Linear"}  # the adapters' own


def test_a_model_with_adapters_gets_them_as_well():
    model = build("llama")
    peft_model = attach_lora(model, rank=2)
    assert apply_liger(peft_model, True)
    assert {"LlamaRMSNorm", "LlamaMLP", "LlamaAttention"} <= patched(model)


def test_an_architecture_it_does_not_know(caplog):
    caplog.set_level(logging.INFO, logger="qorpo")
    model = build("gpt2")
    assert apply_liger(model, "auto") is False
    assert "liger: off, liger-kernel has no modules for gpt2" in caplog.text
    with pytest.raises(
        ModelError, match=r"model\.liger: liger-kernel has no modules for gpt2; set it to auto or false"
    ):
        apply_liger(model, True)


def test_a_patch_that_breaks_halfway_leaves_nothing_behind(monkeypatch, caplog):
    def breaks(model, **options):
        modeling_llama.LlamaMLP = None
        model.model.norm.forward = None
        raise AttributeError("no such layer")

    monkeypatch.setitem(monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN, "llama", breaks)
    model, own = build("llama"), modeling_llama.LlamaMLP
    before = attributes(model)
    caplog.set_level(logging.INFO, logger="qorpo")
    assert apply_liger(model, "auto") is False
    assert "no such layer" in caplog.text
    assert modeling_llama.LlamaMLP is own
    assert attributes(model) == before


def test_where_log_probs_differ_auto_goes_back_to_the_models_own_and_says_so(caplog):
    model = build("llama")
    apply_liger(model, "auto")
    make_it_wrong(model)
    scorer = Scorer(model)
    resolve_mode(scorer, scorer, liger="auto")
    assert scorer.mode == "sdpa"
    assert not has_liger(model)
    assert "liger: off, the model's own modules in its place" in caplog.text
    assert "log-probs differ from the model's own" in caplog.text


def test_and_true_is_refused():
    model = build("llama")
    apply_liger(model, True)
    make_it_wrong(model)
    scorer = Scorer(model)
    with pytest.raises(ModelError, match=r"log-probs differ from the model's own.* set model\.liger: auto"):
        resolve_mode(scorer, scorer, liger=True)


def make_it_wrong(model):
    """Kernels can't run here: what compiles and is wrong stands in for them."""
    for module in model.modules():
        if given := vars(module).get("_given_by_liger"):
            own = type(module).forward
            given["forward"] = module.forward = own.__get__(module)
    norm = model.model.norm
    given = vars(norm)["_given_by_liger"]
    given["forward"] = norm.forward = lambda hidden: type(norm).forward(norm, hidden).flip(-1)


def test_kernels_that_can_not_run_are_a_difference_too(caplog):
    if torch.cuda.is_available():
        pytest.skip("they can")
    model = build("llama").float()
    apply_liger(model, "auto")
    scorer = Scorer(model)
    resolve_mode(scorer, scorer)
    assert not has_liger(model)


@pytest.mark.slow
def test_interpreted_kernels_score_and_differentiate_as_the_models_own():
    command = [sys.executable, str(Path(__file__).parents[1] / "helpers" / "interpreted_liger.py")]
    answer = subprocess.run(command, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    lines = [json.loads(line) for line in answer.stdout.splitlines()]
    assert [line["architecture"] for line in lines] == SUPPORTED
    for line in lines:
        assert line["mode"] == "sdpa"
        assert line["apart"] < 2e-5, line
