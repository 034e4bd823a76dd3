"""The page as a file: what is in it, what is not, and that nothing from a run can be more than text."""

import base64
import gzip
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from itertools import pairwise

import pytest

from fillm.errors import UsageError
from fillm.report.page import LARGEST, plotly_script, write_page, writing
from fillm.report.page.overview import cards
from fillm.report.runs import load_runs
from tests.report import run_folders
from tests.report.page_example import HOSTILE, HOSTILE_NAMES, example_figures, example_runs, ranking_table

VOID = {"meta", "link", "img", "input", "br", "wbr"}
TITLE = f"Report of {HOSTILE}"


class Parsed(HTMLParser):
    """Elements as (tag, attributes, text), and the texts of cells by table."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None], list[str]]] = []
        self.open: list[int] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), (tag, attrs)
        self.elements.append((tag, dict(attrs), []))
        if tag not in VOID:
            self.open.append(len(self.elements) - 1)

    def handle_endtag(self, tag):
        assert self.elements[self.open.pop()][0] == tag

    def handle_data(self, data):
        for index in self.open:
            self.elements[index][2].append(data)

    def all(self, tag):
        return [(attributes, "".join(texts)) for name, attributes, texts in self.elements if name == tag]

    def by_id(self, name):
        [found] = [("".join(texts)) for _, attributes, texts in self.elements if attributes.get("id") == name]
        return found


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "report.html"
    write_page(path, example_runs(), example_figures(), TITLE)
    return path.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def parsed(page):
    return Parsed(page)


def test_the_page_is_small_and_the_same_bytes_twice(page, tmp_path):
    write_page(tmp_path / "again.html", example_runs(), example_figures(), TITLE)
    again = (tmp_path / "again.html").read_bytes()
    assert again == page.encode("utf-8")
    assert len(again) < LARGEST == 5_000_000


def test_nothing_in_it_leads_out_of_it(page, parsed):
    for tag, attributes, _ in parsed.elements:
        assert not {name for name in attributes if name.startswith("on")}, (tag, attributes)
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            target = attributes.get(name)
            assert target is None or target.startswith(("data:", "#")), (tag, name)
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(", page)
    assert not [tag for tag, _, _ in parsed.elements if tag in ("iframe", "object", "embed", "form", "base")]


def test_the_policy_names_the_two_scripts_and_nothing_else(page, parsed):
    [policy] = [a["content"] for a, _ in parsed.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules["default-src"] == rules["connect-src"] == rules["base-uri"] == rules["form-action"] == "'none'"
    assert rules["img-src"] == "data: blob:"
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    hashes = [base64.b64encode(hashlib.sha256(text).digest()).decode() for text in (script.encode(), plotly_script())]
    assert rules["script-src"] == " ".join(f"'sha256-{digest}'" for digest in hashes)


def test_plotly_is_inside_as_it_was_installed(parsed):
    assert gzip.decompress(base64.b64decode(parsed.by_id("plotly"))) == plotly_script()


def test_what_comes_from_runs_is_text(page, parsed):
    assert HOSTILE not in page and "<b>bold" not in page and "<!--" not in page
    assert [a.get("src", "")[:22] for a, _ in parsed.all("img")] == ["data:image/png;base64,"] * len(parsed.all("img"))
    kinds = [a.get("type") for a, _ in parsed.all("script")]
    assert kinds.count(None) == 1 and set(kinds) == {None, "application/json", "application/octet-stream"}
    assert parsed.all("title")[0][1] == parsed.all("h1")[0][1] == TITLE
    cells = {text for _, text in parsed.all("td")}
    assert set(HOSTILE_NAMES) <= cells
    assert HOSTILE in "".join(text for _, text in parsed.all("pre"))


def test_plots_are_data_in_which_no_name_is_markup(parsed):
    texts = [text for a, text in parsed.all("script") if a.get("id", "").endswith("-data")]
    assert len(texts) == 7
    tags = set()
    for text in texts:
        assert not set(text) & set("<>&\u2028\u2029")
        plot = json.loads(text)
        for trace in plot["traces"]:
            trace["meta"].pop("name", None)  # what the legend's buttons find a series by; never drawn
        tags |= set(re.findall(r"<[^>]*>", json.dumps(plot, ensure_ascii=False)))
    assert tags == {"<b>", "</b>", "<br>", "<extra>", "</extra>"}


def test_elements_refer_to_elements_that_are_there(parsed):
    ids = [a["id"] for _, a, _ in parsed.elements if "id" in a]
    assert len(set(ids)) == len(ids)
    for _, attributes, _ in parsed.elements:
        for name in ("aria-labelledby", "aria-describedby", "for", "data-of"):
            assert set((attributes.get(name) or "").split()) <= set(ids)
        if (attributes.get("href") or "").startswith("#"):
            assert attributes["href"][1:] in ids
    for label in (a["id"] for a, _ in parsed.all("input")):
        assert label in {a.get("for") for a, _ in parsed.all("label")}


def test_headings_descend_one_by_one_and_pictures_have_words(parsed):
    levels = [int(tag[1]) for tag, _, _ in parsed.elements if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    assert parsed.all("html")[0][0]["lang"] == "en"
    for attributes, _ in parsed.all("img"):
        assert len(attributes["alt"]) > 20 and int(attributes["width"]) > 100 and int(attributes["height"]) > 50


def rows_of(page, name):
    """Exact values of a table's cells."""
    block = page[page.index(f'aria-label="{name}"') :]
    block = Parsed(block[block.index("<table") : block.index("</table>") + len("</table>")])
    heads = [a["data-name"] for a, _ in block.all("th")]
    cells = [a.get("data-v", text) for a, text in block.all("td")]
    return heads, [cells[i : i + len(heads)] for i in range(0, len(cells), len(heads))]


