"""Whatever JSON comes, records are kept or dropped and counted, and never raise but a DataError."""

import contextlib
import json

from helpers.tiny import make_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st

from qorpo.data.chat_format import ChatFormat
from qorpo.data.filters import digest, hold_out
from qorpo.data.shapes import ALIASES
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_batch
from qorpo.errors import DataError

# Any text, lone surrogates too; and values that look like what readers look for.
TEXTS = st.text(st.characters(), max_size=12) | st.sampled_from(
    ["", " ", "\n\nHuman: a\n\nAssistant: b", "user"]
)
SCALARS = st.none() | st.booleans() | st.integers(-3, 3) | st.floats() | TEXTS
MESSAGES = st.fixed_dictionaries(
    {}, optional=dict.fromkeys(("role", "content", "from", "value", "text", "score", "rank"), SCALARS)
)
VALUES = st.recursive(
    SCALARS | MESSAGES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)
NAMES = sorted(
    {name for names in ALIASES.values() for name in names} | {"label", "tools", "images", "annotator1"}
)
RECORDS = st.dictionaries(st.sampled_from(NAMES) | TEXTS, VALUES, max_size=6) | VALUES
TALKS = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": TEXTS}),
    max_size=4,
)
NEARLY_RIGHT = st.fixed_dictionaries(
    {"prompt": TEXTS | TALKS, "chosen": TEXTS | TALKS, "rejected": TEXTS | TALKS}, optional={"system": TEXTS}
)
VOTES = st.fixed_dictionaries(
    {"instruction": st.sampled_from("QR"), "output_1": st.sampled_from("ab"), "output_2": st.sampled_from("abc"),
     "preference": st.sampled_from([0, 1, 2, 1.5, 1.2, None, "1", 7])}
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(st.lists(RECORDS | NEARLY_RIGHT | VOTES, max_size=8))
def test_records_are_kept_or_dropped_and_counted(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    try:
        report = load_pairs(path, on_bad_record="skip").report
    except DataError:
        return  # no pair among them
    assert report.kept + sum(report.dropped.values()) == report.read == len(records)


@settings(max_examples=100, deadline=None)
@given(
    st.binary(max_size=200),
    st.sampled_from([".jsonl", ".json", ".csv", ".parquet", ".arrow", ".jsonl.gz", ".csv.zst"]),
)
def test_any_bytes_are_a_file_or_a_data_error(tmp_path_factory, data, suffix):
    path = tmp_path_factory.getbasetemp() / f"any{suffix}"
    path.write_bytes(data)
    with contextlib.suppress(DataError):
        load_pairs(path, on_bad_record="skip")


@settings(max_examples=100, deadline=None)
@given(st.lists(NEARLY_RIGHT, min_size=1, max_size=6))
def test_tokens_put_together_are_those_of_inference(tmp_path_factory, records):
    path = tmp_path_factory.getbasetemp() / "talks.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    try:
        pairs = load_pairs(path, on_bad_record="skip")
    except DataError:
        return
    tokenizer = make_tokenizer()
    chat = ChatFormat(tokenizer)
    for pair, tokens in zip(pairs, tokenize_batch(pairs, chat, Limits(4096, 2048)), strict=True):
        if isinstance(tokens, Exception):
            continue
        prompt = tokenizer.apply_chat_template(
            list(pair.prompt), tokenize=True, add_generation_prompt=True, return_dict=False
        )
        assert list(tokens.prompt_ids) == prompt
        for ids, text in ((tokens.responses[0], pair.chosen), (tokens.responses[1], pair.rejected)):
            assert ids[-1] == chat.stop_token_id
            assert (
                list(ids[:-1])
                == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            )


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.integers(0, 30), min_size=2, max_size=200).filter(lambda prompts: len(set(prompts)) > 1),
    st.floats(0, 1, exclude_min=True, exclude_max=True),
    st.integers(0, 2**32 - 1),
)
def test_a_prompt_is_on_one_side_whatever_the_fraction_and_seed(prompts, fraction, seed):
    held = hold_out([digest(prompt) for prompt in prompts], fraction, seed)
    sides = {
        is_held: {p for p, mine in zip(prompts, held, strict=True) if mine == is_held}
        for is_held in (True, False)
    }
    assert sides[True]
    assert sides[False]
    assert not sides[True] & sides[False]
