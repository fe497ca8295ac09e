"""Files of records: what is read from where, what is counted, and what the errors say."""

import gzip
import hashlib
import json
from pathlib import Path

import pytest

from qorpo.data import sources
from qorpo.data.records import BadRecord
from qorpo.data.sources import load_pairs, read_records
from qorpo.errors import DataError

SHARED = Path(__file__).parents[2].parent / "shared" / "data"
needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared preference data is not beside the checkout"
)


def record(n=0, **columns):
    return {"prompt": f"Q{n}", "chosen": "good", "rejected": "bad", **columns}


def lines(*records):
    return "".join(json.dumps(each) + "\n" for each in records)


def write(path, data):
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


def test_all_four_kinds_of_file_hold_the_same_records(tmp_path):
    records = [record(n, chosen="gut – 好") for n in range(3)]
    jsonl, listed = lines(*records).encode(), json.dumps(records, ensure_ascii=False).encode()
    contents = {
        "a.jsonl": jsonl,
        "a.jsonl.gz": gzip.compress(jsonl),
        "a.json": listed,
        "a.json.gz": gzip.compress(listed),
        "b.json": json.dumps({"version": 1, "data": records}).encode(),
        "c.json": b"\xef\xbb\xbf" + listed,
        "c.jsonl": b"\xef\xbb\xbf" + jsonl.replace(b"\n", b"\r\n"),
        "d.jsonl": jsonl.rstrip(b"\n"),
    }
    for name, data in contents.items():
        assert [each for _, each in read_records(write(tmp_path / name, data))] == records, name


def test_places_count_lines_from_one_and_items_from_zero(tmp_path):
    write(tmp_path / "a.jsonl", "\n" + lines(record(0)) + "  \n" + lines(record(1)))
    write(tmp_path / "a.json", json.dumps([record(0), record(1)]))
    assert [p.source for p in load_pairs(tmp_path / "a.jsonl")] == ["a.jsonl:2", "a.jsonl:4"]
    assert [p.source for p in load_pairs(tmp_path / "a.json")] == ["a.json[0]", "a.json[1]"]


def test_lines_are_streamed(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(record(0)) + "{broken")
    stream = read_records(path)
    assert next(stream) == ("a.jsonl:1", record(0))
    where, problem = next(stream)
    assert where == "a.jsonl:2"
    assert isinstance(problem, BadRecord)


