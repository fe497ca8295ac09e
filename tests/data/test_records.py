"""Each shape of record, the records no shape reads, and the report's arithmetic."""

import json

import pytest

from qorpo.data.filters import make_pair
from qorpo.data.records import BadRecord, DataReport, PairSet, PreferencePair, Unusable, read_conversations


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def pair_of(record):
    pair = make_pair(*read_conversations(record), "here")
    return pair.prompt, pair.chosen, pair.rejected


EXPECTED = ((user("Q"),), "good", "bad")
MULTI_TURN = ((system("S"), user("Q"), assistant("A"), user("R")), "good", "bad")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, EXPECTED),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "score": 3, "id": None}, EXPECTED),
        ({"prompt": "Q", "chosen": [assistant("good")], "rejected": [assistant("bad")]}, EXPECTED),
        ({"prompt": [user("Q")], "chosen": "good", "rejected": "bad"}, EXPECTED),
        ({"prompt": [user("Q")], "chosen": [assistant("good")], "rejected": "bad"}, EXPECTED),
        # UltraFeedback binarized: the prompt column repeats the first user turn.
        (
            {
                "prompt": "Q ",
                "chosen": [user("Q"), assistant("good")],
                "rejected": [user("Q"), assistant("bad")],
            },
            EXPECTED,
        ),
        ({"chosen": [user("Q"), assistant("good")], "rejected": [user("Q"), assistant("bad")]}, EXPECTED),
        (
            {
                "prompt": None,
                "chosen": [user("Q"), assistant("good")],
                "rejected": [user("Q"), assistant("bad")],
            },
            EXPECTED,
        ),
        (
            {
                "prompt": "Q",
                "chosen": [*MULTI_TURN[0], assistant("good")],
                "rejected": [*MULTI_TURN[0], assistant("bad")],
            },
            MULTI_TURN,
        ),
        ({"prompt": list(MULTI_TURN[0]), "chosen": "good", "rejected": "bad"}, MULTI_TURN),
        ({"prompt": [system("S")], "chosen": "good", "rejected": "bad"}, ((system("S"),), "good", "bad")),
        (
            {"chosen": "\n\nHuman: Q\n\nAssistant: good", "rejected": "\n\nHuman: Q\n\nAssistant: bad "},
            EXPECTED,
        ),
        (
            {
                "chosen": "\n\nHuman: Q\n\nmore\n\nAssistant: A\n\nHuman: R\n\nAssistant: good",
                "rejected": "\n\nHuman: Q\n\nmore\n\nAssistant: A\n\nHuman: R\n\nAssistant: bad",
            },
            ((user("Q\n\nmore"), assistant("A"), user("R")), "good", "bad"),
        ),
    ],
)
def test_each_shape_gives_the_pair(record, expected):
    assert pair_of(record) == expected


def test_messages_keep_only_role_and_text():
    record = {"prompt": [{**user("Q"), "name": "Ann", "weight": 1}], "chosen": "good", "rejected": "bad"}
    assert pair_of(record) == EXPECTED


def test_answers_keep_their_own_whitespace():
    assert pair_of({"prompt": "Q", "chosen": "    return x\n", "rejected": "bad"})[1] == "    return x\n"


@pytest.mark.parametrize(
    ("record", "reason", "said"),
    [
        (
            {"prompt": "Q", "chosen": "good", "reject": "bad"},
            "missing_column",
            "no column 'rejected'; found 'prompt', 'chosen', 'reject'; expected prompt/chosen/rejected, "
            "or chosen/rejected message lists, or HH-RLHF transcripts",
        ),
        ({"prompt": "Q", "chosen": "good", "rejected": None}, "missing_column", "'rejected' (null)"),
        ({}, "missing_column", "no column 'chosen', 'rejected'; found none"),
        (
            {"chosen": "good", "rejected": "bad"},
            "missing_column",
            "no column 'prompt', and 'chosen' is no HH-RLHF",
        ),
        (
            {"chosen": "Q:\n\nAssistant: a", "rejected": "b"},
            "missing_column",
            "'chosen' is no HH-RLHF transcript",
        ),
        ({"chosen": "", "rejected": ""}, "missing_column", "'chosen' is no HH-RLHF transcript but text ('')"),
        (["Q", "good", "bad"], "not_object", "a list (['Q', 'good', 'bad'])"),
        (7, "not_object", "a number (7)"),
        (None, "not_object", "null"),
        ({"prompt": 3, "chosen": "good", "rejected": "bad"}, "wrong_type", "'prompt' is a number (3)"),
        ({"prompt": "Q", "chosen": True, "rejected": "bad"}, "wrong_type", "'chosen' is a boolean (True)"),
        ({"prompt": "Q", "chosen": [], "rejected": "bad"}, "wrong_type", "'chosen' is a list ([])"),
        ({"prompt": "Q", "chosen": ["good"], "rejected": "bad"}, "wrong_type", "chosen[0] is text ('good')"),
        (
            {"chosen": [user("Q"), {"role": "assistant"}], "rejected": "b"},
            "wrong_type",
            "chosen[1] is an object",
        ),
        (
            {"chosen": [{"role": "user", "content": ["Q"]}], "rejected": "b"},
            "wrong_type",
            "chosen[0] is an object",
        ),
        (
            {"chosen": [{"role": "human", "content": "Q"}, assistant("A")], "rejected": "b"},
            "unknown_role",
            "chosen[0] has role 'human'; expected system,",
        ),
        ({"prompt": "half \ud83d", "chosen": "good", "rejected": "bad"}, "not_utf8", "U+D83D"),
    ],
)
def test_unreadable_records_say_what_was_found(record, reason, said):
    with pytest.raises(BadRecord) as caught:
        read_conversations(record)
    assert caught.value.reason == reason
    assert said in str(caught.value)


def test_long_values_are_shown_short():
    with pytest.raises(BadRecord) as caught:
        read_conversations({"prompt": {"text": "x" * 5000}, "chosen": "good", "rejected": "bad"})
    assert len(str(caught.value)) < 200


def test_a_prompt_column_that_contradicts_the_conversation_is_dropped():
    record = {
        "prompt": "other",
        "chosen": [user("Q"), assistant("a")],
        "rejected": [user("Q"), assistant("b")],
    }
    with pytest.raises(Unusable, match="different_prompts"):
        read_conversations(record)


def test_report_counts_and_keeps_three_places_a_reason():
    report = DataReport(kept=2)
    for line in range(5):
        report.drop("empty", f"a.jsonl:{line}")
    report.drop("same", "a.jsonl:9")
    report.note("role_label_in_response", "a.jsonl:10")
    assert report.read == 8
    assert report.summary() == "read 8, dropped 5 empty, 1 same"
    as_dict = json.loads(json.dumps(report.as_dict()))
    assert as_dict["read"] == as_dict["kept"] + sum(as_dict["dropped"].values()) == 8
    assert as_dict["examples"]["empty"] == ["a.jsonl:0", "a.jsonl:1", "a.jsonl:2"]
    assert as_dict["noted"] == {"role_label_in_response": 1}


def test_report_as_dict_is_a_copy():
    report = DataReport()
    report.as_dict()["dropped"]["empty"] = 1
    assert report.read == 0


def test_pair_set_is_list_like():
    pairs = [PreferencePair((user(str(n)),), "good", "bad", f"a:{n}") for n in range(4)]
    pair_set = PairSet(iter(pairs), DataReport(kept=4))
    assert len(pair_set) == 4
    assert list(pair_set) == pairs
    assert pair_set[-1] is pairs[-1]
    assert pair_set[1:3] == pairs[1:3]
    assert pairs[2] in pair_set
