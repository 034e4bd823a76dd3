"""KnowUnDo: scores by hand, and whole evaluations of rows in its layout."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rouge_score import rouge_scorer

from fillm import evaluate_model
from fillm.data.published import _KNOWUNDO_SPLITS
from fillm.errors import UsageError
from fillm.evaluate.__main__ import main
from fillm.evaluate.config import EvaluateConfig
from fillm.evaluate.knowundo import perplexity, success
from fillm.evaluate.row_sets import row_sets
from tests.families import build_family
from tests.rank.conftest import question_row, word_tokenizer


def text_row(number: int) -> dict[str, str]:
    row = question_row(number, 2 + number % 3)
    return {"text": row["question"], "labels": row["answer"]}


@pytest.fixture
def data_root(tmp_path: Path) -> str:
    """Made-up rows where the benchmark's would be."""
    folder = tmp_path / "data" / "knowundo" / "privacy"
    folder.mkdir(parents=True)
    for name, numbers in (("unlearn_val", range(5)), ("retention_val", range(10, 17)), ("unlearn_train", range(3))):
        (folder / f"{name}.json").write_text(json.dumps([text_row(number) for number in numbers]), encoding="utf-8")
    return str(tmp_path / "data")


def test_success_by_hand() -> None:
    found = success("probability", [0.25, 0.5], [0.8])
    expected = {
        "unlearn_probability": 0.375,
        "retention_probability": 0.8,
        "unlearn_success_probability": 0.625,
        "retention_success_probability": 0.8,
        "success_probability": 0.7125,
    }
    assert found == pytest.approx(expected)


@pytest.mark.parametrize(
    ("known", "kept", "both"), [(1.0, 1.0, 0.5), (0.0, 0.0, 0.5), (0.0, 1.0, 1.0), (1.0, 0.0, 0.0)]
)
def test_success_at_the_corners(known: float, kept: float, both: float) -> None:
    assert success("s", [known] * 3, [kept] * 2)["success_s"] == both


def test_perplexity_by_hand() -> None:
    assert perplexity([math.log(4.0), math.log(2.0)]) == pytest.approx(math.sqrt(8.0))
    assert perplexity([0.0]) == 1.0
    assert perplexity([709.0]) == pytest.approx(math.exp(709.0))
    assert perplexity([1000.0]) is None


def test_the_order_of_rows_does_not_matter() -> None:
    draw = np.random.default_rng(1)
    rows = draw.random(37)
    there, back = (success("s", order, order[:11]) for order in (rows, np.flip(rows)))
    assert there["unlearn_s"] == back["unlearn_s"]  # to the bit
    assert perplexity(rows) == perplexity(draw.permutation(rows))


@pytest.mark.parametrize(
    ("forget", "subset"), [("privacy", "val"), ("privacy/unlearn_val", "val"), ("privacy/unlearn_train", "train")]
)
def test_splits(forget: str, subset: str) -> None:
    found = row_sets(EvaluateConfig(benchmark="knowundo", forget=forget))
    specs = {name: one.spec for name, one in found.items()}
    assert specs == {
        "forget": f"knowundo:privacy/unlearn_{subset}",
        "retain": f"knowundo:privacy/retention_{subset}",
    }
    assert {spec.partition(":")[2] for spec in specs.values()} <= set(_KNOWUNDO_SPLITS)


@pytest.mark.parametrize("forget", ["forget01", "privacy/retention_val", "privacy/", "copyrights"])
def test_other_splits_are_refused(forget: str) -> None:
    with pytest.raises(UsageError, match=f"--forget {forget}: of knowundo give privacy or copyright"):
        row_sets(EvaluateConfig(benchmark="knowundo", forget=forget))


def evaluated(data_root: str, **settings: Any) -> Any:
    return evaluate_model(
        build_family("llama", seed=3),
        word_tokenizer(),
        **{"benchmark": "knowundo", "forget": "privacy", "data_root": data_root, "max_new_tokens": 5, **settings},
    )


def test_a_run_against_a_slow_restatement(data_root: str) -> None:
    result = evaluated(data_root)
    model, tokenizer = build_family("llama", seed=3), word_tokenizer()
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=True)
    found: dict[str, dict[str, list[float]]] = {}
    for scope, numbers in (("unlearn", range(5)), ("retention", range(10, 17))):
        scores = found[scope] = {"probability": [], "accuracy": [], "rouge_l_recall": [], "loss": []}
        for number in numbers:
            row = text_row(number)
            ids = tokenizer(f"Question: {row['text']}\nAnswer:").input_ids
            answer = [*tokenizer(f" {row['labels']}", add_special_tokens=False).input_ids, 2]
            logits = model(torch.tensor([ids + answer])).logits[0].detach().double()
            own = [torch.log_softmax(logits[len(ids) + t - 1], 0) for t in range(len(answer))]
            loss = -sum(float(p[token]) for p, token in zip(own, answer, strict=True)) / len(answer)
            said = list(ids)
            while len(said) < len(ids) + 5 and (said[-1] != 2 or len(said) == len(ids)):
                said.append(int(model(torch.tensor([said])).logits[0, -1].argmax()))
            text = tokenizer.decode(said[len(ids) :], skip_special_tokens=True)
            scores["loss"].append(loss)
            scores["probability"].append(math.exp(-loss))
            scores["accuracy"].append(
                sum(int(p.argmax()) == token for p, token in zip(own, answer, strict=True)) / len(answer)
            )
            scores["rouge_l_recall"].append(scorer.score(row["labels"], text)["rougeL"].recall)
    for name in ("probability", "accuracy", "rouge_l_recall"):
        known, kept = (float(np.mean(found[scope][name])) for scope in ("unlearn", "retention"))
        assert result.summary[f"unlearn_success_{name}"] == pytest.approx(1 - known, abs=1e-6)
        assert result.summary[f"retention_success_{name}"] == pytest.approx(kept, abs=1e-6)
        assert result.summary[f"success_{name}"] == pytest.approx((1 - known + kept) / 2, abs=1e-6)
    for scope in ("unlearn", "retention"):
        expected = math.exp(float(np.mean(found[scope]["loss"])))
        assert result.summary[f"{scope}_perplexity"] == pytest.approx(expected, rel=1e-5)
    assert result.rows.num_rows == 12 and result.notes == {}
    assert not [name for name in result.summary if name.startswith("mia")]  # there are no holdout rows


def test_counts_choose_rows(data_root: str) -> None:
    result = evaluated(data_root, num_forget=2, metrics="probability,perplexity")
    assert result.rows["set"].to_pylist() == ["forget"] * 2 + ["retain"] * 7
    with pytest.raises(UsageError, match=r"--num-retain 8: knowundo:privacy/retention_val has 7 rows"):
        evaluated(data_root, num_retain=8)


def test_the_command(data_root: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model"
    build_family("llama", seed=3).save_pretrained(model)
    word_tokenizer().save_pretrained(model)
    out = tmp_path / "run"
    argv = ["--model", str(model), "--benchmark", "knowundo", "--forget", "privacy", "--data-root", data_root]
    assert main([*argv, "--device", "cpu", "--max-new-tokens", "5", "--out", str(out)]) == 0
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert summary.pop("notes") == {}
    assert summary == pytest.approx(evaluated(data_root).summary, rel=1e-5, abs=1e-7)  # another attention kernel
    assert "success_rouge_l_recall" in capsys.readouterr().out
