"""Each shape of record, and the records that no shape reads."""

import pytest

from qorpo.data.filters import judge
from qorpo.data.records import BadRecord, Unusable
from qorpo.data.shapes import Layout, majority, read_comparisons


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def system(text):
    return {"role": "system", "content": text}


def pairs_of(record, min_margin=0.0, **layout):
    pairs = [judge(found, "here", min_margin) for found in read_comparisons(record, Layout(**layout))]
    return [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs]


def pair_of(record, **options):
    (pair,) = pairs_of(record, **options)
    return pair


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
            "no column 'rejected'; found 'prompt', 'chosen', 'reject'; expected prompt, chosen and rejected "
            "(or these two as whole conversations)",
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
            "not_text",
            "chosen[0] has a part text ('Q')",
        ),
        (
            {"chosen": [{"role": "narrator", "content": "Q"}, assistant("A")], "rejected": "b"},
            "unknown_role",
            "chosen[0] has role text ('narrator'); expected system,",
        ),
        ({"prompt": "half \ud83d", "chosen": "good", "rejected": "bad"}, "not_utf8", "U+D83D"),
    ],
)
def test_unreadable_records_say_what_was_found(record, reason, said):
    with pytest.raises(BadRecord) as caught:
        read_comparisons(record)
    assert caught.value.reason == reason
    assert said in str(caught.value)


def test_long_values_are_shown_short():
    with pytest.raises(BadRecord) as caught:
        read_comparisons({"prompt": {"text": "x" * 5000}, "chosen": "good", "rejected": "bad"})
    assert len(str(caught.value)) < 200


def test_a_prompt_column_that_contradicts_the_conversation_is_dropped():
    record = {
        "prompt": "other",
        "chosen": [user("Q"), assistant("a")],
        "rejected": [user("Q"), assistant("b")],
    }
    with pytest.raises(Unusable, match="different_prompts"):
        read_comparisons(record)


ALPACA_EVAL = {"instruction": "Q", "output_1": "good", "output_2": "bad", "annotator": "gpt4"}
SHAREGPT = {
    "conversations": [
        {"from": "system", "value": "S"},
        {"from": "human", "value": "Q"},
        {"from": "gpt", "value": "A"},
        {"from": "human", "value": "R"},
    ],
    "chosen": {"from": "gpt", "value": "good"},
    "rejected": {"from": "gpt", "value": "bad"},
}
ULTRAFEEDBACK = {
    "instruction": "Q",
    "completions": [
        {"model": "a", "response": "fair", "overall_score": 6.0},
        {"model": "b", "response": "bad", "overall_score": 2.5},
        {"model": "c", "response": "unscored", "overall_score": None},
        {"model": "d", "response": "good", "overall_score": 9.0},
    ],
}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        (SHAREGPT, MULTI_TURN),
        # Orca's.
        ({"system": "S", "question": "Q", "chosen": "good", "rejected": "bad"}, ((system("S"), user("Q")), "good", "bad")),
        ({"system": "", "question": "Q", "chosen": "good", "rejected": "bad"}, EXPECTED),
        ({"system": "S", "input": "Q", "chosen": "good", "rejected": "bad"}, ((system("S"), user("Q")), "good", "bad")),
        # A system turn that is there already is not put there again.
        ({"system": "S", **SHAREGPT}, MULTI_TURN),
        # LLaMA-Factory's alpaca format: input belongs to the instruction, history comes before it.
        (
            {"instruction": "Q", "input": "x", "chosen": "good", "rejected": "bad"},
            ((user("Q\nx"),), "good", "bad"),
        ),
        (
            {"instruction": "R", "input": "", "history": [["Q", "A"]], "system": "S", "chosen": "good", "rejected": "bad"},
            MULTI_TURN,
        ),
        ({**ALPACA_EVAL, "preference": 1}, EXPECTED),
        ({**ALPACA_EVAL, "preference": 1.2}, EXPECTED),
        ({**ALPACA_EVAL, "preference": "1"}, EXPECTED),
        ({**ALPACA_EVAL, "preference": 2}, (EXPECTED[0], "bad", "good")),
        ({**ALPACA_EVAL, "preference": 1.51}, (EXPECTED[0], "bad", "good")),
        # PandaLM: an input, and three annotators of whom most decide.
        (
            {"instruction": "Q", "input": "x", "response1": "bad", "response2": "good",
             "annotator1": 2, "annotator2": 1, "annotator3": 2},
            ((user("Q\nx"),), "good", "bad"),
        ),
        ({"instruction": "Q", "output": ["good", "bad"]}, EXPECTED),
        ({"prompt": "Q", "responses": ["good", "fair", "bad"]}, EXPECTED),
        ({"prompt": "R", "history": [user("Q"), assistant("A")], "system": "S", "responses": ["good", "bad"]}, MULTI_TURN),
        (ULTRAFEEDBACK, EXPECTED),
        ({"prompt": "Q", "responses": ["bad", "good"], "scores": [0.1, 0.9]}, EXPECTED),
        # Nectar: ranks, from 1 for the best; a transcript as the prompt.
        (
            {"prompt": "\n\nHuman: Q\n\nAssistant: ", "answers": [
                {"answer": "bad", "rank": 3.0}, {"answer": "good", "rank": 1.0}, {"answer": "fair", "rank": 2.0}]},
            EXPECTED,
        ),
        # Both judged and chosen: what is said outright wins.
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "responses": ["bad", "good"]}, EXPECTED),
        # Text in parts is text.
        (
            {"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}], "chosen": "good", "rejected": "bad"},
            EXPECTED,
        ),
        ({"prompt": "Q", "chosen": "good", "rejected": "bad", "system": float("nan")}, EXPECTED),
    ],
)  # fmt: skip
def test_each_known_dataset_s_records_give_the_pair(record, expected):
    assert pair_of(record) == expected


