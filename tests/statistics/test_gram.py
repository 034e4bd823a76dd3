"""Products of rows that are widened some at a time: those of the whole in float64, whatever the sizes and the type."""

import pytest
import torch

from fillm.statistics import gram
from fillm.statistics.gram import RowsGram

ROUNDING = 1e-14  # of sums of some hundred float64 terms, a few roundings of 1.1e-16 each, relative to their lengths


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    return found.shape == wanted.shape and bool(
        torch.linalg.vector_norm(found - wanted) <= ROUNDING * (1.0 + torch.linalg.vector_norm(wanted))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("rows", "k"), [(0, 5), (1, 1), (7, 13), (64, 9), (3, 100)])
@pytest.mark.parametrize("columns", [1, 3, 20])
def test_products_are_those_of_the_whole(rows, k, columns, dtype, monkeypatch) -> None:
    monkeypatch.setattr(gram, "BLOCK_ENTRIES", 50)  # several blocks, the last one short; rows longer than a block
    generator = torch.Generator().manual_seed(rows * k)
    every = torch.randn(rows, 2 * k, generator=generator).to(dtype)
    for part in (every[:, :k].contiguous(), every[:, k:]):  # as half a sketch is
        scale = torch.rand(rows, generator=generator, dtype=torch.float64)
        c = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        right = torch.randn(k, columns, generator=generator, dtype=torch.float64)
        before, of = part.clone(), RowsGram(part, scale)
        whole = part.double() * scale[:, None]
        assert close(of.times(right), whole @ right)
        assert close(of.combined(c), whole.T @ c)
        assert close(of.product(c), whole @ (whole.T @ c))
        assert close(of.square(c), (whole.T @ c).square().sum(0))
        assert close(of.lengths(), part.double().square().sum(1))
        assert torch.equal(part, before)


def test_the_number_of_threads_is_as_before_even_after_an_error() -> None:
    threads = torch.get_num_threads()
    of = RowsGram(torch.ones(4, 3), torch.ones(4, dtype=torch.float64))
    of.times(torch.ones(3, 1))
    assert torch.get_num_threads() == threads
    with pytest.raises(RuntimeError):
        of.times(torch.ones(2, 1))
    assert torch.get_num_threads() == threads
