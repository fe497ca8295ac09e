"""Drop rules, and the split that keeps a prompt on one side."""

import random

import pytest

from qorpo.data.filters import Repeats, digest, hold_out, make_pair, notes, prompt_key
from qorpo.data.records import PreferencePair, Unusable
from qorpo.errors import DataError


def turns(*texts):
    """user, assistant, user, … in turn."""
    return tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(texts))


def pair(prompt, n=0, chosen="good", rejected="bad"):
    return PreferencePair(turns(prompt), chosen, rejected, f"a:{n}")


ASSISTANT_AGAIN = ({"role": "assistant", "content": "more"},)


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (turns("Q", "good"), turns("Q", " "), "empty"),
        (turns("Q", ""), turns("Q", "bad"), "empty"),
        (turns("Q", "\n"), turns("Q", ""), "empty"),
        (turns("Q", "good"), turns("Q", " good\n"), "same"),
        (turns("Q", "good"), turns("R", "bad"), "different_prompts"),
        (turns("Q", "A", "R", "good"), turns("Q", "bad"), "different_prompts"),
        (turns("Q", "A", "R", "good"), turns("Q", "B", "R", "bad"), "different_prompts"),
        (
            turns("Q", "A") + ASSISTANT_AGAIN,
            turns("Q", "A") + turns("Q", "bad")[1:],
            "consecutive_assistant_turns",
        ),
        (turns("Q", "A", "R"), turns("Q", "A", "R"), "no_response"),
        (turns("Q", "good"), turns("Q"), "no_response"),
        (turns("Q", "good")[1:], turns("Q", "bad")[1:], "empty_prompt"),
        (turns(" ", "good"), turns(" ", "bad"), "empty_prompt"),
    ],
)
def test_drop_reasons(chosen, rejected, reason):
    with pytest.raises(Unusable) as caught:
        make_pair(chosen, rejected, "here")
    assert caught.value.reason == reason


def test_a_usable_pair_passes_every_rule():
    made = make_pair(turns("Q", "A", "R", "good"), turns("Q", "A ", "R", "bad"), "here")
    assert made == PreferencePair(turns("Q", "A", "R"), "good", "bad", "here")


@pytest.mark.parametrize(
    ("text", "noted"),
    [
        ("Human: hi. Assistant: hello.", True),
        ("Sure.\nAssistant: more", True),
        ("A human: what is it? The assistant: a helper. SuperHuman: a film.", False),
    ],
)
def test_role_labels_in_a_response_are_noted(text, noted):
    expected = ["role_label_in_response"] if noted else []
    assert notes(pair("Q", chosen=text)) == expected
    assert notes(pair("Q", rejected=text)) == expected


@pytest.mark.parametrize(
    ("text", "reason"), [("lost \ufffd", "replacement_character"), ("nul \0", "nul_character")]
)
def test_damaged_text_is_noted_wherever_it_is(text, reason):
    assert notes(pair(text)) == notes(pair("Q", chosen=text)) == notes(pair("Q", rejected=text)) == [reason]


def test_scores_against_the_choice_are_noted():
    assert notes(pair("Q"), margin=-1.0) == ["scores_disagree"]
    assert notes(pair("Q"), margin=0.0) == []


def test_duplicates_and_contradictions_are_found():
    repeats = Repeats()
    found = [
        repeats.notes(each)
        for each in (
            pair("Q", chosen="a", rejected="b"),
            pair("Q ", chosen="a", rejected="b "),  # but for whitespace the same
            pair("Q", chosen="b", rejected="a"),
            pair("R", chosen="b", rejected="a"),  # of another prompt
            pair("Q", chosen="c", rejected="a"),
            pair("Q", chosen="a", rejected="d"),
        )
    ]
    assert found == [[], ["duplicate"], ["contradiction"], [], ["contradiction"], ["contradiction"]]


def split_by_prompt(pairs, fraction, seed):
    held = hold_out([digest(prompt_key(p.prompt)) for p in pairs], fraction, seed)
    return tuple(
        [p for p, is_held in zip(pairs, held, strict=True) if is_held == side] for side in (False, True)
    )


def recurring(num_pairs, num_prompts, seed):
    draw = random.Random(seed)
    return [pair(f"Q{draw.randrange(num_prompts)}", n) for n in range(num_pairs)]


@pytest.mark.parametrize("seed", [0, 1, 42])
@pytest.mark.parametrize("fraction", [0.001, 0.05, 0.3, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("num_prompts", [2, 7, 200])
def test_split_parts_prompts_and_keeps_every_pair(fraction, seed, num_prompts):
    pairs = recurring(300, num_prompts, seed)
    # One prompt with a space behind is the same prompt.
    pairs.append(PreferencePair(turns(pairs[0].prompt[0]["content"] + " "), "good", "bad", "a:300"))
    train, held_out = split_by_prompt(pairs, fraction, seed)
    assert len(train) > 0
    assert len(held_out) > 0
    assert {prompt_key(p.prompt) for p in train}.isdisjoint(prompt_key(p.prompt) for p in held_out)
    assert sorted([*train, *held_out], key=pairs.index) == pairs
    largest = max(
        sum(prompt_key(p.prompt) == key for p in pairs) for key in {prompt_key(p.prompt) for p in pairs}
    )
    assert abs(len(held_out) - fraction * len(pairs)) <= largest


def test_split_is_about_the_fraction():
    pairs = recurring(2000, 1000, 0)
    _, held_out = split_by_prompt(pairs, 0.1, 0)
    assert abs(len(held_out) - 200) <= 3


def test_split_follows_the_seed_and_not_the_order():
    pairs = recurring(300, 100, 0)
    held_out = split_by_prompt(pairs, 0.2, 7)[1]
    assert list(held_out) == list(split_by_prompt(pairs, 0.2, 7)[1])
    assert list(held_out) != list(split_by_prompt(pairs, 0.2, 8)[1])
    assert {p.source for p in split_by_prompt(pairs[::-1], 0.2, 7)[1]} == {p.source for p in held_out}


def test_one_large_prompt_does_not_swamp_eval():
    pairs = [pair("large", n) for n in range(90)] + [pair(f"Q{n}", 90 + n) for n in range(10)]
    for seed in range(10):
        assert len(split_by_prompt(pairs, 0.05, seed)[1]) == 5


@pytest.mark.parametrize(("fraction", "num_eval"), [(0.001, 1), (0.999, 50)])
def test_a_side_that_would_be_empty_gets_the_smallest_prompt(fraction, num_eval):
    pairs = [pair("large", n) for n in range(50)] + [pair("small", 50)]
    for seed in range(10):
        assert len(split_by_prompt(pairs, fraction, seed)[1]) == num_eval


@pytest.mark.parametrize("fraction", [0, 1, 1.5, -0.1, float("nan")])
def test_split_refuses_what_is_no_fraction(fraction):
    with pytest.raises(DataError, match=r"data\.eval: .* is no fraction"):
        split_by_prompt([pair("Q"), pair("R")], fraction, 0)


def test_split_refuses_a_single_prompt():
    with pytest.raises(DataError, match=r"3 pairs share 1 prompt"):
        split_by_prompt([pair("Q", n) for n in range(3)], 0.5, 0)
