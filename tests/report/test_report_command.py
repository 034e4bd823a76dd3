import subprocess
import sys

import pytest
import yaml

from fillm.errors import UsageError
from fillm.report import write_report
from fillm.report.__main__ import main
from tests.report import run_folders


@pytest.fixture
def runs(tmp_path):
    ends = [(2.0, 0.6), (2.5, 0.7)]
    return [
        str(run_folders.rank(tmp_path / "r1", [1.0, 2.0, 3.0, 4.0, 5.0])),
        str(run_folders.rank(tmp_path / "r2", [5.0, 2.0, 3.0, 4.0, 1.0], method="random")),
        *(
            str(run_folders.unlearn(tmp_path / f"u{i}", [(0, 1.0, 0.5), (1, *end)], end, seed=i))
            for i, end in enumerate(ends)
        ),
        str(run_folders.evaluate(tmp_path / "e", {"model_utility": 0.5, "forget_probability": 0.25})),
    ]


NAMES = ["metric_table", "frontier", "score_heatmap", "rank_agreement", "training_curves"]


def test_a_report_is_every_figure_in_every_format(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([runs[0], "--out", str(out), *runs[1:], "--title", "What it came to"]) == 0
    found = sorted(path.name for path in out.iterdir())
    pictures = [f"{name}.{kind}" for name in NAMES for kind in ("png", "svg")]
    assert found == sorted([*pictures, "report.html", "report.md", "run.yaml"])
    assert "<h1>What it came to</h1>" in (out / "report.html").read_text()
    page = (out / "report.md").read_text()
    assert page.startswith("# What it came to\n") and all(f"({name}.png)" in page for name in NAMES)
    told = capsys.readouterr().err.splitlines()
    assert told == [f"5 figures of 5 runs: {', '.join(NAMES)}", f"report: {out}"]


def test_names_are_text_in_markdown_too(tmp_path):
    folder = run_folders.rank(tmp_path / "a|b <i>\n`c`", [1.0, 2.0, 3.0])
    assert main([str(folder), "--out", str(tmp_path / "out"), "--format", "svg", "--title", "<b> [x](y)"]) == 0
    page = (tmp_path / "out" / "report.md").read_text()
    assert page.startswith("# \\<b\\> \\[x\\](y)\n")
    assert page.splitlines()[-1].startswith("| a\\|b \\<i\\> \\`c\\` | rank | ")


def test_a_report_replays_with_the_same_bytes(runs, tmp_path):
    out, again = tmp_path / "out", tmp_path / "again"
    assert main([*runs, "--out", str(out)]) == 0
    assert main(["--config", str(out / "run.yaml"), "--out", str(again)]) == 0
    for path in out.iterdir():
        if path.name != "run.yaml":
            assert path.read_bytes() == (again / path.name).read_bytes(), path.name
    one, two = (yaml.safe_load((folder / "run.yaml").read_text()) for folder in (out, again))
    assert one["settings"] == {**two["settings"], "out": str(out)} and one["settings"]["runs"] == runs
    assert one["fingerprints"]["r1"] == "m"


def test_python_gives_what_was_drawn(runs, tmp_path, capsys):
    figures = write_report(runs[:2], str(tmp_path / "out"), format="svg", theme="dark")
    assert [data.name for data in figures] == NAMES[2:4]
    assert (
        not list((tmp_path / "out").glob("*.png")) and "(score_heatmap.svg)" in (tmp_path / "out/report.md").read_text()
    )
    assert capsys.readouterr().err == ""


def test_one_string_is_no_list_of_runs(runs, tmp_path):
    with pytest.raises(UsageError, match="write_report|runs: .* is not a list of strings"):
        write_report(runs[0], str(tmp_path / "out"))


def test_tensorboard_reads_what_was_written(runs, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "out"
    assert main([*runs, "--out", str(out), "--format", "tensorboard"]) == 0
    assert sorted(path.name for path in out.iterdir()) == ["run.yaml", "tensorboard"]
    assert sorted(path.name for path in (out / "tensorboard").iterdir()) == ["e", "r1", "r2", "report", "u0", "u1"]

    def events(name):
        found = EventAccumulator(str(out / "tensorboard" / name))
        found.Reload()
        return found

    assert [(e.step, e.value) for e in events("u0").Scalars("log/forget_loss")] == [(1, 2.0)]
    assert events("e").Scalars("evaluate/model_utility")[0].value == 0.5
    assert events("r1").Tags()["histograms"] == ["log10 of the scores above 0"]
    assert sorted(events("report").Tags()["images"]) == sorted(NAMES)


def test_tensorboard_that_is_not_there_is_said_in_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    out = tmp_path / "out"
    assert main([*runs, "--out", str(out), "--format", "tensorboard"]) == 2
    assert "pip install 'fillm[report-tensorboard]'" in capsys.readouterr().err
    assert not out.exists() and not out.with_name("out.partial").exists()


def test_plotly_that_is_not_there_is_said_in_one_line(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "plotly", None)
    out = tmp_path / "out"
    assert main([*runs, "--out", str(out)]) == 2
    error = capsys.readouterr().err
    assert "pip install 'fillm[report]', or give --format png,svg" in error and error.count("\n") == 1
    assert not out.exists() and not out.with_name("out.partial").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give at least one RUN: a run folder, or a result file of a benchmark"),
        (["{run}", "--format", "pdf"], "--format pdf: give some of"),
        (["{run}", "--format", ","], "--format ,: give some of"),
        (["{run}", "--theme", "red"], "--theme: 'red' is none of auto, light, dark"),
        (["{none}"], "none: no such folder"),
        (["{run}", "--out", "{foreign}"], "foreign exists and is not a run folder"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing(runs, tmp_path, capsys, arguments, message):
    (tmp_path / "foreign").mkdir()
    (tmp_path / "foreign" / "mine.txt").write_text("mine")
    places = {"run": runs[0], "none": str(tmp_path / "none"), "foreign": str(tmp_path / "foreign")}
    before = sorted(tmp_path.iterdir())
    arguments = [word.format(**places) for word in arguments]
    assert main([*(["--out", str(tmp_path / "out")] if "--out" not in arguments else []), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_runs_that_show_nothing_are_said_to(tmp_path, capsys):
    run = run_folders.write(tmp_path / "x", {"settings": {}, "experiment": {"name": "n"}}, {"t": {"a": [1]}})
    assert main([str(run), "--out", str(tmp_path / "out")]) == 2
    assert "x: nothing to draw" in capsys.readouterr().err


def test_a_finished_report_is_replaced_only_when_asked_to(runs, tmp_path, capsys):
    out = tmp_path / "out"
    assert main([runs[0], "--out", str(out), "--format", "png"]) == 0
    assert main([runs[0], "--out", str(out), "--format", "svg"]) == 2
    assert "exists; give --overwrite" in capsys.readouterr().err
    assert main([runs[0], "--out", str(out), "--format", "svg", "--overwrite"]) == 0
    assert (out / "score_heatmap.svg").is_file() and not (out / "score_heatmap.png").exists()


def test_help_loads_no_torch():
    code = (
        "import sys\nfrom fillm.report.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "assert not {'torch', 'matplotlib', 'pyarrow'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "RUN" in done.stdout and "--format" in done.stdout
