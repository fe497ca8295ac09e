"""Which conversations make a preference pair, and how pairs are parted by prompt."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from qorpo.data.records import Conversation, DataReport, PairSet, PreferencePair, Unusable, turn_key
from qorpo.errors import DataError


def make_pair(chosen: Conversation, rejected: Conversation, source: str) -> PreferencePair:
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
    return PreferencePair(tuple(prompt), answer["content"], other_answer["content"], source)


_ROLE_LABEL = re.compile(r"(?:^|\s)(?:Human|Assistant):")


def notes(pair: PreferencePair) -> list[str]:
    """Why a kept pair is worth a look: `role_label_in_response`, a turn of a transcript may have been missed."""
    labelled = any(_ROLE_LABEL.search(text) for text in (pair.chosen, pair.rejected))
    return ["role_label_in_response"] if labelled else []


def prompt_key(prompt: Iterable) -> tuple[tuple[str, str], ...]:
    """What makes two prompts the same: roles and texts, whatever whitespace surrounds them."""
    return tuple(turn_key(message) for message in prompt)


def split_by_prompt(pairs: Sequence[PreferencePair], fraction: float, seed: int) -> tuple[PairSet, PairSet]:
    """Part pairs into (train, eval) so that no prompt is on both sides and eval holds about `fraction` of the pairs.

    The same pairs and seed always give the same split, in whatever order the pairs come; each side keeps their
    order. Each side's report counts the side's own pairs, and names the sources.
    Raises DataError if fraction is not between 0 and 1, or fewer than two prompts leave a side empty.
    """
    if not 0 < fraction < 1:
        raise DataError(
            f"data.eval: {fraction} is no fraction of train; give a number between 0 and 1, such as 0.05"
        )
    keys = [prompt_key(pair.prompt) for pair in pairs]
    sizes: dict[tuple, int] = {}
    for key in keys:
        sizes[key] = sizes.get(key, 0) + 1
    if len(sizes) < 2:
        raise DataError(
            f"data.eval: {fraction} of train can't be split off by prompt: {len(pairs):,} pairs share "
            f"{len(sizes)} prompt; give data.eval a file of its own, or set it to null"
        )

    def draw(key: tuple) -> bytes:
        return hashlib.sha256(repr((seed, key)).encode()).digest()

    drawn = sorted(sizes, key=draw)
    wanted, count = fraction * len(pairs), 0
    held_out = set()
    for key in drawn:
        if abs(count + sizes[key] - wanted) < abs(count - wanted):
            held_out.add(key)
            count += sizes[key]
    # A fraction that rounds to nothing, or to everything, still leaves each side its smallest prompt.
    smallest = min(drawn, key=sizes.__getitem__)
    if not held_out:
        held_out.add(smallest)
    elif len(held_out) == len(sizes):
        held_out.remove(smallest)

    sources = pairs.report.sources if isinstance(pairs, PairSet) else []

    def side(is_eval: bool) -> PairSet:
        kept = [pair for pair, key in zip(pairs, keys, strict=True) if (key in held_out) == is_eval]
        return PairSet(kept, DataReport(kept=len(kept), sources=[dict(source) for source in sources]))

    return side(False), side(True)


def leaked_prompts(train: Iterable[PreferencePair], eval: Iterable[PreferencePair]) -> int:
    """The number of distinct eval prompts that occur in train as well."""
    return len({prompt_key(pair.prompt) for pair in train} & {prompt_key(pair.prompt) for pair in eval})
