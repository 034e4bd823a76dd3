"""`--overwrite` never deletes what the run is made from, whatever the command."""

import pytest

from fillm.config import from_mapping
from fillm.errors import RunFolderError
from fillm.evaluate.__main__ import main as evaluate
from fillm.finetune.__main__ import main as finetune
from fillm.rank.__main__ import main as rank
from fillm.report.__main__ import main as report
from fillm.runs import check_inputs_outside
from fillm.unlearn.__main__ import main as unlearn
from fillm.unlearn.config import UnlearnConfig


@pytest.fixture
def old(tmp_path):
    """A finished run with a model in it, and rows beside it."""
    (tmp_path / "old" / "model").mkdir(parents=True)
    (tmp_path / "old" / "run.yaml").write_text("settings: {}\n")
    (tmp_path / "old" / "rows.jsonl").write_text("{}\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path / "old"


@pytest.mark.parametrize(
    ("main", "words", "told"),
    [
        (unlearn, "--model {old}/model --mask {old}/mask --forget {rows} --retain {rows}", "--model {old}/model"),
        (unlearn, "--model other --ranking {old} --select top:0.1 --forget x --retain x", "--ranking {old}"),
        (rank, "--model other --forget {old}/rows.jsonl[:3] --retain {rows}", "--forget {old}/rows.jsonl[:3]"),
        (finetune, "--model {old}/model --data {rows} --max-steps 1", "--model {old}/model"),
        (evaluate, "--model other --benchmark fictional --forget forget05 --reference {old}", "--reference {old}"),
        (report, "{old}", "{old}"),
    ],
)
def test_commands_refuse(main, words, told, old, capsys):
    names = {"old": str(old), "rows": str(old.with_name("rows.jsonl"))}
    assert main([*words.format(**names).split(), "--out", str(old), "--overwrite"]) == 2
    line = capsys.readouterr().err.strip()
    assert f": {told.format(**names)}: lies in {old}, which --overwrite replaces; give another --out" in line
    assert sorted(path.name for path in old.iterdir()) == ["model", "rows.jsonl", "run.yaml"]


def test_a_link_to_it_is_no_way_round(old, monkeypatch):
    (old.with_name("link")).symlink_to(old / "model")
    monkeypatch.chdir(old.parent)
    config = from_mapping(UnlearnConfig, {"model": "link", "out": "old", "overwrite": True})
    with pytest.raises(RunFolderError, match="--model link: lies in"):
        check_inputs_outside(config)


@pytest.mark.parametrize(
    "settings",
    [
        {"model": "old/model", "out": "old"},
        {"model": "old/model", "out": "old2", "overwrite": True},
        {"model": "old/model", "out": "old/new", "overwrite": True},
        {"model": "gpt2", "forget": "fictional:forget05", "out": "old", "overwrite": True},
    ],
)
def test_all_else_is_left_to_the_folder(settings, old, monkeypatch):
    monkeypatch.chdir(old.parent)
    check_inputs_outside(from_mapping(UnlearnConfig, settings))
