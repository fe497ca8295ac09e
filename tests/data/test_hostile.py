"""Files made to fill memory or time, damaged files and odd ones: one message or a counted record, never a crash."""

import gzip
import json
import random
import resource
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from helpers.tiny import CHAT_TEMPLATE, make_tokenizer

from qorpo.data import bounds, files
from qorpo.data.bounds import stays_within_bounds
from qorpo.data.chat_format import ChatFormat
from qorpo.data.files import read_records
from qorpo.data.prepare import prepare_pairs
from qorpo.data.records import BadRecord
from qorpo.data.shapes import Layout
from qorpo.data.sources import load_pairs
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError

RECORD = {"prompt": "Q", "chosen": "good", "rejected": "bad"}
LINE = json.dumps(RECORD) + "\n"
TABLE = "prompt,chosen,rejected\n"


@pytest.fixture
def small_bounds(monkeypatch):
    monkeypatch.setattr(files, "MOST_BYTES_OF_A_RECORD", 1000)
    monkeypatch.setattr(files, "MOST_BYTES_OF_A_DOCUMENT", 5000)
    monkeypatch.setattr(files, "MOST_BYTES_UNPACKED", 100_000)


# --- more than a reader should hold ---


@pytest.mark.parametrize(
    ("name", "text", "bad", "kept"),
    [
        ("a.jsonl", LINE + '{"prompt": "' + "x" * 5000 + '"}\n' + LINE, "a.jsonl:2", 2),
        ("a.jsonl", LINE + "x" * 5000, "a.jsonl:2", 1),
        ("a.csv", TABLE + "Q,a,b\nQ," + "x" * 5000 + ",b\nQ,c,d\n", "a.csv:3", 2),
        ("a.csv", TABLE + 'Q,a,b\nQ,"' + "x\n" * 3000 + '",b\nQ,c,d\n', "a.csv:", 1),
        # A row of short cells over many lines, the first of which opens a quote that none closes.
        ("a.csv", TABLE + 'Q,a,b\nQ,"' + '\n","' * 1000, "a.csv:", 1),
    ],
)
def test_a_record_that_is_too_long_is_a_bad_one(tmp_path, small_bounds, name, text, bad, kept):
    (tmp_path / name).write_text(text)
    found = list(read_records(tmp_path / name))
    problems = [(where, each) for where, each in found if isinstance(each, BadRecord)]
    assert problems[0][0].startswith(bad)
    assert problems[0][1].reason in ("record_too_long", "not_csv")
    assert len(load_pairs(tmp_path / name, on_bad_record="skip")) >= kept


def test_a_line_of_any_length_takes_no_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:
        file.write(LINE.encode())
        file.seek(300 << 20, 1)  # a hole, read as zeros
        file.write(b"\n" + LINE.encode())
    tracemalloc.start()
    found = [isinstance(each, BadRecord) for _, each in read_records(path)]
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found == [False, True, False]
    assert peak < 4 * files.MOST_BYTES_OF_A_RECORD


def test_a_document_that_is_too_long_is_refused(tmp_path, small_bounds):
    (tmp_path / "a.json").write_text(json.dumps([RECORD] * 200))
    with pytest.raises(DataError, match=r"a\.json: over .* read whole; write one record a line, as \.jsonl"):
        load_pairs(tmp_path / "a.json")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv"])
@pytest.mark.parametrize("compression", ["gz", "zst"])
def test_what_unpacks_to_far_too_much_is_refused(tmp_path, monkeypatch, name, compression):
    monkeypatch.setattr(files, "MOST_BYTES_UNPACKED", 1 << 20)
    path, bomb = tmp_path / f"{name}.{compression}", b"\n" * (16 << 20)
    if compression == "gz":
        path.write_bytes(gzip.compress(bomb))
    else:
        with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
            file.write(bomb)
    with pytest.raises(DataError, match=r"unpacks to over .* times its size"):
        load_pairs(path, on_bad_record="skip")


