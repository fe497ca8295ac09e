"""Several runs side by side: their curves, what each reached with paired intervals, and how their recipes differ."""

from collections.abc import Sequence
from typing import Any

from qorpo.printable import printable
from qorpo.recipe.values import shown
from qorpo.reports.charts import Chart, Line
from qorpo.reports.findings import ACCURACY, NOT_COMPARED, bounds, name_of, state, verdict, warnings
from qorpo.reports.numbers import decimals, places_for
from qorpo.reports.page import Page, Section, Table
from qorpo.reports.pair_values import Interval
from qorpo.reports.run_files import RunFiles
from qorpo.reports.run_report import ALWAYS_DRAWN, series_of
from qorpo.reports.run_report import as_dict as run_as_dict

MOST_CHARACTERS = 40  # of a run's name in a chart


def comparison_page(runs: Sequence[RunFiles], title: str = "Comparison of runs") -> Page:
    """The first run is the one that the others are compared with."""
    names = labels(runs)
    sections = [
        Section("Verdicts", tables=[Table(
            ["run", "verdict", "state"],
            [[name, verdict(run), state(run)] for name, run in zip(names, runs, strict=True)],
            figures=False,
        )]),
        Section("Held-out figures at each run's kept step", _about(runs, names), [reached_table(runs)]),
        Section("What differs between the recipes", tables=[differences_table(runs)]),
        Section("Curves", charts=curves(runs)),
    ]  # fmt: skip
    found = [f"{name}: {text}" for name, run in zip(names, runs, strict=True) for text in warnings(run)]
    return Page(title, state=f"{len(runs)} runs", warnings=found, sections=sections)


def as_dict(runs: Sequence[RunFiles]) -> dict[str, Any]:
    """The comparison for machines."""
    first = runs[0]
    return {
        "runs": [
            run_as_dict(run) | {"differences_from_first": {
                metric: {"mean": found.value, "95": found.ends}
                for metric in metrics_of(runs)
                if (found := difference(first, run, metric)) is not None and run is not first
            }}
            for run in runs
        ],
        "recipes": {key: dict(zip(labels(runs), values, strict=True)) for key, *values in differences_table(runs).rows},
    }  # fmt: skip


def labels(runs: Sequence[RunFiles]) -> list[str]:
    """Short names that tell the runs apart: the last parts of their paths."""
    for parts in range(1, max(len(run.path.parts) for run in runs) + 1):
        names = ["/".join(run.path.parts[-parts:]) for run in runs]
        if len(set(names)) == len(names):
            break
    return [
        name if len(name) <= MOST_CHARACTERS else f"{number}: …{name[-MOST_CHARACTERS:]}"
        for number, name in enumerate(map(printable, names), start=1)
    ]


def metrics_of(runs: Sequence[RunFiles]) -> list[str]:
    """Held-out metrics that any run has, those first that a person looks at first."""
    named = [name for run in runs for row in run.evaluations.values() for name in row]
    return [
        name
        for name in dict.fromkeys([ACCURACY, "loss", *named])
        if name in named and name not in NOT_COMPARED
    ]


def difference(first: RunFiles, run: RunFiles, metric: str) -> Interval | None:
    """How much more a run has than the first, on the same held-out pairs; None where they have none in common."""
    if first.kept_step is None or run.kept_step is None:
        return None
    values = run.values_at(run.kept_step)
    return values.change(first.values_at(first.kept_step), metric) if values else None


def _about(runs: Sequence[RunFiles], names: Sequence[str]) -> list[str]:
    text = [
        f"In brackets 95% intervals. Differences (Δ) are from {names[0]}, pair by pair; ● marks those whose interval leaves out 0."
    ]
    weights = {tuple(run.recipe.objective.model_dump(by_alias=True).items()) for run in runs}
    if len(weights) > 1:
        text.append(
            "The runs have different objectives, so their losses are not of one kind: compare the other columns."
        )
    if any(difference(runs[0], run, "loss") is None for run in runs):
        text.append("Where no difference stands, the runs hold no values of the same pairs.")
    return text


def reached_table(runs: Sequence[RunFiles]) -> Table:
    metrics = metrics_of(runs)
    rows = []
    for name, run in zip(labels(runs), runs, strict=True):
        row = run.evaluations.get(run.kept_step, {}) if run.kept_step is not None else {}
        cells = [name, "" if run.kept_step is None else f"{run.kept_step:,}"]
        rows.append(cells + [_cell(runs, run, metric, row) for metric in metrics])
    return Table(["run", "kept step", *map(name_of, metrics)], rows)


def _cell(runs: Sequence[RunFiles], run: RunFiles, metric: str, row: dict[str, float]) -> str:
    if metric not in row:
        return ""
    places = 3 if metric == ACCURACY else places_for(_spread(runs, metric))
    text = decimals(row[metric], places)
    if run is runs[0]:
        values = run.values_at(run.kept_step or 0)
        return text + bounds(values.of_metric(metric) if values else None, places)
    found = difference(runs[0], run, metric)
    if found is None:
        return text
    sign = "" if found.value < 0 else "+"
    mark = " ●" if found.is_above_zero or found.is_below_zero else ""
    return f"{text}, Δ {sign}{decimals(found.value, places)}{bounds(found, places)}{mark}"


def _spread(runs: Sequence[RunFiles], metric: str) -> float:
    values = [
        run.evaluations[run.kept_step][metric]
        for run in runs
        if run.kept_step is not None and metric in run.evaluations[run.kept_step]
    ]
    return max(values) - min(values)


def differences_table(runs: Sequence[RunFiles]) -> Table:
    """Keys whose resolved values are not the same in all runs."""
    recipes = [dict(run.recipe.values()) for run in runs]
    keys = dict.fromkeys(key for recipe in recipes for key in recipe if key != "output")
    rows = []
    for key in keys:
        values = [shown(recipe[key]) if key in recipe else "absent" for recipe in recipes]
        if len(set(values)) > 1:
            rows.append([key, *values])
    return Table(["key", *labels(runs)], rows, figures=False)


def curves(runs: Sequence[RunFiles]) -> list[Chart]:
    """A chart a metric: held-out values of all runs, or a step's where none was held out."""
    charts = []
    names = dict.fromkeys(
        name for run in runs for names in (*run.objective.charts, *ALWAYS_DRAWN) for name in names
    )
    for name in names:
        is_held_out = any(name in row for run in runs for row in run.evaluations.values())
        lines = []
        for number, (label, run) in enumerate(zip(labels(runs), runs, strict=True)):
            steps, values = series_of(run.evaluations if is_held_out else run.steps, name)
            if steps:
                lines.append(Line(label, steps, values, colour=number, is_marked=is_held_out))
        if lines:
            title = f"{name_of(name)}, {'held out' if is_held_out else 'training'}"
            charts.append(Chart(title[0].upper() + title[1:], lines))
    return charts
