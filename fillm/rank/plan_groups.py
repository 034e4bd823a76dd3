"""What a run by groups of layers takes: every group's passes, and the accumulators of the largest."""

from collections.abc import Mapping, Sequence

from fillm.rank.plan_lines import PassPlan


def passes_of_all(groups: Sequence[Sequence[PassPlan]]) -> list[PassPlan]:
    """The passes of all groups together, those of one name in one.

    Args:
        groups: the passes of every group, the same ones in the same order.
    """
    if len(groups) == 1:
        return list(groups[0])
    return [
        PassPlan(
            f"{parts[0].name}, {len(parts)} groups",
            sum(part.samples for part in parts),
            sum(part.tokens for part in parts),
            sum(part.batches for part in parts),
            _added([part.flop for part in parts]),
            _added([part.moved for part in parts]),
            sum(part.received for part in parts),
        )
        for parts in zip(*groups, strict=True)
    ]


def largest(groups: Sequence[Mapping[str, int]]) -> dict[str, int]:
    """The accumulators of the group whose take most; one group's exist at a time."""
    return dict(max(groups, key=lambda memory: sum(memory.values())))


def _added(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    return {name: sum(part[name] for part in parts) for name in parts[0]}
