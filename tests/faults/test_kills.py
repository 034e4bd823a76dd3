"""Commands that are ended at any moment, and go on: the bytes in the end are those of a run that was let be."""

import pytest

from tests.faults.conftest import in_a_process

COMMANDS = {
    "finetune": 18,
    "rank": 18,
    "rank with a store": 60,  # a third of them by SIGKILL
    "rank in groups": 18,
    "unlearn": 9,
    "unlearn with sophia": 9,
    "unlearn with bounds": 6,
    "evaluate": 18,
    "report": 6,
}


def harried(lines, folder, kills, of):
    """Ends so many runs of each command, and checks what becomes of them."""
    made = [f"{folder}/{name}/whole/run" for name in ("rank", "unlearn")]
    lines = lines | {"report": ["report", *made, "--format", "html,svg", "--out", "{at}/run"]}
    cases = [
        {"name": name, "command": lines[name][0], "arguments": lines[name][1:], "kills": kills[name], "of": of,
         "resume": name != "report"}
        for name in COMMANDS if name in kills
    ]  # fmt: skip
    found = in_a_process("killed_runs", str(folder), given=cases)
    assert {name: one["wrong"] for name, one in found.items()} == {name: [] for name in kills}
    assert {name: one["kills"] for name, one in found.items()} == kills


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_hundred_kills_at_random_moments_end_with_the_same_bytes(lines, tmp_path):
    assert sum(COMMANDS.values()) >= 100
    harried(lines, tmp_path, COMMANDS, ["writes", "calls"])


def test_a_few_kills_at_random_writes_end_with_the_same_bytes(lines, tmp_path):
    harried(lines, tmp_path, {"rank with a store": 3, "unlearn": 2}, ["writes"])
