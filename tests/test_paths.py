"""What somebody may type as `--out`."""

import os
from pathlib import Path

import pytest

from fillm.errors import RunFolderError
from fillm.paths import out_path


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("", "--out: is empty"),
        ("circle/run", "--out circle/run: leads nowhere"),
        (os.fsdecode(b"a\xff"), r"--out 'a\\udcff': is not UTF-8"),
    ],
)
def test_names_that_no_folder_can_have_are_one_line(out, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    with pytest.raises(RunFolderError, match=said):
        out_path(out)


def test_a_home_that_nobody_has_is_a_name_as_any_other(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert out_path("~nobody-of-this-name/run") == tmp_path / "~nobody-of-this-name" / "run"
