"""A file of prompts answered by a model: checked whole beforehand, kept as answers come, resumed after a kill.

Each prompt is answered `samples` times, turn by turn: the second turn's question follows the first one's answer.
"""

import hashlib
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from qorpo.data.chat_format import ChatFormat, Texts
from qorpo.data.records import Conversation
from qorpo.engine.sampling import BATCH_SIZE, Completion, Done, Request, complete_all, context_of, seed_of
from qorpo.errors import DataError, RecipeError
from qorpo.generation.answers_file import Kept, KeptAnswer, check_free, finish, kept_answers
from qorpo.generation.formats import Answer, Format, format_of
from qorpo.generation.load import Opened, find_model, stop_tokens
from qorpo.generation.prompts import Prompt, Prompts, read_prompts
from qorpo.model.load import load_config

logger = logging.getLogger(__name__)

ENGINES = ("transformers", "vllm")

Progress = Callable[[int, int, int], None]
"""Called with (answers done, answers in all, tokens made by now)."""


@dataclass(frozen=True)
class Generated:
    """All answers in the prompts' order, and what making them took (nothing of what an earlier run had kept)."""

    answers: list[Answer]
    output: Path | None
    tokens: int
    seconds: float
    next_commands: list[str]


class Engine(Protocol):
    """Answers requests, batch after batch; a batch all of whose places are done may be left out."""

    def complete(
        self, requests: Sequence[Request], is_done: Callable[[Sequence[int]], bool]
    ) -> Iterator[Done]: ...


@dataclass(frozen=True)
class Settings:
    """How to answer; None: as the format's benchmark has it."""

    samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None

    def __post_init__(self) -> None:
        problems = []
        if self.samples < 1:
            problems.append(f"--samples: got {self.samples}; expected 1 or more")
        if self.temperature is not None and not 0 <= self.temperature <= 100:
            problems.append(f"--temperature: got {self.temperature}; expected 0 (the likeliest token) to 100")
        if not 0 < self.top_p <= 1:
            problems.append(f"--top-p: got {self.top_p}; expected over 0, to 1")
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(f"--max-new-tokens: got {self.max_new_tokens}; expected 1 or more")
        if problems:
            raise RecipeError("\n  ".join(problems))


