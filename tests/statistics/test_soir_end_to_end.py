"""`rank_soir` on whole models against method.md (1) to (3) in float64; memory that runs out; bad numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fillm.capture import Capture, verify
from fillm.data import Sample, SampleSet
from fillm.errors import NumericsError, OutOfMemoryError
from fillm.rank.console import Console
from fillm.rank.passes import Passes
from fillm.rank.soir import Influence, rank_soir
from tests.capture import small_models
from tests.capture.reference import reference_gradients, toy_samples
from tests.capture.small_models import HIDDEN, VOCAB, SmallLM, small_model
from tests.families import build_family

DAMPING, TOLERANCE = 0.1, 1e-3


class Exact:
    """Equations (1) to (3) from all gradients at once."""

    def __init__(self, model: nn.Module, forget: SampleSet, retain: SampleSet) -> None:
        self.u: dict[str, Tensor] = {}
        self.lambda_: dict[str, float] = {}
        f, g = reference_gradients(model, forget), reference_gradients(model, retain)
        for name in f[0]:
            v = sum(one[name] for one in f) / len(f)
            q = [float(one[name].square().sum()) for one in g]
            lambda_ = self.lambda_[name] = DAMPING * sum(q) / len(g) / v.numel()
            u = torch.zeros_like(v)
            if lambda_ > 0:
                for one, norm in zip(g, q, strict=True):
                    u -= (v - one[name] * float((one[name] * v).sum()) / (lambda_ + norm)) / (len(g) * lambda_)
            self.u[name] = u


def mixed_scale_samples(model: nn.Module, samples: SampleSet) -> SampleSet:
    """Every other sample continued by what the model itself expects, so that its loss and gradient are small."""
    out = []
    for index, sample in enumerate(samples):
        ids = list(sample.input_ids)
        if index % 2:
            with torch.no_grad():
                for t in range(2, len(ids)):
                    ids[t] = int(model(input_ids=torch.tensor([ids[:t]])).logits[0, -1].argmax())
            out.append(Sample(sample.id, tuple(ids), (-100, -100, *ids[2:])))
        else:
            out.append(sample)
    return SampleSet(out, "mixed")


def sharpened(model: nn.Module) -> nn.Module:
    """A head so steep that the model is certain of what it predicts."""
    head = model.get_output_embeddings().weight
    head.data = head.data * 80.0
    return model


def rank(
    model: nn.Module,
    forget: SampleSet,
    retain: SampleSet,
    need_update: bool = False,
    tokens_per_batch: int = 96,
    wrap: Callable[[Capture], None] = lambda capture: None,
) -> Influence:
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    verify(capture, retain)
    wrap(capture)
    passes = Passes(Console.silent(), tokens_per_batch=tokens_per_batch)
    return rank_soir(
        passes, capture, forget, retain, damping=DAMPING, tolerance=TOLERANCE, need_update=need_update
    )  # fmt: skip


def assert_certified(found: Influence, exact: Exact) -> None:
    assert found.low.keys() == exact.u.keys()
    for name, u in exact.u.items():
        low, high, score = found.low[name], found.high[name], float(u.norm())
        assert found.lambda_[name] == pytest.approx(exact.lambda_[name], rel=1e-5), name
        if low < high:
            assert low <= score <= high and high - low <= TOLERANCE * score * 1.001, name
        assert (low + high) / 2 == pytest.approx(score, rel=TOLERANCE), name
    middle = {name: (found.low[name] + found.high[name]) / 2 for name in exact.u}
    ranked, right = (sorted(s, key=lambda n: -s[n]) for s in (middle, {n: float(u.norm()) for n, u in exact.u.items()}))
    for here, there in zip(ranked, right, strict=True):
        assert middle[here] == pytest.approx(float(exact.u[there].norm()), rel=TOLERANCE)


@pytest.fixture(scope="module", params=["llama", "llama-tied", "gpt2", "mixtral"])
def case(request: pytest.FixtureRequest) -> tuple[nn.Module, SampleSet, SampleSet, Exact]:
    model = build_family(request.param)
    forget, retain = toy_samples(4, seed=1), toy_samples(40, seed=2)
    return model, forget, retain, Exact(model, forget, retain)


def test_certified_scores(case: tuple[nn.Module, SampleSet, SampleSet, Exact]) -> None:
    model, forget, retain, exact = case
    assert_certified(rank(model, forget, retain), exact)


def test_update(case: tuple[nn.Module, SampleSet, SampleSet, Exact]) -> None:
    model, forget, retain, exact = case
    found = rank(model, forget, retain, need_update=True)
    assert found.update.keys() == exact.u.keys()
    for name, u in exact.u.items():
        assert float((found.update[name].double() - u).norm()) <= 1e-5 * float(u.norm()), name
        assert found.low[name] == found.high[name] == pytest.approx(float(u.norm()), rel=1e-5)
        v = found.forget_mean[name].double()
        assert found.gain[name] == pytest.approx(-float((v * u).sum()), rel=1e-4)


def test_memorised_samples_are_visited_again() -> None:
    model = sharpened(build_family("llama"))
    forget, retain = toy_samples(4, seed=1), mixed_scale_samples(model, toy_samples(24, seed=2))
    norms = torch.tensor([float(g["model.norm.weight"].norm()) for g in reference_gradients(model, retain)])
    assert float(norms[1::2].median()) < 0.05 * float(norms[::2].median())
    assert float(norms.min()) < 1e-3 * float(norms[::2].median())
    exact = Exact(model, forget, retain)
    found = rank(model, forget, retain, need_update=True)
    assert found.visited_again > 0
    for name, u in exact.u.items():
        assert float((found.update[name].double() - u).norm()) <= 1e-5 * float(u.norm()), name
    assert_certified(rank(model, forget, retain), exact)


def test_tensors_without_curvature_are_noted() -> None:
    model = small_model(small_models.Unused())
    found = rank(model, toy_samples(3, VOCAB, 1), toy_samples(8, VOCAB, 2))
    assert found.notes == dict.fromkeys(("body.idle", "body.cut", "body.frozen"), "unused")
    assert all(found.low[name] == found.high[name] == 0.0 for name in found.notes)


def test_word_that_only_the_forget_set_moves_is_unbounded() -> None:
    model = small_model(ByWord())
    model.__class__ = KnowsIds
    forget = _with_word(toy_samples(3, VOCAB - 1, 1))
    found = rank(model, forget, toy_samples(8, VOCAB - 1, 2))
    assert found.notes == {"body.scale": "no retain gradient"}
    assert found.low["body.scale"] == found.high["body.scale"] == float("inf")


WORD = VOCAB - 1


class KnowsIds(SmallLM):
    """Lets the body see the token ids."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:
        self.body.ids = input_ids
        return super().forward(input_ids)


