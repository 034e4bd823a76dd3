"""Methods on inner products: exact Gram matrices and sketches against every sample's gradient in float64."""

import re

import pyarrow as pa
import pytest
import torch
from torch import Tensor

import fillm
from fillm.errors import StoreError, UsageError
from fillm.rank import Ranking
from fillm.rank.gram_methods import _reliability
from fillm.rank.scoring import Scores
from tests.families import build_family
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, Direct, family

# Float32 gradients know their squares to a few 1e-7, and a score is the root of a difference of those.
FLOAT32 = 1e-4
ALL = 1 << 16  # numbers a sketch, more than any tensor has: every gradient is kept as it is


def exact(name: str = "llama") -> Direct:
    return family(name)[1]


def ranked(name: str = "llama", **settings: object) -> Ranking:
    return fillm.rank_parameters(family(name)[0], None, FORGET_ROWS, RETAIN_ROWS, **settings)


def stacked(gradients: list[dict[str, Tensor]], name: str) -> Tensor:
    return torch.stack([one[name].flatten() for one in gradients])


def inverse_update(found: Direct, name: str, v: Tensor) -> Tensor:
    """`-(F + lambda I)^-1 v`, through the smaller of the two systems, by a solver of its own: conjugate gradients."""
    g, lambda_ = stacked(found.g, name), found.lambda_[name]
    u, r = torch.zeros_like(v), -v
    p, square = r.clone(), r @ r
    for _ in range(200):
        if square <= 1e-26 * (v @ v):
            break
        applied = g.T @ (g @ p) / len(g) + lambda_ * p
        step = square / (p @ applied)
        u, r = u + step * p, r - step * applied
        p, square = r + (r @ r) / square * p, r @ r
    return u


def sizes(found: Direct, curvature: str, which: int | None = None) -> dict[str, float]:
    """`|u|` of every tensor for the mean forget gradient, or for one forget sample's."""
    out = {}
    for name, v in found.v.items():
        right = (v if which is None else found.f[which][name]).flatten()
        lambda_, g = found.lambda_[name], stacked(found.g, name)
        if lambda_ == 0.0:
            out[name] = 0.0
        elif curvature == "woodbury":
            out[name] = float(inverse_update(found, name, right).norm())
        else:
            c = (g @ right) / (lambda_ + g.square().sum(1))
            out[name] = float((right - (c @ g) / len(g)).norm()) / lambda_
    return out


def close(scores: dict[str, float], wanted: dict[str, float], tolerance: float = FLOAT32) -> None:
    assert set(scores) == set(wanted)
    for name, value in wanted.items():
        assert scores[name] == pytest.approx(value, rel=tolerance), name


@pytest.mark.parametrize("which", ["llama", "gpt2"])
@pytest.mark.parametrize("settings", [{}, {"compression": "sjlt", "sketch_dim": ALL}])
def test_woodbury_is_the_true_inverse(which: str, settings: dict[str, object]) -> None:
    ranking = ranked(which, curvature="woodbury", **settings)
    close(ranking.scores, sizes(exact(which), "woodbury"))
    gains = dict(zip(ranking.names, ranking.table["predicted_forget_gain"].to_pylist(), strict=True))
    for name, v in exact(which).v.items():
        if exact(which).lambda_[name] > 0:
            wanted = -float(v.flatten() @ inverse_update(exact(which), name, v.flatten()))
            assert gains[name] == pytest.approx(wanted, rel=FLOAT32), name


@pytest.mark.parametrize("curvature", ["datainf", "woodbury"])
@pytest.mark.parametrize("settings", [{}, {"compression": "factored", "sketch_dim": ALL}])
def test_every_forget_sample_has_a_ranking_of_its_own(curvature: str, settings: dict[str, object]) -> None:
    ranking = ranked(method="soir-per-sample", curvature=curvature, **settings)
    table = ranking.per_sample
    assert table.column_names == ["sample", "rank", "name", "score", "score_low", "score_high", "note"]
    samples = list(dict.fromkeys(table["sample"].to_pylist()))
    assert len(samples) == len(FORGET_ROWS)
    means = dict.fromkeys(ranking.scores, 0.0)
    for position, sample in enumerate(samples):
        rows = table.filter(pa.compute.equal(table["sample"], sample)).to_pylist()
        wanted = sizes(exact(), curvature, position)
        close({row["name"]: row["score"] for row in rows}, wanted)
        assert [row["rank"] for row in rows] == list(range(1, len(wanted) + 1))
        used = [row["score"] for row in rows if row["note"] != "unused"]
        assert used == sorted(used, reverse=True)
        means = {name: value + wanted[name] / len(samples) for name, value in means.items()}
    close(ranking.scores, means)


