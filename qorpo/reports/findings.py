"""What a run's figures mean, in words: the verdict against the start, and what a person should be warned of."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from qorpo.objectives.base import Headline
from qorpo.reports.numbers import decimals, figure, places_for
from qorpo.reports.pair_values import Interval
from qorpo.reports.run_files import Row, RunFiles

ACCURACY = "rewards/accuracies"
NAMES = {
    "loss": "loss", "nll": "NLL", "odds_ratio_loss": "odds ratio loss", "log_odds_ratio": "log odds ratio",
    ACCURACY: "accuracy", "rewards/margins": "margin", "rewards/chosen": "reward of chosen",
    "rewards/rejected": "reward of rejected", "chosen_logps": "log-prob of chosen",
    "rejected_logps": "log-prob of rejected", "learning_rate": "learning rate", "grad_norm": "gradient norm",
    "tokens_per_second": "tokens a second", "pairs_per_second": "pairs a second", "groups_per_second": "groups a second",
    "peak_memory_gib": "peak memory, GiB", "kl": "KL", "probability_ratio_loss": "probability ratio loss",
}  # fmt: skip
NOT_COMPARED = ("pairs_per_second", "groups_per_second")  # of an evaluation: its speed

FEW_PROMPTS = 50
FEW_PAIRS = 20  # of a kind, below which nothing is said of them
WORSE = 0.01  # relative: what counts as worse where no interval can be had
MINOR = 0.001  # relative: what is not worth a word, however sure it is
MANY_DROPPED = 0.1
STILL_IMPROVING = 0.1  # of the whole improvement, in the last quarter of the steps


@dataclass(frozen=True)
class Change:
    """A held-out metric at the start and at the step that is kept."""

    metric: str
    before: float
    after: float
    after_interval: Interval | None  # 95%, over prompts
    difference: Interval | None  # of the same pairs, after minus before

    @property
    def name(self) -> str:
        return name_of(self.metric)

    @property
    def places(self) -> int:
        return 2 if self.metric == ACCURACY else places_for(self.after - self.before)

    def text(self) -> str:
        """Such as "accuracy 0.50 → 0.98 (0.97-1.00)"."""
        before, after = (decimals(value, self.places) for value in (self.before, self.after))
        return f"{self.name} {before} → {after}" + bounds(self.after_interval, self.places)


def name_of(metric: str) -> str:
    return NAMES.get(metric, metric)


def bounds(interval: Interval | None, places: int) -> str:
    """Such as " (0.97-1.00)", of negative ones " (-0.31 to -0.27)"; empty for none."""
    if interval is None or interval.ends is None:
        return ""
    low, high = (decimals(end, places) for end in interval.ends)
    return f" ({low}{' to ' if low.startswith('-') or high.startswith('-') else '-'}{high})"


def changes(run: RunFiles, step: int | None = None) -> list[Change]:
    """From the start to `step`, by default the one that is kept; empty where either was not evaluated."""
    step = run.kept_step if step is None else step
    if step is None or not {0, step} <= run.evaluations.keys():
        return []
    before, after = run.evaluations[0], run.evaluations[step]
    first, values = run.values_at(0), run.values_at(step)
    return [
        Change(
            metric, before[metric], after[metric],
            values.of_metric(metric) if values else None,
            values.change(first, metric) if values else None,
        )
        for metric in ordered(run, after)
        if metric in before
    ]  # fmt: skip


def ordered(run: RunFiles, row: Mapping[str, float]) -> list[str]:
    """An evaluation's metrics, those first that a person looks at first."""
    first = [ACCURACY, run.objective.headline.metric, "loss"]
    return [name for name in dict.fromkeys([*first, *row]) if name in row and name not in NOT_COMPARED]


def verdict(run: RunFiles) -> str:
    """One sentence or two: is it better than the model it started from?"""
    if not run.evaluations:
        return "No verdict: no pairs were held out. Set data.eval, for example to 0.02, to have one."
    if run.kept_step is None or not math.isfinite(run.headline_at(0)):
        return "No verdict: the start (step 0) was not evaluated, so there is nothing to compare with."
    if len(run.evaluations) < 2:
        return "No verdict yet: nothing was evaluated after the start."
    found = {change.metric: change for change in changes(run)}
    headline = run.objective.headline.metric
    told = ", ".join(found[name].text() for name in dict.fromkeys([ACCURACY, headline]) if name in found)
    return f"{_judgement(run, found[headline])}: held-out {told}{_num_pairs(run)}."


def _judgement(run: RunFiles, change: Change) -> str:
    if run.kept_step == 0:
        return "No better than the base (the start, step 0, scored best and is kept)"
    if change.difference is None:
        return "Better than the base by the means alone (without intervals)"
    lower = run.objective.headline.lower_is_better
    if change.difference.is_below_zero if lower else change.difference.is_above_zero:
        return "Better than the base"
    return "Not told apart from the base (the difference is within its 95% interval)"


def _num_pairs(run: RunFiles) -> str:
    values = run.values_at(run.kept_step or 0)
    report = run.data_report("eval")
    count = len(values) if values else report.kept if report else 0
    return f", {count:,} pairs" if count else ""


def state(run: RunFiles) -> str:
    """How far it is: "61 steps, finished", or "not finished: step 37 of 61"."""
    if run.is_finished:
        return f"{run.last_step:,} steps, finished"
    total = run.total_steps
    return f"not finished: step {run.last_step:,}" + (f" of {total:,}" if total else "")


# --- warnings ---


