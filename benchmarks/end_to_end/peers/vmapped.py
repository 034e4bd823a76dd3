"""`torch.func.vmap(grad)`: per-sample gradients of all parameters, and dense projections of them."""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap

from benchmarks.end_to_end.peers.setting import Ready, Setting, imported, mean_losses

PROJECTED = 512
TRAK_BATCH = 32  # samples that TRAK's kernel on a GPU takes at a time


def gradients(setting: Setting) -> Ready:
    """Every sample's gradient of every parameter, dropped after the batch."""

    def run(tokens: int) -> None:
        for _ in _batches(setting, tokens):
            pass

    return Ready(run, setting.parameters)


def trak(setting: Setting) -> Ready:
    """The same, flat, through the projector that TRAK chooses on the device."""
    projectors = imported("trak.projectors")
    kind = projectors.ProjectionType.rademacher
    shape = (setting.parameters, PROJECTED, 0, kind, setting.device)
    if setting.device.type == "cuda":
        imported("fast_jl")
        projector, note = projectors.CudaProjector(*shape, max_batch_size=TRAK_BATCH), "fast_jl"
    else:
        projector, note = projectors.BasicProjector(*shape), "BasicProjector"
    return _projected(setting, lambda rows: projector.project(rows, model_id=0), note)


def dattri(setting: Setting) -> Ready:
    """The same through dattri's random projection: sparse on a GPU, dense on the CPU, where it has no sparse one."""
    kind = "sjlt" if setting.device.type == "cuda" else "rademacher"
    projection, made = imported("dattri.func.projection"), {}

    def project(rows: Tensor) -> object:
        if len(rows) not in made:
            like = {"feature_batch_size": len(rows), "proj_dim": PROJECTED, "proj_max_batch_size": TRAK_BATCH}
            made[len(rows)] = projection.random_project(rows, **like, proj_type=kind, device=setting.device)
        return made[len(rows)](rows)

    return _projected(setting, project, kind)


def _projected(setting: Setting, project: Callable[[Tensor], object], note: str) -> Ready:
    def run(tokens: int) -> None:
        for by_name in _batches(setting, tokens):
            project(torch.cat([rows.flatten(1) for rows in by_name.values()], 1))

    return Ready(run, setting.parameters, f"{note} to {PROJECTED}")


def _batches(setting: Setting, tokens: int) -> Iterator[dict[str, Tensor]]:
    """Of every batch, gradients by tensor, [B, ...]. No mask: padding stands on the right, and the model is causal."""
    model = setting.model
    parameters = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], ids: Tensor, labels: Tensor) -> Tensor:
        logits = functional_call(model, weights, (ids[None],), {"use_cache": False}).logits
        return mean_losses(logits, labels[None])[0]

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="error")
    for batch in setting.batches(tokens):
        yield each(parameters, batch.input_ids, batch.labels)
