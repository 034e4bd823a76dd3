"""Privacy metrics as a run computes them: which tokens count, what is compared, and what is said otherwise."""

import json
import math
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fillm import evaluate_model
from fillm.errors import UsageError
from fillm.evaluate.__main__ import main
from fillm.evaluate.config import EvaluateConfig, resolved
from fillm.evaluate.registry import metrics_of
from fillm.rank.passes import Passes
from tests.families import build_family
from tests.rank.conftest import question_row, word_tokenizer, write_rows

ATTACKS = ("loss", "zlib", "min_k", "min_k_plus_plus", "gradient_norm", "reference")
ALL = "memorisation,privacy-leakage," + ",".join(f"mia-{name.replace('_', '-')}" for name in ATTACKS)
FORGET, HOLDOUT = range(6), range(40, 44)


def counted(members: list[float], holdout: list[float]) -> float:
    pairs = [1.0 if h > m else 0.5 if h == m else 0.0 for m in members for h in holdout]
    return sum(pairs) / len(pairs)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, str]:
    """Forget and retention rows in KnowUnDo's layout, which needs no other files, and a holdout."""
    folder = tmp_path / "data" / "knowundo" / "privacy"
    folder.mkdir(parents=True)
    for name, numbers in (("unlearn_val", FORGET), ("retention_val", range(20, 23))):
        rows = [question_row(number, 2 + number % 3) for number in numbers]
        text = json.dumps([{"text": row["question"], "labels": row["answer"]} for row in rows])
        (folder / f"{name}.json").write_text(text, encoding="utf-8")
    holdout = write_rows(tmp_path / "holdout.jsonl", [question_row(number, 2 + number % 3) for number in HOLDOUT])
    return {"data_root": str(tmp_path / "data"), "holdout": holdout}


def evaluated(data: dict[str, str], seed: int = 3, **settings: Any) -> Any:
    given = {"benchmark": "knowundo", "forget": "privacy", "metrics": ALL, **data, **settings}
    return evaluate_model(build_family("llama", seed=seed), word_tokenizer(), **given)


def column(result: Any, row_set: str, name: str) -> list[float]:
    cells = zip(result.rows["set"].to_pylist(), result.rows[name].to_pylist(), strict=True)
    return [value for which, value in cells if which == row_set]


def test_areas_come_from_the_rows(data: dict[str, str]) -> None:
    result = evaluated(data)
    for name in ATTACKS[:-1]:
        scores = [column(result, which, f"mia_{name}") for which in ("forget", "holdout")]
        assert [len(some) for some in scores] == [6, 4] and None not in [*scores[0], *scores[1]]
        assert result.summary[f"mia_{name}_auc"] == counted(*scores)
        assert 0.0 <= result.summary[f"mia_{name}_auc_error"] < 0.5
    for name in ("exact_memorisation", "extraction_strength"):
        assert result.summary[f"forget_{name}"] == pytest.approx(np.mean(column(result, "forget", name)))
    assert set(result.rows["set"].to_pylist()) == {"forget", "holdout"}  # retention rows are not read


def test_what_counts_of_an_answer(data: dict[str, str]) -> None:
    """The loss counts the end of the sequence, Min-K% does not; zlib compresses the answer's text."""
    result, model, tokenizer = evaluated(data), build_family("llama", seed=3), word_tokenizer()
    for position, number in enumerate(FORGET):
        row = question_row(number, 2 + number % 3)
        prompt = tokenizer(f"Question: {row['question']}\nAnswer:").input_ids
        answer = [*tokenizer(f" {row['answer']}", add_special_tokens=False).input_ids, 2]
        logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1].detach().double()
        own = torch.log_softmax(logits, 1)[range(len(answer)), answer].tolist()
        loss = -sum(own) / len(own)
        lowest = sorted(own[:-1])[: max(1, int(0.4 * (len(own) - 1)))]
        text = tokenizer.decode(answer[:-1])
        assert column(result, "forget", "mia_loss")[position] == pytest.approx(loss, rel=1e-5)
        assert column(result, "forget", "mia_min_k")[position] == pytest.approx(-sum(lowest) / len(lowest), rel=1e-5)
        zlib_bytes = len(zlib.compress(text.encode()))
        assert column(result, "forget", "mia_zlib")[position] == pytest.approx(loss / zlib_bytes, rel=1e-5)


def test_without_a_reference_what_compares_is_null_and_says_so(data: dict[str, str]) -> None:
    result = evaluated(data)
    for name in ("mia_reference_auc", "mia_reference_auc_error", "privacy_leakage"):
        assert result.summary[name] is None and "no --reference" in result.notes[name]


