"""Rows of one answer to a prompt: which columns hold them, and dialogues in which every answer is learned."""

import json

import pytest
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer

from qorpo.data.chat_format import ChatFormat
from qorpo.data.conversations import Layout
from qorpo.data.counts import DataReport
from qorpo.data.demonstrations import read_demonstration
from qorpo.data.pack import pack_groups
from qorpo.data.prepare import prepare_pairs
from qorpo.data.records import BadRecord, Demonstration
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError

LIMITS = Limits(256, 128)
ROOT = {"role": "user", "content": "What?"}
DIALOGUE = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "The sky?"},
    {"role": "assistant", "content": "Blue."}, {"role": "user", "content": "And grass?"},
    {"role": "assistant", "content": "Green."}, {"role": "user", "content": "Snow?"},
    {"role": "assistant", "content": "White."},
]  # fmt: skip


@pytest.fixture(scope="module")
def chat():
    return ChatFormat(make_tokenizer())


def turns_of(record, **layout):
    turns = read_demonstration(record, Layout(**layout))
    return turns and [(turn["role"], turn["content"]) for turn in turns]


ANSWERED = [("user", "What?"), ("assistant", "This.")]


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "What?", "input": "", "output": "This."}, ANSWERED),
        ({"instruction": "What?", "input": "Now?", "output": "This."}, [("user", "What?\nNow?"), ANSWERED[1]]),
        ({"prompt": "What?", "completion": "This."}, ANSWERED),
        ({"prompt": [ROOT], "completion": [{"role": "assistant", "content": "This."}]}, ANSWERED),
        ({"question": "What?", "answer": "This."}, ANSWERED),
        ({"question": "What?", "response": "This.", "system": "Be brief."}, [("system", "Be brief."), *ANSWERED]),
        ({"instruction": "What?", "output": "This.", "history": [["Hi", "Hello"]]}, [("user", "Hi"), ("assistant", "Hello"), *ANSWERED]),
        ({"messages": [ROOT, {"role": "assistant", "content": "This."}]}, ANSWERED),
        ({"conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "This."}], "system": "Be brief."}, [("system", "Be brief."), *ANSWERED]),
        ({"messages": "\n\nHuman: What?\n\nAssistant: This."}, ANSWERED),
    ],
)  # fmt: skip
def test_rows_of_one_answer_are_read_under_the_names_that_datasets_use(record, expected):
    assert turns_of(record) == expected


def test_a_named_column_wins_and_what_can_be_compared_is_no_demonstration():
    assert turns_of({"query": "What?", "reply": "This."}, columns={"response": "reply"}) == ANSWERED
    assert turns_of({"prompt": "What?", "chosen": "This.", "rejected": "That."}) is None
    assert turns_of({"prompt": "What?", "output": ["This.", "That."]}) is None
    with pytest.raises(BadRecord, match="no prompt with a response, no messages, and nothing to compare"):
        turns_of({"text": "What?"})
    with pytest.raises(BadRecord, match=r"conversation\[0\] is a number"):
        turns_of({"messages": [1]})


@pytest.mark.parametrize(
    ("turns", "reason"),
    [
        ([ROOT], "no_response"),
        ([{"role": "assistant", "content": "This."}], "empty_prompt"),
        ([ROOT, {"role": "assistant", "content": " "}], "empty"),
        ([ROOT, *[{"role": "assistant", "content": "This."}] * 2], "consecutive_assistant_turns"),
    ],
)
def test_rows_that_show_nothing_are_dropped_and_counted(turns, reason):
    good = {"prompt": "What?", "completion": "This."}
    found = load_pairs([good, {"messages": turns}], train_turns="auto")
    assert [example.answers for example in found] == [("This.",)]
    assert found.report.dropped == {reason: 1}


def test_pairs_need_two_answers_and_say_what_learns_from_one():
    with pytest.raises(DataError, match=r"objective\.name: sft, which learns from one"):
        load_pairs([{"prompt": "What?", "completion": "This."}])


def test_of_pairs_the_chosen_answer_is_learned_on_the_rows_that_pairs_keep(chat):
    records = [
        {"prompt": "What?", "chosen": "This.", "rejected": "That."},
        {"prompt": "What?", "chosen": "This.", "rejected": "This."},
        {"prompt": DIALOGUE[:-1], "chosen": "White.", "rejected": "Black."},
    ]
    pairs = tokenize_pairs(load_pairs(records), chat, LIMITS)
    alone = tokenize_pairs(load_pairs(records, train_turns="auto"), chat, LIMITS, 1)
    assert alone.groups == [group.first(1) for group in pairs.groups]
    assert alone.report.dropped == pairs.report.dropped == {"same": 1}
    every = tokenize_pairs(load_pairs(records, train_turns="all"), chat, LIMITS, 1)
    assert [len(group.unscored) for group in every.groups] == [0, 2]