def warnings(run: RunFiles) -> list[str]:
    """What a person should know before the result is used; the worst first."""
    headline = run.objective.headline
    found = [
        change_for_the_worse(run.evaluations, run.kept_step, headline),
        _no_number(run),
        _overfitting(run, headline),
        _chosen_falling(run),
        _length_explains(run),
        _still_improving(run, headline),
        *_of_the_data(run),
    ]
    if run.unread_lines:
        found.append(f"{run.unread_lines:,} lines of metrics.jsonl can't be read, and are left out")
    return [text for text in found if text]


def change_for_the_worse(
    evaluations: Mapping[int, Row], best_step: int | None, headline: Headline
) -> str | None:
    """What to say of a run whose held-out figures end no better than they started; None where they do.

    Args:
        evaluations: metrics by step, the start's among them at 0.
        headline: the metric that counts.
    """
    if best_step is None or not {0, best_step} <= evaluations.keys() or len(evaluations) < 2:
        return None
    ends = (0, best_step, max(evaluations))
    values = {step: evaluations[step].get(headline.metric, math.nan) for step in ends}
    first, last = values[0], values[max(values)]
    if headline.is_better(last, first):
        return None
    if last == first:
        return f"held-out {headline.metric} stayed at {first:.4f}: nothing was learned; raise train.learning_rate"
    went = "rose" if headline.lower_is_better else "fell"
    worse = (
        f"held-out {headline.metric} {went} from {first:.4f} to {last:.4f}: this run made the model worse; "
        "lower train.learning_rate"
    )
    if best_step == 0:
        return f"{worse}. What is kept is the start (step 0), which was best"
    return f"{worse}, or train for fewer steps. What is kept is step {best_step}, where it was {values[best_step]:.4f}"


def _no_number(run: RunFiles) -> str | None:
    for step, row in run.steps.items():
        for name in ("loss", "grad_norm"):
            if not math.isfinite(row.get(name, 0.0)):
                return f"{name_of(name)} is no number at step {step:,}: training has diverged; lower train.learning_rate"
    return None


def _overfitting(run: RunFiles, headline: Headline) -> str | None:
    """The last evaluation is worse than the kept one, and by more than chance, but better than the start."""
    kept, last = run.kept_step, max(run.evaluations, default=0)
    if not kept or kept == last:
        return None
    best, end = run.headline_at(kept), run.headline_at(last)
    worse_by = (end - best if headline.lower_is_better else best - end) / max(abs(best), 1e-12)
    values, at_end = run.values_at(kept), run.values_at(last)
    change = at_end.change(values, headline.metric) if at_end else None
    is_sure = change is not None and (change.is_above_zero or change.is_below_zero)
    if not worse_by > (MINOR if is_sure else WORSE):
        return None
    went = "rises" if headline.lower_is_better else "falls"
    return (
        f"overfitting from step {kept:,}: held-out {name_of(headline.metric)} {went} from {figure(best)} to {figure(end)} "
        f"by step {last:,}; what is kept is step {kept:,}"
    )


def _chosen_falling(run: RunFiles) -> str | None:
    for change in changes(run):
        if change.metric == "chosen_logps" and change.after < change.before:
            if change.difference is not None and not change.difference.is_below_zero:
                return None
            return (
                f"chosen answers became less likely: {change.text()} a token; rejected ones fell further where the margin "
                "grew, but the model writes chosen answers less readily than before"
            )
    return None


def _length_explains(run: RunFiles) -> str | None:
    values = run.values_at(run.kept_step) if run.kept_step else None
    if values is None or len(values.lengths[0]) != 2 or ACCURACY not in values.metrics:
        return None
    is_right_P = np.asarray(values.metrics[ACCURACY])
    chosen_P, rejected_P = np.asarray(values.lengths).T
    longer, shorter = is_right_P[chosen_P > rejected_P], is_right_P[chosen_P < rejected_P]
    if min(len(longer), len(shorter)) < FEW_PAIRS or abs(longer.mean() - shorter.mean()) < 0.25:
        return None
    return (
        f"length may explain the result: accuracy is {longer.mean():.2f} where the chosen answer is the longer one "
        f"({len(longer):,} pairs) and {shorter.mean():.2f} where it is the shorter one ({len(shorter):,} pairs)"
    )


def _still_improving(run: RunFiles, headline: Headline) -> str | None:
    steps = sorted(run.evaluations)
    if len(steps) < 4 or run.kept_step != steps[-1] or not run.is_finished:
        return None
    earlier = max(step for step in steps[:-1] if step <= 0.75 * steps[-1])
    start, middle, end = map(run.headline_at, (0, earlier, steps[-1]))
    if not abs(end - middle) > STILL_IMPROVING * abs(end - start):
        return None
    return (
        f"still improving at the end: {abs(end - middle) / abs(end - start):.0%} of the change in held-out "
        f"{name_of(headline.metric)} came after step {earlier:,}; a longer run may do better"
    )


def _of_the_data(run: RunFiles) -> Iterator[str]:
    if leaked := run.data.get("eval_prompts_in_train"):
        yield f"{leaked:,} evaluation prompts occur in training too; held-out figures flatter"
    values = run.values_at(run.kept_step) if run.kept_step is not None else None
    if values is not None and (count := len(set(values.prompts))) < FEW_PROMPTS:
        yield f"only {count:,} held-out prompts: intervals are wide and rough"
    for report in (run.data_report("split_from"), run.data_report("train")):
        if report is not None and (dropped := sum(report.dropped.values())) > MANY_DROPPED * report.read:
            yield f"{dropped:,} of {report.read:,} records were dropped; the reasons stand under Data"
