"""Masks by the path ranking in the studies, and what they share with the search and the confirmation."""

import math

import pytest
import torch

import fillm
from benchmarks.experiment.case import FAMILIES, cases
from benchmarks.experiment.rankings import Rankings
from benchmarks.experiment.settings import ExperimentConfig, read_plan
from benchmarks.experiment.studies import weight_path
from benchmarks.experiment.studies.weight_path import best_weights, by_row
from benchmarks.unlearning.settings import SCOPE

QUICK = ExperimentConfig(experiment=("weight_path_search",), quick=True)


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FILLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        [one] = cases(QUICK, read_plan(QUICK, FAMILIES), lambda line: None)
        yield one


def test_masks_are_of_the_path_ranking_of_the_study_s_settings(case):
    rankings, scope = Rankings(case), {"include": SCOPE, "path_rise": 0.01, "path_points": 3}
    forget, kept = ([row.fields for row in case.rows[name]] for name in ("forget", "retain"))
    own = fillm.rank_parameters(
        case.model, case.tokenizer, forget, kept, "path", granularity="element", path_weight=2.0, **scope
    )
    along = {"path_rise": 0.01, "path_points": 3}
    assert weight_path.path_mask(rankings, "weights, 2", 0.3, along) == own.select(0.3)
    rounds = fillm.rank_parameters(
        case.model, case.tokenizer, forget, kept, "path", granularity="element", path_weight=4.0, path_rounds=3,
        path_keep=0.2, **scope
    )  # fmt: skip
    assert weight_path.path_mask(rankings, "rounds 3, 4", 0.2, along) == rounds.select(0.2)
    rows = weight_path.path_mask(rankings, "rows, 2", 0.3, along)
    assert rows.count == int(0.3 * sum(row["numel"] for row in own))
    split = 0
    for name, part in rows.items():  # by whole rows, but for the one in which the budget ends
        flags = part.to_bool()
        split += int((flags.any(-1) & ~flags.all(-1)).sum())
        means = own.updates[f"scores/{name}"].nan_to_num(neginf=0.0).mean(-1)
        if flags.all(-1).any() and not flags.any(-1).all():
            assert float(means[flags.all(-1)].min()) >= float(means[~flags.any(-1)].max())
    assert split <= 1


def test_the_best_weights_fill_a_fraction_ties_in_order():
    chosen = best_weights({"a": torch.tensor([[1.0, 5.0], [3.0, 3.0]]), "b": torch.tensor([3.0, 9.0])}, 0.5)
    assert chosen["a"].tolist() == [[False, True], [True, False]] and chosen["b"].tolist() == [False, True]
    assert sum(int(part.sum()) for part in best_weights({"a": torch.zeros(3)}, 0.01).values()) == 1
    rows = torch.tensor([[1.0, 3.0], [-math.inf, 8.0]])  # the last weight's neighbour is not moved
    assert by_row({"a": rows})["a"].tolist() == [[2.0, 2.0], [4.0, 4.0]]


def test_no_mask_is_made_whose_records_are_there(case, monkeypatch):
    settings = {**weight_path.DEFAULTS, "paths": ["weights, 3"], "path_fractions": [0.3]}
    done = list(weight_path.records(case, settings, []))
    assert [row["choice"] for row in done][:2] == ["whole model", "path weights, 3, 0.3"]
    monkeypatch.setattr(Rankings, "of", lambda *given: pytest.fail("a ranking of a finished model"))
    assert list(weight_path.records(case, settings, done)) == []


def test_no_mask_is_made_from_the_rows_on_which_damage_is_read(case, monkeypatch):
    seen: dict[str, list[str]] = {}

    def choices(ranked, settings):
        seen["ranked"] = [row.id for row in ranked.rows["retain"]]
        return iter(())

    def measured(held, found, settings, done):
        list(found)
        seen["held"] = [row.id for row in held.rows["retain"]]
        return iter(())

    monkeypatch.setattr(weight_path, "_choices", choices)
    monkeypatch.setattr(weight_path.forgetting, "records", measured)
    list(weight_path.records(case, weight_path.DEFAULTS, []))
    assert not set(seen["ranked"]) & set(seen["held"])
    assert {*seen["ranked"], *seen["held"]} == {row.id for row in case.rows["retain"]}


@pytest.mark.parametrize(
    ("search", "confirmation"),
    [
        ("weight_path_search", "weight_path_confirm"),
        ("path_rounds_search", "path_rounds_confirm"),
        ("path_rounds_search", "path_rounds_tofu"),
    ],
)
def test_the_confirmation_shares_nothing_with_the_search_and_has_one_choice_of_it(search, confirmation):
    one, other = (read_plan(ExperimentConfig(experiment=(name,)), FAMILIES) for name in (search, confirmation))
    assert not set(one.seeds) & set(other.seeds)
    assert not set(one.data.values()) & set(other.data.values())
    searched, confirmed = ({**weight_path.DEFAULTS, **plan.settings} for plan in (one, other))
    if "tofu" in confirmation:  # another size and other data, of one of the families
        assert one.model != other.model
    else:
        assert not set(one.families) & set(other.families)
    for name in ("paths", "path_fractions"):
        [chosen] = confirmed[name]
        assert chosen in searched[name]
    same = set(searched) - {"paths", "path_fractions", "rankings", "losses"}
    assert {name: searched[name] for name in same} == {name: confirmed[name] for name in same}
    assert set(searched["losses"]) <= set(confirmed["losses"])
