"""Every objective by hand, against a slow plain twin of its paper's formula, split at will, and at the edges.

Legend: P groups, N responses of a group.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Callable

import mpmath
import pytest
import torch

from qorpo.objectives.asft import Asft, asft_loss
from qorpo.objectives.base import Headline, Objective, Scores, Totals
from qorpo.objectives.cpo import Cpo, cpo_loss
from qorpo.objectives.dpo import Dpo, dpo_loss
from qorpo.objectives.ipo import Ipo, ipo_loss
from qorpo.objectives.kto import Kto, kto_loss
from qorpo.objectives.mmpo import Mmpo, mmpo_loss
from qorpo.objectives.orpo import Orpo
from qorpo.objectives.probability_ratio import ProbabilityRatio, probability_ratio_loss
from qorpo.objectives.sft import Sft
from qorpo.objectives.simpo import Simpo, simpo_loss
from qorpo.objectives.sppo import Sppo, sppo_loss

CLASSES = (Orpo, Sft, ProbabilityRatio, Cpo, Simpo, Asft, Dpo, Sppo, Mmpo, Ipo, Kto)
KL = 0.3


def conventions(objective: type) -> list[dict[str, str]]:
    """Every way of averaging the NLL, of an objective that has one."""
    if "nll_tokens" not in {field.name for field in dataclasses.fields(objective)}:
        return [{}]
    both = itertools.product(("response", "all"), ("sequence", "token"))
    return [{"nll_tokens": tokens, "nll_average": average} for tokens, average in both]


# A scale of each objective's own that makes all its terms matter; the defaults are held elsewhere.
SCALES = {
    "orpo": {"weight": 0.7}, "probability_ratio": {"weight": 0.7, "beta": 1.3}, "cpo": {"beta": 0.2, "alpha": 0.6},
    "simpo": {"beta": 1.5, "gamma_beta_ratio": 0.4}, "asft": {"weight": 0.7}, "dpo": {"beta": 0.4},
    "sppo": {"beta": 0.2}, "mmpo": {"beta": 0.4, "gamma": 0.8}, "ipo": {"beta": 0.6}, "sft": {},
    "kto": {"beta": 0.4, "desirable_weight": 0.8, "undesirable_weight": 1.2},
}  # fmt: skip
OBJECTIVES = [
    pytest.param(each(**SCALES[each.name], **keys), id="-".join([each.name, *keys.values()]))
    for each in CLASSES
    for keys in conventions(each)
]


@dataclasses.dataclass
class Group:
    """One group's log-probs, a token each, and what goes with it. The prompt's first token has none."""

    prompt: torch.Tensor
    responses: list[torch.Tensor]
    reference: list[float]
    margin: float
    desirable: bool

    @property
    def lengths(self) -> list[int]:
        return [len(self.prompt) + 1, *map(len, self.responses)]


def make_groups(objective: Objective, seed: int = 0, count: int = 9) -> list[Group]:
    generator = random.Random(seed)

    def tokens(least: int) -> torch.Tensor:
        logps = [-generator.expovariate(1.0) - 0.01 for _ in range(generator.randint(least, 12))]
        return torch.tensor(logps, dtype=torch.float64, requires_grad=True)

    groups = []
    for _ in range(count):
        responses = [tokens(1) for _ in range(objective.responses)]
        reference = [each.sum().item() + generator.gauss(0, 1.5) for each in responses]
        groups.append(
            Group(tokens(0), responses, reference, generator.uniform(0, 3), generator.random() < 0.5)
        )
    return groups


def scores_of(groups: list[Group], scores_prompts: bool) -> Scores:
    """As a step makes them: one row of tokens, each with the part it belongs to."""
    parts = [[group.prompt[:0] if not scores_prompts else group.prompt, *group.responses] for group in groups]
    segments = [
        torch.full((len(part),), number)
        for number, part in enumerate(part for group in parts for part in group)
    ]
    return Scores.of_tokens(
        torch.cat([part for group in parts for part in group]),
        torch.cat(segments),
        torch.tensor([group.lengths for group in groups], dtype=torch.float64),
        reference_logps_PN=torch.tensor([group.reference for group in groups], dtype=torch.float64),
        margins_P=torch.tensor([group.margin for group in groups], dtype=torch.float64),
        desirable_P=torch.tensor([group.desirable for group in groups]),
    )


def run(objective: Objective, groups: list[Group], totals: Totals | None = None):
    totals = totals or objective.totals([group.lengths for group in groups])._replace(kl=KL)
    return objective(scores_of(groups, objective.scores_prompts), totals), totals


def leaves(groups: list[Group], scores_prompts: bool) -> list[torch.Tensor]:
    prompts = [group.prompt for group in groups if scores_prompts and len(group.prompt)]
    return [*prompts, *(response for group in groups for response in group.responses)]


# --- by hand ---

LOG3 = math.log(3)  # σ(log 3) = 3/4, so −log σ(log 3) = log(4/3) and −log σ(−log 3) = log 4


def one(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


BY_HAND: dict[str, tuple[Callable[[], torch.Tensor], float]] = {
    "probability ratio": (
        lambda: probability_ratio_loss(one(-1), one(-1 - LOG3 / 2), beta=2.0),
        math.log(4 / 3),
    ),
    "cpo": (lambda: cpo_loss(one(-5 - LOG3 / 0.1), one(-5), beta=0.1), math.log(4)),
    "simpo, γ = β / 2 reached": (lambda: simpo_loss(one(-1), one(-1.5), beta=2.0, gamma_beta_ratio=0.5), math.log(2)),
    "simpo": (lambda: simpo_loss(one(-1), one(-1.5 - LOG3 / 2), beta=2.0, gamma_beta_ratio=0.5), math.log(4 / 3)),
    # −log(1/2) − log(1 − 1/4)
    "asft": (lambda: asft_loss(one(math.log(1 / 2)), one(math.log(1 / 4))), math.log(8 / 3)),
    "dpo": (lambda: dpo_loss(one(4 * LOG3), one(-LOG3), beta=0.2), math.log(4 / 3)),
    # ½/β = 1: ½ [(3 − 1)² + (−2 + 1)²]
    "sppo": (lambda: sppo_loss(one(3), one(-2), beta=0.5), 2.5),
    # p = 1/2 and p = σ(log 3) = 3/4
    "mmpo, no margin": (lambda: mmpo_loss(one(LOG3), one(0), one(0), beta=1.0), math.log(16 / 3) / 2),
    "mmpo": (
        lambda: mmpo_loss(one(LOG3), one(0), one(2 * LOG3), beta=1.0, gamma=0.5),
        3 / 4 * math.log(4 / 3) + 1 / 4 * math.log(4),
    ),
    # 1 / (2β) = 2: (4 + 1 − 2)²
    "ipo": (lambda: ipo_loss(one(4), one(-1), beta=0.25), 9.0),
    # 1 − σ(log 3) and 1 − σ(−log 3)
    "kto, desirable": (
        lambda: kto_loss(one(1 + LOG3), torch.tensor([True]), 1.0, beta=1.0, desirable_weight=2.0), 0.5
    ),
    "kto, undesirable": (
        lambda: kto_loss(one(1 + LOG3), torch.tensor([False]), 1.0, beta=1.0, undesirable_weight=2.0), 1.5
    ),
}  # fmt: skip


@pytest.mark.parametrize(("loss", "expected"), BY_HAND.values(), ids=BY_HAND)
def test_a_loss_by_hand(loss, expected):
    assert loss().tolist() == pytest.approx([expected], rel=1e-14)


# Two pairs: a_w = −2, a_l = −3, s_w = −4, s_l = −9; and a_w = a_l = s_w = s_l = −1. Scored prompt tokens: 2 and 0.
HAND = [
    Group(torch.tensor([-1.0, -2.0]), [torch.tensor([-1.0, -3.0]), torch.tensor([-2.0, -2.0, -5.0])], [-5.0, -8.0], 1, True),
    Group(torch.tensor([]), [torch.tensor([-1.0]), torch.tensor([-1.0])], [-1.0, -1.0], 0, False),
]  # fmt: skip
# The mean NLL over two groups by each convention: (2 + 1) / 2, (7/4 + 1) / 2, 5 / 3, 8 / 5.
NLL_BY_HAND = {
    ("response", "sequence"): 1.5, ("all", "sequence"): 1.375, ("response", "token"): 5 / 3, ("all", "token"): 1.6
}  # fmt: skip


@pytest.mark.parametrize("convention", NLL_BY_HAND)
def test_the_nll_by_hand(convention):
    keys = dict(zip(("nll_tokens", "nll_average"), convention, strict=True))
    for each in (Sft, Orpo, ProbabilityRatio, Asft, Cpo):
        output, totals = run(each(**keys), HAND)
        assert output.metrics["nll"].sum().item() / totals.groups == pytest.approx(NLL_BY_HAND[convention])
    sft, totals = run(Sft(**keys), HAND)
    assert sft.loss.item() / totals.groups == pytest.approx(NLL_BY_HAND[convention], rel=1e-15)


def minus_log_sigmoid(x: float) -> float:
    return math.log(1 + math.exp(-x))


def test_objectives_read_averages_or_sums_as_their_papers_do():
    expected = {
        Simpo(): [minus_log_sigmoid(2 * (1 - 0.8)), minus_log_sigmoid(-1.6)],
        ProbabilityRatio(weight=1.0): [2 + minus_log_sigmoid(1), 1 + math.log(2)],
        Cpo(): [2 + minus_log_sigmoid(0.5), 1 + math.log(2)],
        Asft(weight=1.0): [2 + 2 - math.log(1 - math.exp(-3)), 1 + 1 - math.log(1 - math.exp(-1))],
        # Δs_w = −4 + 5 = 1, Δs_l = −9 + 8 = −1; both 0 in the second.
        Dpo(): [minus_log_sigmoid(0.2), math.log(2)],
        Sppo(beta=0.25): [((1 - 2) ** 2 + (-1 + 2) ** 2) / 2, 4],
        # Δa_w = 1/2, Δa_l = −1/3
        Ipo(beta=0.25): [(5 / 6 - 2) ** 2, 4],
    }
    for objective, losses in expected.items():
        assert run(objective, HAND)[0].metrics["loss"].tolist() == pytest.approx(losses, rel=1e-12), objective


def test_metrics_by_hand():
    metrics = run(Dpo(beta=0.5), HAND)[0].metrics
    assert {name: values.tolist() for name, values in metrics.items() if name != "loss"} == {
        "rewards/chosen": [0.5, 0],
        "rewards/rejected": [-0.5, 0],
        "chosen_logps": [-2, -1],
        "rejected_logps": [-3, -1],
        "rewards/accuracies": [1, 0],
        "rewards/margins": [1, 0],
    }
    assert run(Simpo(beta=2.0), HAND)[0].metrics["rewards/margins"].tolist() == [2, 0]
    assert run(Cpo(beta=0.1), HAND)[0].metrics["rewards/margins"].tolist() == pytest.approx([0.5, 0])
    # Δs = 1 of a desirable answer, 0 of another; z₀ = 0.3: above it, and below it.
    rows = [Group(each.prompt, each.responses[:1], each.reference[:1], 0, each.desirable) for each in HAND]
    metrics = run(Kto(beta=1.0), rows)[0].metrics
    assert metrics["rewards/margins"].tolist() == pytest.approx([0.7, 0.3])
    assert metrics["rewards/accuracies"].tolist() == [1, 1]
    assert metrics["kl"].tolist() == [KL, KL]


# --- against a slow plain twin: the whole step at once, textbook functions, a group at a time ---


def twin_of_nll(objective, groups: list[Group]) -> torch.Tensor:
    sequences = [
        torch.cat([group.prompt, group.responses[0]]) if objective.nll_tokens == "all" else group.responses[0]
        for group in groups
    ]
    if objective.nll_average == "token":
        return -torch.cat(sequences).mean()
    return -torch.stack([sequence.mean() for sequence in sequences]).mean()


def twin(objective, groups: list[Group]) -> torch.Tensor:
    """The step's loss, written as the paper has it."""
    sigmoid, log = torch.sigmoid, torch.log
    losses = []
    for group in groups:
        chosen, rejected = group.responses[0], group.responses[-1]
        odds_w, odds_l = (each.mean().exp() / (1 - each.mean().exp()) for each in (chosen, rejected))
        ratio_w, ratio_l = chosen.sum() - group.reference[0], rejected.sum() - group.reference[-1]
        match objective:
            case Sft():
                loss = torch.zeros(())
            case Orpo():
                loss = -objective.weight * log(sigmoid(log(odds_w / odds_l)))
            case ProbabilityRatio():
                loss = -objective.weight * log(sigmoid(objective.beta * (chosen.mean() - rejected.mean())))
            case Cpo():
                loss = -log(sigmoid(objective.beta * chosen.sum() - objective.beta * rejected.sum()))
            case Simpo():
                gamma = objective.gamma_beta_ratio * objective.beta
                loss = -log(
                    sigmoid(objective.beta * chosen.mean() - objective.beta * rejected.mean() - gamma)
                )
            case Asft():
                loss = -objective.weight * (log(sigmoid(log(odds_w))) + log(sigmoid(-log(odds_l))))
            case Dpo():
                loss = -log(sigmoid(objective.beta * ratio_w - objective.beta * ratio_l))
            case Sppo():
                eta = 1 / objective.beta
                loss = ((ratio_w - eta * (1 - 0.5)) ** 2 + (ratio_l - eta * (0 - 0.5)) ** 2) / 2
            case Mmpo():
                p = 1 / (1 + math.exp(-objective.gamma * group.margin))
                logit = objective.beta * (ratio_w - ratio_l)
                loss = -p * log(sigmoid(logit)) - (1 - p) * log(sigmoid(-logit))
            case Ipo():
                loss = (ratio_w / len(chosen) - ratio_l / len(rejected) - 1 / (2 * objective.beta)) ** 2
            case Kto():
                value = objective.beta * (ratio_w - KL if group.desirable else KL - ratio_w)
                weight = objective.desirable_weight if group.desirable else objective.undesirable_weight
                loss = weight * (1 - sigmoid(value))
        losses.append(loss)
    mean = torch.stack(losses).mean()
    if hasattr(objective, "nll_tokens"):
        mean = mean + (objective.alpha if isinstance(objective, Cpo) else 1) * twin_of_nll(objective, groups)
    return mean


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("seed", [0, 1])
def test_loss_and_gradient_are_the_plain_formulas(objective, seed):
    groups = make_groups(objective, seed)
    tokens = leaves(groups, objective.scores_prompts)
    output, totals = run(objective, groups)
    loss, expected = output.loss / totals.groups, twin(objective, groups)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    for got, want in zip(
        torch.autograd.grad(loss, tokens), torch.autograd.grad(expected, tokens), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("sizes", [(9,), (1,) * 9, (4, 5), (2, 1, 6)], ids=str)
def test_shares_of_any_split_add_up_to_the_step(objective, sizes):
    groups = make_groups(objective)
    tokens = leaves(groups, objective.scores_prompts)
    whole, totals = run(objective, groups)
    rest = iter(groups)
    shares = [run(objective, list(itertools.islice(rest, size)), totals)[0] for size in sizes]
    loss = sum(share.loss for share in shares)
    torch.testing.assert_close(loss, whole.loss, rtol=1e-12, atol=0)
    for got, want in zip(
        torch.autograd.grad(loss, tokens), torch.autograd.grad(whole.loss, tokens), strict=True
    ):
        torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-14)
    for name, values_P in whole.metrics.items():
        torch.testing.assert_close(torch.cat([share.metrics[name] for share in shares]), values_P)


