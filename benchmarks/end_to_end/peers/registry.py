"""What is run side by side, in the order of a round."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from benchmarks.end_to_end.peers import bergson_index, logra_cache, opacus_samples, own, vmapped
from benchmarks.end_to_end.peers.setting import Ready, Setting

BUDGETS = (256, 512, 1024, 2048)  # tokens a batch, of which a peer takes its fastest
ALL, SOME, FEW = "all", "some", "few"  # of the samples
PLAIN = "plain"


@dataclass(frozen=True)
class Peer:
    """One thing that is run.

    Attributes:
        key: in the CSV and on the command line.
        what: in the table.
        computes: what is known of the samples afterwards.
        package: the distribution that it comes from; empty for what needs none beyond fillm's.
        make: from its setting to what can be run.
        samples: `all`, `some` of their lengths where gradients are kept whole, or `few` where a sample takes seconds.
        budgets: tokens a batch that are tried, a single one taken as it is; none where it has its own.
    """

    key: str
    what: str
    computes: str
    package: str
    make: Callable[[Setting], Ready]
    samples: str = ALL
    budgets: tuple[int, ...] = BUDGETS

    def version(self) -> str:
        """Of its package; empty where it is not installed."""
        try:
            return version(self.package) if self.package else ""
        except PackageNotFoundError:
            return ""


PEERS = (
    Peer(PLAIN, "plain forward + backward", "the summed gradient", "torch", own.plain),
    Peer("fillm-certified", "**fillm, certified**", "ranks all tensors", "", own.certified, budgets=()),
    Peer("fillm-update", "**fillm, with `u`**", "ranks tensors, rows, heads, weights", "", own.with_update, budgets=()),
    Peer("fillm-sketched", "**fillm, `factored-sjlt`**", "ranks all tensors; sketches", "", own.sketched, budgets=()),
    *(
        Peer(f"bergson-{dim}", f"bergson, {dim} x {dim}", "projected gradients, on disk", "bergson",
             partial(bergson_index.index, dim=dim))
        for dim in (16, 64)
    ),
    Peer("bergson-whole", "bergson, unprojected", "whole gradients, on disk", "bergson",
         partial(bergson_index.index, dim=None), SOME),
    Peer("dattri-logra", "dattri LoGra, 64 x 64", "projected gradients, in memory", "dattri",
         partial(logra_cache.cache, dim=64), budgets=(1024,)),  # compiles anew for every shape that it meets
    Peer("opacus-ghost", "Opacus ghost norms", "gradient norms", "opacus", opacus_samples.ghost_norms),
    Peer("opacus-gradients", "Opacus per-sample gradients", "whole gradients, dropped", "opacus",
         opacus_samples.gradients),
    Peer("vmap", "`torch.func.vmap(grad)`", "whole gradients, dropped", "torch", vmapped.gradients),
    Peer("trak", "vmap + TRAK projector, 512", "projected gradients, dropped", "traker",
         vmapped.trak, FEW, BUDGETS[-1:]),
    Peer("dattri-projector", "vmap + dattri projector, 512", "projected gradients, dropped", "dattri",
         vmapped.dattri, FEW, BUDGETS[-1:]),
)  # fmt: skip