@pytest.mark.parametrize("settings", [{}, {"compression": "oporp", "sketch_dim": ALL}])
def test_first_order_adds_up_absolute_inner_products(settings: dict[str, object]) -> None:
    found = exact()
    wanted = {
        name: float((stacked(found.f, name) @ stacked(found.g, name).T).abs().sum()) / len(found.f) for name in found.v
    }
    close(ranked(method="fo-influence", **settings).scores, wanted)


@pytest.mark.parametrize("objective", ["retain", "trade-off"])
@pytest.mark.parametrize("curvature", ["datainf", "woodbury"])
def test_objectives_from_sketches_are_those_of_the_vector(objective: str, curvature: str) -> None:
    settings = {"objective": objective, "curvature": curvature}
    found = exact()
    wanted = {}
    for name, v in found.v.items():
        right, g = v.flatten(), stacked(found.g, name)
        if found.lambda_[name] == 0.0:
            continue
        u = found.u[name].flatten() if curvature == "datainf" else inverse_update(found, name, right)
        s, gain = g @ u, -float(right @ u)
        eta = 0.01 / gain
        change = -eta * float(s.mean()) + 0.5 * eta**2 * float(s.square().mean())
        wanted[name] = 0.5 * float(s.square().mean()) if objective == "retain" else change
    inside = []
    for seed in range(4):
        small = ranked(compression="sjlt", sketch_dim=128, seed=seed, **settings)
        bars = {row["name"]: (row["score_low"], row["score_high"]) for row in small if row["numel"] > 128}
        inside += [low <= wanted[name] <= high for name, (low, high) in bars.items()]
    # The damage of the true inverse's step has the noise of K in every sample's coefficient, which no bar tells of.
    assert sum(inside) >= (0.7 if (objective, curvature) == ("retain", "woodbury") else 0.8) * len(inside)
    for ranking in (ranked(compression="sjlt", sketch_dim=ALL, **settings), ranked(**settings)):
        # A change of the retain loss is a difference: of the size of its linear part.
        close({name: ranking.scores[name] for name in wanted}, wanted, 1e-3)


def test_memflex_from_sketches_keeps_what_it_keeps_without() -> None:
    plain, sketched = (
        ranked(method="memflex", similarity=0.5, magnitude=1e-4, **more)
        for more in ({}, {"compression": "countsketch", "sketch_dim": ALL})
    )
    assert plain.names == sketched.names
    assert "sketch" not in sketched.record  # what is kept may not be sure, and sizes say nothing of it
    assert plain.table["note"].to_pylist() == sketched.table["note"].to_pylist()
    assert len({"not kept" in note for note in plain.table["note"].to_pylist()}) == 2


def test_woodbury_gives_the_vector_too() -> None:
    ranking = ranked(curvature="woodbury", save_update=True)
    for name, v in exact().v.items():
        wanted = inverse_update(exact(), name, v.flatten()) if exact().lambda_[name] > 0 else torch.zeros(v.numel())
        found = ranking.updates[name].flatten().double()
        assert float((found - wanted).norm()) <= FLOAT32 * float(wanted.norm())
    rows = ranked(curvature="woodbury", granularity="row", include="mlp")
    assert sum(score**2 for score in rows.scores.values()) == pytest.approx(
        sum(ranking.scores[name] ** 2 for name in set(rows.names)), rel=1e-5
    )
    gains = {row["name"]: row["predicted_forget_gain"] for row in ranking}
    for row in ranked(curvature="woodbury", granularity="element", include="mlp"):
        assert row["predicted_forget_gain"] == pytest.approx(gains[row["name"]], rel=1e-5)