class ByWord(nn.Module):
    """A scale that one word alone makes use of."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale * (self.ids == WORD)[..., None].float()


class RootByWord(nn.Module):
    """The root of zero, at one word alone: a finite loss with an infinite gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        there = (self.ids != WORD)[..., None].float()
        return (h.square() * self.scale.square() * there).sqrt()


class LogByWord(RootByWord):
    """Not a number, at one word alone."""

    def forward(self, h: Tensor) -> Tensor:
        return h * self.scale * torch.log((self.ids != WORD)[..., None].float() * 2 - 1)


def _with_word(samples: SampleSet) -> SampleSet:
    """The last sample gets the word as its third token."""
    *others, last = samples
    ids = (*last.input_ids[:2], WORD, *last.input_ids[3:])
    return SampleSet([*others, Sample(last.id, ids, (-100, *ids[1:]))], samples.source)


def bad_model(body: nn.Module) -> nn.Module:
    model = small_model(body)
    model.__class__ = KnowsIds
    return model


@pytest.mark.parametrize("where", ["forget", "retain"])
def test_loss_that_is_no_number_names_the_sample(where: str) -> None:
    sets = {"forget": toy_samples(6, WORD, 1), "retain": toy_samples(9, WORD, 2)}
    sets[where] = _with_word(sets[where])
    sample = sets[where][-1].id
    with pytest.raises(NumericsError, match=rf"^the loss of sample {sample} is nan$"):
        capture_rank(bad_model(LogByWord()), sets)


