"""Hand-computed values, and a whole run against a restatement that takes one row at a time in float64."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fillm.evaluate.rouge import rouge_l_recalls
from fillm.evaluate.tofu import forget_truth_ratio, kept_truth_ratio, log_truth_ratios, option_probabilities
from fillm.evaluate.utility import harmonic_mean, kolmogorov_smirnov
from fillm.models import load_model, load_tokenizer
from tests.evaluate.conftest import rows_of

LOSSES = st.floats(0.0, 50.0)


def test_truth_ratio_by_hand() -> None:
    paraphrase, perturbed = np.array([math.log(2)]), [np.array([math.log(4), math.log(16)])]
    # P(paraphrase) = 1/2; the perturbed have 1/4 and 1/16: geometric mean 1/8, arithmetic 5/32
    assert np.exp(log_truth_ratios(paraphrase, perturbed)) == pytest.approx([1 / 4])
    assert np.exp(log_truth_ratios(paraphrase, perturbed, "arithmetic")) == pytest.approx([5 / 16])


def test_aggregates_of_truth_ratios_by_hand() -> None:
    ratios = np.log([0.25, 2.0, 1.0, 8.0])
    assert forget_truth_ratio(ratios) == pytest.approx((0.25 + 0.5 + 1 + 0.125) / 4)
    assert kept_truth_ratio(ratios) == pytest.approx(0.75 / 4)


def test_a_broken_model_has_truth_ratios_all_the_same() -> None:
    ratios = log_truth_ratios(np.array([2000.0, 0.0]), [np.array([1.0]), np.array([3000.0, 5000.0])])
    assert ratios.tolist() == [1999.0, -4000.0]
    assert forget_truth_ratio(ratios) == 0.0 and kept_truth_ratio(ratios) == 0.5
    assert np.isfinite(log_truth_ratios(np.array([0.0]), [np.array([3000.0, 5000.0])], "arithmetic")).all()


def test_option_probability_by_hand() -> None:
    true, wrong = np.log([2.0, 5.0]), [np.log([4.0, 8.0, 8.0]), np.log([5.0])]
    assert option_probabilities(true, wrong) == pytest.approx([0.5, 0.5])
    assert option_probabilities(np.array([5000.0]), [np.array([5000.0, 5000.0])]) == pytest.approx([1 / 3])


@given(st.lists(LOSSES, min_size=1, max_size=6), LOSSES)
def test_the_arithmetic_mean_is_the_larger(perturbed: list[float], paraphrase: float) -> None:
    given_losses = np.array([paraphrase]), [np.array(perturbed)]
    geometric = log_truth_ratios(*given_losses)[0]
    assert log_truth_ratios(*given_losses, "arithmetic")[0] >= geometric - 1e-9
    assert 0.0 <= forget_truth_ratio(np.array([geometric])) <= 1.0


def test_rouge_by_hand() -> None:
    recalls = rouge_l_recalls(
        ["The cats are running home", "one two three four", "Paris", "Ødegård", "..."],
        ["a cat was running", "four three two one", "It is in Paris, France", "no", "..."],
    )
    # stems: the cat are run home | a cat wa run; a subsequence, so the order counts; what a reference lacks is 0
    assert recalls == pytest.approx([2 / 5, 1 / 4, 1.0, 0.0, 0.0])


def test_harmonic_mean_by_hand() -> None:
    assert harmonic_mean([1.0, 0.5, 0.25]) == pytest.approx(3 / 7)
    assert harmonic_mean([0.3, 0.0]) == 0.0


def test_kolmogorov_smirnov_by_hand() -> None:
    # All of a below all of b: 2 of the 20 orders of three and three are as extreme.
    assert kolmogorov_smirnov(np.array([1.0, 2, 3]), np.array([4.0, 5, 6])) == pytest.approx((1.0, 0.1))
    assert kolmogorov_smirnov(np.array([1.0, 2]), np.array([1.0, 2])) == (0.0, 1.0)
    # Of the 6 orders of two and two only the two separated ones reach D = 1.
    assert kolmogorov_smirnov(np.array([1.0, 2]), np.array([3.0, 4])) == pytest.approx((1.0, 1 / 3))


class Restatement:
    """TOFU's metrics one row at a time: no batch, no cache, float64."""

    def __init__(self, folder: str) -> None:
        self.model = load_model(folder, device="cpu").double()
        self.tokenizer = load_tokenizer(folder)

    def prompt(self, row: dict[str, Any]) -> list[int]:
        return list(self.tokenizer(f"Question: {row['question']}\nAnswer:")["input_ids"])

    def loss(self, row: dict[str, Any], answer: str) -> float:
        prompt = self.prompt(row)
        ids = [*prompt, *self.tokenizer(" " + answer, add_special_tokens=False)["input_ids"], 2]
        with torch.no_grad():
            rows = torch.log_softmax(self.model(torch.tensor([ids])).logits[0], 1)
        picked = [float(rows[place - 1, ids[place]]) for place in range(len(prompt), len(ids))]
        return -sum(picked) / len(picked)

    def answer(self, row: dict[str, Any], limit: int) -> str:
        ids = self.prompt(row)
        begin = len(ids)
        while len(ids) < begin + limit:
            with torch.no_grad():
                token = int(self.model(torch.tensor([ids])).logits[0, -1].argmax())
            if token == 2:
                break
            ids.append(token)
        return self.tokenizer.decode(ids[begin:], skip_special_tokens=True)

    def of(self, split: str, limit: int, forget: bool, options: bool) -> dict[str, Any]:
        out: dict[str, Any] = {"probability": [], "rouge": [], "geometric": [], "arithmetic": [], "generated": []}
        for row in rows_of(split):
            p = math.exp(-self.loss(row, row["answer"]))
            wrong = [math.exp(-self.loss(row, text)) for text in row["perturbed_answer"]]
            true = p if options else math.exp(-self.loss(row, row["paraphrased_answer"]))
            out["probability"].append(p / (p + sum(wrong)) if options else p)
            out["generated"].append(self.answer(row, limit))
            out["rouge"].append(longest_common(row["answer"].split(), out["generated"][-1].split()))
            for form, mean in (("geometric", math.prod(wrong) ** (1 / len(wrong))), ("arithmetic", np.mean(wrong))):
                ratio = mean / true
                out[form].append(min(ratio, 1 / ratio) if forget else max(0.0, 1 - ratio))
        return {name: cells if name == "generated" else float(np.mean(cells)) for name, cells in out.items()}


