"""New adapters around a model."""

import pytest

from fillm.errors import UsageError
from fillm.models import with_lora
from tests.families import build_family


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_rank_that_no_matrix_has_is_refused_and_the_model_left(family):
    model = build_family(family)
    names = [name for name, _ in model.named_modules()]
    largest = max(min(p.shape) for name, p in model.named_parameters() if p.ndim == 2 and "mlp" in name)
    with pytest.raises(UsageError, match=rf"--lora-rank {largest + 1}: no matrix here has a rank above {largest};"):
        with_lora(model, largest + 1, 0)
    assert [name for name, _ in model.named_modules()] == names
    assert any("lora_A" in name for name, _ in with_lora(model, largest, 0).named_modules())
