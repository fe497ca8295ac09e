"""Objectives with a reference, trained: the reference is the model as it starts, and outlives kills, damage and loss."""

import json
import math
import shutil

import pytest
import torch
from helpers.tiny import changed, preference_records, read_metrics, short_recipe, write_records
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import qorpo
import qorpo.training.reference as reference_module
from qorpo.data.groups import Group
from qorpo.data.references import Mismatched, WithReference, partners
from qorpo.errors import DataError, RunError
from qorpo.model.load import load_model
from qorpo.planning.plan import plan
from qorpo.training.progress import Progress

LOG2 = math.log(2)
NAMES = ("dpo", "ipo", "sppo", "mmpo", "kto")


class Killed(BaseException):
    """Passes every `except Exception`, as a kill would."""


class KillAt(Progress):
    """Ends a run after a step, or in the pass that scores the reference."""

    def __init__(self, step=None, scored=None):
        self.at_step, self.at_scored = step, scored

    def step(self, done_steps):
        if done_steps == self.at_step:
            raise Killed

    def scored(self, done_groups, total_groups):
        if self.at_scored is not None and done_groups >= self.at_scored:
            raise Killed


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """40 pairs with scores, which serve every objective."""
    records = [
        {**record, "score_chosen": 8 + place % 3, "score_rejected": 5}
        for place, record in enumerate(preference_records())
    ]
    return write_records(tmp_path_factory.mktemp("data") / "scored.jsonl", records)


def recipe_for(base, data, output, name, **changes):
    keys = {"beta": 0.02} if name == "sppo" else {}
    settings = {"train__learning_rate": 0.002, "data__eval": 0.25, "objective": {"name": name, **keys}}
    return changed(short_recipe(base, data, output), **(settings | changes))


def adapter(run):
    return (run / "adapter" / "adapter_model.safetensors").read_bytes()


def evaluations(run):
    return [row for row in read_metrics(run) if "eval_loss" in row]


# --- what the reference is ---


@pytest.mark.parametrize("name", NAMES)
def test_an_objective_with_a_reference_trains(base, data, tmp_path, name):
    qorpo.train(recipe_for(base, data, tmp_path / "run", name))
    first, *_, last = evaluations(tmp_path / "run")
    assert last["eval_loss"] < first["eval_loss"]
    assert first["eval_rewards/margins"] == 0.0  # the policy is the reference, to the bit
    assert last["eval_rewards/margins"] > 0.0
    if name in ("dpo", "mmpo"):
        assert first["eval_loss"] == pytest.approx(LOG2, rel=1e-12)
        (step, *_) = (row for row in read_metrics(tmp_path / "run") if "loss" in row)
        assert step["loss"] == pytest.approx(LOG2, rel=1e-12)


def plain_logps(model, group):
    """The sum of each response's log-probs by the model's own logits."""
    found = []
    for response in group.responses:
        ids = torch.tensor([[*group.prompt_ids, *response]])
        with torch.no_grad():
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        own = logps[torch.arange(ids.shape[1] - 1), ids[0, 1:]]
        found.append(own[-len(response) :].sum().item())
    return found


