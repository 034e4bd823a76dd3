"""Which passes a method takes over which set, and what one of them costs."""

from collections.abc import Sequence
from typing import NamedTuple

from fillm.capture import ONE_SIDED
from fillm.rank.config import FORGET_ALONE, WITHOUT_GRADIENTS, RankConfig
from fillm.rank.costs import BatchShape, Costs
from fillm.rank.gram_sources import needs_mean
from fillm.rank.path_step import MOST_LENGTHS


class MethodPass(NamedTuple):
    """A pass that a method takes.

    Attributes:
        name: what its line of the plan says.
        which: `forget` or `retain`.
        products: per weight in scope.
        sums: of these, how many add to an accumulator; the others are dots with one.
        norms: whether norms of samples' gradients are taken.
        times: how often.
        forward: whether it ends with the losses, without a backward pass.
        led: whether its first batch fixes something for all others, and is a round by itself.
    """

    name: str
    which: str
    products: int = 0
    norms: bool = False
    times: int = 1
    forward: bool = False
    sums: int = 0
    led: bool = False


def passes_of(config: RankConfig) -> list[MethodPass]:
    """The passes of the method that the settings name, in their order."""
    method = config.canonical_method
    if method in WITHOUT_GRADIENTS:
        return []
    if config.sketched or config.exact_gram:
        # The sparse and dense kinds form tiles of every gradient; two-sided ones project its factors.
        formed = int(config.sketched and config.compression in ONE_SIDED)
        mean = int(needs_mean(method) and not config.exact_gram)
        out = [
            MethodPass("forget pass", "forget", formed + mean, True, sums=mean),
            MethodPass("retain pass", "retain", formed, True),
        ]
        if config.asks_for_update:  # sketches cannot be asked for it
            out += [
                MethodPass("forget pass for v", "forget", 1, sums=1),
                MethodPass("update pass", "retain", 1, sums=1),
            ]
            out += [MethodPass("damage pass", "retain", 1)] if config.objective != "forget" else []
        return out
    out = [MethodPass("forget pass", "forget", 1, sums=1)]
    if method in FORGET_ALONE:
        return out
    if method == "path":
        return [*out, *_along_the_step(config.path_points, config.path_rounds)]
    certified = method == "soir" and config.curvature == "datainf"
    out.append(MethodPass("retain pass", "retain", 2 if certified else 1, certified, sums=1, led=certified))
    if config.objective != "forget":
        out.append(MethodPass("damage pass", "retain", 1))
    return out


def _along_the_step(points: int, rounds: int) -> list[MethodPass]:
    lengths, places = rounds * MOST_LENGTHS, rounds * points
    ends = (
        "retain pass at the end of the step" if rounds == 1 else f"retain passes at the ends of the steps, {rounds} x"
    )
    return [
        MethodPass("retain pass, forward", "retain", forward=True),
        MethodPass(f"search of the length, {lengths} x forward", "forget", times=lengths, forward=True),
        MethodPass(f"forget passes along the step, {places} x", "forget", 1, times=places, sums=1),
        MethodPass(f"retain passes along the step, {places} x", "retain", 1, times=places, sums=1),
        MethodPass(f"{ends}, forward", "retain", times=rounds, forward=True),
    ]


def planned_flop(one: MethodPass, shapes: Sequence[BatchShape], costs: Costs, checkpointing: bool) -> dict[str, float]:
    """FLOP of a pass gone through once, by what they are spent on.

    Args:
        one: the pass.
        shapes: of the batches.
        costs: of a token in the model.
        checkpointing: whether the layers are computed again in the backward pass.
    """
    attention = sum(costs.attention_forward(shape) for shape in shapes)
    flop = {"forward": sum(costs.forward(shape) for shape in shapes)}
    if one.forward:
        flop["attention, forward"] = attention
    else:
        flop["backward of activations"] = flop["forward"]
        flop["attention, forward and backward"] = 3.0 * attention
        flop["products with weights in scope"] = one.products * sum(costs.product(shape) for shape in shapes)
        if checkpointing:
            flop["forward of the layers, again"] = attention + sum(costs.layers_forward(shape) for shape in shapes)
    if one.norms:
        flop["ghost norms"] = sum(costs.ghost_norms(shape) for shape in shapes)
    return flop
