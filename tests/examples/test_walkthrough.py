"""The notebook runs from top to bottom without an error or a warning, and what it says came about did."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import load_file

from fillm.masks import Mask

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "examples" / "walkthrough.ipynb"
# A program of its own: nbclient leaves sockets to the garbage collector. Messages go through sockets in the folder, not
# over TCP, and whatever warns in the kernel is an error there.
EXECUTE = """
import sys
import nbformat
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

source, folder = sys.argv[1:]
run = nbformat.read(source, as_version=4)
run.cells.insert(0, nbformat.v4.new_code_cell("import warnings; warnings.simplefilter('error')"))
manager = AsyncKernelManager(kernel_name="python3", transport="ipc", ip=f"{folder}/kernel")
NotebookClient(run, km=manager, timeout=None, resources={"metadata": {"path": folder}}).execute()
nbformat.write(run, f"{folder}/executed.ipynb")
"""


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


@pytest.fixture(scope="module")
def executed(notebook, tmp_path_factory):
    """The notebook after it ran, and the folder it wrote."""
    folder = tmp_path_factory.mktemp("walkthrough")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    command = [sys.executable, "-c", EXECUTE, str(NOTEBOOK), str(folder)]
    own = {"PYTHONPATH": path, "JUPYTER_RUNTIME_DIR": str(folder), "IPYTHONDIR": str(folder / "ipython")}
    done = subprocess.run(command, env={**os.environ, **own}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return nbformat.read(folder / "executed.ipynb", as_version=4), folder / "walkthrough"


def told(folder: Path, name: str) -> dict:
    return json.loads((folder / name).read_text(encoding="utf-8"))


def test_it_is_committed_without_outputs(notebook):
    """Numbers differ from processor to processor in their last bits; those of a file would be those of one machine."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert cells and all(cell.outputs == [] and cell.execution_count is None for cell in cells)


def test_its_links_lead_somewhere(notebook):
    text = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if not link.startswith("http")]
    assert links and all((NOTEBOOK.parent / link).exists() for link in links)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_it_runs_silently_on_stderr_with_figures_inline(executed):
    run, _ = executed
    outputs = [output for cell in run.cells if cell.cell_type == "code" for output in cell.outputs]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_one_model_knows_the_authors_and_the_other_does_not(executed):
    _, folder = executed
    full, judge = (told(folder, f"scores-{name}/summary.json") for name in ("full", "retain-only"))
    assert full["forget_probability"] > 0.9 > 0.1 > judge["forget_probability"]
    assert min(full["retain_probability"], judge["retain_probability"]) > 0.9
    assert judge["forget_quality"] is None and full["forget_quality"] < 1e-3


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_every_mask_forgets_and_nothing_outside_moves(executed):
    _, folder = executed
    before = load_file(folder / "full" / "model.safetensors")
    for name in ("top", "bottom", "whole"):
        found = told(folder, f"unlearned-{name}/verification.json")
        assert found["forget_loss"]["after"] > found["forget_loss"]["before"] + 0.1
        after = load_file(folder / f"unlearned-{name}" / "model" / "model.safetensors")
        mask = Mask.load(folder / f"unlearned-{name}" / "mask.safetensors")
        moved = {key: before[key] != after[key] for key in before}
        for key, differs in moved.items():
            chosen = mask[key].to_bool() if key in mask else torch.zeros_like(differs)
            assert not (differs & ~chosen).any(), f"{name}: {key}"
        assert 0.5 * mask.count < sum(int(differs.sum()) for differs in moved.values()) <= mask.count


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_bottom_of_the_ranking_forgets_and_keeps_what_else_there_was(executed):
    _, folder = executed
    full, bottom = (told(folder, f"scores-{name}/summary.json") for name in ("full", "bottom"))
    assert bottom["forget_probability"] < 0.5 * full["forget_probability"]
    assert bottom["retain_probability"] > 0.75 * full["retain_probability"]
    assert 0.0 <= bottom["forget_quality"] <= 1.0


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_report_is_one_page_of_all_runs(executed):
    _, folder = executed
    page = (folder / "report" / "report.html").read_text(encoding="utf-8")
    for name in ("ranking", "unlearned-top", "unlearned-bottom", "unlearned-whole", "scores-full", "scores-bottom"):
        assert name in page
    assert (folder / "report" / "frontier.png").read_bytes()[:4] == b"\x89PNG"
