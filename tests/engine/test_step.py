"""A step's metrics and gradient are those of its pairs, whatever the micro-batches. Legend: P pairs, S scored tokens."""

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from qorpo.data.groups import Group
from qorpo.data.pack import PackedGroups, pack_groups
from qorpo.engine import step
from qorpo.engine.distributed import Ranks
from qorpo.engine.step import kl_estimate, run_step, score_groups, scores_of, summed_logps
from qorpo.model.scoring import Scorer
from qorpo.objectives.asft import Asft
from qorpo.objectives.base import Totals
from qorpo.objectives.cpo import Cpo
from qorpo.objectives.dpo import Dpo
from qorpo.objectives.ipo import Ipo
from qorpo.objectives.kto import Kto
from qorpo.objectives.mmpo import Mmpo
from qorpo.objectives.orpo import Orpo
from qorpo.objectives.probability_ratio import ProbabilityRatio
from qorpo.objectives.sft import Sft
from qorpo.objectives.simpo import Simpo
from qorpo.objectives.sppo import Sppo

CPU = torch.device("cpu")
CONVENTIONS = list(itertools.product(("response", "all"), ("sequence", "token")))
WEIGHT = 0.25
TINY, MEDIUM, HUGE = 1, 45, 10_000  # tokens a row: a pair each, some to a row, all in one
# transformers computes RMSNorm in float32 whatever the model's type; these have none, so 1e-10 can be asked of them.
# GPT-2's head is its embedding and trains; GPT-NeoX's is its own, and is frozen here.
ARCHITECTURES = ("gpt2", "gpt-neox")


def objective_of(nll_tokens: str = "response", nll_average: str = "sequence") -> Orpo:
    return Orpo(weight=WEIGHT, nll_tokens=nll_tokens, nll_average=nll_average)


def make_pairs() -> list[Group]:
    """Seven pairs of very uneven lengths, from one token a part to more than MEDIUM in all."""
    generator = random.Random(0)
    lengths = [(1, 1, 1), (5, 2, 9), (1, 12, 3), (14, 1, 7), (3, 4, 4), (20, 17, 25), (6, 6, 1)]
    return [
        Group.of((generator.choices(range(97), k=count) for count in counts), f"pairs:{line}")
        for line, counts in enumerate(lengths)
    ]


@pytest.fixture(scope="module", params=ARCHITECTURES)
def model(request):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(Path(__file__).parents[1] / "model")
        from helpers.architectures import build

        model = build(request.param)
    if request.param == "gpt-neox":
        model.get_output_embeddings().requires_grad_(False)
    return model


def gradients_of(model) -> dict[str, torch.Tensor]:
    """The gradients that are there, taken off the model."""
    grads = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    model.zero_grad()
    assert all(grad is not None for grad in grads.values())
    return grads


def step_of(model, pairs, objective: Orpo, microbatch_tokens: int, mode="sdpa"):
    """Metrics and gradients by qorpo."""
    scorer = Scorer(model, mode, chunk_tokens=7)
    with scorer.packed_attention():
        metrics = run_step(
            scorer,
            pairs,
            objective,
            microbatch_tokens=microbatch_tokens,
            device=CPU,
            backward=torch.Tensor.backward,
        )
    return metrics, gradients_of(model)


