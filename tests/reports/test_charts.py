"""Charts: nothing is lost when lines are thinned, and labels of any text are drawn."""

import itertools
import re

import numpy as np
import pytest

from qorpo.reports.charts import Bars, Chart, Line, drawn, png, smoothed, thinned


def test_thinning_keeps_ends_and_extremes():
    y = np.sin(np.linspace(0, 50, 10_000))
    y[1234], y[7777] = 9.0, -9.0
    x = np.arange(1, 10_001)
    few_x, few_y = thinned(x, y)
    assert len(few_x) <= 600
    assert (few_x[0], few_x[-1]) == (1, 10_000)
    assert few_y.max() == 9.0
    assert few_x[few_y.argmax()] == 1235
    assert few_y.min() == -9.0
    assert (np.diff(few_x) > 0).all()


def test_thinning_leaves_short_lines_and_gaps_alone():
    x, y = np.arange(5), np.array([1.0, np.nan, 2.0, np.inf, 3.0])
    assert thinned(x, y)[1] is y
    y = np.full(5_000, np.nan)
    y[100] = 1.0
    assert np.nansum(thinned(np.arange(5_000), y)[1]) == 1.0


def test_smoothing_is_the_mean_of_neighbours_that_are_numbers():
    y = np.array([1.0, 2.0, np.nan, 4.0, 5.0])
    np.testing.assert_allclose(smoothed(y, 3), [1.5, 1.5, 3.0, 4.5, 4.5])


@pytest.mark.parametrize("label", ["$\\frac{", "a & <b> \"c\" 'd'", "λ ≥ 0.1", "_hidden", "{x}"])
def test_any_text_is_a_label(label):
    chart = Chart(label, [Line(label, [1, 2, 3], [1.0, np.nan, 2.0]), Bars(label, [0, 1, 2], [3, 0])])
    found = drawn(chart)
    assert found.points["series"][0]["label"] == label
    assert found.points["series"][0]["y"] == [1.0, None, 2.0]
    assert "<b>" not in found.svg
    assert png([chart, chart, chart], label).startswith(b"\x89PNG")


def test_a_chart_has_the_pages_colours_and_nothing_from_elsewhere():
    svg = drawn(
        Chart(
            "loss", [Line("training", range(300), [1.0] * 300), Line("held out", [0], [1.0], 1, True)], best=0
        )
    ).svg
    assert svg.startswith("<svg")
    assert not re.search(r"#[0-9a-f]{6}\b", svg)
    assert "var(--s0)" in svg
    assert "var(--ink)" in svg
    assert set(re.findall(r"https?://[^\"' ]+", svg)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    ids = re.findall(r' id="([^"]+)"', svg)
    assert all(f"#{each}" in svg for each in ids)


def test_labels_of_an_axis_of_doubles_do_not_run_into_each_other():
    edges = [2**power for power in range(21)]
    svg = drawn(Chart("lengths", [Bars("prompt", edges, [1] * 20)], x_label="tokens", doubles=True)).svg
    places = [
        (float(x), text)
        for x, text in re.findall(r"text-anchor: middle[^>]* x=\"([\d.]+)\"[^>]*>([\d,]+)</text>", svg)
    ]
    assert [text for _, text in places][:2] == ["1", "8"]
    for (left, first), (right, second) in itertools.pairwise(places):
        assert right - left > 9 * 0.64 * (len(first) + len(second)) / 2  # a digit is 0.64 of 9 points wide
