"""A small log of the published layout, made by hand, and the published ones where they are at hand."""

import copy
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest

from fillm.evaluate.__main__ import main

LN2 = math.log(2)


def section(rows: list[tuple[float, float, list[float], float]], questions: bool = True) -> dict[str, Any]:
    """Rows of answer loss, paraphrase loss, perturbed losses and recall, in bits; numbered as in the published logs."""
    keys = [str(number) for number in range(len(rows))]
    fields: dict[str, Any] = {
        "avg_gt_loss": {key: row[0] * LN2 for key, row in zip(keys, rows, strict=True)},
        "avg_paraphrased_loss": {key: row[1] * LN2 for key, row in zip(keys, rows, strict=True)},
        "average_perturb_loss": {key: [x * LN2 for x in row[2]] for key, row in zip(keys, rows, strict=True)},
        "rougeL_recall": {key: row[3] for key, row in zip(keys, rows, strict=True)},
    }
    if questions:
        fields["generated_text"] = {key: [f"[INST] {key}? [/INST]", "something", f"answer {key}"] for key in keys}
    return fields


LOG = {
    "eval_log_forget.json": section([(1, 1, [2, 4], 0.5), (3, 2, [1, 1], 0.0)]),
    "eval_log.json": section([(1, 1, [2, 4], 1.0), (2, 1, [1, 3], 0.5)]),
    "eval_real_author_wo_options.json": section([(1, 1, [2, 3], 1.0)]),
    "eval_real_world_wo_options.json": section([(2, 2, [2, 4], 0.25)]),
}
REFERENCE = {"eval_log_forget.json": section([(1, 5, [1, 1], 0.5), (3, 6, [1, 1], 0.0)])}

# forget: R = 2^(1-3), 2^(2-1); retain: 2^(1-3), 2^(1-2); authors: 2^(1-2.5); facts: 2^(2-3)
BY_HAND = {
    "forget_probability": (1 / 2 + 1 / 8) / 2,
    "retain_probability": (1 / 2 + 1 / 4) / 2,
    "real_authors_probability": (1 / 2) / (1 / 2 + 1 / 4 + 1 / 8),
    "world_facts_probability": (1 / 4) / (1 / 4 + 1 / 4 + 1 / 16),
    "forget_rouge_l_recall": 0.25,
    "retain_rouge_l_recall": 0.75,
    "real_authors_rouge_l_recall": 1.0,
    "world_facts_rouge_l_recall": 0.25,
    "forget_truth_ratio": (1 / 4 + 1 / 2) / 2,
    "retain_truth_ratio": (3 / 4 + 1 / 2) / 2,
    "real_authors_truth_ratio": 1 - 2**-1.5,
    "world_facts_truth_ratio": 1 / 2,
}
# arithmetic means of P: retain (1/4+1/16)/2, (1/2+1/8)/2 over 1/2; authors (1/4+1/8)/2 over 1/2; facts (1/4+1/16)/2
# over 1/4
ARITHMETIC = {
    "retain_truth_ratio": ((1 - 5 / 16) + (1 - 5 / 8)) / 2,
    "real_authors_truth_ratio": 1 - 3 / 8,
    "world_facts_truth_ratio": 1 - 5 / 8,
}


def utility(parts: dict[str, float]) -> float:
    values = [value for name, value in parts.items() if not name.startswith("forget")]
    assert len(values) == 9
    return 9 / sum(1 / value for value in values)


