"""Files that mean harm: nothing of theirs is executed, nothing outside is touched, no memory is taken, one line.

Names of tensors in masks that lead elsewhere, and masks of nested JSON: tests/masks/test_mask_files.py. Models with
code of their own and pickled weights: tests/models/test_loading.py.
"""

import hashlib
import os
import pickle
import shutil
from pathlib import Path

import pytest

from fillm.config import read_settings
from fillm.data.rows import load_rows
from fillm.errors import FillmError
from fillm.evaluate.from_log import read_log
from fillm.evaluate.reference import load_reference
from fillm.masks import Mask
from fillm.models import load_model, load_tokenizer
from fillm.rank.ranking import Ranking
from fillm.report.runs import load_run
from fillm.runs import RunFolder
from fillm.runs.record import write_record
from fillm.runs.state_files import read_json, write_json
from fillm.statistics import SketchStore
from fillm.unlearn.alternatives import read_refusals
from tests.faults.forks import main_of
from tests.faults.test_damage import unfinished

ENDLESS = 10 << 30
DEEP = b"[" * 200_000


class Evil:
    """What a pickle runs when it is read."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def masks(path: Path) -> None:
    mask = Mask.load(path)
    for name in mask:
        mask[name]


def stored(path: Path) -> None:
    found = SketchStore.open(path.parent)
    found.verify(found.tensors)


def resumed(path: Path) -> None:
    with RunFolder(path.parent.parent / "run", overwrite=False, resume=True) as held:
        held.check_identity({"model": "m", "--lr": "0.1"})
        held.load_state()
        held.load_stage("forget")


def of_folder(read):
    return lambda path: read(str(path.parent))


def updates(path: Path) -> None:
    list(Ranking.load(path.parent).updates.values())


# What reads a file, by the place that it has among the copies.
READERS = {
    "rows.jsonl": lambda path: load_rows(str(path)),
    "rows.json": lambda path: load_rows(str(path)),
    "rows.csv": lambda path: load_rows(str(path)),
    "rows.parquet": lambda path: load_rows(str(path)),
    "settings.yaml": lambda path: read_settings(str(path)),
    "idk.txt": read_refusals,
    "log.json": lambda path: read_log(str(path), "--from-log"),
    "mask.safetensors": masks,
    "import.safetensors": Mask.import_bool,
    "model/model.safetensors": lambda path: load_model(str(path.parent), device="cpu"),
    "model/config.json": lambda path: load_model(str(path.parent), device="cpu"),
    "model/tokenizer.json": lambda path: load_tokenizer(str(path.parent)),
    "model/tokenizer_config.json": lambda path: load_tokenizer(str(path.parent)),
    "rank/run/ranking.parquet": of_folder(Ranking.load),
    "rank/run/update.safetensors": updates,
    "rank/run/run.yaml": of_folder(Ranking.load),
    "rank-with-a-store/store/manifest.json": stored,
    "rank-with-a-store/store/blocks/0.json": lambda path: stored(path.parent),
    "rank-with-a-store/store/squared_norms.bin": stored,
    "evaluate/run/summary.json": of_folder(load_reference),
    "evaluate/run/rows.parquet": of_folder(load_reference),
    "unlearn/run/verification.json": of_folder(load_run),
    "unlearn/run/log.parquet": of_folder(load_run),
    "stopped/run.partial/state.json": resumed,
    "stopped/run.partial/identity.json": resumed,
}
PLAIN_TEXT = ("idk.txt",)  # of which anything is an answer


@pytest.fixture(scope="module")
def place(inputs, runs, tmp_path_factory):
    """A place with a good file for every reader."""
    work = tmp_path_factory.mktemp("hostile")
    shutil.copytree(inputs / "model", work / "model")
    for name, folder in runs.items():
        shutil.copytree(folder, work / name.replace(" ", "-"))
    (work / "stopped").mkdir()
    unfinished(work / "stopped" / "run")
    return work


def refused(place: Path, name: str) -> str:
    """What the reader of a file that was put there says; what was there before is put back."""
    with pytest.raises(FillmError) as caught:
        READERS[name](place / name)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def swapped(place, request):
    """Puts other bytes at a place, and the old ones back in the end."""
    undo = []

    def put(name: str, data: bytes) -> Path:
        path = place / name
        before = path.read_bytes() if path.exists() else None
        undo.append((path, before))
        path.write_bytes(data)
        return path

    yield put
    for path, before in undo:
        path.unlink() if before is None else path.write_bytes(before)


@pytest.mark.parametrize("name", READERS)
def test_a_pickle_is_never_read(name, place, swapped, tmp_path):
    mark = tmp_path / "executed"
    swapped(name, pickle.dumps([Evil(mark)] * 2))
    refused(place, name)
    assert not mark.exists()


@pytest.mark.parametrize("name", [name for name in READERS if name not in PLAIN_TEXT])
def test_json_nested_without_end(name, place, swapped):
    swapped(name, DEEP)
    refused(place, name)


def peak_growth(action, *given) -> int:
    """Bytes by which the process's largest resident size exceeds what it is now."""
    status = Path("/proc/self/status")

    def kibibytes(field: str) -> int:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(field))

    Path("/proc/self/clear_refs").write_text("5")  # starts the peak anew
    before = kibibytes("VmRSS:")
    action(*given)
    return 1024 * (kibibytes("VmHWM:") - before)


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="the system does not measure the peak")
@pytest.mark.parametrize("name", READERS)
def test_ten_gigabytes_in_one_line(name, place, swapped):
    path = swapped(name, b"")
    os.truncate(path, ENDLESS)  # sparse: it takes no room
    assert peak_growth(refused, place, name) < 400 << 20


