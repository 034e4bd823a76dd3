"""The command with a store: what is settled by it, what it is refused for before a pass, what a dry run says of it."""

import re

import pytest
import yaml

from fillm.errors import InterruptedRun
from fillm.rank.__main__ import main
from fillm.statistics import SketchStore, store_writer
from tests.rank.conftest import question_row, write_rows

SKETCHED = ("--compression", "sjlt", "--sketch-dim", "64")


@pytest.fixture(autouse=True)
def without_pictures(nothing_drawn):
    pass


@pytest.fixture
def store(tmp_path):
    return str(tmp_path / "store")


def settings(tmp_path, run="run"):
    return yaml.safe_load((tmp_path / run / "run.yaml").read_text(encoding="utf-8"))["settings"]


def test_a_choice_for_a_memory_is_settled_by_the_store_that_it_made(arguments, store, tmp_path):
    auto = ("--compression", "auto", "--memory", "4MiB", "--store", store)
    assert main(arguments(*auto)) == 0
    first = settings(tmp_path)
    assert main(arguments(*auto, "--overwrite")) == 0  # as `--resume` would find it, once the store is begun
    assert {**settings(tmp_path), "overwrite": False} == first
    assert main(["--config", str(tmp_path / "run" / "run.yaml"), "--out", str(tmp_path / "again")]) == 0
    tables = [(tmp_path / run / "ranking.parquet").read_bytes() for run in ("run", "again")]
    assert tables[0] == tables[1]


def test_a_stopped_build_goes_on_under_the_choice_it_was_begun_with(arguments, store, tmp_path, monkeypatch):
    auto = ("--compression", "auto", "--memory", "4MiB", "--store", store, "--tokens-per-batch", "30")
    monkeypatch.setattr(store_writer, "BLOCK_SAMPLES", 1)
    stored = store_writer.StoredSketches._store_block

    def stop(writer, complete):
        stored(writer, complete)
        raise InterruptedRun("stopped")

    monkeypatch.setattr(store_writer.StoredSketches, "_store_block", stop)
    assert main(arguments(*auto)) != 0
    assert SketchStore.open(store).rows > 0 and not SketchStore.open(store).complete
    monkeypatch.setattr(store_writer.StoredSketches, "_store_block", stored)
    assert main(arguments(*auto, "--resume")) == 0
    assert SketchStore.open(store).complete


def test_a_size_beside_auto_is_refused(arguments, fails):
    assert "--sketch-dim 512 has no effect" in fails(arguments("--compression", "auto", "--sketch-dim", "512"))


def test_a_number_of_samples_is_refused_where_the_store_is_the_retain_set(arguments, fails, store, capsys):
    assert main(arguments(*SKETCHED, "--store", store)) == 0
    capsys.readouterr()
    line = fails(arguments("--store", store, "--num-retain", "3", "--overwrite", retain=None))
    assert "--num-retain 3 has no effect" in line


def test_a_store_without_a_sample_is_no_retain_set(arguments, fails, store, monkeypatch, capsys):
    def stop(*given):
        raise InterruptedRun("stopped")

    with monkeypatch.context() as patched:
        patched.setattr(store_writer.StoredSketches, "resume_point", stop)
        assert main(arguments(*SKETCHED, "--store", store)) != 0
    capsys.readouterr()
    assert SketchStore.open(store).rows == 0
    assert "holds no sample yet" in fails(arguments("--store", store, "--overwrite", retain=None))


