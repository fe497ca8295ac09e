"""From sources to tokens on disk: the same as in memory, found again, and never stale."""

import hashlib
import json
import multiprocessing
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import make_tokenizer

from qorpo.data import prepare
from qorpo.data.chat_format import ChatFormat
from qorpo.data.filters import prompt_key
from qorpo.data.locate import Source
from qorpo.data.prepare import prepare_pairs
from qorpo.data.shapes import Layout
from qorpo.data.sources import load_pairs
from qorpo.data.token_table import largest_token_id, longest_group, longest_sequence
from qorpo.data.tokenize import Limits, tokenize_pairs
from qorpo.errors import DataError
from qorpo.manifest import MANIFEST
from qorpo.storage import unfinished_of, whole_folder

LIMITS = Limits(64, 32)


def write(path, records):
    path.write_text("".join(json.dumps(each) + "\n" for each in records), encoding="utf-8")
    return str(path)


def records(count, start=0):
    """Prompts that recur, some too long, answers some of which are equal or have to be cut."""
    return [
        {
            "prompt": f"What is {n % 7} plus one?" + " Tell me." * (60 * (n % 11 == 3)),
            "chosen": f"It is {n % 7 + 1}, {n}." + " So it is." * (n % 20),
            "rejected": "No." if n % 13 else f"It is {n % 7 + 1}, {n}." + " So it is." * (n % 20),
        }
        for n in range(start, start + count)
    ]


@pytest.fixture
def chat():
    return ChatFormat(make_tokenizer())


@pytest.fixture
def source(tmp_path):
    return write(tmp_path / "pairs.jsonl", records(200))


def prepared(train, eval, chat, tmp_path, limits=LIMITS, **options):
    options = {"layout": Layout(), "cache": tmp_path / "cache", **options}
    return prepare_pairs(train, eval, chat, limits, **options)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_tokens_on_disk_are_those_in_memory(source, chat, tmp_path, monkeypatch, num_processes):
    monkeypatch.setattr(prepare, "PAIRS_PER_BATCH", 16)
    found, report = prepared(source, None, chat, tmp_path, num_processes=num_processes).train
    expected, expected_report = tokenize_pairs(load_pairs(source), chat, LIMITS)
    assert expected_report.dropped.keys() == {"same", "prompt_too_long"}
    assert sum(expected_report.cut.values()) > 0
    assert list(found) == expected
    assert found[-1] == expected[-1]
    assert found[3:9:2] == expected[3:9:2]
    assert report == expected_report
    assert report.read == report.kept + sum(report.dropped.values()) == 200
    assert largest_token_id(found) == largest_token_id(expected)
    assert np.array_equal(found.lengths(), [group.lengths for group in expected])
    assert np.array_equal(found.cuts(), [group.cut for group in expected])
    with pytest.raises(IndexError):
        found[len(found)]


@pytest.mark.parametrize("eval", [None, 0.3])
def test_dropped_pairs_leave_counts_whole_numbers(source, chat, tmp_path, eval):
    """A dropped pair is a null row of the table, which turns a column of counts into floats."""
    data = prepared(source, eval, chat, tmp_path)
    for pairs, report in filter(None, (data.train, data.eval)):
        assert report.dropped["prompt_too_long"] > 0
        assert pairs.lengths().dtype == np.int64
        assert pairs.cuts().dtype == np.bool_
        assert all(type(length) is int for length in longest_group(pairs))
        assert longest_group(pairs) == longest_group(list(pairs))
        assert longest_sequence(pairs) == longest_sequence(list(pairs)) > 0
        counted = [count for side in report.tokens.values() for count in (side["total"], side["max"])]
        assert all(type(count) is int for count in [*counted, *report.cut.values()])


def test_a_fraction_is_split_off_by_prompt(source, chat, tmp_path):
    data = prepared(source, 0.3, chat, tmp_path, seed=3)
    pairs = {pair.source: prompt_key(pair.prompt) for pair in load_pairs(source)}
    train, held_out = ({pairs[p.source] for p in side.groups} for side in (data.train, data.eval))
    assert train
    assert held_out
    assert not train & held_out
    assert data.leaked_prompts == 0
    assert data.whole.read == 200
    assert data.train.report.read + data.eval.report.read == data.whole.kept
    assert data.train.report.sources == data.whole.sources
    again = prepared(source, 0.3, chat, tmp_path, seed=3)
    assert [list(p.groups) for p in (again.train, again.eval)] == [
        list(p.groups) for p in (data.train, data.eval)
    ]
    assert again.as_dict() == data.as_dict()
    other = prepared(source, 0.3, chat, tmp_path, seed=4)
    assert [p.source for p in other.eval.groups] != [p.source for p in data.eval.groups]