# --- the interface ---


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_objective_says_what_it_gives(objective):
    output, totals = run(objective, make_groups(objective))
    assert tuple(output.metrics) == objective.metrics
    assert output.loss.shape == ()
    assert output.loss.dtype == torch.float64
    assert output.loss.requires_grad
    for name, values_P in output.metrics.items():
        assert values_P.shape == (totals.groups,), name
        assert values_P.dtype == torch.float64, name
        assert not values_P.requires_grad, name
    assert output.metrics["loss"].sum().item() == pytest.approx(output.loss.item(), rel=1e-14)
    assert objective.headline.metric in objective.metrics
    assert {name for chart in objective.charts for name in chart} <= set(objective.metrics)


def test_names_are_told_apart():
    assert len({each.name for each in CLASSES}) == len(CLASSES)


def test_what_is_needed_is_missed():
    groups = make_groups(Dpo())
    bare = scores_of(groups, False)._replace(reference_logps_PN=None, margins_P=None, desirable_P=None)
    totals = Totals(len(groups), 0)
    for each in CLASSES:
        objective = each()
        if objective.needs_reference:
            with pytest.raises(AssertionError, match="without the reference"):
                objective(
                    bare._replace(margins_P=torch.ones(9), desirable_P=torch.ones(9, dtype=torch.bool)),
                    totals,
                )
    with pytest.raises(AssertionError, match="without the margins that mmpo needs"):
        Mmpo()(bare._replace(reference_logps_PN=bare.logps_PN), totals)
    with pytest.raises(AssertionError, match="without the labels that kto needs"):
        Kto()(bare._replace(reference_logps_PN=bare.logps_PN), totals)


