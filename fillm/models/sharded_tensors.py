"""Tensors that lie spread over the processes along their first axis, as FSDP2 splits a model's parameters.

The few questions that the statistics ask of their accumulators, for whole tensors and sharded ones alike. What is added
up over the processes is added up in their order, so that the same number of processes gives the same bits.
"""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard


def own_rows(tensor: Tensor) -> int:
    """Where this process's rows of a tensor begin: `torch.chunk` of the first axis, as FSDP2 splits it."""
    if not isinstance(tensor, DTensor):
        return 0
    mesh = tensor.device_mesh
    return min(mesh.get_local_rank() * -(-tensor.shape[0] // mesh.size()), tensor.shape[0])


def whole(tensor: Tensor) -> Tensor:
    """A tensor as every process sees it: gathered where it is sharded (by all together), else itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that lies in this process."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def is_sharded(tensor: Tensor) -> bool:
    """Whether a tensor lies spread over the processes."""
    return isinstance(tensor, DTensor)


def add_up_into_shards(out: DTensor, part: Tensor) -> None:
    """`out += sum over the processes of part`, each keeping its rows; `part`, contiguous, has the shape of `out`."""
    mesh, own = out.device_mesh, out.to_local()
    begins = [min(index * -(-out.shape[0] // mesh.size()), out.shape[0]) for index in range(mesh.size())]
    width = part[0].numel() if len(part) else 0
    sizes = [(end - begin) * width for begin, end in zip(begins, [*begins[1:], out.shape[0]], strict=True)]
    received = part.new_empty(mesh.size() * own.numel())
    torch.distributed.all_to_all_single(
        received, part.view(-1), [own.numel()] * mesh.size(), sizes, group=mesh.get_group()
    )
    own.add_(received.view(mesh.size(), *own.shape).sum(0, dtype=torch.float64))


def sum_in_order(own: Tensor, like: DTensor) -> Tensor:
    """The sum of a tensor over the processes that share `like`, in their order and so with the same bits everywhere."""
    mesh = like.device_mesh
    heard = [torch.empty_like(own) for _ in range(mesh.size())]
    torch.distributed.all_gather(heard, own.contiguous(), group=mesh.get_group())
    return torch.stack(heard).sum(0)


def into_shards(values: Tensor | None, out: DTensor) -> None:
    """Spreads what the first process holds, of the shape of `out`, over `out`; the others give None."""
    mesh = out.device_mesh
    given = torch.empty(out.shape, dtype=out.dtype, device=mesh.device_type)
    if values is not None:
        given.copy_(values)
    torch.distributed.broadcast(given, 0, group=mesh.get_group())
    begin, own = own_rows(out), out.to_local()
    own.copy_(given[begin : begin + own.shape[0]])


def sharded_zeros(like: DTensor, dtype: torch.dtype) -> DTensor:
    """Zeros, split as `like` is."""
    local = torch.zeros(like.to_local().shape, dtype=dtype, device=like.to_local().device)
    return DTensor.from_local(
        local, like.device_mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
    )