@pytest.mark.parametrize("where", ["forget", "retain"])
def test_infinite_gradient_names_sample_and_tensor(where: str) -> None:
    sets = {"forget": toy_samples(6, WORD, 1), "retain": toy_samples(9, WORD, 2)}
    sets[where] = _with_word(sets[where])
    with pytest.raises(NumericsError) as caught:
        capture_rank(bad_model(RootByWord()), sets)
    message = str(caught.value)
    assert f"sample {sets[where][-1].id} " in message and message.endswith("is not finite") and "\n" not in message
    assert any(name in message for name in ("embed.weight", "body.scale"))


def capture_rank(model: nn.Module, sets: dict[str, SampleSet]) -> Influence:
    """Without the verification, which would look at such a sample first."""
    capture = Capture(model, [name for name, _ in model.named_parameters()])
    passes = Passes(Console.silent(), tokens_per_batch=64)
    return rank_soir(passes, capture, **sets, damping=DAMPING, tolerance=TOLERANCE, need_update=False)


class FullMemory:
    """Makes `capture.run` fail as an allocator does, above a batch size, before or after some tensors came by."""

    def __init__(self, capture: Capture, most: int, after: int) -> None:
        self.run, self.most, self.after, self.failures, self.sizes = capture.run, most, after, 0, []

    def __call__(self, batch: Any, samples: SampleSet, observe: Callable[..., None]) -> Tensor:
        self.sizes.append(len(batch.indices))
        seen = 0

        def limited(*args: Any) -> None:
            nonlocal seen
            if len(batch.indices) > self.most and seen >= self.after:
                self.failures += 1
                raise RuntimeError(
                    "[enforce fail at alloc_cpu.cpp:117] not enough memory: you tried to allocate 8 bytes"
                )
            seen += 1
            observe(*args)

        return self.run(batch, samples, limited)


@pytest.mark.parametrize("need_update", [False, True])
@pytest.mark.parametrize(("most", "after"), [(4, 0), (2, 5), (1, 12), (3, 20)])
def test_batches_are_halved_when_memory_runs_out(most: int, after: int, need_update: bool) -> None:
    model = build_family("llama")
    forget, retain = toy_samples(6, seed=1), toy_samples(12, seed=2)
    full: list[FullMemory] = []

    def wrap(capture: Capture) -> None:
        full.append(FullMemory(capture, most, after))
        capture.run = full[0]  # the forget and retain passes; the follow-up has a capture of its own

    plain = rank(model, forget, retain, need_update, tokens_per_batch=200)
    found = rank(model, forget, retain, need_update, tokens_per_batch=200, wrap=wrap)
    # Once memory has run out, later batches are cut before they are tried.
    assert 1 <= full[0].failures <= 3 and max(full[0].sizes) > most and full[0].sizes[-1] <= most
    for name, low in plain.low.items():
        assert found.low[name] == pytest.approx(low, rel=1e-5) and found.high[name] == pytest.approx(
            plain.high[name], rel=1e-5
        )
        if need_update:
            assert float((found.update[name] - plain.update[name]).norm()) <= 1e-5 * float(plain.update[name].norm())


def test_a_sample_that_does_not_fit_alone() -> None:
    model = build_family("llama")
    forget, retain = toy_samples(3, seed=1), toy_samples(4, seed=2)

    def wrap(capture: Capture) -> None:
        capture.run = FullMemory(capture, 0, 2)

    with pytest.raises(OutOfMemoryError, match=r"1 sample\(s\) of up to \d+ tokens; give --max-length") as caught:
        rank(model, forget, retain, wrap=wrap)
    assert "\n" not in str(caught.value)


def test_other_errors_of_the_runtime_are_not_taken_for_memory() -> None:
    def wrap(capture: Capture) -> None:
        def run(*_: Any) -> Tensor:
            raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

        capture.run = run

    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        rank(build_family("llama"), toy_samples(3), toy_samples(3, seed=1), wrap=wrap)
