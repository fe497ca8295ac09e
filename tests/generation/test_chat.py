"""Conversations: remembered turn by turn, streamed, side by side with the base, from a pipe."""

import io
import os
from pathlib import Path

import pytest

import qorpo
from qorpo.errors import DataError, ModelError, RecipeError
from qorpo.generation.chat import open_speakers

OPTIONS = {"max_new_tokens": 10}


def answered(model, *turns):
    """What `generate` says to a conversation, given as user, assistant, user, …"""
    roles = ("user", "assistant") * len(turns)
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=False)]
    return qorpo.generate(model, [messages], **OPTIONS).answers[0].text


def test_each_answer_follows_what_was_said_and_reset_forgets_it(run):
    (speaker,) = open_speakers(str(run), None, {}, **OPTIONS)
    first = speaker.answer("What colour is the sky?")
    assert first == answered(run, "What colour is the sky?")
    assert speaker.answer("And the sea?") == answered(run, "What colour is the sky?", first, "And the sea?")
    speaker.reset()
    assert speaker.answer("And the sea?") == answered(run, "And the sea?")


def test_pieces_make_up_the_answer(run):
    (speaker,) = open_speakers(str(run), None, {}, system="Be brief.", max_new_tokens=24)
    pieces = []
    answer = speaker.answer("What colour is the sea?", pieces.append)
    assert "".join(pieces).strip() == answer
    assert speaker.messages[0] == {"role": "system", "content": "Be brief."}


def test_no_half_characters_are_told():
    from helpers.tiny import make_tokenizer

    from qorpo.generation.chat import _Pieces

    tokenizer, told = make_tokenizer(), []
    pieces = _Pieces(tokenizer, [1], told.append)
    import torch

    pieces.put(torch.tensor([[3, 4]]))  # the prompt
    for token in [*tokenizer("né 猫")["input_ids"], 1]:
        pieces.put(torch.tensor([token]))
    pieces.end()
    assert told == ["n", "é", " ", "猫"]
    assert pieces.text == "né 猫"


def test_beside_base_answers_without_the_adapter(run, base):
    other, own = open_speakers(str(run), "base", {}, **OPTIONS)
    assert (other.name, own.name) == ("base", "run")
    quantized = qorpo.load(base, quantization="nf4")
    question = "What colour is the sky?"
    assert other.answer(question) == answered(quantized, question)
    assert own.answer(question) == answered(run, question)
    assert other.messages != own.messages


def test_beside_another_model_each_has_its_own_name(run, merged):
    other, own = open_speakers(str(run), str(merged), {}, **OPTIONS)
    assert (other.name, own.name) == ("merged", "run")
    twins = open_speakers(str(run), str(run), {}, **OPTIONS)
    assert len({speaker.name for speaker in twins}) == 2


def test_a_full_context_says_how_to_go_on_and_forgets_nothing(run):
    (speaker,) = open_speakers(str(run), None, {}, **OPTIONS)
    speaker.answer("What?")
    before = list(speaker.messages)
    with pytest.raises(DataError, match="the model reads 256 with its answer; begin anew by /reset"):
        speaker.answer("What? " * 100)
    assert speaker.messages == before


def test_beside_nothing_is_refused(merged):
    with pytest.raises(RecipeError, match=r"--beside base: .* has no adapter to leave out"):
        open_speakers(str(merged), "base", {})
    with pytest.raises(ModelError, match="there is no folder"):
        open_speakers(str(merged), "/none", {})


@pytest.fixture
def chat(command, monkeypatch):
    """chat(what comes through the pipe, arguments of the command) is (exit code, stdout, stderr)."""

    def run_it(said: bytes, *arguments):
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(said), encoding="utf-8"))
        return command("chat", *arguments, "--max-new-tokens", 10)

    return run_it


def test_the_command_answers_a_pipe_line_by_line(chat, run):
    question = "What colour is the sky?"
    code, out, _ = chat(f"{question}\n\n/reset\n{question}\n/quit\n{question}\n".encode(), run)
    assert code == 0
    lines = out.splitlines()
    assert len(lines) == 2
    assert lines[0] == lines[1]
    assert lines[0].startswith("run: ")


def test_the_command_goes_on_after_bytes_that_are_no_text_and_a_question_too_long(chat, run):
    code, out, err = chat(b"What \xff colour?\n" + b"What? " * 100 + b"\nWhat?\n", run)
    assert code == 0
    assert out.count("run: ") == 3
    assert err.count("begin anew by /reset") == 1


def test_two_models_stand_below_each_other_in_a_pipe(chat, run):
    code, out, _ = chat(b"What colour is the sky?\n", run, "--beside", "base")
    assert code == 0
    assert [line.split(":")[0] for line in out.splitlines()] == ["base", "run"]


def test_on_a_terminal_they_stand_side_by_side(run):
    from rich.console import Console

    from qorpo.cli.answering import _answer

    speakers = open_speakers(str(run), "base", {}, **OPTIONS)
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    _answer(console, speakers, "What colour is the sky?")
    shown = console.file.getvalue()
    heading = next(line for line in shown.splitlines() if "base" in line)
    assert "run" in heading


MODEL = os.environ.get("QORPO_SMOLLM2", "")


@pytest.mark.slow
@pytest.mark.skipif(
    not Path(MODEL, "config.json").is_file(),
    reason="QORPO_SMOLLM2 names no folder of the model; ../shared/models/smollm2.py FOLDER makes it",
)
def test_a_real_model_knows_the_capital_of_france(chat):
    code, out, _ = chat(b"What is the capital of France?\n", MODEL)
    assert code == 0
    assert "Paris" in out
