"""The verification: its figures against plain ones in float64, and that it catches a merge that is wrong."""

import json
import logging
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers.architectures import SHARED, build
from helpers.lora_folders import add_adapter, load, save_base
from helpers.tiny import make_base, preference_records, write_records
from safetensors.torch import load_file, save_file

import qorpo
from qorpo.data.groups import Group
from qorpo.data.pack import pack_groups
from qorpo.errors import RunError
from qorpo.manifest import MANIFEST
from qorpo.merging import merge as merging
from qorpo.merging.source import find_base, find_trained
from qorpo.merging.verify import THRESHOLDS, Verification, _Scores, verify_merged, with_adapters
from qorpo.model.load import load_model
from qorpo.model.sequences import own_logps, sequences
from qorpo.objectives.orpo import Orpo
from qorpo.objectives.simpo import Simpo

PAIRS = [
    Group((5, 9, 30), ((7, 8, 9, 10), (11, 12)), "a"),
    Group((6,), ((70, 80), (90, 91, 92)), "b"),
    Group((40, 41), ((60,), (61, 62, 63)), "c"),
]
CPU = torch.device("cpu")


def plain_kl(reference, merged):
    """(S,) in float64, from each model's own logits of each sequence alone."""
    divergences = []
    with torch.no_grad():
        for ids, predictors, _ in sequences(pack_groups(PAIRS)):
            own, others = (
                model(ids).logits[0, predictors].double().log_softmax(-1) for model in (reference, merged)
            )
            divergences.append((own.exp() * (own - others)).sum(-1))
    return torch.cat(divergences)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere", "granite", "phi", "gpt2"])
def test_the_divergence_is_that_of_the_models_own_logits(name):
    """Caps, scales and biases of the head included."""
    reference, merged = build(name).float(), build(name).float()
    with torch.no_grad():
        for parameter in merged.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    objective = Orpo()
    scores = [_Scores.of(model, PAIRS, objective) for model in (reference, merged)]
    comparison = scores[0].compared_with(scores[1], "the reference", judged=True)
    kl_S = plain_kl(reference, merged)
    assert comparison.figures["kl_mean"] == pytest.approx(kl_S.mean().item(), rel=1e-4)
    assert comparison.figures["kl_worst"] == pytest.approx(kl_S.max().item(), rel=1e-4)
    chosen = [own_logps(model, pack_groups(PAIRS[:1])) for model in (reference, merged)]
    assert chosen[0].shape == (6,)
    assert comparison.figures["nll"] == pytest.approx(comparison.after["nll"] - comparison.before["nll"])
    assert comparison.figures["nll"] == -comparison.figures["chosen_logps"]


def test_an_objective_without_an_nll_is_judged_by_what_it_has():
    model = build("llama").float()
    scores = _Scores.of(model, PAIRS, Simpo())
    other = replace(scores, metrics={**scores.metrics, "chosen_logps": scores.metrics["chosen_logps"] - 1})
    same, changed = (scores.compared_with(each, "the reference", judged=True) for each in (scores, other))
    assert same.failed == []
    assert changed.failed == ["chosen_logps"]
    assert same.thresholds == {name: most for name, most in THRESHOLDS.items() if name != "nll"}
    assert not any("nll" in line for line in Verification(len(PAIRS), 1, [same]).lines())


@pytest.mark.parametrize("average", ["sequence", "token"])
def test_prompts_count_where_the_run_learned_them(average):
    """`nll_tokens: all`: their tokens are in the NLL as in training, and compared as well."""
    model = build("llama").float()
    scores = _Scores.of(model, PAIRS, Orpo(nll_tokens="all", nll_average=average))
    whole = [torch.tensor([pair.prompt_ids + pair.responses[0]]) for pair in PAIRS]
    with torch.no_grad():
        own = [
            F.cross_entropy(model(ids).logits[0, :-1].double(), ids[0, 1:], reduction="none") for ids in whole
        ]
    nll = torch.stack([each.mean() for each in own]) if average == "sequence" else torch.cat(own)
    assert scores.metrics["nll"] == pytest.approx(nll.mean().item(), rel=1e-5)
    prompts = sum(len(pair.prompt_ids) - 1 for pair in PAIRS)
    responses = sum(len(pair.responses[0]) + len(pair.responses[1]) for pair in PAIRS)
    assert len(scores.hidden_SH) == responses + prompts


@pytest.fixture(scope="module")
def real(tmp_path_factory):
    """A base with a tokenizer, an adapter on it as if trained, and pairs."""
    folder = tmp_path_factory.mktemp("real")
    base = make_base(folder / "base")
    adapter = add_adapter(load(base), base, folder / "adapter")
    return base, adapter, write_records(folder / "pairs.jsonl", preference_records()[:12])