def test_bad_records_without_end_are_counted_not_kept(tmp_path):
    (tmp_path / "a.jsonl").write_text("{\n" * 20_000)
    with pytest.raises(DataError, match="20,000 of 20,000 records") as caught:
        load_pairs(tmp_path / "a.jsonl")
    assert len(str(caught.value)) < 1500
    (tmp_path / "b.jsonl").write_text(json.dumps({f"column {n} " + "x" * 500: n for n in range(999)}) + "\n")
    with pytest.raises(DataError, match="no column") as caught:
        load_pairs(tmp_path / "b.jsonl")
    assert len(str(caught.value)) < 1500


def test_values_nested_deeply_are_bad_records(tmp_path):
    deep = "[" * 900 + "]" * 900
    (tmp_path / "a.jsonl").write_text(f'{{"prompt": "Q", "chosen": {deep}, "rejected": {deep}}}\n')
    with pytest.raises(DataError, match=r"a\.jsonl:1"):
        load_pairs(tmp_path / "a.jsonl")


# --- other encodings, other marks ---


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le"])
@pytest.mark.parametrize(("name", "text"), [("a.jsonl", LINE), ("a.json", f"[{LINE}]"), ("a.csv", TABLE)])
def test_wide_encodings_are_named(tmp_path, name, text, encoding):
    (tmp_path / name).write_text(text, encoding=encoding)
    with pytest.raises(DataError, match=rf"{name}:1: the file is UTF-16 or UTF-32; save it as UTF-8"):
        load_pairs(tmp_path / name, on_bad_record="skip")


@pytest.mark.parametrize("mark", [";", "\t"])
def test_tables_of_semicolons_and_tabs_are_tables(tmp_path, mark):
    text = (TABLE + 'Q,"a, or, b",c\n').replace(",", mark).replace(f"a{mark} or{mark} b", "a, or, b")
    (tmp_path / "a.csv").write_text(text)
    assert [(p.chosen, p.rejected) for p in load_pairs(tmp_path / "a.csv")] == [("a, or, b", "c")]


# --- damage ---


def damaged_files(folder):
    records = [{**RECORD, "prompt": f"Q{n}", "chosen": "gut – 好" * (n % 9 + 1)} for n in range(100)]
    table = pyarrow.Table.from_pylist(records)
    encoded = pyarrow.table({name: table[name].dictionary_encode() for name in table.column_names})
    for name, each, compression in (("a", table, None), ("b", encoded, "lz4"), ("c", table, "zstd")):
        options = pyarrow.ipc.IpcWriteOptions(compression=compression)
        with (
            pyarrow.OSFile(str(folder / f"{name}.arrow"), "wb") as file,
            pyarrow.ipc.new_stream(file, each.schema, options=options) as writer,
        ):
            writer.write_table(each, max_chunksize=40)
        pyarrow.parquet.write_table(each, folder / f"{name}.parquet", compression=compression or "none")
    pyarrow.feather.write_feather(table, str(folder / "d.arrow"), compression="uncompressed")
    return sorted(folder.iterdir())


def test_damaged_tables_are_read_or_refused(tmp_path):
    draw = random.Random(0)
    outcomes = {"read": 0, "refused": 0}
    for path in damaged_files(tmp_path):
        good = path.read_bytes()
        assert len(load_pairs(path)) == 100
        for trial in range(40):
            data = bytearray(good)
            if trial % 4 == 0:
                del data[draw.randrange(len(data)) :]
            for _ in range(trial % 4):
                near = draw.choice([0, max(0, len(data) - 500), draw.randrange(len(data))])
                place = min(near + draw.randrange(500), len(data) - 1)
                data[place] ^= 1 << draw.randrange(8)
            path.write_bytes(data)
            try:
                load_pairs(path, on_bad_record="skip")
                outcomes["read"] += 1
            except DataError:
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 20, outcomes