def test_report_counts_every_record(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        lines(
            record(0), record(1, rejected=" "), record(2, rejected="good"), record(3), record(4, chosen="")
        ),
    )
    pairs = load_pairs(path)
    report = pairs.report
    assert [p.source for p in pairs] == ["a.jsonl:1", "a.jsonl:4"]
    assert report.dropped == {"empty": 2, "same": 1}
    assert report.examples["empty"] == ["a.jsonl:2", "a.jsonl:5"]
    assert report.read == 5
    assert report.kept == len(pairs) == 2
    assert report.sources == [{"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}]


def test_several_sources_are_one_set(tmp_path):
    first = write(tmp_path / "a.jsonl", lines(record(0), record(1, chosen="")))
    second = write(tmp_path / "b.json", json.dumps([record(2)]))
    pairs = load_pairs([str(first), second])
    assert [p.source for p in pairs] == ["a.jsonl:1", "b.json[0]"]
    assert [source["path"] for source in pairs.report.sources] == [str(first), str(second)]
    assert pairs.report.read == 3


def test_one_bad_record_is_named_with_its_remedy(tmp_path):
    path = write(
        tmp_path / "pairs.jsonl",
        lines(*[record(n) for n in range(40)], {"prompt": "Q", "chosen": "a", "reject": "b"}),
    )
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    assert str(caught.value) == (
        "pairs.jsonl:41: no column 'rejected'; found 'prompt', 'chosen', 'reject'; expected prompt/chosen/rejected, "
        "or chosen/rejected message lists, or HH-RLHF transcripts; rename the column, "
        "or set data.on_bad_record: skip"
    )


BAD = (
    lines(record(0))
    + "{'prompt': 1}\n"
    + lines([1], record(1, chosen=5), {"prompt": "Q"}, record(2, prompt="\ud83d"), 3, 4)
).encode() + b'{"prompt": "caf\xe9"}\n'


def test_all_bad_records_come_at_once(tmp_path):
    path = write(tmp_path / "a.jsonl", BAD)
    with pytest.raises(DataError) as caught:
        load_pairs(path)
    head, *shown = str(caught.value).splitlines()
    assert head.startswith(f"8 of 9 records of {path} can't be read (3 not_object, 2 not_utf8, ")
    assert head.endswith("set data.on_bad_record: skip:")
    assert [line.split(": ")[0].strip() for line in shown[:-1]] == [f"a.jsonl:{n}" for n in range(2, 7)]
    assert "not JSON (Expecting property name enclosed in double quotes, column 2)" in shown[0]
    assert shown[-1].strip() == "and 3 more"


def test_bad_records_are_counted_when_skipped(tmp_path):
    pairs = load_pairs(write(tmp_path / "a.jsonl", BAD), on_bad_record="skip")
    assert len(pairs) == 1
    assert pairs.report.dropped == {
        "not_json": 1, "not_object": 3, "wrong_type": 1, "missing_column": 1, "not_utf8": 2,
    }  # fmt: skip
    assert pairs.report.read == 9
    assert pairs.report.examples["not_utf8"] == ["a.jsonl:6", "a.jsonl:9"]


def test_a_bad_byte_names_its_line(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(record(0)).encode() + b'{"prompt": "caf\xe9"}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:2: byte 0xe9 is not UTF-8"):
        load_pairs(path)
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf[\n\n" + b'{"prompt": "caf\xe9"}]')
    with pytest.raises(DataError, match=r"a\.json:3: byte 0xe9 is not UTF-8"):
        load_pairs(path)


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_json_nested_too_deep_is_no_crash(tmp_path, name):
    with pytest.raises(DataError, match="not JSON"):
        load_pairs(write(tmp_path / name, "[" * 100_000))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("{", "not JSON"),
        (lines(record(0), record(1)), r"name it \.jsonl"),
        ('{"a": [], "b": []}', r"an object with 2 lists \('a', 'b'\); expected one list of records"),
        ('{"a": 1}', r"an object with 0 lists \(none\)"),
        ("3", "holds int; expected a list of records"),
    ],
)
def test_json_documents_that_hold_no_list(tmp_path, data, said):
    with pytest.raises(DataError, match=rf"a\.json: .*{said}"):
        load_pairs(write(tmp_path / "a.json", data), on_bad_record="skip")


def test_files_that_cannot_be_read(tmp_path):
    write(tmp_path / "a.txt", lines(record()))
    write(tmp_path / "a.gz", b"")
    write(tmp_path / "b.jsonl.gz", gzip.compress(lines(*[record(n) for n in range(500)]).encode())[:-20])
    write(tmp_path / "c.jsonl.gz", lines(record()))
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file; expected a file ending in \.jsonl"):
        load_pairs(tmp_path / "nowhere.jsonl")
    with pytest.raises(
        DataError, match=r"is a folder; expected a file .* it holds b\.jsonl\.gz, c\.jsonl\.gz"
    ):
        load_pairs(tmp_path)
    for name in ("a.txt", "a.gz"):
        with pytest.raises(
            DataError, match=rf"{name}: unknown extension .* expected a file ending in \.jsonl"
        ):
            load_pairs(tmp_path / name)
    for name in ("b.jsonl.gz", "c.jsonl.gz"):
        with pytest.raises(DataError, match=rf"{name}: the gzip stream is broken"):
            load_pairs(tmp_path / name, on_bad_record="skip")


def test_all_missing_files_come_at_once(tmp_path):
    good = write(tmp_path / "a.jsonl", lines(record()))
    with pytest.raises(DataError, match=r"(?s)x\.jsonl: no such file.*y\.jsonl: no such file"):
        load_pairs([tmp_path / "x.jsonl", good, tmp_path / "y.jsonl"])
    with pytest.raises(DataError, match="no source"):
        load_pairs([])


def test_no_usable_pair_says_what_became_of_the_records(tmp_path):
    path = write(
        tmp_path / "a.jsonl",
        lines(*[record(n, chosen="") for n in range(7)], *[record(n, rejected="good") for n in range(5)]),
    )
    with pytest.raises(
        DataError, match=r"0 usable pairs in .*a\.jsonl: read 12, dropped 7 empty, 5 same; .*a\.jsonl:8"
    ):
        load_pairs(path)
    with pytest.raises(DataError, match=r"0 usable pairs in .*read 0; the file holds no records"):
        load_pairs(write(tmp_path / "b.jsonl", "\n"))


def test_on_bad_record_is_one_of_two(tmp_path):
    with pytest.raises(DataError, match=r"data\.on_bad_record: 'ignore'"):
        load_pairs(write(tmp_path / "a.jsonl", lines(record())), on_bad_record="ignore")


def test_demo_names_the_package_s_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "DEMO_FOLDER", tmp_path)
    write(tmp_path / "train.jsonl", lines(record(0)))
    write(tmp_path / "eval.jsonl", lines(record(1)))
    assert load_pairs("demo")[0].prompt[0]["content"] == "Q0"
    assert load_pairs("demo:eval")[0].prompt[0]["content"] == "Q1"
    assert len(load_pairs(["demo", "demo:eval"])) == 2


def test_demo_folder_is_the_package_s():
    assert (sources.DEMO_FOLDER / "__init__.py").is_file()


@needs_shared
def test_hh_transcripts_and_their_odd_rows():
    pairs = load_pairs(SHARED / "hh_format" / "sample.jsonl.gz")
    report = pairs.report
    assert report.read == 326
    assert report.kept == len(pairs) == 321
    assert report.dropped == {"empty": 2, "same": 1, "different_prompts": 1, "consecutive_assistant_turns": 1}
    assert report.noted == {"role_label_in_response": 1}
    # Rows from 0: 3 and 7 empty, 11 identical, 15 diverging, 19 two assistant turns, 23 a label inside.
    assert report.examples == {
        "empty": ["sample.jsonl.gz:4", "sample.jsonl.gz:8"],
        "same": ["sample.jsonl.gz:12"],
        "different_prompts": ["sample.jsonl.gz:16"],
        "consecutive_assistant_turns": ["sample.jsonl.gz:20"],
        "role_label_in_response": ["sample.jsonl.gz:24"],
    }
    labelled = next(pair for pair in pairs if pair.source == "sample.jsonl.gz:24")
    assert labelled.chosen == "Human: hi. Assistant: hello."
    assert all(pair.prompt[-1]["role"] == "user" for pair in pairs)


@needs_shared
def test_a_json_list_of_another_shape_says_its_columns():
    with pytest.raises(DataError) as caught:
        load_pairs(SHARED / "alpaca_eval" / "annotations.alpaca-7b.json")
    assert "805 of 805 records" in str(caught.value)
    assert "annotations.alpaca-7b.json[0]: no column 'chosen', 'rejected'; found 'instruction'" in str(
        caught.value
    )


@needs_shared
def test_prompt_chosen_rejected_strings():
    train = load_pairs(SHARED / "alpaca_eval" / "pairs.train.jsonl")
    assert len(train) == train.report.read == 2155
