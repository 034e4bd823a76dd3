"""What weights contribute along the step: against a restatement in float64, and against the rises themselves."""

import copy

import pytest
import torch

from benchmarks.experiment.case import FAMILIES, Case, cases
from benchmarks.experiment.path import best_weights, by_row, contributions, moved, worth
from benchmarks.experiment.settings import ExperimentConfig, read_plan
from benchmarks.experiment.studies import weight_path

QUICK = ExperimentConfig(experiment=("weight_path_search",), quick=True)
RISE, POINTS = 0.01, 3


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FILLM_CACHE", str(tmp_path_factory.mktemp("cache")))
        [one] = cases(QUICK, read_plan(QUICK, FAMILIES), lambda line: None)
        yield one


def loss_of(case: Case, model: torch.nn.Module, rows) -> torch.Tensor:
    """Row by row, by transformers' own loss."""
    losses = []
    for fields in (row.fields for row in rows):
        begin = case.tokenizer(f"Question: {fields['question']}\nAnswer:")["input_ids"]
        end = [*case.tokenizer(f" {fields['answer']}", add_special_tokens=False)["input_ids"]]
        ids = torch.tensor([[*begin, *end, case.tokenizer.eos_token_id]])
        labels = ids.clone()
        labels[0, : len(begin)] = -100
        losses.append(model(input_ids=ids, labels=labels).loss)
    return torch.stack(losses).mean()


def names_of(case: Case) -> list[str]:
    return [name for name, _ in case.model.named_parameters() if "down_proj" in name]


def test_contributions_are_midpoint_integrals_of_gradient_times_step(case):
    names, kept = names_of(case), case.rows["retain"][:5]
    before = {name: value.clone() for name, value in case.model.state_dict().items()}
    found = contributions(case, kept, names, RISE, POINTS)
    assert all(torch.equal(value, before[name]) for name, value in case.model.state_dict().items())

    wide = copy.deepcopy(case.model).double().requires_grad_(True)
    weights = [dict(wide.named_parameters())[name] for name in names]
    start = [weight.detach().clone() for weight in weights]
    first = loss_of(case, wide, case.rows["forget"])
    signs = [gradient.sign() for gradient in torch.autograd.grad(first, weights)]

    def at(length: float, rows) -> tuple[float, list[torch.Tensor]]:
        with torch.no_grad():
            for weight, value, sign in zip(weights, start, signs, strict=True):
                weight.copy_(value + length * sign)
        loss = loss_of(case, wide, rows)
        return float(loss.detach()), list(torch.autograd.grad(loss, weights))

    risen = at(found.length, case.rows["forget"])[0] - float(first.detach())
    assert RISE * (1 - 1e-3) <= risen <= 1.1 * RISE  # the length is the first on a grid that reaches the rise
    for ours, rows in ((found.gain, case.rows["forget"]), (found.damage, kept)):
        places = [found.length * (point + 0.5) / POINTS for point in range(POINTS)]
        gradients = [at(place, rows)[1] for place in places]
        for number, name in enumerate(names):
            expected = sum(g[number] for g in gradients) * signs[number] * found.length / POINTS
            differing = float((ours[name] - expected).norm() / expected.norm())
            assert differing < 1e-4
    assert sum(float(part.sum()) for part in found.gain.values()) == pytest.approx(risen, rel=1e-3)


def test_a_rise_that_is_never_reached_gives_none(case):
    assert contributions(case, case.rows["retain"][:2], names_of(case)[:1], 1e9, 1) is None


def test_the_model_comes_back_from_a_move_that_fails(case):
    [name, *_] = names_of(case)
    before = dict(case.model.named_parameters())[name].detach().clone()
    with pytest.raises(ZeroDivisionError), moved(case.model, {name: torch.ones_like(before)}, 0.1):
        assert not torch.equal(dict(case.model.named_parameters())[name], before)
        raise ZeroDivisionError
    assert torch.equal(dict(case.model.named_parameters())[name], before)


def test_the_best_weights_fill_a_fraction_ties_in_order():
    chosen = best_weights({"a": torch.tensor([[1.0, 5.0], [3.0, 3.0]]), "b": torch.tensor([3.0, 9.0])}, 0.5)
    assert chosen["a"].tolist() == [[False, True], [True, False]] and chosen["b"].tolist() == [False, True]
    assert sum(int(part.sum()) for part in best_weights({"a": torch.zeros(3)}, 0.01).values()) == 1
    assert by_row({"a": torch.tensor([[1.0, 3.0], [0.0, 8.0]])})["a"].tolist() == [[2.0, 2.0], [4.0, 4.0]]


def test_worth_is_gain_less_so_many_times_the_damage(case):
    found = contributions(case, case.rows["retain"][:2], names_of(case)[:1], RISE, 1)
    [name] = found.gain
    torch.testing.assert_close(worth(found, 3.0)[name], found.gain[name] - 3.0 * found.damage[name])
    assert torch.equal(weight_path.scores(found, "gain")[name], found.gain[name])
    rows = weight_path.scores(found, "rows, 1")[name]
    assert torch.equal(rows[:, 0], rows[:, -1]) and not torch.equal(rows[0], rows[1])


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


def test_the_confirmation_shares_nothing_with_the_search_and_has_one_choice_of_it():
    one, other = (
        read_plan(ExperimentConfig(experiment=(f"weight_path_{name}",)), FAMILIES) for name in ("search", "confirm")
    )
    assert not set(one.families) & set(other.families) and not set(one.seeds) & set(other.seeds)
    assert not set(one.data.values()) & set(other.data.values())
    searched, confirmed = ({**weight_path.DEFAULTS, **plan.settings} for plan in (one, other))
    for name in ("paths", "path_fractions"):
        [chosen] = confirmed[name]
        assert chosen in searched[name]
    same = set(searched) - {"paths", "path_fractions", "rankings"}
    assert {name: searched[name] for name in same} == {name: confirmed[name] for name in same}
