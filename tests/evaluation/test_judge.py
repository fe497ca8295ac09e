"""Win rates of annotation files: the published ones, ties as half, and what is no such file."""

import json
import math
from pathlib import Path

import pytest

from qorpo.errors import DataError
from qorpo.evaluation.judge import judge_annotations

ALPACA_EVAL = Path(__file__).parents[3] / "shared" / "data" / "alpaca_eval"


def write(path, preferences):
    records = [
        {
            "instruction": f"question {number}",
            "generator_1": "reference",
            "generator_2": "mine",
            "preference": each,
        }
        for number, each in enumerate(preferences)
    ]
    path.write_text(json.dumps(records))
    return path


@pytest.mark.parametrize(("name", "published"), [("alpaca-7b", 26.46), ("vicuna-13b", 70.43)])
def test_published_win_rates(name, published):
    path = ALPACA_EVAL / f"annotations.{name}.json"
    if not path.is_file():
        pytest.skip("AlpacaEval's annotation files are not beside this checkout")
    found = judge_annotations(path)
    assert found.win_rate.value == pytest.approx(published, abs=0.01)
    assert (found.model, found.reference, found.annotations) == (name, "text_davinci_003", 805)
    # The bootstrap and the standard error of independent verdicts say the same.
    assert found.win_rate.high - found.win_rate.low == pytest.approx(
        2 * 1.96 * found.standard_error, rel=0.03
    )


def test_ties_of_both_ages_are_half_and_no_verdict_is_left_out(tmp_path):
    found = judge_annotations(write(tmp_path / "a.json", [2, 2.0, 1, 0, 1.5, None, 1.25, float("nan")]))
    assert found.win_rate.value == pytest.approx(100 * (1 + 1 + 0 + 0.5 + 0.5 + 0.25) / 6)
    assert (found.annotations, found.wins, found.ties, found.no_verdict) == (6, 2, 2, 2)
    shares = [1, 1, 0, 0.5, 0.5, 0.25]
    mean = sum(shares) / 6
    by_hand = 100 * math.sqrt(sum((each - mean) ** 2 for each in shares) / 5 / 6)
    assert found.standard_error == pytest.approx(by_hand)


@pytest.mark.parametrize("preferences", [[2], [1, 1, 1]])
def test_few_or_equal_verdicts_have_a_rate(tmp_path, preferences):
    found = judge_annotations(write(tmp_path / "a.json", preferences))
    assert found.win_rate.value == found.win_rate.low == found.win_rate.high == 100 * (preferences[0] - 1)
    assert found.standard_error == 0


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("not json", "can't be read"),
        ('{"preference": 1}', "no JSON list of objects"),
        ("[1, 2]", "no JSON list of objects"),
        ("[]", "no record has a verdict"),
        ('[{"preference": null}]', "no record has a verdict"),
        ('[{"preference": 1}, {"output": "hello"}]', "record 2: has no 'preference'"),
        ('[{"preference": 3}]', "record 1: preference is 3"),
        ('[{"preference": 0.5}]', "record 1: preference is 0.5"),
        ('[{"preference": "2"}]', "record 1: preference is '2'"),
        ('[{"preference": true}]', "record 1: preference is True"),
        ('[{"preference": Infinity}]', "record 1: preference is inf"),
        ("[" * 100_000, "can't be read"),
    ],
)  # fmt: skip
def test_what_is_no_annotation_file_is_one_message(tmp_path, text, said):
    path = tmp_path / "annotations.json"
    path.write_text(text)
    with pytest.raises(DataError) as raised:
        judge_annotations(path)
    assert said in str(raised.value)
    assert str(path) in str(raised.value)
    assert "\n" not in str(raised.value)


def test_the_command_prints_a_table_and_writes_the_figures(command, tmp_path):
    first, second = write(tmp_path / "a.json", [2, 1, 1, 1]), write(tmp_path / "b.json", [2, 2, 1.5, None])
    output = tmp_path / "rates.json"
    code, out, err = command("judge", "--annotations", first, "--annotations", second, "--output", output)
    assert code == 0, err
    head, *lines = out.splitlines()
    assert "win rate %" in head
    assert [line.split("  ")[0] for line in lines] == ["mine against reference"] * 2
    assert ["25.00" in lines[0], "83.33" in lines[1]] == [True, True]
    assert [each["win_rate"]["value"] for each in json.loads(output.read_text())] == pytest.approx(
        [25, 250 / 3]
    )


def test_what_is_wrong_ends_the_command_with_2_and_writes_nothing(command, tmp_path):
    good, output = write(tmp_path / "a.json", [2]), tmp_path / "rates.json"
    code, out, err = command(
        "judge", "--annotations", good, "--annotations", tmp_path / "none.json", "--output", output
    )
    assert (code, out) == (2, "")
    assert "none.json: can't be read" in err
    assert not output.exists()
    for bad in (tmp_path, tmp_path / "no" / "such" / "rates.json"):
        code, out, err = command("judge", "--annotations", good, "--output", bad)
        assert (code, out) == (2, ""), err
        assert f"{bad}: " in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json"]
