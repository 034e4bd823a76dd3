"""Gradients that were packed for another process are the same there, to the bit, whatever class holds them."""

import pytest
import torch

from fillm.capture.gradients import row_layout
from fillm.capture.packing import pack, packed_bytes, unpack
from tests.capture.per_sample_cases import BATCH, CASES

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", list(CASES))
def test_what_is_unpacked_is_what_was_packed(name: str) -> None:
    batches = [(CASES[name](seed).gradients, torch.arange(BATCH) + BATCH * seed) for seed in (0, 1)]
    described, data = pack(batches, CPU)
    assert data.dtype == torch.uint8 and data.shape == (packed_bytes(described),)
    found = unpack(described, data.clone())
    assert len(found) == len(batches)
    for (ours, here), (theirs, there) in zip(found, batches, strict=True):
        assert type(ours) is type(theirs) and ours.shape == theirs.shape and torch.equal(here, there)
        rows = row_layout(theirs.shape)[0]
        assert torch.equal(ours.leading_rows(0, rows), theirs.leading_rows(0, rows))
        assert torch.equal(ours.squared_norms(), theirs.squared_norms())
        for sample in range(BATCH):
            wanted = theirs.materialise(sample)
            assert ours.materialise(sample).dtype == wanted.dtype and torch.equal(ours.materialise(sample), wanted)


def test_nothing_kept_is_nothing_packed() -> None:
    described, data = pack([], CPU)
    assert packed_bytes(described) == 0 and unpack(described, data) == []


def test_what_has_no_packed_form_is_a_fault() -> None:
    with pytest.raises(TypeError, match="object is not packed"):
        pack([(object(), torch.zeros(1))], CPU)
