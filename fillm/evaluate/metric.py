"""What a metric is: what it needs of the model, so that one pass serves all, and how it comes out of that."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fillm.evaluate.row_sets import RowSet

if TYPE_CHECKING:
    from fillm.evaluate.evidence import Evidence

ANSWER, PARAPHRASE, PERTURBED = "answer", "paraphrased_answer", "perturbed_answer"
Sets = Mapping[str, RowSet]


@dataclass(frozen=True)
class Needs:
    """What metrics look at. `a | b` is what both need together.

    Attributes:
        answers: (row set, field) pairs whose answers are scored token by token: field is `ANSWER`, `PARAPHRASE` or
            `PERTURBED`.
        generated: row sets whose questions are answered greedily.
        moments: row sets of whose `ANSWER` the moments over the vocabulary are needed too.
        texts_only: row sets that are read and tokenised, but that the metric runs the model on by itself.
    """

    answers: frozenset[tuple[str, str]] = frozenset()
    generated: frozenset[str] = frozenset()
    moments: frozenset[str] = frozenset()
    texts_only: frozenset[str] = frozenset()

    def __or__(self, other: "Needs") -> "Needs":
        return Needs(
            self.answers | other.answers,
            self.generated | other.generated,
            self.moments | other.moments,
            self.texts_only | other.texts_only,
        )

    @property
    def row_sets(self) -> frozenset[str]:
        """All row sets that have to be read."""
        return frozenset(name for name, _ in self.answers) | self.generated | self.moments | self.texts_only


@dataclass
class Outcome:
    """What a metric came to.

    Attributes:
        summary: figure by its name in `summary.json`; None where it could not be computed.
        notes: why not, by the same name; every None has one. A note on a figure that is there is shown too.
        columns: by row set, columns of `rows.parquet`: name -> one value a row (a float, int, str, or list of floats).
    """

    summary: dict[str, float | None] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    columns: dict[str, dict[str, Sequence[Any]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Metric:
    """One entry of `--metrics`.

    Attributes:
        name: as `--metrics` takes it.
        benchmarks: those it belongs to.
        needs: what it looks at, given the benchmark's row sets.
        compute: how it comes out of that.
        default: whether it is computed where `--metrics` is not given.
        packages: import names of what it needs beyond the package's own dependencies.
    """

    name: str
    benchmarks: tuple[str, ...]
    needs: Callable[[Sets], Needs]
    compute: Callable[["Evidence"], Outcome]
    default: bool = True
    packages: tuple[str, ...] = ()
