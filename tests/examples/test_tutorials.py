"""The tutorials' commands and Python blocks run as shown, page after page, on a model that learns for a few steps."""

import importlib
import re
import shlex
from pathlib import Path

import pytest

PAGES = Path(__file__).resolve().parents[2] / "docs" / "tutorials"
BLOCK = re.compile(r"^```(sh|python)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# What takes minutes is cut short. A model that knows nothing has forgotten from the start, so the bound goes up.
SHORTER = {
    "--epochs 24": "--max-steps 3",
    "--epochs 3": "--max-steps 2",
    "--stop-forget-loss 2": "--stop-forget-loss 20",
}


def run_page(name: str) -> None:
    """Every block of a page, in the order of the page."""
    names: dict[str, object] = {}
    blocks = BLOCK.findall((PAGES / name).read_text(encoding="utf-8"))
    assert blocks
    for language, text in blocks:
        if language == "python":
            exec(text, names)
            continue
        for long, short in SHORTER.items():
            text = text.replace(long, short)
        for line in text.splitlines():
            python, flag, module, *arguments = shlex.split(line)
            assert (python, flag) == ("python", "-m")
            assert importlib.import_module(f"{module}.__main__").main(arguments) == 0, line


@pytest.mark.slow
def test_a_model_is_ranked_and_unlearned_as_the_tutorials_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_page("rank-my-model.md")
    run_page("unlearn-my-data.md")
    assert (tmp_path / "runs/report/report.html").stat().st_size > 0


def test_the_kernels_are_used_as_the_tutorial_says():
    run_page("use-the-kernels.md")


def test_the_tutorials_are_listed():
    index = (PAGES / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((.+?\.md)\)", index)) == {path.name for path in PAGES.glob("*.md")} - {"index.md"}