def test_a_named_shape_is_taken_even_where_another_would_be_recognised():
    record = {"prompt": "Q", "chosen": "good", "rejected": "bad", "responses": ["bad", "good"]}
    assert pair_of(record, shape="ranked") == (EXPECTED[0], "bad", "good")
    with pytest.raises(BadRecord, match="no column 'output_1', 'output_2', 'preference'; found"):
        pair_of(record, shape="two-outputs")


def test_columns_are_renamed():
    record = {"q": "Q", "yes": "good", "no": "bad", "prompt": "not this"}
    assert pair_of(record, columns={"prompt": "q", "chosen": "yes", "rejected": "no"}) == EXPECTED
    with pytest.raises(BadRecord, match="no column 'rejected'"):
        pair_of(record, columns={"chosen": "yes", "rejected": "absent"})


def test_roles_and_keys_are_renamed():
    record = {
        "prompt": [{"who": "me", "said": "Q"}],
        "chosen": {"who": "it", "said": "good"},
        "rejected": "bad",
    }
    names = {"role_key": "who", "text_key": "said", "roles": {"me": "user", "it": "assistant"}}
    assert pair_of(record, **names) == EXPECTED


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("best-worst", ["ad"]),
        ("adjacent", ["ab", "bc", "cd"]),
        ("all", ["ab", "ac", "ad", "bc", "bd", "cd"]),
    ],
)
def test_ranked_answers_make_the_pairs_asked_for(rule, expected):
    ranked = {"prompt": "Q", "responses": list("abcd")}
    scored = {"prompt": "Q", "responses": list("dbca"), "scores": [1, 7, 3, 9]}
    for record in (ranked, scored):
        assert ["".join(pair[1:]) for pair in pairs_of(record, ranked_pairs=rule)] == expected


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({**ALPACA_EVAL, "preference": 0}, "tie"),
        ({**ALPACA_EVAL, "preference": 1.5}, "tie"),
        ({**ALPACA_EVAL, "preference": None}, "no_verdict"),
        ({**ALPACA_EVAL, "preference": float("nan")}, "no_verdict"),
        ({**ALPACA_EVAL, "preference": ""}, "no_verdict"),
        ({"instruction": "Q", "response1": "a", "response2": "b", "annotator1": 1, "annotator2": 2, "annotator3": 0}, "tie"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [3, 3]}, "tie"),
        ({"prompt": "Q", "responses": ["a"]}, "one_answer"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [3, "N/A"]}, "one_answer"),
    ],
)  # fmt: skip
def test_records_without_a_preference_are_unusable(record, reason):
    with pytest.raises(Unusable, match=f"^{reason}$"):
        pairs_of(record)


