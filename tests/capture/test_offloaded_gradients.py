"""Gradients whose accumulators lie elsewhere: the bits of those beside them, and what is handed in is copied over.

The other place is here CPU memory too: what a test can tell is that every answer comes back, that sums reach their
accumulator by being copied back, and that nothing on the device's side ever holds the accumulator itself.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

from fillm.capture import Capture
from fillm.capture.offloaded_gradients import OffloadedGradients
from fillm.data import collate
from tests.capture.per_sample_cases import BATCH, CASES
from tests.capture.reference import ask, directions, toy_samples
from tests.families import build_family

CPU = torch.device("cpu")


class Apart:
    """Gradients on a device that cannot reach what lies in CPU memory: `out_of_reach` is refused there."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.shape, self.out_of_reach = inner, inner.shape, set[int]()

    def __getattr__(self, asked: str) -> Any:
        answer = getattr(self._inner, asked)

        def reached(*given: Any, **options: Any) -> Any:
            for one in [*given, *options.values()]:
                assert not isinstance(one, Tensor) or one.data_ptr() not in self.out_of_reach, asked
            return answer(*given, **options)

        return reached


@pytest.mark.parametrize("name", CASES)
def test_every_answer_is_that_of_the_device(name: str) -> None:
    here = CASES[name](0).gradients
    apart = Apart(here)
    offloaded = OffloadedGradients(apart, CPU)
    generator = torch.Generator().manual_seed(5)
    dtype = torch.promote_types(here.materialise(0).dtype, torch.float32)
    v = torch.randn(here.shape, generator=generator).to(dtype)
    weights = torch.randn(BATCH, generator=generator, dtype=torch.float64)
    apart.out_of_reach.add(v.data_ptr())
    assert offloaded.shape == here.shape
    assert torch.equal(offloaded.squared_norms(), here.squared_norms())
    assert torch.equal(offloaded.dots(v), here.dots(v))
    assert torch.equal(offloaded.norms_and_dots(v)[1], here.dots(v))
    for axis in (0, 1) if len(here.shape) > 1 else (0,):
        assert torch.equal(offloaded.axis_dots(v, axis), here.axis_dots(v, axis))
    assert torch.equal(offloaded.materialise(2), here.materialise(2))
    for fill in ("weights", "ones", 1, 2):
        wanted, found = v.clone(), v.clone()
        apart.out_of_reach = {found.data_ptr()}
        for gradients, out in ((here, wanted), (offloaded, found)):
            if isinstance(fill, int):
                gradients.add_powers_(out, fill, alpha=0.5)
            else:
                gradients.add_weighted_(out, weights if fill == "weights" else None, alpha=0.5)
        assert torch.equal(found, wanted) and not torch.equal(found, v)


@pytest.mark.parametrize("family", ["llama-tied", "mixtral"])
def test_a_capture_offloads_all_that_it_hands_out(family: str) -> None:
    model, samples = build_family(family), toy_samples(4)
    names = [name for name, _ in model.named_parameters()]
    first = names[1]
    here, there = (Capture(model, names, fallback={first: "asked for"}) for _ in range(2))
    there.offload = True
    seen = set[type]()
    there.run(collate(samples, [0, 1]), samples, lambda name, gradients, positions: seen.add(type(gradients)))
    assert seen == {OffloadedGradients} and there.like(names).offload
    found, wanted = (ask(capture, samples, [[0, 1], [2, 3]], "right", directions(model)) for capture in (there, here))
    assert found.losses == wanted.losses
    for sums, others in ((found.weighted, wanted.weighted), (found.plain, wanted.plain)):
        assert sums.keys() == others.keys()
        assert all(torch.equal(sums[name], others[name]) for name in sums)