KINDS = ("oporp", "countsketch", "sjlt", "gaussian", "rademacher", "factored", "factored-sjlt", "tensorsketch")


@pytest.mark.parametrize("kind", KINDS)
def test_a_small_sketch_is_no_worse_than_none_and_knows_its_error(kind: str) -> None:
    ranking = ranked(compression=kind, sketch_dim=128)
    plain = {row["name"]: row["forget_norm"] / row["damping"] for row in ranking if row["damping"]}
    wanted = sizes(exact(), "datainf")
    without = max(abs(plain[name] / wanted[name] - 1.0) for name in plain)
    error = {name: abs(ranking.scores[name] / wanted[name] - 1.0) for name in plain}
    assert max(error.values()) <= without
    inside = sum(
        row["score_low"] * (1 - FLOAT32) <= wanted[row["name"]] <= row["score_high"] * (1 + FLOAT32) for row in ranking
    )
    assert inside >= 0.8 * len(ranking)
    said = ranking.record["sketch"]
    assert 0.0 <= said["top_set_confidence"] <= 1.0
    assert said["top_set"] == round(0.1 * len(ranking))
    assert said["widest_relative_error_bar"] >= said["median_relative_error_bar"] > 0.0


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"curvature": "woodbury"},
        {"objective": "retain"},
        {"objective": "retain", "curvature": "woodbury"},
        {"method": "first-order"},
        {"method": "soir-per-sample"},
    ],
)
def test_gradients_kept_in_bfloat16_have_bars(settings: dict[str, object]) -> None:
    kept = {"compression": "sjlt", "sketch_dim": ALL, **settings}
    wide, narrow = ranked(**kept), ranked(sketch_dtype="bfloat16", **kept)
    assert all(row["score_low"] == row["score_high"] for row in wide)
    used = [row for row in narrow if "unused" not in row["note"]]
    assert all(row["score_low"] < row["score"] < row["score_high"] for row in used)
    slack = 1e-6  # relative: both are float32 products
    inside = [
        row["score_low"] * (1 - slack) <= wide.scores[row["name"]] <= row["score_high"] * (1 + slack) for row in used
    ]
    # Bars hold 94 %; of this model's some 20 tensors, which samples and inputs share, a few more may be out.
    assert sum(inside) >= 0.8 * len(used)
    assert narrow.record["sketch"]["widest_relative_error_bar"] > 0.0


def test_the_published_damping_is_restated() -> None:
    ranking = ranked(compression="sjlt", sketch_dim=128, damping_dimension="sketch")
    true = ranked(compression="sjlt", sketch_dim=128)
    # Off by the tensor's size over the sketch's, where the norms agree to what a sketch of 128 numbers knows.
    for name in ("model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"):
        numel = next(row["numel"] for row in true if row["name"] == name)
        assert ranking.scores[name] * numel / 128 == pytest.approx(true.scores[name], rel=0.8)
        assert ranking.scores[name] < true.scores[name] / 2


def test_woodbury_refuses_a_sketch_of_fewer_numbers_than_samples() -> None:
    with pytest.raises(
        UsageError, match=r"sketches of 4 numbers cannot tell 6 retain samples apart; give --sketch-dim 6"
    ):
        ranked(curvature="woodbury", compression="sjlt", sketch_dim=4)


def test_auto_picks_what_fits_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    numel = sum(parameter.numel() for parameter in build_family("llama").parameters())
    ranking = ranked(compression="auto", progress=True)
    taken = ranking.settings
    assert taken["compression"] in ("countsketch", "factored-sjlt") and taken["memory"] is None
    said = capsys.readouterr().err
    assert f"compression auto: {taken['compression']} to {taken['sketch_dim']} numbers" in said
    assert re.search(r"for 10 samples and 21 tensors; passes take about \d.*; every gradient is kept whole\n", said)
    again = ranked(compression="auto")
    assert {**again.settings, "seed": 0} == taken and again.table.equals(ranking.table)
    assert ranked(compression="auto", method="first-order").settings["sketch_dim"] == 4096
    small = ranked(compression="auto", memory=f"{10 * numel}", progress=True)
    assert 64 <= small.settings["sketch_dim"] < 4096
    assert re.search(r"21 tensors; error bars of about \S+ % expected; passes .*; all that", capsys.readouterr().err)
    with pytest.raises(UsageError, match=r"--memory 1000: sketches of 10 samples .* even at 64 numbers each"):
        ranked(compression="auto", memory="1000")


