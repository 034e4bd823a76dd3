"""Masks from rankings of real models: every granularity, order and budget against plain loops over bool tensors."""

import math
from functools import cache

import pyarrow as pa
import pytest
import torch
import yaml
from torch import Tensor

import fillm
from fillm.errors import RunFolderError, UsageError
from fillm.masks import Mask
from fillm.models import model_fingerprint
from fillm.rank import Ranking
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, family
from tests.rank.test_units import UNITS

FAMILIES = ["llama-tied", "gpt2", "mixtral"]


@cache
def ranked(name: str = "llama", method: str = "saliency", **settings: str) -> Ranking:
    return fillm.rank_parameters(family(name)[0], None, FORGET_ROWS, RETAIN_ROWS, method, **settings)


def weights_of(family_name: str, granularity: str, name: str, shape: torch.Size, index: int) -> Tensor:
    """Flat indices of a unit's weights."""
    places = torch.arange(math.prod(shape)).view(shape)
    return UNITS[granularity](name, family_name, places)[index]


def by_loop(ranking: Ranking, family_name: str, fraction: float, side: str = "top") -> dict[str, Tensor]:
    """Units in the order of the ranking while they fit, one at least, as bool tensors."""
    shapes = {name: parameter.shape for name, parameter in family(family_name)[0].named_parameters()}
    chosen = {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()}
    rows = list(ranking) if side == "top" else list(ranking)[::-1]
    left = int(fraction * sum(row["numel"] for row in rows))
    for number, row in enumerate(rows):
        left -= row["numel"]
        if number and left < 0:
            break
        if side == "top" and row["note"] == "unused":
            continue
        places = weights_of(family_name, ranking.granularity, row["name"], shapes[row["name"]], row.get("index", 0))
        assert len(places) == row["numel"]
        chosen[row["name"]].view(-1)[places] = True
    return chosen


def assert_is(mask: Mask, chosen: dict[str, Tensor]) -> None:
    assert list(mask) == sorted(name for name, flags in chosen.items() if flags.any())
    for name in mask:
        assert torch.equal(mask[name].to_bool(), chosen[name]), name


@pytest.mark.parametrize("side", ["top", "bottom"])
@pytest.mark.parametrize("granularity", ["tensor", "row", "head"])
@pytest.mark.parametrize("name", FAMILIES)
def test_units_in_the_order_of_the_ranking(name, granularity, side):
    ranking = ranked(name, granularity=granularity)
    for fraction in (0.001, 0.3, 1.0):
        mask = ranking.select(fraction, side)
        assert_is(mask, by_loop(ranking, name, fraction, side))
        mask.check(family(name)[0], model_fingerprint(family(name)[0]))


@pytest.mark.parametrize("name", FAMILIES)
def test_single_weights_are_the_largest_of_all(name):
    ranking = ranked(name, granularity="element")
    order = sorted(
        (-abs(value), tensor, i)
        for tensor in ranking.names
        for i, value in enumerate(ranking.updates[tensor].flatten().tolist())
    )
    for fraction, side in ((0.05, "top"), (1.0, "top"), (0.4, "bottom")):
        count = int(fraction * len(order))
        part = order[:count] if side == "top" else order[len(order) - count :]
        chosen = {t: torch.zeros(p.shape, dtype=torch.bool) for t, p in family(name)[0].named_parameters()}
        for value, tensor, i in part:
            chosen[tensor].view(-1)[i] = side == "bottom" or value != 0
        assert_is(ranking.select(fraction, side), chosen)


@pytest.mark.parametrize("granularity", ["tensor", "row", "element"])
@pytest.mark.parametrize("objective", ["retain", "trade-off"])
def test_the_best_of_other_objectives_are_the_smallest(granularity, objective):
    ranking = ranked(method="soir", granularity=granularity, objective=objective)
    mask = ranking.select(0.2)
    if granularity != "element":
        assert_is(mask, by_loop(ranking, "llama", 0.2))
        return
    scores = {name: ranking.updates[f"scores/{name}"] for name in ranking.names}
    inside = torch.cat([scores[name][mask[name].to_bool()] for name in mask])
    outside = torch.cat([s[~mask[n].to_bool()] if n in mask else s.flatten() for n, s in scores.items()])
    assert len(inside) == int(0.2 * (len(inside) + len(outside))) and float(inside.max()) <= float(outside.min())
    assert bool(ranking.select(1.0).count < len(inside) + len(outside))  # those of infinite score are left


def test_patterns_narrow_what_fractions_are_of():
    ranking = ranked(granularity="row")
    mask = ranking.select(1.0, include=["mlp", "*norm*"], exclude="*layers.1*")
    expected = [n for n in ranking.scores if ("mlp" in n[0] or "norm" in n[0]) and "layers.1" not in n[0]]
    assert set(mask) == {name for name, _ in expected} and all(mask[name].form == "whole" for name in mask)
    attention = sum(row["numel"] for row in ranking if row["kind"] == "attn")
    assert 0.2 * attention < ranking.select(0.25, include="attn").count <= 0.25 * attention
    with pytest.raises(UsageError, match=r"--include nothing: matches no tensor"):
        ranking.select(include="nothing")


