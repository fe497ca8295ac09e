"""Charts by matplotlib, for every report: as SVG in the colours of the page around it, or as one PNG.

A long line is thinned before it is drawn: of each stretch of steps its lowest and highest value stay, so that no peak is
lost, and a mean over neighbouring steps is drawn above it.
"""

import io
import itertools
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

MOST_POINTS = 600  # of a line; a longer one is thinned
SMOOTHED_FROM = 120  # points; a shorter line is drawn as it is
SIZE_INCHES = (5.0, 2.9)
NUM_COLOURS = 8
# matplotlib knows no variables of a page: each role is drawn in a colour of its own, which is then replaced.
LIGHT = {
    "ink": "#1f2328", "muted": "#59636e", "grid": "#d9dee3", "s0": "#0072b2", "s1": "#c2410c", "s2": "#15803d",
    "s3": "#9333ea", "s4": "#b45309", "s5": "#0e7490", "s6": "#be185d", "s7": "#4d4d4d",
}  # fmt: skip
IN_PAGE = {role: f"#0101{number:02x}" for number, role in enumerate(LIGHT)}


@dataclass(frozen=True)
class Line:
    """Values over steps. `colour` picks one of the page's; a marked line shows its points, as evaluations have."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    is_marked: bool = False


@dataclass(frozen=True)
class Bars:
    """How many there are from edges[i] to below edges[i + 1]."""

    label: str
    edges: Sequence[float]
    counts: Sequence[float]
    colour: int = 0


@dataclass(frozen=True)
class Chart:
    """Lines, or Bars that share their edges. `best`: a step to mark."""

    title: str
    series: Sequence[Line | Bars]
    x_label: str = "step"
    y_label: str = ""
    best: float | None = None
    doubles: bool = False  # the edges are powers of two


@dataclass(frozen=True)
class Drawn:
    """A chart as SVG, and what a pointer over it is to show: the points and where in the picture the axes are."""

    svg: str
    points: dict[str, Any] = field(default_factory=dict)


def drawn(chart: Chart) -> Drawn:
    """For a page: text stays text, and colours are variables (--ink, --s0, …) that the page sets."""
    with _settings(IN_PAGE):
        figure = _figure(1, 1)
        (axes,) = figure.subplots(1, squeeze=False)[0]
        points = _draw(axes, chart, IN_PAGE)
        file = io.StringIO()
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
        place = axes.get_position()
    box = [round(float(value), 5) for value in (place.x0, 1 - place.y1, place.x1, 1 - place.y0)]
    return Drawn(_cleaned(file.getvalue(), chart.title), {**points, "box": box})


def png(charts: Sequence[Chart], title: str, columns: int = 2) -> bytes:
    """All charts in one picture."""
    with _settings(LIGHT):
        columns = min(columns, len(charts))
        rows = math.ceil(len(charts) / columns)
        figure = _figure(columns, rows)
        cells = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, chart in zip(cells, charts, strict=False):
            _draw(axes, chart, LIGHT)
            axes.set_title(chart.title, loc="left", pad=18)  # above the legend
        for axes in cells[len(charts) :]:
            axes.set_axis_off()
        figure.suptitle(title, x=0.01, ha="left")
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=110)
    return picture.getvalue()


def _settings(colours: dict[str, str]) -> Any:
    import matplotlib as mpl  # here: it takes half a second

    return mpl.rc_context({
        "svg.fonttype": "none", "svg.hashsalt": "qorpo", "text.parse_math": False, "font.size": 9,
        "font.sans-serif": ["DejaVu Sans"], "axes.spines.top": False, "axes.spines.right": False,
        "text.color": colours["ink"], "axes.labelcolor": colours["muted"], "axes.edgecolor": colours["muted"],
        "xtick.color": colours["muted"], "ytick.color": colours["muted"], "grid.color": colours["grid"],
        "axes.titlesize": 10, "legend.frameon": False, "axes.formatter.useoffset": False,
    })  # fmt: skip


def _figure(columns: int, rows: int) -> Any:
    from matplotlib.figure import Figure

    width, height = SIZE_INCHES
    return Figure(figsize=(width * columns, height * rows), layout="constrained")


def _draw(axes: Any, chart: Chart, colours: dict[str, str]) -> dict[str, Any]:
    """Draw a chart into matplotlib's axes; returns its points."""
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    points = []
    for series in chart.series:
        colour = colours[f"s{series.colour % NUM_COLOURS}"]
        if isinstance(series, Line):
            points.append(_draw_line(axes, series, colour))
        else:
            points.append(_draw_bars(axes, series, colour))
    axes.grid(True, axis="y", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
    bars = [series for series in chart.series if isinstance(series, Bars)]
    if bars:
        axes.set_ylim(bottom=0)
    if chart.doubles and bars:
        edges = bars[0].edges
        axes.set_xscale("log", base=2)
        every = math.ceil(len(edges) / 8)  # more labels would run into each other
        axes.set_xticks(edges[::every], [f"{edge:,.0f}" for edge in edges[::every]])
        axes.minorticks_off()
    elif not bars:
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
        if chart.best is not None:
            axes.axvline(chart.best, color=colours["muted"], linewidth=0.8, linestyle=":")
            axes.annotate(
                "kept", (chart.best, 1), xycoords=("data", "axes fraction"), color=colours["muted"],
                xytext=(-2, -2), textcoords="offset points", ha="right", va="top", fontsize=8,
            )  # fmt: skip
    if any(series.label for series in chart.series):
        # Above the axes, where no line can run through it.
        axes.legend(
            loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=2, fontsize=8, borderpad=0, handlelength=1.4
        )
    limits = {"x": list(axes.get_xlim()), "y": list(axes.get_ylim())}
    return {**limits, "log2": chart.doubles, "x_label": chart.x_label, "series": points}


def _draw_line(axes: Any, line: Line, colour: str) -> dict[str, Any]:
    x, y = np.asarray(line.x, float), np.asarray(line.y, float)
    shown = thinned(x, y)
    if line.is_marked or len(x) < SMOOTHED_FROM:
        marker = "o" if line.is_marked or len(x) == 1 else ""
        axes.plot(
            *shown, color=colour, label=_legend_text(line.label), linewidth=1.4, marker=marker, markersize=3
        )
    else:
        axes.plot(*shown, color=colour, linewidth=0.7, alpha=0.35)
        window = window_of(len(x))
        mean = smoothed(y, window)
        axes.plot(
            *thinned(x, mean),
            color=colour,
            label=_legend_text(f"{line.label}, mean of {window} steps".removeprefix(", ")),
            linewidth=1.4,
        )
    return {"label": line.label, "colour": line.colour % NUM_COLOURS, **_listed(*shown)}


def _draw_bars(axes: Any, bars: Bars, colour: str) -> dict[str, Any]:
    axes.stairs(bars.counts, bars.edges, label=_legend_text(bars.label), color=colour, linewidth=1.4)
    axes.stairs(bars.counts, bars.edges, color=colour, fill=True, alpha=0.15)
    edges = np.asarray(bars.edges, float)
    middles = np.sqrt(edges[:-1] * edges[1:]) if edges[0] > 0 else (edges[:-1] + edges[1:]) / 2
    names = [f"{low:.4g} to {high:.4g}" for low, high in itertools.pairwise(edges)]
    found = _listed(middles, np.asarray(bars.counts, float))
    return {"label": bars.label, "colour": bars.colour % NUM_COLOURS, "names": names, **found}


def _legend_text(label: str) -> str:
    """matplotlib leaves out what begins with an underscore."""
    return f" {label}" if label.startswith("_") else label


def _listed(x: np.ndarray, y: np.ndarray) -> dict[str, list[float | None]]:
    return {
        name: [float(f"{value:.5g}") if math.isfinite(value) else None for value in values]
        for name, values in (("x", x), ("y", y))
    }


def thinned(x: np.ndarray, y: np.ndarray, most: int = MOST_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """The first and last point, and of each stretch between its lowest and highest: at most `most` points."""
    if len(x) <= most:
        return x, y
    kept = {0, len(x) - 1}
    for places in np.array_split(np.arange(len(x)), (most - 2) // 2):
        values = y[places]
        if np.isfinite(values).any():
            kept |= {int(places[np.nanargmin(values)]), int(places[np.nanargmax(values)])}
    order = sorted(kept)
    return x[order], y[order]


def window_of(count: int) -> int:
    """An odd number of steps, about a fortieth of all."""
    return max(5, count // 40 | 1)


def smoothed(y: np.ndarray, window: int) -> np.ndarray:
    """The mean over `window` neighbours, fewer at the ends; of what is a number."""
    is_number = np.isfinite(y)
    sums = np.convolve(np.where(is_number, y, 0.0), np.ones(window), "same")
    counts = np.convolve(is_number, np.ones(window), "same")
    return np.where(counts > 0.5, sums / np.maximum(counts, 1), np.nan)


def _cleaned(svg: str, title: str) -> str:
    """The <svg> element alone, in the page's colours, without ids that several charts of a page would share."""
    svg = svg[svg.index("<svg") :]
    referenced = set(re.findall(r"#([\w.-]+)", svg))
    svg = re.sub(r' id="([\w.-]+)"', lambda match: match[0] if match[1] in referenced else "", svg)
    for role, colour in IN_PAGE.items():
        svg = svg.replace(colour, f"var(--{role})")
    svg = re.sub(r"font: ([^;]*?)(\d[\d.]*px) [^;\"]*", r"font: \1\2 sans-serif", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", svg, count=1)
    svg = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", svg, count=1)
    return svg.replace("<svg", f'<svg role="img" aria-label="{_attribute(title)}"', 1)


def _attribute(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
