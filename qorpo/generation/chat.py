"""A conversation with a model, or with two of them side by side: each keeps its own answers."""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

from transformers.generation.streamers import BaseStreamer

from qorpo.data.chat_format import ChatFormat
from qorpo.data.conversations import message
from qorpo.data.records import Message
from qorpo.engine.sampling import Request, complete, context_of, seed_of
from qorpo.errors import DataError, RecipeError
from qorpo.generation.generate import prompt_ids
from qorpo.generation.load import Opened, find_model, stop_tokens

OnText = Callable[[str], None]


class Speaker:
    """A model in a conversation.

    Args:
        is_base: answer without the adapter that is on the model.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        chat: ChatFormat,
        *,
        system: str | None = None,
        max_new_tokens: int = 1024,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        is_base: bool = False,
    ):
        self.name, self.model, self.chat, self.is_base = name, model, chat, is_base
        self.max_new_tokens, self.temperature, self.top_p, self.seed = (
            max_new_tokens,
            temperature,
            top_p,
            seed,
        )
        self.stop_ids = stop_tokens(model, chat)
        self._opening: list[Message] = [message("system", system)] if system else []
        self.reset()

    def reset(self) -> None:
        """Forget what was said."""
        self.messages = list(self._opening)

    def answer(self, question: str, on_text: OnText = lambda text: None) -> str:
        """The answer to the next question, told piece by piece; both are remembered once it is whole.

        Raises:
            DataError: where the conversation leaves no room for an answer, or the template refuses it.
        """
        asked = [*self.messages, message("user", question)]
        (ids,) = prompt_ids(self.chat, [tuple(asked)])
        context = context_of(self.model)
        room = self.max_new_tokens if context is None else min(self.max_new_tokens, context - len(ids))
        if room < 1:
            raise DataError(
                f"the conversation has {len(ids)} tokens and the model reads {context} with its answer; begin anew by /reset"
            )
        request = Request(ids, room, self.temperature, self.top_p, seed_of(self.seed, len(asked)))
        pieces = _Pieces(self.chat.tokenizer, self.stop_ids, on_text)
        with self.model.disable_adapter() if self.is_base else contextlib.nullcontext():
            complete(self.model, [request], stop_ids=self.stop_ids, streamer=pieces)
        self.messages = [*asked, message("assistant", pieces.text.strip())]
        return pieces.text.strip()


class _Pieces(BaseStreamer):
    """Turns tokens into text as they come, never half of a character."""

    def __init__(self, tokenizer: Any, stop_ids: Sequence[int], on_text: OnText):
        self.tokenizer, self.stop_ids, self.on_text = tokenizer, stop_ids, on_text
        self.ids: list[int] | None = None
        self.text = ""

    def put(self, value: Any) -> None:
        if self.ids is None:  # the prompt comes first
            self.ids = []
            return
        self.ids += [token for token in value.flatten().tolist() if token not in self.stop_ids]
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            self._tell(text)

    def end(self) -> None:
        self._tell(self.tokenizer.decode(self.ids or [], skip_special_tokens=True))

    def _tell(self, text: str) -> None:
        shown = self.text.lstrip()
        self.text = text
        if piece := text.lstrip()[len(shown) :]:
            self.on_text(piece)


def open_speakers(model: str, beside: str | None, arguments: dict[str, Any], **options: Any) -> list[Speaker]:
    """The model's speaker, and before it the one beside it: `base`, the model without its adapter, or another model.

    Args:
        arguments: of `find_model`. options: of `Speaker`.

    Raises:
        QorpoError: where either can't be opened; RecipeError for `base` where there is no adapter.
    """
    opened = find_model(model, **arguments)
    other: Opened | None = None
    if beside == "base" and opened.trained is None:
        raise RecipeError(
            f"--beside base: {model} has no adapter to leave out; give its base as --beside PATH"
        )
    if beside not in (None, "base"):
        other = find_model(beside, trust_remote_code=opened.trust_remote_code)
    loaded = opened.model()
    speakers = [Speaker(opened.name, loaded, opened.chat, **options)]
    if beside == "base":
        speakers.insert(0, Speaker("base", loaded, opened.chat, is_base=True, **options))
    elif other is not None:
        name = f"{other.name}, beside it" if other.name == opened.name else other.name
        speakers.insert(0, Speaker(name, other.model(), other.chat, **options))
    return speakers