@pytest.mark.parametrize("granularity", ["tensor", "row", "head", "element"])
def test_proportional_takes_the_same_part_of_each_kind(granularity):
    ranking = ranked(granularity=granularity)
    mask = ranking.select(0.5, proportional=True)
    parts = [ranking.select(0.5, include=kind) for kind in dict.fromkeys(row["kind"] for row in ranking)]
    union = parts[0]
    for part in parts[1:]:
        union = union | part
    assert mask == union


@pytest.mark.parametrize("granularity", ["row", "element"])
def test_bands_make_up_the_top(granularity):
    ranking = ranked(granularity=granularity)
    low, high = ranking.select(0.2), ranking.select(band=(0.2, 0.6))
    assert low | high == ranking.select(0.6) and len(low & high) == 0
    assert high.count > 0.3 * sum(row["numel"] for row in ranked())


def test_above_a_score():
    for granularity in ("tensor", "element"):
        ranking = ranked(granularity=granularity)
        limit = list(ranked().scores.values())[5] if granularity == "tensor" else 0.01
        mask = ranking.select(above=limit)
        if granularity == "tensor":
            assert mask.tensor_names() == sorted(ranking.names[:5])
        else:
            assert mask.count == sum(int((u.abs() > limit).sum()) for u in ranking.updates.values()) > 0


def test_tensors_are_counted_where_tensors_are_ranked():
    assert ranked().select(0.25, of="tensors").tensor_names() == sorted(ranked().names[:5])  # of 21
    with pytest.raises(UsageError, match="cannot be taken of a ranking of rows; use of='parameters'"):
        ranked(granularity="row").select(0.25, of="tensors")


def test_the_mask_says_where_it_comes_from():
    ranking = ranked(granularity="row")
    mask = ranking.select(0.1, include=["mlp"])
    assert mask.model_fingerprint == model_fingerprint(family("llama")[0])
    shown = {k: v for k, v in mask.provenance.items() if k != "ranking"}
    assert shown == {
        "method": "saliency", "objective": "forget", "granularity": "row", "select": "top:0.1:parameters",
        "include": ["mlp"], "exclude": None, "fillm": fillm.__version__,
    }  # fmt: skip
    assert (
        mask.provenance["ranking"]
        == ranking.select(0.5).provenance["ranking"]
        != ranked().select().provenance["ranking"]
    )


@pytest.mark.parametrize("granularity", ["tensor", "row", "head", "element"])
def test_a_saved_ranking_gives_the_same_mask(granularity, tmp_path):
    ranking = ranked("gpt2", granularity=granularity)
    ranking.save(tmp_path / "run")
    loaded = Ranking.load(tmp_path / "run")
    assert loaded.tensors.equals(ranking.tensors)
    one, other = ranking.select(0.3), loaded.select(0.3)
    assert one == other and one.provenance == other.provenance and one.model_fingerprint == other.model_fingerprint
    one.save(tmp_path / "one")
    other.save(tmp_path / "other")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()
    record = yaml.safe_load((tmp_path / "run" / "run.yaml").read_text(encoding="utf-8"))
    assert other.provenance["ranking"] == record["files"]["ranking.parquet"]["sha256"]


def test_rankings_that_lack_what_a_mask_needs_are_refused(tmp_path):
    rows = [{"name": "w", "kind": "mlp", "layer": 0, "numel": 6, "score": 1.0}]
    made = {"method": "soir", "objective": "forget"}
    with pytest.raises(UsageError, match="does not say how its tensors are laid out .* rank again"):
        Ranking.from_rows(rows, granularity="tensor", **made).select()
    ranking = ranked(granularity="element")
    bare = Ranking(ranking.table, granularity="element", tensors=ranking.tensors, **made)
    with pytest.raises(UsageError, match="has no update.safetensors"):
        bare.select()
    odd = Ranking(ranking.table, granularity="tensor", tensors=pa.table({"name": ["w"]}), **made)
    odd.save(tmp_path / "run")
    with pytest.raises(RunFolderError, match=r"tensors.parquet: its columns are not those of a ranking"):
        Ranking.load(tmp_path / "run")


def test_a_mask_for_every_forget_sample(tmp_path):
    ranking = ranked(method="soir-per-sample")
    masks = ranking.select_per_sample(0.3)
    table = ranking.per_sample.to_pylist()
    numels = {row["name"]: row["numel"] for row in ranking}
    assert list(masks) == list(dict.fromkeys(row["sample"] for row in table)) and len(masks) == len(FORGET_ROWS)
    for sample, mask in masks.items():
        left, expected = int(0.3 * sum(numels.values())), []
        for row in sorted((row for row in table if row["sample"] == sample), key=lambda row: row["rank"]):
            left -= numels[row["name"]]
            if expected and left < 0:
                break
            expected.append(row["name"])
        assert mask.tensor_names() == sorted(expected)
        assert mask.provenance["sample"] == sample and mask.model_fingerprint == model_fingerprint(family("llama")[0])
    ranking.save(tmp_path / "run")
    assert Ranking.load(tmp_path / "run").select_per_sample(fraction=0.3) == masks
    with pytest.raises(UsageError, match="--method saliency ranks no single samples"):
        ranked().select_per_sample()


def test_a_mask_of_another_family_is_refused():
    with pytest.raises(UsageError, match="which this model does not have"):
        ranked(granularity="head").select(0.5).check(build_family("gpt2"))