def generate(
    model: str | os.PathLike[str] | tuple[Any, Any],
    prompts: Prompts,
    output: str | os.PathLike[str] | None = None,
    *,
    format: str = "jsonl",
    samples: int = 1,
    temperature: float | None = None,
    top_p: float = 1.0,
    seed: int = 0,
    max_new_tokens: int | None = None,
    engine: str = "transformers",
    batch_size: int = BATCH_SIZE,
    quantization: str = "auto",
    dtype: str = "auto",
    base: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Generated:
    """Answer prompts, and write the answers as a format lays them out.

    An answer depends on model, prompt, settings and seed, not on the batch it is made in. While it goes, answers are
    kept in `output`.part; after a kill the same call goes on from there, to the same file.

    Args:
        model: what `load` takes, or the model and tokenizer that it gave.
        prompts: a file of records, or a list of texts, of conversations or of records.
        output: the file to write; None: answers are only returned.
        format: jsonl, alpaca_eval, mt_bench or ifeval.
        samples: answers a prompt.
        temperature: 0 takes the likeliest token; None: the format's (jsonl: 0).
        top_p: draw from the likeliest tokens that have this probability together.
        max_new_tokens: the most tokens of an answer; None: the format's (jsonl: 1024).
        engine: transformers or vllm.
        batch_size: the most answers at once; changes speed and memory alone.
        quantization, dtype, base, revision, allow_pickle, trust_remote_code: as `load` has them.

    Raises:
        QorpoError: what the user can fix, before the model is loaded where that can be known.
    """
    layout = format_of(format)
    if engine not in ENGINES:
        raise RecipeError(f"--engine: got {engine!r}; expected {' or '.join(ENGINES)}")
    settings = _settled(layout, Settings(samples, temperature, top_p, seed, max_new_tokens))
    place = _place(output, layout)
    asked = read_prompts(prompts, layout)
    opened: Opened | None = None
    if isinstance(model, tuple):
        chat, context = ChatFormat(model[1]), context_of(model[0])
        if place is not None or engine != "transformers":
            raise RecipeError(
                "output and engine: need the model by its path, so that its answers can be told from another's"
            )
    else:
        opened = find_model(
            model, quantization=quantization, dtype=dtype, base=base, revision=revision,
            allow_pickle=allow_pickle, trust_remote_code=trust_remote_code,
        )  # fmt: skip
        chat, context = opened.chat, _context(opened)

    def start() -> Engine:
        if opened is not None and engine == "vllm":
            from qorpo.generation.vllm import VllmEngine

            return VllmEngine(opened, context)
        loaded = model[0] if opened is None else opened.model()  # type: ignore[index]
        return TransformersEngine(loaded, stop_tokens(loaded, chat), batch_size)

    if opened is not None and engine == "vllm":
        from qorpo.generation.vllm import check_vllm

        check_vllm()
    job = _Job(asked, layout, settings, chat, context, start, progress)
    job.check_lengths()
    if place is None or opened is None:
        answers = job.run(Kept())
    else:
        made_with = {"engine": engine, "format": format, "model": opened.identity(), **vars(settings)}
        with kept_answers(place, {**made_with, "prompts": _hash(asked)}) as kept:
            answers = job.run(kept)
            finish(place, layout.write(opened.name if format != "mt_bench" else place.stem, answers))
    given = str(prompts) if isinstance(prompts, str | os.PathLike) else "PROMPTS"
    return Generated(answers, place, job.tokens, job.seconds, layout.judge(given, place) if place else [])


@dataclass(frozen=True)
class TransformersEngine:
    """transformers' `generate` on a loaded model."""

    model: Any
    stop_ids: list[int]
    batch_size: int = BATCH_SIZE

    def complete(
        self, requests: Sequence[Request], is_done: Callable[[Sequence[int]], bool]
    ) -> Iterator[Done]:
        return complete_all(
            self.model, requests, stop_ids=self.stop_ids, batch_size=self.batch_size, is_done=is_done
        )


class _Job:
    """The turns of all prompts, one turn after the other."""

    def __init__(
        self,
        prompts: list[Prompt],
        layout: Format,
        settings: Settings,
        chat: ChatFormat,
        context: int | None,
        start: Callable[[], Engine],
        progress: Progress | None,
    ):
        self.prompts, self.layout, self.settings = prompts, layout, settings
        self.chat, self.context = chat, context
        self.start, self.progress = start, progress or (lambda done, total, tokens: None)
        self.engine: Engine | None = None
        self.tokens, self.seconds = 0, 0.0

    def check_lengths(self) -> None:
        """Raises DataError for prompts that leave no room for an answer, all of them."""
        problems = []
        for prompt, ids in zip(
            self.prompts, self._ids([each.messages for each in self.prompts]), strict=True
        ):
            if not ids:
                problems.append(f"{prompt.source}: the chat template makes no token of the prompt; fill it")
            elif self.context is not None and len(ids) >= self.context:
                problems.append(
                    f"{prompt.source}: the prompt has {len(ids)} tokens, and the model reads {self.context} with "
                    "the answer; shorten or remove it"
                )
        if problems:
            more = [f"and {len(problems) - 5} more"] if len(problems) > 5 else []
            raise DataError("\n  ".join([*problems[:5], *more]))

    def run(self, kept: Kept) -> list[Answer]:
        samples = range(self.settings.samples)
        total = len(samples) * sum(prompt.num_turns for prompt in self.prompts)
        self.progress(len(kept.answers), total, 0)
        for turn in range(max(prompt.num_turns for prompt in self.prompts)):
            asked = [(each, sample) for each in self.prompts if turn < each.num_turns for sample in samples]
            if any((prompt.id, sample, turn) not in kept.answers for prompt, sample in asked):
                self._answer(asked, turn, kept, total)
        return [self._joined(prompt, sample, kept) for prompt in self.prompts for sample in samples]

    def _answer(self, asked: list[tuple[Prompt, int]], turn: int, kept: Kept, total: int) -> None:
        conversations = [
            prompt.conversation([kept.answers[prompt.id, sample, each].text for each in range(turn)])
            for prompt, sample in asked
        ]
        keys = [(prompt.id, sample, turn) for prompt, sample in asked]
        found = zip(asked, keys, self._ids(conversations), strict=True)
        requests = {key: self._request(prompt, key, ids) for (prompt, _), key, ids in found}
        full = [key for key, request in requests.items() if request.max_new_tokens < 1]
        if full:  # of a later turn: the first ones are checked before
            logger.warning(
                "turn %d: %d conversations leave no room for an answer; it is empty", turn + 1, len(full)
            )
            kept.add([KeptAnswer(*key, "", False, time.time()) for key in full])
        places = [key for key in keys if key not in full]
        self.engine = self.engine or self.start()

        def is_done(batch: Sequence[int]) -> bool:
            return all(places[place] in kept.answers for place in batch)

        started = time.perf_counter()
        for batch, completions in self.engine.complete([requests[key] for key in places], is_done):
            self.tokens += sum(len(each.ids) + each.is_finished for each in completions)
            kept.add(
                [self._kept(places[place], each) for place, each in zip(batch, completions, strict=True)]
            )
            self.progress(len(kept.answers), total, self.tokens)
        self.seconds += time.perf_counter() - started

    def _request(self, prompt: Prompt, key: tuple[str | int, int, int], ids: list[int]) -> Request:
        most = self.settings.max_new_tokens or self.layout.max_new_tokens
        room = most if self.context is None else self.context - len(ids)
        given = self.settings.temperature
        temperature = self.layout.temperature(prompt) if given is None else given
        return Request(
            ids, min(most, room), temperature, self.settings.top_p, seed_of(self.settings.seed, *key)
        )

    def _kept(self, key: tuple[str | int, int, int], completion: Completion) -> KeptAnswer:
        text = self.chat.tokenizer.decode(list(completion.ids), skip_special_tokens=True).strip()
        return KeptAnswer(*key, text, completion.is_finished, round(time.time(), 3))

    def _joined(self, prompt: Prompt, sample: int, kept: Kept) -> Answer:
        turns = [kept.answers[prompt.id, sample, turn] for turn in range(prompt.num_turns)]
        return Answer(
            prompt, sample, tuple(each.text for each in turns),
            all(each.finished for each in turns), max(each.made_at for each in turns),
        )  # fmt: skip

    def _ids(self, conversations: Sequence[Conversation]) -> list[list[int]]:
        return prompt_ids(self.chat, conversations)


def prompt_ids(chat: ChatFormat, conversations: Sequence[Conversation]) -> list[list[int]]:
    """The tokens that the model is given for each, up to where its answer begins.

    Raises:
        DataError: where the chat template refuses a conversation, such as Gemma's one that opens with a system turn.
    """
    texts = []
    for messages in conversations:
        try:
            text = chat.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True
            )
        except Exception as error:  # a template is a program of the model's
            start = messages[0]["content"][:60]
            raise DataError(f"the chat template refuses the prompt {start!r}: {error}; change it") from error
        texts.append(Texts(text, ()))
    return [ids for ids, *_ in chat.encode(texts)]


def _settled(layout: Format, settings: Settings) -> Settings:
    """With what the format says of what was not given; raises RecipeError for what doesn't go together."""
    if settings.samples > 1 and not layout.takes_samples:
        raise RecipeError(f"--samples: {layout.name} takes one answer a prompt; leave it out")
    if settings.samples > 1 and layout.name == "jsonl" and not settings.temperature:
        raise RecipeError(
            f"--samples: {settings.samples} answers without a temperature would be the same; give --temperature 0.7"
        )
    return replace(settings, max_new_tokens=settings.max_new_tokens or layout.max_new_tokens)


def _place(output: str | os.PathLike[str] | None, layout: Format) -> Path | None:
    if output is None:
        return None
    path = Path(output).expanduser()
    if path.suffix != layout.suffix:
        raise RecipeError(
            f"--output {path}: {layout.name} answers are read from a file ending in {layout.suffix}"
        )
    check_free(path)
    return path


def _context(opened: Opened) -> int | None:
    config = load_config(opened.path, revision=opened.revision, trust_remote_code=opened.trust_remote_code)
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def _hash(prompts: Sequence[Prompt]) -> str:
    content = [[each.id, each.messages, each.further, dict(each.record)] for each in prompts]
    return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
