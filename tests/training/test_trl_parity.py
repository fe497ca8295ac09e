"""The same loss and gradient as TRL's ORPOTrainer, on the very tokens it makes, under the conventions it follows.

TRL averages the NLL over the prompt's and the response's tokens of its batch: `nll_tokens: all, nll_average: token`.
Its `log_odds_chosen` is our log_odds_ratio, and its `log_odds_ratio` is minus our odds_ratio_loss.
"""

import os

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qorpo.data.groups import Group
from qorpo.engine.step import run_step
from qorpo.model.scoring import Scorer
from qorpo.objectives.orpo import Orpo

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")  # it warns of its name at import
orpo = pytest.importorskip("trl.experimental.orpo", reason="TRL, to compare with, is not installed")
datasets = pytest.importorskip("datasets", reason="datasets, which TRL needs, is not installed")

# Its configuration warns of a keyword that releases of transformers before 5.23 know by no other name.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")

WEIGHT = 0.3
TOLERANCE = 1e-5  # float32, and TRL computes a padded batch
WORDS = [f"w{index}" for index in range(60)]

# Uneven in prompts and in responses, so that padding, and what a mean is over, matter.
TEXTS = [
    {"prompt": "w1 w2 w3 w4 w5 w6 w7", "chosen": " w8 w9", "rejected": " w10 w11 w12 w13 w14 w15"},
    {"prompt": "w16", "chosen": " w17 w18 w19 w20 w21 w22 w23 w24 w25", "rejected": " w26"},
    {"prompt": "w27 w28 w29", "chosen": " w30 w31 w32", "rejected": " w33 w34 w30"},
    {"prompt": "w35 w36 w37 w38", "chosen": " w39", "rejected": " w40 w41 w42 w43 w39"},
]


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=1, eos_token_id=2, attention_dropout=0.0,
    )  # fmt: skip
    return LlamaForCausalLM(config).float()


@pytest.fixture
def trainer(model, tokenizer, tmp_path):
    """TRL's own trainer, on the CPU, for one step of all pairs at once: no accumulation."""
    arguments = orpo.ORPOConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=len(TEXTS), gradient_accumulation_steps=1,
        max_steps=1, learning_rate=0.0, logging_steps=1, save_strategy="no", report_to="none", beta=WEIGHT,
        max_length=64, bf16=False, fp16=False, use_cpu=True, gradient_checkpointing=False, seed=0,
        dataloader_pin_memory=False, disable_tqdm=True, remove_unused_columns=False, max_grad_norm=0.0,
    )  # fmt: skip
    yield orpo.ORPOTrainer(
        model=model,
        args=arguments,
        train_dataset=datasets.Dataset.from_list(TEXTS),
        processing_class=tokenizer,
    )
    # Accelerate's states are the process's: the next test's are its own.
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def batch_of(trainer) -> dict[str, torch.Tensor]:
    (batch,) = trainer.get_train_dataloader()
    return batch


