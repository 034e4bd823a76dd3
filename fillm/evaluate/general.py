"""General ability: the tasks of EleutherAI's lm-evaluation-harness, if `lm-eval` is installed.

Source: Gao et al. 2024, doi 10.5281/zenodo.12608602. Nothing of it is reimplemented: prompts, scoring and data are its
own, and so are the names of the numbers.
"""

import math
from numbers import Real
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fillm.errors import DataError, UsageError
from fillm.evaluate.metric import Metric, Needs, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fillm.evaluate.evidence import Evidence

PREFIX = "lm_eval"
BATCH_SIZE = 8  # where nothing else is said; the harness is not told how long the rows are


def check_tasks(tasks: str) -> list[str]:
    """The names in a comma-separated list of tasks, before any model is loaded.

    Raises:
        UsageError: `lm-eval` is not installed, no task is named, or it has no task of a name.
    """
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    if not names:
        raise UsageError(f"--lm-eval {tasks!r}: name tasks, separated by commas, such as arc_easy,hellaswag")
    _harness(tasks)
    from lm_eval.tasks import TaskManager

    manager = TaskManager()
    unknown = [name for name in names if not manager.match_tasks([name])]
    if unknown:
        raise UsageError(f"--lm-eval {tasks}: lm-eval has no task {', '.join(unknown)}; `lm-eval ls tasks` lists them")
    return names


def general_ability(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", tasks: list[str], *, batch_size: int, seed: int = 0
) -> dict[str, float]:
    """Runs tasks of the harness on a model in memory.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        tasks: names, as `check_tasks` returned them.
        batch_size: rows of one forward pass.
        seed: of every draw of the harness (few-shot examples among them).

    Returns:
        `lm_eval/TASK/METRIC` -> value, as the harness reports it: `acc`, `acc_stderr`, ...; a metric of another filter
        than `none` carries its name, as in `exact_match,strict-match`.

    Raises:
        UsageError: `lm-eval` is not installed.
        DataError: a task failed, such as for want of its data set.
    """
    harness = _harness(",".join(tasks))
    from lm_eval.models.huggingface import HFLM

    try:
        found = harness.simple_evaluate(
            model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
            tasks=tasks,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            log_samples=False,
        )
    except Exception as error:  # tasks are programs of their own, and raise what they like
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(f"--lm-eval {','.join(tasks)}: lm-eval failed ({type(error).__name__}: {reason})") from error
    return _flat(found["results"])


def general_metric(tasks: str) -> Metric:
    """What `--lm-eval` adds to the metrics of a benchmark.

    Raises:
        UsageError: as `check_tasks`.
    """
    names = check_tasks(tasks)

    def compute(evidence: "Evidence") -> Outcome:
        size, seed = evidence.config.batch_size or BATCH_SIZE, evidence.config.seed or 0
        found = general_ability(evidence.model, evidence.tokenizer, names, batch_size=size, seed=seed)
        notes = {name: f"lm-eval reports {value}" for name, value in found.items() if not math.isfinite(value)}
        return Outcome({name: None if name in notes else value for name, value in found.items()}, notes)

    return Metric("lm-eval", (), lambda sets: Needs(), compute)


def _harness(tasks: str) -> ModuleType:
    try:
        import lm_eval
    except ImportError:
        raise UsageError(
            f"--lm-eval {tasks}: the package lm-eval is not installed; pip install lm-eval, or leave out --lm-eval"
        ) from None
    return lm_eval


def _flat(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """What is a number: the harness also writes aliases, and N/A for errors that it did not compute."""
    return {
        f"{PREFIX}/{task}/{name.removesuffix(',none')}": float(value)
        for task, found in results.items()
        for name, value in found.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    }