def test_a_state_that_names_a_file_elsewhere(place, swapped, tmp_path):
    payload = next((place / "stopped/run.partial").glob("state.*.safetensors"))
    shutil.copy(payload, place / "stopped" / "elsewhere.safetensors")
    path = place / "stopped/run.partial/state.json"
    record = read_json(path)
    swapped("stopped/run.partial/state.json", path.read_bytes())
    write_json(path, {**record, "file": "../elsewhere.safetensors"})
    assert "names a file of another folder" in refused(place, "stopped/run.partial/state.json")


def test_a_state_whose_pickle_has_the_right_checksum(place, swapped, tmp_path):
    mark, partial = tmp_path / "executed", place / "stopped/run.partial"
    data, record = pickle.dumps(Evil(mark)), read_json(partial / "state.json")
    swapped("stopped/run.partial/state.json", (partial / "state.json").read_bytes())
    swapped(f"stopped/run.partial/{record['file']}", data)
    checked = {"sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data)}
    write_json(partial / "state.json", {**record, **checked})
    assert "damaged" in refused(place, "stopped/run.partial/state.json")
    assert not mark.exists()


def test_a_record_that_names_files_elsewhere_reads_and_writes_none(place, swapped):
    """Files that a record lists are only ever compared; a folder of them is no file."""
    path = place / "rank/run/run.yaml"
    whole = path.read_bytes()
    swapped("rank/run/run.yaml", whole)
    record = {"files": {"../../elsewhere": {"bytes": 3, "sha256": "0" * 64}}, "ranking": {}, "settings": {}}
    before = sorted(place.parent.iterdir())
    write_record(path.parent, record)
    refused(place, "rank/run/run.yaml")
    assert sorted(place.parent.iterdir()) == before


@pytest.mark.parametrize("command", ["rank", "evaluate"])
def test_what_a_hostile_file_says_reaches_the_terminal_as_text(command, lines, tmp_path, capsys):
    """A field's name with an escape sequence and a line break in it."""
    path = tmp_path / "rows.jsonl"
    path.write_text('{"que\\u001b[2Jstion\\n": "x"}\n', encoding="utf-8")
    words = ["--retain", str(path)] if command == "rank" else ["--holdout", str(path)]
    name, *given = [word.replace("{at}", str(tmp_path)) for word in lines[command]]
    assert main_of(name)([*given, *words]) == 2
    err = capsys.readouterr().err
    assert "\x1b" not in err and err.splitlines()[-1].startswith(f"fillm {command}: ")