def test_without_a_holdout_there_is_no_attack(data: dict[str, str]) -> None:
    result = evaluated(data, holdout=None)
    for name in (*(f"mia_{attack}_auc" for attack in ATTACKS), "privacy_leakage"):
        assert result.summary[name] is None and "--holdout" in result.notes[name]
    assert result.summary["forget_exact_memorisation"] is not None


def test_against_a_reference_run(data: dict[str, str], tmp_path: Path) -> None:
    retained = evaluated(data, seed=5, out=tmp_path / "retained")
    result = evaluated(data, reference=tmp_path / "retained")
    a, r = 1 - result.summary["mia_min_k_auc"], 1 - retained.summary["mia_min_k_auc"]
    assert result.summary["privacy_leakage"] == pytest.approx(100 * (a - r) / r) and a != r
    excess = [
        [x - y for x, y in zip(column(result, which, "mia_loss"), column(retained, which, "mia_loss"), strict=True)]
        for which in ("forget", "holdout")
    ]
    assert result.summary["mia_reference_auc"] == counted(*excess)
    itself = evaluated(data, seed=5, reference=tmp_path / "retained")
    assert itself.summary["privacy_leakage"] == 0.0
    assert itself.summary["mia_reference_auc"] == 0.5  # every difference is 0
    assert "with itself" in itself.notes["privacy_leakage"] and "with itself" in itself.notes["mia_reference_auc"]
    assert not [name for name in result.notes if name in ("privacy_leakage", "mia_reference_auc")]


def test_a_reference_that_does_not_fit_is_said(data: dict[str, str], tmp_path: Path) -> None:
    evaluated(data, seed=5, out=tmp_path / "retained", metrics="mia-min-k")
    other = write_rows(tmp_path / "other.jsonl", [question_row(number) for number in range(50, 54)])
    for settings, why in (
        ({"min_k": 0.2}, "made with --min-k 0.4, this one with 0.2"),
        ({"holdout": other}, "has other holdout rows"),
    ):
        result = evaluated(data, reference=tmp_path / "retained", **settings)
        assert result.summary["privacy_leakage"] is None and why in result.notes["privacy_leakage"]
    result = evaluated(data, reference=tmp_path / "retained")
    assert "has no mia_loss" in result.notes["mia_reference_auc"]
    assert result.summary["privacy_leakage"] is not None
    evaluated(data, seed=5, out=tmp_path / "bare", metrics="memorisation")
    result = evaluated(data, reference=tmp_path / "bare")
    assert "has no holdout rows" in result.notes["privacy_leakage"]


def test_a_gradient_that_cannot_be_had_costs_that_figure_alone(
    data: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = evaluated(data, gradient_include="*nothing*", metrics="mia-loss,mia-gradient-norm")
    assert result.summary["mia_gradient_norm_auc"] is None
    assert "matches no tensor" in result.notes["mia_gradient_norm_auc"]
    assert result.summary["mia_loss_auc"] is not None

    def interrupted(*given: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Passes, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluated(data, metrics="mia-gradient-norm")


def test_shared_rows_are_warned_of(data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [question_row(number, 2 + number % 3) for number in (0, 41, 42)]
    shared = write_rows(tmp_path / "shared.jsonl", rows)
    evaluated({**data, "holdout": shared}, metrics="mia-loss,mia-min-k", progress=True)
    lines = [line for line in capsys.readouterr().err.splitlines() if "share" in line]
    assert lines == ["warning: holdout and forget share 1 rows: their AUC is drawn to 0.5"]


def test_one_holdout_row_has_no_error(data: dict[str, str], tmp_path: Path) -> None:
    one = write_rows(tmp_path / "one.jsonl", [question_row(40)])
    result = evaluated({**data, "holdout": one}, metrics="mia-loss")
    assert result.summary["mia_loss_auc"] is not None and result.summary["mia_loss_auc_error"] is None
    assert "at least two" in result.notes["mia_loss_auc_error"]


def test_every_benchmark_with_a_holdout_attacks_by_default() -> None:
    for benchmark in ("tofu", "fictional", "fictional-small"):
        metrics = metrics_of(benchmark)
        assert all(metrics[name].default for name in ALL.split(","))
    assert not metrics_of("knowundo")["mia-loss"].default


@pytest.mark.parametrize("fraction", [0.0, -0.1, 1.5, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(UsageError, match="--min-k"):
        resolved(EvaluateConfig(model="m", forget="forget01", min_k=fraction))


def test_a_missing_harness_ends_the_command_before_anything_is_loaded(
    data: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    argv = ["--model", str(tmp_path / "nothing"), "--benchmark", "knowundo", "--forget", "privacy"]
    argv += ["--data-root", data["data_root"], "--lm-eval", "arc_easy", "--out", str(tmp_path / "run")]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "the package lm-eval is not installed" in err
    assert not (tmp_path / "run").exists()
