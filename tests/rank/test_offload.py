"""Accumulators apart from the model: every method says what it says with them beside it, to the bit."""

from collections.abc import Callable

import pytest

from fillm import Ranking
from fillm.errors import UsageError
from fillm.rank import command
from fillm.rank.config import RankConfig, check
from fillm.rank.methods import rank
from fillm.rank.scoring import Job, Scores
from tests.rank.direct import family
from tests.rank.test_layer_groups import METHODS, assert_same_bits, ranked

QUICK = ("soir, rows traded off", "wagle")


@pytest.fixture
def offloaded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Ranking]:
    """A ranking on the CPU whose accumulators are treated as if they lay elsewhere, which the command refuses."""

    def apart(job: Job) -> Scores:
        job.capture.offload = True
        return rank(job)

    def run(*given: object, **options: object) -> Ranking:
        with monkeypatch.context() as patch:
            patch.setattr(command, "rank", apart)
            return ranked(*given, **options)

    return run


KINDS = [
    pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in METHODS if "woodbury" not in kind
]


@pytest.mark.parametrize("kind", KINDS)
def test_the_ranking_is_that_of_accumulators_beside_the_model(kind: str, offloaded: Callable[..., Ranking]) -> None:
    model = family("llama")[0]
    assert_same_bits(offloaded(model, kind), ranked(model, kind))


def test_offloaded_groups(offloaded: Callable[..., Ranking]) -> None:
    model = family("llama")[0]
    assert_same_bits(offloaded(model, "soir", groups=3), ranked(model, "soir"))


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"method": "random"}, "--method random accumulates no gradients"),
        ({"method": "path"}, "--method path reads its accumulators at every weight"),
        ({"compression": "sjlt"}, "inner products from sketches or Gram matrices stay on the GPU"),
        ({"curvature": "woodbury"}, "inner products from sketches or Gram matrices stay on the GPU"),
        ({"shard": True}, "--shard spreads accumulators over the processes"),
        ({"device": "cpu"}, "the model lies in CPU memory itself"),
    ],
)
def test_what_is_not_offloaded_is_refused(given: dict[str, object], why: str) -> None:
    with pytest.raises(UsageError, match=f"--offload is not taken here: {why}; leave it out"):
        check(RankConfig(model="m", offload=True, **given))
