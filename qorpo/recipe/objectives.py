"""The section `objective`: which loss, and its keys. Each class has the keys of the objective it is named after."""

import difflib
from typing import Any, Literal, get_args

from qorpo.recipe.values import Keys, NllAverage, NllTokens, NotNegative, Positive, key, shown

NAME = key(
    ...,
    "The loss: orpo, sft, probability_ratio, cpo, simpo, asft; or, by a reference, dpo, ipo, sppo, mmpo, kto.",
)
WEIGHT = key(0.1, "λ, the weight of the objective's own term beside the NLL.", alias="lambda")
NLL_TOKENS = key("response", "The NLL is over the response (the paper), or over all: the prompt too.")
NLL_AVERAGE = key("sequence", "The NLL's mean: by sequence, then pair (the paper), or by token.")
BETA = "β, the scale of log-probabilities: probability_ratio 1.0, simpo 2.0, mmpo 0.01, sppo 0.001, the others 0.1."


class OrpoRecipe(Keys):
    name: Literal["orpo"] = NAME
    weight: NotNegative = WEIGHT
    nll_tokens: NllTokens = NLL_TOKENS
    nll_average: NllAverage = NLL_AVERAGE


class SftRecipe(Keys):
    name: Literal["sft"] = NAME
    nll_tokens: NllTokens = NLL_TOKENS
    nll_average: NllAverage = NLL_AVERAGE


class ProbabilityRatioRecipe(Keys):
    name: Literal["probability_ratio"] = NAME
    weight: NotNegative = WEIGHT
    beta: Positive = key(1.0, BETA)
    nll_tokens: NllTokens = NLL_TOKENS
    nll_average: NllAverage = NLL_AVERAGE


class CpoRecipe(Keys):
    name: Literal["cpo"] = NAME
    beta: Positive = key(0.1, BETA)
    alpha: NotNegative = key(1.0, "α, the weight of the NLL beside CPO's own term.")
    nll_tokens: NllTokens = NLL_TOKENS
    nll_average: NllAverage = NLL_AVERAGE


class SimpoRecipe(Keys):
    name: Literal["simpo"] = NAME
    beta: Positive = key(2.0, BETA)
    gamma_beta_ratio: NotNegative = key(0.8, "γ / β, the margin of average log-probabilities to reach.")


class AsftRecipe(Keys):
    name: Literal["asft"] = NAME
    weight: NotNegative = WEIGHT
    nll_tokens: NllTokens = NLL_TOKENS
    nll_average: NllAverage = NLL_AVERAGE


class DpoRecipe(Keys):
    name: Literal["dpo"] = NAME
    beta: Positive = key(0.1, BETA)


class IpoRecipe(Keys):
    name: Literal["ipo"] = NAME
    beta: Positive = key(0.1, BETA)


class SppoRecipe(Keys):
    name: Literal["sppo"] = NAME
    beta: Positive = key(0.001, BETA)


class MmpoRecipe(Keys):
    name: Literal["mmpo"] = NAME
    beta: Positive = key(0.01, BETA)
    gamma: Positive = key(2.2, "γ, the scale of the data's margins: it depends on what they are measured in.")


class KtoRecipe(Keys):
    name: Literal["kto"] = NAME
    beta: Positive = key(0.1, BETA)
    desirable_weight: NotNegative = key(1.0, "λ_D, the weight of desirable answers.")
    undesirable_weight: NotNegative = key(1.0, "λ_U, the weight of the others.")


# What a recipe may name, told apart by `name`: the one list of objectives that training can run.
ObjectiveRecipe = (
    OrpoRecipe | SftRecipe | ProbabilityRatioRecipe | CpoRecipe | SimpoRecipe | AsftRecipe
    | DpoRecipe | IpoRecipe | SppoRecipe | MmpoRecipe | KtoRecipe
)  # fmt: skip

OBJECTIVES: dict[str, type[Keys]] = {
    get_args(each.model_fields["name"].annotation)[0]: each for each in get_args(ObjectiveRecipe)
}
DEFAULT = "orpo"


def belongs_to(name: str) -> list[str]:
    """The objectives that have a key of this name (as recipes write it)."""
    return [objective for objective, keys in OBJECTIVES.items() if name in keys.names()]


def unknown_objective(name: Any) -> str:
    """What is wrong with an objective.name, with the nearest known one."""
    near = difflib.get_close_matches(str(name).lower(), OBJECTIVES, n=1, cutoff=0.7)
    known = f"expected {', '.join(OBJECTIVES)}"
    return f"objective.name: got {shown(name)}; {f'did you mean {near[0]}? ' if near else ''}{known}"
