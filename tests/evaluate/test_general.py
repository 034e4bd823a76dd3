"""The hook to lm-evaluation-harness, with a stand-in for the package."""

import math
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fillm.errors import DataError, UsageError
from fillm.evaluate.config import EvaluateConfig
from fillm.evaluate.dealing import Deal
from fillm.evaluate.general import check_tasks, general_ability, general_metric
from fillm.evaluate.metric import Needs


class _TaskManager:
    def match_tasks(self, names: list[str]) -> list[str]:
        known = ("arc_easy", "gsm8k", "mmlu")
        return [task for name in names for task in known if task == name or (name[-1] == "*" and task[0] == name[0])]


@pytest.fixture
def harness(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The names of lm-eval that are used, and what they were called with."""
    package, tasks, models, huggingface = (
        ModuleType(name) for name in ("lm_eval", "lm_eval.tasks", "lm_eval.models", "lm_eval.models.huggingface")
    )
    tasks.TaskManager = _TaskManager
    huggingface.HFLM = lambda **given: ("HFLM", given)
    package.calls = []

    def simple_evaluate(**given: Any) -> dict[str, Any]:
        package.calls.append(given)
        return {
            "results": {
                "arc_easy": {"alias": "arc_easy", "acc,none": np.float64(0.25), "acc_stderr,none": 0.01, "samples": 8},
                "gsm8k": {"exact_match,strict-match": 0, "exact_match_stderr,strict-match": "N/A", "flag": True},
            }
        }

    package.simple_evaluate = simple_evaluate
    for module in (package, tasks, models, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


@pytest.fixture
def no_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)  # what import does with a package that is not there


def test_numbers_are_flat_and_named_as_the_harness_names_them(harness: ModuleType) -> None:
    found = general_ability("model", "tokenizer", ["arc_easy", "gsm8k"], batch_size=3, seed=7)
    assert found == {
        "lm_eval/arc_easy/acc": 0.25,
        "lm_eval/arc_easy/acc_stderr": 0.01,
        "lm_eval/arc_easy/samples": 8.0,
        "lm_eval/gsm8k/exact_match,strict-match": 0.0,
    }
    assert all(type(value) is float for value in found.values())
    (call,) = harness.calls
    assert call["model"] == ("HFLM", {"pretrained": "model", "tokenizer": "tokenizer", "batch_size": 3})
    assert call["tasks"] == ["arc_easy", "gsm8k"] and call["log_samples"] is False
    assert {call[name] for name in call if name.endswith("seed")} == {7}


def test_task_names_are_checked_before_anything_runs(harness: ModuleType) -> None:
    assert check_tasks("arc_easy, m*,") == ["arc_easy", "m*"]
    with pytest.raises(UsageError, match="has no task arc_hardest, x"):
        check_tasks("arc_easy,arc_hardest,x")
    with pytest.raises(UsageError, match="name tasks"):
        check_tasks(" ,")
    assert harness.calls == []


def test_without_the_package_there_is_one_clear_line(no_harness: None) -> None:
    for asked in (lambda: check_tasks("arc_easy"), lambda: general_ability("m", "t", ["arc_easy"], batch_size=1)):
        with pytest.raises(UsageError, match="--lm-eval arc_easy: the package lm-eval is not installed") as caught:
            asked()
        assert "\n" not in str(caught.value)


def test_a_task_that_fails_is_one_line(harness: ModuleType) -> None:
    def fail(**given: Any) -> None:
        raise ConnectionError("no route to the data\nlong story")

    harness.simple_evaluate = fail
    with pytest.raises(DataError, match=r"lm-eval failed \(ConnectionError: no route to the data\)$"):
        general_ability("model", "tokenizer", ["arc_easy"], batch_size=1)


def test_its_numbers_stand_in_the_summary(harness: ModuleType) -> None:
    harness.simple_evaluate = lambda **given: {"results": {"arc_easy": {"acc,none": 0.5, "acc_stderr,none": math.nan}}}
    evidence = SimpleNamespace(config=EvaluateConfig(batch_size=2), model="model", tokenizer="tokenizer", deal=Deal())
    metric = general_metric("arc_easy")
    assert metric.needs({}) == Needs()
    outcome = metric.compute(evidence)
    assert outcome.summary == {"lm_eval/arc_easy/acc": 0.5, "lm_eval/arc_easy/acc_stderr": None}
    assert outcome.notes == {"lm_eval/arc_easy/acc_stderr": "lm-eval reports nan"}
