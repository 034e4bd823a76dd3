"""How much a forward pass keeps for its backward pass, found without running it.

The model is copied with fake tensors (shapes and dtypes, no values) and run forward once; every storage that autograd
would keep is counted. Attention masks, dtypes and the kind of attention kernel are thereby the model's own. The fake
tensors claim to be on the CPU: its fused attention keeps what a GPU's keeps, and no GPU is woken.
"""

import copy
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fillm.capture.experts import fused_experts


def saved_activation_bytes(model: nn.Module, rows: int, tokens: int) -> int | None:
    """Bytes that autograd keeps after the forward pass of one batch, parameters and logits not counted.

    Args:
        model: a causal language model, with values or on the meta device; it is not changed and no value is read.
        rows: R, sequences in the batch.
        tokens: T, tokens in each.

    Returns:
        Bytes; None where the model cannot be followed without values (a router that is not transformers' own, for one).
    """
    try:
        with FakeTensorMode(), torch.enable_grad():
            twin = _fake_copy(model)
            own = {t.untyped_storage()._cdata for t in [*twin.parameters(), *twin.buffers()]}
            kept: dict[int, Any] = {}  # the storages themselves: while they are held, none is taken for another

            def keep(tensor: Tensor) -> Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in own:
                    kept[storage._cdata] = storage
                return tensor

            ids = torch.zeros(rows, tokens, dtype=torch.int64, device="cpu")
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                twin(input_ids=ids, use_cache=False)
            return sum(storage.nbytes() for storage in kept.values())
    except Exception:  # whatever a model does that needs values: the caller has an estimate from shapes instead
        return None


def _fake_copy(model: nn.Module) -> nn.Module:
    """A copy of the modules around fake tensors; parameters require a gradient, to keep what the boundaries keep."""
    twins: dict[int, Any] = {}
    for module in model.modules():
        plain = [value for value in vars(module).values() if isinstance(value, Tensor)]
        for tensor in [*module._parameters.values(), *module._buffers.values(), *plain]:
            if tensor is None or id(tensor) in twins:
                continue
            twin = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            if isinstance(tensor, nn.Parameter):
                twin = nn.Parameter(twin, requires_grad=tensor.is_floating_point())
            twins[id(tensor)] = twin
    copied = copy.deepcopy(model, twins).eval()
    for module in fused_experts(copied):
        module.forward = MethodType(_any_expert, module)
    if getattr(copied, "config", None) is not None:
        copied.config.pad_token_id = None  # else some models look for it among the token ids
    return copied


def _any_expert(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """All routed tokens through one expert: as much is kept as when they are spread over many."""
    (tokens, top_k), width = top_k_index.shape, hidden_states.shape[-1]
    x = hidden_states.reshape(-1, 1, width).expand(-1, top_k, -1).reshape(-1, width)

    def linear(x: Tensor, stack: Tensor) -> Tensor:
        return nn.functional.linear(x, stack[0].T if self.is_transposed else stack[0])

    inner = linear(x, self.gate_up_proj if self.has_gate else self.up_proj)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = linear(inner, self.down_proj) * top_k_weights.reshape(-1, 1)
    return out.view(tokens, top_k, width).sum(1).view_as(hidden_states)
