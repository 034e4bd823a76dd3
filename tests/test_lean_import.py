"""Importing the packages costs little and touches no accelerator; functions and packages do not hide one another."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fillm
from fillm.__main__ import main

ROOT = Path(__file__).resolve().parents[1]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python in a process of its own, with the checkout's packages first on its path."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, env=environment, cwd=ROOT, check=False
    )


def loaded_after(statement: str, names: list[str]) -> set[str]:
    """Which of the packages `names` are loaded once a statement has run."""
    code = f"import sys\n{statement}\nprint(*sorted(n for n in {names!r} if n in sys.modules))"
    done = run("-c", code)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_importing_the_engine_loads_no_framework() -> None:
    heavy = ["torch", "triton", "transformers", "datasets", "pandas", "matplotlib", "fillm_kernels"]
    assert loaded_after("import fillm", heavy) == set()
    assert loaded_after("import fillm; fillm.__version__, fillm.__all__, dir(fillm)", heavy) == set()


def test_the_check_sees_what_is_loaded() -> None:
    assert loaded_after("import torch", ["torch", "no_such_package"]) == {"torch"}


def test_importing_the_kernels_loads_no_engine_no_triton_and_starts_no_cuda() -> None:
    names = ["fillm", "triton", "transformers", "torch"]
    statement = "import fillm_kernels\nimport torch\nassert not torch.cuda.is_initialized()"
    assert loaded_after(statement, names) == {"torch"}


@pytest.mark.parametrize(
    "statement",
    [
        "import fillm.rank; from fillm.rank import rank_parameters; import fillm",
        "import fillm; rank_parameters = fillm.rank_parameters; import fillm.rank",
    ],
    ids=["package first", "function first"],
)
def test_package_and_function_are_importable_in_both_orders(statement: str) -> None:
    checks = [
        "import types",
        "assert isinstance(fillm.rank, types.ModuleType)",
        "assert callable(rank_parameters) and fillm.rank_parameters is rank_parameters is fillm.rank.rank_parameters",
        "assert fillm.rank.Ranking is fillm.Ranking",
    ]
    done = run("-c", "\n".join([statement, *checks]))
    assert done.returncode == 0, done.stderr


def test_a_name_that_does_not_exist_is_an_attribute_error() -> None:
    done = run(
        "-c", "import fillm, fillm.rank\nassert not hasattr(fillm, 'nothing') and not hasattr(fillm.rank, 'nothing')"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("command", [("-m", "fillm.rank"), ("-m", "fillm")])
def test_help_prints_and_exits_zero(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout.lower() and done.stderr == ""
    assert ("--retain" in done.stdout) == (command == ("-m", "fillm.rank"))


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr() == (f"fillm {fillm.__version__}\n", "")
