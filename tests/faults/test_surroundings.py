"""What surrounds a run and may go wrong: clocks, memory, data that vanish, one spoilt sample, neighbours, odd paths.

Memory that runs out in a batch, which is then halved: tests/rank/test_command_errors.py and its like in other rooms.
Locks of folders: tests/runs/test_folder.py; of stores: tests/statistics/test_store_refusals.py.
"""

import shutil
import signal
import time
from itertools import count

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from fillm.runs import RunFolder
from tests.faults.conftest import in_a_process
from tests.faults.forks import digests, main_of
from tests.rank.conftest import question_row, write_rows

BY_PATH = {"store/blocks/0.json", "store/manifest.json"}  # what names its samples, which are called by their file
COMMANDS = ("finetune", "rank", "rank with a store", "unlearn", "evaluate")


@pytest.fixture(autouse=True)
def nothing_drawn(monkeypatch):
    monkeypatch.setattr("fillm.rank.ranking_files.score_heatmap", lambda *given, **options: None)


def words(lines, command, at, **changes):
    """A command line into a folder, its options changed."""
    given = [word.replace("{at}", str(at)) for word in lines[command]]
    for name, value in changes.items():
        given[given.index(f"--{name}") + 1] = str(value)
    return given[0], given[1:]


def run(lines, command, at, *further, **changes):
    name, given = words(lines, command, at, **changes)
    return main_of(name)([*given, *further])


def last_line(capsys, lines, command):
    err = capsys.readouterr().err
    assert "Traceback" not in err
    line = err.splitlines()[-1]
    assert line.startswith(f"fillm {lines[command][0]}: ")
    return line


@pytest.mark.parametrize("command", COMMANDS)
def test_a_clock_that_jumps_changes_nothing(command, lines, runs, tmp_path, monkeypatch, capsys):
    """Years back, and forth; what is measured is measured by a clock that cannot be set."""
    years, calls = 3600.0 * 24 * 365, count()
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + years * (1 - 2 * (next(calls) % 2)) * 10)
    assert run(lines, command, tmp_path) == 0
    monkeypatch.undo()
    assert digests(tmp_path) == digests(runs[command])
    assert " -" not in capsys.readouterr().err.replace(" - ", "")  # no negative duration or rate


@pytest.mark.parametrize("command", COMMANDS)
def test_paths_with_spaces_and_letters_of_any_script(command, lines, runs, inputs, tmp_path):
    at = tmp_path / "a b  'ü' 模型 \U0001f600 %s"
    place = at / "in puts"
    shutil.copytree(inputs, place)
    moved = {name: [word.replace(str(inputs), str(place)) for word in line] for name, line in lines.items()}
    assert run(moved, command, at / "out") == 0
    found, wanted = digests(at / "out"), digests(runs[command])
    assert found.keys() == wanted.keys()
    same = {name for name in found if name.endswith((".safetensors", "ranking.csv", ".json", ".bin"))} - BY_PATH
    assert same and all(found[name] == wanted[name] for name in same)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_second_run_in_a_folder_is_refused(command, lines, tmp_path, capsys):
    with RunFolder(tmp_path / "run", overwrite=False, resume=False):
        for further in ([], ["--resume"], ["--overwrite"]):
            assert run(lines, command, tmp_path, *further) == 2
            assert "another run is at work in it" in last_line(capsys, lines, command)
    assert run(lines, command, tmp_path) == 0


def stop_in(monkeypatch, command):
    """Makes a run stop once it has saved a state, as Ctrl-C does."""
    real = RunFolder.save_stage if command == "evaluate" else RunFolder.save_state

    def saved(*given, **options):
        real(*given, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(RunFolder, real.__name__, saved)


@pytest.mark.parametrize(
    ("command", "option", "file"),
    [("finetune", "data", "forget.jsonl"), ("rank", "retain", "retain.jsonl"), ("unlearn", "forget", "forget.jsonl"),
     ("unlearn", "mask", "mask.safetensors"), ("evaluate", "data-root", "data")],
)  # fmt: skip
def test_what_vanishes_while_a_run_lies_still_is_named_and_nothing_lost(
    command, option, file, lines, runs, inputs, tmp_path, monkeypatch, capsys
):
    moved = tmp_path / file
    copy = shutil.copytree if (inputs / file).is_dir() else shutil.copy
    copy(inputs / file, moved)
    with monkeypatch.context() as patch:
        stop_in(patch, command)
        assert run(lines, command, tmp_path, **{option: moved}) == 3
    moved.rename(tmp_path / "gone")
    assert run(lines, command, tmp_path, "--resume", **{option: moved}) == 2
    assert f"{moved}" in last_line(capsys, lines, command)
    (tmp_path / "gone").rename(moved)
    assert run(lines, command, tmp_path, "--resume", **{option: moved}) == 0
    found, wanted = digests(tmp_path / "run"), digests(runs[command] / "run")
    same = {name for name in found if name.endswith((".safetensors", "ranking.csv", "summary.json"))}
    assert same and all(found[name] == wanted[name] for name in same)


@pytest.fixture
def spoilt(inputs, tmp_path):
    """A model in which one word is NaN, and rows of which one alone has that word."""
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    rows = [question_row(number) for number in range(5)]
    rows[3]["question"] = "w79 w1"
    assert not any("w79" in row["question"] + row["answer"] for row in rows[:3] + rows[4:])
    token = AutoTokenizer.from_pretrained(model).convert_tokens_to_ids("w79")
    weights = load_file(model / "model.safetensors")
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, model / "model.safetensors", {"format": "pt"})
    return {"model": model, "forget": write_rows(tmp_path / "rows.jsonl", rows)}


@pytest.mark.parametrize("command", ["rank", "rank with a store", "unlearn"])
def test_one_sample_that_gives_no_number_is_named(command, spoilt, lines, tmp_path, capsys):
    mask = {} if command != "unlearn" else {"mask": tmp_path / "mask.safetensors"}
    if mask:
        import fillm
        from fillm.models import load_model

        fillm.Mask.whole(load_model(str(spoilt["model"]), device="cpu"), ["model.norm.weight"]).save(mask["mask"])
    assert run(lines, command, tmp_path / "out", **spoilt, **mask) == 2
    line = last_line(capsys, lines, command)
    assert "rows.jsonl#3" in line and "nan" in line.lower()
    assert not (tmp_path / "out" / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_memory_that_is_short_is_one_line(command, lines, tmp_path):
    """For the weights of the model, and for whatever comes after them; with room again it ends with the same bytes.

    Some libraries abort where a small piece is refused (Arrow) or read what they were not given: as good as a kill.
    """
    name, *given = lines[command]
    rooms = [0, *(1 << power for power in range(20, 28))]
    cases = [{"name": command, "command": name, "arguments": given, "rooms": rooms}]
    found = in_a_process("short_memory", str(tmp_path), given=cases)[command]
    for one in found:
        assert one["status"] in (0, 2, -signal.SIGABRT, -signal.SIGSEGV), one
        assert not any(line.startswith("Traceback") for line in one["said"]), one
        assert one["status"] != 2 or "memory" in one["said"][-1], one
        assert one["same"] and not one["half"], one
    assert any(one["status"] == 2 for one in found)
