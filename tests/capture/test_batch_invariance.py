"""A per-sample gradient does not depend on who else is in the batch, in which order, or on padding."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fillm.capture import Capture, PerSampleGradients
from fillm.data import collate
from tests.capture.reference import directions, toy_samples
from tests.families import build_family

SAMPLES = toy_samples(6)
# Float32: sums over a batch of another size run in another order.
RELATIVE = 1e-5


def scalars(
    model: nn.Module, v: dict[str, Tensor], batches: list[list[int]], layout: str
) -> tuple[Tensor, Tensor, Tensor]:
    """`q` and `d / |v|`, both [tensors, samples], and the losses [samples]."""
    names = [name for name, _ in model.named_parameters()]
    q, d = (torch.zeros(len(names), len(SAMPLES), dtype=torch.float64) for _ in range(2))
    losses = torch.zeros(len(SAMPLES), dtype=torch.float64)

    def observe(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        row = names.index(name)
        q[row, positions] = gradients.squared_norms()
        d[row, positions] = gradients.dots(v[name]) / float(v[name].double().norm())

    capture = Capture(model, names)
    for members in batches:
        losses[members] = capture.run(collate(SAMPLES, members, layout), SAMPLES, observe)
    return q, d, losses


class Family:
    """A model and its scalars from batches of one."""

    def __init__(self, name: str) -> None:
        self.model = build_family(name)
        self.v = directions(self.model)
        self.alone = scalars(self.model, self.v, [[i] for i in range(len(SAMPLES))], "right")

    def assert_same(self, batches: list[list[int]], layout: str) -> None:
        q, d, losses = scalars(self.model, self.v, batches, layout)
        assert torch.allclose(losses, self.alone[2], rtol=1e-6)
        assert bool((self.alone[0] > 0).all())
        assert float(((q - self.alone[0]).abs() / self.alone[0]).max()) < RELATIVE
        assert float(((d - self.alone[1]).abs() / self.alone[0].sqrt()).max()) < RELATIVE


@pytest.fixture(scope="module")
def families() -> dict[str, Family]:
    return {name: Family(name) for name in ("llama-tied", "gpt2", "mixtral")}


@pytest.mark.parametrize("layout", ["right", "left", "packed"])
@pytest.mark.parametrize("size", [1, 3, 6])
@pytest.mark.parametrize("family", ["llama-tied", "gpt2", "mixtral"])
def test_batch_size_order_and_layout(families: dict[str, Family], family: str, size: int, layout: str) -> None:
    order = list(range(6))
    random.Random(size).shuffle(order)
    families[family].assert_same([order[i : i + size] for i in range(0, 6, size)], layout)


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from(["llama-tied", "gpt2", "mixtral"]),
    layout=st.sampled_from(["right", "left", "packed"]),
    order=st.permutations(range(6)),
    cuts=st.sets(st.integers(1, 5)),
)
def test_any_partition(families: dict[str, Family], family: str, layout: str, order: list[int], cuts: set[int]) -> None:
    bounds = [0, *sorted(cuts), 6]
    families[family].assert_same([order[a:b] for a, b in pairwise(bounds)], layout)
