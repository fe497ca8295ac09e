"""The report of a run: what it says, and that it survives whatever a folder holds."""

import json
import time

import numpy as np
import pytest
from helpers.run_folders import DATA, make_run, pair_values

from qorpo.reports.findings import verdict, warnings
from qorpo.reports.run_files import read_run
from qorpo.reports.run_report import run_page
from qorpo.reports.write import write_report

LEARNED = {
    0: pair_values(200),
    20: pair_values(200, loss=0.6, accuracy=0.9),
    40: pair_values(200, loss=0.5, accuracy=0.95),
}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "learned", values=LEARNED)


def html(run):
    path, _ = write_report([run], run.with_suffix(".html"))
    return path.read_text(encoding="utf-8")


# --- what it says ---


def test_the_verdict_is_against_the_start_with_intervals_and_the_number_of_pairs(learned):
    said = verdict(read_run(learned))
    assert said.startswith("Better than the base: held-out accuracy 0.50 → 0.95 (0.9")
    assert said.endswith("200 pairs.")
    assert said in html(learned)


@pytest.mark.parametrize(
    ("evaluations", "said"),
    [
        ({}, "No verdict: no pairs were held out."),
        ({0: {"loss": 1.0}}, "No verdict yet"),
        ({20: {"loss": 1.0}}, "No verdict: the start (step 0) was not evaluated"),
        ({0: {"loss": 1.0}, 40: {"loss": 0.5}}, "Better than the base by the means alone (without intervals): held-out loss 1.00 → 0.50"),
        ({0: {"loss": 1.0}, 40: {"loss": 1.5}}, "No better than the base"),
        ({0: {"loss": float("nan")}, 40: {"loss": 1.5}}, "No verdict: the start"),
    ],
)  # fmt: skip
def test_each_case_has_its_verdict(tmp_path, evaluations, said):
    run = make_run(tmp_path / "run", evaluations=evaluations)
    assert verdict(read_run(run)).startswith(said)
    assert said in html(run)


def test_a_difference_within_chance_is_no_improvement(tmp_path):
    values = {0: pair_values(40, loss=1.0, seed=1), 40: pair_values(40, loss=0.999, seed=2)}
    assert verdict(read_run(make_run(tmp_path / "run", values=values))).startswith(
        "Not told apart from the base"
    )


def test_the_page_has_every_part(learned):
    page = html(learned)
    for part in (
        "Held-out figures", "Curves", "Log-prob of chosen and log-prob of rejected", "Learning rate", "Gradient norm",
        "Tokens a second", "Peak memory, GiB", "Each held-out pair, before and after", "an answer is blank", "a.jsonl:3",
        "chosen 10.5 (longest 40)", "Recipe: what differs from the defaults", "train.max_steps", "cpu, 2 cores",
        "40 s for 40 steps", "1.50 GiB used at the peak", "qorpo merge", "95% intervals",
    ):  # fmt: skip
        assert part in page, part


def test_json_holds_the_same_for_machines(learned, tmp_path):
    path, _ = write_report([learned], tmp_path / "r.json")
    found = json.loads(path.read_text())
    assert found["verdict"] == verdict(read_run(learned))
    assert (found["kept_step"], found["steps"], found["is_finished"]) == (40, 40, True)
    loss = found["changes"]["loss"]
    assert loss["before"] - loss["after"] == pytest.approx(0.5)
    low, high = loss["difference_95"]
    assert low <= -0.5 + 1e-6 <= -0.5 + 2e-6
    assert high < 0
    assert found["differences_from_defaults"]["train.max_steps"] == "40"


def test_png_holds_the_charts(learned, tmp_path):
    path, _ = write_report([learned], tmp_path / "r.png")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_the_same_folder_gives_the_same_page(learned):
    assert html(learned) == html(learned)


# --- warnings ---


def said_of(run):
    return "\n".join(warnings(read_run(run)))


def test_a_good_run_has_no_warning(learned):
    values = LEARNED | {30: pair_values(200, loss=0.51, accuracy=0.95)}
    good = make_run(learned.parent / "good", values=values)
    assert said_of(good) == ""


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({0: pair_values(), 40: pair_values(loss=1.2)}, "held-out loss rose from"),
        ({0: pair_values(), 20: pair_values(loss=0.5), 40: pair_values(loss=0.7)}, "overfitting from step 20"),
        ({0: pair_values(), 40: pair_values(loss=0.5, chosen=-0.9)}, "chosen answers became less likely"),
        ({0: pair_values(), 20: pair_values(loss=0.8), 30: pair_values(loss=0.7), 40: pair_values(loss=0.5)}, "still improving at the end: 40%"),
        ({0: pair_values(40), 40: pair_values(40, loss=0.5)}, "only 20 held-out prompts"),
        ({0: pair_values(), 40: pair_values(loss=0.5, accuracy=0.5, lengths=[(9, 5)] * 50 + [(5, 9)] * 50)}, "length may explain the result: accuracy is 1.00 where"),
    ],
)  # fmt: skip
def test_each_trouble_is_named(tmp_path, values, said):
    assert said in said_of(make_run(tmp_path / "run", values=values))


def test_trouble_with_data_and_numbers_is_named(tmp_path):
    data = DATA | {"train": DATA["train"] | {"kept": 50, "read": 70}, "eval_prompts_in_train": 3}
    run = make_run(tmp_path / "run", data=data)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "loss": NaN, "grad_norm": 1.0}\nrubbish\n{"step": 42, "loss": 1.0}\n')
    said = said_of(run)
    assert "3 evaluation prompts occur in training too" in said
    assert "20 of 70 records were dropped" in said
    assert "loss is no number at step 41" in said
    assert "1 lines of metrics.jsonl can't be read" in said
    assert "no number" in html(run)


