"""Every class of gradients against dense projections of its materialised gradients in float64."""

import math
from functools import cache
from types import SimpleNamespace

import fillm_kernels as fk
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fillm.capture import Capture, PerSampleGradients, SketchMap, sketching
from fillm.capture.combined import ScaledGradients, StackedGradients, SummedGradients, TiedGradients, combine
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients
from fillm.data import collate
from fillm.errors import UsageError
from tests.capture.projections import KINDS, sketched
from tests.capture.reference import reference_gradients, toy_samples
from tests.families import build_family

COUNT, DIM, SEED = 4, 32, 2**40 + 3
OFFSETS = torch.tensor([0, 5, 5, 6, 14])  # one sample is empty
ROWS, INPUTS, OUTPUTS = 14, 13, 11


def drawn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    # Rounded to bfloat16, so that every dtype holds the same numbers.
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16().to(dtype)


def outer(dtype: torch.dtype, seed: int = 0, transposed: bool = False) -> OuterGradients:
    x, dy = drawn(ROWS, INPUTS, dtype=dtype, seed=seed), drawn(ROWS, OUTPUTS, dtype=dtype, seed=seed + 1)
    return OuterGradients(x, dy, OFFSETS, transposed)


def lookup(dtype: torch.dtype) -> LookupGradients:
    ids = torch.randint(0, OUTPUTS, (ROWS,), generator=torch.Generator().manual_seed(5))
    ids[:3] = ids[3]  # the same token several times in a sample
    return LookupGradients(ids, drawn(ROWS, INPUTS, dtype=dtype, seed=6), OFFSETS, OUTPUTS)


def stacked(parts: dict[int, PerSampleGradients], *shape: int) -> StackedGradients:
    return StackedGradients(parts, torch.Size(shape), COUNT)


def dense(dtype: torch.dtype, *shape: int) -> DenseGradients:
    return DenseGradients(drawn(COUNT, *shape, dtype=dtype, seed=9))


CLASSES = {
    "outer": outer,
    "transposed": lambda dtype: outer(dtype, transposed=True),
    "lookup": lookup,
    "tied": lambda dtype: TiedGradients(lookup(dtype), outer(dtype), COUNT),
    "summed": lambda dtype: SummedGradients([dense(dtype, OUTPUTS, INPUTS), outer(dtype, 3)], COUNT),
    "called-twice": lambda dtype: combine([outer(dtype), outer(dtype, 7)], COUNT),
    "experts": lambda dtype: stacked({0: outer(dtype), 3: outer(dtype, 4)}, 5, OUTPUTS, INPUTS),
    "expert-biases": lambda dtype: stacked({1: dense(dtype, 13), 4: dense(dtype, 13)}, 6, 13),
    "scaled": lambda dtype: ScaledGradients(outer(dtype), 1 / 1024),
    "vector": lambda dtype: dense(dtype, 53),
    "matrix": lambda dtype: dense(dtype, OUTPUTS, INPUTS),
    "stack": lambda dtype: dense(dtype, 3, OUTPUTS, INPUTS),
    "stack-of-stacks": lambda dtype: dense(dtype, 2, 2, 5, 7),
    "small": lambda dtype: dense(dtype, 4, 8),
    "small-outer": lambda dtype: OuterGradients(drawn(ROWS, 4, dtype=dtype), drawn(ROWS, 8, dtype=dtype), OFFSETS),
    "small-lookup": lambda dtype: LookupGradients(torch.arange(ROWS) % 3, drawn(ROWS, 9, dtype=dtype), OFFSETS, 3),
    "small-experts": lambda dtype: stacked({1: dense(dtype, 2, 3), 3: dense(dtype, 2, 3)}, 4, 2, 3),
}


def map_of(kind: str, gradients: PerSampleGradients, dim: int = DIM, seed: int = SEED) -> SketchMap:
    return SketchMap.of(kind, dim, "model.weight", gradients.shape, seed)


def formed(gradients: PerSampleGradients) -> Tensor:
    return torch.stack([gradients.materialise(sample) for sample in range(COUNT)])


def assert_within(got: Tensor, want: Tensor, gradients: Tensor, roundoff: float) -> None:
    # A number of a sketch is a sum of at most 660 entries (of 14 tokens) with weights of at most 6, so off by no more
    # than (660 + 14) 6 roundings of the entries' sum of magnitudes; random signs leave far less than 128 of |g|. Parts
    # that cancel are larger than their sum: all here are random and add up to less than 4 |g|, or |g| is of order 1.
    bound = 512 * roundoff * (gradients.double().flatten(1).norm(dim=1) + 1)
    assert got.shape == want.shape and got.isfinite().all()
    assert bool(((got.double() - want).norm(dim=1) <= bound).all()), float(((got - want).norm(dim=1) / bound).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("kind", KINDS)
def test_every_class_gives_the_sketch_of_its_gradient(kind, name, dtype):
    gradients = CLASSES[name](dtype)
    to = map_of(kind, gradients)
    got = gradients.sketches(to)
    assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert got.shape == (COUNT, to.dim) and (to.kind == "exact") == name.startswith("small")
    exact = formed(CLASSES[name](torch.float64))
    roundoff = 2.0**-53 if dtype == torch.float64 else 2.0**-24
    assert_within(got, sketched(kind, DIM, "model.weight", exact, SEED), exact, roundoff)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8, deadline=None)
@given(st.floats(-3, 3), st.floats(-3, 3), st.integers(0, 2**63 - 1))
def test_a_sketch_is_linear_and_follows_the_seed(kind, a, b, seed):
    left, right = dense(torch.float64, OUTPUTS, INPUTS), outer(torch.float64)
    mixed = DenseGradients(a * left.values + b * formed(right))
    to = map_of(kind, left, seed=seed)
    assert to == map_of(kind, right, seed=seed)
    want = a * left.sketches(to) + b * right.sketches(to)
    assert_within(mixed.sketches(to), want, 3 * formed(left).abs() + 3 * formed(right).abs(), 2.0**-53)
    assert not torch.allclose(left.sketches(map_of(kind, left, seed=seed ^ 1)), left.sketches(to))


@pytest.mark.parametrize("name", ["outer", "lookup", "tied"])
@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=4, deadline=None)
@given(lengths=st.lists(st.integers(0, 9), min_size=1, max_size=4))
def test_a_sample_has_the_same_sketch_in_any_batch(kind, name, lengths):
    rows, offsets = sum(lengths), torch.tensor([0, *lengths]).cumsum(0)
    x, dy, ids = drawn(rows, INPUTS), drawn(rows, OUTPUTS, seed=1), torch.arange(rows) * 3 % OUTPUTS

    def batch(rows: slice, offsets: Tensor) -> PerSampleGradients:
        parts = OuterGradients(x[rows], dy[rows], offsets), LookupGradients(ids[rows], x[rows], offsets, OUTPUTS)
        return {"outer": parts[0], "lookup": parts[1], "tied": TiedGradients(*parts[::-1], offsets.numel() - 1)}[name]

    together = batch(slice(None), offsets)
    to = map_of(kind, together)
    sketches = together.sketches(to)
    exact = torch.stack([together.materialise(sample) for sample in range(len(lengths))])
    for sample, length in enumerate(lengths):
        own = slice(int(offsets[sample]), int(offsets[sample + 1]))
        alone = batch(own, torch.tensor([0, length])).sketches(to)
        # A batch of another size may take another way through the library's products and transforms.
        assert_within(alone, sketches[sample : sample + 1].double(), exact[sample : sample + 1], 2.0**-24)


@pytest.mark.parametrize("held", [1 << 22, 40 * DIM])
@pytest.mark.parametrize("kind", ["gaussian", "rademacher"])
def test_a_dense_sketch_of_many_tokens_takes_few_calls(kind, held, monkeypatch):
    """One call for every token of the vocabulary would be 117 of them."""
    calls = []

    def counted(g: Tensor, *given: object, **options: object) -> Tensor:
        calls.append(g.shape[0])
        return fk.sketch(g, *given, **options)

    monkeypatch.setattr(sketching, "fk", SimpleNamespace(sketch=counted))
    monkeypatch.setattr(sketching, "SKETCH_ENTRIES", held)
    generator = torch.Generator().manual_seed(3)
    ids, dy = torch.randint(0, 200, (180,), generator=generator), drawn(180, INPUTS)
    assert ids.unique().numel() == 117
    gradients = LookupGradients(ids, dy, torch.tensor([0, 60, 60, 61, 180]), 200)
    got, touched = gradients.sketches(map_of(kind, gradients)), gradients.grouped()[0].numel()
    assert sum(calls) == touched and len(calls) == -(-touched * DIM // held)
    exact = formed(LookupGradients(ids, dy.double(), gradients.offsets, 200))
    assert_within(got, sketched(kind, DIM, "model.weight", exact, SEED), exact, 2.0**-24)


@pytest.mark.parametrize("kind", ["factored", "factored-sjlt", "tensorsketch"])
def test_halves_are_independent_and_unbiased(kind):
    g, h = (DenseGradients(drawn(1, 12, 10, dtype=torch.float64, seed=seed)) for seed in (1, 2))
    h = DenseGradients(h.values + g.values)
    exact, seeds = float((g.values * h.values).sum()), 200
    first, second = [], []
    for seed in range(seeds):
        to = map_of(kind, g, 64, seed)
        products = math.sqrt(2) * g.sketches(to) * math.sqrt(2) * h.sketches(to)
        half = products.view(2, -1).sum(1)
        first.append(half[0])
        second.append(half[1])
    first, second = torch.stack(first), torch.stack(second)
    for half in (first, second, (first + second) / 2):
        assert abs(float(half.mean()) - exact) < 4.5 * float(half.std()) / math.sqrt(seeds)
    both = first * second  # unbiased for the square, which the square of one half is not
    assert abs(float(both.mean()) - exact**2) < 4.5 * float(both.std()) / math.sqrt(seeds)
    assert float(first.square().mean()) > exact**2 + float(first.var()) / 2
    correlation = float(torch.corrcoef(torch.stack([first, second]))[0, 1])
    assert abs(correlation) < 4.5 / math.sqrt(seeds)


def test_tensors_that_fit_stay_as_they_are():
    to = SketchMap.of("factored", 128, "norm", (16, 8), 0)
    assert (to.kind, to.dim, to.halves) == ("exact", 128, 1)
    g = dense(torch.float32, 16, 8)
    assert torch.equal(g.sketches(to), g.values.flatten(1))
    assert SketchMap.of("factored", 126, "norm", (16, 8), 0).kind == "factored"


def test_vectors_take_the_one_sided_sketch_of_the_family():
    kinds = {kind: SketchMap.of(kind, 32, "bias", (100,), 0) for kind in KINDS}
    assert all(to.halves == 1 for to in kinds.values())
    assert kinds["factored"].kind == "gaussian" and kinds["factored-sjlt"].kind == "sjlt"
    assert kinds["tensorsketch"].kind == "countsketch" and kinds["oporp"].kind == "oporp"


def test_a_half_is_the_factor_pair_nearest_to_a_square():
    dims = {2: (1, 1), 256: (8, 16), 512: (16, 16), 4096: (32, 64), 24: (3, 4), 8: (2, 2), 4: (1, 2)}
    for dim, sides in dims.items():
        assert SketchMap.of("factored-sjlt", dim, "w", (5000, 5000), 0).half_dims == sides
    assert SketchMap.of("tensorsketch", 26, "w", (50, 50), 0).half_dims == (13,)


@pytest.mark.parametrize(
    ("kind", "dim", "words"),
    [
        ("best", 64, "no compression 'best'; there are oporp"),
        ("oporp", 0, "from 1 to 2.30"),
        ("oporp", 2**31, "from 1 to 2.30"),
        ("tensorsketch", 63, "must be even"),
        ("factored", 26, "1 x 13.* such as 16, 32"),
        ("factored-sjlt", 2 * 5 * 31, "5 x 31"),
    ],
)
def test_what_has_no_map_is_refused_for_every_tensor(kind, dim, words):
    for shape in ((4,), (300, 300)):
        with pytest.raises(UsageError, match=words):
            SketchMap.of(kind, dim, "w", shape, 0)


@cache
def family(name: str) -> tuple:
    model, samples = build_family(name), toy_samples(3)
    return model, samples, reference_gradients(model, samples)


@pytest.mark.parametrize("kind", ["oporp", "factored-sjlt", "tensorsketch"])
@pytest.mark.parametrize("name", ["llama-tied", "mixtral"])
def test_sketches_of_a_captured_batch_are_those_of_autograds_gradients(name, kind):
    model, samples, references = family(name)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    maps = {name: SketchMap.of(kind, 64, name, shape, SEED) for name, shape in shapes.items()}
    seen: dict[str, Tensor] = {}

    def observe(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        rows = seen.setdefault(name, torch.zeros(len(samples), maps[name].dim))
        rows[positions] = gradients.sketches(maps[name])

    Capture(model, list(shapes)).run(collate(samples, [2, 0, 1]), samples, observe)
    for tensor, shape in shapes.items():
        exact = torch.stack([gradients[tensor] for gradients in references])
        want = sketched(kind, 64, tensor, exact, SEED)
        # What the layers between leave of float32 (the captures are held to 1e-5 of |g|), times the norm of the map,
        # which for these sizes is at most sqrt(numel).
        bound = 1e-5 * exact.flatten(1).norm(dim=1) * math.sqrt(shape.numel())
        errors = (seen[tensor].double() - want).norm(dim=1)
        assert bool((errors <= bound).all()), f"{tensor}: {float((errors / bound).max()):.2f}"
    assert any(to.kind == "exact" for to in maps.values())
