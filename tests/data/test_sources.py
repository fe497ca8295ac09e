"""Files of records: what is read from where, what is counted, and what the errors say."""

import gzip
import hashlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from qorpo.data import locate
from qorpo.data.files import read_records
from qorpo.data.records import BadRecord
from qorpo.data.sources import load_pairs
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
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    assert report.sources == [{"path": str(path), "sha256": sha256, "kept": 2}]


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
        "pairs.jsonl:41: no column 'rejected'; found 'prompt', 'chosen', 'reject'; expected prompt, chosen and "
        "rejected (or these two as whole conversations); rename the column, or name it in data.columns, "
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
        ("[]\n[]", r"name it \.jsonl"),
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
    with pytest.raises(DataError, match=r"0 usable pairs in .*read 0; there are no records"):
        load_pairs(write(tmp_path / "b.jsonl", "\n"))


def test_on_bad_record_is_one_of_two(tmp_path):
    with pytest.raises(DataError, match=r"data\.on_bad_record: 'ignore'"):
        load_pairs(write(tmp_path / "a.jsonl", lines(record())), on_bad_record="ignore")


def test_demo_names_the_package_s_own_files(tmp_path, monkeypatch):
    monkeypatch.setattr(locate, "DEMO_FOLDER", tmp_path)
    write(tmp_path / "train.jsonl", lines(record(0)))
    write(tmp_path / "eval.jsonl", lines(record(1)))
    assert load_pairs("demo")[0].prompt[0]["content"] == "Q0"
    assert load_pairs("demo:eval")[0].prompt[0]["content"] == "Q1"
    assert len(load_pairs(["demo", "demo:eval"])) == 2


def test_demo_folder_is_the_package_s():
    assert (locate.DEMO_FOLDER / "__init__.py").is_file()


@needs_shared
def test_hh_transcripts_and_their_odd_rows():
    pairs = load_pairs(SHARED / "hh_format" / "sample.jsonl.gz")
    report = pairs.report
    assert report.read == 326
    assert report.kept == len(pairs) == 321
    assert report.dropped == {"empty": 2, "same": 1, "different_prompts": 1, "consecutive_assistant_turns": 1}
    assert report.noted == {"role_label_in_response": 1, "duplicate": 3, "contradiction": 18}
    # Rows from 0: 3 and 7 empty, 11 identical, 15 diverging, 19 two assistant turns, 23 a label inside.
    assert report.examples == {
        "empty": ["sample.jsonl.gz:4", "sample.jsonl.gz:8"],
        "same": ["sample.jsonl.gz:12"],
        "different_prompts": ["sample.jsonl.gz:16"],
        "consecutive_assistant_turns": ["sample.jsonl.gz:20"],
        "role_label_in_response": ["sample.jsonl.gz:24"],
        "duplicate": ["sample.jsonl.gz:69", "sample.jsonl.gz:219", "sample.jsonl.gz:291"],
        "contradiction": ["sample.jsonl.gz:88", "sample.jsonl.gz:103", "sample.jsonl.gz:149"],
    }
    labelled = next(pair for pair in pairs if pair.source == "sample.jsonl.gz:24")
    assert labelled.chosen == "Human: hi. Assistant: hello."
    assert all(pair.prompt[-1]["role"] == "user" for pair in pairs)


@needs_shared
@pytest.mark.parametrize(
    ("name", "kept", "dropped"),
    [
        ("alpaca_eval/annotations.alpaca-7b.json", 789, {"tie": 16}),
        ("alpaca_eval/annotations.vicuna-13b.json", 803, {"tie": 2}),
        ("alpaca_eval/pairs.eval.jsonl", 238, {}),
        ("alpaca_eval:train", 2155, {}),
        ("llama_factory/dpo_en_demo.json", 300, {}),
        ("llama_factory/dataset_info.json:dpo_en_demo", 300, {}),
    ],
)
def test_real_preferences_load_by_their_path_alone(name, kept, dropped):
    report = load_pairs(f"{SHARED}/{name}").report
    assert (report.kept, report.dropped, report.read) == (kept, dropped, kept + sum(dropped.values()))
    if "dpo_en_demo" in name:
        assert report.noted == {"duplicate": 5}
        assert report.examples["duplicate"][0] == "dpo_en_demo.json[157]"