# --- whatever a folder holds ---


def test_a_run_that_is_still_going(tmp_path):
    run = make_run(tmp_path / "run", evaluations={0: {"loss": 1.0}}, finished=False)
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 41, "lo')  # a line that is being written
    found = read_run(run)
    assert (found.last_step, found.unread_lines) == (40, 0)
    page = html(run)
    assert "not finished: step 40 of 40" in page
    assert "--resume" in page


@pytest.mark.parametrize("name", ["metrics.jsonl", "data.json", "environment.json"])
@pytest.mark.parametrize(
    "content", [b"", b"{", b"[1]", b'{"train": 3, "packages": 3, "step": "x"}\n', b"\xff\xfe\n\0", None]
)
def test_a_torn_or_missing_file_leaves_a_page(tmp_path, name, content):
    run = make_run(tmp_path / "run", values=LEARNED)
    (run / name).unlink()
    if content is not None:
        (run / name).write_bytes(content)
    assert "Recipe: what differs" in html(run)
    write_report([run], tmp_path / "r.json")


def test_torn_values_of_pairs_leave_means(tmp_path):
    run = make_run(tmp_path / "run", values=LEARNED)
    for content in ("", "{}", '{"sources": ["a"], "prompts": [], "lengths": [[1]], "metrics": {}}', "[]"):
        (run / "held_out" / "step-40.json").write_text(content)
        assert verdict(read_run(run)).startswith("Better than the base by the means alone")


def test_what_files_say_is_escaped(tmp_path):
    nasty = "<script>alert(1)</script>\x1b[31m\u202e" + "x" * 100_000
    data = DATA | {
        "train": DATA["train"] | {"examples": {"empty": [nasty]}, "dropped": {nasty: 1, "empty": 1}}
    }
    environment = {"device": nasty, "packages": {nasty: nasty}, "platform": nasty}
    recipe = {"data": {"train": "<script>alert(2)</script>"}}
    run = make_run(tmp_path / "<script>run", data=data, environment=environment, recipe=recipe)
    (run / "adapter" / "chat_template.jinja").write_text("</pre><script>alert(3)</script>" + "y" * 100_000)
    page = html(run)
    assert "<script>alert" not in page
    assert "<script>run" not in page
    assert "\x1b" not in page
    assert "\u202e" not in page
    assert "more characters)" in page
    assert len(page) < 300_000


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["nowhere"], "nowhere: holds no run (no recipe.yaml)"),
        (["run", "run"], "given twice"),
        (["run", "--output", "r.txt"], "unknown extension '.txt'; expected .html or .png or .json"),
        (["run", "--output", "no/such/r.html"], "make its folder, or give another --output"),
        (["empty", "--output", "r.png"], "nothing is there to draw yet"),
    ],
)
def test_what_cannot_be_done_is_one_message(command, tmp_path, monkeypatch, given, said):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "run")
    (make_run(tmp_path / "empty") / "metrics.jsonl").unlink()
    code, _, err = command("report", *given)
    assert code == 2
    assert said in err
    assert "Traceback" not in err
    assert not list(tmp_path.glob("r.*"))


def test_the_command_writes_into_the_run_and_says_the_verdict(command, learned):
    code, out, _ = command("report", learned)
    assert code == 0
    assert out.splitlines() == [verdict(read_run(learned)), f"report: {learned / 'report.html'}"]
    assert (learned / "report.html").stat().st_size > 50_000


def test_ten_thousand_steps_are_a_small_page_within_ten_seconds(tmp_path):
    values = {step: pair_values(1220, loss=1 - step / 20_000) for step in (0, 10_000)}
    evaluations = {
        step: {"loss": 1 - step / 20_000, "rewards/accuracies": 0.6} for step in range(0, 10_001, 100)
    }
    run = make_run(tmp_path / "run", steps=10_000, values=values, evaluations=evaluations)
    started = time.process_time()
    path, _ = write_report([run])
    assert time.process_time() - started < 10
    assert path.stat().st_size < 3e6
    page = run_page(read_run(run))
    assert max(len(line.x) for chart in page.charts for line in chart.series if hasattr(line, "x")) == 10_000


def test_an_interval_keeps_prompts_together_and_is_the_same_each_time():
    values = pair_values(400, accuracy=0.7)
    found = values.of_metric("rewards/accuracies")
    assert found == values.of_metric("rewards/accuracies")
    assert found.value == pytest.approx(0.7)
    apart = type(values)(values.sources, list(range(400)), values.lengths, values.metrics)
    # The two pairs of a prompt are both right or both wrong here: they count as one.
    width, width_apart = (each.high - each.low for each in (found, apart.of_metric("rewards/accuracies")))
    assert width == pytest.approx(width_apart * np.sqrt(2), rel=0.1)
    assert width_apart == pytest.approx(2 * 1.96 * np.sqrt(0.7 * 0.3 / 400), rel=0.1)


def test_many_prompts_have_the_normal_interval_which_is_the_same():
    values = pair_values(4_000)
    many = pair_values(40_000)
    (low, high), (low_many, high_many) = values.of_metric("loss").ends, many.of_metric("loss").ends
    assert high_many - low_many == pytest.approx((high - low) / np.sqrt(10), rel=0.1)


def test_all_right_is_not_surely_right():
    found = pair_values(100, accuracy=1.0).of_metric("rewards/accuracies")
    assert (found.value, found.high) == (1.0, 1.0)
    assert 0.9 < found.low < 0.95  # 50 prompts
