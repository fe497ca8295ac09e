"""The files of three benchmarks, field for field, and the commands that judge them."""

import json
from pathlib import Path

import pytest

import qorpo
from qorpo.errors import DataError

SHARED = Path(__file__).parents[3] / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason=f"no data in {SHARED}")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Compose a post.", "Rewrite it."]},
    {"question_id": 101, "category": "math", "turns": ["What is 2 + 2?", "Double that."]},
    {"question_id": 102, "category": "stem", "turns": ["Only one turn."]},
]


@pytest.fixture
def made(run, tmp_path):
    """made(format, records, name) is the output's path and what was made."""

    def make(format, records, name, **options):
        prompts = tmp_path / "prompts.jsonl"
        prompts.write_text("".join(json.dumps(record) + "\n" for record in records))
        output = tmp_path / name
        return output, qorpo.generate(run, prompts, output, format=format, **{"max_new_tokens": 8} | options)

    return make


def test_mt_bench_asks_the_second_turn_after_the_first_answer(made, run):
    output, result = made("mt_bench", QUESTIONS, "tiny.jsonl")
    answers = lines(output)
    assert [answer["question_id"] for answer in answers] == [81, 101, 102]
    assert [len(answer["choices"][0]["turns"]) for answer in answers] == [2, 2, 1]
    first, second = answers[1]["choices"][0]["turns"]
    asked = [
        {"role": "user", "content": "What is 2 + 2?"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "Double that."},
    ]
    alone = qorpo.generate(run, [asked], max_new_tokens=8)  # mathematics is answered without temperature
    assert alone.answers[0].text == second
    assert answers[0]["model_id"] == "tiny"
    assert result.next_commands[1].startswith("python gen_judgment.py --model-list tiny")


def test_mt_bench_takes_several_choices(made):
    output, _ = made("mt_bench", QUESTIONS[:1], "tiny.jsonl", samples=3)
    (answer,) = lines(output)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert len({choice["turns"][0] for choice in answer["choices"]}) > 1


@needs_shared
def test_mt_bench_answers_have_the_papers_fields(made):
    theirs = lines(SHARED / "mt_bench" / "Mistral-ORPO-beta.answers.jsonl")
    questions = lines(SHARED / "mt_bench" / "question.jsonl")[:2]
    output, _ = made("mt_bench", questions, "tiny.jsonl")
    for own, other in zip(lines(output), theirs, strict=False):
        assert list(own) == list(other)
        for name, value in other.items():
            assert type(own[name]) is type(value), name
        assert own["question_id"] == other["question_id"]
        assert len(own["answer_id"]) == len(other["answer_id"])
        assert own["answer_id"].isalnum()
        assert [list(choice) for choice in own["choices"]] == [list(choice) for choice in other["choices"]]
        assert len(own["choices"][0]["turns"]) == len(other["choices"][0]["turns"])


def test_a_conversation_that_fills_the_context_ends_in_an_empty_answer(made, caplog):
    questions = [{"question_id": 1, "category": "math", "turns": ["What? " * 20, "What? " * 60]}]
    output, result = made("mt_bench", questions, "tiny.jsonl")
    assert lines(output)[0]["choices"][0]["turns"][1] == ""
    assert "leave no room for an answer" in caplog.text
    assert not result.answers[0].is_finished


def test_alpaca_eval_outputs_carry_instruction_and_generator(made):
    asked = [
        {"dataset": "helpful_base", "instruction": "Name a colour."},
        {"dataset": "koala", "instruction": "Name another."},
    ]
    output, result = made("alpaca_eval", asked, "outputs.json")
    found = json.loads(output.read_text())
    assert [{name: each[name] for name in ("dataset", "instruction")} for each in found] == asked
    assert {each["generator"] for each in found} == {"run"}
    assert all(isinstance(each["output"], str) for each in found)
    assert result.next_commands == [
        f"alpaca_eval --model_outputs {output} --annotators_config weighted_alpaca_eval_gpt4_turbo   "
        "# needs OPENAI_API_KEY"
    ]


def test_ifeval_responses_carry_their_prompt(made):
    asked = [
        {
            "key": 1000,
            "prompt": "Use no comma.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
    ]
    output, result = made("ifeval", asked, "responses.jsonl")
    (found,) = lines(output)
    assert list(found) == ["prompt", "response"]
    assert found["prompt"] == "Use no comma."
    assert "--input_response_data=" in result.next_commands[0]


@needs_shared
@pytest.mark.parametrize(
    ("format", "file", "name"),
    [
        ("alpaca_eval", "alpaca_eval/instructions.jsonl", "outputs.json"),
        ("mt_bench", "mt_bench/question.jsonl", "answers.jsonl"),
        ("ifeval", "ifeval/input_data.jsonl", "responses.jsonl"),
    ],
)
def test_the_benchmarks_own_files_are_read(format, file, name):
    from qorpo.generation.formats import format_of
    from qorpo.generation.prompts import read_prompts

    found = read_prompts(SHARED / file, format_of(format))
    assert len(found) == {"alpaca_eval": 805, "mt_bench": 80, "ifeval": 541}[format]
    assert {each.num_turns for each in found} == ({2} if format == "mt_bench" else {1})


@pytest.mark.parametrize(
    ("format", "record", "named"),
    [
        ("mt_bench", {"question_id": 1, "turns": []}, "'turns' is missing, or no list of texts"),
        ("mt_bench", {"question_id": 1, "turns": ["a", ""]}, "the prompt is empty"),
        ("alpaca_eval", {"prompt": "a"}, "'instruction' is missing; expected text"),
        ("ifeval", {"prompt": ["a"]}, r"'prompt' is a list \(\['a'\]\); expected text"),
    ],
)
def test_records_of_another_layout_are_refused(run, format, record, named):
    with pytest.raises(DataError, match=named):
        qorpo.generate(run, [record], format=format)
