"""The page in a real browser: everything is pressed, and nothing may fail in the console or be asked of a network."""

import csv
import io
import re
from dataclasses import replace

import pytest

from fillm.report.figures import figures_of
from fillm.report.page import write_page
from fillm.report.runs import load_runs
from tests.report import run_folders
from tests.report.browsing import NEEDS_BROWSER, column, opened, until
from tests.report.page_example import HOSTILE, example_figures, example_runs, ranking_table

SOIR = ".table:has([aria-label='Ranking of soir'])"
# What a page puts into the clipboard, which a browser without a screen does not have.
CLIPBOARD = (
    "Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text) => { window.copied = text; }}})"
)

INK = "getComputedStyle(document.querySelector('#figure-2-plot-1 .xtick text')).fill"
WHOLE = "[...document.querySelectorAll('.scroll')].every((e) => e.scrollHeight <= e.clientHeight + 1)"

pytestmark = NEEDS_BROWSER


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    path = tmp_path_factory.mktemp("browser") / "report.html"
    write_page(path, example_runs(), example_figures(), f"Report of {HOSTILE}")
    return path.as_uri()


@pytest.fixture(scope="module")
def shared(browser, address):
    """One page for all tests that touch different parts of it."""
    with opened(browser, address, script=CLIPBOARD) as page:
        yield page


def test_every_figure_is_drawn_and_names_stay_names(shared):
    assert shared.locator(".figure").count() == shared.locator(".figure.drawn").count() == 5
    assert shared.locator(".plot .main-svg").count() >= 7
    assert shared.title() == f"Report of {HOSTILE}" and shared.locator("img[src='x']").count() == 0
    assert HOSTILE in shared.locator("#figure-2 .legend").inner_text()
    assert not shared.locator("#plots-failed").is_visible() and not shared.locator(".still").first.is_visible()


def test_a_header_sorts_by_value_one_way_and_the_other(shared):
    scores = [score for score in ranking_table(0)["score"].to_pylist()]
    head = shared.locator(SOIR).locator("th[data-name=score]")
    for order, expected in (("ascending", sorted(scores)), ("descending", sorted(scores, reverse=True))):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert [float(value) for value in column(shared, SOIR, "score")] == expected
    assert shared.locator(SOIR).locator("output").inner_text() == "Sorted by score, highest first"
    assert head.evaluate("head => getComputedStyle(head).textAlign") == "right"


def test_the_keyboard_sorts_too_and_shows_where_it_is(shared):
    name, score = (shared.locator(SOIR).locator(f"th[data-name={word}]") for word in ("name", "score"))
    name.locator("button").focus()
    shared.keyboard.press("Tab")
    shared.keyboard.press("Shift+Tab")
    assert name.locator("button").evaluate("e => getComputedStyle(e).outlineStyle") == "solid"
    shared.keyboard.press("Enter")
    assert name.get_attribute("aria-sort") == "ascending" and score.get_attribute("aria-sort") is None
    names = [
        name for name in column(shared, SOIR, "name") if re.fullmatch(r"model\.layers\.\d+\.mlp\.up_proj\.weight", name)
    ]
    assert names == [f"model.layers.{i}.mlp.up_proj.weight" for i in range(12)]  # 2 before 10


def test_what_is_missing_stays_last(shared):
    table = ".table:has([aria-label='Metrics'])"
    head = shared.locator(table).locator("th").nth(2).locator("button")
    for expected in (["3.2e-07", "0.9", ""], ["0.9", "3.2e-07", ""]):
        head.click()
        assert column(shared, table, "forget quality (p-value)") == expected


