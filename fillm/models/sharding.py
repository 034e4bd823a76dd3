"""A causal language model whose weights lie spread over the processes (FSDP2): each reads its own rows of every tensor.

The model is built without weights, sharded by decoder layer along the first axis of every tensor, and only then filled
from the safetensors files. No process ever holds it whole.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, init_device_mesh
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from fillm.documents import read_json_document
from fillm.errors import ModelError
from fillm.models.loading import DTYPES, explained, load_config, local_folder, quiet_transformers
from fillm.models.sharded_tensors import own_rows
from fillm.models.stored import stored_dtypes

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"


def load_sharded(model: str, *, dtype: str, device: torch.device, trust_remote_code: bool = False) -> PreTrainedModel:
    """A causal language model in eval mode, its parameters `DTensor`s split along their first axis; no gradients.

    All processes of the default group call it together.

    Args:
        model: a folder as `save_pretrained` writes it, with every tensor under the name that the model gives it.
        dtype: dtype of the weights: `float32`, `bfloat16`, `float16`, or `auto` for the one they were saved in.
        device: of this process.
        trust_remote_code: whether Python code that comes with the weights may run.

    Raises:
        ModelError: no such folder, what `load_model` refuses, quantised weights, tensors under other names, a model
            whose decoder layers transformers does not tell.
    """
    folder = local_folder(model)
    if folder is None:
        raise ModelError(f"--shard reads a folder on this machine, and {model} is none; download it first")
    config = load_config(model, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ModelError(f"{model}: quantised weights are not sharded; leave out --shard")
    with quiet_transformers(), explained(model):
        empty = _without_weights(config, _dtype(model, config, dtype), trust_remote_code)
    layers = decoder_layers(empty)
    if not layers:
        raise ModelError(f"{model}: transformers does not tell its decoder layers, so it is not sharded")
    if getattr(empty, "_keep_in_fp32_modules", None) and dtype != "float32":
        raise ModelError(f"{model}: keeps some tensors in float32; give --dtype float32 with --shard")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in [*layers, empty]:
        fully_shard(module, mesh=mesh)
    buffers = [buffer.detach().clone() for buffer in empty.buffers()]
    empty.to_empty(device=device)
    for buffer, values in zip(empty.buffers(), buffers, strict=True):
        buffer.copy_(values)
    with explained(model):
        _fill(empty, model, folder)
    empty.eval().requires_grad_(False)
    return empty


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The blocks of a model, in the order in which tokens go through them."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def _dtype(model: str, config: Any, dtype: str) -> torch.dtype:
    if dtype in DTYPES:
        return DTYPES[dtype]
    stored = getattr(config, "dtype", None) or next(iter(stored_dtypes(model).values()), None)
    return stored or torch.float32


def _without_weights(config: Any, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    """Parameters on the meta device; buffers, which files need not hold, computed."""
    from accelerate import init_empty_weights  # what several processes need in any case

    with init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
    model.tie_weights()  # moving to the meta device has made two parameters of one
    return model


def _fill(model: nn.Module, source: str, folder: Path) -> None:
    """Copies this process's rows of every tensor from the files."""
    files = [_WHOLE]
    if not (folder / _WHOLE).is_file():
        files = sorted(set(read_json_document(folder / _INDEX)["weight_map"].values()))
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    with ExitStack() as stack:
        place = {}
        for file in files:
            opened = stack.enter_context(safe_open(str(folder / file), framework="pt"))
            place |= dict.fromkeys(opened.keys(), opened)
        for name, parameter in model.named_parameters():
            key = next((alias for alias in aliases[id(parameter)] if alias in place), None)
            if key is None:
                raise ModelError(
                    f"{source}: the weights lack {name} under this name; --shard reads only files that name every "
                    "tensor as the model does"
                )
            rows = place[key].get_slice(key)
            if tuple(rows.get_shape()) != tuple(parameter.shape):
                raise ModelError(f"{source}: {key} has shape {rows.get_shape()}, and config.json says otherwise")
            local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
            begin = own_rows(parameter)
            with torch.no_grad():
                local.copy_(rows[begin : begin + local.shape[0]])
        for name, buffer in model.named_buffers():
            if name in place:
                buffer.copy_(place[name].get_tensor(name))


def unsharded_parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The tensors that FSDP2 puts in the place of a sharded model's parameters while a layer computes.

    They are made once and keep their identity; their memory comes and goes. One layer at a time is gathered.
    """
    for prefix, module in model.named_modules():
        if not isinstance(module, FSDPModule):
            continue
        module.unshard()
        for name, parameter in module.named_parameters():
            if not isinstance(parameter, DTensor):
                yield f"{prefix}.{name}" if prefix else name, parameter
        module.reshard()
