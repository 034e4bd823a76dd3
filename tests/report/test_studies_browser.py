"""The sections of studies in a real browser: drawn, pointed at, sorted and filtered, with nothing in the console."""

from pathlib import Path

import pytest

from fillm.evaluate.reference import ITSELF
from fillm.report.figures import figures_of
from fillm.report.page import write_page
from fillm.report.runs import load_runs
from tests.report import run_folders
from tests.report.browsing import NEEDS_BROWSER, column, opened, until

pytestmark = NEEDS_BROWSER
DAMAGE = ".table:has([aria-label='Damage at equal forgetting: Which mask keeps most, in numbers'])"
ROWS = "details:has(> summary h3:text-is('Which mask keeps most (which_mask)'))"
CLAIM = "What was claimed: The top is <b>best</b>. Source: A paper."


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("studies")
    own = {"forget_quality": 1.0, "model_utility": 0.5, "notes": {"forget_quality": ITSELF}}
    other = {"forget_quality": 0.1, "model_utility": 0.4}
    scored = [run_folders.evaluate(folder / name, told) for name, told in (("own", own), ("other", other))]
    runs = load_runs([run_folders.experiments(folder), *scored])
    write_page(folder / "report.html", runs, figures_of(runs), "Studies")
    with opened(browser, (folder / "report.html").as_uri()) as shown:
        yield shown


def figure(page, title):
    return page.locator(f".panel:has(> h3:text-is('{title}'))")


def test_every_study_is_drawn_with_its_bars_and_its_claim(page):
    assert page.locator(".figure").count() == page.locator(".figure.drawn").count() == 3
    damage = figure(page, "Damage at equal forgetting: Which mask keeps most")
    assert damage.locator(".caption").inner_text().endswith(CLAIM) and damage.locator(".caption b").count() == 0
    assert damage.locator(".plot .main-svg").count() >= 2 and damage.locator("path.xerror").count() == 8
    assert figure(page, "moved").locator("path.yerror").count() == 5


def test_a_model_compared_with_itself_is_hollow_and_the_legend_says_so(page):
    frontier = figure(page, "Forgetting against keeping")
    entry = frontier.locator(".legend button", has_text="own (compared with itself)")
    assert entry.locator("g").get_attribute("fill") == "none"
    assert "A hollow marker is a model that was compared with itself" in frontier.locator(".caption").inner_text()
    symbols = """(section) => [...section.querySelectorAll('.plot')].flatMap((plot) => plot._fullData)
      .map((trace) => [trace.meta.name, trace.marker.symbol.endsWith('-open')])"""
    drawn = dict(frontier.evaluate(symbols))
    assert drawn["own (compared with itself)"] is True and drawn["other"] is False
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    hidden = """[...document.querySelectorAll('.plot')].flatMap((plot) => plot._fullData ?? [])
      .filter((trace) => trace.meta?.name?.startsWith('own')).every((trace) => trace.visible === 'legendonly')"""
    until(page, hidden)
    entry.click()


def test_the_damage_table_sorts_by_value_and_filters_by_loss(page):
    table = page.locator(DAMAGE)
    head = table.locator("th[data-name='damage (ratio)']")
    values = [float(value) for value in column(page, DAMAGE, "damage (ratio)")]
    assert len(values) == 8
    for order, expected in (("ascending", sorted(values)), ("descending", sorted(values, reverse=True))):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert [float(value) for value in column(page, DAMAGE, "damage (ratio)")] == expected
    assert column(page, DAMAGE, "mask")[0] == "soir top, 0.1"  # the most damage
    table.locator("input").fill("random npo")
    assert set(column(page, DAMAGE, "loss, level (nats a token)")) == {"npo, 1", "npo, 2"}
    low, high = (column(page, DAMAGE, name) for name in ("95 % low", "95 % high"))
    middle = column(page, DAMAGE, "damage (ratio)")
    assert all(float(a) < float(b) < float(c) for a, b, c in zip(low, middle, high, strict=True))
    table.locator("input").fill("")


def test_pointing_at_a_mask_says_its_interval(page):
    damage = figure(page, "Damage at equal forgetting: Which mask keeps most")
    area = damage.locator(".plot .nsewdrag").first
    area.scroll_into_view_if_needed()
    place = """(section) => {
      const plot = section.querySelector('.plot'), box = plot.querySelector('.nsewdrag').getBoundingClientRect();
      const { _fullData: [trace], _fullLayout: { xaxis, yaxis } } = plot;
      return [box.left + xaxis.d2p(trace.x[0]), box.top + yaxis.d2p(trace.y[0])];
    }"""
    page.mouse.move(*damage.evaluate(place))
    said = damage.locator(".hovertext").first
    said.wait_for()
    assert "soir top, 0.1: 3 models" in said.text_content() and "[" in said.text_content()


def test_the_rows_of_a_study_stand_under_its_title_and_sort(page):
    rows = page.locator(ROWS)
    assert rows.locator(".caption").inner_text() == CLAIM
    choice = rows.locator("th[data-name=choice]")
    choice.locator("button").click()
    shown = column(page, f"{ROWS} .table", "choice")
    assert len(shown) == 18 and shown == sorted(shown)


@pytest.mark.parametrize("width", [380, pytest.param(1280, marks=pytest.mark.slow)])
def test_long_names_of_masks_and_wide_intervals_find_their_room(browser, tmp_path, width):
    runs = load_runs([Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "unlearning.csv"])
    write_page(tmp_path / "masks.html", runs, figures_of(runs), "Masks")
    with opened(browser, (tmp_path / "masks.html").as_uri(), width=width) as shown:
        assert shown.evaluate("document.documentElement.scrollWidth") == width
        names = shown.locator("#figure-1-plot-1 .ytick text").all_text_contents()
        assert ("soir --…ade-off" if width == 380 else "soir --objective trade-off") in names