def test_a_merge_in_float32_is_verified_in_float32(real, tmp_path):
    """What bfloat16 rounds away is no difference there."""
    _, adapter, pairs = real
    found = {
        dtype: qorpo.merge(adapter, tmp_path / dtype, dtype=dtype, verify=pairs).verification.comparisons[0]
        for dtype in ("float32", "bfloat16")
    }
    assert abs(found["float32"].figures["kl_mean"]) < 1e-8
    assert abs(found["float32"].figures["nll"]) < 1e-6
    assert found["bfloat16"].figures["kl_mean"] > 1e-7


def test_a_merge_is_verified_by_given_pairs(real, tmp_path):
    _, adapter, pairs = real
    result = qorpo.merge(adapter, tmp_path / "model", verify=pairs)
    assert result.verification.passed
    assert result.verification.pairs == 12
    (comparison,) = result.verification.comparisons
    assert set(THRESHOLDS) <= set(comparison.figures)
    assert "verification: passed" in result.verification.lines()


@pytest.mark.parametrize("onto", ["original", "dequantized"])
@pytest.mark.parametrize("mistake", ["a module left out", "half the scale"])
def test_a_wrong_merge_fails(mistake, onto, real, tmp_path):
    base, adapter, pairs = real
    output = tmp_path / "model"
    weighted = f"{adapter}=0.5" if mistake == "half the scale" else str(adapter)
    merging.merge(weighted, output, onto=onto, verify=False)
    if mistake == "a module left out":
        merged, own = (load_file(folder / "model.safetensors") for folder in (output, base))
        left_out = {
            name: tensor for name, tensor in own.items() if name.endswith("layers.1.mlp.down_proj.weight")
        }
        save_file(merged | left_out, output / "model.safetensors", {"format": "pt"})
        (output / MANIFEST).unlink()  # it would notice
    trained = find_trained(str(adapter))
    verification = verify_merged(
        output, find_base([trained], None, None), [trained.adapter],
        merging.evaluation_pairs(pairs, None, str(base)),
        references=["nf4" if onto == "dequantized" else "none"], objective=Orpo(), device=CPU,
    )  # fmt: skip
    assert not verification.passed
    assert verification.lines()[-1] == "verification: FAILED"


def test_a_failed_verification_ends_the_command_with_1_and_keeps_the_report(
    real, tmp_path, command, monkeypatch
):
    _, adapter, pairs = real
    monkeypatch.setitem(THRESHOLDS, "kl_mean", 0.0)
    code, out, err = command("merge", adapter, "--output", tmp_path / "model", "--verify", pairs)
    assert code == 1, err
    assert "kl_mean: +0.0" in out
    assert "too far" in out
    assert out.endswith("verification: FAILED\n")
    assert '"verdict": "fail"' in (tmp_path / "model" / "verification.json").read_text()


def test_several_plain_adapters_are_verified_together(real, tmp_path):
    base, adapter, pairs = real
    second = add_adapter(
        load(base), base, tmp_path / "second", seed=2, r=2, target_modules=["q_proj", "up_proj"]
    )
    result = qorpo.merge(adapter, tmp_path / "model", adapters=[f"{second}=0.5"], verify=pairs)
    assert result.verification.passed
    dora = add_adapter(load(base), base, tmp_path / "dora", seed=3, use_dora=True)
    with pytest.raises(RunError, match="only where all are plain LoRA; give --no-verify"):
        qorpo.merge(adapter, tmp_path / "no-model", adapters=[str(dora)], verify=pairs)
    assert not (tmp_path / "no-model").exists()


def test_added_tokens_are_verified(real, tmp_path):
    base, _, pairs = real
    grown = load(base)
    grown.resize_token_embeddings(grown.config.vocab_size + 5)
    adapter = add_adapter(grown, base, tmp_path / "grown")
    result = qorpo.merge(adapter, tmp_path / "model", verify=pairs)
    assert result.verification.passed


@pytest.mark.parametrize("name", sorted(SHARED))
def test_merged_is_as_near_to_the_adapter_on_4_bits_as_rounding_allows(name, tmp_path):
    """Every architecture, both bases: the dequantized one is what training saw, the original is not."""
    base = save_base(build(name, initializer_range=0.1), tmp_path / "base", torch.bfloat16)
    adapter = add_adapter(load(base), base, tmp_path / "adapter")
    with_adapter = with_adapters(load_model(str(base)), [find_trained(str(adapter)).adapter]).eval()
    means = {}
    for onto in ("original", "dequantized"):
        merging.merge(adapter, tmp_path / onto, onto=onto)
        means[onto] = (
            plain_kl(with_adapter, load_model(str(tmp_path / onto), quantization="none")).mean().item()
        )
    assert means["dequantized"] < 0.5 * means["original"]
    assert means["dequantized"] < 0.01


# --- memory ---


