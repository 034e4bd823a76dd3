"""What docs/studies.md shows of a study is what its committed rows say."""

import importlib
import re
from pathlib import Path

import pytest

from benchmarks.experiment.case import FAMILIES
from benchmarks.experiment.results import read
from benchmarks.experiment.settings import ExperimentConfig, experiments, read_plan

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "experiments"
PAGE = (ROOT / "docs" / "studies.md").read_text(encoding="utf-8")
MEASURED = sorted(path.stem for path in RESULTS.glob("*.csv"))


@pytest.mark.parametrize("name", MEASURED)
def test_the_table_of_a_study_is_that_of_its_rows(name):
    plan = read_plan(ExperimentConfig(experiment=(name,)), FAMILIES)
    study = importlib.import_module(f"benchmarks.experiment.studies.{plan.study}")
    for line in study.summary(read(RESULTS / f"{name}.csv")).splitlines():
        assert line in PAGE
    assert (
        f"../benchmarks/results/experiments/{name}.png" in PAGE
        and f"../benchmarks/results/experiments/{name}.csv" in PAGE
    )
    assert (RESULTS / f"{name}.png").exists()


def test_every_experiment_has_a_section_that_says_whether_it_was_run():
    for name in experiments():
        section = PAGE.partition(f"`python -m benchmarks.experiment {name}`")[2].partition("\n## ")[0]
        assert section, name
        assert ("not run yet" in section) == (name not in MEASURED), name


def test_claims_are_those_of_the_experiments():
    words = re.sub(r"\s+", " ", PAGE)
    for name in experiments():
        assert read_plan(ExperimentConfig(experiment=(name,)), FAMILIES).claim.strip() in words, name
