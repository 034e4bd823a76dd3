"""Every reader on files of the right kind that say something else: a value, or one line; never another exception.

Mask files: tests/masks/test_mask_files.py; YAML and JSON as such: tests/test_documents.py.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fillm.config import from_mapping, one_line, read_settings
from fillm.data.rows import load_rows
from fillm.errors import FillmError
from fillm.evaluate.config import EvaluateConfig
from fillm.evaluate.from_log import read_log, score_log
from fillm.rank.config import RankConfig
from fillm.report.figures import figures_of
from fillm.runs.record import checksums, write_record
from fillm.runs.state_files import read_json, write_json
from tests.evaluate.test_from_log import LOG
from tests.faults.conftest import ROOT
from tests.faults.test_damage import ranking, reference, reported, state, store, unfinished

SCALARS = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.sampled_from([2**63, -1, 1e308])
)
VALUES = SCALARS | st.lists(SCALARS, max_size=3) | st.dictionaries(st.text(max_size=4), SCALARS, max_size=2)
ROW = {"question": "who", "answer": "me", "n": 1}
EXAMPLES = "FILLM_FUZZ_EXAMPLES"
FUZZ = settings(
    max_examples=int(os.environ.get(EXAMPLES, "15")),
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


def places(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every entry of a document, its own parts included."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [at, *(place for key, part in parts for place in places(part, (*at, key)))]


def changed(value: Any, data: st.DataObject) -> Any:
    """A document of which one entry is another, or is gone."""
    place = data.draw(st.sampled_from(places(value)[1:]))
    copy = json.loads(json.dumps(value))
    holder = copy
    for key in place[:-1]:
        holder = holder[key]
    if data.draw(st.integers(0, 4)) == 0:
        del holder[place[-1]]
    else:
        holder[place[-1]] = data.draw(VALUES)
    return copy


def bytes_changed(whole: bytes, data: st.DataObject) -> bytes:
    """A file of which some bytes are others, are gone, or come twice."""
    at, end = sorted(data.draw(st.tuples(*[st.integers(0, len(whole))] * 2)))
    new = data.draw(st.binary(max_size=12) | st.just(whole[at:end] * 2))
    return whole[:at] + new + whole[end:]


def answers(read: Callable[..., Any], *given_to: Any) -> None:
    """Reads, or is refused in one line."""
    try:
        read(*given_to)
    except FillmError as error:
        assert one_line(error)


def rows_file(folder: Path, suffix: str) -> Path:
    path, rows = folder / f"rows{suffix}", [ROW, {**ROW, "question": 'why, "so"?\n', "n": 2}]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, write_page_checksum=True)
    elif suffix == ".csv":
        path.write_text('question,answer,n\nwho,me,1\n"why, ""so""?\n",me,2\n', encoding="utf-8")
    else:
        lines = json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows)
        path.write_text(lines, encoding="utf-8")
    return path


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".parquet"])
@FUZZ
@given(data=st.data(), skip=st.booleans())
def test_rows(suffix, tmp_path, data, skip):
    path = rows_file(tmp_path, suffix)
    path.write_bytes(bytes_changed(path.read_bytes(), data))
    answers(lambda: load_rows(str(path), skip_bad_rows=skip))


@FUZZ
@given(data=st.data())
def test_published_logs(tmp_path, data):
    path = tmp_path / "log.json"
    if data.draw(st.booleans()):
        path.write_text(json.dumps(changed(LOG, data)), encoding="utf-8")
    else:
        path.write_bytes(bytes_changed(json.dumps(LOG).encode(), data))
    answers(lambda: score_log(read_log(str(path), "--from-log"), None, EvaluateConfig()))


@FUZZ
@given(data=st.data())
def test_settings(tmp_path, data):
    path = tmp_path / "run.yaml"
    whole = {"settings": {"model": "m", "seed": 1, "damping": 0.1, "resume": False, "include": "mlp"}}
    path.write_text(yaml.safe_dump(changed(whole, data)), encoding="utf-8")
    answers(lambda: from_mapping(RankConfig, read_settings(str(path))))


@pytest.fixture(scope="module")
def copies(runs, tmp_path_factory):
    """Copies of the folders of runs that a test may spoil."""
    work = tmp_path_factory.mktemp("copies")
    found = {name: work / name / "run" for name in runs}
    for name, folder in runs.items():
        shutil.copytree(folder, work / name)
    return found


def figures(folder: Path) -> None:
    from fillm.report.runs import load_run

    figures_of([load_run(folder)])


RECORDS = {
    "ranking": (ranking, "rank"),
    "reference": (reference, "evaluate"),
    "report of a ranking": (figures, "rank"),
    "report of an unlearning": (figures, "unlearn"),
    "report of an evaluation": (figures, "evaluate"),
    "report of a training": (figures, "finetune"),
}


@pytest.mark.parametrize("reader", RECORDS)
@FUZZ
@given(data=st.data())
def test_records_of_runs(reader, copies, runs, data):
    read, name = RECORDS[reader]
    record = yaml.safe_load((runs[name] / "run" / "run.yaml").read_text(encoding="utf-8"))
    write_record(copies[name], changed(record, data))
    answers(read, copies[name])


@pytest.mark.parametrize("file", ["rank/ranking.parquet", "evaluate/rows.parquet", "unlearn/log.parquet"])
@FUZZ
@given(data=st.data())
def test_tables_of_runs(file, copies, runs, data):
    """With the checksum of what was written, as somebody would make it who means harm."""
    name, _, table = file.partition("/")
    whole, copy = runs[name] / "run", copies[name]
    (copy / table).write_bytes(bytes_changed((whole / table).read_bytes(), data))
    record = yaml.safe_load((whole / "run.yaml").read_text(encoding="utf-8"))
    write_record(copy, {**record, "files": {**record["files"], **checksums([copy / table])}})
    answers({"rank": ranking, "evaluate": reference, "unlearn": reported}[name], copy)
    shutil.copy(whole / table, copy / table)


@pytest.mark.parametrize(("name", "summary"), [("evaluate", "summary.json"), ("unlearn", "verification.json")])
@FUZZ
@given(data=st.data())
def test_summaries(name, summary, copies, runs, data):
    whole, copy = runs[name] / "run", copies[name]
    said = json.loads((whole / summary).read_text(encoding="utf-8"))
    (copy / summary).write_text(json.dumps(changed(said, data)), encoding="utf-8")
    record = yaml.safe_load((whole / "run.yaml").read_text(encoding="utf-8"))
    write_record(copy, {**record, "files": {}})
    answers(figures, copy)
    if name == "evaluate":
        answers(reference, copy)
    shutil.copy(whole / summary, copy / summary)


@FUZZ
@given(data=st.data())
def test_manifests_of_stores(copies, runs, data):
    folder = copies["rank with a store"].parent / "store"
    record = read_json(runs["rank with a store"] / "store" / "manifest.json")
    write_json(folder / "manifest.json", changed(record, data))
    answers(store, folder)


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """What a run has left that was stopped."""
    work = tmp_path_factory.mktemp("stopped")
    unfinished(work / "run")
    return work / "run.partial"


@pytest.mark.parametrize("file", ["state.json", "stage-forget.json", "identity.json", "intent.json"])
@FUZZ
@given(data=st.data())
def test_states(file, stopped, tmp_path, data):
    partial = tmp_path / "run.partial"
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(stopped, partial)
    write_json(partial / file, changed(read_json(partial / file), data))
    answers(state, partial)


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_ten_times_as_many():
    if EXAMPLES in os.environ:
        pytest.skip("is what runs")
    words = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", __file__]
    done = subprocess.run(
        words, env={**os.environ, EXAMPLES: "150"}, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-5000:]