def test_a_headline_knows_its_direction():
    assert Headline().is_better(1.0, None)
    assert Headline().is_better(1.0, 2.0)
    assert not Headline().is_better(2.0, 2.0)
    assert Headline("rewards/accuracies", lower_is_better=False).is_better(0.9, 0.8)
    assert not Headline("rewards/accuracies", lower_is_better=False).is_better(0.8, 0.9)


# --- the edges ---


def at(objective: Objective, logp: float, length: int, reference: float | None = None) -> list[Group]:
    """One group in which every token has this log-prob."""

    def tokens() -> torch.Tensor:
        return torch.full((length,), logp, dtype=torch.float64, requires_grad=True)

    references = [logp * length if reference is None else reference] * objective.responses
    responses = [tokens() for _ in range(objective.responses)]
    return [Group(tokens(), responses, references, 1.0, True)]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    ("logp", "length"), [(0.0, 3), (-1e-300, 3), (-1e-13, 3), (-700.0, 5), (-12.0, 200_000)]
)
def test_value_and_gradient_are_finite_at_the_edges(objective, logp, length):
    for reference in (None, 0.0):
        groups = at(objective, logp, length, reference)
        output, _ = run(objective, groups)
        grads = torch.autograd.grad(output.loss, leaves(groups, objective.scores_prompts))
        assert output.loss.isfinite()
        assert all(grad.isfinite().all() for grad in grads)
        assert all(values.isfinite().all() for values in output.metrics.values())


