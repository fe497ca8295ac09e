"""The report of one run: how it went, what it learned from, and what to do next."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from qorpo.data.counts import DataReport
from qorpo.recipe import FIELDS
from qorpo.recipe.values import shown
from qorpo.reports.charts import Bars, Chart, Line
from qorpo.reports.data_report import reason_tables
from qorpo.reports.findings import (
    Change,
    bounds,
    changes,
    name_of,
    state,
    verdict,
    warnings,
)
from qorpo.reports.numbers import decimals, duration, figure
from qorpo.reports.page import Page, Section, Table
from qorpo.reports.run_files import RunFiles

ALWAYS_DRAWN = (("learning_rate",), ("grad_norm",), ("tokens_per_second",), ("peak_memory_gib",))
DISTRIBUTED = (
    "log_odds_ratio",
    "rewards/margins",
)  # the first of these that the objective has (the paper's Fig. 4)
NUM_BINS = 40
SPEEDS = ("pairs_per_second", "groups_per_second")


def run_page(run: RunFiles) -> Page:
    found = warnings(run)
    sections = [
        Section("Held-out figures", _about_intervals(run), [changes_table(changes(run))]),
        Section("Curves", charts=curves(run)),
        Section("Each held-out pair, before and after", charts=distributions(run)),
        _data(run),
        Section("Recipe: what differs from the defaults", tables=[_differences(run)]),
        Section("Chat template", folded=run.chat_template or ""),
        Section("Machine, time, memory", tables=[Table(["", ""], list(machine(run)), figures=False)]),
        Section("Next", commands=next_commands(run)),
    ]
    return Page(
        run.name, verdict(run), f"{run.path} · {state(run)}", found, [each for each in sections if _has(each)]
    )


def _has(section: Section) -> bool:
    return bool(
        any(table.rows for table in section.tables) or section.charts or section.commands or section.folded
    )


def as_dict(run: RunFiles) -> dict[str, Any]:
    """The report for machines: plain JSON values, without the curves, which metrics.jsonl holds."""
    return {
        "run": str(run.path),
        "state": state(run),
        "is_finished": run.is_finished,
        "steps": run.last_step,
        "total_steps": run.total_steps,
        "kept_step": run.kept_step,
        "verdict": verdict(run),
        "warnings": warnings(run),
        "changes": {
            change.metric: {
                "before": _or_none(change.before),
                "after": _or_none(change.after),
                "after_95": change.after_interval and change.after_interval.ends,
                "difference_95": change.difference and change.difference.ends,
            }
            for change in changes(run)
        },
        "differences_from_defaults": {key: value for key, value, _ in _changed_keys(run)},
        "machine": dict(machine(run)),
    }


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None


# --- figures ---


def changes_table(found: Sequence[Change]) -> Table:
    """Before, after, and what changed, each held-out metric in a row."""
    rows = []
    for each in found:
        before, after = (decimals(value, each.places) for value in (each.before, each.after))
        difference = decimals(each.after - each.before, each.places)
        sign = "" if difference.startswith("-") else "+"
        rows.append([
            each.name, before, after + bounds(each.after_interval, each.places),
            sign + difference + bounds(each.difference, each.places),
        ])  # fmt: skip
    return Table(["held out", "before", "after", "change"], rows)


def _about_intervals(run: RunFiles) -> list[str]:
    if run.kept_step is None or not run.evaluations:
        return []
    kept = f"After: step {run.kept_step:,}, which the run keeps as the best of {len(run.evaluations):,} evaluations."
    if run.values_at(run.kept_step) is None or run.values_at(0) is None:
        return [kept, "No intervals: the folder holds no values of each pair (held_out/)."]
    return [
        f"{kept} In brackets 95% intervals, resampled over prompts; those of the change are paired. The step was chosen "
        "by these same pairs, which flatters it a little."
    ]


def curves(run: RunFiles) -> list[Chart]:
    """What the objective says a report draws, and how training itself went."""
    return [chart for names in (*run.objective.charts, *ALWAYS_DRAWN) if (chart := _curve(run, names)).series]


def _curve(run: RunFiles, names: Sequence[str]) -> Chart:
    series = []
    for number, name in enumerate(names):
        label = name_of(name) if len(names) > 1 else ""
        steps, values = series_of(run.steps, name)
        in_training = f"{label}, training".removeprefix(", ")
        if steps:
            series.append(Line(in_training, steps, values, colour=2 * number))
        steps, values = series_of(run.evaluations, name)
        if steps:
            held_out = f"{label}, held out".removeprefix(", ")
            series.append(Line(held_out, steps, values, colour=2 * number + 1, is_marked=True))
    title = " and ".join(map(name_of, names))
    kept = run.kept_step if any(line.is_marked for line in series) else None
    if len(series) == 1 and not series[0].is_marked:
        series = [Line("", series[0].x, series[0].y)]
    return Chart(title[0].upper() + title[1:], series, best=kept)


def series_of(rows: dict[int, dict[str, float]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of a metric, where it is there."""
    found = [(step, row[name]) for step, row in rows.items() if name in row]
    return [step for step, _ in found], [value for _, value in found]