def paper_step(model, pairs: Sequence[Group], nll_tokens: str, nll_average: str):
    """The same straight from the paper: each sequence alone through the model, no packing, no micro-batch, no
    rearranged formula."""
    rows = []
    nll_sum, nll_count = torch.zeros((), dtype=torch.float64), 0
    for pair in pairs:
        logps = {}
        for side, response in (("chosen", pair.responses[0]), ("rejected", pair.responses[1])):
            ids = torch.tensor([[*pair.prompt_ids, *response]])
            probabilities = model(input_ids=ids, use_cache=False).logits[0, :-1].softmax(-1)
            logps[side] = probabilities[torch.arange(ids.shape[1] - 1), ids[0, 1:]].log()
        learned = logps["chosen"] if nll_tokens == "all" else logps["chosen"][-len(pair.responses[0]) :]
        nll_sum, nll_count = nll_sum - learned.sum(), nll_count + len(learned)

        log_p_chosen = logps["chosen"][-len(pair.responses[0]) :].mean()
        log_p_rejected = logps["rejected"][-len(pair.responses[1]) :].mean()
        odds_chosen, odds_rejected = (p.exp() / (1 - p.exp()) for p in (log_p_chosen, log_p_rejected))
        odds_ratio = odds_chosen / odds_rejected  # Eq. 1
        rows.append(
            {
                "nll": -learned.mean(),  # Eqs. 2-3
                "odds_ratio_loss": -torch.log(torch.sigmoid(torch.log(odds_ratio))),  # Eq. 5
                "log_odds_ratio": torch.log(odds_ratio),
                "chosen_logps": log_p_chosen,
                "rejected_logps": log_p_rejected,
                "rewards/accuracies": (log_p_chosen > log_p_rejected).double(),
                "rewards/margins": WEIGHT * (log_p_chosen - log_p_rejected),
            }
        )
    metrics = {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
    if nll_average == "token":
        metrics["nll"] = nll_sum / nll_count
    metrics["loss"] = metrics["nll"] + WEIGHT * metrics["odds_ratio_loss"]  # Eq. 4
    metrics["loss"].backward()
    return {name: value.detach() for name, value in metrics.items()}, gradients_of(model)


def assert_same_step(first, second, tolerance=1e-10):
    for got, expected in zip(first, second, strict=True):
        assert got.keys() == expected.keys()
        for name, value in got.items():
            torch.testing.assert_close(value, expected[name], rtol=0, atol=tolerance, msg=name)


# --- on a model ---


@pytest.mark.parametrize(("nll_tokens", "nll_average"), CONVENTIONS)
def test_a_step_is_the_papers_whatever_its_micro_batches(model, nll_tokens, nll_average):
    pairs = make_pairs()
    expected = paper_step(model, pairs, nll_tokens, nll_average)
    assert max(grad.abs().max() for grad in expected[1].values()) > 1e-2  # there is something to compare
    for microbatch_tokens in (TINY, MEDIUM, HUGE):
        step = step_of(model, pairs, objective_of(nll_tokens, nll_average), microbatch_tokens)
        assert_same_step(step, expected)


@pytest.mark.parametrize(("nll_tokens", "nll_average"), CONVENTIONS)
def test_a_step_does_not_depend_on_the_order_of_its_pairs(model, nll_tokens, nll_average):
    pairs, objective = make_pairs(), objective_of(nll_tokens, nll_average)
    expected = step_of(model, pairs, objective, HUGE)
    shuffled = random.Random(1).sample(pairs, k=len(pairs))
    for order in (pairs[::-1], shuffled):
        for microbatch_tokens in (TINY, MEDIUM, HUGE):
            assert_same_step(step_of(model, order, objective, microbatch_tokens), expected)


@pytest.mark.parametrize("mode", ["dense", "separate"])
def test_a_step_does_not_depend_on_the_way_of_attending(model, mode):
    pairs, objective = make_pairs(), objective_of("all", "token")
    expected = step_of(model, pairs, objective, MEDIUM)
    assert_same_step(step_of(model, pairs, objective, MEDIUM, mode), expected)


def test_the_four_conventions_are_four_losses(model):
    losses = {
        convention: step_of(model, make_pairs(), objective_of(*convention), HUGE)[0]["loss"].item()
        for convention in CONVENTIONS
    }
    for one, other in itertools.combinations(losses.values(), 2):
        assert abs(one - other) > 1e-3


def test_scoring_alone_gives_the_same_metrics_and_no_gradient(model):
    pairs, objective = make_pairs(), objective_of()
    expected, _ = step_of(model, pairs, objective, MEDIUM)
    scorer = Scorer(model, "sdpa")
    with torch.no_grad(), scorer.packed_attention():
        metrics = run_step(scorer, pairs, objective, microbatch_tokens=TINY, device=CPU)
    assert_same_step((metrics, {}), (expected, {}))
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("microbatch_tokens", [TINY, MEDIUM, HUGE])
@pytest.mark.parametrize("nll_average", ["sequence", "token"])
def test_each_groups_own_figures_come_in_the_order_of_the_groups(model, nll_average, microbatch_tokens):
    pairs, objective = make_pairs(), objective_of("all", nll_average)
    pairs = [*pairs, pairs[2]]  # one group twice
    scorer = Scorer(model, "sdpa")
    options = {"microbatch_tokens": microbatch_tokens, "device": CPU}
    with torch.no_grad(), scorer.packed_attention():
        found = score_groups(scorer, pairs, objective, **options)
        means = run_step(scorer, pairs, objective, **options)
        alone = [score_groups(scorer, [pair], objective, **options) for pair in pairs]
    assert found.keys() == means.keys()
    for name, value_P in found.items():
        assert value_P.shape == (len(pairs),)
        torch.testing.assert_close(value_P.mean(), means[name], rtol=0, atol=1e-10, msg=name)
        if nll_average == "sequence":  # else a group's share depends on the others
            expected = torch.cat([each[name] for each in alone])
            torch.testing.assert_close(value_P, expected, rtol=0, atol=1e-10, msg=name)


# --- by hand, with a scorer that looks log-probs up ---


class _Lookup:
    """A scorer for which a token's log-prob is minus its id; notes the rows it is given."""

    def __init__(self, dtype=torch.float64):
        self.scale = torch.ones((), dtype=dtype, requires_grad=True)
        self.rows: list[PackedGroups] = []

    def __call__(self, packed: PackedGroups) -> torch.Tensor:
        self.rows.append(packed)
        return -self.scale * packed.targets.to(self.scale.dtype)


# Chosen: one token of −4; three of −1, −1 and −2. Rejected: −2; −3 and −5.
# The second token of the second prompt is −6, its third −7; a first token is never scored.
HAND = [
    Group((50,), ((4,), (2,)), "a:1"),
    Group((60, 6, 7), ((1, 1, 2), (3, 5)), "a:2"),
]
HAND_NLL = {
    # A mean of each sequence, then of the pairs: (4 + 4/3) / 2.
    ("response", "sequence"): (4 + 4 / 3) / 2,
    # All tokens of the step alike: (4 + 4) over 1 + 3. A mean of each micro-batch would give (4 + 4/3) / 2 again.
    ("response", "token"): (4 + 4) / 4,
    # The second pair's prompt adds 6 + 7 in two tokens: (4 + 17/5) / 2.
    ("all", "sequence"): (4 + 17 / 5) / 2,
    ("all", "token"): (4 + 17) / 6,
}


@pytest.mark.parametrize("microbatch_tokens", [TINY, HUGE])
@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_nll_of_a_step_by_hand(convention, microbatch_tokens):
    metrics = run_step(
        _Lookup(), HAND, objective_of(*convention), microbatch_tokens=microbatch_tokens, device=CPU
    )
    assert metrics["nll"].item() == pytest.approx(HAND_NLL[convention], rel=1e-15)
    # The odds are over responses, averaged a sequence, in every convention.
    assert metrics["chosen_logps"].item() == pytest.approx((-4 - 4 / 3) / 2, rel=1e-15)
    assert metrics["rejected_logps"].item() == pytest.approx((-2 - 4) / 2, rel=1e-15)
    assert metrics["rewards/accuracies"].item() == 0.5
    assert metrics["loss"].item() == pytest.approx(
        HAND_NLL[convention] + WEIGHT * metrics["odds_ratio_loss"].item(), rel=1e-15
    )


@pytest.mark.parametrize("microbatch_tokens", [TINY, HUGE])
def test_what_a_dialogue_does_not_learn_is_neither_scored_nor_counted(microbatch_tokens):
    # The 30s are a later question: 4, 2 and 3 are learned of it, and 8 of the other.
    groups = [
        Group((60, 6), ((4, 30, 31, 2, 3),), "a:1", unscored=((1, 3),)),
        Group((50,), ((8,),), "a:2"),
    ]
    for average, nll in (("sequence", ((4 + 2 + 3) / 3 + 8) / 2), ("token", (4 + 2 + 3 + 8) / 4)):
        means = run_step(
            _Lookup(), groups, Sft(nll_average=average), microbatch_tokens=microbatch_tokens, device=CPU
        )
        assert means["loss"].item() == means["nll"].item() == pytest.approx(nll, rel=1e-15)
        assert means["chosen_logps"].item() == pytest.approx(-((4 + 2 + 3) / 3 + 8) / 2, rel=1e-15)


def test_sft_learns_what_orpo_without_its_odds_does_and_computes_no_rejected_token(model):
    pairs = make_pairs()
    lookup = _Lookup()
    run_step(lookup, [pair.first(1) for pair in pairs], Sft(), microbatch_tokens=HUGE, device=CPU)
    assert lookup.rows[0].input_ids.numel() == sum(sum(pair.lengths[:2]) for pair in pairs)
    for nll_tokens, nll_average in CONVENTIONS:
        keys = {"nll_tokens": nll_tokens, "nll_average": nll_average}
        metrics, gradients = step_of(model, pairs, Orpo(weight=0.0, **keys), MEDIUM)
        ours, own = step_of(model, [pair.first(1) for pair in pairs], Sft(**keys), MEDIUM)
        for name in ("loss", "nll", "chosen_logps"):
            torch.testing.assert_close(ours[name], metrics[name], rtol=0, atol=1e-10)
        assert_same_step((own,), (gradients,))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_the_shares_of_the_loss_add_up_to_it(convention):
    pairs, objective = make_pairs(), objective_of(*convention)
    shares: list[torch.Tensor] = []
    metrics = run_step(
        _Lookup(), pairs, objective, microbatch_tokens=MEDIUM, device=CPU, backward=shares.append
    )
    assert len(shares) > 2
    assert all(share.requires_grad and share.shape == () for share in shares)
    assert sum(share.item() for share in shares) == pytest.approx(metrics["loss"].item(), rel=1e-14)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_micro_batch_by_itself(convention):
    pairs, objective = make_pairs(), objective_of(*convention)
    totals = objective.totals([pair.lengths for pair in pairs])
    lookup = _Lookup()
    run_step(lookup, pairs, objective, microbatch_tokens=MEDIUM, device=CPU)
    outputs = [objective(scores_of(lookup(packed), packed), totals) for packed in list(lookup.rows)]
    assert sum(len(output.metrics["loss"]) for output in outputs) == totals.groups
    for output in outputs:
        torch.testing.assert_close(output.loss, output.metrics["loss"].sum(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("nll_tokens", ["response", "all"])
@pytest.mark.parametrize("microbatch_tokens", [TINY, MEDIUM, HUGE])
def test_rows_keep_the_budget_and_score_prompts_only_where_these_are_learned(microbatch_tokens, nll_tokens):
    pairs, lookup = make_pairs(), _Lookup()
    run_step(lookup, pairs, objective_of(nll_tokens), microbatch_tokens=microbatch_tokens, device=CPU)
    assert sum(len(packed.lengths) for packed in lookup.rows) == len(pairs)
    for packed in lookup.rows:
        assert packed.input_ids.numel() <= microbatch_tokens or len(packed.lengths) == 1
        for (prompt, *_), (scored, *_) in zip(packed.lengths, packed.scored, strict=True):
            assert scored == (prompt - 1 if nll_tokens == "all" else 0)
    assert len(lookup.rows) == {TINY: 7, HUGE: 1}.get(microbatch_tokens, 3)


def test_what_the_means_are_over():
    lengths = [pair.lengths for pair in HAND]
    assert objective_of("response").totals(lengths) == Totals(groups=2, nll_tokens=4)
    assert objective_of("all").totals(lengths) == Totals(groups=2, nll_tokens=6)


def test_sequences_are_averaged_in_float64():
    # Each token is float32's 0.1; summed in float32, a thousand of them are off by 1e-6.
    pairs = [Group((1,), ((2,) * 1000, (3,) * 1000), "a:1")]

    def tenths(packed: PackedGroups) -> torch.Tensor:
        return torch.full((len(packed.targets),), -0.1, dtype=torch.float32)

    metrics = run_step(tenths, pairs, objective_of(), microbatch_tokens=HUGE, device=CPU)
    tenth = torch.tensor(0.1, dtype=torch.float32).double().item()
    assert metrics["nll"].item() == pytest.approx(tenth, rel=1e-12)
    assert metrics["chosen_logps"].item() == pytest.approx(-tenth, rel=1e-12)
    assert {value.dtype for value in metrics.values()} == {torch.float64}


class _NoWaiting(TorchDispatchMode):
    """Refuses what would make the host wait for a device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        waits = torch.ops.aten._local_scalar_dense, torch.ops.aten.nonzero, torch.ops.aten.equal
        assert func.overloadpacket not in waits, f"{func} reads a value on the host"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_a_step_never_waits_for_the_device(convention):
    lookup, pairs, objective = _Lookup(), make_pairs(), objective_of(*convention)
    with _NoWaiting():
        metrics = run_step(
            lookup, pairs, objective, microbatch_tokens=MEDIUM, device=CPU, backward=torch.Tensor.backward
        )
        with pytest.raises(AssertionError, match="on the host"):  # the watch sees what it is to see
            metrics["loss"].item()
    assert lookup.scale.grad is not None
    for name, value in metrics.items():
        assert value.shape == (), name
        assert not value.requires_grad, name


# --- other objectives ---

WITH_REFERENCE = {
    "dpo": Dpo(beta=0.3), "ipo": Ipo(beta=0.6), "sppo": Sppo(beta=0.2), "mmpo": Mmpo(beta=0.3, gamma=0.8),
    "kto": Kto(beta=0.2, desirable_weight=0.8, undesirable_weight=1.2),
}  # fmt: skip
OTHERS = {
    "probability_ratio": ProbabilityRatio(weight=WEIGHT, nll_tokens="all"),
    "cpo": Cpo(nll_average="token"),
    "simpo": Simpo(),
    "asft": Asft(weight=WEIGHT, nll_tokens="all", nll_average="token"),
    **WITH_REFERENCE,
}


def groups_for(objective) -> list[Group]:
    """`make_pairs` with all that the objective reads: a reference some way off, so that z₀ of kto is above 0."""
    generator = random.Random(1)

    def scored(group: Group) -> Group:
        away = [-5.5 * len(each) + generator.gauss(0, 2) for each in group.responses]
        return replace(group, reference_logps=tuple(away))

    pairs = [scored(pair.first(objective.responses)) for pair in make_pairs()]
    if objective.needs_labels:
        others = [replace(pair, responses=pairs[place - 1].responses) for place, pair in enumerate(pairs)]
        return [
            replace(pair, desirable=place % 3 > 0, mismatched=scored(other))
            for place, (pair, other) in enumerate(zip(pairs, others, strict=True))
        ]
    return [replace(pair, margin=generator.uniform(0, 3)) for pair in pairs]


def plain_step(model, groups: Sequence[Group], objective):
    """Loss and gradient by the papers' formulas: each sequence alone through the model, no packing, no micro-batch."""

    def ratios(group: Group) -> list[torch.Tensor]:
        found = []
        for response, reference in zip(group.responses, group.reference_logps, strict=True):
            ids = torch.tensor([[*group.prompt_ids, *response]])
            logps = model(input_ids=ids, use_cache=False).logits[0, :-1].log_softmax(-1)
            own = logps[torch.arange(ids.shape[1] - 1), ids[0, 1:]][-len(response) :]
            found.append(own.sum() - reference)
        return found

    if isinstance(objective, Kto):
        with torch.no_grad():
            kl = torch.stack([ratios(group.mismatched)[0] for group in groups]).mean()
        assert kl > 0.1
    losses = []
    for group in groups:
        chosen, *rest = ratios(group)
        delta = chosen - rest[0] if rest else None
        match objective:
            case Dpo():
                loss = -torch.log(torch.sigmoid(objective.beta * delta))
            case Ipo():
                averages = chosen / len(group.responses[0]) - rest[0] / len(group.responses[1])
                loss = (averages - 1 / (2 * objective.beta)) ** 2
            case Sppo():
                half = 1 / (2 * objective.beta)
                loss = ((chosen - half) ** 2 + (rest[0] + half) ** 2) / 2
            case Mmpo():
                p, logit = 1 / (1 + math.exp(-objective.gamma * group.margin)), objective.beta * delta
                loss = -p * torch.log(torch.sigmoid(logit)) - (1 - p) * torch.log(torch.sigmoid(-logit))
            case Kto():
                sign = 1 if group.desirable else -1
                weight = objective.desirable_weight if group.desirable else objective.undesirable_weight
                loss = weight * (1 - torch.sigmoid(objective.beta * sign * (chosen - kl)))
        losses.append(loss)
    loss = torch.stack(losses).mean()
    loss.backward()
    return {"loss": loss.detach()}, gradients_of(model)


@pytest.mark.parametrize("objective", WITH_REFERENCE.values(), ids=WITH_REFERENCE)
def test_a_step_with_a_reference_is_the_plain_formula(model, objective):
    groups = groups_for(objective)
    expected = plain_step(model, groups, objective)
    assert max(grad.abs().max() for grad in expected[1].values()) > 1e-2  # there is something to compare
    for microbatch_tokens in (TINY, MEDIUM, HUGE):
        metrics, gradients = step_of(model, groups, objective, microbatch_tokens)
        assert_same_step(({"loss": metrics["loss"]}, gradients), expected)


def test_logps_are_summed_in_the_order_of_the_groups(model):
    groups, scorer = make_pairs(), Scorer(model, "sdpa")
    with torch.no_grad(), scorer.packed_attention():
        alone = [
            scores_of(scorer(packed), packed).logps_PN for packed in (pack_groups([each]) for each in groups)
        ]
        for microbatch_tokens in (TINY, MEDIUM, HUGE):
            found_PN = summed_logps(scorer, groups, microbatch_tokens=microbatch_tokens, device=CPU)
            torch.testing.assert_close(found_PN, torch.cat(alone), rtol=0, atol=1e-10)


def test_ranks_shares_of_summed_logps_are_the_whole():
    groups, options = make_pairs(), {"microbatch_tokens": MEDIUM, "device": CPU}
    whole_PN = summed_logps(_Lookup(), groups, **options)
    for count in (2, 4, 9):  # of nine ranks two score a dummy row
        parts = [
            summed_logps(_Lookup(), groups, ranks=_OneOfSeveral(index, count), **options)
            for index in range(count)
        ]
        torch.testing.assert_close(sum(parts), whole_PN, rtol=1e-14, atol=0)


def test_the_kl_estimate_of_kto_by_hand():
    # Log-probs are minus the ids: −4 + 7 and −2 − 1 + 3 − 1, so a mean of 1; never below 0.
    def group(answer, reference):
        return Group(
            (50,), ((9,),), "a", mismatched=Group((50,), (answer,), "a", reference_logps=(reference,))
        )

    options = {"microbatch_tokens": TINY, "device": CPU}
    assert kl_estimate(_Lookup(), [group((4,), -7.0), group((2, 1), -2.0)], **options).item() == 1.0
    assert kl_estimate(_Lookup(), [group((4,), 0.0)], **options).item() == 0.0
    with pytest.raises(AssertionError, match="without the mismatched answers"):
        kl_estimate(_Lookup(), HAND, **options)


@pytest.mark.parametrize("objective", OTHERS.values(), ids=OTHERS)
def test_a_step_of_any_objective_is_the_same_whatever_its_micro_batches(model, objective):
    pairs = groups_for(objective)
    expected = step_of(model, pairs, objective, HUGE)
    assert max(grad.abs().max() for grad in expected[1].values()) > 1e-2  # there is something to compare
    assert tuple(expected[0]) == objective.metrics
    for microbatch_tokens in (TINY, MEDIUM):
        assert_same_step(step_of(model, pairs, objective, microbatch_tokens), expected)
    # Each sequence alone, so nothing of packing is in it.
    assert_same_step(step_of(model, pairs, objective, MEDIUM, "separate"), expected)


@dataclass(frozen=True)
class _OneOfSeveral(Ranks):
    """A rank whose sums are added up afterwards, for want of the others."""

    def summed(self, values: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return values


@pytest.mark.parametrize("objective", [objective_of("all", "token"), *OTHERS.values()], ids=["orpo", *OTHERS])
@pytest.mark.parametrize("count", [2, 4, 7])
def test_ranks_shares_make_the_same_step(objective, count, monkeypatch):
    pairs, found = groups_for(objective), []
    for index in [None, *range(count)]:
        lookup = _Lookup()
        if index is not None and objective.needs_kl:  # a sum over ranks too, which these don't make
            monkeypatch.setattr(step, "kl_estimate", lambda *_, **__: found[0][0]["kl"])
        metrics = run_step(
            lookup, pairs, objective, microbatch_tokens=MEDIUM, device=CPU, backward=torch.Tensor.backward,
            ranks=Ranks() if index is None else _OneOfSeveral(index, count),
        )  # fmt: skip
        found.append((metrics, lookup.scale.grad))
    (expected, gradient), *ranks = found
    # DDP and FSDP average gradients over ranks.
    torch.testing.assert_close(sum(grad for _, grad in ranks) / count, gradient, rtol=1e-12, atol=0)
    for name, value in expected.items():
        total = sum(metrics[name] for metrics, _ in ranks)
        torch.testing.assert_close(total, value, rtol=1e-12, atol=1e-14)
