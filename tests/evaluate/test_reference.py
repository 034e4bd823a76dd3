"""The run that others are compared with: of the same rows, whole, and of another model."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import yaml

from fillm.evaluate.__main__ import main
from fillm.evaluate.reference import COMPARED, ITSELF
from fillm.models import load_tokenizer
from tests.evaluate.test_from_log import LOG


def unrecorded(folder: Path) -> None:
    """Takes the checksums out of the record of a run, as of one made before there were any."""
    record = yaml.safe_load((folder / "run.yaml").read_text())
    del record["files"]
    (folder / "run.yaml").write_text(yaml.safe_dump(record))


def test_a_reference_over_something_else_is_refused(evaluate: Callable[..., Path], fails: Callable[..., str]) -> None:
    other = evaluate("other", metrics="forget-quality", forget="forget05")
    assert "was made with --forget 'forget05', this run has --forget 'forget01'" in fails(reference=other)
    few = evaluate("few", metrics="forget-quality", num_forget=3)
    assert "was made with --num-forget 3, this run has --num-forget None" in fails(reference=few)
    told = evaluate("told", metrics="forget-quality", template="Q {question} A")
    assert "was made with --template 'Q {question} A'" in fails(reference=told)
    short = evaluate("short", metrics="forget-quality", max_length=100)
    evaluate("run", metrics="forget-quality", reference=str(short))  # no row is that long: the same tokens


def test_a_reference_of_another_tokenizer_is_refused(
    evaluate: Callable[..., Path], fails: Callable[..., str], model_folder: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(model_folder)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = state["model"]["vocab"]
    vocabulary["w0"], vocabulary["w1"] = vocabulary["w1"], vocabulary["w0"]
    tokenizer.save_pretrained(tmp_path / "swapped")
    (tmp_path / "swapped" / "tokenizer.json").write_text(json.dumps(state))
    other = evaluate("other", metrics="forget-quality", tokenizer=str(tmp_path / "swapped"))
    assert "its forget rows are other tokens" in fails(reference=other)


def test_a_reference_without_truth_ratios_is_said(evaluate: Callable[..., Path]) -> None:
    other = evaluate("other", metrics="probability")
    summary = json.loads((evaluate("run", reference=str(other)) / "summary.json").read_text())
    assert summary["forget_quality"] is None and "--metrics forget-quality" in summary["notes"]["forget_quality"]


def test_a_damaged_reference_is_refused(evaluate: Callable[..., Path], fails: Callable[..., str]) -> None:
    other = evaluate("other", metrics="forget-quality")
    (other / "rows.parquet").write_bytes(b"PAR1")
    assert "other/rows.parquet: damaged" in fails(reference=other)
    unrecorded(other)
    assert "other: damaged" in fails(reference=other)
    (other / "summary.json").unlink()
    assert "no finished run of fillm evaluate" in fails(reference=other)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows: rows.drop_columns(["set"]), "rows.parquet does not say of which set a row is"),
        (lambda rows: rows.slice(2), "rows.parquet has 5 forget rows, not 7"),
    ],
)
def test_a_reference_whose_rows_are_not_all_there_is_refused(
    evaluate: Callable[..., Path], fails: Callable[..., str], spoil: Callable[[pyarrow.Table], Any], words: str
) -> None:
    other = evaluate("other", metrics="forget-quality,mia-loss")
    unrecorded(other)
    pyarrow.parquet.write_table(spoil(pyarrow.parquet.read_table(other / "rows.parquet")), other / "rows.parquet")
    assert f"other: damaged ({words})" in fails(reference=other, metrics="forget-quality")


@pytest.mark.parametrize("summary", [[], {"mia_min_k_auc": "x"}, {"mia_min_k_auc": []}])
def test_a_reference_whose_figures_are_none_is_refused(
    evaluate: Callable[..., Path], fails: Callable[..., str], summary: Any
) -> None:
    other = evaluate("other", metrics="mia-min-k")
    unrecorded(other)
    (other / "summary.json").write_text(json.dumps(summary))
    assert "other: damaged" in fails(reference=other, metrics="privacy-leakage")


def test_a_reference_scored_from_a_log_is_refused(fails: Callable[..., str], tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(json.dumps(LOG))
    assert main(["--from-log", str(tmp_path / "log.json"), "--out", str(tmp_path / "scored")]) == 0
    assert "was scored from a published log" in fails(reference=tmp_path / "scored")


def test_a_reference_of_the_same_model_is_told(
    evaluate: Callable[..., Path], retain_folder: str, capsys: pytest.CaptureFixture[str]
) -> None:
    one = evaluate("one", metrics="forget-quality")
    other = evaluate("other", metrics="forget-quality", reference=str(one), model=retain_folder)
    told = capsys.readouterr()
    assert "with itself" not in told.err + told.out
    assert json.loads((other / "summary.json").read_text())["notes"] == {}
    same = evaluate("same", metrics="forget-quality", reference=str(one))
    told = capsys.readouterr()
    assert f"one: {ITSELF}" in told.err
    assert f"forget_quality: {ITSELF}" in told.out.splitlines()
    summary = json.loads((same / "summary.json").read_text())
    assert summary["forget_quality"] == 1.0
    assert summary["notes"] == dict.fromkeys(("forget_quality", "forget_quality_ks_statistic"), ITSELF)


def test_every_figure_that_compares_is_noted_and_no_other(evaluate: Callable[..., Path]) -> None:
    metrics = "forget-quality,probability,mia-loss,mia-min-k,mia-reference,privacy-leakage"
    alone = evaluate("alone", metrics=metrics)
    missing = json.loads((alone / "summary.json").read_text())["notes"]
    same = evaluate("same", metrics=metrics, reference=str(alone))
    assert json.loads((same / "summary.json").read_text())["notes"] == dict.fromkeys(missing, ITSELF)
    assert set(missing) == set(COMPARED)