@pytest.mark.parametrize(
    ("record", "margin"),
    [
        ({**ALPACA_EVAL, "preference": 1.3}, 0.4),
        ({**ALPACA_EVAL, "preference": 1.7}, 0.4),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [3, 3.4]}, 0.4),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "score_chosen": 3.4, "score_rejected": 3}, 0.4),
    ],
)
def test_small_margins_can_be_left_out(record, margin):
    assert pair_of(record, min_margin=margin - 0.01)
    with pytest.raises(Unusable, match="small_margin"):
        pair_of(record, min_margin=margin + 0.01)


def test_a_record_s_own_choice_stands_whatever_its_scores():
    record = {"prompt": "Q", "chosen": "good", "rejected": "bad", "score_chosen": 3, "score_rejected": 5}
    assert pair_of(record) == EXPECTED
    assert pair_of({**record, "score_rejected": 3}) == EXPECTED


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        ([1.0, -1.0, 1.0], 1 / 3),
        ([1.0, -1.0], 0.0),
        ([0.0, 0.0, 1.0], 0.0),
        ([1.0, -1.0, 0.0], 0.0),
        ([-0.4], -0.4),
    ],
)
def test_most_annotators_decide(verdicts, expected):
    assert majority(verdicts) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("record", "reason", "said"),
    [
        ({"prompt": "Q", "completion": "a", "label": True}, "unpaired", "as for KTO"),
        ({"messages": [user("Q"), assistant("a")], "label": False}, "unpaired", "as for KTO"),
        ({"instruction": "Q", "input": "", "output": "a"}, "no_rejected", "supervised fine-tuning"),
        ({"messages": [user("Q"), assistant("a")]}, "no_rejected", "supervised fine-tuning"),
        ({"prompt": "Q", "chosen": "a", "rejected": "b", "images": ["x.png"]}, "not_text", "has images"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "url": "x"}]}], "chosen": "a", "rejected": "b"},
            "not_text",
            "prompt[0] has a part of type 'image'",
        ),
        ({**ALPACA_EVAL, "preference": 3}, "wrong_value", "the preference is a number (3)"),
        ({**ALPACA_EVAL, "preference": "model_a"}, "wrong_value", "the preference is text ('model_a')"),
        ({**ALPACA_EVAL, "preference": True}, "wrong_value", "a boolean"),
        ({"prompt": "Q", "responses": ["a", "b"], "scores": [1]}, "wrong_length", "2 responses but 1 scores"),
        ({"prompt": "Q", "responses": ["a", 3]}, "wrong_type", "'responses[1]' is a number (3)"),
        ({"prompt": "Q", "system": 3, "chosen": "a", "rejected": "b"}, "wrong_type", "'system' is a number"),
        ({"prompt": "Q", "input": 3, "chosen": "a", "rejected": "b"}, "wrong_type", "'input' is a number"),
        ({"prompt": "Q", "history": "x", "chosen": "a", "rejected": "b"}, "wrong_type", "'history' is text"),
    ],
)  # fmt: skip
def test_what_is_no_pair_of_texts_is_refused_with_what_to_do(record, reason, said):
    with pytest.raises(BadRecord) as caught:
        read_comparisons(record)
    assert caught.value.reason == reason
    assert said in str(caught.value)
