"""Batches of requests: what they hold, whose random numbers decide, and what running out of memory does to them."""

import logging

import pytest
import torch
from helpers.tiny import make_base

from qorpo.engine import sampling
from qorpo.engine.sampling import Request, batches, complete, complete_all, draw, seed_of
from qorpo.errors import RunError


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from transformers import AutoModelForCausalLM

    folder = make_base(tmp_path_factory.mktemp("models") / "base")
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


STOP = [1]


def requests(temperature=0.0, **settings):
    return [
        Request(list(range(10, 10 + length)), 12, temperature, seed=seed_of(0, place), **settings)
        for place, length in enumerate([3, 9, 1, 5, 20, 7])
    ]


def answers(model, asked, batch_size):
    found = {}
    for places, completions in complete_all(model, asked, stop_ids=STOP, batch_size=batch_size):
        found |= dict(zip(places, completions, strict=True))
    return [found[place] for place in range(len(asked))]


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.5}, {"temperature": 1.0, "top_p": 0.8}])
def test_an_answer_does_not_depend_on_its_batch(model, settings):
    asked = requests(**settings)
    alone = answers(model, asked, 1)
    assert answers(model, asked, 64) == alone
    assert answers(model, asked, 4) == alone
    assert len(set(alone)) > 1


def test_greedy_rows_of_a_mixed_batch_stay_greedy(model):
    greedy = requests()
    mixed = [request if place % 2 else requests(2.0)[place] for place, request in enumerate(greedy)]
    assert answers(model, mixed, 64)[1::2] == answers(model, greedy, 64)[1::2]
    assert answers(model, mixed, 64)[0::2] != answers(model, greedy, 64)[0::2]


def test_seeds_part_answers_to_the_same_prompt(model):
    asked = [Request([5, 6, 7], 12, 1.5, seed=seed_of(seed, 0)) for seed in (0, 0, 1)]
    first, again, other = answers(model, asked, 64)
    assert first == again != other


def test_draws_have_the_distribution_that_temperature_and_top_p_leave():
    logits = torch.tensor([0.1, 2.0, -1.0, 1.0, 0.0])
    count = 100_000
    uniform = (torch.arange(count, dtype=torch.float64)[:, None] + 0.5) / count
    rows = logits.expand(count, -1)

    def shares(temperature, top_p):
        full = torch.ones(count, 1, dtype=torch.float64)
        return draw(rows, uniform, full * temperature, full * top_p)[:, 0].bincount(minlength=5) / count

    for temperature in (0.5, 1.0, 2.0):
        torch.testing.assert_close(
            shares(temperature, 1.0), torch.softmax(logits / temperature, 0), atol=1e-4, rtol=0
        )
    # 0.567 and 0.209 are the likeliest two: at 0.7 both stay, at 0.5 one does.
    kept = torch.softmax(logits, 0) * torch.tensor([0, 1, 0, 1, 0])
    torch.testing.assert_close(shares(1.0, 0.7), kept / kept.sum(), atol=1e-4, rtol=0)
    assert shares(1.0, 0.5).tolist() == [0, 1, 0, 0, 0]


def test_the_last_draw_never_takes_a_token_without_probability():
    logits = torch.tensor([[0.0, 0.0, -torch.inf]])
    most = torch.tensor([[1 - 2**-53]], dtype=torch.float64)
    one = torch.ones(1, 1, dtype=torch.float64)
    assert draw(logits, most, one, one).item() == 1


def test_answers_end_before_the_token_to_stop_at(model):
    (request,) = [requests()[0]]
    (whole,) = complete(model, [request], stop_ids=[299])
    stop = whole.ids[4]
    first = whole.ids.index(stop)
    (cut,) = complete(model, [request], stop_ids=[stop])
    assert cut == (whole.ids[:first], True)
    assert not whole.is_finished


def test_batches_go_by_length_and_stay_within_tokens_and_context(monkeypatch):
    asked = requests()
    assert batches(asked, 4, None) == [[4, 1, 5, 3], [0, 2]]
    assert sorted(place for batch in batches(asked, 4, None) for place in batch) == list(range(6))
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 2 * (20 + 12))
    assert batches(asked, 64, None) == [[4, 1], [5, 3, 0], [2]]
    # 20 tokens leave room for 4 in a context of 24, so that request is alone: others would run past the end.
    capped = [Request(each.prompt_ids, min(12, 24 - len(each.prompt_ids))) for each in asked]
    monkeypatch.setattr(sampling, "BATCH_TOKENS", 10_000)
    assert batches(capped, 64, 24)[0] == [4]


def test_a_model_is_left_as_it_was(model):
    model.train()
    own = model.generation_config
    complete(model, requests()[:1], stop_ids=STOP)
    assert model.training
    assert model.generation_config is own
    model.eval()


def test_a_batch_that_memory_runs_out_in_is_done_in_halves(model, monkeypatch, caplog):
    asked = requests()
    whole, tried = complete, []

    def short(model, batch, *, stop_ids):
        tried.append(len(batch))
        if len(batch) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return whole(model, batch, stop_ids=stop_ids)

    expected = answers(model, asked, 64)
    monkeypatch.setattr(sampling, "complete", short)
    with caplog.at_level(logging.WARNING):
        assert answers(model, asked, 64) == expected
    assert tried == [6, 3, 1, 2, 3, 1, 2]
    assert "6 answers at once" in caplog.text

    def none(model, batch, *, stop_ids):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(sampling, "complete", none)
    with pytest.raises(RunError, match=r"out of memory .* one prompt and its answer of 32 tokens"):
        answers(model, asked, 64)


def test_other_errors_are_not_taken_for_a_lack_of_memory(model, monkeypatch):
    def broken(model, batch, *, stop_ids):
        raise ValueError("something else")

    monkeypatch.setattr(sampling, "complete", broken)
    with pytest.raises(ValueError, match="something else"):
        answers(model, requests(), 64)
