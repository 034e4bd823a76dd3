"""The things that are measured side by side."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from benchmarks.end_to_end.published import OporpPerTensor, published_scores, trainable
from benchmarks.end_to_end.settings import BenchConfig
from benchmarks.end_to_end.workload import Workload
from fillm.capture import Capture, verify
from fillm.data import DEFAULT_TOKENS_PER_BATCH, SampleSet, collate, plan_batches
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.rank.soir import rank_soir

PLAIN_BUDGETS = (256, 512, 1024, 2048)
CERTIFIED = "certified"


@dataclass(frozen=True)
class Outcome:
    """What a run came to, apart from its time.

    Attributes:
        scores: of every tensor; empty for what scores nothing.
        bounds: certified lower and upper bounds, where there are any.
        note: for the table.
    """

    scores: dict[str, float] = field(default_factory=dict)
    bounds: dict[str, tuple[float, float]] = field(default_factory=dict)
    note: str = ""


@dataclass(frozen=True)
class Variant:
    """One thing to be measured.

    Attributes:
        key: its name in the code and in the CSV.
        what: its name in the table.
        meaning: one line for a person.
        run: does it once, from the loaded model and samples on.
        forget, retain: the samples it goes through.
        tokens_per_batch: its budget, padding included; None for batches of one.
    """

    key: str
    what: str
    meaning: str
    run: Callable[[], Outcome]
    forget: SampleSet
    retain: SampleSet
    tokens_per_batch: int | None

    @property
    def num_samples(self) -> int:
        """Samples of both sets."""
        return len(self.forget) + len(self.retain)

    @property
    def num_tokens(self) -> int:
        """Tokens of both sets, padding not counted."""
        return self.forget.num_tokens + self.retain.num_tokens


def variants(work: Workload, config: BenchConfig) -> list[Variant]:
    """All of them, in the order in which a round runs them."""
    every, few = (work.forget, work.retain), (work.few_forget, work.few_retain)
    sketch = OporpPerTensor(config.sketch_dim, config.shuffle_rounds)
    found = [
        Variant(
            plain_key(budget),
            f"plain, {budget} tokens a batch",
            "forward + backward with parameter gradients over the same samples, nothing else",
            lambda budget=budget: plain(work, budget),
            *every,
            budget,
        )
        for budget in PLAIN_BUDGETS
    ]
    return [
        *found,
        Variant(
            CERTIFIED,
            "certified SOIR",
            "every tensor ranked from its bracket (3b), a weighted sum only where that is too wide; checks included",
            lambda: soir(work, config, need_update=False),
            *every,
            DEFAULT_TOKENS_PER_BATCH,
        ),
        Variant(
            "update",
            "SOIR with u",
            "the same and u itself: rows, heads, single weights, the one-shot update",
            lambda: soir(work, config, need_update=True),
            *every,
            DEFAULT_TOKENS_PER_BATCH,
        ),
        Variant(
            "published",
            "published pipeline",
            "restated: batch 1, every per-sample gradient kept in memory, scored from what was kept",
            lambda: Outcome(published_scores(work.model, *few, config.damping)),
            *few,
            None,
        ),
        Variant(
            "published-oporp",
            f"published, OPORP {config.sketch_dim}",
            f"the same, each tensor's gradient shuffled {config.shuffle_rounds} times (rows, then columns) and "
            f"summed to {config.sketch_dim} numbers, damping divided by that size as published",
            lambda: Outcome(published_scores(work.model, *few, config.damping, sketch)),
            *few,
            None,
        ),
    ]


def plain_key(budget: int) -> str:
    """Key of plain forward + backward at a token budget."""
    return f"plain-{budget}"


def plain(work: Workload, tokens_per_batch: int) -> Outcome:
    """Forward + backward over both sets."""
    forward_backward(work.model, (work.forget, work.retain), tokens_per_batch)
    return Outcome()


def forward_backward(model: nn.Module, sets: Sequence[SampleSet], tokens_per_batch: int) -> None:
    """As in training: gradients of all parameters in `.grad`, set to None after every batch."""
    with trainable(model):
        for samples in sets:
            for loss in batch_losses(model, samples, tokens_per_batch):
                loss.backward()
                model.zero_grad(set_to_none=True)


def batch_losses(model: nn.Module, samples: SampleSet, tokens_per_batch: int) -> Iterator[Tensor]:
    """The model's own loss of every batch, a scalar in nats a counted token."""
    for members in plan_batches(samples.lengths, tokens_per_batch):
        batch = collate(samples, members).to(model.device)
        asked = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask, "labels": batch.labels}
        yield model(**asked, use_cache=False).loss


def soir(work: Workload, config: BenchConfig, need_update: bool) -> Outcome:
    """The ranking as `fillm.rank` does it: the check of the rules against autograd, then the passes."""
    capture, passes = Capture(work.model, work.names), Passes(Console.silent())
    verify(capture, work.retain)
    found = rank_soir(
        passes,
        capture,
        work.forget,
        work.retain,
        damping=config.damping,
        tolerance=config.tolerance,
        need_update=need_update,
    )
    bounds = {name: (found.low[name], found.high[name]) for name in work.names}
    summed = sum(low == high > 0 for low, high in bounds.values())
    note = f"weighted sum for {summed} of {len(bounds)} tensors, {found.visited_again} samples visited again"
    if capture.fallback:
        note += f", {len(capture.fallback)} tensors by batch-1 autograd"
    return Outcome({name: 0.5 * (low + high) for name, (low, high) in bounds.items()}, bounds, note)
