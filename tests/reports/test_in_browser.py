"""Pages as a browser shows them: no error, no request, the pointer's values, narrow and wide."""

import pytest
from helpers.chromium import CHROMIUM, chromium
from helpers.run_folders import DATA, make_run, pair_values

from qorpo.reports.write import write_report

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

NASTY = "<script>alert(1)</script>\x1b[31m" + "x" * 100_000


@pytest.fixture(scope="module")
def tab(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A run's page and a comparison's; rows, names and devices of the run are hostile."""
    folder = tmp_path_factory.mktemp("runs")
    data = DATA | {"train": DATA["train"] | {"examples": {"empty": [NASTY]}}}
    values = {0: pair_values(), 40: pair_values(loss=0.5, accuracy=0.9)}
    runs = [
        make_run(
            folder / "<script>alert(2)<", values=values, data=data, environment={"device": NASTY}, steps=400
        ),
        make_run(folder / "other", values=values),
    ]
    return [write_report(runs[:1], folder / "run.html")[0], write_report(runs, folder / "comparison.html")[0]]


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("width", [400, 1400])
def test_a_page_opens_without_error_or_request_and_fits(tab, pages, number, width):
    tab.messages.clear()
    tab.requests.clear()
    tab.open(pages[number], width)
    assert tab.messages == []
    assert {request.split(":")[0] for request in tab.requests} == {"file"}
    assert len(tab.requests) == 1
    assert tab.value("document.documentElement.scrollWidth") <= width
    charts = tab.value(
        "[...document.querySelectorAll('svg')].map(each => each.getBoundingClientRect().width)"
    )
    assert len(charts) >= 7
    assert min(charts) > 300
    assert tab.value("document.querySelectorAll('body script:not([type])').length") == 1  # the page's own


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_pointer_shows_the_values_under_it(tab, pages, number, width):
    tab.open(pages[number], width)
    tab.value("document.querySelector('svg').scrollIntoView()")
    left, top, across, down = tab.value(
        "(box => [box.left, box.top, box.width, box.height])(document.querySelector('svg').getBoundingClientRect())"
    )
    shown = "getComputedStyle(document.querySelector('.value')).visibility"
    assert tab.value(shown) == "hidden"
    tab.move_to(left + 0.97 * across, top + 0.5 * down)
    assert tab.value(shown) == "visible"
    text = tab.value("document.querySelector('.value').innerText")
    assert text.startswith("step 4")
    assert ": 0.5" in text  # the held-out loss at the end
    place = tab.value(
        "(box => [box.left, box.right])(document.querySelector('.value').getBoundingClientRect())"
    )
    assert 0 <= place[0] < place[1] <= width
    tab.move_to(2, 2)
    assert tab.value(shown) == "hidden"


def test_dark_is_dark(tab, pages):
    colours = []
    for dark in (False, True):
        tab.open(pages[0], 1400, dark=dark)
        colours.append(tab.value("getComputedStyle(document.body).backgroundColor"))
    assert colours == ["rgb(255, 255, 255)", "rgb(20, 23, 26)"]
