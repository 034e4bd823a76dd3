"""The comparison with the retain-only model measures what it claims to."""

import csv
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import benchmarks.forget_quality.__main__ as command
import fillm
from benchmarks.forget_quality import study
from benchmarks.forget_quality.models import _check_same, evenly, pair
from benchmarks.forget_quality.one_shot import mean_loss, one_shot, whole_update
from benchmarks.forget_quality.results import COLUMNS, TABLE, table
from benchmarks.forget_quality.scoring import COMPARED, FIGURES, Scorer
from benchmarks.forget_quality.settings import CHOICES, LOSSES, QUICK_RISE, ForgetQualityConfig
from benchmarks.unlearning.choices import choices
from benchmarks.unlearning.results import _numbers
from benchmarks.unlearning.settings import UnlearningConfig
from fillm.data import tokenize_rows
from fillm.errors import DataError
from fillm.masks import Mask
from fillm.models import load_model, load_tokenizer

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "forget_quality.csv"
SHORT = {"score_retain": 20, "max_new_tokens": 8, "eval_retain": 5, "max_steps": 3}
QUICK = ["--quick", *(word for name, value in SHORT.items() for word in (f"--{name.replace('_', '-')}", str(value)))]
CONFIG = ForgetQualityConfig(quick=True, **SHORT)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Where the tiny models are trained, once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FILLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.delenv("FILLM_DATA", raising=False)
        yield


@pytest.fixture(scope="module")
def one(cache):
    return pair(CONFIG, False, 0, lambda line: None)


