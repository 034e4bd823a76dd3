"""`fillm <command>`: lists the commands quickly, hands over arguments and exit codes."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

from fillm.__main__ import COMMANDS, main


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"]])
def test_lists_the_commands(argv, capsys):
    assert main(argv) == 0
    out = capsys.readouterr().out
    for name, line in COMMANDS.items():
        assert f"{name} " in out
        assert line in out


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_listed_can_be_run(name):
    assert importlib.util.find_spec(f"fillm.{name}.__main__") is not None


def test_unknown_command(capsys):
    assert main(["forget"]) == 2
    assert capsys.readouterr().err == f"fillm: no command is called 'forget'; choose from {', '.join(COMMANDS)}\n"


def test_hands_over_arguments_and_exit_code(tmp_path, capsys):
    assert main(["finetune", "--out", str(tmp_path / "x"), "--data", "nowhere.json", "--architecture", "tiny"]) == 2
    assert capsys.readouterr().err.startswith("fillm finetune: nowhere.json")
    assert main(["finetune", "--print_config", "--seed", "7"]) == 0
    assert "seed: 7" in capsys.readouterr().out


def test_listing_loads_no_torch():
    code = "import sys; from fillm.__main__ import main; main([]); sys.exit('torch' in sys.modules)"
    root = Path(__file__).parents[2]
    listed = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert "finetune" in listed.stdout
