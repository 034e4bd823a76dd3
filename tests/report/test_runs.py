import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from fillm.errors import RunFolderError, UsageError
from fillm.report.runs import load_run, load_runs
from tests.report import run_folders


def test_every_command_is_known_by_what_it_wrote(tmp_path):
    ranked = load_run(run_folders.rank(tmp_path / "r", [1.0, 2.0, 3.0]))
    assert (ranked.name, ranked.command, ranked.fingerprint()) == ("r", "rank", "m")
    assert ranked.summary["method"] == "soir" and ranked.tables["ranking"]["score"].to_pylist() == [1.0, 2.0, 3.0]
    forgot = load_run(run_folders.unlearn(tmp_path / "u", [(0, 1.0, 2.0), (1, 3.0, 4.0)], (3.0, 4.0)))
    assert (forgot.command, forgot.summary["forget_loss"]) == ("unlearn", {"before": 1.0, "after": 3.0})
    judged = load_run(run_folders.evaluate(tmp_path / "e", {"model_utility": 0.5}, benchmark="tofu"))
    assert (judged.command, judged.summary, judged.settings) == (
        "evaluate",
        {"model_utility": 0.5},
        {"benchmark": "tofu"},
    )
    log = {"log": {"step": [1], "loss": [2.0]}}
    record = {"settings": {"data": "x"}, "result": {"epoch_losses": [2.0]}}
    trained = load_run(run_folders.write(tmp_path / "f", record, log))
    assert (trained.command, trained.summary) == ("finetune", {"epoch_losses": [2.0]})
    record = {"settings": {}, "experiment": {"name": "shift"}}
    study = load_run(run_folders.write(tmp_path / "x", record, {"cells": {"a": [1]}}))
    assert (study.command, list(study.tables), study.summary) == ("experiment", ["cells"], {})


def test_an_evaluation_of_a_published_log_has_no_rows(tmp_path):
    folder = run_folders.evaluate(tmp_path / "e", {"model_utility": 0.5}, from_log="log.json")
    (folder / "rows.parquet").unlink()
    assert load_run(folder).tables == {}


def test_result_files_are_runs(tmp_path):
    rows = [{"workload": "w", "method": "soir", "kind": "oporp", "k": 4, "store_bytes": 8}]
    found = load_run(run_folders.compression(tmp_path / "compression.parquet", rows))
    assert (found.command, found.name, found.tables["compression"].to_pylist()) == ("compression", "compression", rows)
    path = run_folders.result_file(tmp_path / "masks.csv", [{**run_folders.masked("top", 0, 0.5), "commit": "012"}])
    found = load_run(path)
    assert found.command == "experiment" and found.record == {"made": {"commit": "012"}} and found.study == {}
    assert found.tables["masks"]["retain_at_high"].to_pylist() == [None]


def test_a_family_called_by_a_number_is_a_name_all_the_same(tmp_path):
    path = run_folders.result_file(tmp_path / "masks.csv", [run_folders.masked("top", 0, 0.5, family="7")])
    assert load_run(path).tables["masks"]["family"].to_pylist() == ["7"]


def test_an_experiment_knows_what_it_is_about(tmp_path):
    folder = run_folders.experiments(tmp_path)
    study = load_run(folder / "which_mask.csv").study
    assert study == {"title": "Which mask keeps most", "claim": "The top is <b>best</b>.", "source": "A paper."}
    assert load_run(folder / "moved.csv").study == {}
    (folder / "moved.yaml").write_text("study: y\ntitle: Beside it\nclaim:\n")
    assert load_run(folder / "moved.csv").study == {"title": "Beside it"}
    for text in ("a: [", "- 1\n", "title: of no study\n", "\0"):
        (folder / "moved.yaml").write_text(text)
        assert load_run(folder / "moved.csv").study == {}


def test_a_folder_of_results_stands_for_those_that_are_known(tmp_path):
    folder, said = run_folders.experiments(tmp_path), []
    rows = [{"workload": "w", "method": "soir", "kind": "oporp", "k": 4, "store_bytes": 8}]
    run_folders.result_file(folder / "compression.csv", rows)
    run_folders.compression(folder / "compression.parquet", rows)
    (folder / "kernel_cpu.csv").write_text("op,milliseconds\nx,1\n")
    (folder / "which_mask.png").write_bytes(b"")
    runs = load_runs([folder], said.append)
    assert [run.path.name for run in runs] == ["compression.parquet", "moved.csv", "which_mask.csv"]
    assert said == [f"{folder}: left out kernel_cpu.csv, of no study that can be reported"]
    assert [run.name for run in load_runs([folder / "moved.csv", folder])][:2] == ["moved", "compression"]
    for path in (*folder.glob("*.csv"), folder / "compression.parquet"):
        path.unlink()
    with pytest.raises(RunFolderError, match=r"no run.yaml in it; give the folder of a finished run, or of result"):
        load_runs([folder])


