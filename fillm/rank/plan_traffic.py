"""Bytes that a pass moves: to and from a device's memory, and from the other devices.

Counted once each: weights for every product of a batch with them, accumulators, what is kept for the backward pass,
logits, and the inputs and output gradients that a product or norm of the statistics reads. What stays in a cache costs
less, what a kernel reads twice more.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from fillm.data import SampleSet
from fillm.models import TensorInfo
from fillm.rank.costs import BatchShape, Costs, accumulator_bytes
from fillm.rank.plan_devices import Devices
from fillm.rank.plan_lines import PassPlan
from fillm.rank.plan_passes import MethodPass, planned_flop
from fillm.rank.plan_shards import Units


@dataclass(frozen=True)
class Traffic:
    """What one batch or one token moves.

    Attributes:
        devices: that the plan is for.
        outside, layers: bytes of the weights outside and inside of decoder layers.
        lookups: bytes of embeddings that are only looked up, of which few rows are read.
        accumulator: bytes of one accumulator of all tensors in scope, wherever it lies.
        held: bytes of a device's part of it.
        kept: bytes that a padded token leaves for the backward pass.
        itemsize: of activations.
        vocabulary: width of the logits.
    """

    devices: Devices
    outside: int
    layers: int
    lookups: int
    accumulator: int
    held: int
    kept: float
    itemsize: int
    vocabulary: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        everything: Sequence[TensorInfo],
        scope: Sequence[TensorInfo],
        devices: Devices,
        kept: float,
        vocabulary: int,
    ) -> "Traffic":
        """Reads off a model's tensors; values are not touched."""
        itemsize = next(iter(model.parameters())).element_size()
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        units = Units.of(model) if devices.sharded else Units(total, (), {})
        head = getattr(model, "get_output_embeddings", lambda: None)()
        at_head = {name for name, p in model.named_parameters() if head is not None and p is head.weight}
        lookups = itemsize * sum(i.numel for i in everything if i.kind == "embed" and i.name not in at_head)
        wide = max(4, itemsize)
        return cls(
            devices, units.outside, sum(units.layers), lookups, accumulator_bytes(scope, wide),
            accumulator_bytes(scope, wide, devices=devices), kept, itemsize, vocabulary,
        )  # fmt: skip

    def moved(
        self, one: MethodPass, shapes: Sequence[BatchShape], costs: Costs, checkpointing: bool
    ) -> dict[str, float]:
        """Bytes of a device's memory, by what `planned` counts FLOP of.

        Args:
            one: the pass, gone through once.
            shapes: of the device's batches.
            costs: of a token in the model.
            checkpointing: whether the layers are computed again in the backward pass.
        """
        weights = float(len(shapes) * (self.outside + self.layers - self.lookups))
        kept = self.kept * sum(shape.tokens for shape in shapes)
        logits = float(self.itemsize * self.vocabulary * sum(shape.answered for shape in shapes))
        out = {"forward": weights + kept + logits}
        if not one.forward:
            factors = sum(costs.factor_entries(shape) for shape in shapes) * self.itemsize
            out["backward of activations"] = weights + kept + 2.0 * logits
            exchanged = 2 if self.devices.sharded else 1  # what is gathered or sent is written and read once more
            dots, sums = one.products - one.sums, one.sums
            sweeps = len(shapes) * exchanged * (dots + 2 * sums)
            out["products with weights in scope"] = float(sweeps * self.accumulator) + one.products * factors
            if checkpointing:
                out["forward of the layers, again"] = weights + kept
            if one.norms:
                out["ghost norms"] = factors
        return out

    def received(self, one: MethodPass, batches: int) -> float:
        """Bytes that a device receives from the others in a pass of so many batches of its own, gone through once."""
        others = (self.devices.count - 1) / self.devices.count
        if not self.devices.sharded:  # sums are added up when the pass is over, a part in each process, and told to all
            return 2.0 * others * self.accumulator * one.sums
        weights = self.outside + self.layers * (1 if one.forward else 2)
        return batches * others * (weights + self.accumulator * one.products)


def planned(
    one: MethodPass,
    samples: SampleSet,
    shapes: Sequence[BatchShape],
    costs: Costs,
    traffic: Traffic,
    checkpointing: bool,
) -> PassPlan:
    """What a pass costs, all its times together: of the device that has most to do.

    Args:
        one: the pass.
        samples: of its set.
        shapes: of its batches, in the order of the pass.
        costs: of a token in the model.
        traffic: of a batch, on the devices of the plan.
        checkpointing: whether the layers are computed again in the backward pass.
    """
    own = [shapes[i] for i in traffic.devices.dealt([costs.forward(shape) for shape in shapes], one.led)]
    flop = planned_flop(one, own, costs, checkpointing)
    moved = traffic.moved(one, own, costs, checkpointing)
    tokens, times = sum(sample.num_tokens for sample in samples), one.times
    return PassPlan(
        one.name,
        times * len(samples),
        times * tokens,
        times * len(shapes),
        {name: times * value for name, value in flop.items()},
        {name: times * value for name, value in moved.items()},
        times * traffic.received(one, len(own)),
    )
