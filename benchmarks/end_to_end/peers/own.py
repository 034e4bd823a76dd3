"""Plain forward + backward, and fillm's rankings."""

from benchmarks.end_to_end.peers.setting import Ready, Setting
from benchmarks.end_to_end.settings import BenchConfig
from benchmarks.end_to_end.sketched import rank_sketched
from benchmarks.end_to_end.variants import forward_backward, soir
from benchmarks.end_to_end.workload import Workload

SKETCH_DIM = 512  # two halves of 16 x 16


def plain(setting: Setting) -> Ready:
    """Forward and backward with the gradients of all parameters, summed over the batch as in training."""
    sets = (setting.samples,)
    return Ready(lambda tokens: forward_backward(setting.model, sets, tokens), setting.parameters)


def certified(setting: Setting) -> Ready:
    """Every tensor ranked from its bracket; at fillm's own budget, whatever is asked."""
    return _exact(setting, need_update=False)


def with_update(setting: Setting) -> Ready:
    """The same and `u` itself."""
    return _exact(setting, need_update=True)


def _exact(setting: Setting, need_update: bool) -> Ready:
    work = Workload(setting.model, setting.forget, setting.retain, setting.forget, setting.retain)
    return Ready(lambda _: soir(work, BenchConfig(), need_update), setting.parameters)


def sketched(setting: Setting) -> Ready:
    """Every tensor ranked from two-sided sparse sketches."""
    sets = (setting.forget, setting.retain)
    return Ready(lambda _: rank_sketched(setting.model, *sets, "factored-sjlt", SKETCH_DIM), setting.parameters)