@pytest.mark.parametrize("name", ["dpo", "kto"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_the_reference_is_the_base_by_its_own_logits(base, data, tmp_path, name, tuning):
    recipe = recipe_for(base, data, tmp_path / "run", name, tuning=tuning, train__max_steps=2)
    recipe = changed(recipe, model__quantization="none", train__learning_rate=0.01)
    trainer = qorpo.train(recipe).trainer
    model = load_model(str(base), quantization="none").float().eval()
    for groups in (trainer.train_pairs, trainer.eval_pairs):
        for group in groups:
            assert group.reference_logps == pytest.approx(plain_logps(model, group), abs=0.4)  # bfloat16
            if name == "kto":
                other = group.mismatched
                assert other.prompt_ids == group.prompt_ids
                assert other.reference_logps == pytest.approx(plain_logps(model, other), abs=0.4)
    kept = load_file(tmp_path / "run" / "reference" / "logps.safetensors")
    assert {tensor.dtype for tensor in kept.values()} == {torch.float64}
    parts = {"train", "eval"} | ({"train.mismatched", "eval.mismatched"} if name == "kto" else set())
    assert kept.keys() == parts


def test_an_adapter_that_training_goes_on_from_is_the_start(make_trainer):
    def adapted():
        torch.manual_seed(0)
        model = get_peft_model(load_model(str(path)), LoraConfig(r=4, target_modules="all-linear"))
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.05)
        return model

    path = make_trainer().recipe.model.path
    trainer = make_trainer(adapted(), objective={"name": "dpo"}, train__max_steps=2)
    trainer.train()
    assert evaluations(trainer.folder.path)[0]["eval_loss"] == pytest.approx(LOG2, rel=1e-12)
    fresh = make_trainer(objective={"name": "dpo"}, train__max_steps=2)
    fresh.train()
    assert fresh.eval_pairs[0].reference_logps != trainer.eval_pairs[0].reference_logps


def test_an_evaluation_before_there_is_a_reference_is_refused(make_trainer):
    with pytest.raises(RunError, match="dpo needs the reference, which is scored as `train` begins"):
        make_trainer(objective={"name": "dpo"}).evaluate()


# --- kto's mismatched answers ---


def test_partners_have_another_prompt_and_follow_from_the_seed():
    prompts = [(number // 2,) for number in range(40)]  # rows of pairs: each prompt twice
    found = partners(prompts, 1)
    assert all(prompts[place] != prompts[partner] for place, partner in enumerate(found))
    assert found == partners(prompts, 1)
    assert found != partners(prompts, 2)
    assert len(set(found)) > 20  # no answer serves all
    crowded = partners(["a"] * 9 + ["b"], 0)
    assert crowded[:9] == [9] * 9
    assert crowded[9] < 9
    assert partners(["a", "a"], 0) == partners(["a"], 0) == []


def test_a_mismatched_answer_makes_no_row_longer_than_the_longest():
    groups = [Group((1,) * 50, ((2, 3),), "a"), Group((4,), ((5,) * 40,), "b")]
    first, second = Mismatched(groups, 0)
    assert (first.lengths, second.lengths) == ((50, 2), (1, 2))
    assert first.responses == ((5, 5),)
    assert first.source == "a with b"


def test_groups_with_a_reference_are_a_sequence():
    groups = [Group((1,), ((place,), (9,)), str(place)) for place in range(3)]
    found = WithReference(groups, torch.arange(6.0).view(3, 2).tolist())
    assert [each.reference_logps for each in found] == [(0, 1), (2, 3), (4, 5)]
    assert found[-1] == found[1:][1]
    assert found[-1].responses == ((2,), (9,))
    with pytest.raises(IndexError):
        found[3]


def test_one_prompt_alone_has_no_partner(base, tmp_path):
    rows = [{"prompt": "Why?", "completion": text, "label": text < "C"} for text in ("A.", "B.", "C.", "D.")]
    path = write_records(tmp_path / "rows.jsonl", rows)
    with pytest.raises(DataError, match=r"data\.train: objective\.name: kto .* its 4 rows have one prompt"):
        qorpo.train(recipe_for(base, path, tmp_path / "run", "kto", data__eval=None))


def test_pairs_and_their_labelled_answers_train_kto_to_the_same_adapter(base, data, tmp_path):
    rows = [
        {"prompt": record["prompt"], "completion": record[side], "label": side == "chosen"}
        for record in preference_records()
        for side in ("chosen", "rejected")
    ]
    labelled = write_records(tmp_path / "rows.jsonl", rows)
    for path, output in ((data, "pairs"), (labelled, "rows")):
        qorpo.train(recipe_for(base, path, tmp_path / output, "kto", train__max_steps=3))
    assert adapter(tmp_path / "pairs") == adapter(tmp_path / "rows")
    assert any(row["kl"] > 0 for row in read_metrics(tmp_path / "rows") if "kl" in row)


# --- what happens to it ---


@pytest.fixture(scope="module", params=["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def undisturbed(request, base, data, tmp_path_factory):
    """A run that nothing stopped, and the recipe of one to be disturbed."""
    folder = tmp_path_factory.mktemp(request.param)
    recipe = recipe_for(base, data, folder / "run", request.param, lora__dropout=0.1, train__eval_every=4)
    qorpo.train(recipe)
    return recipe, folder / "run"


def stopped(undisturbed, output, **when):
    recipe = changed(undisturbed[0], output=str(output))
    with pytest.raises(Killed):
        qorpo.train(recipe, progress=KillAt(**when))
    return recipe


def assert_same_end(run, undisturbed):
    _, other = undisturbed
    assert adapter(run) == adapter(other)
    name = "reference/logps.safetensors"
    assert (run / name).read_bytes() == (other / name).read_bytes()


def count_passes(monkeypatch):
    passes = []
    score = reference_module._scored
    monkeypatch.setattr(reference_module, "_scored", lambda *given: passes.append(1) or score(*given))
    return passes


@pytest.mark.parametrize("step", [1, 5])
def test_a_run_killed_after_the_reference_was_made_reads_it_and_ends_the_same(
    undisturbed, tmp_path, monkeypatch, step
):
    recipe = stopped(undisturbed, tmp_path / "run", step=step)
    passes = count_passes(monkeypatch)
    qorpo.train(recipe, resume=True)
    assert not passes
    assert_same_end(tmp_path / "run", undisturbed)


def test_a_run_killed_while_the_reference_was_made_makes_it_anew(undisturbed, tmp_path):
    recipe = stopped(undisturbed, tmp_path / "run", scored=20)
    assert not (tmp_path / "run" / "reference").exists()
    qorpo.train(recipe, resume=True)
    assert_same_end(tmp_path / "run", undisturbed)


@pytest.mark.parametrize(
    "fate",
    [
        "flipped",
        "lost",
        pytest.param("torn", marks=pytest.mark.slow),
        pytest.param("no manifest", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_reference_is_named_and_made_again_from_the_start(undisturbed, tmp_path, caplog, fate):
    recipe = stopped(undisturbed, tmp_path / "run", step=5)  # trained weights are in the checkpoint
    place = tmp_path / "run" / "reference"
    file = place / "logps.safetensors"
    if fate == "flipped":
        content = bytearray(file.read_bytes())
        content[-3] ^= 1
        file.write_bytes(content)
    elif fate == "torn":
        file.write_bytes(file.read_bytes()[:100])
    elif fate == "no manifest":
        (place / "qorpo-manifest.json").unlink()
    else:
        shutil.rmtree(place)
    qorpo.train(recipe, resume=True)
    if fate in ("flipped", "torn"):
        assert f"{file}: is damaged" in caplog.text
        assert "it is made again" in caplog.text
    assert_same_end(tmp_path / "run", undisturbed)


def test_another_runs_reference_is_refused(undisturbed, base, data, tmp_path):
    recipe = stopped(undisturbed, tmp_path / "run", step=5)
    qorpo.train(
        recipe_for(
            base, data, tmp_path / "other", recipe["objective"]["name"], train__seed=7, train__max_steps=1
        )
    )
    shutil.rmtree(tmp_path / "run" / "reference")
    shutil.copytree(tmp_path / "other" / "reference", tmp_path / "run" / "reference")
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    with pytest.raises(RunError, match=r"reference: was made with something else(.|\n)*train\.seed: .* 7"):
        qorpo.train(recipe, resume=True)
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before


def test_all_parameters_killed_and_resumed_without_their_reference_end_the_same(base, data, tmp_path):
    def run(name):
        keys = {"tuning": "full", "train__learning_rate": 0.001, "train__max_steps": 5}
        return recipe_for(base, data, tmp_path / name, "dpo", **keys)

    qorpo.train(run("whole"))
    with pytest.raises(Killed):
        qorpo.train(run("killed"), progress=KillAt(step=4))
    shutil.rmtree(tmp_path / "killed" / "reference")
    qorpo.train(run("killed"), resume=True)
    for name in ("reference/logps.safetensors", "model/model.safetensors"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_pass_that_runs_out_of_memory_goes_on_in_smaller_micro_batches(base, data, tmp_path, monkeypatch):
    from qorpo.engine import step
    from qorpo.training import session

    def short(scorer, groups, *, microbatch_tokens, **options):
        if microbatch_tokens > 150:
            raise MemoryError("no room")
        return step.summed_logps(scorer, groups, microbatch_tokens=microbatch_tokens, **options)

    monkeypatch.setattr(session, "summed_logps", short)
    result = qorpo.train(recipe_for(base, data, tmp_path / "run", "dpo", train__max_steps=1))
    assert result.trainer.recipe.memory.microbatch_tokens <= 150
    assert evaluations(tmp_path / "run")[0]["eval_loss"] == pytest.approx(LOG2, rel=1e-12)


def test_a_pass_for_which_memory_is_too_small_ends_with_advice(base, data, tmp_path, monkeypatch):
    from qorpo.training import session

    def never(*_, **__):
        raise MemoryError("no room")

    monkeypatch.setattr(session, "summed_logps", never)
    with pytest.raises(RunError, match=r"out of memory.*lower memory's keys, and resume"):
        qorpo.train(recipe_for(base, data, tmp_path / "run", "dpo"))
    monkeypatch.undo()
    qorpo.train(recipe_for(base, data, tmp_path / "run", "dpo", train__max_steps=1), resume=True)


# --- plans, and progress ---


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_plan_counts_an_objective_with_a_reference(name):
    recipe = {
        "model": {"path": "demo"}, "data": {"train": "demo", "max_length": 128, "max_prompt_length": 64},
        "memory": {"microbatch_tokens": 1, "activation_checkpointing": False}, "output": "unused",
    }  # fmt: skip
    like = {"kto": "sft"}.get(name, "simpo")
    found, other = (plan(recipe, [f"objective.name={each}"], budget_gib=2.0) for each in (name, like))
    assert found.peak_gib == pytest.approx(other.peak_gib, rel=0.01)


def test_the_pass_tells_how_far_it_is(base, data, tmp_path):
    seen = []

    class Watch(Progress):
        def scored(self, done_groups, total_groups):
            seen.append((done_groups, total_groups))

    qorpo.train(recipe_for(base, data, tmp_path / "run", "dpo", train__max_steps=1), progress=Watch())
    report = json.loads((tmp_path / "run" / "data.json").read_text())
    total = report["train"]["kept"] + report["eval"]["kept"]
    assert seen[-1] == (total, total)
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert len(seen) > 2
