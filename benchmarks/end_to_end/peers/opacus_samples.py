"""Opacus: norms of per-sample gradients by ghost clipping, and the gradients themselves."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from benchmarks.end_to_end.peers.setting import Ready, Setting, imported, sample_losses


def ghost_norms(setting: Setting) -> Ready:
    """The norm of every sample's gradient, of all tensors together; layers without a rule form their gradient."""
    return norms(setting, lambda _: None)


def norms(setting: Setting, receive: Callable[[Tensor], object]) -> Ready:
    """The same; `receive` is handed every batch's, [B]."""
    made = imported("opacus.grad_sample").GradSampleModuleFastGradientClipping
    return _wrapped(setting, made, lambda wrapped: receive(wrapped.get_norm_sample()))


def gradients(setting: Setting) -> Ready:
    """Every sample's gradient of every tensor, dropped after the batch."""
    return _wrapped(setting, imported("opacus.grad_sample").GradSampleModule, lambda _: None)


def _wrapped(setting: Setting, made: Callable[..., nn.Module], read: Callable[[Any], object]) -> Ready:
    model = setting.model.train().requires_grad_(True)  # its hooks want training mode; there is no dropout
    wrapped = made(model, strict=False, loss_reduction="sum")

    def run(tokens: int) -> None:
        for batch in setting.batches(tokens):
            sample_losses(wrapped, batch).sum().backward()
            read(wrapped)
            for parameter in model.parameters():
                parameter.grad = parameter.grad_sample = None

    return Ready(run, setting.parameters)
