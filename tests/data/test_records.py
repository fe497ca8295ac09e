"""The report's arithmetic, and sets of pairs."""

import json

from qorpo.data.counts import DataReport
from qorpo.data.records import PairSet, PreferencePair


def user(text):
    return {"role": "user", "content": text}


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