def test_a_store_answers_again_without_the_retain_set(tmp_path) -> None:
    store = str(tmp_path / "store")
    first = ranked(compression="tensorsketch", sketch_dim=128, store=store)
    assert [row["pass"] for row in first.record["passes"]] == ["forget", "retain"]
    memory = ranked(compression="tensorsketch", sketch_dim=128)
    close(first.scores, memory.scores, 1e-6)
    for settings in (
        {},
        {"damping": 0.5},
        {"method": "soir-per-sample"},
        {"method": "first-order"},
        {"curvature": "woodbury"},
        {"method": "memflex", "similarity": 0.5, "magnitude": 1e-4},
        {"objective": "retain"},
    ):
        wanted = ranked(compression="tensorsketch", sketch_dim=128, **settings)
        for retain in (None, RETAIN_ROWS):
            found = fillm.rank_parameters(family("llama")[0], None, FORGET_ROWS, retain, store=store, **settings)
            assert [row["pass"] for row in found.record["passes"]] == ["forget"]
            close(found.scores, wanted.scores, 1e-5)
            assert found.samples.drop_columns("loss").equals(wanted.samples.drop_columns("loss"))
            losses = found.samples["loss"].to_pylist()
            assert losses == pytest.approx(wanted.samples["loss"].to_pylist(), rel=1e-6)


def test_a_store_takes_more_samples_and_refuses_others(tmp_path) -> None:
    store, model = str(tmp_path / "store"), build_family("llama")
    given = {"compression": "countsketch", "sketch_dim": 128, "store": store}
    fillm.rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS[:4], **given)
    more = fillm.rank_parameters(model, None, FORGET_ROWS, RETAIN_ROWS, **given)
    assert [row["samples"] for row in more.record["passes"]] == [4, 2]
    close(more.scores, ranked(compression="countsketch", sketch_dim=128).scores, 1e-6)
    for match, changed in (
        ("made from another data set", {"retain": RETAIN_ROWS[::-1]}),
        ("is of 6 samples", {"retain": RETAIN_ROWS[:5]}),
        ("made with other settings .*seed", {"seed": 1}),
        ("made with other settings .*sketch_dim", {"sketch_dim": 64}),
        ("made with other settings .*kind", {"compression": "oporp"}),
        ("made with other settings .*loss_reduction", {"loss_reduction": "sum"}),
    ):
        rest = {"retain": RETAIN_ROWS, **given, **changed}
        with pytest.raises(StoreError, match=match):
            fillm.rank_parameters(model, None, FORGET_ROWS, rest.pop("retain"), **rest)
    with torch.no_grad():
        next(model.parameters()).add_(1e-3)
    with pytest.raises(StoreError, match="made from another model"):
        fillm.rank_parameters(model, None, FORGET_ROWS, None, store=store)
    with pytest.raises(UsageError, match="--sketch-dim 64: .* was made with 128"):
        fillm.rank_parameters(model, None, FORGET_ROWS, None, store=store, sketch_dim=64)


def test_scores_without_bound_lead_whatever_the_sketch_says() -> None:
    def row(score: float, width: float) -> dict[str, float | str]:
        return {"score": score, "score_low": score - width, "score_high": score + width, "note": ""}

    # Of 20 tensors the first two are the infinite ones; the others are as good as equal.
    near = [row(1.0 + 1e-9 * number, 0.5) for number in range(18)]
    endless = [row(float("inf"), 0.0) | {"score_low": float("inf"), "note": "no retain gradient"} for _ in range(2)]
    said = _reliability(Scores(near + endless), ascending=False)
    assert (said["top_set"], said["top_set_confidence"]) == (2, 1.0)
    assert _reliability(Scores(near + endless[:1]), ascending=False)["top_set_confidence"] < 0.5
    assert _reliability(Scores(near + endless), ascending=True)["top_set_confidence"] < 0.5