@pytest.mark.parametrize("dry", [(), ("--dry-run",)])
class TestRefusedBeforeAnyPass:
    @pytest.fixture(autouse=True)
    def no_pass(self, monkeypatch):
        self.run = "fillm.rank.passes.Passes.run"

    def refused(self, line, monkeypatch, fails):
        with monkeypatch.context() as patched:
            patched.setattr(self.run, lambda *given, **options: pytest.fail("a pass was begun"))
            return fails(line)

    def test_what_is_no_folder_or_not_a_store(self, arguments, fails, tmp_path, monkeypatch, dry):
        (tmp_path / "file").touch()
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "letters").touch()
        for path, said in (
            (tmp_path / "file", "is not a folder"),
            (tmp_path / "full", "is not a sketch store"),
            (tmp_path / ("a" * 300), "File name too long"),
        ):
            assert said in self.refused(arguments(*SKETCHED, "--store", str(path), *dry), monkeypatch, fails)
            line = arguments(*SKETCHED, "--store", str(path), *dry, retain=None)
            assert said in self.refused(line, monkeypatch, fails)
        line = arguments(*SKETCHED, "--store", str(tmp_path / "new"), *dry, retain=None)
        assert "new: there is no store yet; give --retain" in self.refused(line, monkeypatch, fails)
        assert (tmp_path / "full" / "letters").exists() and not (tmp_path / "new").exists()

    def test_a_folder_that_may_not_be_written_to(self, arguments, fails, tmp_path, monkeypatch, dry):
        # Stands for a read-only file system, which binds root as well.
        monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
        line = arguments(*SKETCHED, "--store", str(tmp_path / "new" / "store"), *dry)
        said = f"new/store: cannot write into {tmp_path}; give another --store"
        assert said in self.refused(line, monkeypatch, fails)

    def test_a_store_of_something_else(self, arguments, fails, store, tmp_path, monkeypatch, dry, capsys):
        assert main(arguments(*SKETCHED, "--include", "mlp", "--store", store)) == 0
        capsys.readouterr()
        again = ("--store", store, "--overwrite", *dry)
        others = write_rows(tmp_path / "others.jsonl", [question_row(number) for number in range(50, 64)])
        more = write_rows(tmp_path / "more.jsonl", [question_row(n, 2 + n % 5) for n in range(20, 36)])
        for line, said in (
            (arguments(*again, "--include", "attn"), "holds no sketches of"),
            (arguments(*again, "--include", "mlp", "--seed", "3"), "seed was 0, is 3"),
            (arguments(*again, "--include", "mlp", retain=others), "made from another data set"),
            (arguments(*again, "--include", "*gate_proj*", retain=more), "out of scope"),
        ):
            assert said in self.refused(line, monkeypatch, fails)

    @pytest.mark.parametrize("file", ["sketches/1.bin", "squared_norms.bin"])
    def test_a_flipped_bit_of_the_rows(self, arguments, fails, store, tmp_path, monkeypatch, dry, file, capsys):
        assert main(arguments(*SKETCHED, "--store", store)) == 0
        capsys.readouterr()
        damaged = tmp_path / "store" / file
        damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
        before = {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}
        more = write_rows(tmp_path / "more.jsonl", [question_row(n, 2 + n % 5) for n in range(20, 36)])
        for retain in ({}, {"retain": None}, {"retain": more}):
            line = self.refused(arguments("--store", store, "--overwrite", *dry, **retain), monkeypatch, fails)
            assert f"{damaged}: damaged (block 0 of " in line
        assert before == {path: path.read_bytes() for path in (tmp_path / "store").rglob("*.*")}

    def test_sketches_too_small_for_the_true_inverse(self, arguments, fails, monkeypatch, dry):
        line = arguments("--compression", "sjlt", "--sketch-dim", "8", "--curvature", "woodbury", *dry)
        assert "cannot tell 14 retain samples apart" in self.refused(line, monkeypatch, fails)


def test_a_dry_run_plans_what_the_store_leaves(arguments, store, tmp_path, capsys):
    given = (*SKETCHED, "--store", store, "--overwrite")
    more = write_rows(tmp_path / "more.jsonl", [question_row(n, 2 + n % 5) for n in range(20, 36)])
    for retain, passes in (({}, 14), ({}, 0), ({"retain": more}, 2), ({"retain": None}, 0)):
        assert main(arguments(*given, "--dry-run", **retain)) == 0
        out = capsys.readouterr().out
        assert [int(n) for n in re.findall(r"^retain pass +(\d+) samples", out, re.MULTILINE)] == [passes] * bool(
            passes
        )
        assert ("a block of the store" in out) == bool(passes)
        assert main(arguments(*given, **retain)) == 0
        done = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))["passes"]
        assert sum(one["samples"] for one in done if one["pass"] == "retain") == passes
        capsys.readouterr()
