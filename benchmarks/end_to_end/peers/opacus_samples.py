"""Opacus: norms of per-sample gradients by ghost clipping, and the gradients themselves."""

from collections.abc import Callable

from torch import nn

from benchmarks.end_to_end.peers.common import Ready, Setting, imported, sample_losses


def ghost_norms(setting: Setting) -> Ready:
    """The norm of every sample's gradient, tensor by tensor; layers without a rule form the gradient."""
    made = imported("opacus.grad_sample").GradSampleModuleFastGradientClipping
    return _wrapped(
        setting, lambda model: made(model, strict=False, loss_reduction="sum"), lambda m: m.get_norm_sample()
    )


def gradients(setting: Setting) -> Ready:
    """Every sample's gradient of every tensor, dropped after the batch."""
    made = imported("opacus.grad_sample").GradSampleModule
    return _wrapped(setting, lambda model: made(model, strict=False, loss_reduction="sum"), lambda m: None)


def _wrapped(setting: Setting, wrap: Callable[[nn.Module], nn.Module], read: Callable[[nn.Module], object]) -> Ready:
    model = setting.model.train().requires_grad_(True)  # its hooks want training mode; there is no dropout
    wrapped = wrap(model)

    def run(tokens: int) -> None:
        for batch in setting.batches(tokens):
            sample_losses(wrapped, batch).sum().backward()
            read(wrapped)
            for parameter in model.parameters():
                parameter.grad = parameter.grad_sample = None

    return Ready(run, setting.parameters)
