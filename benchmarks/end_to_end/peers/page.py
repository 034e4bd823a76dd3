"""The table of docs/peers.md, from the committed rows."""

import csv
from collections.abc import Sequence
from pathlib import Path

from fillm.errors import UsageError

BEGIN, END = "<!-- peers: begin -->", "<!-- peers: end -->"
FILE = Path(__file__).resolve().parents[2] / "results" / "peers_cpu.csv"
Quoted = dict[str, str]  # a line of the CSV


def read(path: Path = FILE) -> list[Quoted]:
    """The lines of a run's CSV.

    Raises:
        UsageError: there is none.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except OSError as error:
        raise UsageError(f"--out {path}: cannot be read: {error.strerror or error}") from None


def table(rows: Sequence[Quoted]) -> str:
    """A line for every peer as Markdown, then where it was measured."""
    lines = ["| | version | ms a sample | over plain | parameters covered | peak MiB | samples | leaves |"]
    lines.append("|---" * 8 + "|")
    for row in rows:
        version = f"{row['package']} {row['version']}".strip()
        if not row["seconds_per_sample"]:
            lines.append(f"| {row['what']} | {version} | {row['note']} | | | | | {row['computes']} |")
            continue
        memory = f"{float(row['extra_bytes']) / 2**20:.0f}" if row["extra_bytes"] else ""
        leaves = row["computes"] + (f" ({row['note']})" if row["note"] else "")
        cells = [row["what"], version, _spread(row, "seconds_per_sample", 1e3, 1), _spread(row, "over_plain", 1.0, 2)]
        cells += [f"{float(row['covered']):.0%}".replace("%", " %"), memory, row["samples"], leaves]
        lines.append("| " + " | ".join(cells) + " |")
    one = rows[0]
    made = f"{float(one['model_parameters']) / 1e6:.1f}M parameters, {one['rounds']} rounds, {one['threads']} threads"
    versions = f"torch {one['torch']}, transformers {one['transformers']}, Python {one['python']}"
    return "\n".join([*lines, "", f"{one['model']}, {made}; {one['cpu']}; {versions}; commit {one['commit']}."])


def rewrite(page: Path, text: str) -> None:
    """Puts a table between the page's two marks.

    Raises:
        UsageError: a page that cannot be read or written, or without the marks.
    """
    try:
        before, begin, rest = page.read_text(encoding="utf-8").partition(BEGIN)
        _, end, after = rest.partition(END)
        if not end:
            raise UsageError(f"--page {page}: has no {BEGIN} ... {END}")
        page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--page {page}: {error.strerror or error}") from None


def _spread(row: Quoted, name: str, scale: float, digits: int) -> str:
    middle, low, high = (f"{float(row[key]) * scale:.{digits}f}" for key in (name, f"{name}_min", f"{name}_max"))
    return f"{middle} ({low} to {high})"