def distributions(run: RunFiles) -> list[Chart]:
    """Histograms over held-out pairs of what the objective widens, at the start and at the kept step."""
    before, after = run.values_at(0), run.values_at(run.kept_step or 0)
    if before is None or after is None:
        return []
    charts = []
    for name in DISTRIBUTED:
        if name not in before.metrics or name not in after.metrics:
            continue
        sides = {"before": np.asarray(before.metrics[name])}
        if run.kept_step:
            sides[f"step {run.kept_step:,}"] = np.asarray(after.metrics[name])
        everything = np.concatenate(list(sides.values()))
        if not np.isfinite(everything).all():
            continue
        edges = np.histogram_bin_edges(everything, NUM_BINS)
        bars = [
            Bars(label, edges.tolist(), np.histogram(values, edges)[0].tolist(), colour)
            for colour, (label, values) in enumerate(sides.items())
        ]
        title = name_of(name)
        charts.append(Chart(title[0].upper() + title[1:], bars, x_label=title, y_label="pairs"))
    return charts


# --- data ---


def _data(run: RunFiles) -> Section:
    parts = [
        (title, report)
        for name, title in (("split_from", "before the split"), ("train", "training"), ("eval", "held out"))
        if (report := run.data_report(name)) is not None
    ]
    tables = [_kept_table(parts)] if parts else []
    for title, report in parts:
        tables += [replace(table, title=f"{title}: {table.title}") for table in reason_tables(report)]
    return Section("Data", tables=tables)


def _kept_table(parts: Sequence[tuple[str, DataReport]]) -> Table:
    rows = []
    for title, report in parts:
        tokens = ", ".join(
            f"{part} {found['mean']:g} (longest {found['max']:,})" for part, found in report.tokens.items()
        )
        cut = ", ".join(f"{count:,} {part}" for part, count in report.cut.items() if count)
        dropped = sum(report.dropped.values())
        rows.append([title, f"{report.read:,}", f"{report.kept:,}", f"{dropped:,}", cut or "none", tokens])
    return Table(["", "read", "kept", "dropped", "cut to length", "mean tokens"], rows, figures=False)


# --- recipe and machine ---


def _changed_keys(run: RunFiles) -> Iterator[tuple[str, str, str]]:
    """Each key that is not its default: its path, its value, the default."""
    for key, value in run.recipe.values():
        field = FIELDS.get(key)
        if field is None or field.is_required() or key == "output":
            default = ""
        else:
            default = field.get_default(call_default_factory=True)
            if value == (list(default) if isinstance(default, tuple) else default):
                continue
            default = default if isinstance(default, str) else shown(default)
        if key != "output":
            yield key, value if isinstance(value, str) else shown(value), default


def _differences(run: RunFiles) -> Table:
    return Table(["key", "value", "default"], list(_changed_keys(run)), figures=False)


def machine(run: RunFiles) -> Iterator[tuple[str, str]]:
    """Hardware, versions, time and memory, each as (what, how much)."""
    environment = run.environment
    if "device" in environment:
        ranks = environment.get("processes", 1)
        yield "device", str(environment["device"]) + (f", {ranks} processes" if ranks != 1 else "")
    if seconds := list(_step_seconds(run)):
        yield "time in steps", f"{duration(sum(seconds))} for {len(seconds):,} steps"
        for name in ("tokens_per_second", "pairs_per_second", "groups_per_second"):
            _, values = series_of(run.steps, name)
            if values:
                yield name_of(name), f"{figure(float(np.median(values)))} (median)"
    _, used = series_of(run.steps, "peak_memory_gib")
    if used:
        yield "memory", f"{max(used):.2f} GiB used at the peak"
    packages = environment.get("packages")
    if isinstance(packages, dict):
        versions = [f"{name} {version}" for name, version in packages.items() if version]
        yield "versions", ", ".join([f"qorpo {environment.get('qorpo')}", *versions])
    for name in ("python", "platform", "commit"):
        if environment.get(name):
            yield name, str(environment[name])


def _step_seconds(run: RunFiles) -> Iterator[float]:
    """Of each step, from its speed: a log interval's steps share one."""
    for row in run.steps.values():
        if speed := row.get("pairs_per_second") or row.get("groups_per_second"):
            yield run.recipe.train.pairs_per_step / speed


def next_commands(run: RunFiles) -> list[str]:
    """What a person may want to do now."""
    folder, settings = shlex.quote(str(run.path)), run.recipe.train
    recipe = shlex.quote(str(run.path / "recipe.yaml"))
    if not run.is_finished:
        return [f"qorpo train {recipe} --resume   # if it no longer runs"]
    length = (
        f"max_steps={2 * settings.max_steps}"
        if settings.max_steps
        else f"epochs={float(settings.epochs) + 1:g}"
    )
    go_on = f"qorpo train {recipe} --resume train.{length}   # to train on"
    if run.recipe.tuning == "full" or run.kept_step == 0:
        return [go_on]
    return [f"qorpo merge {folder} --output {folder}-merged   # one model, in the base's weights", go_on]