def test_evaluation_files_and_the_prompts_they_share(source, chat, tmp_path):
    other = write(tmp_path / "eval.jsonl", [*records(20), {"prompt": "New?", "chosen": "a", "rejected": "b"}])
    data = prepared(source, other, chat, tmp_path)
    assert data.whole is None
    assert data.eval.groups[-1].source == "eval.jsonl:21"
    # Seven questions, and as many of them with "Tell me.": of the first 20, one at 3 and one at 14 (0 again).
    assert data.leaked_prompts == len({r["prompt"] for r in records(20)})
    assert data.as_dict()["eval_prompts_in_train"] == data.leaked_prompts


def count_tokenizings(monkeypatch):
    calls = []
    batch = prepare.tokenize_batch
    monkeypatch.setattr(prepare, "tokenize_batch", lambda *arguments: calls.append(1) or batch(*arguments))
    return calls


def test_the_second_time_nothing_is_tokenized(source, chat, tmp_path, monkeypatch):
    calls = count_tokenizings(monkeypatch)
    first = prepared(source, None, chat, tmp_path)
    made = len(calls)
    assert made > 0
    second = prepared(source, None, chat, tmp_path)
    assert len(calls) == made
    assert list(second.train.groups) == list(first.train.groups)
    assert second.as_dict() == first.as_dict()
    shutil.copystat(source, source)
    os.utime(source)  # the same content at another time is the same content
    prepared(source, None, chat, tmp_path)
    assert len(calls) == made


@pytest.mark.parametrize(
    "changed",
    ["content", "template", "tokenizer", "limits", "rule", "columns", "min_margin", "eval", "seed", "weight"],
)
def test_whatever_decides_the_tokens_makes_other_ones(source, tmp_path, monkeypatch, changed):
    calls = count_tokenizings(monkeypatch)
    prepared(source, 0.2, ChatFormat(make_tokenizer()), tmp_path)
    made = len(calls)
    options, limits, eval, train = {}, LIMITS, 0.2, source
    tokenizer, template = make_tokenizer(), None
    match changed:
        case "content":
            write(Path(source), records(199))
        case "template":
            template = tokenizer.chat_template + "\n"
        case "tokenizer":
            tokenizer.add_tokens(["plus one"])
        case "limits":
            limits = Limits(65, 32)
        case "rule":
            limits = Limits(64, 32, long_prompts="keep_end")
        case "columns":
            options["layout"] = Layout(columns={"prompt": "prompt"})
        case "min_margin":
            options["min_margin"] = 0.1
        case "eval":
            eval = 0.3
        case "seed":
            options["seed"] = 9
        case "weight":
            train = Source(source, weight=2)
    prepared(train, eval, ChatFormat(tokenizer, template), tmp_path, limits, **options)
    assert len(calls) > made


def damage(path, kind, draw):
    data = bytearray(path.read_bytes())
    match kind:
        case "flip":
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        case "cut":
            del data[draw.randrange(len(data)) :]
        case "more":
            data += data[-64:]
    path.write_bytes(data)
    if kind == "gone":
        path.unlink()