def test_offsets_that_point_outside_are_refused(tmp_path):
    import numpy as np

    offsets = pyarrow.py_buffer(np.array([0, 1 << 30, 3], np.int32).tobytes())
    column = pyarrow.StringArray.from_buffers(2, offsets, pyarrow.py_buffer(b"abc"))
    batch = pyarrow.RecordBatch.from_arrays([column] * 3, names=list(RECORD))
    with (
        pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    with pytest.raises(DataError, match=r"a\.arrow: can't be read"):
        load_pairs(tmp_path / "a.arrow")


def test_rows_that_are_claimed_and_not_there_are_refused(tmp_path):
    batch = pyarrow.RecordBatch.from_arrays(
        [pyarrow.Array.from_buffers(pyarrow.null(), 1 << 30, [None])], names=["prompt"]
    )
    with (
        pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pyarrow.ipc.new_stream(file, batch.schema) as writer,
    ):
        writer.write_batch(batch)
    with pytest.raises(DataError, match=r"a\.arrow: over [\d,]+ rows in as many bytes"):
        load_pairs(tmp_path / "a.arrow", on_bad_record="skip")


def test_a_damaged_saved_dataset_is_refused(tmp_path):
    import datasets

    datasets.Dataset.from_list([{**RECORD, "prompt": f"Q{n}"} for n in range(50)]).save_to_disk(
        tmp_path / "saved"
    )
    (path,) = (tmp_path / "saved").glob("*.arrow")
    good = path.read_bytes()
    place = good.index(b"Q0Q1") - 100  # among the offsets before the first column's texts
    path.write_bytes(good[:place] + b"\xff" * 60 + good[place + 60 :])
    with pytest.raises(DataError, match="saved: can't be read"):
        load_pairs(tmp_path / "saved")


# --- dataset_info.json ---


@pytest.mark.parametrize(
    "entry",
    [
        {"file_name": "dataset_info.json:a"},
        {"file_name": "./dataset_info.json:a"},
        {"hf_hub_url": "dataset_info.json:a"},
        {"file_name": 7},
        {"file_name": ["a.jsonl"]},
        {"file_name": "a.jsonl", "columns": "prompt"},
        {"file_name": "a.jsonl", "columns": {"prompt": ["a"]}},
        {"file_name": "a.jsonl", "tags": {"role_tag": {}}},
        {"file_name": "a\0.jsonl"},
        {"file_name": "a" * 5000 + ".jsonl"},
        {"file_name": "~nobody/a.jsonl"},
    ],
)
def test_a_dataset_info_that_is_wrong_is_named(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text(LINE)
    (tmp_path / "dataset_info.json").write_text(json.dumps({"a": {"ranking": True, **entry}}))
    for path in ("dataset_info.json:a", str(tmp_path / "dataset_info.json:a")):
        with pytest.raises(DataError):
            load_pairs(path)


# --- records in memory ---


def test_records_and_datasets_are_sources():
    import datasets

    records = [{**RECORD, "prompt": f"Q{n}"} for n in range(3)]
    found = load_pairs(records)
    assert [pair.source for pair in found] == ["records[0]", "records[1]", "records[2]"]
    assert found.report.sources[0]["path"] == "records"
    dataset = datasets.Dataset.from_list(records)
    for source in (dataset, [dataset], datasets.DatasetDict(train=dataset)):
        pairs = load_pairs(source)
        assert [pair.prompt for pair in pairs] == [pair.prompt for pair in found]
        assert pairs[0].source == "dataset[0]"
    assert len(load_pairs([dataset, dataset])) == 6


@pytest.mark.parametrize(
    "source", [7, None, b"a.jsonl", [7], [None], [RECORD, "a.jsonl"], {"prompt": "Q"}, {1}, []]
)
def test_what_is_no_source_is_refused(source):
    with pytest.raises(DataError, match="source"):
        load_pairs(source)


def test_a_dataset_that_can_be_read_only_once_is_refused():
    import datasets

    with pytest.raises(DataError, match="give a Dataset"):
        load_pairs(datasets.Dataset.from_list([RECORD]).to_iterable_dataset())


# --- templates ---


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ 1 / 0 }}", "ZeroDivisionError"),
        ("{% for i in range(10 ** 12) %}x{% endfor %}", "Range too big"),
        ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "RecursionError"),
        ("{% if 1 %}" * 3000 + "{% endif %}" * 3000, "RecursionError"),
        ("{{ 1 + 'a' }}", "TypeError"),
        ("{{ 'a' * 10 ** 11 }}", "over 1 seconds or 1 GiB"),
        ("{{ 'x' | center(10 ** 11) }}", "over 1 seconds or 1 GiB"),
        ("{{ (messages | length + 9) ** (10 ** 9) }}", "over 1 seconds or 1 GiB"),
        (
            "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
            "over 1 seconds or",
        ),
    ],
)
def test_templates_that_fail_end_in_one_message_soon(monkeypatch, template, said):
    monkeypatch.setattr(bounds, "SECONDS", 1)
    monkeypatch.setattr("qorpo.data.chat_format.SECONDS", 1)
    started = time.monotonic()
    with pytest.raises(DataError, match=said):
        ChatFormat(make_tokenizer(), template)
    assert time.monotonic() - started < 30