@pytest.fixture
def score(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Writes the logs, runs the command, gives summary.json."""

    def ran(log: Any, reference: Any = None, *flags: str) -> dict[str, Any]:
        argv = ["--out", str(tmp_path / "run"), "--overwrite", *flags]
        for name, value in (("--from-log", log), ("--reference-log", reference)):
            if value is not None:
                path = tmp_path / f"{name}.json"
                path.write_text(json.dumps(value))
                argv += [name, str(path)]
        assert main(argv) == 0
        return json.loads((tmp_path / "run" / "summary.json").read_text())

    return ran


def test_every_figure_by_hand(score: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    summary = score(LOG, REFERENCE)
    assert {name: summary[name] for name in BY_HAND} == pytest.approx(BY_HAND)
    assert summary["model_utility"] == summary["model_utility_geometric"] == pytest.approx(utility(BY_HAND))
    assert summary["model_utility_arithmetic"] == pytest.approx(utility({**BY_HAND, **ARITHMETIC}))
    # The retain model's ratios, 2^4 and 2^5, lie above both: D is 1, and so is it in 2 of 6 orders.
    assert summary["forget_quality_ks_statistic"] == 1.0 and summary["forget_quality"] == pytest.approx(1 / 3)
    assert summary["notes"] == {}
    rows = pyarrow.parquet.read_table(tmp_path / "run" / "rows.parquet").to_pylist()
    assert [(row["set"], row["row"]) for row in rows[:3]] == [("forget", 0), ("forget", 1), ("retain", 0)]
    assert rows[1]["log_truth_ratio_geometric"] == pytest.approx(LN2)
    assert rows[0]["perturbed_losses"] == pytest.approx([2 * LN2, 4 * LN2]) and rows[0]["option_probability"] is None


def test_the_arithmetic_form(score: Callable[..., dict[str, Any]]) -> None:
    summary = score(LOG, REFERENCE, "--truth-ratio", "arithmetic")
    assert {name: summary[name] for name in ARITHMETIC} == pytest.approx(ARITHMETIC)
    assert summary["model_utility"] == summary["model_utility_arithmetic"]


def test_the_order_of_rows_is_no_matter(score: Callable[..., dict[str, Any]]) -> None:
    turned = copy.deepcopy(LOG)
    for fields in turned.values():
        for name in fields:
            fields[name] = dict(reversed(fields[name].items()))
    assert score(turned) == score(LOG)
    forget = "eval_log_forget.json"
    assert score(LOG, {forget: turned[forget]})["forget_quality"] == 1.0


def test_whole_numbers_are_losses_too(score: Callable[..., dict[str, Any]]) -> None:
    log = broken(lambda part: part["avg_paraphrased_loss"].update({"0": 10**30}))
    assert score(log)["retain_truth_ratio"] == pytest.approx((0 + BY_HAND["retain_truth_ratio"] * 2 - 3 / 4) / 2)


def test_a_missing_reference_is_said(score: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    summary = score(LOG)
    assert summary["forget_quality"] is None
    assert "--reference-log" in summary["notes"]["forget_quality"]
    assert f"forget_quality: {summary['notes']['forget_quality']}" in capsys.readouterr().out.splitlines()


def test_a_log_that_is_its_own_reference_is_said(score: Callable[..., dict[str, Any]]) -> None:
    summary = score(LOG, LOG)
    assert summary["forget_quality"] == 1.0
    assert set(summary["notes"]) == {"forget_quality", "forget_quality_ks_statistic"}
    assert all("with itself" in note for note in summary["notes"].values())


def test_a_log_of_the_forget_rows_alone_has_no_utility(score: Callable[..., dict[str, Any]]) -> None:
    summary = score(REFERENCE)
    assert summary["model_utility"] is None and "eval_log.json" in summary["notes"]["model_utility"]
    assert "retain_probability" not in summary
    for form in ("geometric", "arithmetic"):
        assert summary[f"model_utility_{form}"] is None and summary["notes"][f"model_utility_{form}"]
    kept = score({name: fields for name, fields in LOG.items() if "forget" not in name})
    assert kept["forget_quality"] is None and kept["model_utility"] == pytest.approx(utility(BY_HAND))


def broken(change: Callable[[dict[str, Any]], Any]) -> Any:
    log = copy.deepcopy(LOG)
    return change(log["eval_log.json"]) or log


@pytest.mark.parametrize(
    ("log", "reference", "words"),
    [
        ([], None, "no published TOFU log"),
        ({"x": 1}, None, "has none of eval_log_forget.json"),
        (broken(lambda part: part.pop("avg_gt_loss") and None), None, "eval_log.json: no field 'avg_gt_loss'"),
        (broken(lambda part: part["rougeL_recall"].pop("1") and None), None, "'rougeL_recall' has 1 rows"),
        (broken(lambda part: part["avg_gt_loss"].update({"1": None})), None, "'avg_gt_loss', row 1: 'None'"),
        (broken(lambda part: part["avg_gt_loss"].update({"1": math.nan})), None, "row 1: 'nan' is no finite loss of 0"),
        (broken(lambda part: part["avg_gt_loss"].update({"1": 10**400})), None, "row 1: '1000"),
        (
            broken(lambda part: part["avg_gt_loss"].update({"0": -1e5})),
            None,
            "row 0: '-100000.0' is no finite loss of 0",
        ),
        (
            broken(lambda part: part["rougeL_recall"].update({"0": 87.5})),
            None,
            "row 0: '87.5' is no number from 0 to 1",
        ),
        (broken(lambda part: part["average_perturb_loss"].update({"0": []})), None, "row 0: '[]'"),
        (broken(lambda part: part["average_perturb_loss"].update({"0": 2.0})), None, "row 0: '2.0'"),
        (LOG, {"eval_log.json": LOG["eval_log.json"]}, "has no eval_log_forget.json"),
        (LOG, {"eval_log_forget.json": section([(1, 1, [1], 1)])}, "has 1 forget rows, the other log has 2"),
    ],
)
def test_what_is_no_log(
    log: Any, reference: Any, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.json").write_text(json.dumps(log))
    argv = ["--from-log", str(tmp_path / "log.json"), "--out", str(tmp_path / "run")]
    if reference is not None:
        (tmp_path / "reference.json").write_text(json.dumps(reference))
        argv += ["--reference-log", str(tmp_path / "reference.json")]
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert words in err and err.count("\n") == 1 and out == ""
    assert not (tmp_path / "run").exists() and not (tmp_path / "run.partial").exists()


def test_a_reference_log_of_other_questions_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = copy.deepcopy(REFERENCE)
    other["eval_log_forget.json"]["generated_text"]["1"][0] = "[INST] another? [/INST]"
    for name, value in (("log", LOG), ("reference", other)):
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    argv = ["--from-log", str(tmp_path / "log.json"), "--reference-log", str(tmp_path / "reference.json")]
    assert main([*argv, "--out", str(tmp_path / "run")]) == 2
    assert "asks not what forget row 1 asks" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"])
def test_a_file_that_is_not_json(content: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "log.json").write_bytes(content)
    assert main(["--from-log", str(tmp_path / "log.json"), "--out", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert "log.json: not JSON" in err and err.count("\n") == 1


PUBLISHED = Path(os.environ.get("FILLM_DATA", "")) / "tofu_eval_logs"
NAME = "ft_epoch5_lr1e-05_llama2-7b_{}_wd0.01.eval_log_aggregated.json"


@pytest.mark.skipif(
    "FILLM_DATA" not in os.environ or not (PUBLISHED / "golden_metrics.json").is_file(),
    reason="the published logs are not at hand (FILLM_DATA)",
)
def test_the_published_logs(tmp_path: Path) -> None:
    golden = json.loads((PUBLISHED / "golden_metrics.json").read_text())
    for which in ("full", "retain90", "retain95", "retain99"):
        argv = ["--from-log", str(PUBLISHED / NAME.format(which)), "--out", str(tmp_path / which)]
        if which == "full":
            argv += ["--reference-log", str(PUBLISHED / NAME.format("retain90"))]
        assert main(argv) == 0
        summary = json.loads((tmp_path / which / "summary.json").read_text())
        expected = golden[f"ft_epoch5_lr1e-05_llama2-7b/{which}"]
        assert summary["model_utility"] == pytest.approx(expected["model_utility_geo"], abs=1e-6)
        assert summary["model_utility_arithmetic"] == pytest.approx(expected["model_utility_arith"], abs=1e-6)
        for name, key in (("retain", "eval_log.json"), ("forget", "eval_log_forget.json")):
            found = [summary[f"{name}_{part}"] for part in ("probability", "rouge_l_recall", "truth_ratio")]
            assert found == pytest.approx(expected["parts_geo"][key], abs=1e-6)
        if which == "full":
            quality = golden["FQ ft_epoch5_lr1e-05_llama2-7b full_vs_retain90"]
            assert summary["forget_quality"] == pytest.approx(quality["p"], rel=1e-6)
            assert summary["forget_quality_ks_statistic"] == pytest.approx(quality["D"], abs=1e-12)
