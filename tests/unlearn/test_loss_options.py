"""Names, defaults, and options that a loss has no use for."""

import math
import subprocess
import sys

import pytest

from fillm.errors import UsageError
from fillm.unlearn.losses import DEFAULTS, GRADIENT_LOSSES, LossOptions, canonical_loss, make_loss, resolved_options
from tests.unlearn.table_model import TableModel


@pytest.mark.parametrize("name", GRADIENT_LOSSES)
def test_every_loss_is_made_with_its_defaults(name):
    loss = make_loss(name)
    assert loss.name == name
    for option in DEFAULTS[name].keys() - {"idk", "rmu_layer", "rmu_coefficient"}:
        assert getattr(loss, option) == DEFAULTS[name][option], option
    assert loss.uses_alternatives == (name in ("idk", "dpo"))
    assert loss.uses_retain == (name not in ("ga", "undial"))


@pytest.mark.parametrize(
    ("published", "name"),
    [
        ("GradAscent", "ga"), ("grad_ascent", "ga"), ("gradient_ascent", "ga"), ("GradDiff", "grad-diff"),
        ("grad_diff", "grad-diff"), ("KL", "kl"), ("NPO", "npo"), ("SimNPO", "simnpo"), ("DPO", "dpo"),
        ("IdkDPO", "dpo"), ("RMU", "rmu"), ("UNDIAL", "undial"), ("WGA", "wga"), ("SatImp", "satimp"), ("idk", "idk"),
    ],
)  # fmt: skip
def test_published_names(published, name):
    assert canonical_loss(published) == name
    assert make_loss(published).name == name


@pytest.mark.parametrize("name", ["", "gd", "task-vector", "influence"])
def test_no_gradient_loss_is_called_so(name):
    with pytest.raises(UsageError, match="ga, grad-diff, kl"):
        make_loss(name)


@pytest.mark.parametrize(
    ("name", "options", "complaint"),
    [
        ("ga", {"alpha": 1.0}, "--alpha 1.0 has no effect.*grad-diff, kl.*not of ga"),
        ("ga", {"beta": 0.1}, "--beta 0.1 has no effect"),
        ("npo", {"delta": 0.0}, "--delta 0.0 has no effect: it is an option of --loss simnpo, not of npo"),
        ("NPO", {"idk": "lines.txt"}, "--idk lines.txt has no effect: it is an option of --loss idk, dpo"),
        ("kl", {"retain_loss": "nll"}, "--retain-loss nll has no effect"),
        ("rmu", {"retain_loss": "kl"}, "--retain-loss kl has no effect"),
        ("satimp", {"beta": 1.0}, "--beta 1.0 has no effect"),
        ("wga", {"rmu_layer": 3}, "--rmu-layer 3 has no effect: it is an option of --loss rmu"),
        ("undial", {"retain_loss": "kl"}, "--retain-loss kl has no effect with --alpha 0"),
        ("grad-diff", {"retain_loss": "mse"}, "--retain-loss mse: give nll or kl"),
        ("grad-diff", {"gamma": -1.0}, "--gamma -1.0: give 0 or more"),
        ("grad-diff", {"alpha": math.inf}, "--alpha inf: give a finite number"),
        ("npo", {"beta": 0.0}, "--beta 0.0: give a number above 0"),
        ("dpo", {"beta": -0.1}, "--beta -0.1: give a number above 0"),
        ("simnpo", {"delta": math.nan}, "--delta nan: give a finite number"),
        ("rmu", {"rmu_layer": -1}, "--rmu-layer -1: give 0 or more"),
        ("rmu", {"rmu_coefficient": 0.0}, "--rmu-coefficient 0.0: give a number above 0"),
        ("satimp", {"beta2": -2.0}, "--beta2 -2.0: give 0 or more"),
    ],
)
def test_options_that_cannot_be_honoured(name, options, complaint):
    with pytest.raises(UsageError, match=complaint) as caught:
        make_loss(name, LossOptions(**options))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options"),
    [("wga", {"beta": 0.0}), ("simnpo", {"delta": -0.5}), ("npo", {"alpha": 0.0}), ("rmu", {"rmu_layer": 0})],
)
def test_values_at_the_edge(name, options):
    settings = resolved_options(name, LossOptions(**options))
    assert settings == {**DEFAULTS[name], **options}
    make_loss(name, LossOptions(**options))


def test_without_a_retain_term_nothing_of_it_is_recorded():
    assert make_loss("rmu", LossOptions(alpha=0.0)).needs == {}
    assert set(make_loss("npo", LossOptions(alpha=0.0)).needs) == {"forget"}
    assert set(make_loss("npo", LossOptions(retain_loss="kl")).needs) == {"forget", "retain"}
    assert set(make_loss("dpo").needs) == {"forget", "alternatives"}


def test_a_block_that_the_model_does_not_have(two_block_model):
    make_loss("rmu", LossOptions(rmu_layer=1)).check(two_block_model)
    make_loss("npo").check(two_block_model)
    with pytest.raises(UsageError, match="--rmu-layer 2: the model has 2 blocks; give 0 to 1"):
        make_loss("rmu", LossOptions(rmu_layer=2)).check(two_block_model)


@pytest.fixture
def two_block_model():
    import torch

    return TableModel(torch.zeros(3, 3))


def test_reading_options_loads_no_torch():
    use = "import sys, fillm.unlearn.losses as l; l.resolved_options('NPO', l.LossOptions())"
    subprocess.run([sys.executable, "-c", f"{use}; assert 'torch' not in sys.modules"], check=True)