@pytest.mark.parametrize("logp", [0.0, -0.3, -9.7])
@pytest.mark.parametrize("length", [1, 7, 4096])
def test_a_policy_that_is_its_reference_has_a_dpo_loss_of_log_2(logp, length):
    for objective in (Dpo(), Dpo(beta=5.0), Mmpo()):
        output, _ = run(objective, at(objective, logp, length))
        assert output.loss.item() == pytest.approx(math.log(2), rel=1e-15)
        assert output.metrics["rewards/margins"].tolist() == [0.0]


def test_equal_sides_have_equal_chances():
    for objective in (ProbabilityRatio(weight=1.0), Cpo(alpha=0.0)):
        output, _ = run(objective, at(objective, -0.7, 5))
        nll = output.metrics["nll"].item() if objective.name == "probability_ratio" else 0.0
        assert output.loss.item() - nll == pytest.approx(math.log(2), rel=1e-15)


def test_asft_has_its_digits_over_the_whole_range():
    places = [-50.0, -8.0, -1.0, -0.5, -1e-2, -1e-6, -1e-11]
    rejected = torch.tensor(places, dtype=torch.float64, requires_grad=True)
    losses = asft_loss(torch.zeros_like(rejected), rejected)
    (slopes,) = torch.autograd.grad(losses.sum(), rejected)
    with mpmath.workdps(50):
        powers = [mpmath.exp(mpmath.mpf(place)) for place in places]
        values = [float(-mpmath.log(1 - power)) for power in powers]
        expected = [float(power / (1 - power)) for power in powers]
    assert losses.tolist() == pytest.approx(values, rel=1e-12)
    assert slopes.tolist() == pytest.approx(expected, rel=1e-12)