def weights(model) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def read(out) -> list[dict[str, str]]:
    with (out / "forget_quality.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.slow
def test_a_whole_run_and_its_continuation(tmp_path, capsys):
    flags = [*QUICK, "--seeds", "2", "--out", str(tmp_path)]
    assert command.main([*flags, "--minutes", "1e-9"]) == 0
    first = read(tmp_path)
    assert len(first) == 1
    assert command.main([*flags, "--resume"]) == 0
    rows = read(tmp_path)
    assert rows[0] == first[0] and tuple(rows[0]) == COLUMNS
    methods = [(choice, loss) for choice in ("whole model", "soir bottom") for loss in ("ga", "influence")]
    references = [(name, "none") for name in (study.FULL, study.RETAIN_ONLY, study.OTHER_SEED)]
    for seed in ("0", "1"):
        found = {(row["choice"], row["loss"]): row for row in rows if row["seed"] == seed}
        assert list(found) == [*references[:2], *methods, references[2]]
        judge = found[references[1]]
        assert float(judge["forget_quality"]) == 1.0 and float(judge["forget_quality_ks_statistic"]) == 0.0
        start = float(found[references[0]]["forget_loss"])
        assert float(judge["target_forget_loss"]) == pytest.approx(start + QUICK_RISE, abs=1e-4)
        for key in methods:
            assert float(found[key]["forget_loss"]) > start
            assert int(found[key]["steps"]) >= 1 and int(found[key]["selected_parameters"]) > 0
        assert float(found[methods[1]]["forget_loss"]) >= float(judge["target_forget_loss"]) - 1e-4
    # What another pair's retain-only model came to is the same test from the other side.
    others = [row["forget_quality_ks_statistic"] for row in rows if row["choice"] == study.OTHER_SEED]
    assert others[0] == others[1] != "0"
    assert capsys.readouterr().out.count("| `influence` | soir bottom |") == 1
    assert command.main([*flags, "--resume"]) == 0
    assert read(tmp_path) == rows


def test_the_pair_differs_in_the_forget_rows_alone(one):
    assert load_tokenizer(str(one.retain_only)).get_vocab() == one.tokenizer.get_vocab()
    again = load_model(str(one.retain_only), device="cpu")
    assert {name: p.shape for name, p in again.named_parameters()} == {
        name: p.shape for name, p in one.full.named_parameters()
    }
    record = (one.retain_only / "run.yaml").read_text(encoding="utf-8")
    assert f"samples: {len(one.rows['retain'])}\n" in record and len(one.rows["retain"]) == 20


def test_scores_are_those_of_the_command(one, tmp_path):
    """The rows of the quick pair are the first 20 of the splits, which the command can be asked for."""
    asked = {"benchmark": "fictional-small", "forget": "forget05", "num_forget": 20, "num_retain": 20}
    asked |= {"max_new_tokens": 8, "metrics": "probability,rouge,truth-ratio,forget-quality"}
    judge = load_model(str(one.retain_only), device="cpu")
    score = Scorer(CONFIG, one.scored, one.tokenizer)
    reference = score(judge)
    fillm.evaluate_model(judge, one.tokenizer, out=str(tmp_path / "judge"), **asked)
    want = fillm.evaluate_model(one.full, one.tokenizer, reference=str(tmp_path / "judge"), **asked)
    found = score(one.full)
    figures = {**found.figures, **found.beside(reference)}
    utility = figures.pop("model_utility")
    assert set(figures) == {*FIGURES, *COMPARED} - {"model_utility"}
    for name, value in figures.items():
        assert value == pytest.approx(want.summary[name], abs=1e-6), name
    losses = [row["loss"] for row in want.rows.to_pylist() if row["set"] == "forget"]
    assert found.forget_loss == pytest.approx(np.mean(losses), abs=1e-6)
    parts = [figures[f"retain_{name}"] for name in ("probability", "rouge_l_recall", "truth_ratio")]
    assert utility == pytest.approx(3 / sum(1 / part for part in parts) if min(parts) else 0.0, abs=1e-9)


@pytest.mark.slow
def test_the_one_shot_step_is_the_shortest_that_reaches_the_goal_and_stays_inside(one):
    before = weights(one.full)
    rank = fillm.rank_parameters(
        one.full, one.tokenizer, *([row.fields for row in one.rows[name]] for name in ("forget", "retain")),
        save_update=True,
    )  # fmt: skip
    mask = rank.select(0.3)
    update = whole_update(one)
    samples = tokenize_rows(one.rows["forget"], one.tokenizer)
    goal = mean_loss(one, samples) + 0.3
    with study.restored(one.full, mask) as start:
        eta = one_shot(one, mask, update, start, goal)
        taken = weights(one.full)
        assert goal <= mean_loss(one, samples) < goal + 0.05
    assert all(torch.equal(before[name], p) for name, p in weights(one.full).items())
    fields = [[row.fields for row in one.rows[name]] for name in ("forget", "retain")]
    with study.restored(one.full, mask):
        fillm.unlearn_model(one.full, one.tokenizer, *fields, mask=mask, ranking=rank, loss="influence", eta=eta)
        for name, p in weights(one.full).items():
            torch.testing.assert_close(taken[name], p, rtol=1e-6, atol=1e-8)
            assert name in mask or torch.equal(p, before[name])
    with study.restored(one.full, mask):
        for name, p in one.full.named_parameters():
            if name in mask:
                p.data = before[name] - 0.98 * eta * torch.where(mask[name].to_bool(), update[name], 0.0)
        assert mean_loss(one, samples) < goal


def test_an_error_leaves_the_model_as_it_was(one):
    before = weights(one.full)
    name = next(iter(before))
    with pytest.raises(ZeroDivisionError), study.restored(one.full, Mask.whole(one.full, [name])):
        dict(one.full.named_parameters())[name].data.add_(1.0)
        raise ZeroDivisionError
    assert all(torch.equal(before[name], p) for name, p in weights(one.full).items())


@pytest.mark.parametrize(
    ("runs", "expected"),
    [
        # By rate: steps, forget loss and retain loss after. The goal is 5.
        ({4e-3: (20, 5.5, 0.4)}, 4e-3),
        ({4e-3: (4, 9.0, 0.1), 1e-3: (20, 5.1, 0.3)}, 1e-3),  # 4 steps were too few to stop near the goal
        ({4e-3: (4, 9.0, 0.5), 1e-3: (20, 3.0, 0.1), 2e-3: (12, 5.1, 0.4)}, 2e-3),  # so a rate between is tried
        ({4e-3: (4, 9.0, 0.5), 1e-3: (20, 3.0, 0.1), 2e-3: (30, 4.0, 0.4)}, 4e-3),  # but better than not to get there
        ({4e-3: (40, 3.0, 0.1), 1.6e-2: (40, 4.0, 2.0), 6.4e-2: (40, 3.5, 2.0)}, 1.6e-2),  # none did: what came closest
        ({4e-3: (40, 3.0, 0.1), 1.6e-2: (20, 5.0, 2.0)}, 1.6e-2),
        ({4e-3: (40, 3.0, 0.1), 1.6e-2: (2, 9.0, 6.0), 8e-3: (9, 5.2, 0.9)}, 8e-3),
    ],
)
def test_the_run_that_counts(one, monkeypatch, runs, expected):
    name = "model.norm.weight"
    mask, tried = Mask.whole(one.full, [name]), []

    def unlearned(model, *given, lr, **settings):
        assert torch.equal(dict(model.named_parameters())[name], start[name])  # every rate begins anew
        tried.append(lr)
        steps, forget, retain = next(run for rate, run in runs.items() if rate == pytest.approx(lr))
        dict(model.named_parameters())[name].data.fill_(lr)
        after = SimpleNamespace(forget=forget, retain=retain)
        return SimpleNamespace(steps=steps, after=after, verification=SimpleNamespace(outside_mask_bit_equal=True))

    monkeypatch.setattr(study, "unlearn_model", unlearned)
    with study.restored(one.full, mask) as start:
        found = study._trained(CONFIG, one, mask, "ga", 5.0, start)
        torch.testing.assert_close(one.full.get_parameter(name), torch.full_like(start[name], expected))
    assert tried == pytest.approx(list(runs)) and found == {"steps": runs[expected][0], "lr": pytest.approx(expected)}


def test_rows_that_are_scored_have_to_be_those_that_were_learned(one):
    changed = [replace(row, fields={**row.fields, "answer": "Something else."}) for row in one.rows["retain"]]
    with pytest.raises(DataError, match="take TOFU as published"):
        _check_same(one.rows, {**one.rows, "retain": changed})


@pytest.mark.parametrize(("count", "expected"), [(3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))])
def test_rows_are_taken_evenly(count, expected):
    assert evenly(list(range(10)), count) == expected


