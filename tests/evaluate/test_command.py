"""Whole runs of the command and of the function: folders, notes, resuming, and one line for every mistake."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet
import pytest
import torch
import yaml

import fillm
from fillm.errors import InterruptedRun, RunFolderError, UsageError
from fillm.evaluate import evidence, registry
from fillm.evaluate.__main__ import main
from fillm.evaluate.metric import Metric, Needs, Outcome
from fillm.evaluate.reference import ITSELF
from fillm.evaluate.results import merged
from fillm.models import load_model, load_tokenizer
from tests.evaluate.conftest import COUNTS, HOLDOUT, arguments, rows_of
from tests.rank.conftest import write_rows

TOFU = "probability,rouge,truth-ratio,model-utility,forget-quality"  # the paper's own


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Those of all runs, with a choice of metrics that further ones do not change."""
    return {**settings, "metrics": TOFU}


def test_a_run_says_what_it_found(settings: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(settings)) == 0
    out, err = capsys.readouterr()
    folder = Path(settings["out"])
    assert sorted(path.name for path in folder.iterdir()) == ["rows.parquet", "run.yaml", "summary.json"]
    summary = json.loads((folder / "summary.json").read_text())
    notes = summary.pop("notes")
    assert summary["forget_quality"] is None and "--reference" in notes["forget_quality"]
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[: len(summary)]] == list(summary)
    assert f"forget_quality: {notes['forget_quality']}" in lines and lines[-1] == f"run folder: {folder}"
    passes = ("answers", "generation, forget", "generation, retain", "generation, real_authors")
    assert all(f"{name}: " in err and " samples in " in err for name in passes)
    record = yaml.safe_load((folder / "run.yaml").read_text())
    assert record["settings"]["truth_ratio"] == "geometric" and record["result"] == summary
    assert set(record["fingerprints"]) >= {"model", "forget.answer", "retain.perturbed_answer", "world_facts.answer"}
    table = pyarrow.parquet.read_table(folder / "rows.parquet")
    sets = table["set"].to_pylist()
    assert {f"{name}_perturbed": sets.count(name) for name in set(sets) - {"forget"}} | {
        "forget01_perturbed": sets.count("forget")
    } == COUNTS
    row = table.to_pylist()[0]
    expected = rows_of("forget01_perturbed")[0]
    assert (row["id"], row["question"], row["answer"]) == (
        "tofu:forget01_perturbed#0",
        expected["question"],
        expected["answer"],
    )


def test_a_run_is_replayed_by_its_record(settings: dict[str, Any]) -> None:
    assert main(arguments(settings, metrics="probability")) == 0
    folder = Path(settings["out"])
    again = folder.with_name("again")
    assert main(["--config", str(folder / "run.yaml"), "--out", str(again)]) == 0
    assert (again / "summary.json").read_bytes() == (folder / "summary.json").read_bytes()


def test_metrics_are_chosen_and_only_what_they_need_is_read(evaluate: Callable[..., Path]) -> None:
    summary = json.loads((evaluate("run", metrics="forget-quality") / "summary.json").read_text())
    assert list(summary) == ["forget_quality", "forget_quality_ks_statistic", "notes"]
    table = pyarrow.parquet.read_table(evaluate("again", metrics="forget-quality") / "rows.parquet")
    assert set(table["set"].to_pylist()) == {"forget"}


def test_the_function_finds_what_the_command_finds(evaluate: Callable[..., Path], settings: dict[str, Any]) -> None:
    folder = evaluate("run")
    model, tokenizer = load_model(settings["model"], device="cpu").train(), load_tokenizer(settings["model"])
    before = [p.clone() for p in model.parameters()]
    result = fillm.evaluate_model(
        model,
        tokenizer,
        forget="forget01",
        reference=str(folder),
        data_root=settings["data_root"],
        metrics=TOFU,
        max_new_tokens=12,
    )
    summary = json.loads((folder / "summary.json").read_text())
    same = {name: value for name, value in summary.items() if value is not None and name != "notes"}
    assert {name: result.summary[name] for name in same} == same
    assert result.summary["forget_quality"] == 1.0  # of the model with itself, which is said
    assert set(result.notes) == {"forget_quality", "forget_quality_ks_statistic"}
    assert set(result.notes.values()) == {ITSELF}
    assert model.training and all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    written = pyarrow.parquet.read_table(folder / "rows.parquet")
    assert result.rows.equals(written)


def test_the_function_refuses_the_commands_settings(settings: dict[str, Any]) -> None:
    model, tokenizer = load_model(settings["model"], device="cpu"), load_tokenizer(settings["model"])
    for given, words in (
        ({"dtype": "auto"}, "dtype: a setting of the command"),
        ({"overwrite": True}, "need out"),
        ({"nonsense": 1}, "no setting is called 'nonsense'"),
    ):
        with pytest.raises(UsageError, match=words):
            fillm.evaluate_model(model, tokenizer, forget="forget01", **given)
    with pytest.raises(UsageError, match="not a str"):
        fillm.evaluate_model(settings["model"], tokenizer, forget="forget01")


