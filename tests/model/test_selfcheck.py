"""The check at load sees what a short look at log-probs does not: windows and distances by the row, and gradients."""

import pytest
import torch
from helpers.architectures import build
from helpers.shortages import SHORTAGES

from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.errors import ModelError
from qorpo.model import scoring
from qorpo.model.probe import probe_rows
from qorpo.model.selfcheck import make_scorer
from qorpo.model.sequences import own_logps

NEO = {
    "vocab_size": 97, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]],
    "max_position_embeddings": 512, "resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0,
    "bos_token_id": 0, "eos_token_id": 0,
}  # fmt: skip
# Their windows and distances go by the place in the row, whatever mask and positions they are given.
BY_PLACE = {
    "a local window of 8": ("gpt_neo", NEO | {"window_size": 8}),
    "a local window of 256": ("gpt_neo", NEO | {"window_size": 256}),
    "ALiBi": ("mpt", {"vocab_size": 97, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 128}),
    "ALiBi, BLOOM's": ("bloom", {"vocab_size": 97, "hidden_size": 32, "n_head": 4, "n_layer": 2}),
}  # fmt: skip


def pairs(lengths):
    generator = torch.Generator().manual_seed(1)

    def tokens(count):
        return tuple(torch.randint(97, (count,), generator=generator).tolist())

    return [Group.of(map(tokens, each), "test") for each in lengths]


@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
@pytest.mark.parametrize("name", BY_PLACE)
def test_a_model_that_goes_by_the_place_in_the_row_is_scored_a_sequence_at_a_time(name, initializer_range):
    model = build(*BY_PLACE[name], initializer_range=initializer_range).float()
    scorer = make_scorer(model)
    packed = pack_groups(pairs([(11, 60, 14), (7, 3, 12)]), score_prompts=True)
    with torch.no_grad(), scorer.packed_attention():
        torch.testing.assert_close(scorer(packed), own_logps(model, packed), rtol=0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("initializer_range", [0.02, 0.2])
@pytest.mark.parametrize("name", BY_PLACE)
def test_so_is_it_in_half_precision_and_where_it_hardly_attends(name, initializer_range, dtype):
    """Log-probs of such a row are off by 0.0004 to 0.07 nats here, which rounding in bfloat16 may be too."""
    model = build(*BY_PLACE[name], initializer_range=initializer_range).to(dtype)
    assert make_scorer(model).mode == "separate"
    with pytest.raises(ModelError, match=r"dense: (log-probs differ|gradients differ|too many values)"):
        make_scorer(model, attention="dense")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_row_is_longer_than_a_window_and_a_model_without_one_has_a_short_row(dtype):
    windowed, _ = probe_rows(build(*BY_PLACE["a local window of 256"]).to(dtype))
    assert windowed.packed.lengths[1][1] > 256
    plain, longer = probe_rows(build("llama").to(dtype))
    assert plain.packed.input_ids.shape[1] < 64
    assert longer.first_T.sum() == plain.packed.input_ids.shape[1]
    assert torch.equal(longer.packed.input_ids[:, longer.first_T], plain.packed.input_ids)
    assert torch.equal(longer.packed.targets[longer.first_S], plain.packed.targets)
    assert torch.equal(longer.upstream_S[longer.first_S], plain.upstream_S)


def test_right_log_probs_with_wrong_gradients_are_refused(monkeypatch):
    model = build("llama")
    assert make_scorer(model, attention="sdpa").mode == "sdpa"
    layout_of = scoring.PackedLayout.of

    def forgetful(packed, kernel):
        """A kernel whose backward forgets what rejected does to its prompt."""
        layout = layout_of(packed, kernel)
        hook = model.model.layers[0].self_attn.k_proj.register_forward_hook(lambda *_: _[2].detach())
        forgotten.append(hook)
        return layout

    forgotten = []
    monkeypatch.setattr(scoring.PackedLayout, "of", forgetful)
    with pytest.raises(ModelError, match="gradients differ from the model's own"):
        make_scorer(model, attention="sdpa")
    forgotten[0].remove()


def test_a_shortage_in_the_check_is_told_as_one(monkeypatch):
    model = build("llama")
    forward, calls = scoring.Scorer.forward, []

    def broken(self, packed, by_own_logits=False):
        calls.append(packed)
        if not by_own_logits:
            raise SHORTAGES["torch's allocator"]()
        return forward(self, packed, by_own_logits)

    monkeypatch.setattr(scoring.Scorer, "forward", broken)
    with pytest.raises(torch.OutOfMemoryError):
        make_scorer(model)


def test_the_check_leaves_no_gradient_and_no_hook_behind():
    model = build("llama").train()
    make_scorer(model)
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks
