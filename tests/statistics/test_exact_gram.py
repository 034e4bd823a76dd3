"""Exact Gram matrices from gradients made to order, of every class, against float64 gradients entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients
from fillm.statistics import KeptGradients, exact_gram, held_tensors, tensor_gram
from fillm.statistics.exact_gram import Kept, gram
from tests.capture.per_sample_cases import BATCH, CASES, ROUNDING, Case, dense, offsets_of, outer, stacked

# Gradients carry up to 32 roundings of their terms (Case.bound), of either side; sums of up to 64 products of
# them in float32 another 65. All in proportion to the sizes of the terms, whose inner product stands for sqrt(q_i q_j).
ROUNDINGS = 2 * 32 + 65


def kept_batches(make: str, batches: int = 3) -> tuple[Kept, Tensor, Tensor, int]:
    """Batches of one class; two samples are in none. Kept, float64 gradients and sizes [count, P], count."""
    count = batches * BATCH + 2
    places = torch.randperm(count, generator=torch.Generator().manual_seed(7))
    kept: Kept = []
    rows, sizes = {}, {}
    for number in range(batches):
        case, where = CASES[make](10 * number), places[number * BATCH : (number + 1) * BATCH]
        kept.append((case.gradients, where))
        rows |= dict(zip(where.tolist(), case.dense.reshape(BATCH, -1), strict=True))
        sizes |= dict(zip(where.tolist(), case.size.reshape(BATCH, -1), strict=True))
    nothing = torch.zeros_like(next(iter(rows.values())))
    return kept, *(torch.stack([some.get(i, nothing) for i in range(count)]) for some in (rows, sizes)), count


def assert_gram(found: Tensor, rows: Tensor, sizes: Tensor) -> None:
    assert found.dtype == torch.float64 and torch.equal(found, found.T)
    assert bool(((found - rows @ rows.T).abs() <= ROUNDINGS * ROUNDING * (sizes @ sizes.T)).all())


@pytest.fixture(params=["whole", "pieces"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything at once, or blocks of a row or two, and products of parts of them."""
    if request.param == "pieces":
        monkeypatch.setattr(exact_gram, "BLOCK_BYTES", 2 * 17 * 6 * 4)
        monkeypatch.setattr(exact_gram, "PRODUCT_ENTRIES", 5)
        monkeypatch.setattr(exact_gram, "STRIPS", 4)
        monkeypatch.setattr(exact_gram, "LEAST_STRIP", 1)
        monkeypatch.setattr(exact_gram, "GHOST_TOKENS", 20)
        monkeypatch.setattr(exact_gram, "LOOKUP_ROWS", 3)


@pytest.mark.parametrize("make", CASES)
def test_gram_of_every_class(make: str, pieces: None) -> None:
    kept, rows, sizes, count = kept_batches(make)
    assert_gram(gram(kept, count, kept[0][0].shape), rows, sizes)


@pytest.mark.parametrize("make", ["outer", "outer, equal lengths", "outer, transposed", "outer, bfloat16"])
def test_both_ways_of_an_outer_product_agree(make: str, pieces: None) -> None:
    kept, rows, sizes, count = kept_batches(make)
    for whole in (exact_gram._of_rows(kept, count, kept[0][0].shape), exact_gram._ghost(kept, count)):
        assert_gram(exact_gram._symmetric(whole), rows, sizes)


def test_the_way_of_fewer_operations_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    for way in ("_ghost", "_of_rows"):
        original = getattr(exact_gram, way)
        monkeypatch.setattr(exact_gram, way, lambda *given, w=way, f=original: taken.append(w) or f(*given))
    # Tokens N, samples B: N^2 (I + O) / 2 against O I (N + B^2 / 2), in hand-counted cases.
    for lengths, width, expected in (
        ((1, 1), 64, "_ghost"),  # 256 < 16384
        ((30, 30), 16, "_of_rows"),  # 57600 > 15872
        ((4, 4), 64, "_ghost"),  # 4096 < 40960
        ((40, 40), 64, "_of_rows"),  # 409600 > 335872
    ):
        case = outer(width, width, lengths=lengths)
        gram([(case.gradients, torch.arange(2))], 2, case.gradients.shape)
        assert taken.pop() == expected and not taken


def test_classes_that_meet_in_one_tensor() -> None:
    """Samples that took the fallback beside samples that did not; of a stack, one that touched other experts."""
    for first, second in (
        (outer(7, 6), dense(7, 6, seed=4)),
        (CASES["lookup"](0), dense(7, 6, seed=4)),
        (stacked({0: outer(7, 6)}, 2), dense(2, 7, 6, seed=4)),
        (stacked({0: outer(7, 6)}, 2), stacked({1: outer(7, 6, seed=4)}, 2)),
        (CASES["scaled"](0), dense(7, 6, seed=4)),
    ):
        both = [(first.gradients, torch.arange(BATCH)), (second.gradients, torch.arange(BATCH, 2 * BATCH))]
        rows, sizes = (
            torch.cat([getattr(one, what) for one in (first, second)]).flatten(1) for what in ("dense", "size")
        )
        assert_gram(gram(both, 2 * BATCH, first.gradients.shape), rows, sizes)


def test_embedding_whose_ids_all_meet(pieces: None) -> None:
    ids = torch.zeros(2 * BATCH, dtype=torch.int64)
    dy = torch.randn(2 * BATCH, 6, generator=torch.Generator().manual_seed(0))
    kept = [(LookupGradients(ids, dy, offsets_of((2,) * BATCH), 9), torch.arange(BATCH))]
    rows = dy.double().view(BATCH, 2, 6)
    assert_gram(gram(kept, BATCH, torch.Size((9, 6))), rows.sum(1), rows.abs().sum(1))


def test_blocks_of_ids_are_bounded_and_part_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exact_gram, "LOOKUP_ROWS", 4)
    ids = torch.tensor([1, 1, 2, 2, 5, 6, 6, 6, 6, 6, 6, 7, 9])
    found = [ids[block].tolist() for block in exact_gram._whole_ids(ids)]
    assert found == [[1, 1, 2, 2], [5], [6] * 6, [7, 9]]  # one id in more rows than that has a block of its own
    assert list(exact_gram._whole_ids(ids[:0])) == []


def test_no_gradient_anywhere() -> None:
    assert torch.equal(gram([], 3, torch.Size((4, 2))), torch.zeros(3, 3, dtype=torch.float64))
    found = tensor_gram("idle", torch.Size((2,)), [], [], 2, 3)
    assert found.forget.shape == (2, 2) and found.cross.shape == (3, 2) and found.retain.shape == (3, 3)
    assert found.retain_rows is not None and found.retain_rows.shape == (3, 2)
    assert not any(bool(part.any()) for part in (found.forget, found.cross, found.retain, found.retain_rows))


@settings(max_examples=30, deadline=None)
@given(make=st.sampled_from(["outer", "lookup", "tied", "vector", "stack of layers"]), order=st.permutations(range(6)))
def test_order_of_batches_and_of_samples_makes_no_difference(make: str, order: list[int]) -> None:
    kept, rows, sizes, count = kept_batches(make, batches=6)
    assert_gram(gram([kept[i] for i in order], count, kept[0][0].shape), rows, sizes)
    renamed = torch.randperm(count, generator=torch.Generator().manual_seed(order[0]))
    moved = gram([(gradients, renamed[where]) for gradients, where in kept], count, kept[0][0].shape)
    back = torch.empty_like(renamed)
    back[renamed] = torch.arange(count)
    assert_gram(moved, rows[back], sizes[back])


def test_parts_of_one_tensor() -> None:
    """Forget and retain samples come apart again; the same bits twice."""
    kept, rows, sizes, count = kept_batches("outer")
    forget, retain = kept[:1], kept[1:]
    forget = [(forget[0][0], torch.tensor([4, 0, 2, 5, 1]))]
    found = tensor_gram("w", torch.Size((7, 6)), forget, retain, 6, count)
    f = torch.zeros(6, 42, dtype=torch.float64)
    f[forget[0][1]] = forget_rows = rows[kept[0][1]]
    g = rows.clone()
    g[kept[0][1]] = 0.0
    bound = ROUNDINGS * ROUNDING * float(sizes.norm(dim=1).max()) ** 2
    assert (found.forget - f @ f.T).abs().max() <= bound
    assert (found.cross - g @ f.T).abs().max() <= bound
    assert (found.retain - g @ g.T).abs().max() <= bound
    assert float(forget_rows.norm()) > 0 and found.numel == 42
    assert found.retain_rows is None and found.forget_rows is None  # 42 entries, 17 samples
    again = tensor_gram("w", torch.Size((7, 6)), forget, retain, 6, count)
    assert all(torch.equal(getattr(found, part), getattr(again, part)) for part in ("forget", "cross", "retain"))