@needs_shared
@pytest.mark.parametrize(
    ("name", "said"),
    [
        (
            "llama_factory/identity.json",
            "91 of 91 records .* none to compare it with, as for supervised fine-tuning",
        ),
        ("llama_factory/dataset_info.json", "name a dataset; it has dpo_en_demo"),
        ("llama_factory/dataset_info.json:identity", "'identity' is no preference data; it has dpo_en_demo"),
        ("llama_factory/dataset_info.json:nothing", "'nothing' is not in it"),
        (
            "alpaca_eval",
            r"holds several splits: no split \(3 files\), test \(1 file\), train \(1 file\); name one",
        ),
        ("mt_bench/question.jsonl", "80 of 80 records .* no column 'chosen', 'rejected'"),
    ],
)
def test_real_files_without_preferences_are_refused(name, said):
    with pytest.raises(DataError, match=f"(?s){said}"):
        load_pairs(f"{SHARED}/{name}")


@needs_shared
def test_prompt_chosen_rejected_strings():
    train = load_pairs(SHARED / "alpaca_eval" / "pairs.train.jsonl")
    assert len(train) == train.report.read == 2155


# --- folders, the hub, several sources ---


def test_a_folder_is_all_its_files(tmp_path):
    write(tmp_path / "b.jsonl", lines(record(0)))
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "a.json", json.dumps([record(1)]))
    (tmp_path / ".hidden").mkdir()
    write(tmp_path / ".hidden" / "c.jsonl", lines(record(2)))
    write(tmp_path / "notes.txt", "no records")
    assert [pair.source for pair in load_pairs(tmp_path)] == ["b.jsonl:1", "a.json[0]"]


def test_splits_of_a_folder_are_never_mixed(tmp_path):
    for name in ("pairs.train.jsonl", "pairs.eval.jsonl"):
        write(tmp_path / name, lines(record(0)))
    with pytest.raises(
        DataError, match=r"holds several splits: test \(1 file\), train \(1 file\); name one, as .*:train"
    ):
        load_pairs(tmp_path)
    for split, name in (("train", "train"), ("eval", "eval"), ("test", "eval")):
        assert [pair.source for pair in load_pairs(f"{tmp_path}:{split}")] == [f"pairs.{name}.jsonl:1"]
    with pytest.raises(DataError, match="a folder without files of split 'validation'"):
        load_pairs(f"{tmp_path}:validation")
    with pytest.raises(DataError, match="a file has no split; leave it out"):
        load_pairs(f"{tmp_path / 'pairs.train.jsonl'}:train")


def test_a_folder_without_data_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"a folder without files to read; expected a file ending in \.jsonl"):
        load_pairs(tmp_path)


def test_a_saved_dataset_is_read(tmp_path):
    import datasets

    train, test = ([record(n) for n in range(start, start + 2)] for start in (0, 2))
    saved = datasets.DatasetDict(
        train=datasets.Dataset.from_list(train), test=datasets.Dataset.from_list(test)
    )
    saved.save_to_disk(tmp_path / "both")
    saved["train"].save_to_disk(tmp_path / "one")
    for source, first in (
        (tmp_path / "both", "Q0"),
        (f"{tmp_path / 'both'}:test", "Q2"),
        (tmp_path / "one", "Q0"),
    ):
        assert load_pairs(source)[0].prompt[0]["content"] == first
    assert load_pairs(tmp_path / "one")[1].source == "one[1]"
    with pytest.raises(DataError, match="no split 'dev'; it has train, test"):
        load_pairs(f"{tmp_path / 'both'}:dev")