def test_kto_and_mmpo_keep_the_digits_of_what_is_nearly_1():
    # 1 − σ(50) is 0 in float64, where it is 1.9e-22.
    x = torch.tensor([50.0], dtype=torch.float64, requires_grad=True)
    loss = kto_loss(x, torch.tensor([True]), beta=1.0)
    (slope,) = torch.autograd.grad(loss, x)
    assert loss.item() == pytest.approx(math.exp(-50), rel=1e-12)
    assert slope.item() == pytest.approx(-math.exp(-50), rel=1e-12)
    # p = σ(50), so 1 − p = e^−50 times the loss of the other order, δ = 1e24.
    loss = mmpo_loss(one(1e24), one(0), one(50), beta=1.0, gamma=1.0)
    assert loss.item() == pytest.approx(1e24 * math.exp(-50), rel=1e-12)


def test_losses_are_float64_whatever_they_are_given():
    half = torch.tensor([-1.5]), torch.tensor([-2.5])
    given = [loss(*half) for loss in (probability_ratio_loss, cpo_loss, simpo_loss, asft_loss, dpo_loss, sppo_loss, ipo_loss)]  # fmt: skip
    given += [mmpo_loss(*half, half[0]), kto_loss(half[0], torch.tensor([True]))]
    assert {loss.dtype for loss in given} == {torch.float64}
