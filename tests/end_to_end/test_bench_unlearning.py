"""The comparison of masks measures what it claims to."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

import benchmarks.unlearning.__main__ as command
from benchmarks.unlearning import study
from benchmarks.unlearning.choices import METHODS, choices, level_crossing
from benchmarks.unlearning.results import _numbers, best_rates, table
from benchmarks.unlearning.settings import QUICK_LEVELS, UnlearningConfig
from benchmarks.unlearning.study import next_rate
from fillm.models import load_model

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["--quick", "--seeds", "1", "--max-steps", "3", "--eval-retain", "5"]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where the tiny model is trained, once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FILLM_CACHE", str(folder))
        patch.delenv("FILLM_DATA", raising=False)
        yield folder


def read(out) -> list[dict[str, str]]:
    with (out / "unlearning.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_whole_run_and_its_continuation(cache, tmp_path, capsys):
    assert command.main([*QUICK, "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    first = read(tmp_path)
    assert len(first) == 1
    assert command.main([*QUICK, "--resume", "--out", str(tmp_path)]) == 0
    rows = read(tmp_path)
    assert rows[0] == first[0]
    names = ["all MLP and attention", "random 0", "soir bottom"]
    assert list(dict.fromkeys(row["choice"] for row in rows)) == names
    for name in names:
        tried = {float(row["lr"]): _numbers(row) for row in rows if row["choice"] == name}
        assert len(tried) == sum(row["choice"] == name for row in rows)
        assert 4e-3 in tried and next_rate(tried) is None
    assert {(float(row["forget_low"]), float(row["forget_high"])) for row in rows} == {QUICK_LEVELS}
    assert len({row["forget_start"] for row in rows}) == 1  # the model comes back as it was
    assert all(int(row["steps"]) > 0 for row in rows)
    for row in rows:  # steps that are not evaluated hide no crossing
        assert math.isnan(float(row["retain_at_low"])) == (float(row["forget_end"]) < QUICK_LEVELS[0])
    assert all(float(row["forget_end"]) > float(row["forget_start"]) for row in rows)
    folders = [path for path in cache.glob("bench-*") if (path / "config.json").exists()]
    assert len(folders) == 1
    weights = load_model(str(folders[0]), device="cpu").num_parameters()
    assert all(0 < int(row["selected_parameters"]) < weights for row in rows)
    masks = {row["choice"]: row["mask"] for row in rows}
    assert len(set(masks.values())) == 3 and all(len(mask) == 16 for mask in masks.values())
    assert (tmp_path / "unlearning.png").read_bytes()[:4] == b"\x89PNG"
    assert "random" in capsys.readouterr().out


@pytest.mark.slow
def test_every_choice_has_a_mask_and_equal_masks_train_once(cache, tmp_path, monkeypatch):
    """Every method ranks the tiny model, the shift from its first weights too."""
    trained = []

    def run(config, one, choice, mask, loss, rate):
        trained.append(choice)
        kept = {"seed": one.seed, "choice": choice, "loss": loss, "lr": rate, "steps": 9}
        return {**kept, "retain_at_low": 0.5, "retain_at_high": 0.6}

    monkeypatch.setattr(study, "unlearned", run)
    config = UnlearningConfig(quick=True, fraction=0.3)
    one = study.recited(config, False, 0, lambda line: None)
    wanted = choices(UnlearningConfig())
    records = list(study.runs(config, one, wanted, [], lambda line: None))
    assert [record["choice"] for record in records] == [choice.name for choice in wanted]
    assert len(trained) == len({record["mask"] for record in records}) < len(records)
    assert not list(study.runs(config, one, wanted, records, lambda line: None))


def test_held_out_rows_are_not_ranked_by():
    whole = study.recited(UnlearningConfig(quick=True), False, 0, lambda line: None)
    parted = study.recited(UnlearningConfig(quick=True, held_out=True), False, 0, lambda line: None)
    assert whole.ranked == whole.rows
    assert parted.ranked["forget"] == parted.rows["forget"] == whole.rows["forget"]
    pairs = zip(parted.ranked["retain"], parted.rows["retain"], strict=True)
    assert [row for pair in pairs for row in pair] == whole.rows["retain"]
    assert parted.ranked["retain"] and not any(row in parted.rows["retain"] for row in parted.ranked["retain"])


@pytest.mark.slow
def test_another_command_is_not_continued(tmp_path):
    assert command.main([*QUICK, "--minutes", "1e-9", "--out", str(tmp_path)]) == 0
    assert command.main([*QUICK, "--batch-size", "4", "--minutes", "1e-9", "--resume", "--out", str(tmp_path)]) == 0
    assert [row["command"].count("--batch-size 4") for row in read(tmp_path)] == [1]


@pytest.mark.parametrize(
    ("forget", "retain", "level", "expected"),
    [
        ([0.0, 2.0], [1.0, 3.0], 1.0, 2.0),  # half way
        ([0.0, 0.5, 2.5], [0.0, 1.0, 5.0], 1.0, 2.0),  # a quarter of the last step
        ([1.0, 2.0], [7.0, 8.0], 1.0, 7.0),  # there from the start
        ([0.0, 3.0, 0.5, 3.0], [0.0, 3.0, 9.0, 9.0], 1.0, 1.0),  # the first time counts
    ],
)
def test_the_retain_loss_at_a_level(forget, retain, level, expected):
    assert level_crossing(np.array(forget), np.array(retain), level) == pytest.approx(expected, abs=1e-12)


def test_a_level_that_is_never_reached():
    assert math.isnan(level_crossing(np.array([0.0, 0.9]), np.array([0.0, 1.0]), 1.0))


def test_the_best_rate_counts_and_draws_are_one_line():
    kept = {"loss": "ga", "lr": 4e-3, "steps": 20}
    records = [
        {**kept, "choice": "random 0", "seed": 0, "at": 0.1, "steps": 4, "lr": 1.6e-2},  # too coarse
        {**kept, "choice": "random 0", "seed": 0, "at": 0.5},
        {**kept, "choice": "random 0", "seed": 0, "at": 0.2, "lr": 1e-3},
        {**kept, "choice": "random 0", "seed": 0, "at": math.nan, "lr": 2.5e-4},
        {**kept, "choice": "random 1", "seed": 0, "at": 0.4, "steps": 4},  # the lowest rate there is
        {**kept, "choice": "soir top", "seed": 0, "at": math.nan},
    ]
    assert best_rates(records, "at")["ga", "random 0"] == {0: 0.2}
    lines = table(records, "at", 1.0).splitlines()
    assert lines[2].split() == ["random", "0.300", "(0.200-0.400)"]
    assert lines[3].split() == ["soir", "top", "never"]


def run(steps, low, high):
    return {"steps": steps, "retain_at_low": low, "retain_at_high": high}


@pytest.mark.parametrize(
    ("tried", "expected"),
    [
        ({}, 4e-3),
        ({4e-3: run(20, 0.1, 0.2)}, None),
        ({4e-3: run(8, 0.1, 0.2)}, None),
        ({4e-3: run(7, 0.1, 0.2)}, 1e-3),
        ({4e-3: run(7, 0.1, 0.2), 1e-3: run(7, 0.1, 0.2)}, 2.5e-4),
        ({4e-3: run(7, 0.1, 0.2), 1e-3: run(30, 0.1, 0.2)}, None),
        ({4e-3: run(2, 0.1, 0.2), 1e-3: run(4, 0.1, 0.2), 2.5e-4: run(5, 0.1, 0.2)}, None),
        ({4e-3: run(60, 0.1, math.nan)}, 1.6e-2),
        ({4e-3: run(60, math.nan, math.nan), 1.6e-2: run(60, math.nan, math.nan)}, 6.4e-2),
        ({rate: run(60, math.nan, math.nan) for rate in (4e-3, 1.6e-2, 6.4e-2)}, None),
        ({4e-3: run(60, math.nan, math.nan), 1.6e-2: run(5, 0.1, 0.2)}, None),
    ],
)
def test_the_rates_tried(tried, expected):
    assert next_rate(tried) == expected


def test_parts_share_the_choices():
    names = [one.name for one in choices(UnlearningConfig())]
    parts = [[one.name for one in choices(UnlearningConfig(part=f"{i}/3"))] for i in (1, 2, 3)]
    assert sorted(name for part in parts for name in part) == sorted(names)
    assert parts[1] == names[1::3]


def test_every_method_has_both_sides():
    names = {one.name for one in choices(UnlearningConfig())}
    assert {f"{name} {side}" for name in METHODS for side in ("top", "bottom")} < names
    assert sum(name.startswith("random ") for name in names) == UnlearningConfig().draws == 5


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--losses", "nothing"], "--losses"),
        (["--choices", "soir"], "--choices"),
        (["--fraction", "0"], "--fraction"),
        (["--seeds", "0"], "--seeds"),
        (["--part", "3/2"], "--part"),
    ],
)
def test_a_wrong_setting_is_one_line(flags, said, capsys):
    assert command.main(flags) == 2
    shown = capsys.readouterr().err
    assert said in shown
    assert shown.count("\n") == 1


@pytest.mark.parametrize("folder", ["", "tiny", "held_out"])
def test_the_page_shows_the_committed_runs(folder):
    with (ROOT / "benchmarks/results" / folder / "unlearning.csv").open(newline="") as file:
        rows = [_numbers(row) for row in csv.DictReader(file)]
    page = (ROOT / "docs/mask-study.md").read_text(encoding="utf-8")
    for column in ("low", "high"):
        assert table(rows, f"retain_at_{column}", rows[0][f"forget_{column}"]) in page
    assert f"All {len(rows)} runs" in page
