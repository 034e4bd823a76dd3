"""All metrics, by benchmark."""

from collections.abc import Sequence
from importlib.util import find_spec

from fillm.errors import UsageError
from fillm.evaluate.metric import Metric


def metrics_of(benchmark: str) -> dict[str, Metric]:
    """The metrics of a benchmark by name, in the order of their figures in the summary."""
    from fillm.evaluate import knowundo, privacy, tofu, utility

    every = (*tofu.METRICS, *utility.METRICS, *knowundo.METRICS, *privacy.METRICS)
    return {metric.name: metric for metric in every if benchmark in metric.benchmarks}


def chosen_metrics(benchmark: str, names: str | None) -> list[Metric]:
    """What `--metrics` names, or the benchmark's own choice.

    Raises:
        UsageError: a name that the benchmark does not have, or one that needs a package that is not installed.
    """
    known = metrics_of(benchmark)
    if names is None:
        return _installed([metric for metric in known.values() if metric.default])
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    unknown = [name for name in wanted if name not in known]
    if unknown or not wanted:
        what = f"no metric of {benchmark} is called {', '.join(map(repr, unknown))}" if unknown else "names no metric"
        raise UsageError(f"--metrics {names}: {what}; there are {', '.join(known)}")
    return _installed([metric for name, metric in known.items() if name in wanted])


def _installed(metrics: Sequence[Metric]) -> list[Metric]:
    for metric in metrics:
        lacking = [name for name in metric.packages if find_spec(name) is None]
        if lacking:
            raise UsageError(
                f"--metrics {metric.name}: needs the package {lacking[0]}, which is not installed; pip install "
                "'fillm[evaluate]', or name others"
            )
    return list(metrics)
