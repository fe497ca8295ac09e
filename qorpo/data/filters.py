"""Which comparisons make a preference pair, what is worth a look in pairs, and how they are parted by prompt."""

import hashlib
import re
from collections.abc import Hashable, Iterable, Sequence

from qorpo.data.records import Conversation, Demonstration, Example, PreferencePair, Unusable
from qorpo.data.shapes import Comparison, turn_key
from qorpo.errors import DataError


def judge(comparison: Comparison, source: str, min_margin: float = 0.0) -> PreferencePair:
    """The pair of a comparison: the better conversation's answer is chosen.

    Raises Unusable as make_pair does, and for a `tie`, or a `small_margin` below `min_margin`.
    """
    chosen, rejected, margin, basis = comparison
    if margin is not None:
        if basis == "vote" and margin < 0:
            chosen, rejected, margin = rejected, chosen, -margin
        if basis != "stated" and margin == 0:
            raise Unusable("tie")
        if min_margin and margin < min_margin:
            raise Unusable("small_margin")
    return make_pair(chosen, rejected, source, margin)


def make_pair(
    chosen: Conversation, rejected: Conversation, source: str, margin: float | None = None
) -> PreferencePair:
    """The pair of two conversations that share all but their last turn.

    Raises Unusable with the reason the record is dropped for:
      no_response                  a conversation does not end in the assistant's turn
      different_prompts            they diverge before the last turn, or differ in their number of turns
      empty_prompt                 nothing comes before the answer, or the turn it answers is blank
      consecutive_assistant_turns  the prompt ends in a turn of the assistant
      empty                        an answer is blank (arXiv 2403.07691, Sec. 4.1)
      same                         the answers are equal but for surrounding whitespace (ibid.)
    """
    (*prompt, answer), (*other_prompt, other_answer) = chosen, rejected
    if not answer["role"] == other_answer["role"] == "assistant":
        raise Unusable("no_response")
    if prompt_key(prompt) != prompt_key(other_prompt):
        raise Unusable("different_prompts")
    if not prompt or not prompt[-1]["content"].strip():
        raise Unusable("empty_prompt")
    if prompt[-1]["role"] == "assistant":
        raise Unusable("consecutive_assistant_turns")
    texts = answer["content"].strip(), other_answer["content"].strip()
    if not all(texts):
        raise Unusable("empty")
    if texts[0] == texts[1]:
        raise Unusable("same")
    return PreferencePair(tuple(prompt), answer["content"], other_answer["content"], source, margin)


def make_demonstration(
    turns: Conversation, source: str, every_turn: bool, desirable: bool | None = None
) -> Demonstration:
    """What a conversation that ends in an answer shows; raises Unusable for the same reasons as make_pair."""
    *prompt, answer = turns
    if answer["role"] != "assistant":
        raise Unusable("no_response")
    if not prompt or not prompt[-1]["content"].strip():
        raise Unusable("empty_prompt")
    if prompt[-1]["role"] == "assistant":
        raise Unusable("consecutive_assistant_turns")
    if not answer["content"].strip():
        raise Unusable("empty")
    return Demonstration(tuple(prompt), answer["content"], source, every_turn, desirable)


_ROLE_LABEL = re.compile(r"(?:^|\s)(?:Human|Assistant):")


def notes(pair: Example, margin: float | None = None) -> list[str]:
    """Why a kept pair is worth a look.

    role_label_in_response  a turn of a transcript may have been missed
    replacement_character   U+FFFD: the text lost characters when it was decoded
    nul_character           U+0000: the remains of a broken file
    scores_disagree         the record's scores call the rejected answer better
    """
    texts = [*(turn["content"] for turn in pair.prompt), *pair.answers]
    found = {
        "role_label_in_response": any(_has_role_label(text) for text in pair.answers),
        "replacement_character": any("\ufffd" in text for text in texts),
        "nul_character": any("\0" in text for text in texts),
        "scores_disagree": margin is not None and margin < 0,
    }
    return [name for name, is_so in found.items() if is_so]


def _has_role_label(text: str) -> bool:
    # Looking for the words first is many times faster than the pattern on its own.
    return ("Human:" in text or "Assistant:" in text) and _ROLE_LABEL.search(text) is not None


class Repeats:
    """Finds, pair after pair, what repeats over a whole set; holds digests, no texts."""

    def __init__(self) -> None:
        self._pairs: set[bytes] = set()
        self._sides: dict[bytes, set[str]] = {}

    def notes(self, pair: Example) -> list[str]:
        """`duplicate`: the same prompt and answers came before. `contradiction`: for this prompt an answer was
        chosen here and rejected before, or the other way round."""
        prompt = digest(prompt_key(pair.prompt))
        texts = [answer.strip() for answer in pair.answers]
        names = ("rejected",) if pair.desirable is False else ("chosen", "rejected")
        answers = dict(zip(names, texts, strict=False))
        whole = digest((prompt, *answers.items()))
        is_duplicate = whole in self._pairs
        self._pairs.add(whole)
        contradicts = False
        for side, text in answers.items():
            sides = self._sides.setdefault(digest((prompt, text)), set())
            contradicts |= bool(sides - {side})
            sides.add(side)
        return ["duplicate"] * is_duplicate + ["contradiction"] * (contradicts and not is_duplicate)


def digest(key: Hashable) -> bytes:
    return hashlib.blake2b(repr(key).encode(), digest_size=16).digest()


def prompt_key(prompt: Iterable) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same: roles and texts, whatever whitespace surrounds them."""
    return tuple(turn_key(message) for message in prompt)


def hold_out(prompts: Sequence[bytes], fraction: float, seed: int) -> list[bool]:
    """Which pairs to hold out, given each one's prompt as a digest: about `fraction` of the pairs, prompts whole.

    The same prompts and seed always give the same answer, in whatever order the pairs come.
    Raises DataError if fraction is not between 0 and 1, or fewer than two prompts leave a side empty.
    """
    if not 0 < fraction < 1:
        raise DataError(
            f"data.eval: {fraction} is no fraction of train; give a number between 0 and 1, such as 0.05"
        )
    sizes: dict[bytes, int] = {}
    for prompt in prompts:
        sizes[prompt] = sizes.get(prompt, 0) + 1
    if len(sizes) < 2:
        raise DataError(
            f"data.eval: {fraction} of train can't be split off by prompt: {len(prompts):,} pairs share "
            f"{len(sizes)} prompt; give data.eval a file of its own, or set it to null"
        )
    drawn = sorted(sizes, key=lambda prompt: digest((seed, prompt)))
    wanted, count = fraction * len(prompts), 0
    held_out = set()
    for prompt in drawn:
        if abs(count + sizes[prompt] - wanted) < abs(count - wanted):
            held_out.add(prompt)
            count += sizes[prompt]
    # A fraction that rounds to nothing, or to everything, still leaves each side its smallest prompt.
    smallest = min(drawn, key=sizes.__getitem__)
    if not held_out:
        held_out.add(smallest)
    elif len(held_out) == len(sizes):
        held_out.remove(smallest)
    return [prompt in held_out for prompt in prompts]