def pairs_of(batch: dict[str, torch.Tensor]) -> list[Group]:
    """TRL's padded batch as pairs: a prompt is what it does not label, padding what it does not attend to."""

    def side(index: int, name: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
        there = batch[f"{name}_attention_mask"][index].bool()
        ids, labels = batch[f"{name}_input_ids"][index][there], batch[f"{name}_labels"][index][there]
        learned = labels != -100
        assert torch.equal(ids[learned], labels[learned])
        return tuple(ids[~learned].tolist()), tuple(ids[learned].tolist())

    pairs = []
    for index in range(len(batch["chosen_input_ids"])):
        (prompt, chosen), (same_prompt, rejected) = side(index, "chosen"), side(index, "rejected")
        assert prompt == same_prompt
        pairs.append(Group(prompt, (chosen, rejected), f"pairs:{index}"))
    return pairs


def qorpo_step(model, pairs, *, microbatch_tokens: int = 10_000, nll_tokens="all", nll_average="token"):
    """qorpo's metrics, as numbers, and the gradient of every parameter."""
    objective = Orpo(weight=WEIGHT, nll_tokens=nll_tokens, nll_average=nll_average)
    scorer = Scorer(model, "sdpa", chunk_tokens=16)
    with scorer.packed_attention():
        metrics = run_step(
            scorer, pairs, objective,
            microbatch_tokens=microbatch_tokens, device=torch.device("cpu"), backward=torch.Tensor.backward,
        )  # fmt: skip
    return {name: value.item() for name, value in metrics.items()}, gradients_of(model)


def gradients_of(model) -> dict[str, torch.Tensor]:
    grads = {name: parameter.grad for name, parameter in model.named_parameters()}
    model.zero_grad()
    return grads


def trl_step(trainer, model, batch):
    loss, metrics = trainer.compute_loss(model, batch, return_outputs=True)
    loss.backward()
    return {"loss": loss.item(), **metrics}, gradients_of(model)


def in_our_names(trl: dict[str, float]) -> dict[str, float]:
    return {
        "loss": trl["loss"],
        "nll": trl["nll_loss"],
        "odds_ratio_loss": -trl["log_odds_ratio"],
        "log_odds_ratio": trl["log_odds_chosen"],
        "chosen_logps": trl["logps/chosen"],
        "rejected_logps": trl["logps/rejected"],
        "rewards/accuracies": trl["rewards/accuracies"],
        "rewards/margins": trl["rewards/margins"],
    }


def test_the_batch_is_what_it_is_to_be(trainer, tokenizer):
    # TRL shuffles; the prompts' lengths tell the pairs apart.
    pairs = sorted(pairs_of(batch_of(trainer)), key=lambda pair: len(pair.prompt_ids))
    for pair, texts in zip(pairs, sorted(TEXTS, key=lambda texts: len(texts["prompt"])), strict=True):
        assert tokenizer.decode(pair.prompt_ids) == f"<s> {texts['prompt']}"
        assert tokenizer.decode(pair.responses[0]) == f"{texts['chosen'].strip()} </s>"
        assert tokenizer.decode(pair.responses[1]) == f"{texts['rejected'].strip()} </s>"


@pytest.mark.parametrize("microbatch_tokens", [1, 40, 10_000])
def test_loss_metrics_and_gradient_are_trls(trainer, model, microbatch_tokens):
    model.eval()
    batch = batch_of(trainer)
    trl_metrics, trl_grads = trl_step(trainer, model, batch)
    metrics, grads = qorpo_step(model, pairs_of(batch), microbatch_tokens=microbatch_tokens)
    expected = in_our_names(trl_metrics)
    assert metrics.keys() == expected.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(expected[name], rel=TOLERANCE, abs=TOLERANCE), name
    for name, grad in grads.items():
        error = (grad - trl_grads[name]).norm() / trl_grads[name].norm()
        assert error < TOLERANCE, f"{name}: {error:.1e}"


@pytest.mark.parametrize(
    ("nll_tokens", "nll_average"), [("response", "sequence"), ("response", "token"), ("all", "sequence")]
)
def test_the_other_conventions_are_not_trls(trainer, model, nll_tokens, nll_average):
    # So the one that is makes a difference on this batch, far above the tolerance.
    batch = batch_of(trainer)
    trl_metrics, _ = trl_step(trainer, model, batch)
    metrics, _ = qorpo_step(model, pairs_of(batch), nll_tokens=nll_tokens, nll_average=nll_average)
    expected = in_our_names(trl_metrics)
    assert abs(metrics["loss"] - expected["loss"]) > 1000 * TOLERANCE
    assert metrics["odds_ratio_loss"] == pytest.approx(expected["odds_ratio_loss"], rel=TOLERANCE)


def test_what_trl_logs_in_a_run_of_its_own(trainer, model):
    # Its whole training loop, one step with a learning rate of 0, so that the model stays as it is.
    pairs = pairs_of(batch_of(trainer))
    trainer.train()
    logged = in_our_names(trainer.state.log_history[0])
    metrics, grads = qorpo_step(model, pairs)
    assert metrics.keys() == logged.keys()
    for name, value in metrics.items():
        assert value == pytest.approx(logged[name], rel=TOLERANCE, abs=TOLERANCE), name
    grad_norm = torch.stack([grad.norm() for grad in grads.values()]).norm().item()
    assert grad_norm == pytest.approx(trainer.state.log_history[0]["grad_norm"], rel=TOLERANCE)
