"""What one block of a model hands on, without the work of the blocks above it."""

from contextlib import suppress
from typing import Any

from torch import Tensor, nn

from fillm.capture.losses import IGNORED, model_inputs
from fillm.data import Batch
from fillm.errors import ModelError


class _BlocksAboveNotNeeded(Exception):
    """Ends a forward pass."""


def decoder_blocks(model: nn.Module) -> nn.ModuleList:
    """The list of a model's blocks: the outermost `ModuleList`, the longest where there are several.

    Raises:
        ModelError: if it has none.
    """
    lists = {name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList)}
    outermost = [module for name, module in lists.items() if not any(name.startswith(f"{other}.") for other in lists)]
    if not outermost:
        raise ModelError(f"{type(model).__name__} has no list of blocks whose output could be taken")
    return max(outermost, key=len)


def answer_states(model: nn.Module, batch: Batch, layer: int) -> Tensor:
    """The output of block `layer` at the answer's own tokens, with gradient.

    Rows lie as those of `fillm.capture.losses.answer_logits`, sample by sample, one position further on: there each row
    predicts an answer token, here it has read it. The forward pass ends before the next block.

    Args:
        model: a causal language model; not a wrapper that counts on its forward pass to return. Gradient
            checkpointing has to be that of `use_reentrant=False`: the other kind shows hooks no gradient.
        batch: [R, T] tokens in any layout.
        layer: from 0.

    Returns:
        [N, H], in the model's dtype.

    Raises:
        ModelError: if the model has no list of blocks.
    """
    blocks = decoder_blocks(model)
    found: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        found.append(output[0] if isinstance(output, tuple) else output)

    def stop(module: nn.Module, args: tuple[Any, ...]) -> None:
        raise _BlocksAboveNotNeeded

    # Before what comes next rather than behind this block: a checkpointed block runs again in the backward pass, where
    # it has to come to its end.
    after = blocks[layer + 1] if layer + 1 < len(blocks) else model.get_output_embeddings()
    handles = [blocks[layer].register_forward_hook(keep), after.register_forward_pre_hook(stop)]
    try:
        with suppress(_BlocksAboveNotNeeded):
            model(**model_inputs(model, batch))
    finally:
        for handle in handles:
            handle.remove()
    states = found[0]
    # The first token of a sample never counts: nothing predicts it.
    picked = (batch.labels != IGNORED).reshape(-1).nonzero().squeeze(1)
    return states.reshape(-1, states.shape[-1]).index_select(0, picked)
