"""Examples turned into groups of tokens, cut to their limits, with an exact boundary between prompt and response."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from qorpo.data.chat_format import OUT_OF_BOUNDS, TOO_MUCH, ChatFormat, Texts
from qorpo.data.counts import DataReport
from qorpo.data.groups import Group, TokenizedData, tokens_report
from qorpo.data.records import Example, PairSet, Unusable
from qorpo.data.sources import OnBadRecord
from qorpo.errors import DataError

PAIRS_PER_BATCH = 1024


@dataclass(frozen=True, slots=True)
class Limits:
    """The most tokens, and what becomes of longer texts.

    A prompt over `max_prompt_length` drops its pair, or keeps its end ("keep_end", behind a BOS that opens it); a
    response with which the whole is over `max_length` is cut, or drops its pair.
    Raises DataError where max_prompt_length is not below max_length.
    """

    max_length: int
    max_prompt_length: int
    long_prompts: Literal["drop", "keep_end"] = "drop"
    long_responses: Literal["cut", "drop"] = "cut"

    def __post_init__(self) -> None:
        if not 0 < self.max_prompt_length < self.max_length:
            raise DataError(
                f"data.max_prompt_length ({self.max_prompt_length}) must be at least 1 and below "
                f"data.max_length ({self.max_length})"
            )


def tokenize_pairs(
    pairs: Sequence[Example],
    chat_format: ChatFormat,
    limits: Limits,
    num_responses: int = 2,
    on_bad_record: OnBadRecord = "fail",
) -> TokenizedData:
    """The pairs as groups, in memory, and a PairSet's report carried on (in a copy), or a new one for other sequences.

    Dropped is what tokenize_batch finds unusable. Raises DataError as it does, and if no pair is left.
    """
    report = copy.deepcopy(pairs.report) if isinstance(pairs, PairSet) else DataReport()
    kept: list[Group] = []
    for start in range(0, len(pairs), PAIRS_PER_BATCH):
        batch = pairs[start : start + PAIRS_PER_BATCH]
        for pair, result in zip(
            batch, tokenize_batch(batch, chat_format, limits, num_responses, on_bad_record), strict=True
        ):
            if isinstance(result, Unusable):
                report.drop(result.reason, pair.source)
            else:
                kept.append(result)
    lengths, cuts = [group.lengths for group in kept], [group.cut for group in kept]
    return TokenizedData(kept, tokens_report(report, lengths, cuts))


def tokenize_batch(
    pairs: Sequence[Example],
    chat_format: ChatFormat,
    limits: Limits,
    num_responses: int = 2,
    on_bad_record: OnBadRecord = "fail",
) -> list[Group | Unusable]:
    """Each pair as a group, or why it is unusable: what ChatFormat.texts refuses, and

    prompt_too_long, response_too_long  as the limits say
    empty           an answer without a token
    same, same_after_cut                answers of equal tokens
    special_token_in_response           an answer with the stop token inside

    Of a pair's responses the first `num_responses` are kept; the other decides whether the pair is usable.
    Raises DataError where the chat template takes far too much for a record, unless `on_bad_record` is skip.
    """
    written: list[Texts | Unusable] = []
    for pair in pairs:
        try:
            written.append(chat_format.texts(pair))
        except Unusable as refusal:
            if refusal.reason == OUT_OF_BOUNDS and on_bad_record == "fail":
                raise DataError(f"{pair.source}: {TOO_MUCH}") from None
            written.append(refusal)
    encoded = iter(chat_format.encode([texts for texts in written if isinstance(texts, Texts)]))
    results: list[Group | Unusable] = []
    for pair, texts in zip(pairs, written, strict=True):
        try:
            results.append(
                texts
                if isinstance(texts, Unusable)
                else _fit(pair, texts, next(encoded), chat_format, limits).first(num_responses)
            )
        except Unusable as refusal:
            results.append(refusal)
    return results


def _fit(
    example: Example, texts: Texts, ids: Sequence[list[int]], chat_format: ChatFormat, limits: Limits
) -> Group:
    """The group cut to its limits; raises Unusable."""
    prompt, *pieces = ids
    answers = pieces[::2] if texts.is_dialogue else pieces
    stop = chat_format.stop_token_id
    prompt_cut = len(prompt) > limits.max_prompt_length
    if prompt_cut:
        if limits.long_prompts == "drop":
            raise Unusable("prompt_too_long")
        bos = prompt[:1] if prompt[0] == chat_format.tokenizer.bos_token_id else []
        prompt = bos + prompt[len(prompt) - limits.max_prompt_length + len(bos) :]
    if not prompt:  # nothing would predict the response's first token
        raise Unusable("empty_prompt")
    if not all(answers):
        raise Unusable("empty")
    if any(stop in answer for answer in answers):
        raise Unusable("special_token_in_response")
    room = limits.max_length - len(prompt)
    whole, unscored = (
        _joined(pieces, stop) if texts.is_dialogue else ([[*each, stop] for each in answers], [])
    )
    were_cut = [len(response) > room for response in whole]
    if limits.long_responses == "drop" and any(were_cut):
        raise Unusable("response_too_long")
    while unscored and unscored[-1][1] >= room:  # nothing is learned after it
        room = min(room, unscored.pop()[0])
    responses = tuple(tuple(response[:room]) for response in whole)
    if len(set(responses)) < len(responses):
        raise Unusable("same_after_cut" if any(were_cut) else "same")
    return Group(
        tuple(prompt), responses, example.source, (prompt_cut, *were_cut), tuple(unscored), example.margin,
        example.desirable,
    )  # fmt: skip


def _joined(pieces: Sequence[list[int]], stop: int) -> tuple[list[list[int]], list[tuple[int, int]]]:
    """A dialogue's answers, each with its stop, and what is between them as one response, and the spans between."""
    response: list[int] = []
    between: list[tuple[int, int]] = []
    for place, piece in enumerate(pieces):
        if place % 2:
            between.append((len(response), len(response) + len(piece)))
            response += piece
        else:
            response += [*piece, stop]
    return [response], between