@pytest.fixture
def hub(tmp_path):
    """A folder as a dataset's repository on the hub is laid out: two configs, with splits of their own."""
    import pyarrow
    import pyarrow.parquet

    card = ["---", "configs:"]
    for config in ("clean", "raw"):
        card += [f"- config_name: {config}", "  data_files:"]
        (tmp_path / "org" / "pairs" / config).mkdir(parents=True)
        for split in ("train", "test"):
            card += [f"  - split: {split}", f"    path: {config}/{split}-*"]
            records = [record(f" {config} {split} {n}") for n in range(3)]
            pyarrow.parquet.write_table(
                pyarrow.Table.from_pylist(records),
                tmp_path / "org" / "pairs" / config / f"{split}-00000-of-00001.parquet",
            )
    write(tmp_path / "org" / "pairs" / "README.md", "\n".join([*card, "---", "# Pairs"]))
    return tmp_path / "org" / "pairs"


def test_a_dataset_of_the_hub_by_config_and_split(hub):
    source = locate.Source(str(hub), config="clean", split="test")
    pairs = load_pairs(source)
    assert [pair.prompt[0]["content"] for pair in pairs] == [f"Q clean test {n}" for n in range(3)]
    assert pairs[1].source == "pairs[1]"
    (file,) = pairs.report.sources
    assert len(file["sha256"]) == 64
    assert load_pairs(locate.Source(str(hub), config="raw"))[0].prompt[0]["content"] == "Q raw train 0"


@pytest.mark.parametrize(
    ("config", "split", "said"), [(None, None, "clean"), ("none", None, "clean"), ("clean", "dev", "dev")]
)
def test_a_wrong_config_or_split_of_the_hub_is_named(hub, config, split, said):
    with pytest.raises(DataError, match=rf"can't be read as a dataset .*{said}.*check the name, its config"):
        load_pairs(locate.Source(str(hub), config=config, split=split))


@pytest.mark.parametrize("name", ["org/no-such-dataset", "org/no-such-dataset:test"])
def test_a_dataset_that_is_not_there_says_what_to_check(name):
    with pytest.raises(
        DataError, match=r"org/no-such-dataset: can't be read as a dataset .* the network, or give a local"
    ):
        load_pairs(name)


def test_hub_names_go_to_datasets_with_their_revision(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **options):
        asked.append((args, options))
        return datasets.Dataset.from_list([record()])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    load_pairs(["org/pairs:test_prefs", locate.Source("org/pairs", "en", "train[:10%]", "v1.0")])
    assert asked == [
        (("org/pairs", None), {"split": "test_prefs", "revision": None}),
        (("org/pairs", "en"), {"split": "train[:10%]", "revision": "v1.0"}),
    ]


def test_llama_factory_s_names_and_tags(tmp_path):
    info = {
        "ours": {
            "file_name": "ours.json", "formatting": "sharegpt", "ranking": True,
            "columns": {"messages": "talk", "chosen": "yes", "rejected": "no", "system": "rules"},
            "tags": {"role_tag": "who", "content_tag": "said", "user_tag": "me", "assistant_tag": "it"},
        },
        "sft": {"file_name": "sft.json"},
        "far": {"script_url": "x", "ranking": True},
    }  # fmt: skip
    write(tmp_path / "dataset_info.json", json.dumps(info))
    talk = {
        "talk": [{"who": "me", "said": "Q"}],
        "yes": {"who": "it", "said": "a"},
        "no": {"who": "it", "said": "b"},
    }
    write(tmp_path / "ours.json", json.dumps([{**talk, "rules": "S"}]))
    (pair,) = load_pairs(f"{tmp_path}/dataset_info.json:ours")
    assert [turn["role"] for turn in pair.prompt] == ["system", "user"]
    assert (pair.chosen, pair.rejected) == ("a", "b")
    with pytest.raises(DataError, match="far names no file_name"):
        load_pairs(f"{tmp_path}/dataset_info.json:far")
    write(tmp_path / "dataset_info.json", "[]")
    with pytest.raises(DataError, match=r"no dataset_info\.json as LLaMA-Factory has it"):
        load_pairs(f"{tmp_path}/dataset_info.json:ours")