def test_names_tell_runs_apart_and_a_run_counts_once(tmp_path):
    one = run_folders.rank(tmp_path / "a" / "run", [1.0, 2.0, 3.0])
    two = run_folders.rank(tmp_path / "b" / "run", [1.0, 2.0, 3.0])
    other = run_folders.rank(tmp_path / "other", [1.0, 2.0, 3.0])
    runs = load_runs([one, two, other, str(tmp_path / "b" / ".." / "a" / "run")])
    assert [run.name for run in runs] == ["a/run", "b/run", "other"]
    with pytest.raises(UsageError, match="at least one"):
        load_runs([])


def _no_record(folder):
    (folder / "run.yaml").unlink()


def _unfinished(folder):
    folder.rename(folder.with_name("r.partial"))


def _newer(folder):
    record = yaml.safe_load((folder / "run.yaml").read_text())
    (folder / "run.yaml").write_text(yaml.safe_dump({**record, "versions": {"fillm": "999.1.0"}}))


def _foreign(folder):
    (folder / "run.yaml").write_text("- 1\n")


def _of_no_command(folder):
    (folder / "run.yaml").write_text("settings: {}\n")


def _not_yaml(folder):
    (folder / "run.yaml").write_text("a: [\n")


def _no_table(folder):
    (folder / "ranking.parquet").unlink()


def _bad_table(folder):
    (folder / "ranking.parquet").write_bytes(b"PAR1")


def _other_checksum(folder):
    record = yaml.safe_load((folder / "run.yaml").read_text())
    size = (folder / "ranking.parquet").stat().st_size
    record["files"] = {"ranking.parquet": {"bytes": size, "sha256": "0" * 64}}
    (folder / "run.yaml").write_text(yaml.safe_dump(record))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_record, r"r: no run.yaml in it; give the folder of a finished run"),
        (_unfinished, r"r: the run is not finished; continue it with --resume"),
        (_newer, r"r: made by fillm 999.1.0, this is .*; update fillm"),
        (_foreign, r"run.yaml: not the record of a run"),
        (_of_no_command, r"r: of no command that can be reported"),
        (_not_yaml, r"run.yaml: damaged \("),
        (_no_table, r"ranking.parquet: missing; make the run again"),
        (_bad_table, r"ranking.parquet: damaged \("),
        (_other_checksum, r"ranking.parquet: damaged \(its checksum differs\)"),
    ],
)
def test_what_cannot_be_read_is_refused_in_one_line(tmp_path, spoil, message):
    folder = run_folders.rank(tmp_path / "r", [1.0, 2.0, 3.0])
    spoil(folder)
    with pytest.raises(RunFolderError, match=message) as caught:
        load_run(folder)
    assert "\n" not in str(caught.value)


def test_a_damaged_summary_is_refused(tmp_path):
    folder = run_folders.evaluate(tmp_path / "e", {"a": 1})
    for text in ("{", "[1]"):
        (folder / "summary.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"summary.json: damaged"):
            load_run(folder)


HEADER = "family,seed,choice,loss,retain_start,forget_low,forget_high,retain_at_low,retain_at_high\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "x", "give a run folder, or a .parquet or .csv file"),
        ("a.csv", "x,y\n1,2\n", r"not the results of a study .*; known are .*masks \(family, choice, loss, seed, "),
        ("a.csv", "", "cannot be read"),
        ("a.csv", "a,b\n1,2,3\n", "cannot be read"),
        ("a.parquet", "x", "cannot be read"),
        ("a.csv", HEADER, "has no rows"),
        ("a.csv", HEADER + "llama,0,top,ga,0.1,1,2,much,3\n", "column retain_at_low holds string, not numbers"),
        ("a.csv", HEADER + "llama,0,top,ga,0.1,1,2,1,3\nllama,1,,ga,0.1,1,2,1,3\n", "row 2 has no choice"),
        ("a.csv", HEADER + "llama,0,top,ga,,1,2,1,3\nllama,0,top,ga,0.1,1,2,1,3\n", "row 1 has no retain_start"),
    ],
)
def test_a_file_that_is_no_result_is_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(RunFolderError, match=message) as caught:
        load_run(tmp_path / name)
    assert "\n" not in str(caught.value)


def test_nothing_there(tmp_path):
    with pytest.raises(RunFolderError, match="gone: no such folder"):
        load_run(tmp_path / "gone")


def test_reading_changes_nothing(tmp_path):
    folder = run_folders.unlearn(tmp_path / "u", [(0, 1.0, 2.0), (1, 3.0, 4.0)], (3.0, 4.0))
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load_run(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert json.loads(before["verification.json"])["steps"] == 1
    assert pq.read_table(folder / "log.parquet").schema.field("forget_loss").type == pa.float64()


def test_a_name_cannot_turn_or_break_the_line_it_stands_in(tmp_path):
    names = ["a\u202eb", "new\nline", "\u0645\u0631 \U0001f469\u200d\U0001f680"]
    folders = [run_folders.rank(tmp_path / name, [1.0, 2.0, 3.0]) for name in names]
    assert [run.name for run in load_runs(folders)] == ["a\ufffdb", "new line", names[2]]


def test_a_path_that_is_no_text_is_one_line(tmp_path):
    folder = run_folders.rank(tmp_path / "r", [1.0, 2.0, 3.0]).rename(tmp_path / "r\udcff")
    with pytest.raises(RunFolderError, match="damaged"):
        load_run(folder)