def longest_common(reference: list[str], answer: list[str]) -> float:
    """Recall of the longest common subsequence; of words that no stemmer changes."""
    table = [[0] * (len(answer) + 1) for _ in range(len(reference) + 1)]
    for i, word in enumerate(reference):
        for j, other in enumerate(answer):
            table[i + 1][j + 1] = table[i][j] + 1 if word == other else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1] / len(reference)


SPLITS = {
    "forget": ("forget01_perturbed", True, False),
    "retain": ("retain_perturbed", False, False),
    "real_authors": ("real_authors_perturbed", False, True),
    "world_facts": ("world_facts_perturbed", False, True),
}


def test_a_whole_run_is_what_the_restatement_says(
    evaluate: Callable[..., Path], model_folder: str, retain_folder: str
) -> None:
    reference = evaluate("retain", model=retain_folder, metrics="truth-ratio")
    folder = evaluate("run", reference=str(reference))
    summary = json.loads((folder / "summary.json").read_text())
    assert all(
        summary[f"{name}_rouge_l_recall"] > 0.0 for name in ("forget", "retain")
    )  # of answers that say something
    restated = Restatement(model_folder)
    of_set = {name: restated.of(split, 12, *kind) for name, (split, *kind) in SPLITS.items()}
    for name, values in of_set.items():
        assert summary[f"{name}_probability"] == pytest.approx(values["probability"], abs=1e-5)
        assert summary[f"{name}_rouge_l_recall"] == pytest.approx(values["rouge"], abs=1e-12)
        assert summary[f"{name}_truth_ratio"] == pytest.approx(values["geometric"], abs=1e-5)
    for form in ("geometric", "arithmetic"):
        parts = [of_set[name][part] for name in SPLITS if name != "forget" for part in ("probability", "rouge", form)]
        expected = 0.0 if 0.0 in parts else len(parts) / sum(1 / part for part in parts)
        assert summary[f"model_utility_{form}"] == pytest.approx(expected, abs=1e-5)
    assert summary["model_utility"] == summary["model_utility_geometric"]
    rows = pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist()
    assert [row["generated"] for row in rows if row["set"] == "forget"] == of_set["forget"]["generated"]
    other = Restatement(retain_folder)
    ratios = []
    for one in (restated, other):
        found = []
        for row in rows_of("forget01_perturbed"):
            wrong = np.mean([one.loss(row, text) for text in row["perturbed_answer"]])
            found.append(one.loss(row, row["paraphrased_answer"]) - wrong)
        ratios.append(found)
    mine, theirs = ratios
    d = max(abs(np.mean([x <= at for x in mine]) - np.mean([x <= at for x in theirs])) for at in [*mine, *theirs])
    assert summary["forget_quality_ks_statistic"] == pytest.approx(d)
    assert 0.0 < summary["forget_quality"] < 1.0


def test_the_batch_size_changes_nothing(evaluate: Callable[..., Path]) -> None:
    one, many = evaluate("one", batch_size=1), evaluate("many", batch_size=32)
    tables = [pyarrow.parquet.read_table(folder / "rows.parquet").to_pylist() for folder in (one, many)]
    for a, b in zip(*tables, strict=True):
        for name, value in a.items():
            expected = pytest.approx(b[name], abs=1e-5) if isinstance(value, float | list) else b[name]
            assert value == expected, name


def test_the_same_bytes_twice(evaluate: Callable[..., Path]) -> None:
    first, second = evaluate("first"), evaluate("second")
    for name in ("summary.json", "rows.parquet"):
        assert (first / name).read_bytes() == (second / name).read_bytes()


def test_fictional_authors_have_one_set_of_general_facts(evaluate: Callable[..., Path], work: Path) -> None:
    folder = evaluate("run", benchmark="fictional-small", forget="forget05", data_root=None, num_retain=3, num_forget=3)
    summary = json.loads((folder / "summary.json").read_text())
    assert 0.0 < summary["general_probability"] < 1.0 and "world_facts_probability" not in summary
    table = pyarrow.parquet.read_table(folder / "rows.parquet")
    sets = table["set"].to_pylist()
    assert {name: sets.count(name) for name in set(sets)} == {"forget": 3, "retain": 3, "general": 109, "holdout": 40}
