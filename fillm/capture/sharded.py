"""Per-sample gradients of a model whose weights lie spread over the processes (FSDP2).

FSDP2 gathers a layer's weights before its forward and its backward, and all processes take part in that. So do they in
what the statistics gather and add up. Each process runs its own batch; what backpropagation finds is kept until the
layer is done, and is then handed out tensor by tensor in one order, the same in all processes whatever a batch reaches.
"""

import re
from collections.abc import Container, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fillm.capture.engine import Capture, Observe, frozen
from fillm.capture.gradients import PerSampleGradients
from fillm.capture.losses import LossReduction
from fillm.capture.sharded_gradients import ShardedGradients
from fillm.data import Batch, SampleSet, collate
from fillm.errors import ModelError
from fillm.models.sharding import decoder_layers, unsharded_parameters

_OUTSIDE = -1  # what stands in no decoder layer


class ShardedCapture(Capture):
    """A `Capture` whose processes run their batches in step; every process calls `run` or `idle` as often.

    Args:
        model: from `fillm.models.load_sharded`.
        names, loss_reduction, noise: as in `Capture`.

    Tensors without a rule, and models whose samples see each other in a batch, are refused: the processes would need
    different numbers of forward passes.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Any,
        loss_reduction: LossReduction = "mean",
        noise: dict[str, float] | None = None,
    ) -> None:
        super().__init__(model, names, loss_reduction, None, "", noise)
        self._unsharded = dict(unsharded_parameters(model))
        self.operands = {name: self._unsharded[name] for name in names}
        self._layers = decoder_layers(model)
        paths = {id(module): path for path, module in model.named_modules()}
        prefixes = [f"{paths[id(layer)]}." for layer in self._layers]
        self._names: dict[int, list[str]] = {}  # of every layer, in the order in which they are handed out
        for name in names:
            layer = next((i for i, prefix in enumerate(prefixes) if name.startswith(prefix)), _OUTSIDE)
            self._names.setdefault(layer, []).append(name)
        self._above: list[str] | None = None  # names that are complete where the last layer's backward begins

    def like(self, names: Any, model: nn.Module | None = None) -> "ShardedCapture":
        """As `Capture.like`, of this model."""
        alike = ShardedCapture(self.model, names, self.loss_reduction, self.noise)
        if self._above is not None:
            alike._above = [name for name in self._above if name in alike.parameters]
        return alike

    def take_order_of(self, parts: Sequence["ShardedCapture"]) -> None:
        """What captures of parts of the tensors have seen complete before the last layer counts for all of them."""
        above = {name for part in parts for name in part._above or ()}
        self._above = [name for name in self._names.get(_OUTSIDE, []) if name in above]

    def run(self, batch: Batch, samples: SampleSet, observe: Observe) -> Tensor:
        """As `Capture.run`, in step with the other processes: `observe` is called for every tensor in scope."""
        return self._run(batch, observe, batch.indices)

    def idle(self, samples: SampleSet, observe: Observe) -> None:
        """Goes through what the others do with a batch, on the shortest sample, and adds nothing."""
        shortest = min(range(len(samples)), key=lambda i: len(samples[i].input_ids))
        self._run(collate(samples, [shortest]), observe, torch.zeros(0, dtype=torch.int64))

    def _run(self, batch: Batch, observe: Observe, positions: Tensor) -> Tensor:
        held: dict[str, PerSampleGradients] = {}
        done: set[str] = set()

        def hold(name: str, gradients: PerSampleGradients, _: Tensor) -> None:
            if name in done:
                raise ModelError(f"--shard: {name} is used again below its own layer; leave out --shard")
            held[name] = gradients

        def hand_out(names: list[str]) -> None:
            for name in names:
                done.add(name)
                own = held.pop(name, None)
                own = own if len(positions) else None
                observe(name, ShardedGradients(own, self.parameters[name]), positions if own is not None else NONE)

        def layer_done(layer: int) -> None:
            hand_out(self._names.get(layer, []))

        def above_done() -> None:
            if self._above is None:  # the first batch is the same in all processes: that of the check
                self._above = [name for name in self._names.get(_OUTSIDE, []) if name in held]
            hand_out(self._above)

        loud: dict[int, list[str]] = {}
        with frozen(self.model), torch.enable_grad(), self._watched(layer_done, above_done):
            losses = self._run_rules(batch.to(self.device), hold, loud)
        with torch.no_grad():
            if self._above is None:  # no gradient goes into the last layer: all there are came before it
                above_done()
            hand_out([name for name in self.parameters if name not in done])
        if self.fallback:
            name, reason = next(iter(self.fallback.items()))
            alike = re.sub(r"\.\d+\.", ".*.", name)
            raise ModelError(f"--shard: {name}: {reason}; give --exclude '{alike}', or leave out --shard")
        if loud and len(positions):
            position, names = next(iter(loud.items()))
            raise ModelError(
                f"--shard: sample {position} has a gradient of {names[0]} where two others had rounding noise; "
                "give --exclude for it, or leave out --shard"
            )
        return losses

    def _storages(self) -> Container[int]:
        return _Storages([*self._unsharded.values(), *self.model.buffers()])

    @contextmanager
    def _watched(self, layer_done: Any, above_done: Any) -> Iterator[None]:
        """Calls `layer_done(i)` once the backward of layer `i` is through, and `above_done()` before the last begins.

        The gradient of a layer's input is complete when all that the layer does with it has been gone through.
        """

        def enter(layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            hidden = args[0] if args else kwargs["hidden_states"]
            if hidden.requires_grad:
                hidden.register_hook(lambda _: layer_done(layer))

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda _: above_done())

        handles = [
            layer.register_forward_pre_hook(partial(enter, number), with_kwargs=True)
            for number, layer in enumerate(self._layers)
        ]
        handles.append(self._layers[-1].register_forward_hook(leave))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()


NONE = torch.zeros(0, dtype=torch.int64)


class _Storages:
    """Addresses of tensors whose memory comes and goes, as they are when asked."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def __contains__(self, address: object) -> bool:
        return any(tensor.untyped_storage().data_ptr() == address for tensor in self._tensors)