def test_every_answer_of_a_dialogue_is_learned_in_one_row_as_it_is_alone(chat):
    (whole,) = tokenize_pairs(
        load_pairs([{"messages": DIALOGUE}], train_turns="auto"), chat, LIMITS, 1
    ).groups
    decode = chat.tokenizer.decode
    assert decode((*whole.prompt_ids, *whole.responses[0])) == chat.tokenizer.apply_chat_template(
        DIALOGUE, tokenize=False
    )
    packed = pack_groups([whole])
    learned = packed.targets.tolist()
    assert packed.scored == ((0, len(learned)),)
    assert whole.learned_lengths == (len(whole.prompt_ids), len(learned))
    row = packed.input_ids[0].tolist()
    for end in (3, 5, 7):
        answer = DIALOGUE[end - 1]["content"]
        shown = Demonstration(tuple(DIALOGUE[: end - 1]), answer, "a")
        (alone,) = tokenize_pairs([shown], chat, LIMITS, 1).groups
        (ids,) = alone.responses
        assert ids[-1] == chat.stop_token_id
        assert tuple(learned[: len(ids)]) == ids  # and then its stop
        first = packed.predictors[len(packed.targets) - len(learned)].item()
        assert tuple(row[: first + 1]) == alone.prompt_ids
        assert tuple(row[first + 1 : first + 1 + len(ids)]) == ids
        learned = learned[len(ids) :]
    assert not learned


def test_of_a_dialogue_the_last_answer_alone_is_learned_where_that_is_asked_for(chat):
    found = load_pairs([{"messages": DIALOGUE}], train_turns="last")
    (group,) = tokenize_pairs(found, chat, LIMITS, 1).groups
    assert chat.tokenizer.decode(group.responses[0]) == "White.<|end|>"
    assert group.unscored == ()


def test_a_dialogue_is_cut_behind_an_answer_where_the_limit_falls_between_two(chat):
    found = load_pairs([{"messages": DIALOGUE}], train_turns="all")
    (whole,) = tokenize_pairs(found, chat, LIMITS, 1).groups
    (start, stop), second = whole.unscored
    size = len(whole.prompt_ids)
    for room in range(start + 1, stop + 2):
        (cut,) = tokenize_pairs(found, chat, Limits(size + room, size), 1).groups
        assert cut.cut == (False, True)
        kept = start if room <= stop else room
        assert cut.responses[0] == whole.responses[0][:kept]
        assert cut.unscored == (() if room <= stop else ((start, stop),))
    with pytest.raises(DataError, match="0 usable pairs"):
        tokenize_pairs(found, chat, Limits(size + start, size, long_responses="drop"), 1)
    assert second[1] < len(whole.responses[0])


@pytest.mark.parametrize(
    "template",
    [
        # Forgets what earlier answers end in, as templates that drop earlier thoughts do.
        CHAT_TEMPLATE.replace("{{ message['content'] }}", "{{ message['content'][:2] if message['role'] == 'assistant' and not loop.last else message['content'] }}"),
        # Its stop is EOS, which it does not write.
        CHAT_TEMPLATE.replace("<|start|>", "#").replace("<|end|>", "\n"),
    ],
)  # fmt: skip
def test_templates_that_write_earlier_answers_anew_can_show_the_last_alone(template):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    chat = ChatFormat(tokenizer)
    records = [{"messages": DIALOGUE}, {"messages": DIALOGUE[1:3]}]
    every = tokenize_pairs(load_pairs(records, train_turns="all"), chat, LIMITS, 1)
    assert every.report.dropped == {"earlier_turns_rewritten": 1}
    assert len(tokenize_pairs(load_pairs(records, train_turns="last"), chat, LIMITS, 1).groups) == 2


def test_a_special_token_spelled_in_any_answer_is_text(chat):
    dialogue = [
        ROOT,
        {"role": "assistant", "content": "Say <|end|>."},
        ROOT,
        {"role": "assistant", "content": "No."},
    ]
    (group,) = tokenize_pairs(load_pairs([{"messages": dialogue}], train_turns="all"), chat, LIMITS, 1).groups
    assert pack_groups([group]).targets.tolist().count(chat.stop_token_id) == 2


def test_demonstrations_on_disk_are_those_in_memory(chat, tmp_path):
    path = tmp_path / "rows.jsonl"
    records = [{"messages": DIALOGUE}, {"prompt": "What?", "completion": "This."}] * 20
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    options = {"layout": Layout(), "train_turns": "auto", "num_responses": 1, "cache": tmp_path / "cache"}
    data = prepare_pairs(str(path), None, chat, LIMITS, **options)
    expected = tokenize_pairs(load_pairs(path, train_turns="auto"), chat, LIMITS, 1)
    assert list(data.train.groups) == expected.groups
    assert data.train.report == expected.report
    assert isinstance(data.train.report, DataReport)
    last = prepare_pairs(str(path), None, chat, LIMITS, **(options | {"train_turns": "last"}))
    assert last.train.groups[0].unscored == ()  # another set of the cache
