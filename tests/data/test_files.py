"""Each format of file, and what is wrong with one that can't be read."""

import gzip
import json

import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest

from qorpo.data.files import read_records
from qorpo.data.records import BadRecord
from qorpo.data.sources import load_pairs
from qorpo.errors import DataError

RECORDS = [{"prompt": f"Q{n}", "chosen": "gut – 好", "rejected": 'a "bad",\nanswer'} for n in range(3)]


def zstd_file(path, data):
    with pyarrow.CompressedOutputStream(str(path), "zstd") as file:
        file.write(data)
    return path


def csv_of(records, columns=("prompt", "chosen", "rejected")):
    quoted = [",".join('"' + str(r[c]).replace('"', '""') + '"' for c in columns) for r in records]
    return "\n".join([",".join(columns), *quoted]) + "\n"


def stream_file(path, records):
    table = pyarrow.Table.from_pylist(records)
    with pyarrow.OSFile(str(path), "wb") as file, pyarrow.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)
    return path


def test_every_format_holds_the_same_records(tmp_path):
    jsonl = "".join(json.dumps(each) + "\n" for each in RECORDS).encode()
    table = pyarrow.Table.from_pylist(RECORDS)
    (tmp_path / "a.csv").write_text(csv_of(RECORDS), encoding="utf-8")
    (tmp_path / "b.csv").write_bytes(b"\xef\xbb\xbf" + csv_of(RECORDS).replace("\n", "\r\n").encode())
    (tmp_path / "c.csv.gz").write_bytes(gzip.compress(csv_of(RECORDS).encode()))
    (tmp_path / "lines.json").write_bytes(jsonl)
    zstd_file(tmp_path / "a.jsonl.zst", jsonl)
    zstd_file(tmp_path / "a.json.zst", json.dumps(RECORDS).encode())
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", row_group_size=2)
    stream_file(tmp_path / "a.arrow", RECORDS)
    pyarrow.feather.write_feather(table, str(tmp_path / "b.arrow"), compression="uncompressed")
    names = [path.name for path in tmp_path.iterdir()]
    assert len(names) == 9
    for name in names:
        found = [each for _, each in read_records(tmp_path / name)]
        if name == "b.csv":  # a line break in a cell stays what it was
            found = [{key: text.replace("\r\n", "\n") for key, text in each.items()} for each in found]
        assert found == RECORDS, name


def test_places_in_tables(tmp_path):
    (tmp_path / "a.csv").write_text('prompt,chosen,rejected\nQ,"a\nb",c\nQ,d,e\n', encoding="utf-8")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert [pair.source for pair in load_pairs(tmp_path / "a.csv")] == ["a.csv:2", "a.csv:4"]
    assert [pair.source for pair in load_pairs(tmp_path / "a.parquet")] == [
        f"a.parquet[{n}]" for n in range(3)
    ]


def test_messages_in_cells_of_a_table(tmp_path):
    talk = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "good, or [1]"}]
    other = [talk[0], {"role": "assistant", "content": "bad"}]
    record = {"chosen": json.dumps(talk), "rejected": json.dumps(other)}
    (tmp_path / "a.csv").write_text(csv_of([record], ("chosen", "rejected")), encoding="utf-8")
    assert [(p.chosen, p.rejected) for p in load_pairs(tmp_path / "a.csv")] == [("good, or [1]", "bad")]
    # Text that only looks like JSON is text.
    record = {"prompt": "List two numbers.", "chosen": "[1, 2]", "rejected": "[1, 2"}
    (tmp_path / "b.csv").write_text(csv_of([record]), encoding="utf-8")
    assert [(p.chosen, p.rejected) for p in load_pairs(tmp_path / "b.csv")] == [("[1, 2]", "[1, 2")]


def test_preferences_and_nulls_of_tables(tmp_path):
    records = [
        {"instruction": f"Q{n}", "output_1": "a", "output_2": "b", "preference": preference}
        for n, preference in enumerate([1.0, 2.0, None, 1.5, 1.9])
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "a.parquet")
    (tmp_path / "a.csv").write_text(
        csv_of([{**r, "preference": r["preference"] or ""} for r in records], tuple(records[0])),
        encoding="utf-8",
    )
    for name in ("a.parquet", "a.csv"):
        report = load_pairs(tmp_path / name).report
        assert (report.kept, report.dropped) == (3, {"no_verdict": 1, "tie": 1})


@pytest.mark.parametrize(
    ("name", "data", "where", "said"),
    [
        ("a.csv", b"prompt,chosen,rejected\nQ,a,b\nQ,caf\xe9,b\n", "a.csv:3", "byte 0xe9 is not UTF-8"),
        ("a.csv", b"prompt,chosen,rejected\nQ,a,b,c\n", "a.csv:2", "1 cells more than columns"),
        ("a.csv", b"prompt,chosen,rejected\nQ,a\n", "a.csv:2", "no column 'rejected'"),
        ("a.jsonl", '{"prompt": 1}'.encode("utf-16"), "a.jsonl:1", "the file is UTF-16"),
        ("a.jsonl", b'{"prompt": "\x00"}\n', "a.jsonl:1", "not JSON (Invalid control character at, column 13)"),
    ],
)  # fmt: skip
def test_bad_lines_are_named(tmp_path, name, data, where, said):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(DataError) as caught:
        load_pairs(tmp_path / name)
    assert str(caught.value).count(where) == 1
    assert said in str(caught.value)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.zst", "a.json.gz"])
@pytest.mark.parametrize("data", [b"", b"no such thing", b"ARROW1 and no more"])
def test_broken_files_are_named(tmp_path, name, data):
    (tmp_path / name).write_bytes(data)
    # To zstd an empty stream is an empty file.
    said = "0 usable pairs in" if name.endswith(".zst") and not data else rf"{name}: .*"
    with pytest.raises(DataError, match=said):
        load_pairs(tmp_path / name, on_bad_record="skip")


def test_a_truncated_file_is_named(tmp_path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    zstd_file(tmp_path / "a.jsonl.zst", json.dumps(RECORDS[0]).encode() * 5000)
    stream_file(tmp_path / "a.arrow", RECORDS)
    for path in list(tmp_path.iterdir()):
        path.write_bytes(path.read_bytes()[:-30])
        with pytest.raises(DataError, match=rf"{path.name}: can't be read .*; fetch or write the file again"):
            load_pairs(path, on_bad_record="skip")


def test_escaped_nul_and_lost_characters_are_noted(tmp_path):
    (tmp_path / "a.jsonl").write_text(
        '{"prompt": "Q", "chosen": "a\\u0000", "rejected": "b"}\n{"prompt": "Q\\ufffd", "chosen": "a", "rejected": "b"}'
    )
    report = load_pairs(tmp_path / "a.jsonl").report
    assert report.noted == {"nul_character": 1, "replacement_character": 1}


def test_a_bad_record_is_data_and_no_exception(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"prompt,chosen,rejected\nQ,a,b,c\nQ,a,b\n")
    first, second = (found for _, found in read_records(tmp_path / "a.csv"))
    assert isinstance(first, BadRecord)
    assert second == {"prompt": "Q", "chosen": "a", "rejected": "b"}
