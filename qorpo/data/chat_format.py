"""How a tokenizer writes conversations: the chat template's text, and the ids of its parts.

Prompt and response are tokenized apart, as they are when the model answers: it is given the prompt's tokens and
writes the response's. So no token spans the boundary, and exactly one stop token ends a whole response.
"""

import contextlib
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError

from qorpo.data.bounds import MOST_BYTES, SECONDS, OutOfBoundsError, stays_within_bounds, within_bounds
from qorpo.data.records import Conversation, Demonstration, Example, Message, Unusable
from qorpo.errors import DataError

# Used where neither the recipe nor the tokenizer has a template. BOS_TEMPLATE goes in front of it for a tokenizer
# that adds its BOS to plain text, for such a model has seen it at the start of every document.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{ message['role'] | capitalize + ': ' + message['content'] }}
{%- if message['role'] == 'assistant' %}{{ eos_token }}{% endif -%}
{{ '\\n\\n' }}
{%- endfor -%}
{%- if add_generation_prompt %}{{ 'Assistant:' }}{% endif -%}"""
BOS_TEMPLATE = "{{- bos_token -}}\n"

logger = logging.getLogger(__name__)

OUT_OF_BOUNDS = "template_out_of_bounds"
# The most that a template may write for a record: so many characters, and so many for each that it is given.
MOST_CHARACTERS, MOST_TIMES = 1 << 20, 10
_WITHIN_BOUNDS: set[str] = set()  # templates, with the tokens they may write, that were tried
_PROBE = "qorpo0probe"
_FIX = "fix it, or give another in model.chat_template"
TOO_MUCH = (
    f"the chat template takes over {SECONDS} seconds or {MOST_BYTES >> 30} GiB for this record, or writes far more than "
    f"it is given; {_FIX}, or set data.on_bad_record: skip"
)


class Texts(NamedTuple):
    """A prompt and its responses as the template writes them; the responses without their stop token.

    In a dialogue every answer is learned: pieces are the answers, and between two of them what the template writes.
    """

    prompt: str
    pieces: tuple[str, ...]
    is_dialogue: bool = False


class ChatFormat:
    """How a tokenizer writes conversations: the template, and the one token that stops a response.

    The template is the given Jinja text, else the tokenizer's own, else PLAIN_TEMPLATE; it is set on the tokenizer,
    so that it is saved with it; the log says where it is the last. The stop token is the one the template closes an assistant's turn with, if that is
    a token of its own, else EOS. `tokenizer` is one of transformers'.

    Raises DataError for a template that can't be used, or if there is no token to stop at.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None):
        if chat_template is None and not tokenizer.chat_template:
            chat_template = (BOS_TEMPLATE if _adds_bos(tokenizer) else "") + PLAIN_TEMPLATE
            logger.warning(
                "model.chat_template: the tokenizer has no chat template; this plain one is taken:\n%s",
                chat_template,
            )
        if chat_template is not None:
            tokenizer.chat_template = chat_template
        self.tokenizer = tokenizer
        self._check_bounds()
        # Each id a tokenizer gives is an object of 28 bytes; shared, a token costs its reference alone.
        self._shared_ids: dict[int, int] = {}
        before, self._after = self._probe()
        self.stop_token_id, stop = self._find_stop()
        # What stands between the answer and the stop is learned with the answer (Llama-2's template has a space).
        self._until_stop = self._after.partition(stop)[0] if stop in self._after else ""
        self._stop = stop if stop in self._after else None
        added = tokenizer.added_tokens_decoder.values()
        special = {stop, *tokenizer.all_special_tokens, *(token.content for token in added if token.special)}
        self._special = re.compile("|".join(map(re.escape, sorted(special, key=len, reverse=True))))
        self._opens_with_special = self._special.search(before) is not None
        self._anchor, self._anchor_ids = self._find_anchor()

    def texts(self, example: Example) -> Texts:
        """What the template writes for an example; a response is what follows the prompt, up to the stop token.

        Raises Unusable:
          template_refused   the template raises on this conversation (Gemma's on a system turn)
          template_out_of_bounds  it takes far too much time or memory for it, or writes far more than it is given
          template_mismatch  with its answer, the conversation does not begin with the prompt's text, or the answer
                             is not in it unchanged, but for surrounding whitespace
          earlier_turns_rewritten  of a dialogue: with more turns, an earlier answer or its stop token is not written as
                             the model wrote it
          special_token_in_response  the answer spells a special token which can't be told from the template's own
        """
        try:
            with within_bounds():
                texts = self._texts(example)
        except TemplateError:
            raise Unusable("template_refused") from None
        except OutOfBoundsError:
            raise Unusable(OUT_OF_BOUNDS) from None
        given = sum(len(turn["content"]) for turn in example.prompt) + sum(map(len, example.answers))
        if len(texts.prompt) + sum(map(len, texts.pieces)) > MOST_CHARACTERS + MOST_TIMES * given:
            raise Unusable(OUT_OF_BOUNDS)
        return texts

    def _texts(self, example: Example) -> Texts:
        if isinstance(example, Demonstration) and example.every_turn:
            return self._dialogue(example)
        prompt = self._render(example.prompt, add_generation_prompt=True)
        return Texts(
            prompt, tuple(self._response(example.prompt, prompt, answer) for answer in example.answers)
        )

    def _dialogue(self, shown: Demonstration) -> Texts:
        turns: Conversation = (*shown.prompt, {"role": "assistant", "content": shown.answer})
        written: str | None = ""
        pieces: list[str] = []
        for place in _answered(turns):
            prompt = self._render(turns[:place], add_generation_prompt=True)
            if written is None or not prompt.startswith(written):
                raise Unusable("earlier_turns_rewritten")
            response = self._response(turns[:place], prompt, turns[place]["content"])
            pieces += [prompt[len(written) :], response]
            written = None if self._stop is None else prompt + response + self._stop
        return Texts(pieces[0], tuple(pieces[1:]), is_dialogue=True)

    def encode(self, texts: Sequence[Texts]) -> Iterator[list[list[int]]]:
        """The ids of prompt and pieces of each; the responses without their stop token.

        The template is the authority on BOS: none is added. A special token that an answer spells out becomes plain
        text, for as a token it would end the answer. A prompt is encoded as transformers does at inference.
        """
        prompts = self._ids([text.prompt for text in texts])
        pieces = [piece for text in texts for piece in text.pieces]
        answered = [
            not (text.is_dialogue and place % 2) for text in texts for place in range(len(text.pieces))
        ]
        ids = self._continuations(pieces)
        if not self._opens_with_special:
            for index, (piece, is_answer) in enumerate(zip(pieces, answered, strict=True)):
                if is_answer and self._special.search(piece):
                    (ids[index],) = self._continuations([piece], split_special_tokens=True)
        rest = iter(ids)
        for prompt, text in zip(prompts, texts, strict=True):
            yield [prompt, *itertools.islice(rest, len(text.pieces))]

    def _render(self, messages: Conversation, add_generation_prompt: bool = False) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except (TemplateError, MemoryError, OutOfBoundsError):
            raise
        except Exception as error:  # a template is a program: it divides by zero, recurses, adds null to text
            raise TemplateError(f"{type(error).__name__}: {error}") from error

    def _check_bounds(self) -> None:
        """Raises DataError for a template that takes far more time or memory than any should."""
        key = repr((self.tokenizer.chat_template, self.tokenizer.special_tokens_map))
        if key in _WITHIN_BOUNDS:
            return
        turns: list[Message] = [
            {"role": role, "content": "A line of text.\n" * 100} for role in ("user", "assistant") * 8
        ]

        def render() -> None:
            with contextlib.suppress(DataError):
                self._probe()
            self._render(({"role": "system", "content": "Be brief."}, *turns))

        if not stays_within_bounds(render):
            raise DataError(
                f"the chat template takes over {SECONDS} seconds or {MOST_BYTES >> 30} GiB for one conversation; {_FIX}"
            )
        _WITHIN_BOUNDS.add(key)

    def _response(self, prompt: Conversation, prompt_text: str, answer: str) -> str:
        whole = self._render((*prompt, {"role": "assistant", "content": answer}))
        if not (whole.startswith(prompt_text) and whole.endswith(self._after)):
            raise Unusable("template_mismatch")
        response = whole[len(prompt_text) : len(whole) - len(self._after)]
        answer = answer.strip()
        if answer not in response:
            raise Unusable("template_mismatch")
        if self._opens_with_special and self._special.search(answer):
            raise Unusable("special_token_in_response")
        return response + self._until_stop

    def _probe(self) -> tuple[str, str]:
        """What the template writes before and after an answer."""
        question: Message = {"role": "user", "content": "?"}
        try:
            prompt = self._render((question,), add_generation_prompt=True)
            has_generation_prompt = prompt != self._render((question,))
            whole = self._render((question, {"role": "assistant", "content": _PROBE}))
        except TemplateError as error:
            what = " ".join(str(error).split())[:300]
            raise DataError(
                f"the chat template can't write a question and its answer ({what}); {_FIX}"
            ) from error
        if not whole.startswith(prompt) or _PROBE not in whole:
            raise DataError(
                f"the chat template writes an answered question not as its prompt and the answer; {_FIX}"
            )
        before, _, after = whole[len(prompt) :].partition(_PROBE)
        if before.strip() and not has_generation_prompt:
            raise DataError(
                f"the chat template has no generation prompt: {before!r} would be learned as a part of each answer; "
                "let it write that after the messages if add_generation_prompt is set, or give another in "
                "model.chat_template"
            )
        return before, after

    def _find_stop(self) -> tuple[int, str]:
        """The id and text of the added token that the template closes a response with, else of EOS."""
        closing = self._after.strip()
        added = {token.content: index for index, token in self.tokenizer.added_tokens_decoder.items()}
        closers = [text for text in added if text.strip() and closing.startswith(text)]
        if closers:
            stop = max(closers, key=len)
            return added[stop], stop
        if self.tokenizer.eos_token_id is None:
            raise DataError(
                "the tokenizer has no EOS token, and the chat template closes an answer with none of its own; "
                "set eos_token in tokenizer_config.json, or give a template in model.chat_template that closes an "
                "answer with a token of the tokenizer"
            )
        return self.tokenizer.eos_token_id, self.tokenizer.eos_token

    def _find_anchor(self) -> tuple[str, list[int]]:
        """A text to put before a response, and its ids to take off again, for a tokenizer that would treat the
        response's start as the start of a text: SentencePiece's (Llama-2, Mistral) put a space there, which after
        a prompt is none of the response's.
        """
        alone = self._ids([_PROBE])[0]
        for anchor in ("\n", ":"):
            anchor_ids, anchored = self._ids([anchor, anchor + _PROBE])
            if anchored[: len(anchor_ids)] == anchor_ids:
                return ("", []) if anchored[len(anchor_ids) :] == alone else (anchor, anchor_ids)
        return "", []

    def _continuations(self, texts: list[str], **options: bool) -> list[list[int]]:
        size = len(self._anchor_ids)
        anchored = self._ids([self._anchor + text for text in texts], **options)
        return [
            # An anchor that merged with the response's first letters can't be taken off.
            ids[size:] if ids[:size] == self._anchor_ids else self._ids([text], **options)[0]
            for text, ids in zip(texts, anchored, strict=True)
        ]

    def _ids(self, texts: list[str], **options: bool) -> list[list[int]]:
        if not texts:
            return []
        encoded = self.tokenizer(
            texts,
            add_special_tokens=False,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,  # a text over the model's length is cut or dropped later
            **options,
        )["input_ids"]
        share = self._shared_ids.setdefault
        return [list(map(share, ids, ids)) for ids in encoded]


def _answered(turns: Conversation) -> list[int]:
    """The places of a dialogue's answers: of the assistant's turns that say something to a turn before them."""
    return [
        place
        for place, (before, turn) in enumerate(itertools.pairwise(turns), start=1)
        if turn["role"] == "assistant" != before["role"] and turn["content"].strip()
    ]


def _adds_bos(tokenizer: Any) -> bool:
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer(_PROBE)["input_ids"][:1] == [bos]
