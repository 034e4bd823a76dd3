"""docs/masks.md: its example prints what it shows, and its texts are those that are read."""

import contextlib
import io
import re
from pathlib import Path

from fillm.masks import make_choice, parse_select

PAGE = Path(__file__).resolve().parents[2] / "docs" / "masks.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_the_example_prints_what_the_page_shows():
    [(code, shown)] = re.findall(r"^```python\n(.*?)^```\n```text\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, {})
    assert out.getvalue() == shown


def test_every_text_of_the_table_is_that_of_its_arguments():
    rows = re.findall(r"^\| `([^`]*=[^`]*)` \| `([^`]+)` \|", TEXT, re.MULTILINE)
    assert len(rows) == 6
    for call, text in rows:
        arguments = eval(f"dict({call})")
        assert make_choice(**parse_select(text)) == make_choice(**{"fraction": None, **arguments}), text


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", TEXT):
        assert (PAGE.parent / target).exists(), target