@pytest.mark.parametrize(("numel", "kept"), [(4, True), (5, True), (6, False)])
def test_gradients_themselves_where_they_are_no_longer_than_samples_are_many(numel: int, kept: bool) -> None:
    f, g = dense(numel, seed=1), dense(numel, seed=2)
    backwards = torch.arange(BATCH).flip(0)
    found = tensor_gram("b", torch.Size((numel,)), [(f.gradients, backwards)], [(g.gradients, backwards)], BATCH, BATCH)
    if kept:
        assert torch.equal(found.forget_rows, f.dense.flip(0)) and torch.equal(found.retain_rows, g.dense.flip(0))
    else:
        assert found.forget_rows is None and found.retain_rows is None


def test_gradients_of_float64_lose_nothing() -> None:
    case = outer(40, 30, lengths=(9,) * BATCH, dtype=torch.float64)
    rows = case.dense.flatten(1)
    for way in (exact_gram._of_rows([(case.gradients, torch.arange(BATCH))], BATCH, case.gradients.shape),
                exact_gram._ghost([(case.gradients, torch.arange(BATCH))], BATCH)):  # fmt: skip
        assert (way - rows @ rows.T).abs().max() <= 1e-13 * float(case.size.flatten(1).norm(dim=1).max()) ** 2


class TestWhatIsKept:
    """Only what is needed, and without the graph."""

    def test_views_of_larger_tensors_are_copied_out(self) -> None:
        fused = torch.randn(sum((3, 2)), 8)
        gradients = OuterGradients(fused[:, :4], fused[:, 4:], torch.tensor([0, 3, 5]))
        statistic = KeptGradients()
        statistic.observe("w", gradients, torch.arange(2))
        held = held_tensors(statistic.kept["w"][0][0])
        assert [t.untyped_storage().nbytes() for t in held] == [5 * 4 * 4] * 2
        assert torch.equal(held[0], fused[:, :4]) and torch.equal(held[1], fused[:, 4:])

    def test_whole_tensors_are_shared_between_tensors_of_the_model(self) -> None:
        grid = torch.randn(2, 3, 4, requires_grad=True) * 2.0
        statistic = KeptGradients()
        with torch.no_grad():
            x = grid.reshape(-1, 4)
            for name in ("q", "k"):
                statistic.observe(name, OuterGradients(x, torch.randn(6, 5), torch.tensor([0, 3, 6])), torch.arange(2))
        inputs = [held_tensors(statistic.kept[name][0][0])[0] for name in ("q", "k")]
        assert all(t.data_ptr() == grid.data_ptr() and t.grad_fn is None and t._base is None for t in inputs)

    def test_formed_gradients_hold_no_factors(self) -> None:
        case = outer()
        statistic = KeptGradients(formed=["w"])
        statistic.observe("w", case.gradients, torch.arange(BATCH))
        ((kept, where),) = statistic.take("w")
        assert isinstance(kept, DenseGradients) and kept.shape == case.gradients.shape
        assert bool(((kept.values - case.dense).abs() <= case.bound).all()) and torch.equal(where, torch.arange(BATCH))
        assert statistic.take("w") == [] and statistic.state() is None

    def test_inputs_are_unchanged(self) -> None:
        case: Case = outer()
        before = [t.clone() for t in held_tensors(case.gradients)]
        statistic = KeptGradients()
        statistic.observe("w", case.gradients, torch.arange(BATCH))
        gram(statistic.take("w"), BATCH, case.gradients.shape)
        assert all(torch.equal(a, b) for a, b in zip(before, held_tensors(case.gradients), strict=True))