def test_an_interrupted_run_goes_on_and_ends_the_same(
    evaluate: Callable[..., Path], settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate("whole")
    plain = evidence.greedy_answers

    def stopped(*args: Any, **kwargs: Any) -> Any:
        if len(args[2]) == COUNTS["retain_perturbed"]:
            raise InterruptedRun("stopped")
        return plain(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(evidence, "greedy_answers", stopped)
        with pytest.raises(InterruptedRun):
            evaluate("run")
        with pytest.raises(RunFolderError, match="unfinished run; give --resume"):
            evaluate("run")
        with pytest.raises(RunFolderError, match="--max-new-tokens was 12, is 9"):
            evaluate("run", resume=True, max_new_tokens=9)
    monkeypatch.setattr(evidence, "token_pass", lambda *args, **kwargs: pytest.fail("the pass was over"))
    folder = evaluate("run", resume=True)
    for name in ("summary.json", "rows.parquet"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


def test_moments_survive_an_interruption(evaluate: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def compute(gathered: Any) -> Outcome:
        if not seen:
            seen.append(gathered)
            raise InterruptedRun("stopped")
        seen.append(gathered)
        return Outcome({"figure": 1.0})

    moments = Needs(answers=frozenset({("forget", "answer"), ("retain", "answer")}), moments=frozenset({"forget"}))
    metric = Metric("own", ("tofu",), lambda sets: moments, compute)
    monkeypatch.setattr(registry, "metrics_of", lambda benchmark: {"own": metric})
    with pytest.raises(InterruptedRun):
        evaluate("run", metrics="own")
    evaluate("run", metrics="own", resume=True)
    for name in ("forget", "retain"):
        for first, again in zip(*(one.answers(name) for one in seen), strict=True):
            assert (first.mean_log_probs is None) == (again.mean_log_probs is None) == (name == "retain")
            for column in ("token_ids", "log_probs", "predicted"):
                assert (getattr(first, column) == getattr(again, column)).all()
            if name == "forget":
                assert (first.std_log_probs == again.std_log_probs).all() and (first.std_log_probs > 0.0).all()


def test_a_figure_without_a_reason_is_a_fault_of_ours() -> None:
    with pytest.raises(AssertionError, match="x is None without a note"):
        merged([Outcome({"x": None})], {})
    with pytest.raises(AssertionError, match="no figure"):
        merged([Outcome({"x": float("nan")})], {})
    with pytest.raises(AssertionError, match="has 1 values for 2 rows"):
        merged([Outcome(columns={"forget": {"loss": [1.0]}})], {"forget": ["a", "b"]})


def test_a_dry_run_loads_no_model_and_writes_nothing(
    settings: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fillm.evaluate.command.load_model", lambda *args, **kwargs: pytest.fail("no model is needed"))
    assert main([*arguments(settings), "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "forget: 7 rows of tofu:forget01_perturbed"
    texts = 7 * (2 + 5) + 6 * (2 + 5) + 5 * 4 + 4 * 4
    assert lines[-2].startswith(f"scored: {texts} texts, ")
    assert lines[-1] == f"generated: {sum(COUNTS.values())} answers of at most 12 tokens"
    assert not Path(settings["out"]).exists()


def test_the_first_rows_or_drawn_ones(evaluate: Callable[..., Path]) -> None:
    def ids(**changes: Any) -> list[str]:
        folder = evaluate("run", metrics="forget-quality", overwrite=True, **changes)
        return pyarrow.parquet.read_table(folder / "rows.parquet")["id"].to_pylist()

    every = ids()
    assert ids(num_forget=3) == every[:3]
    drawn = ids(num_forget=3, seed=2)
    assert len(drawn) == 3 and drawn == sorted(drawn) and set(drawn) < set(every) and drawn != every[:3]
    assert ids(num_forget=3, seed=2) == drawn


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model": None}, "--model is needed"),
        ({"forget": None}, "--forget is needed"),
        ({"forget": "forget02"}, "--forget forget02: no forget split of tofu; there are forget01, forget05, forget10"),
        ({"forget": "retain99"}, "no forget split of tofu"),
        ({"forget": "forget10"}, "forget10_perturbed"),
        ({"data_root": "nowhere"}, "--data-root nowhere: no such folder"),
        ({"model": "nowhere/at/all"}, "nowhere/at/all: no such folder"),
        ({"metrics": "rouge,bleu"}, "no metric of tofu is called 'bleu'; there are probability, rouge"),
        ({"metrics": ","}, "names no metric"),
        ({"num_forget": "8"}, "--num-forget 8: tofu:forget01_perturbed has 7 rows"),
        ({"num_retain": "0"}, "--num-retain 0: give at least 1"),
        ({"seed": "1"}, "--seed draws the rows of"),
        ({"batch_size": "0"}, "--batch-size 0"),
        ({"max_new_tokens": "0"}, "--max-new-tokens 0"),
        ({"max_length": "1"}, "--max-length 1"),
        ({"template": "no place"}, "--template"),
        ({"reference": "nowhere"}, "--reference nowhere: no such folder"),
        ({"reference_log": "x.json"}, "--reference-log goes with --from-log"),
        ({"from_log": "x.json"}, "--model has no effect with --from-log"),
        ({"truth_ratio": "harmonic"}, "'harmonic' is none of geometric, arithmetic"),
        ({"benchmark": "muse"}, "'muse' is none of"),
    ],
)
def test_a_mistake_is_one_line(fails: Callable[..., str], changes: dict[str, Any], words: str) -> None:
    assert words in fails(**changes)


def test_a_missing_log_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--from-log", str(tmp_path / "no.json"), "--out", str(tmp_path / "run")]) == 2
    assert "no.json: No such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("paraphrased_answer", None, "field 'paraphrased_answer' has to hold one text"),
        ("paraphrased_answer", ["w1", "w2"], "field 'paraphrased_answer' has to hold one text"),
        ("perturbed_answer", [], "field 'perturbed_answer' has to hold text"),
        ("perturbed_answer", ["w1", 2], "field 'perturbed_answer' has to hold text"),
        ("answer", " ", "field 'answer' is empty; mend the row\n"),
        ("answer", 7, "field 'answer' has to be text, not int; mend the row\n"),
    ],
)
def test_a_row_that_lacks_something_is_named(
    fails: Callable[..., str], tmp_path: Path, field: str, value: Any, words: str
) -> None:
    (tmp_path / "tofu").mkdir()
    for split in COUNTS:
        rows = rows_of(split)
        if split == "forget01_perturbed":
            rows[2][field] = value
        write_rows(tmp_path / "tofu" / f"{split}.json", rows)
    assert f"tofu:forget01_perturbed, line 3: {words}" in fails(data_root=str(tmp_path))


def data_with(folder: Path, forget: list[dict[str, Any]]) -> str:
    """A data root with other forget rows."""
    (folder / "tofu").mkdir()
    for split in (*COUNTS, *HOLDOUT):
        write_rows(folder / "tofu" / f"{split}.json", forget if split == "forget01_perturbed" else rows_of(split))
    return str(folder)


def test_rows_of_text_and_labels_are_scored_as_those_of_question_and_answer(
    evaluate: Callable[..., Path], tmp_path: Path
) -> None:
    names = {"question": "text", "answer": "labels"}
    rows = [{names.get(name, name): value for name, value in row.items()} for row in rows_of("forget01_perturbed")]
    plain, renamed = evaluate("plain"), evaluate("renamed", data_root=data_with(tmp_path, rows))
    assert (plain / "rows.parquet").read_bytes() == (renamed / "rows.parquet").read_bytes()


@pytest.mark.parametrize("metrics", ["rouge", "truth-ratio"])
@pytest.mark.parametrize(
    "row",
    [
        {"text": "w1 w2"},
        {"input_ids": [1, 4, 5], "labels": [-100, 4, 5]},
        {"input_ids": [1, 4, 5], "labels": [-100, 4, 5], "question": "w1", "answer": "w2"},
    ],
)
def test_passages_have_no_answers(fails: Callable[..., str], tmp_path: Path, metrics: str, row: dict[str, Any]) -> None:
    rows = [{**row, "paraphrased_answer": "w1", "perturbed_answer": ["w2"]}]
    said = fails(data_root=data_with(tmp_path, rows), metrics=metrics)
    assert "tofu:forget01_perturbed, line 1: has no question and answer in words" in said


def test_rows_longer_than_the_model_are_refused_and_cut_ones_told(
    settings: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tofu").mkdir()
    for split in COUNTS:
        rows = rows_of(split)
        if split == "forget01_perturbed":
            rows[1]["answer"] = " ".join(["w5"] * 200)
        write_rows(tmp_path / "tofu" / f"{split}.json", rows)
    assert main(arguments(settings, data_root=str(tmp_path))) == 2
    assert "forget01_perturbed#1 has 2" in (err := capsys.readouterr().err) and "128 positions" in err
    argv = arguments(settings, data_root=str(tmp_path), max_length=60, metrics="probability")
    assert main(argv) == 0
    assert "1 texts lost their end to --max-length 60, tofu:forget01_perturbed#1 the first" in capsys.readouterr().err


def test_a_package_that_is_not_there_is_named(fails: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    plain = registry.find_spec
    monkeypatch.setattr(registry, "find_spec", lambda name: None if name == "rouge_score" else plain(name))
    assert "--metrics rouge: needs the package rouge_score" in fails()
    assert "fillm[evaluate]" in fails(metrics="rouge")
