"""The worked examples of docs/kernels run as shown, and print what the page says they print."""

import contextlib
import csv
import io
import re
from pathlib import Path

import fillm_kernels as fk
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs" / "kernels"
# A python block, and the text block that stands right below it where the page shows what it prints.
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:```text\n(.*?)^```$)?", re.DOTALL | re.MULTILINE)
PAGES = sorted(path.name for path in DOCS.glob("*.md") if "```python" in path.read_text(encoding="utf-8"))
# Ops whose page has another name.
PAGE_OF = {
    "masked_adamw_": "masked_steps",
    "masked_sophia_": "masked_steps",
    "masked_norm": "masked_steps",
    "weighted_outer_": "weighted_outer",
}


def printed(code: str, names: dict[str, object]) -> str:
    """What a block prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES)
def test_a_page_prints_what_it_shows(page):
    blocks = BLOCK.findall((DOCS / page).read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for code, shown in blocks:
        found = printed(code, names)
        assert not shown or found == shown, f"{page}: shown\n{shown}\nprinted\n{found}"
    assert any(shown for _, shown in blocks), f"{page} shows no result"


@pytest.mark.parametrize("op", [*fk.backends(), "outer_sketch"])
def test_every_op_has_a_page_with_a_worked_example_in_the_index(op):
    page = PAGE_OF.get(op, op)
    text = (DOCS / f"{page}.md").read_text(encoding="utf-8")
    assert "## Worked example" in text and f"{op}(" in text and any(shown for _, shown in BLOCK.findall(text))
    assert f"(kernels/{page}.md)" in (DOCS.parent / "kernels.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("path", [*DOCS.glob("*.md"), DOCS.parent / "kernels.md"], ids=lambda path: path.name)
def test_links_lead_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", path.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def measured_rows() -> list[tuple[str, str, str, str]]:
    """The table of docs/kernels.md of what was measured: file, case, milliseconds and what stands beside them."""
    text = (DOCS.parent / "kernels.md").read_text(encoding="utf-8").partition("| measured in |")[2].partition("\n\n")[0]
    rows, file = [], ""
    for line in text.splitlines()[2:]:
        named, case, milliseconds, beside = (cell.strip() for cell in line.strip("|").split("|"))
        file = re.search(r"\(([^)]+)\)", named)[1] if named else file
        rows.append((file, case, milliseconds, beside))
    return rows


@pytest.mark.parametrize(("file", "case", "milliseconds", "beside"), measured_rows())
def test_a_measured_figure_is_that_of_the_committed_file(file, case, milliseconds, beside):
    with (DOCS.parent / file).open(newline="", encoding="utf-8") as opened:
        [row] = [r for r in csv.DictReader(opened) if case in (r.get("layer"), r.get("shape"), r.get("case"))]
    row |= dict(call.rsplit(" ", 1) for call in filter(None, row.get("baseline / op", "").split(", ")))
    shown = {"milliseconds": milliseconds, **dict(re.findall(r"`([^`]+)` ([\d.]+)", beside))}
    for column, figure in shown.items():
        digits = len(figure.replace(".", "").lstrip("0"))
        assert float(f"{float(row[column]):.{digits}g}") == float(figure), f"{column}: {row[column]}"
