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


def test_claims_and_their_sources_are_those_of_the_experiments():
    for name in experiments():
        plan = read_plan(ExperimentConfig(experiment=(name,)), FAMILIES)
        section = PAGE.partition(f"`python -m benchmarks.experiment {name}`")[2].partition("\n## ")[0]
        words = re.sub(r"\s+", " ", section)
        assert f"**Claim.** {plan.claim} **Source.** {plan.source} **Measured.**" in words, name


def test_a_source_is_a_paper_or_says_whose_the_claim_is():
    for name in experiments():
        source = read_plan(ExperimentConfig(experiment=(name,)), FAMILIES).source
        assert source.startswith(("The SOIR studies", "This project: ")) or "arXiv" in source, name
        assert len(re.findall(r"arXiv \d{4}\.\d{5}\b", source)) == source.count("arXiv"), name
