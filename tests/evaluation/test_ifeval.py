"""IFEval: the harness' own checks, without a download, and figures that a person can count."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from qorpo.errors import DataError, RunError

pytest.importorskip("lm_eval", reason="the extra eval is not installed")
pytest.importorskip("langdetect", reason="the extra eval is not installed")

from qorpo.evaluation import ifeval

PROMPTS = Path(__file__).parents[3] / "shared" / "data" / "ifeval" / "input_data.jsonl"

RECORDS = [
    {
        "key": 1, "prompt": "Write without commas, in all lowercase.",
        "instruction_id_list": ["punctuation:no_comma", "change_case:english_lowercase"], "kwargs": [{}, {}],
    },
    {
        "key": 2, "prompt": "Write at least 3 sentences.", "instruction_id_list": ["length_constraints:number_sentences"],
        "kwargs": [{"relation": "at least", "num_sentences": 3}],
    },
    {
        "key": 3, "prompt": "Use two capital words.", "instruction_id_list": ["change_case:capital_word_frequency"],
        "kwargs": [{"capital_relation": "at least", "capital_frequency": 2, "num_words": None}],
    },
]  # fmt: skip
FOLLOWED = [
    "this is a plain answer without any of them.",
    "Dr. Smith came home. He sat down. Then he slept.",
    "This is VERY GOOD. Thank you.",
]


def test_followed_instructions_score_1_and_others_0():
    for responses, expected in ((FOLLOWED, 1.0), (["A, B", "One.", "none"], 0.0), (["", " ", "\n"], 0.0)):
        figures = ifeval.score(RECORDS, responses)
        assert {each.value.value for each in figures.values()} == {expected}


def test_figures_are_what_a_person_counts():
    # The first prompt follows one of two, the second none strictly (two sentences), the third all.
    figures = ifeval.score(RECORDS, ["A plain ANSWER", "Dr. Smith came home. He slept.", FOLLOWED[2]])
    found = {name: each.value.value for name, each in figures.items()}
    assert found["prompt_strict"] == pytest.approx(1 / 3)
    assert found["instruction_strict"] == pytest.approx(2 / 4)
    assert found["strict_average"] == pytest.approx((1 / 3 + 2 / 4) / 2)
    for each in figures.values():
        assert each.value.low <= each.value.value <= each.value.high


def test_loose_forgives_the_first_line_and_strict_does_not():
    figures = ifeval.score(RECORDS[:1], ["Sure, here it is:\nthis is a plain answer of many words"])
    assert figures["prompt_strict"].value.value == 0
    assert figures["prompt_loose"].value.value == 1


def test_the_interval_of_many_prompts_is_the_binomial_one():
    records, responses = [RECORDS[1]] * 400, [FOLLOWED[1], "One."] * 200
    found = ifeval.score(records, responses)["prompt_strict"].value
    assert found.value == 0.5
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 400), rel=0.1)


def test_verdicts_are_the_same_each_time():
    record = RECORDS[0] | {
        "instruction_id_list": ["language:response_language"],
        "kwargs": [{"language": "en"}],
    }
    texts = ["ok la casa is no", "hola da mi si", "ja si yes oui"] * 5
    once = [ifeval.score([record], [text])["prompt_strict"].value.value for text in texts]
    assert once == [ifeval.score([record], [text])["prompt_strict"].value.value for text in texts]


def test_punkt_is_nltks_own_with_all_its_parameters():
    from nltk.tokenize.punkt import PunktTokenizer

    ifeval.provide_punkt()
    found = PunktTokenizer("english")._params
    # As many as NLTK's published punkt_tab has for English.
    counts = [
        len(found.abbrev_types),
        len(found.collocations),
        len(found.sent_starters),
        len(found.ortho_context),
    ]
    assert counts == [156, 37, 39, 20366]


def test_nothing_is_downloaded():
    script = """
import socket, nltk
def refuse(*arguments, **named): raise AssertionError(f"a download: {arguments}")
nltk.download = socket.create_connection = refuse
socket.socket.connect = refuse
from qorpo.evaluation import ifeval
print(ifeval.score([{"key": 1, "prompt": "p", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}], ["a"]))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "value=1.0" in done.stdout


def test_all_541_prompts_are_read_and_scored():
    if not PROMPTS.is_file():
        pytest.skip("IFEval's prompts are not beside this checkout")
    records = ifeval.read_instructions(str(PROMPTS))
    assert (len(records), sum(len(each["kwargs"]) for each in records)) == (541, 834)
    figures = ifeval.score(records, ["A short answer."] * 541)
    assert 0 < figures["instruction_strict"].value.value < 0.3
    assert len(ifeval.read_instructions(str(PROMPTS), limit=7)) == 7


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"prompt": ""}, "'prompt' is no text"),
        ({"kwargs": []}, "lists of one length"),
        ({"kwargs": [1, 2]}, "must hold objects"),
        ({"instruction_id_list": ["punctuation:no_comma", "made:up"]}, "the harness has no check made:up"),
        ({"key": ...}, "has no 'key'"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_records_is_one_message_with_their_lines(tmp_path, change, said):
    broken = {name: value for name, value in (RECORDS[0] | change).items() if value is not ...}
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, [RECORDS[0], broken])) + "\nnot json\n")
    with pytest.raises(DataError) as raised:
        ifeval.read_instructions(str(path))
    assert said in str(raised.value)
    assert "prompts.jsonl:2: " in str(raised.value)
    assert "prompts.jsonl:3: " in str(raised.value)


def test_arguments_that_a_check_does_not_take_name_their_record():
    record = RECORDS[1] | {"kwargs": [{"number": 3}]}
    with pytest.raises(DataError, match="key 2: can't be checked"):
        ifeval.score([record], ["One."])


def test_a_folder_without_punkt_is_refused_and_one_with_it_is_taken(tmp_path, monkeypatch):
    import nltk

    monkeypatch.setattr(nltk.data, "path", list(nltk.data.path))
    with pytest.raises(DataError, match="has no tokenizers/punkt_tab/english"):
        ifeval.provide_punkt(tmp_path)
    home = ifeval._punkt_of_package()
    monkeypatch.setattr(nltk.data, "path", [])
    assert ifeval.provide_punkt(home).startswith(home)


def test_without_the_extra_the_message_says_how_to_have_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "nltk", None)
    with pytest.raises(RunError, match=r"ifeval: needs nltk; pip install 'qorpo\[eval\]'"):
        ifeval.provide_punkt()
