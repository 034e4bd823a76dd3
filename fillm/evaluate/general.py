"""General ability: the tasks of EleutherAI's lm-evaluation-harness, if `lm-eval` is installed.

Source: Gao et al. 2024, doi 10.5281/zenodo.12608602. Nothing of it is reimplemented: prompts, scoring and data are its
own, and so are the names of the numbers.
"""

import contextlib
import json
import math
import os
from collections.abc import Iterator
from numbers import Real
from types import ModuleType
from typing import TYPE_CHECKING, Any

from fillm.errors import DataError, FillmError, UsageError
from fillm.evaluate.dealing import Deal
from fillm.evaluate.metric import Metric, Needs, Outcome

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from fillm.evaluate.evidence import Evidence

PREFIX = "lm_eval"
REQUESTS = ("loglikelihood", "loglikelihood_rolling", "generate_until")  # what the harness asks of a model
BATCHES = 64  # that a process takes before it may have to wait for the others
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
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerBase",
    tasks: list[str],
    *,
    batch_size: int,
    seed: int = 0,
    deal: Deal | None = None,
) -> dict[str, float]:
    """Runs tasks of the harness on a model in memory.

    Of several processes each goes through the tasks, answers its share of the requests and hears the others' answers.

    Args:
        model: a causal language model, on its device.
        tokenizer: its tokenizer.
        tasks: names, as `check_tasks` returned them.
        batch_size: rows of one forward pass.
        seed: of every draw of the harness (few-shot examples among them).
        deal: the processes that do this together, each with the whole model; None for this one alone.

    Returns:
        `lm_eval/TASK/METRIC` -> value, as the harness reports it: `acc`, `acc_stderr`, ...; a metric of another filter
        than `none` carries its name, as in `exact_match,strict-match`.

    Raises:
        UsageError: `lm-eval` is not installed.
        DataError: a task failed, such as for want of its data set.
        EndedByAnother: another process has an error.
        InterruptedRun: a process was told to stop.
    """
    harness = _harness(",".join(tasks))
    from lm_eval.models.huggingface import HFLM

    deal = deal or Deal()
    first, kind = deal.processes.first, HFLM if deal.processes.count == 1 else _dealt_out(HFLM, deal, batch_size)
    try:
        with _silent(not first):
            found = harness.simple_evaluate(
                model=kind(pretrained=model, tokenizer=tokenizer, batch_size=batch_size),
                tasks=tasks,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
                log_samples=False,
            )
    except FillmError:
        raise
    except Exception as error:  # tasks are programs of their own, and raise what they like
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        raise DataError(f"--lm-eval {','.join(tasks)}: lm-eval failed ({type(error).__name__}: {reason})") from error
    # Under torchrun the harness hands its results to the first process of a machine alone.
    return json.loads(deal.processes.tell(json.dumps(_flat(found["results"]) if first else {}))[0])


def _dealt_out(kind: type, deal: Deal, batch_size: int) -> type:
    """The harness's kind of model, which answers its share of the requests and hears the answers to the rest."""

    def dealt(name: str) -> Any:
        answer = getattr(kind, name)

        def answers(self: Any, requests: list[Any], *further: Any, **options: Any) -> list[Any]:
            # Neighbours often share their context, which is then gone through once; and many at a time can be sorted
            # by their lengths. Of what is drawn, the numbers are those of one process if one draws them all.
            share = math.ceil(len(requests) / deal.processes.count)
            size = max(1, len(requests) if any(map(_is_drawn, requests)) else min(BATCHES * batch_size, share))
            blocks = [requests[begin : begin + size] for begin in range(0, len(requests), size)]
            own: list[tuple[int, list[Any]]] = []

            def work(numbered: list[tuple[int, list[Any]]]) -> None:
                ((number, block),) = numbered
                own.append((number, answer(self, block, *further, **options)))

            deal.run(f"{PREFIX} {name}", [[one] for one in enumerate(blocks)], work, None, lambda block: 0)
            told = sorted(one for said in deal.processes.tell(json.dumps(own)) for one in json.loads(said))
            return [tuple(a) if isinstance(a, list) else a for _, block in told for a in block]

        return answers

    return type(f"Dealt{kind.__name__}", (kind,), {name: dealt(name) for name in REQUESTS})


def _is_drawn(request: Any) -> bool:
    """Whether an answer is drawn at random, and therefore depends on what was drawn before it."""
    options = request.args[-1]
    if not isinstance(options, dict):
        return False
    drawn = options.get("do_sample")
    return bool(options.get("temperature")) if drawn is None else bool(drawn)


@contextlib.contextmanager
def _silent(wanted: bool) -> Iterator[None]:
    """The harness draws a bar for everything; of several processes one does."""
    with contextlib.ExitStack() as stack:
        if wanted:
            nowhere = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stderr(nowhere))
        yield


def general_metric(tasks: str) -> Metric:
    """What `--lm-eval` adds to the metrics of a benchmark.

    Raises:
        UsageError: as `check_tasks`.
    """
    names = check_tasks(tasks)

    def compute(evidence: "Evidence") -> Outcome:
        size, seed = evidence.config.batch_size or BATCH_SIZE, evidence.config.seed or 0
        found = general_ability(
            evidence.model,
            evidence.tokenizer,
            names,
            batch_size=size,
            seed=seed,
            deal=evidence.deal,
        )
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