def test_a_template_that_fails_on_a_row_drops_it(tmp_path):
    chat = ChatFormat(
        make_tokenizer(), "{% if 'nought' in messages[0]['content'] %}{{ 1 / 0 }}{% endif %}" + CHAT_TEMPLATE
    )
    pairs = load_pairs([RECORD, {**RECORD, "prompt": "nought"}])
    assert tokenize_pairs(pairs, chat, Limits(64, 32)).report.dropped == {"template_refused": 1}


# What a template does with one record alone, which the conversations that it is tried with do not show.
TOO_MUCH = {
    "a loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a huge text": "{{ 'x' * 10 ** 11 }}",
    "a long text": "{{ messages[0]['content'] * 200000 }}",
}


@pytest.mark.parametrize("what", TOO_MUCH)
def test_a_template_that_takes_too_much_for_one_record_is_told_with_its_line(tmp_path, monkeypatch, what):
    template = "{% if 'nought' in messages[0]['content'] %}" + TOO_MUCH[what] + "{% endif %}" + CHAT_TEMPLATE
    chat, limits, before = ChatFormat(make_tokenizer(), template), Limits(64, 32), limits_of_this_process()
    monkeypatch.setattr(bounds, "SECONDS", 0.3)
    path = tmp_path / "a.jsonl"
    path.write_text(LINE + json.dumps({**RECORD, "prompt": "nought"}) + "\n")
    with pytest.raises(DataError, match=r"a\.jsonl:2: the chat template takes over .*on_bad_record: skip"):
        tokenize_pairs(load_pairs(path), chat, limits)
    kept = prepare_pairs(
        path, None, chat, limits, layout=Layout(), on_bad_record="skip", cache=tmp_path / "cache"
    )
    assert kept.train.report.dropped == {"template_out_of_bounds": 1}
    assert kept.train.report.examples["template_out_of_bounds"] == ["a.jsonl:2"]
    assert limits_of_this_process() == before


def limits_of_this_process():
    return (
        resource.getrlimit(resource.RLIMIT_AS),
        signal.getsignal(signal.SIGVTALRM),
        signal.getitimer(signal.ITIMER_VIRTUAL),
    )


def test_a_record_may_be_long_and_tokenized_in_a_thread(tmp_path):
    chat = ChatFormat(make_tokenizer())
    pairs = load_pairs([{**RECORD, "prompt": "why " * 50_000}])
    with ThreadPoolExecutor() as threads:
        found = threads.submit(tokenize_pairs, pairs, chat, Limits(1_000_000, 900_000)).result()
    assert found.report.kept == 1


def test_a_task_that_waits_for_ever_is_ended(monkeypatch):
    monkeypatch.setattr(bounds, "SECONDS_ON_THE_CLOCK", 0.2)
    assert not stays_within_bounds(lambda: time.sleep(60))
    assert stays_within_bounds(lambda: 1 / 0)
    assert stays_within_bounds(lambda: None)


def test_a_missing_template_is_said_with_the_one_that_is_taken(caplog):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    ChatFormat(tokenizer)
    assert "the tokenizer has no chat template" in caplog.text
    assert tokenizer.chat_template in caplog.text
    caplog.clear()
    ChatFormat(make_tokenizer())
    assert not caplog.text
