"""`qorpo evaluate`: held-out pairs against the base, answers kept and taken again, and one message for what is wrong."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from helpers.tiny import read_metrics, write_records

import qorpo
from qorpo.errors import DamageError, DataError, ModelError, QorpoError, RecipeError
from qorpo.evaluation import evaluate as module

METRICS = {"rewards/accuracies", "log_odds_ratio", "nll", "rewards/margins", "chosen_logps", "rejected_logps"}


def values(result):
    return {name: each.value.value for name, each in result.figures.items()}


# --- pairs ---


def test_a_run_is_compared_with_its_base_on_what_training_held_out(trained, held_out):
    (found,) = qorpo.evaluate(trained, f"pairs:{held_out}", dtype="bfloat16").results
    evaluations = [row for row in read_metrics(trained) if "eval_loss" in row]
    best = min(evaluations, key=lambda row: row["eval_loss"])
    assert set(found.figures) >= METRICS
    for name, figure in found.figures.items():
        assert figure.value.value == pytest.approx(best[f"eval_{name}"], abs=0.02), name
        assert figure.base.value == pytest.approx(evaluations[0][f"eval_{name}"], abs=0.02), name
        assert figure.difference.value == pytest.approx(figure.value.value - figure.base.value, abs=1e-9)
        assert figure.difference.low <= figure.difference.value <= figure.difference.high
    assert found.figures["nll"].difference.high < 0  # it learned
    assert found.notes["dropped"] == {"same": 1, "empty": 1, "prompt_too_long": 1}
    assert (found.notes["pairs"], found.notes["prompts"]) == (21, 11)
    assert found.notes["cut"]["chosen"] == 1
    json.dumps(found.as_dict(), allow_nan=False)


def test_the_merged_model_against_its_base_says_the_same(trained, merged, base, held_out):
    (on_run,) = qorpo.evaluate(trained, f"pairs:{held_out}", limit=20).results
    (on_merged,) = qorpo.evaluate(merged, f"pairs:{held_out}", limit=20, against=str(base)).results
    for name in METRICS - {"rewards/accuracies"}:
        # Its weights are rounded to bfloat16, and the base in 16 bits is not the one in 4.
        assert on_merged.figures[name].value.value == pytest.approx(
            on_run.figures[name].value.value, abs=0.05
        ), name
    assert on_merged.figures["nll"].difference.high < 0


def test_a_model_alone_has_no_comparison(base, held_out):
    (found,) = qorpo.evaluate(base, f"pairs:{held_out}", limit=5).results
    assert found.notes["pairs"] == 5
    assert all(each.base is None and each.difference is None for each in found.figures.values())
    (alone,) = qorpo.evaluate(base, f"pairs:{held_out}", limit=5, against="none").results
    assert alone.figures == found.figures


def test_a_full_run_is_compared_with_the_model_it_started_from(recipe_dict, held_out):
    from helpers.tiny import changed

    recipe = changed(recipe_dict, tuning="full", train__max_steps=2, train__learning_rate=0.001)
    run = qorpo.train(recipe).output
    (found,) = qorpo.evaluate(run, f"pairs:{held_out}", limit=10).results
    assert found.notes["against"] == recipe["model"]["path"]
    assert found.figures["nll"].difference.value < 0


@pytest.mark.parametrize(
    ("objective", "own"),
    [
        ({"name": "simpo"}, lambda chosen, rejected: 2.0 * (chosen - rejected)),
        ({"name": "cpo"}, None),
        ({"name": "dpo"}, None),
        ({"name": "kto"}, None),
        ({"name": "sft"}, None),
    ],
)
def test_the_runs_own_objective_is_there_beside_likelihoods(recipe_dict, held_out, objective, own):
    from helpers.tiny import changed

    run = qorpo.train(changed(recipe_dict, objective=objective, train__max_steps=2)).output
    (found,) = qorpo.evaluate(run, f"pairs:{held_out}", limit=10).results
    assert set(found.figures) >= METRICS
    figures = values(found)
    assert found.notes["objective"] == (
        objective["name"] if objective["name"] not in ("sft", "kto") else "orpo"
    )
    if objective["name"] == "dpo":  # by sums of log-probs, relative to the model as it started
        assert found.figures["rewards/margins"].base.value == pytest.approx(0, abs=1e-9)
        assert figures["rewards/margins"] > 0
        assert found.figures["loss"].base.value == pytest.approx(math.log(2))
    if own is not None:
        assert figures["rewards/margins"] == pytest.approx(
            own(figures["chosen_logps"], figures["rejected_logps"])
        )


def test_differences_are_paired_by_prompt(trained, held_out, monkeypatch):
    seen = []

    def spy(values_P, prompts_P=None, **options):
        seen.append((np.asarray(values_P), prompts_P))
        return real(values_P, prompts_P, **options)

    from qorpo.evaluation import pairs

    real = pairs.mean_interval
    monkeypatch.setattr(pairs, "mean_interval", spy)
    qorpo.evaluate(trained, f"pairs:{held_out}", limit=20)
    assert {len(set(prompts)) for _, prompts in seen} == {10}
    (mine, _), (base, _), (difference, _) = seen[:3]
    assert difference == pytest.approx(mine - base)


# --- results ---


def test_results_go_into_the_run_folder_beside_earlier_ones_and_to_the_output(
    command, run, held_out, tmp_path
):
    (run / "evaluation.json").write_text(json.dumps({"earlier": {"figures": {}}}))
    output = tmp_path / "results.json"
    code, out, err = command("evaluate", run, "--on", f"pairs:{held_out}", "--output", output)
    assert code == 0, err
    head, *lines = out.splitlines()
    assert head == f"pairs:{held_out}"
    assert lines[0].split() == ["value", "95%", "interval", "base", "difference", "95%", "interval"]
    assert "  dropped: 1 same, 1 empty, 1 prompt_too_long" in lines
    assert set(json.loads((run / "evaluation.json").read_text())) == {"earlier", f"pairs:{held_out}"}
    written = json.loads(output.read_text())
    assert written["model"] == "run"
    assert set(written["results"][f"pairs:{held_out}"]["figures"]) >= METRICS
    assert qorpo.evaluate(run, "pairs:demo:eval", limit=3).written == [run / "evaluation.json"]
    # The run is what it was: it can be merged and resumed.
    qorpo.merge(run, tmp_path / "merged", check_only=True)


def test_what_fails_later_takes_no_earlier_result_along(run, held_out, monkeypatch):
    real = module._Pairs.run

    def fail_on_the_second(job):
        if job.source == "demo:eval":
            raise MemoryError
        return real(job)

    monkeypatch.setattr(module._Pairs, "run", fail_on_the_second)
    with pytest.raises(MemoryError):
        qorpo.evaluate(run, [f"pairs:{held_out}", "pairs:demo:eval"], limit=5)
    assert list(json.loads((run / "evaluation.json").read_text())) == [f"pairs:{held_out}"]


# --- answers ---


def prompts_file(path, count=4):
    return write_records(path, [{"prompt": f"What colour is thing {number}?"} for number in range(count)])


def test_diversity_of_a_model_that_answers_with_copies_is_1(encoder_folder, trained, tmp_path):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    options = {"samples": 3, "max_new_tokens": 8, "encoder": str(encoder_folder)}
    (drawn,) = qorpo.evaluate(trained, f"diversity:{prompts}", temperature=1.5, **options).results
    assert 0 < values(drawn)["per_input"] < 1 - 1e-6
    assert "Eq. 11" in drawn.notes["measure"]
    (copies,) = qorpo.evaluate(trained, f"diversity:{prompts}", temperature=1e-6, **options).results
    assert values(copies)["per_input"] == pytest.approx(1, abs=1e-6)


def test_answers_are_kept_and_taken_again_and_others_are_made_anew(
    monkeypatch, run, encoder_folder, tmp_path
):
    prompts = prompts_file(tmp_path / "prompts.jsonl")
    options = {"samples": 2, "max_new_tokens": 6, "encoder": str(encoder_folder)}
    (first,) = qorpo.evaluate(run, f"diversity:{prompts}", **options).results
    assert first.notes["answers"].startswith(str(run / "evaluation" / "diversity-"))

    def refuse(*arguments, **named):
        raise AssertionError("answered again")

    monkeypatch.setattr(module, "generate", refuse)
    (again,) = qorpo.evaluate(run, f"diversity:{prompts}", **options).results
    assert again.figures == first.figures
    whole = Path(first.notes["answers"]).read_text()
    for damaged, said in (
        (whole[:-9], "is no file of answers"),
        (whole[: whole.index("\n")], "holds 1 answers of 8"),
    ):
        Path(first.notes["answers"]).write_text(damaged)
        with pytest.raises(DamageError, match=said):
            qorpo.evaluate(run, f"diversity:{prompts}", **options)
    for change in ({"seed": 1}, {"limit": 3}, {"max_new_tokens": 7}, {"quantization": "none"}):
        with pytest.raises(AssertionError, match="answered again"):
            qorpo.evaluate(run, f"diversity:{prompts}", **options | change)


def test_ifeval_answers_and_scores(command, run, tmp_path):
    pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    records = [
        {
            "key": number,
            "prompt": f"Say {number} without commas.",
            "instruction_id_list": ["punctuation:no_comma"],
            "kwargs": [{}],
        }
        for number in range(3)
    ]
    prompts = write_records(tmp_path / "input.jsonl", records)
    code, _, err = command("evaluate", run, "--on", f"ifeval:{prompts}", "--max-new-tokens", 8, "--limit", 2)
    assert code == 0, err
    found = json.loads((run / "evaluation.json").read_text())[f"ifeval:{prompts}"]
    assert (found["notes"]["prompts"], found["notes"]["max new tokens"]) == (2, 8)
    assert found["figures"]["prompt_strict"]["value"]["value"] in (0, 0.5, 1)
    (answers,) = (run / "evaluation").glob("ifeval-*.jsonl")
    responses = [json.loads(line)["response"] for line in answers.read_text().splitlines()]
    share = sum("," not in text and bool(text) for text in responses) / 2
    assert found["figures"]["prompt_strict"]["value"]["value"] == share


# --- what is wrong ---


@pytest.mark.parametrize(
    ("on", "error", "said"),
    [
        ("pears:x", RecipeError, "--on pears:x: expected pairs:FILE"),
        ("pairs", RecipeError, "give pairs:FILE"),
        ("diversity", RecipeError, "give diversity:FILE"),
        ("lm-eval:", RecipeError, "give lm-eval:TASK"),
        ("pairs:no-such-file.jsonl", DataError, "no-such-file.jsonl"),
        ("diversity:no-such-file.jsonl", DataError, "no-such-file.jsonl"),
        ("ifeval:no-such-file.jsonl", QorpoError, "no-such-file.jsonl"),
    ],
)
def test_what_can_t_be_evaluated_is_one_message_before_weights_are_read(
    monkeypatch, trained, on, error, said
):
    if on.startswith("ifeval"):
        pytest.importorskip("lm_eval", reason="the extra eval is not installed")
    monkeypatch.setattr("qorpo.generation.load.load_model", lambda *_, **__: pytest.fail("weights were read"))
    with pytest.raises(error) as raised:
        qorpo.evaluate(trained, on)
    assert said in str(raised.value)


def test_a_model_with_another_tokenizer_is_no_comparison(trained, held_out):
    with pytest.raises(RecipeError, match="has another tokenizer"):
        qorpo.evaluate(trained, f"pairs:{held_out}", against="demo")
    with pytest.raises(ModelError, match="no folder"):
        qorpo.evaluate(trained, f"pairs:{held_out}", against="./no-such")
    with pytest.raises(RecipeError, match="--limit: got 0"):
        qorpo.evaluate(trained, f"pairs:{held_out}", limit=0)