def test_a_filter_keeps_the_rows_with_all_its_words_and_a_copy_has_those(shared):
    table = ".table:has([aria-label='Ranking of gradient'])"
    names = ranking_table(1)["name"].to_pylist()
    holder = shared.locator(table)
    holder.locator("input").fill("MLP .7.")
    wanted = [name for name in names if "mlp" in name and ".7." in name]
    assert column(shared, table, "name") == wanted and len(wanted) == 3
    assert holder.locator("output").inner_text() == "3 of 102 rows"
    holder.locator(".copy").click()
    until(shared, "window.copied")
    assert holder.locator("output").inner_text() == "Copied 3 rows"
    copied = list(csv.DictReader(io.StringIO(shared.evaluate("window.copied"))))
    assert [row["name"] for row in copied] == wanted and "score_low" in copied[0]
    rows = {row["name"]: row for row in ranking_table(1).to_pylist()}
    assert all(float(row["score"]) == rows[row["name"]]["score"] for row in copied)
    holder.locator("input").fill("")
    holder.locator(".copy").click()
    until(shared, "window.copied.length > 4000")
    assert [row["name"] for row in csv.DictReader(io.StringIO(shared.evaluate("window.copied")))] == names


def test_further_columns_come_when_asked_for(shared):
    holder = shared.locator(SOIR)
    low = holder.locator("th[data-name=score_low]")
    assert not low.is_visible()
    holder.locator(".columns").click()
    assert low.is_visible() and holder.locator(".columns").get_attribute("aria-pressed") == "true"
    holder.locator(".columns").click()
    assert not low.is_visible()


def test_pointing_at_a_cell_names_it_and_dragging_zooms(shared):
    cells = shared.locator("#figure-3-plot-1 .nsewdrag")
    cells.scroll_into_view_if_needed()
    box = cells.bounding_box()
    shared.mouse.move(box["x"] + box["width"] * 12.5 / 13, box["y"] + box["height"] / 18)
    said = shared.locator("#figure-3-plot-1 .hovertext").first
    said.wait_for()
    assert "mlp.up_proj.weight" in said.text_content() and "layer: 11" in said.text_content()
    shared.mouse.move(box["x"] + box["width"] * 0.5 / 13, box["y"] + box["height"] * 17 / 18)
    until(shared, "document.querySelector('#figure-3-plot-1 .hovertext')?.textContent.includes('</script><img')")

    area = shared.locator("#figure-2-plot-1 .nsewdrag")
    area.scroll_into_view_if_needed()
    box = area.bounding_box()
    span = "(() => { const r = document.getElementById('figure-2-plot-1').layout.xaxis.range; return r[1] - r[0]; })()"
    before = shared.evaluate(span)
    shared.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + box["height"] * 0.25)
    shared.mouse.down()
    shared.mouse.move(box["x"] + box["width"] * 0.75, box["y"] + box["height"] * 0.75, steps=4)
    shared.mouse.up()
    until(shared, f"{span} < {before}")
    zoomed = shared.evaluate(span)
    assert zoomed == pytest.approx(before / 2, rel=0.05)
    shared.locator("#theme").click()  # a view that was chosen outlives a change of colours
    assert shared.evaluate(span) == zoomed
    shared.locator("#theme").click()


def test_a_series_is_hidden_in_every_panel_at_once(shared):
    entry = shared.locator("#figure-6 .legend button").nth(2)
    visible = "['1', '2'].map((i) => document.getElementById(`figure-6-plot-${i}`)._fullData[2].visible)"
    assert shared.evaluate(visible) == [True, True]
    entry.click()
    assert entry.get_attribute("aria-pressed") == "false"
    until(shared, f"{visible}.every((v) => v === 'legendonly')")
    entry.click()
    until(shared, f"{visible}.every((v) => v === true)")


def test_a_plot_is_saved_as_a_picture(shared):
    plot = shared.locator("#figure-5-plot-1")
    plot.hover()
    with shared.expect_download() as download:
        plot.locator(".modebar-btn").first.click()
    assert download.value.suggested_filename == "figure-5-plot-1.png"


