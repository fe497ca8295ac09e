"""Packed rows score as each sequence alone, on every architecture that qorpo claims; or it says why not."""

import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import SHARED, SMALL, build

from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.errors import ModelError
from qorpo.model.checkpointing import checkpoint_layers
from qorpo.model.scoring import Scorer
from qorpo.model.selfcheck import make_scorer
from qorpo.model.sequences import own_logps, sequences

LENGTHS = [(11, 9, 4), (5, 8), (1, 1, 1), (7, 3, 12, 1, 6, 2)]  # groups of 1, 2 and 5 responses


@pytest.fixture
def float64_throughout(monkeypatch):
    """transformers computes norms and eager softmax in float32 whatever the model's type; here in float64."""
    to, softmax = torch.Tensor.to, F.softmax

    def wide_to(tensor, *args, **kwargs):
        args = [torch.float64 if arg is torch.float32 else arg for arg in args]
        kwargs = {name: torch.float64 if arg is torch.float32 else arg for name, arg in kwargs.items()}
        return to(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", wide_to)
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: wide_to(tensor, torch.float32))
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: softmax(x, dim))
    monkeypatch.setattr(torch.nn.functional, "softmax", lambda x, dim, dtype=None: softmax(x, dim))


def pairs(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return tuple(torch.randint(97, (count,), generator=generator).tolist())

    return [Group.of(map(tokens, each), "test") for each in lengths]


def logps_and_gradients(score, packed, model, upstream_S):
    logps_S = score(packed)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad((logps_S * upstream_S).sum(), parameters, allow_unused=True)
    return [logps_S, *(g if g is not None else torch.zeros(()) for g in gradients)]


def scored(scorer):
    def score(packed):
        with scorer.packed_attention():
            return scorer(packed)

    return score


@pytest.mark.parametrize("name", SHARED)
@pytest.mark.parametrize("mode", ["sdpa", "dense"])
def test_a_shared_row_is_each_sequence_alone(name, mode, float64_throughout):
    model = build(name)
    packed = pack_groups(pairs(), score_prompts=True)
    upstream_S = torch.randn(len(packed.targets), dtype=torch.float64)
    alone = logps_and_gradients(lambda row: own_logps(model, row), packed, model, upstream_S)
    shared = logps_and_gradients(scored(Scorer(model, mode, chunk_tokens=7)), packed, model, upstream_S)
    for ours, own in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, own, rtol=0, atol=1e-10)


@pytest.mark.parametrize("score_prompts", [False, True])
def test_a_sequence_alone_is_a_prompt_with_one_of_its_responses(score_prompts):
    groups = pairs()
    expected = [(*group.prompt_ids, *response) for group in groups for response in group.responses]
    firsts = [number == 0 for group in groups for number in range(len(group.responses))]
    prompts = [len(group.prompt_ids) for group in groups for _ in group.responses]
    found = list(sequences(pack_groups(groups, score_prompts=score_prompts)))
    assert [tuple(ids[0].tolist()) for ids, _, _ in found] == expected
    for (ids_1T, predictors, targets), is_first, prompt in zip(found, firsts, prompts, strict=True):
        scored_from = 1 if is_first and score_prompts else prompt
        assert predictors.tolist() == list(range(scored_from - 1, ids_1T.shape[1] - 1))
        assert targets.tolist() == ids_1T[0, scored_from:].tolist()


