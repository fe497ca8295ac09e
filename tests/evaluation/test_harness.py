"""Tasks of lm-evaluation-harness through the real harness, on data made here: adapter on NF4 and merged model alike."""

import json

import pytest

import qorpo
from qorpo.errors import DataError

pytest.importorskip("lm_eval", reason="the extra eval is not installed")

from qorpo.evaluation import harness

CHOICE = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
GENERATION = """
task: tiny_generation
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{target}}}}"
generation_kwargs: {{until: ["?"], max_gen_toks: 8, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
UNREACHABLE = """
task: tiny_unreachable
dataset_path: nobody/no-such-data-set
output_type: multiple_choice
test_split: test
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
"""
THINGS = ("sky", "sea", "grass", "snow")


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with a task of each kind."""
    folder = tmp_path_factory.mktemp("tasks")
    rows = [
        {
            "question": f"What colour is the {thing}?",
            "choices": [f"The {thing} is a fine thing.", "No.", "x"],
            "answer": 0,
            "target": f"The {thing}",
        }
        for thing in THINGS
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("generation", GENERATION), ("unreachable", UNREACHABLE)):
        data = folder / "data.jsonl"
        (folder / f"{name}.yaml").write_text(text if name == "unreachable" else text.format(data=data))
    return folder


def run(model, tasks, **options):
    (found,) = qorpo.evaluate(
        model, "lm-eval:tiny_choice,tiny_generation", task_folder=tasks, **options
    ).results
    return found


def test_choices_and_answers_on_the_adapter_and_the_merged_model(trained, merged, tasks):
    on_adapter, on_merged = run(trained, tasks), run(merged, tasks)
    assert set(on_adapter.figures) == {
        "tiny_choice acc", "tiny_choice acc_norm", "tiny_generation exact_match",
    }  # fmt: skip
    assert on_adapter.notes["chat template"] is True
    for name, figure in on_adapter.figures.items():
        assert figure.value.low <= figure.value.value <= figure.value.high
        assert on_merged.figures[name].value.value == figure.value.value
    json.dumps(on_adapter.as_dict(), allow_nan=False)


def test_the_harness_scores_as_qorpo_does(trained, tasks):
    """The likeliest choice by the harness is the one by the model's own logits behind its chat template."""
    import torch

    model, tokenizer = qorpo.load(trained)
    right = 0
    for line in (tasks / "data.jsonl").read_text().splitlines():
        row = json.loads(line)
        question = [{"role": "user", "content": row["question"]}]
        prompt = tokenizer.apply_chat_template(question, tokenize=False, add_generation_prompt=True)
        sums = []
        for choice in row["choices"]:
            start = tokenizer(prompt, add_special_tokens=False)["input_ids"]
            ids = tokenizer(prompt + choice, add_special_tokens=False)["input_ids"]
            with torch.no_grad():
                logps = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
            sums.append(sum(logps[place - 1, ids[place]].item() for place in range(len(start), len(ids))))
        right += sums.index(max(sums)) == row["answer"]
    assert run(trained, tasks).figures["tiny_choice acc"].value.value == right / len(THINGS)


def test_the_limit_is_the_harness_own(trained, tasks, monkeypatch):
    seen = []
    real = harness.needed("lm_eval.models.huggingface", "lm-eval").HFLM.loglikelihood
    monkeypatch.setattr(
        "lm_eval.models.huggingface.HFLM.loglikelihood",
        lambda self, requests, **options: seen.extend(requests) or real(self, requests, **options),
    )
    assert run(trained, tasks, limit=2).notes["limit"] == 2
    assert len(seen) == 2 * 3  # two documents of three choices


def test_what_can_t_be_loaded_is_one_message(trained, tasks, monkeypatch):
    monkeypatch.setattr("qorpo.generation.load.load_model", lambda *_, **__: pytest.fail("weights were read"))
    for asked, said in (
        ("tiny_choice,no_such_task", "unknown task no_such_task"),
        ("tiny_unreachable", "tiny_unreachable: can't be loaded"),
        ("arc_easy", "arc_easy: can't be loaded"),
    ):
        with pytest.raises(DataError) as raised:
            qorpo.evaluate(trained, f"lm-eval:{asked}", task_folder=tasks)
        assert said in str(raised.value)
        assert "\n" not in str(raised.value)
    with pytest.raises(DataError, match="is no folder"):
        qorpo.evaluate(trained, "lm-eval:tiny_choice", task_folder=tasks / "choice.yaml")