def test_the_table_has_means_over_pairs():
    figures = dict.fromkeys((figure.column for figure in TABLE), 0.25)
    kept = {**figures, "choice": "random 0", "loss": "ga"}
    records = [
        {**kept, "seed": 0, "model_utility": 0.5, "forget_quality": 1e-8},
        {**kept, "seed": 0, "choice": "full model", "loss": "none", "forget_quality": 0.0},
        {**kept, "seed": 1, "model_utility": 0.7, "forget_quality": 1e-2},
    ]
    lines = table(records).splitlines()
    assert [line.split(" | ")[:2] for line in lines[2:]] == [["| ", "full model"], ["| `ga`", "random"]]
    assert "| 0.60 (0.50–0.70) | 1e-05 (1e-08–0.01) | 0.25 (0.25–0.25) |" in lines[3]
    assert lines[2].endswith("| 0.25 | 0 | 0.25 |")


def test_the_page_shows_the_committed_figures():
    with RESULTS.open(newline="") as file:
        lines = table([_numbers(row) for row in csv.DictReader(file)]).splitlines()
    assert "\n".join(lines) in (ROOT / "docs" / "evaluate.md").read_text(encoding="utf-8")


def test_parts_share_the_choices_and_all_names_are_known():
    parts = [ForgetQualityConfig(part=f"{i}/2").chosen_choices for i in (1, 2)]
    assert sorted(name for part in parts for name in part) == sorted(CHOICES)
    assert [one.name for one in choices(UnlearningConfig(draws=1, choices=",".join(CHOICES)))] == list(CHOICES)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--losses", "nothing"], ", ".join(LOSSES)),
        (["--losses", ","], "--losses"),
        (["--choices", "soir"], "soir --objective retain"),
        (["--fraction", "0"], "--fraction"),
        (["--forget-loss", "-1"], "--forget-loss"),
        (["--score-retain", "0"], "--score-retain"),
        (["--part", "3/2"], "--part"),
    ],
)
def test_a_wrong_setting_is_one_line(flags, said, capsys):
    assert command.main(flags) == 2
    shown = capsys.readouterr().err
    assert said in shown and shown.count("\n") == 1
