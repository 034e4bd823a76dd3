"""`GradientSketches`: exact norms, sketches by position, a state to go on from."""

import pytest
import torch

from fillm.capture import SketchMap
from fillm.capture.gradients import DenseGradients
from fillm.statistics import GradientSketches
from tests.capture.projections import sketched
from tests.statistics.synthetic import COUNT, SHAPES, batches, mixed_scales

DIM, SEED = 64, 5
MAPS = {name: SketchMap.of("factored-sjlt", DIM, name, shape, SEED) for name, shape in SHAPES.items()}


def filled(positions: list[int] | None = None, dtype: torch.dtype = torch.float32) -> GradientSketches:
    statistic = GradientSketches(MAPS, COUNT, dtype)
    for name, gradients, where in batches(mixed_scales()[1], positions):
        statistic.observe(name, gradients, where)
    return statistic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_norms_are_exact_and_rows_lie_at_their_positions(dtype):
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(1)).tolist()
    statistic = filled(order, dtype)
    assert {name: to.kind for name, to in MAPS.items()} == {
        "scalars": "exact", "norm": "sjlt", "matrix": "factored-sjlt"
    }  # fmt: skip
    for name, g in mixed_scales()[1].items():
        exact = g.double().flatten(1)
        got = statistic.sketches(name)
        assert got.dtype == dtype and got.shape == (COUNT, MAPS[name].dim)
        # float64 sums of squares of float32 numbers.
        assert torch.allclose(statistic.q[name], exact.square().sum(1), rtol=1e-12, atol=0)
        want = sketched("factored-sjlt", DIM, name, g, SEED)
        # One rounding to the dtype of what is kept, after at most 160 x 128 additions of float32 with random signs.
        roundoff = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-24 * 512
        assert bool(((got.double() - want).abs() <= roundoff * exact.norm(dim=1, keepdim=True)).all()), name


def test_a_state_goes_on_where_it_was_left():
    first, rest = list(range(21)), list(range(21, COUNT))
    begun = filled(first)
    after = GradientSketches(MAPS, COUNT)
    after.load({name: tensor.clone() for name, tensor in begun.state().items()})
    for name, gradients, where in batches(mixed_scales()[1], rest):
        after.observe(name, gradients, where)
    whole = filled()
    for name, tensor in whole.state().items():
        assert torch.equal(after.state()[name], tensor), name


@pytest.mark.parametrize("name", ["scalars", "matrix"])
def test_a_gradient_that_is_not_finite_is_found(name):
    statistic = filled()
    assert statistic.first_not_finite(range(COUNT)) is None
    bad = torch.zeros(1, *SHAPES[name])
    bad.view(-1)[3] = torch.nan
    statistic.observe(name, DenseGradients(bad), torch.tensor([17]))
    assert statistic.first_not_finite([3, 17, 20]) == (name, 17)
    assert statistic.first_not_finite([3, 20]) is None


def test_samples_that_no_gradient_reaches_are_zero():
    statistic = filled([5, 6])
    assert statistic.q["matrix"].nonzero().flatten().tolist() == [5, 6]
    assert statistic.sketches("matrix").any(1).nonzero().flatten().tolist() == [5, 6]
