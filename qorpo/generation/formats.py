"""How prompts are laid out and answers are handed in: plain records, and three benchmarks' own files and judges.

A format says which temperature and length its benchmark takes, and the command that judges the file.
"""

import hashlib
import json
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qorpo.data.conversations import message
from qorpo.data.records import BadRecord
from qorpo.errors import RecipeError
from qorpo.generation.prompts import Prompt, conversation_of, id_of, text_of


@dataclass(frozen=True)
class Answer:
    """What a model said to a prompt: a text a turn; `is_finished`: each ended by itself, none at the length's limit."""

    prompt: Prompt
    sample: int
    turns: tuple[str, ...]
    is_finished: bool
    made_at: float  # seconds since 1970

    @property
    def text(self) -> str:
        return self.turns[0]


@dataclass(frozen=True)
class Format:
    """A layout of prompts and answers.

    `temperature`: of a prompt, unless a person says otherwise. `write`: the output's text from the model's name and
    all answers in the prompts' order. `judge`: from the prompts' and the output's path, the commands that come next.
    """

    name: str
    suffix: str
    max_new_tokens: int
    takes_samples: bool
    read: Callable[[Mapping[str, Any], int], Prompt]
    temperature: Callable[[Prompt], float]
    write: Callable[[str, Sequence[Answer]], str]
    judge: Callable[[str, Path], list[str]]


def format_of(name: str) -> Format:
    """Raises RecipeError for an unknown name."""
    if name not in FORMATS:
        raise RecipeError(f"--format: got {name!r}; expected {', '.join(FORMATS)}")
    return FORMATS[name]


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


# --- plain records ---


def _read_plain(record: Mapping[str, Any], place: int) -> Prompt:
    return Prompt(id_of(record, place), conversation_of(record))


def _write_plain(name: str, answers: Sequence[Answer]) -> str:
    return _lines(
        {
            "id": answer.prompt.id,
            "sample": answer.sample,
            "messages": list(answer.prompt.messages),
            "response": answer.text,
            "finished": answer.is_finished,
        }
        for answer in answers
    )


# --- AlpacaEval: https://github.com/tatsu-lab/alpaca_eval ---


def _read_alpaca_eval(record: Mapping[str, Any], place: int) -> Prompt:
    return Prompt(place, (message("user", text_of(record, "instruction")),))


def _write_alpaca_eval(name: str, answers: Sequence[Answer]) -> str:
    rows = [
        {
            **({"dataset": answer.prompt.record["dataset"]} if "dataset" in answer.prompt.record else {}),
            "instruction": answer.prompt.record["instruction"],
            "output": answer.text,
            "generator": name,
        }
        for answer in answers
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"


def _judge_alpaca_eval(prompts: str, output: Path) -> list[str]:
    judge = "--annotators_config weighted_alpaca_eval_gpt4_turbo"
    return [f"alpaca_eval --model_outputs {shlex.quote(str(output))} {judge}   # needs OPENAI_API_KEY"]


# --- MT-Bench: https://github.com/lm-sys/FastChat/tree/main/fastchat/llm_judge ---

# FastChat's llm_judge/common.py, temperature_config.
MT_BENCH_TEMPERATURES = {
    "writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
    "stem": 0.1, "humanities": 0.1, "arena-hard-200": 0.0,
}  # fmt: skip


def _read_mt_bench(record: Mapping[str, Any], place: int) -> Prompt:
    turns = record.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) for turn in turns):
        raise BadRecord("wrong_type", "'turns' is missing, or no list of texts; expected a user's turns")
    messages = [message("user", turn) for turn in turns]
    return Prompt(
        id_of(record, place, ("question_id",)),
        tuple(messages[:1]), tuple(turn["content"] for turn in messages[1:]),
    )  # fmt: skip


def _mt_bench_temperature(prompt: Prompt) -> float:
    required = prompt.record.get("required_temperature")
    return MT_BENCH_TEMPERATURES.get(prompt.record.get("category", ""), 0.7) if required is None else required


def _write_mt_bench(name: str, answers: Sequence[Answer]) -> str:
    by_question: dict[Any, list[Answer]] = {}
    for answer in answers:
        by_question.setdefault(answer.prompt.id, []).append(answer)
    return _lines(
        {
            "question_id": question,
            "answer_id": _short_id(name, question, [answer.turns for answer in given]),
            "model_id": name,
            "choices": [{"index": answer.sample, "turns": list(answer.turns)} for answer in given],
            "tstamp": max(answer.made_at for answer in given),
        }
        for question, given in by_question.items()
    )


def _short_id(*parts: Any) -> str:
    """22 letters and digits, as shortuuid writes 128 bits; the same for the same answer."""
    number = int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:16], "big")
    letters = "23456789ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz"
    return "".join(letters[number // len(letters) ** place % len(letters)] for place in range(22))


def _judge_mt_bench(prompts: str, output: Path) -> list[str]:
    name, path = shlex.quote(output.stem), shlex.quote(str(output.absolute()))
    return [
        f"cp {path} data/mt_bench/model_answer/   # in FastChat's fastchat/llm_judge",
        f"python gen_judgment.py --model-list {name} --judge-model gpt-4   # needs OPENAI_API_KEY",
        f"python show_result.py --model-list {name}",
    ]


# --- IFEval: https://github.com/google-research/google-research/tree/master/instruction_following_eval ---


def _read_ifeval(record: Mapping[str, Any], place: int) -> Prompt:
    return Prompt(id_of(record, place, ("key",)), (message("user", text_of(record, "prompt")),))


def _write_ifeval(name: str, answers: Sequence[Answer]) -> str:
    return _lines({"prompt": answer.prompt.record["prompt"], "response": answer.text} for answer in answers)


def _judge_ifeval(prompts: str, output: Path) -> list[str]:
    files = f"--input_data={shlex.quote(prompts)} --input_response_data={shlex.quote(str(output))}"
    folder = shlex.quote(str(output.absolute().parent))
    return [f"python -m instruction_following_eval.evaluation_main {files} --output_dir={folder}"]


FORMATS = {
    each.name: each
    for each in (
        Format("jsonl", ".jsonl", 1024, True, _read_plain, lambda _: 0.0, _write_plain, lambda *_: []),
        Format(
            "alpaca_eval", ".json", 2048, False,
            _read_alpaca_eval, lambda _: 0.7, _write_alpaca_eval, _judge_alpaca_eval,
        ),
        Format(
            "mt_bench", ".jsonl", 1024, True,
            _read_mt_bench, _mt_bench_temperature, _write_mt_bench, _judge_mt_bench,
        ),
        Format("ifeval", ".jsonl", 1280, False, _read_ifeval, lambda _: 0.0, _write_ifeval, _judge_ifeval),
    )
}  # fmt: skip