def test_weights_count_pairs_more_or_less_often(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(*[record(n) for n in range(1000)]))
    twice = load_pairs(locate.Source(str(path), weight=2))
    assert len(twice) == twice.report.read == 2000
    assert twice[0] == twice[1]
    half = load_pairs(locate.Source(str(path), weight=0.5))
    assert 450 < len(half) < 550
    assert half.report.dropped == {"left_out_by_weight": 1000 - len(half)}
    assert list(half) == list(load_pairs(locate.Source(str(path), weight=0.5)))
    assert 1450 < len(load_pairs(locate.Source(str(path), weight=1.5))) < 1550
    both = load_pairs([path, locate.Source(str(path), weight=0.5)])
    assert [source["kept"] for source in both.report.sources] == [1000, len(half)]
    for weight in (0, -1, float("inf"), float("nan")):
        with pytest.raises(DataError, match="expected a number above 0"):
            load_pairs(locate.Source(str(path), weight=weight))


def test_annotators_of_one_comparison_vote(tmp_path):
    def vote(preference, question="Q", first="a", second="b"):
        return {"instruction": question, "output_1": first, "output_2": second, "preference": preference}

    records = [
        vote(1), vote(2, "R"), vote(2), vote(2, first="b", second="a"),  # of Q two for a, one for b
        vote(1, "S"), vote(2, "S"), vote(None, "T"), vote(1, "R", "c", "d"),
    ]  # fmt: skip
    pairs = load_pairs(write(tmp_path / "a.jsonl", lines(*records)))
    found = [(pair.prompt[0]["content"], pair.chosen, pair.rejected) for pair in pairs]
    assert found == [("Q", "a", "b"), ("R", "b", "a"), ("R", "c", "d")]
    assert pairs.report.dropped == {"no_verdict": 1, "further_vote": 3, "tie": 1}
    assert pairs.report.read == len(records)


def test_a_set_of_ties_is_no_data(tmp_path):
    records = [
        {"instruction": f"Q{n}", "output_1": "a", "output_2": "b", "preference": 1.5} for n in range(5)
    ]
    with pytest.raises(DataError, match=r"0 usable pairs in .*: read 5, dropped 5 tie"):
        load_pairs(write(tmp_path / "a.jsonl", lines(*records)))


@pytest.mark.parametrize(
    "settings",
    [
        {"columns": "prompt"},
        {"columns": ["prompt"]},
        {"columns": {"promt": "query"}},
        {"ranked_pairs": "worst"},
        {"shape": "triples"},
    ],
)
def test_settings_of_another_kind_are_refused(settings):
    with pytest.raises(
        DataError, match=rf"data\.{next(iter(settings))}: .*; expected|data.columns: unknown promt"
    ):
        load_pairs([record()], **settings)
    if "columns" in settings:
        with pytest.raises(DataError, match=r"data\.columns"):
            load_pairs(locate.Source("demo", **settings))


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_asked_once(tmp_path):
    script = "from qorpo.data.sources import load_pairs; load_pairs('nobody/nothing')"
    environment = os.environ | {
        "HF_HUB_OFFLINE": "0",
        "HF_ENDPOINT": "http://127.0.0.1:9",  # a port that refuses
        "HF_HOME": str(tmp_path),
    }
    started = time.monotonic()
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    # Retries alone would take 23 seconds; on a busy machine the imports may take 10.
    assert time.monotonic() - started < 20
    assert "DataError: nobody/nothing: can't be read as a dataset" in done.stderr
    assert "the hub can't be reached: " in done.stderr
    assert "Retrying" not in done.stderr


def test_settings_of_the_layout_are_checked(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(record()))
    with pytest.raises(
        DataError, match=r"data\.shape: 'pairs'; expected chosen-rejected, two-outputs, scored, ranked"
    ):
        load_pairs(path, shape="pairs")
    with pytest.raises(DataError, match=r"data\.columns: unknown query; expected prompt, input,"):
        load_pairs(path, columns={"query": "prompt"})


def test_tool_definitions_that_are_left_out_are_noted(tmp_path):
    path = write(tmp_path / "a.jsonl", lines(record(tools=[{"name": "f"}]), record(1, tools=[])))
    assert load_pairs(path).report.noted == {"tools_left_out": 1}