def test_too_little_memory_is_told_before_anything_is_written(real, tmp_path, monkeypatch, caplog):
    _, adapter, pairs = real
    monkeypatch.setattr(merging, "memory_free", lambda _: 1 << 29)
    with pytest.raises(
        RunError, match=r"verifying needs about 1\.\d\d GiB of memory, and 0\.50 GiB are free"
    ):
        qorpo.merge(adapter, tmp_path / "model", verify=pairs)
    assert not (tmp_path / "model").exists()


def test_without_being_asked_for_it_is_left_out_with_a_word(real, tmp_path, caplog):
    _, adapter, _ = real
    with caplog.at_level(logging.WARNING, "qorpo"):
        result = qorpo.merge(adapter, tmp_path / "model")
    assert result.verification is None
    assert "not verified: the run has no evaluation pairs" in caplog.text


# --- a verification that did not come to its end ---


def verdict(folder):
    return json.loads((folder / "verification.json").read_text())["verdict"]


def ended_by(error):
    def verify_merged(*_, **__):
        raise error

    return verify_merged


@pytest.fixture
def unverified(real, tmp_path):
    """The options of a merge that was not verified, and its folder."""
    _, adapter, pairs = real
    merging.merge(adapter, tmp_path / "model", verify=False)
    assert verdict(tmp_path / "model") == "not verified"
    return ("merge", adapter, "--output", tmp_path / "model", "--verify", pairs), tmp_path / "model"


@pytest.mark.parametrize("finish", [(), ("--verify-only",)])
@pytest.mark.parametrize(
    ("error", "exit_code", "reason"),
    [
        (KeyboardInterrupt(), 130, "qorpo: stopped; "),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "out of memory (CUDA out of memory. Tried)"),
        (MemoryError(), 2, "out of memory ("),
        (OSError(28, "No space left on device"), 2, "No space left on device); make room"),
    ],
    ids=["stopped", "card", "host", "disk"],
)
def test_a_verification_that_ended_early_is_finished_later(
    error, exit_code, reason, finish, real, tmp_path, command, monkeypatch
):
    """And the weights are not written again."""
    _, adapter, pairs = real
    output = tmp_path / "model"
    options = ("merge", adapter, "--output", output, "--verify", pairs)
    with monkeypatch.context() as patch:
        patch.setattr(merging, "verify_merged", ended_by(error))
        code, out, err = command(*options)
    assert code == exit_code, err
    assert reason in err
    assert f"{output} is merged and not verified; verify it by the same command, or with --verify-only" in err
    assert "verification" not in out
    assert verdict(output) == "not verified"
    written = (output / "model.safetensors").stat().st_mtime_ns
    code, out, err = command(*options, *finish)
    assert code == 0, err
    assert "verification: passed" in out
    assert verdict(output) == "pass"
    assert (output / "model.safetensors").stat().st_mtime_ns == written


def test_a_verified_model_is_verified_again_only_where_that_is_asked_for(unverified, command):
    options, output = unverified
    assert command(*options)[0] == 0
    code, _, err = command(*options)
    assert code == 2
    assert (
        "is there already, merged and verified; give another output, or verify it again with --verify-only"
        in err
    )
    code, out, err = command(*options, "--verify-only")
    assert code == 0, err
    assert "verification: passed" in out
    assert verdict(output) == "pass"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (("--onto", "dequantized"), "was merged from or by another onto"),
        (("--dtype", "float32"), "was merged from or by another dtype"),
        (("--check-only",), "not together with --no-verify or --check-only"),
    ],
)
def test_verify_only_refuses_what_was_merged_otherwise(changes, message, unverified, command):
    options, output = unverified
    code, _, err = command(*options, *changes, "--verify-only")
    assert code == 2
    assert message in err
    assert verdict(output) == "not verified"


def test_a_merge_of_another_adapter_does_not_pass_for_the_one_that_is_there(
    real, unverified, command, tmp_path
):
    base, _, _ = real
    other = add_adapter(load(base), base, tmp_path / "other", r=2)
    (_, _, *options), output = unverified
    for more, message in ((("--verify-only",), "another adapters"), ((), "something is there already")):
        code, _, err = command("merge", other, *options, *more)
        assert code == 2
        assert message in err
    assert verdict(output) == "not verified"


def test_verify_only_needs_a_merged_model_and_an_undamaged_record(unverified, command):
    options, output = unverified
    code, _, err = command(*options[:3], output.with_name("elsewhere"), "--verify-only")
    assert code == 2
    assert "holds no model that qorpo merged; leave it out to merge" in err
    path = output / "verification.json"
    path.write_text(path.read_text().replace("not verified", "pass"))
    code, _, err = command(*options, "--verify-only")
    assert code == 2
    assert f"{path}: is damaged; remove {output} and merge again" in err
