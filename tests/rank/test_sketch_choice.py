"""What `--compression auto` measures and promises: against hand-computed bars, real ones, and the study's timing."""

import csv
import re
from pathlib import Path

import pytest
import torch
import transformers

import fillm
from fillm.rank.sketch_choice import OVER_PLAIN, bar_of_unlike, in_percent, over_plain
from fillm.rank.sketch_probe import FACTORED, Alikeness, expected_bar
from tests.rank.direct import FORGET_ROWS, RETAIN_ROWS, family

TIMING = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "compression.csv"


def alike(pairs: float = 0.0, slope: float = 0.0, explained: float = 0.5, **changes: object) -> Alikeness:
    value = [torch.tensor([x], dtype=torch.float64) for x in (slope, slope, explained, 0.1, 0.5)]
    names = ("own", "crossed", "explained", "fitted", "growth")
    settings = dict(zip(names, value, strict=True)) | {"probed": 16, "factored_noise": (1 / 64, 1 / 256)} | changes
    return Alikeness(numel=1 << 20, pairs=pairs, **settings)


def test_gradients_at_right_angles_leave_the_bar_of_the_closed_form() -> None:
    wide = torch.ones(1, dtype=torch.float64)  # nothing is known from other tensors
    (bar,) = alike(explained=0.0).bars("countsketch", 4096, 100, "datainf", 1e6 * wide).tolist()
    # sqrt(2 nu^2 4 / n) = nu sqrt(8 / n); 1 - e is 1 - 2 / 4096.
    assert bar == pytest.approx(bar_of_unlike("datainf", 4096, 100), rel=1e-3)
    (bar,) = alike(fitted=0.0 * wide).bars("countsketch", 4096, 100, "woodbury", 1e6 * wide).tolist()
    assert bar == pytest.approx(bar_of_unlike("woodbury", 4096, 100), rel=1e-3)


def test_alike_gradients_leave_a_wider_bar_and_what_others_know_a_narrower_one() -> None:
    wide = torch.full((1,), 1e6, dtype=torch.float64)
    bars = [float(alike(pairs, explained=0.0).bars("countsketch", 1024, 10**6, "datainf", wide)) for pairs in (0, 1)]
    # All parallel: 1.9 / 2 * sqrt(8) / 1024.
    assert bars[0] < 1e-5 and bars[1] == pytest.approx(0.95 * 8**0.5 / 1024, rel=2e-3)
    narrow = alike(1.0, explained=0.0).bars("countsketch", 1024, 10**6, "datainf", 1e-6 * wide / wide)
    assert float(narrow) == pytest.approx(0.95e-6, rel=1e-2)


def test_the_true_inverse_explains_more_of_more_samples() -> None:
    # 0.1 of 16 samples, growing by the root: 0.2 of 64. Half of 1.9 sqrt(2 nu^2 n + 4 nu x) / sqrt(1 - n nu).
    wide = torch.full((1,), 1e6, dtype=torch.float64)
    nu = 1 / 4096
    wanted = 0.95 * ((2 * nu**2 * 64 + 4 * nu * 0.2) / (1 - 64 * nu)) ** 0.5
    assert float(alike().bars("countsketch", 4096, 64, "woodbury", wide)) == pytest.approx(wanted, rel=1e-9)
    assert float(alike().bars("countsketch", 64, 64, "woodbury", wide)) == 1.0


def test_the_noise_of_projected_factors_is_a_power_between_the_sizes_measured() -> None:
    # From 1/64 at 256 numbers to 1/256 at 4096: the power is 1/2.
    assert alike().noise(FACTORED, 1024) == pytest.approx(1 / 128)
    assert alike(factored_noise=(1 / 64, 0.0)).noise(FACTORED, 1024) == pytest.approx(1 / 256)
    assert alike().noise("countsketch", 1024) == 1 / 1024


def test_no_bar_where_every_gradient_is_kept() -> None:
    assert expected_bar([alike()], "countsketch", 1 << 20, 10, "datainf") == 0.0
    assert expected_bar([alike()], "countsketch", 1 << 19, 10, "datainf") > 0.0


@pytest.mark.parametrize("settings", [{}, {"curvature": "woodbury"}, {"method": "soir-per-sample"}])
def test_the_bar_that_is_promised_is_about_the_one_that_comes(settings, capsys, monkeypatch) -> None:
    # The tensors of this model are small: a memory for 512 numbers each leaves the large ones sketched.
    ranking = fillm.rank_parameters(
        family("llama")[0],
        None,
        FORGET_ROWS,
        RETAIN_ROWS,
        compression="auto",
        memory="300kB",
        progress=True,
        **settings,
    )
    promised = float(re.search(r"error bars of about (\S+) % expected", capsys.readouterr().err).group(1)) / 100.0
    rows = [row for row in ranking if row["numel"] > ranking.settings["sketch_dim"]]
    assert len(rows) >= 6
    bars = torch.tensor([(row["score_high"] - row["score_low"]) / 2.0 / row["score"] for row in rows])
    # One digit is said, from fewer samples than there are and for bars that differ by tensor.
    assert promised / 3.0 < float(bars.median()) < 3.0 * promised


@pytest.mark.parametrize(
    "settings",
    [
        {"method": "first-order"},
        {"objective": "retain"},
        {"objective": "trade-off"},
        {"damping_dimension": "sketch"},
    ],
    ids=str,
)
def test_no_bar_is_promised_of_what_noise_may_spoil(settings, capsys) -> None:
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=97, hidden_size=32, intermediate_size=160, num_hidden_layers=1, num_attention_heads=4
        )
    ).requires_grad_(False)
    ranking = fillm.rank_parameters(
        model.eval(), None, FORGET_ROWS, RETAIN_ROWS, compression="auto", progress=True, **settings
    )
    (line,) = (one for one in capsys.readouterr().err.splitlines() if "compression auto" in one)
    assert (ranking.settings["compression"], ranking.settings["sketch_dim"]) == ("countsketch", 4096)
    assert max(row["numel"] for row in ranking) > 4096
    assert "nothing is promised" in line and "expected" not in line and "not needed" not in line


@pytest.mark.parametrize("settings", [{}, {"objective": "retain"}, {"sketch_dtype": "bfloat16"}], ids=str)
def test_where_every_gradient_is_kept_whole_it_says_so(settings, capsys) -> None:
    fillm.rank_parameters(
        family("llama")[0], None, FORGET_ROWS, RETAIN_ROWS, compression="auto", progress=True, **settings
    )
    (line,) = (one for one in capsys.readouterr().err.splitlines() if "compression auto" in one)
    assert line.endswith("; every gradient is kept whole") and "expected" not in line


@pytest.mark.parametrize(
    ("part", "said"), [(0.000153, "0.02 %"), (0.0049, "0.5 %"), (0.0962, "10 %"), (0.3141, "30 %"), (1.7, "200 %")]
)
def test_a_bar_is_said_in_plain_per_cent(part: float, said: str) -> None:
    assert in_percent(part) == said


def test_times_are_those_of_the_study() -> None:
    with TIMING.open(encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["method"] == "timing"]
    found = {(row["kind"], int(row["k"])): float(row["over_plain"]) for row in rows}
    for kind, times in OVER_PLAIN.items():
        for size, time in times.items():
            assert found[kind, size] / 1.3 < time < found[kind, size] * 1.3
            assert over_plain(kind, size) == time
        sizes = list(times)
        assert times[sizes[1]] < over_plain(kind, 16384) < times[sizes[2]] < over_plain(kind, 1 << 18)
