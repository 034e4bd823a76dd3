"""docs/peers.md shows the committed rows, and the table says what a row says."""

from pathlib import Path

import pytest

from benchmarks.end_to_end.peers.page import BEGIN, END, FILE, read, rewrite, table
from benchmarks.end_to_end.peers.registry import PEERS
from fillm.errors import UsageError

PAGE = Path(__file__).resolve().parents[2] / "docs" / "peers.md"


def test_the_page_shows_the_rows_or_says_that_there_are_none():
    text = PAGE.read_text(encoding="utf-8")
    shown = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert shown == (table(read()) if FILE.exists() else "Not recorded yet.")


def test_committed_rows_are_of_every_peer():
    rows = read() if FILE.exists() else []
    assert [row["key"] for row in rows] in ([], [peer.key for peer in PEERS])


def row(**fields):
    made = {"model": "Llama", "model_parameters": "5300000", "threads": "2", "cpu": "a CPU", "torch": "2.13",
            "transformers": "5.23", "python": "3.11", "commit": "abc", "rounds": "5", "package": "", "version": "",
            "seconds_per_sample": "", "extra_bytes": "", "note": "", "computes": "norms"}  # fmt: skip
    return made | fields


def test_a_row_has_its_figures_or_its_reason(tmp_path):
    timed = {"seconds_per_sample": "0.01", "seconds_per_sample_min": "0.009", "seconds_per_sample_max": "0.0121",
             "over_plain": "1.5", "over_plain_min": "1.4", "over_plain_max": "1.6", "covered": "0.598",
             "extra_bytes": str(3 << 20), "samples": "400"}  # fmt: skip
    text = table([row(what="here", package="one", version="1.2", **timed), row(what="gone", note="not installed: x")])
    assert "| here | one 1.2 | 10.0 (9.0 to 12.1) | 1.50 (1.40 to 1.60) | 60 % | 3 | 400 | norms |" in text
    assert "| gone |  | not installed: x | | | | | norms |" in text and "5.3M parameters, 5 rounds, 2 threads" in text
    page = tmp_path / "page.md"
    page.write_text("no marks", encoding="utf-8")
    with pytest.raises(UsageError, match="has no"):
        rewrite(page, text)
    assert page.read_text(encoding="utf-8") == "no marks"