def ground(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")


def ink(page):
    return page.evaluate(INK)


def test_the_theme_is_the_systems_until_the_button_is_pressed(browser, address):
    with opened(browser, address, color_scheme="dark") as page:
        dark, words = ground(page), ink(page)
        button = page.locator("#theme")
        assert (
            button.get_attribute("aria-pressed") == "true" and page.locator("html").get_attribute("data-theme") is None
        )
        button.click()
        assert button.get_attribute("aria-pressed") == "false"
        until(page, f"getComputedStyle(document.querySelector('#figure-2-plot-1 .xtick text')).fill !== '{words}'")
        light = ground(page)
        assert brightness(dark) < 60 < 200 < brightness(light) and brightness(ink(page)) < 60 < 200 < brightness(words)
        page.reload()
        page.wait_for_selector("html[data-ready]", state="attached")
        assert ground(page) == light  # kept


def brightness(colour):
    return sum(map(int, re.findall(r"\d+", colour)[:3])) / 3


def test_on_paper_there_are_whole_tables_and_still_pictures(browser, address):
    with opened(browser, address, color_scheme="dark", width=680) as page:
        page.emulate_media(media="print")
        assert brightness(ground(page)) == 255
        assert page.locator(".plot:visible, .controls:visible, #theme:visible").count() == 0
        assert page.locator(".still:visible").count() == page.locator(".still").count() == 6
        assert page.evaluate(
            "[...document.querySelectorAll('.scroll')].every((e) => e.scrollHeight <= e.clientHeight + 1)"
        )
        assert page.evaluate("document.documentElement.scrollWidth") <= 680
        assert page.pdf(format="A4").startswith(b"%PDF")


def test_nothing_of_a_wide_table_is_outside_the_paper(browser, tmp_path):
    kinds = ("probability", "rouge_l_recall", "truth_ratio", "exact_memorisation", "extraction_strength")
    names = [f"{part}_{metric}" for part in ("forget", "retain", "general", "world_facts") for metric in kinds]
    folders = [
        run_folders.evaluate(tmp_path / f"scores-of-{i}", {name: (i + 1) / (k + 3) for k, name in enumerate(names)})
        for i in range(7)
    ]
    columns = {f"a_column_named_{i}": [f"w{i}" * 4, "x" * 90] for i in range(14)}
    folders.append(run_folders.write(tmp_path / "rows", {"settings": {}}, {"rows": columns}, summary={names[0]: 0.5}))
    runs = load_runs(folders)
    write_page(tmp_path / "wide.html", runs, figures_of(runs), "Wide")
    beyond = """[...document.querySelectorAll('table *')].map((e) => e.getBoundingClientRect())
      .filter((box) => box.width && (box.right > 680.5 || box.left < -0.5)).length"""
    with opened(browser, (tmp_path / "wide.html").as_uri(), width=680) as page:
        metrics, rows = page.locator("#figure-1"), page.locator(".table:has([aria-label='Rows of rows'])")
        assert page.evaluate(beyond) > 0 and metrics.locator(".paper:visible").count() == 0  # on the screen it scrolls
        page.emulate_media(media="print")
        assert page.evaluate(beyond) == 0
        assert metrics.locator(".table:visible").count() == 0 and metrics.locator(".paper:visible").count() == 2
        down = metrics.locator(".paper tbody th:visible").all_text_contents()
        assert down == [name.replace("_", " ") for name in names] * 2
        across = metrics.locator(".paper thead th:visible").all_text_contents()
        assert [head for head in across if head != "run"] == [run.name for run in runs]
        first = metrics.locator(".paper tbody tr").first.locator("td").all_text_contents()
        assert [float(text) for text in first] == pytest.approx([(i + 1) / 3 for i in range(5)], abs=1e-3)
        page.emulate_media(media="screen")
        rows.locator(".columns").click()
        page.emulate_media(media="print")
        cells = rows.locator("tbody tr").first.locator("td:visible")
        assert page.evaluate(beyond) == 0 and cells.count() == 14 and rows.locator("th:visible").count() == 0
        said = cells.evaluate_all("cells => cells.map((cell) => getComputedStyle(cell, '::before').content)")
        assert [word.strip('" ') for word in said] == list(columns)


def test_the_header_of_a_long_table_stands_on_every_page(browser, address):
    with opened(browser, address) as page:
        page.emulate_media(media="print")
        # Chromium repeats no header in which a button has a box of its own.
        assert page.locator(SOIR).locator("th button").first.evaluate("e => getComputedStyle(e).display") == "contents"
        assert page.locator(SOIR).locator("thead").evaluate("e => getComputedStyle(e).breakInside") == "avoid"


def test_a_telephone_has_nothing_to_scroll_sideways(browser, address):
    with opened(browser, address, width=380) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 380
        ticks = page.locator("#figure-3-plot-1 .ytick text").all_text_contents()
        assert "mlp.up_proj" in ticks


def test_a_long_word_for_a_name_is_broken(browser, tmp_path):
    runs = [replace(run, name=f"{run.name}-{'n' * 200}") for run in example_runs()]
    write_page(tmp_path / "long.html", runs, example_figures(), "t" * 200)
    with opened(browser, (tmp_path / "long.html").as_uri(), width=380) as page:
        assert page.evaluate("document.documentElement.scrollWidth") == 380


def test_axis_titles_end_inside_a_telephone(browser, tmp_path):
    row = {"workload": "w", "method": "soir", "n": 6, "retain_samples": 6, "storage": "float32", "kind": "sjlt"}
    rows = [{**row, "k": k, "store_bytes": k, "median_error": 1 / k, "pass_over_plain": k} for k in (8, 16)]
    runs = load_runs([run_folders.compression(tmp_path / "c.parquet", rows)])
    write_page(tmp_path / "c.html", runs, figures_of(runs), "Curves")
    inside = """() => [...document.querySelectorAll('.xtitle, .ytitle')].map((title) => {
      const [own, plot] = [title, title.closest('.plot')].map((e) => e.getBoundingClientRect());
      return own.left >= plot.left && own.right <= plot.right && own.top >= plot.top && own.bottom <= plot.bottom;
    })"""
    with opened(browser, (tmp_path / "c.html").as_uri(), width=380) as page:
        assert page.evaluate(inside) == [True] * 4


def test_without_what_unpacks_plotly_still_pictures_stay(browser, address):
    with opened(browser, address, script="delete window.DecompressionStream;") as page:
        assert page.locator("#plots-failed").is_visible()
        assert page.locator(".still:visible").count() == 6 and page.locator(".plot:visible").count() == 0
        page.locator(SOIR).locator("th[data-name=rank] button").click()  # tables work all the same
        assert column(page, SOIR, "rank")[:2] == ["1", "2"]


def test_without_scripts_there_is_everything_to_read(browser, address):
    with opened(browser, address, java_script_enabled=False) as page:
        assert page.locator(".still:visible").count() == 6
        assert page.locator(".controls:visible, #theme:visible").count() == 0
        assert page.locator(SOIR).locator("tbody tr").count() == 102


def test_the_policy_stops_what_does_not_belong(browser, address):
    listen = "(e) => violations.push(e.violatedDirective)"
    script = "Object.assign(document.createElement('script'), {textContent: 'window.owned = 1'})"
    # Three lines in the console: the script, and the request as refused and as failed.
    with opened(browser, address, expected=3) as page:
        page.evaluate(f"window.violations = []; addEventListener('securitypolicyviolation', {listen})")
        page.evaluate(f"document.body.append({script})")
        page.evaluate("fetch('https://example.org/').catch(() => {})")
        until(page, "violations.length === 2")
        assert page.evaluate("[window.owned ?? null, ...violations.sort()]") == [None, "connect-src", "script-src-elem"]