@pytest.mark.parametrize("name", ["llama", "mistral-window", "gemma3", "gpt2"])
@pytest.mark.parametrize("mode", ["sdpa", "dense", "separate"])
def test_each_answer_of_a_dialogue_scores_as_it_does_alone(name, mode, float64_throughout):
    model = build(name)
    (plain,) = pairs([(5, 14)])
    (response,) = plain.responses
    dialogue = replace(plain, unscored=((4, 7), (9, 12)))
    packed = pack_groups([*pairs(LENGTHS), dialogue])
    upstream_S = torch.randn(len(packed.targets), dtype=torch.float64)
    together = logps_and_gradients(scored(Scorer(model, mode, chunk_tokens=7)), packed, model, upstream_S)
    before, alone = len(packed.targets) - 8, []
    for start, stop in ((0, 4), (7, 9), (12, 14)):
        answered = Group((*plain.prompt_ids, *response[:start]), (response[start:stop],), "alone")
        alone.append(own_logps(model, pack_groups([answered])))
    torch.testing.assert_close(together[0][before:], torch.cat(alone), rtol=0, atol=1e-10)
    own = logps_and_gradients(lambda row: own_logps(model, row), packed, model, upstream_S)
    for ours, theirs in zip(together, own, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", SHARED)
def test_every_claimed_architecture_shares_prompts_by_itself(name):
    assert make_scorer(build(name)).mode == "sdpa"


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_recomputing_layers_changes_no_gradient(name):
    model = build(name).train()
    packed = pack_groups(pairs())
    upstream_S = torch.randn(len(packed.targets), dtype=torch.float64)
    scorer = Scorer(model)

    def gradients():
        with scorer.packed_attention():
            logps_S = scorer(packed)
            return torch.autograd.grad((logps_S * upstream_S).sum(), list(model.parameters()))

    kept = gradients()
    calls = []
    for layer in model.modules():
        if type(layer).__name__.endswith(("MLP", "GPT2MLP")):
            layer.register_forward_pre_hook(lambda *_: calls.append(1))
    assert checkpoint_layers(model) == checkpoint_layers(model) == model.config.num_hidden_layers
    recomputed = gradients()
    assert len(calls) == 2 * model.config.num_hidden_layers  # forward, and once more in backward
    for ours, plain in zip(recomputed, kept, strict=True):
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)


RECURRENT = {
    "mamba": {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 3, "state_size": 8},
    "falcon_h1": SMALL | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8},
}  # fmt: skip


@pytest.mark.parametrize("model_type", RECURRENT)
def test_recurrent_layers_run_unshared_and_the_log_says_so(model_type, caplog):
    model = build(model_type, RECURRENT[model_type]).float()
    caplog.set_level(logging.WARNING, logger="qorpo")
    scorer = make_scorer(model)
    assert scorer.mode == "separate"
    assert "separate" in caplog.text
    assert "can't share a row" in caplog.text
    packed = pack_groups(pairs(), score_prompts=True)
    own_S = own_logps(model, packed)
    torch.testing.assert_close(scorer(packed), own_S, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["sdpa", "dense"])
def test_recurrent_layers_are_refused_where_sharing_is_asked_for(mode):
    with pytest.raises(ModelError, match="can't share a row"):
        make_scorer(build("mamba", RECURRENT["mamba"]), attention=mode)


def test_a_leak_between_sequences_is_refused():
    """A model whose tokens carry something along the row: right on each sequence's own numbers, wrong together."""
    model = build("llama")
    embed = model.model.embed_tokens

    def leaky(module, inputs, output):
        previous = F.pad(inputs[0][:, :-1], (1, 0))
        return output + 1e-4 * F.embedding(previous, module.weight).cumsum(1)

    embed.register_forward_hook(leaky)
    with pytest.raises(ModelError, match="can't score this model exactly"):
        make_scorer(model, attention="sdpa")


def test_a_model_that_swallows_the_layout_is_refused():
    model = build("llama")
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {k: v for k, v in kwargs.items() if k != "packed_layout"}), with_kwargs=True
        )  # fmt: skip
    with pytest.raises(ModelError, match="did not get the packed layout"):
        make_scorer(model, attention="sdpa")
    assert make_scorer(model).mode == "dense"


def test_attention_and_head_are_the_models_own_again_afterwards():
    model = build("llama")
    before = model.config._attn_implementation
    ids = torch.arange(6)[None]
    logits = model(ids).logits
    with torch.no_grad():
        make_scorer(model)
    assert model.config._attn_implementation == before
    assert "forward" not in vars(model.lm_head)
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=0)


def test_bfloat16_rows_pass_the_check():
    assert make_scorer(build("llama").bfloat16()).mode == "sdpa"


def test_no_logits_of_the_whole_row_are_made():
    model = build("llama")
    packed = pack_groups(pairs())
    sizes = []
    with torch.no_grad(), RecordSizes(sizes):
        scored(Scorer(model, chunk_tokens=2))(packed)
    assert max(sizes) < packed.input_ids.numel() * model.config.vocab_size


class RecordSizes(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self, sizes):
        super().__init__()
        self.sizes = sizes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        # The head's own weight shows up transposed: only what is a row's counts.
        if isinstance(result, torch.Tensor) and result.shape[-1:] == (97,):
            self.sizes.append(result.numel())
        return result


def test_a_soft_cap_is_never_left_out_by_sdpa():
    model = build("gemma2")
    model.config._attn_implementation = "sdpa"
    assert make_scorer(model).mode == "sdpa"
    assert model.config._attn_implementation == "eager"
