"""`Trainer` from Python: what trains and what does not, what is written, and which adapter is kept."""

import json
import math

import pytest
import torch
from helpers.tiny import make_base, read_metrics
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from qorpo import Trainer
from qorpo.build import OBJECTIVES
from qorpo.data.pack import pack_groups
from qorpo.engine.step import run_step
from qorpo.errors import ModelError, RunError
from qorpo.model.adapters import attach_lora
from qorpo.model.load import load_model, load_tokenizer
from qorpo.model.selfcheck import make_scorer
from qorpo.objectives.base import Headline
from qorpo.objectives.orpo import Orpo


def adapter_bytes(trainer, folder=None):
    return ((folder or trainer.folder.adapter) / "adapter_model.safetensors").read_bytes()


def stir(trainer):
    """Adapters as training leaves them: LoRA's B starts at 0, where A has no gradient."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if "lora_B" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.05)


def gradients(trainer):
    """Of everything that trains, over the first 10 pairs; dropout drawn from the same seed each time."""
    torch.manual_seed(7)
    trainer.model.train()
    with trainer.session.unwrapped.packed_attention():
        run_step(
            trainer.session.scorer, trainer.train_pairs[:10], trainer.objective,
            backward=trainer.session.accelerator.backward, device=trainer.session.accelerator.device,
            microbatch_tokens=trainer.recipe.memory.microbatch_tokens,
        )  # fmt: skip
    found = {
        name: weight.grad.clone()
        for name, weight in trainer.model.named_parameters()
        if weight.grad is not None
    }
    trainer.model.zero_grad()
    return found


def assert_equal(gradients, others):
    assert set(gradients) == set(others)
    assert all(gradient.any() for gradient in gradients.values())
    for name in gradients:
        assert torch.equal(gradients[name], others[name]), name


def logps(model, trainer, mode="sdpa"):
    packed = pack_groups(trainer.eval_pairs)
    model.eval()
    scorer = make_scorer(model, mode)
    with torch.no_grad(), scorer.packed_attention():
        return scorer(packed)


# --- what trains ---


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("tied", [False, True])
def test_only_lora_trains_in_float32_and_the_base_stays_as_it_was(
    make_trainer, tmp_path, base, quantization, tied
):
    path = make_base(tmp_path / "tied", tie_word_embeddings=True) if tied else base
    model = load_model(str(path), quantization=quantization)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    trainer = make_trainer(model, path=path, train__max_steps=3)
    first = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
    trainer.train()

    for name, weight in trainer.model.named_parameters():
        assert weight.requires_grad == ("lora_" in name), name
        if weight.requires_grad:
            assert weight.dtype == torch.float32
            assert not torch.equal(weight, first[name]), name
        else:
            plain = name.removeprefix("base_model.model.").replace("base_layer.", "")
            assert torch.equal(weight, before.pop(plain)), name
    assert not before
    inner = trainer.model.get_base_model()
    embeddings, head = inner.get_input_embeddings().weight, inner.get_output_embeddings().weight
    assert embeddings.dtype == head.dtype == torch.bfloat16
    assert (embeddings is head) == tied
    assert not any("embed" in name or "lm_head" in name for name in load_adapter_file(trainer))


def load_adapter_file(trainer):
    return load_file(trainer.folder.adapter / "adapter_model.safetensors")


def test_a_peft_model_trains_as_the_same_adapters_attached_by_qorpo(make_trainer, base):
    plain = make_trainer(train__max_steps=3)
    plain.train()
    torch.manual_seed(plain.recipe.train.seed)
    model = attach_lora(load_model(str(base)), rank=4, alpha=8)
    given = make_trainer(model, train__max_steps=3, lora__rank=99)  # the recipe's lora is for plain models
    assert given.model is model
    given.train()
    assert adapter_bytes(given) == adapter_bytes(plain)


def test_a_model_wrapped_by_peft_alone_trains(make_trainer, base):
    model = get_peft_model(load_model(str(base)), LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    trainer = make_trainer(model, train__max_steps=2)
    trainer.train()
    assert len(load_adapter_file(trainer)) == 2 * 2 * 2


def test_a_trained_adapter_trains_on_and_a_frozen_one_is_refused(make_trainer, base):
    first = make_trainer(train__max_steps=2)
    first.train()
    model = PeftModel.from_pretrained(load_model(str(base)), str(first.folder.adapter), is_trainable=True)
    again = make_trainer(model, train__max_steps=2)
    again.train()
    assert adapter_bytes(again) != adapter_bytes(first)
    frozen = PeftModel.from_pretrained(load_model(str(base)), str(first.folder.adapter))
    with pytest.raises(ModelError, match="is_trainable=True"):
        make_trainer(frozen)


@pytest.mark.parametrize("tied", [False, True])
def test_a_head_named_in_modules_to_save_trains_and_is_loaded_by_peft(make_trainer, base, tmp_path, tied):
    path = make_base(tmp_path / "tied", tie_word_embeddings=True) if tied else base
    trainer = make_trainer(path=path, lora__modules_to_save=["lm_head"], train__max_steps=4)
    head = trainer.model.get_output_embeddings().modules_to_save["default"].weight
    before, embeddings = head.detach().clone(), trainer.model.get_input_embeddings().weight
    embeddings_before = embeddings.clone()
    assert head.dtype == torch.float32
    trainer.train()
    assert (head - before).abs().max() > 1e-3
    assert torch.equal(embeddings, embeddings_before)
    saved = load_adapter_file(trainer)
    (name,) = (name for name in saved if "lm_head" in name)
    assert torch.equal(saved[name], head)

    loaded = PeftModel.from_pretrained(load_model(str(path)), str(trainer.folder.adapter))
    own, theirs = logps(trainer.model, trainer), logps(loaded, trainer)
    untrained = logps(load_model(str(path)), trainer)
    assert (own - theirs).abs().mean() < 0.03 * (own - untrained).abs().mean()


def test_an_embedding_named_in_modules_to_save_trains(make_trainer):
    trainer = make_trainer(lora__modules_to_save=["embed_tokens"], train__max_steps=2)
    trainer.train()
    saved = load_adapter_file(trainer)
    (name,) = (name for name in saved if "embed_tokens" in name)
    inner = trainer.model.get_base_model()
    assert saved[name].dtype == torch.float32
    assert not torch.equal(saved[name], inner.model.embed_tokens.original_module.weight.float())
    assert inner.lm_head.weight.dtype == torch.bfloat16


# --- gradients that must not change ---


@pytest.mark.parametrize("made_by", ["qorpo", "transformers"])
def test_an_evaluation_leaves_nf4_gradients_as_they_were(make_trainer, base, made_by):
    model = None
    if made_by == "transformers":
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(
            base, dtype=torch.bfloat16, quantization_config=config, device_map={"": "cpu"}
        )
    trainer = make_trainer(model)
    stir(trainer)
    before = gradients(trainer)
    trainer.evaluate()
    assert_equal(gradients(trainer), before)


def test_without_that_care_they_would_be_wrong(make_trainer):
    """What the test above guards against still is in bitsandbytes: when this fails, the care can go."""
    from bitsandbytes.functional import has_avx512bf16
    from bitsandbytes.nn import Linear4bit

    if not has_avx512bf16():
        pytest.skip("this processor has no avx512_bf16, where bitsandbytes repacks weights for evaluation")
    trainer = make_trainer()
    stir(trainer)
    for module in trainer.model.modules():
        if isinstance(module, Linear4bit):
            module.support_avx512bf16_for_cpu = True
        if isinstance(module, LoraLayer):
            del module.forward  # the sum in place is an error there; PEFT's own is silent
    before = gradients(trainer)
    trainer.evaluate()
    after = gradients(trainer)
    wrong = max(
        ((after[name] - before[name]).norm() / before[name].norm()).item() if name in after else math.inf
        for name in before
    )
    assert wrong > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_checkpointing_changes_no_gradient(make_trainer, base, dtype):
    found = []
    for is_on in (False, True):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        trainer = make_trainer(model, memory__activation_checkpointing=is_on, lora__dropout=0.3)
        stir(trainer)
        found.append(gradients(trainer))
    assert_equal(*found)


def test_the_micro_batch_changes_no_gradient(make_trainer, base):
    found = []
    for tokens in (1, 150, 100_000):
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        trainer = make_trainer(model, memory__microbatch_tokens=tokens)
        stir(trainer)
        found.append(gradients(trainer))
    for other in found[1:]:
        for name, gradient in found[0].items():
            torch.testing.assert_close(other[name], gradient, atol=1e-6, rtol=1e-4)


# --- dropout and seeds ---


def test_dropout_is_at_work_in_training_and_not_in_evaluation(make_trainer):
    plain, dropped = make_trainer(), make_trainer(lora__dropout=0.5)
    for trainer in (plain, dropped):
        stir(trainer)
    figures = [trainer.evaluate() for trainer in (plain, dropped, dropped)]
    assert figures[0]["eval_loss"] == figures[1]["eval_loss"] == figures[2]["eval_loss"]
    ours, others = gradients(plain), gradients(dropped)
    assert any(not torch.equal(ours[name], others[name]) for name in ours)
    assert_equal(gradients(dropped), others)


def test_a_run_is_decided_by_its_seed(make_trainer):
    def adapter(**changes):
        trainer = make_trainer(train__max_steps=3, lora__dropout=0.1, **changes)
        trainer.train()
        return adapter_bytes(trainer)

    once = adapter()
    assert adapter() == once
    assert adapter(train__seed=43) != once


# --- evaluation ---


def test_evaluation_has_every_metric_of_a_step_under_its_own_name(make_trainer):
    trainer = make_trainer()
    metrics = trainer.evaluate()
    assert set(metrics) == {
        f"eval_{name}"
        for name in (
            "loss", "nll", "odds_ratio_loss", "log_odds_ratio", "chosen_logps", "rejected_logps",
            "rewards/accuracies", "rewards/margins", "pairs_per_second",
        )
    }  # fmt: skip
    assert all(math.isfinite(value) for value in metrics.values())
    assert not any(weight.grad is not None for weight in trainer.model.parameters())


def test_evaluation_needs_pairs(make_trainer):
    with pytest.raises(RunError, match=r"data\.eval"):
        make_trainer(has_eval=False).evaluate()


# --- the order of pairs ---


@pytest.mark.parametrize("pairs_per_step", [1, 7, 10, 30, 64])
def test_every_epoch_has_each_pair_once_in_an_order_of_its_own(make_trainer, pairs_per_step):
    trainer = make_trainer(train__pairs_per_step=pairs_per_step)
    steps = trainer.order.steps_per_epoch
    assert steps == math.ceil(30 / pairs_per_step)
    epochs = []
    for epoch in range(3):
        batches = [trainer.groups_of_step(step) for step in range(epoch * steps, (epoch + 1) * steps)]
        assert all(len(batch) == pairs_per_step for batch in batches[:-1])
        epochs.append([pair.source for batch in batches for pair in batch])
    everything = {f"train.jsonl:{line}" for line in range(1, 31)}
    assert all(len(epoch) == 30 and set(epoch) == everything for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[0] != sorted(epochs[0])


@pytest.mark.parametrize(
    ("keys", "steps"),
    [
        ({"epochs": 1}, 3),
        ({"epochs": 2.5}, 8),
        ({"epochs": 0.34}, 1),
        ({"epochs": 0.01}, 1),
        ({"epochs": 9, "max_steps": 5}, 5),
        ({"epochs": 2, "pairs_per_step": 7}, 10),
    ],
)
def test_epochs_may_be_fractions_and_max_steps_wins(make_trainer, keys, steps):
    keys = {"max_steps": None, "epochs": 1, **keys}
    trainer = make_trainer(**{f"train__{name}": value for name, value in keys.items()})
    assert trainer.total_steps == steps


# --- what is written ---


def test_every_step_and_every_evaluation_has_a_row(make_trainer):
    trainer = make_trainer(train__max_steps=7, train__eval_every=3, train__save_every=100, train__log_every=2)
    returned = trainer.train()
    rows = read_metrics(trainer.folder.path)
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 3, 6, 7]
    steps = [row for row in rows if "loss" in row]
    assert [row["step"] for row in steps] == list(range(1, 8))
    for row in steps:
        assert set(row) == {
            "step", "epoch", "loss", "nll", "odds_ratio_loss", "log_odds_ratio", "chosen_logps", "rejected_logps",
            "rewards/accuracies", "rewards/margins", "grad_norm", "learning_rate", "tokens_per_second",
            "pairs_per_second", "peak_memory_gib",
        }  # fmt: skip
        assert row["epoch"] == pytest.approx(row["step"] / 3)
        assert row["loss"] == pytest.approx(row["nll"] + 0.1 * row["odds_ratio_loss"])
        assert row["grad_norm"] > 0
        assert row["tokens_per_second"] > row["pairs_per_second"] > 0
        assert 0.01 < row["peak_memory_gib"] < 100
    assert [row["learning_rate"] for row in steps[:2]] == [0.005, 0.005]  # one step of warm-up
    for row in rows:
        if "loss" not in row:
            assert all(name == "step" or name.startswith("eval_") for name in row)
    last = rows[-1].copy()
    del last["step"]
    assert returned == last


def test_without_evaluation_the_last_step_is_kept_and_returned(make_trainer):
    trainer = make_trainer(has_eval=False, train__max_steps=3, train__log_every=1)
    returned = trainer.train()
    assert trainer.state.best_step is None
    assert returned["loss"] == read_metrics(trainer.folder.path)[-1]["loss"]
    assert adapter_bytes(trainer) == adapter_bytes(trainer, trainer.folder.checkpoint(3))


def test_a_single_step_trains(make_trainer):
    trainer = make_trainer(train__max_steps=1)
    trainer.train()
    changed = [weight for name, weight in load_adapter_file(trainer).items() if "lora_B" in name]
    assert changed
    assert all(weight.any() for weight in changed)


def test_what_is_returned_is_the_last_steps_own(make_trainer):
    trainer = make_trainer(has_eval=False, train__max_steps=4, train__log_every=3)
    returned = trainer.train()
    *_, last = read_metrics(trainer.folder.path)
    assert returned == {name: value for name, value in last.items() if name != "step"}


def test_tensorboard_has_what_metrics_has(make_trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make_trainer(train__report_to=["tensorboard"], train__max_steps=4)
    trainer.train()
    accumulator = EventAccumulator(str(trainer.folder.path / "trackers" / "qorpo"))
    accumulator.Reload()
    rows = read_metrics(trainer.folder.path)
    for name in ("loss", "eval_loss", "learning_rate", "rewards/accuracies"):
        expected = [(row["step"], row[name]) for row in rows if name in row]
        found = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert found == [(step, pytest.approx(value, rel=1e-5)) for step, value in expected]


def test_peft_alone_loads_the_adapter_to_the_same_log_probs(make_trainer, base):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    trainer = make_trainer(model, train__max_steps=4)
    trainer.train()
    bare = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logps(bare, trainer)
    loaded = PeftModel.from_pretrained(bare, str(trainer.folder.adapter))
    torch.testing.assert_close(logps(loaded, trainer), logps(trainer.model, trainer), atol=1e-5, rtol=0)
    assert (logps(loaded, trainer) - before).abs().mean() > 0.1


def test_peft_alone_loads_the_adapter_onto_nf4_within_bfloat16(make_trainer, base):
    trainer = make_trainer(train__max_steps=4)
    trainer.train()
    bare = load_model(str(base))
    before = logps(bare, trainer)
    loaded = PeftModel.from_pretrained(bare, str(trainer.folder.adapter))
    ours, theirs = logps(trainer.model, trainer), logps(loaded, trainer)
    assert (ours - theirs).abs().mean() < 0.03 * (ours - before).abs().mean()


def test_save_writes_adapter_and_tokenizer_anywhere(make_trainer, tmp_path):
    trainer = make_trainer()
    trainer.save(tmp_path / "new" / "folder")
    assert (tmp_path / "new" / "folder" / "adapter_model.safetensors").is_file()
    tokenizer = load_tokenizer(str(tmp_path / "new" / "folder"))
    assert tokenizer.chat_template == trainer.tokenizer.chat_template
    assert not trainer.folder.path.exists()


def test_a_folder_is_trained_in_once(make_trainer):
    trainer = make_trainer(train__max_steps=1)
    trainer.train()
    with pytest.raises(RunError, match="holds a run"):
        trainer.train()


# --- the best adapter ---


def with_losses(monkeypatch, losses):
    """Let evaluations find these losses, by step."""

    def evaluate(trainer):
        return {"eval_loss": losses[trainer.state.step]}

    monkeypatch.setattr(Trainer, "evaluate", evaluate)


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize("best", [2, 4, 8])
def test_the_best_checkpoint_outlives_the_others_and_becomes_the_adapter(
    make_trainer, monkeypatch, keep, best
):
    losses = {step: 5.0 + step for step in (0, 2, 4, 6, 8)} | {best: 1.0}
    with_losses(monkeypatch, losses)
    trainer = make_trainer(train__keep_checkpoints=keep)
    trainer.train()
    assert trainer.state.best_step == best
    assert trainer.folder.checkpoint_steps() == sorted({best, *[6, 8][-keep:]})
    assert adapter_bytes(trainer) == adapter_bytes(trainer, trainer.folder.checkpoint(best))
    assert (adapter_bytes(trainer) == adapter_bytes(trainer, trainer.folder.checkpoint(8))) == (best == 8)
    in_memory = {name.replace(".default", ""): w for name, w in trainer.model.named_parameters()}
    for name, weight in load_adapter_file(trainer).items():
        assert torch.equal(in_memory[name], weight)


def test_a_best_evaluation_is_saved_even_off_the_saving_beat(make_trainer, monkeypatch):
    with_losses(monkeypatch, {step: abs(step - 3) for step in range(9)})
    trainer = make_trainer(train__eval_every=1, train__save_every=5, train__keep_checkpoints=1)
    trainer.train()
    assert trainer.state.best_step == 3
    assert trainer.folder.checkpoint_steps() == [3, 8]


def test_of_equal_evaluations_the_first_is_best(make_trainer, monkeypatch):
    with_losses(monkeypatch, dict.fromkeys(range(9), 1.0) | {0: 2.0})
    trainer = make_trainer()
    trainer.train()
    assert trainer.state.best_step == 2


@pytest.mark.parametrize("name", ["probability_ratio", "cpo", "simpo", "asft"])
def test_the_objective_that_the_recipe_names_is_trained(make_trainer, name):
    trainer = make_trainer(objective={"name": name}, train__max_steps=4, train__learning_rate=0.01)
    assert trainer.objective == OBJECTIVES[name]()
    trainer.train()
    rows = read_metrics(trainer.folder.path)
    evaluations = [row for row in rows if "eval_loss" in row]
    assert set(trainer.objective.metrics) <= set(rows[1])
    assert {f"eval_{metric}" for metric in trainer.objective.metrics} <= set(evaluations[0])
    assert evaluations[-1]["eval_loss"] < evaluations[0]["eval_loss"]
    assert evaluations[-1]["eval_rewards/margins"] > evaluations[0]["eval_rewards/margins"]


def test_what_is_best_is_the_objectives_to_say(make_trainer, monkeypatch):
    accuracies = {0: 0.5, 2: 0.9, 4: 0.7, 6: 0.9, 8: 0.6}
    monkeypatch.setattr(
        Trainer,
        "evaluate",
        lambda trainer: {"eval_loss": -trainer.state.step, "eval_accuracy": accuracies[trainer.state.step]},
    )
    trainer = make_trainer()

    class ByAccuracy(Orpo):
        headline = Headline("accuracy", lower_is_better=False)

    trainer.objective = ByAccuracy()
    trainer.train()
    assert (trainer.state.best_step, trainer.state.best_headline) == (2, 0.9)


@pytest.mark.parametrize("keep", [1, 2])
def test_where_training_only_made_it_worse_the_start_is_best(make_trainer, monkeypatch, caplog, keep):
    with_losses(monkeypatch, {step: 0.29 + step for step in (0, 2, 4, 6, 8)})
    trainer = make_trainer(train__keep_checkpoints=keep)
    start = {name: w.detach().clone() for name, w in trainer.model.named_parameters() if w.requires_grad}
    trainer.train()
    assert (trainer.state.best_step, trainer.state.best_headline) == (0, 0.29)
    assert trainer.folder.checkpoint_steps() == sorted({0, *[6, 8][-keep:]})
    saved = load_adapter_file(trainer)
    for name, weight in start.items():
        assert torch.equal(saved[name.replace(".default", "")], weight)
        assert torch.equal(dict(trainer.model.named_parameters())[name], weight)
    assert (
        "held-out loss rose from 0.2900 to 8.2900: this run made the model worse; lower train.learning_rate. What is kept "
        "is the start (step 0), which was best"
    ) in caplog.text


def test_a_run_that_falls_and_then_rises_above_its_start_says_so(make_trainer, monkeypatch, caplog):
    with_losses(monkeypatch, {0: 0.29, 2: 0.2, 4: 1.0, 6: 2.0, 8: 3.11})
    trainer = make_trainer()
    trainer.train()
    assert "rose from 0.2900 to 3.1100: this run made the model worse" in caplog.text
    assert "What is kept is step 2, where it was 0.2000" in caplog.text
    assert adapter_bytes(trainer) == adapter_bytes(trainer, trainer.folder.checkpoint(2))


def test_a_run_that_ends_below_its_start_is_not_scolded(make_trainer, monkeypatch, caplog):
    with_losses(monkeypatch, {0: 0.29, 2: 0.2, 4: 0.21, 6: 0.22, 8: 0.28})
    make_trainer().train()
    assert "worse" not in caplog.text


def test_a_run_that_overshoots_ends_with_its_best(make_trainer):
    trainer = make_trainer(
        train__learning_rate=0.1,
        train__schedule="constant",
        train__warmup_ratio=0,
        train__eval_every=1,
        train__max_steps=3,
    )
    trainer.train()
    losses = {
        row["step"]: row["eval_loss"] for row in read_metrics(trainer.folder.path) if "eval_loss" in row
    }
    best = min(losses, key=losses.get)
    assert best != trainer.total_steps, "the run did not overshoot; this test needs one that does"
    assert trainer.state.best_step == best
    assert trainer.evaluate()["eval_loss"] == losses[best]


# --- divergence ---


def poison(trainer):
    with torch.no_grad():
        trainer.session.trained[0].fill_(math.nan)


def test_a_loss_that_is_no_number_ends_the_run_with_the_remedy(make_trainer, monkeypatch):
    trainer = make_trainer(has_eval=False, train__save_every=2)
    step = Trainer._step

    def step_and_break(trainer):
        if trainer.state.step == 4:
            poison(trainer)
        step(trainer)

    monkeypatch.setattr(Trainer, "_step", step_and_break)
    with pytest.raises(RunError, match=r"step 5: loss nan.*lower train\.learning_rate"):
        trainer.train()
    assert trainer.folder.checkpoint_steps() == [2, 4]
    assert not trainer.folder.adapter.exists()


def test_an_evaluation_that_is_no_number_ends_the_run_too(make_trainer, monkeypatch):
    with_losses(monkeypatch, {0: 1.0, 2: 1.0, 4: math.nan})
    trainer = make_trainer()
    with pytest.raises(RunError, match=r"step 4: .*lower train\.learning_rate"):
        trainer.train()
    assert trainer.folder.checkpoint_steps() == [0, 2]
    assert trainer.state.best_step == 0


def test_an_absurd_learning_rate_never_ends_in_an_adapter_without_numbers(make_trainer):
    trainer = make_trainer(train__learning_rate=1e30, train__warmup_ratio=0)
    with pytest.raises(RunError, match=r"lower train\.learning_rate"):
        trainer.train()
    assert not trainer.folder.adapter.exists()


# --- clipping ---


def test_gradients_are_clipped_to_the_norm_and_never_where_that_is_off(make_trainer):
    def norm_at_the_optimizer(max_grad_norm):
        trainer = make_trainer(train__max_grad_norm=max_grad_norm, has_eval=False)
        stir(trainer)
        norms = []
        trainer.session.optimizer.optimizer.register_step_pre_hook(
            lambda *_: norms.append(math.sqrt(sum(w.grad.square().sum() for w in trainer.session.trained)))
        )
        trainer._step()
        trainer.folder.path.mkdir()
        trainer.metrics.write_steps(1, trainer.order.steps_per_epoch)
        return norms[0], trainer.metrics.last_step["grad_norm"]

    whole, reported = norm_at_the_optimizer(None)
    assert whole == pytest.approx(reported, rel=1e-4)
    assert norm_at_the_optimizer(0)[0] == pytest.approx(whole, rel=1e-6)
    clipped, reported = norm_at_the_optimizer(whole / 10)
    assert clipped == pytest.approx(whole / 10, rel=1e-3)
    assert reported == pytest.approx(whole, rel=1e-4)


def test_state_is_readable(make_trainer):
    trainer = make_trainer(train__max_steps=2)
    trainer.train()
    state = json.loads((trainer.folder.checkpoint(2) / "state.json").read_text())
    assert state["step"] == state["best_step"] == 2
    assert state["best_headline"] == read_metrics(trainer.folder.path)[-1]["eval_loss"]