def test_a_damaged_entry_is_made_again_and_said(source, chat, tmp_path, caplog):
    write(Path(source), records(20))
    expected = list(prepared(source, 0.2, chat, tmp_path).train.groups)
    (folder,) = (tmp_path / "cache").iterdir()
    names = sorted(path.name for path in folder.iterdir())
    assert {"report.json", "train.npy", "eval.npy", MANIFEST} < set(names)
    draw = random.Random(0)
    for trial in range(60):
        name = names[trial % len(names)]
        good = (folder / name).read_bytes()
        damage(folder / name, ["flip", "flip", "flip", "cut", "more", "gone"][trial // len(names) % 6], draw)
        caplog.clear()
        if trial % 6:  # noticed
            assert prepare._open(folder) is None
            (folder / name).write_bytes(good)
        else:
            assert list(prepared(source, 0.2, chat, tmp_path).train.groups) == expected
        assert "tokens kept before: " in caplog.text, name
        assert str(folder / name) in caplog.text or "has no manifest" in caplog.text
    caplog.clear()
    prepared(source, 0.2, chat, tmp_path)
    assert "kept before" not in caplog.text  # whatever other tests made of the log level


def test_tables_of_other_columns_are_not_taken_for_these(source, chat, tmp_path, monkeypatch):
    """As code from before the next change of them has left."""
    expected = list(prepared(source, 0.2, chat, tmp_path).train.groups)
    schema = prepare.arrow_schema().with_metadata({"changed": "columns"})
    monkeypatch.setattr(prepare, "arrow_schema", lambda: schema)
    assert list(prepared(source, 0.2, chat, tmp_path).train.groups) == expected
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_an_entry_with_more_files_or_of_other_tokens_is_made_again(source, chat, tmp_path, caplog):
    expected = list(prepared(source, None, chat, tmp_path).train.groups)
    (folder,) = (tmp_path / "cache").iterdir()
    (tokens,) = folder.glob("train*tokens*")
    shutil.copy(tokens, tokens.with_name("train_more.tokens"))  # would be read as more rows
    assert list(prepared(source, None, chat, tmp_path).train.groups) == expected
    assert "train_more.tokens: was added" in caplog.text
    other = prepared(source, None, chat, tmp_path, Limits(60, 32))
    (second,) = set((tmp_path / "cache").iterdir()) - {folder}
    shutil.rmtree(folder)
    second.rename(folder)
    assert list(prepared(source, None, chat, tmp_path).train.groups) == expected != list(other.train.groups)
    assert "has no manifest of its own" in caplog.text


def cold_start(source, cache, chat, barrier, answers):
    barrier.wait()
    data = prepare_pairs(source, 0.2, chat, LIMITS, layout=Layout(), cache=cache)
    answers.put(hash_of([list(data.train.groups), data.as_dict()]))


def hash_of(value):
    return hashlib.sha256(repr(value).encode()).hexdigest()


def test_cold_starts_at_once_share_what_one_of_them_makes(source, chat, tmp_path):
    cache = tmp_path / "cache"
    processes = multiprocessing.get_context("fork")
    for count in (2, 3, 3):  # without a cache, then with a damaged one
        barrier, answers = processes.Barrier(count), processes.Queue()
        starts = [
            processes.Process(target=cold_start, args=(source, cache, chat, barrier, answers))
            for _ in range(count)
        ]
        for start in starts:
            start.start()
        found = {answers.get(timeout=60) for _ in starts}
        for start in starts:
            start.join(60)
        assert [start.exitcode for start in starts] == [0] * count
        data = prepared(source, 0.2, chat, tmp_path)
        assert found == {hash_of([list(data.train.groups), data.as_dict()])}
        (folder,) = cache.iterdir()
        damage(folder / "report.json", "flip", random.Random(1))


def test_what_a_killed_run_left_is_swept_and_nothing_else(source, chat, tmp_path):
    cache = tmp_path / "cache"
    dead, other, living = (unfinished_of(cache / name) for name in ("a" * 32, "b" * 32, "c" * 32))
    for folder in (dead, other, living, cache / "mine", cache / f".{'d' * 32}.{os.getpid()}"):
        folder.mkdir(parents=True)
        (folder / "train.texts").write_text("half")
    with whole_folder(cache / ("c" * 32)):
        prepared(source, None, chat, tmp_path)
        assert not dead.exists()
        assert not other.exists()
        assert living.exists()
    assert (cache / "mine" / "train.texts").read_text() == "half"
    assert (cache / f".{'d' * 32}.{os.getpid()}").exists()  # not by a name of qorpo's


def test_nothing_is_left_of_what_fails(source, chat, tmp_path, monkeypatch):
    write(Path(source), [*records(3), {"prompt": 1}])
    with pytest.raises(DataError, match=r"pairs\.jsonl:4"):
        prepared(source, None, chat, tmp_path)
    with pytest.raises(DataError, match=r"^data\.train: 0 usable pairs left as tokens"):
        prepared(source, None, chat, tmp_path, Limits(3, 2), on_bad_record="skip")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(prepare, "_write_texts", full)
    with pytest.raises(
        DataError, match=r"can't keep the tokens there .No space left on device.; make room, or set HF_DATA"
    ):
        prepared(source, None, chat, tmp_path, on_bad_record="skip")
    assert list((tmp_path / "cache").iterdir()) == []