def test_a_table_holds_the_exact_values_of_its_file(page):
    heads, rows = rows_of(page, "Ranking of soir")
    table = ranking_table(0)
    assert sorted(heads) == sorted(set(table.column_names) - {"nothing"})  # a column without any value
    assert heads[:6] == ["rank", "name", "kind", "layer", "numel", "score"]  # and `note`, always empty, is no first one
    for name in heads:
        values = [row[heads.index(name)] for row in rows]
        if table.schema.field(name).type == "double":
            assert [float(value) for value in values] == table[name].to_pylist()
        else:
            assert values == [str(value) for value in table[name].to_pylist()]


def test_the_numbers_of_a_figure_are_a_table(page):
    heads, rows = rows_of(page, "Numbers of: Agreement of rankings")
    assert heads == ["ranking", "soir", "first-order", "gradient", "parameter-shift"]
    assert rows[1] == ["first-order", "0.93", "1.0", "0.5", "0.0"] and rows[2][4] == ""
    heads, rows = rows_of(page, "Numbers of: Forget against retain")
    [first] = [s for s in example_figures()[1].panels[0].series if s.style == 0]
    assert [float(rows[0][heads.index(f"loss on forget (nats a token){end}")]) for end in ("", ", low", ", high")] == [
        first.x[0], first.x_low[0], first.x_high[0]
    ]  # fmt: skip


def test_a_legend_names_even_a_single_series(tmp_path):
    frontier = example_figures()[1]
    alone = replace(frontier, panels=(replace(frontier.panels[0], series=frontier.panels[0].series[:1]),))
    unnamed = replace(alone, panels=(replace(alone.panels[0], series=(replace(alone.panels[0].series[0], name=""),)),))
    write_page(tmp_path / "page.html", example_runs()[2:3], [alone, unnamed], "Legends")
    buttons = [a for a, _ in Parsed((tmp_path / "page.html").read_text(encoding="utf-8")).all("button")]
    assert [a["data-name"] for a in buttons if "data-name" in a] == ["soir, top 10 %"]


def test_summary_and_provenance_say_what_was_run(page, parsed):
    assert "2 rankings, 1 unlearning and 1 evaluation of tiny-llama." in page
    values = dict(zip((t for _, t in parsed.all("dt")), (t for a, t in parsed.all("dd") if "value" in a["class"]),
                      strict=True))  # fmt: skip
    top = ranking_table(0)["name"][0].as_py()
    assert values["First in the ranking"] == top
    assert values["Loss on forget (nats a token)"] == "0.08000 → 3.210"
    assert values["Weights outside the mask"] == "bit-equal"
    assert values["Computing time"] == "2 min 08 s"  # 12.5 + 112.5 + 2.5 = 127.5 s
    assert values["Model utility"] == "0.6123"
    heads, rows = rows_of(page, "All runs")
    assert [row[heads.index("seconds")] for row in rows] == ["12.5", "112.5", "2.5", ""]
    assert "device: cpu" in parsed.all("pre")[0][1]


def test_what_is_noted_of_a_headline_number_stands_with_it(tmp_path):
    note = "compares the model with itself, which says nothing of forgetting"
    folders = [
        run_folders.evaluate(tmp_path / "forgotten", {"forget_quality": 0.25, "notes": {}}),
        run_folders.evaluate(tmp_path / "same", {"forget_quality": 1.0, "notes": {"forget_quality": note}}),
        run_folders.evaluate(tmp_path / "alone", {"forget_quality": None, "notes": {"forget_quality": "none"}}),
    ]
    [card] = cards(load_runs(folders))[:1]
    assert (card.label, card.value) == ("Forget quality", "0.2500 to 1.000")
    assert card.more == f"2 evaluations; same: {note}"


def test_runs_without_headline_numbers_have_no_summary(tmp_path):
    row = {"workload": "w", "method": "soir", "kind": "sjlt", "k": 8, "store_bytes": 8}
    runs = load_runs([run_folders.compression(tmp_path / "c.parquet", [row])])
    write_page(tmp_path / "page.html", runs, [], "Nothing to head it")
    found = (tmp_path / "page.html").read_text()
    assert 'id="summary"' not in found and 'href="#summary"' not in found and 'href="#runs"' in found


def test_long_tables_are_cut_as_far_as_it_takes(tmp_path, monkeypatch):
    runs = example_runs()[:1]
    runs[0].tables["ranking"] = ranking_table(0, layers=200)
    path = tmp_path / "report.html"
    write_page(path, runs, [], "Long")
    whole = path.read_text(encoding="utf-8")
    assert "The first 1,000 of 1,606 rows; all of them are in ranking.parquet." in whole
    assert len(rows_of(whole, "Ranking of soir")[1]) == 1000 and 'id="plotly"' not in whole
    monkeypatch.setattr(writing, "LARGEST", len(whole) // 2)
    write_page(path, runs, [], "Long")
    assert "The first 400 of 1,606 rows" in path.read_text(encoding="utf-8")
    path.unlink()
    monkeypatch.setattr(writing, "LARGEST", 10_000)
    with pytest.raises(UsageError, match=r"1 runs make a page of .* give fewer runs"):
        write_page(path, runs, [], "Long")
    assert not path.exists()


def test_a_missing_plotly_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    with pytest.raises(UsageError, match=r"--format html: needs the package plotly; pip install 'fillm\[report\]'"):
        write_page(tmp_path / "report.html", example_runs(), example_figures()[-1:], "No plots")


def test_a_theme_that_was_asked_for_is_the_first_one(tmp_path):
    write_page(tmp_path / "dark.html", example_runs()[2:3], [], "Dark", "dark")
    assert '<html lang="en" data-theme="dark">' in (tmp_path / "dark.html").read_text(encoding="utf-8")
