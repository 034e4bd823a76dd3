"""The check that precedes a run can fail: broken rules, models the rules misread, samples not kept apart."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fillm.capture import Capture, verify
from fillm.capture.boundaries import LookupBoundary
from fillm.capture.gradients import DenseGradients, LookupGradients, OuterGradients
from fillm.capture.rules import Rules
from fillm.data import Sample, SampleSet, collate
from fillm.errors import UsageError
from tests.capture import small_models
from tests.capture.reference import ask, assert_exact, directions, reference_gradients, toy_samples
from tests.capture.small_models import HIDDEN, VOCAB, SmallLM, small_model
from tests.families import build_family

SAMPLES = toy_samples()


def everything(model: nn.Module) -> Capture:
    return Capture(model, [name for name, _ in model.named_parameters()])


@pytest.mark.parametrize(
    ("carrier", "victims"),
    [
        (OuterGradients, {"model.layers.0.mlp.up_proj.weight", "lm_head.weight"}),
        (LookupGradients, {"model.embed_tokens.weight"}),
        (DenseGradients, {"model.norm.weight", "model.layers.1.self_attn.q_proj.bias"}),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_off_by_a_tenth_are_caught(
    monkeypatch: pytest.MonkeyPatch, carrier: type, victims: set[str], dtype: torch.dtype
) -> None:
    factor = 1.1 if dtype == torch.float32 else 1.5  # half precision cannot tell a tenth from its own rounding
    right = carrier.materialise
    monkeypatch.setattr(carrier, "materialise", lambda self, sample: factor * right(self, sample))
    capture = everything(build_family("qwen2", dtype=dtype))
    found = verify(capture, SAMPLES)
    assert victims <= set(capture.fallback)
    for name in capture.fallback:
        assert found.error[name] == pytest.approx(factor - 1.0, abs=0.05)
        assert capture.fallback[name].startswith("rules differ from autograd by ")


def test_broken_rule_is_replaced_by_the_exact_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that scales what it sees: the run's answers are right all the same."""
    right = Rules.affine

    def wrong(self: Rules, *args: object, **kwargs: object) -> object:
        return 1.1 * right(self, *args, **kwargs)

    monkeypatch.setattr(Rules, "affine", wrong)
    model = build_family("llama")
    capture, v = everything(model), directions(model)
    verify(capture, SAMPLES)
    assert "model.layers.0.mlp.up_proj.weight" in capture.fallback
    answers = ask(capture, SAMPLES, [[0, 1, 2], [3, 4, 5]], "right", v)
    assert_exact(model, reference_gradients(model, SAMPLES), answers, v, tolerance=2e-5)


def test_lost_gradient_of_an_activation_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """The embedding's boundary reports its ids shifted by one: only the embedding is wrong, and only it is replaced."""
    right = LookupBoundary.forward

    def wrong(ctx: object, anchor: Tensor, ids: Tensor, weight: Tensor, site: Callable[..., None]) -> Tensor:
        return right(ctx, anchor, ids, weight, lambda ids, dy: site(ids.roll(1), dy))

    monkeypatch.setattr(LookupBoundary, "forward", staticmethod(wrong))
    capture = everything(build_family("llama"))
    verify(capture, SAMPLES)
    assert set(capture.fallback) == {"model.embed_tokens.weight"}


@pytest.mark.parametrize("count", [2, 3, 4, 6])
def test_samples_that_are_not_kept_apart_are_caught_however_few(count: int) -> None:
    """Packed, OPT counts positions over all samples together."""
    model = build_family("opt")
    with pytest.raises(UsageError, match="does not keep samples apart"):
        verify(everything(model), toy_samples(count), "packed")


class IgnoresPadding(SmallLM):
    """Sums what stands before a token, padding included: right padding is harmless, left padding is not."""

    def forward(
        self,
        input_ids: Tensor,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> object:
        return super().forward(input_ids)


@pytest.mark.parametrize("lengths", [(6, 6, 6, 6, 14), (6, 14), (6, 8, 14, 14)])
def test_padding_that_reaches_a_sample_is_caught_whatever_the_lengths(lengths: tuple[int, ...]) -> None:
    model = small_model(small_models.NormsAndBiases())
    model.__class__ = IgnoresPadding
    pool = toy_samples(len(lengths), vocab=VOCAB, shortest=14, longest=14)
    samples = SampleSet(
        [Sample(s.id, s.input_ids[:n], s.labels[:n]) for s, n in zip(pool, lengths, strict=True)], "toy"
    )
    with pytest.raises(UsageError, match="--layout left: sample toy#"):
        verify(everything(model), samples, "left")
    capture = everything(model)
    verify(capture, samples, "right")
    assert capture.fallback == {}


class LooksAtTheOthers(SmallLM):
    """Subtracts the mean over the batch: no sample's gradient is its own."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        out = super().forward(input_ids)
        out.logits = out.logits - 0.5 * out.logits.mean(0, keepdim=True)
        return out


def test_model_that_mixes_samples_runs_one_by_one() -> None:
    model = small_model(small_models.CalledTwice())
    model.__class__ = LooksAtTheOthers
    samples, capture = toy_samples(vocab=VOCAB), everything(model)
    verify(capture, samples)
    assert capture.fallback == {} and "alone and" in capture.alone
    v = directions(model)
    answers = ask(capture, samples, [[0, 1, 2, 3], [4, 5]], "right", v)
    assert_exact(model, reference_gradients(model, samples), answers, v)


def test_a_capture_like_another_knows_that_samples_run_one_by_one() -> None:
    model = small_model(small_models.CalledTwice())
    model.__class__ = LooksAtTheOthers
    samples, capture = toy_samples(vocab=VOCAB), everything(model)
    verify(capture, samples)
    met: list[list[int]] = []
    some = capture.like(["body.linear.weight"])
    some.run(collate(samples, [3, 1]), samples, lambda name, g, positions: met.append(positions.tolist()))
    assert met == [[3], [1]]


class CutInTraining(nn.Module):
    """Cuts a gradient off only where somebody asks for it: without the parameter's flag, it looks like any scale."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(HIDDEN))

    def forward(self, h: Tensor) -> Tensor:
        return h * (self.scale.detach() if self.scale.requires_grad else self.scale)


def test_gradient_that_autograd_does_not_know_is_caught() -> None:
    model, samples = small_model(CutInTraining()), toy_samples(vocab=VOCAB)
    capture = everything(model)
    assert verify(capture, samples).unreached == {"body.scale"}
    assert capture.fallback == {"body.scale": "rules find a gradient where autograd has none"}


class Experts(nn.Module):
    """A mixture that hands each expert its own tokens, gathered: their number is no sign of whose they are."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(3))

    def choice(self, h: Tensor) -> Tensor:
        """Tokens of large and small first entry go to expert 0 and 1; expert 2 gets one token a sample at most."""
        chosen = (h[..., 0] > 0).long()
        return chosen.index_put((torch.arange(len(h)), torch.full((len(h),), h.shape[1] // 2)), torch.tensor(2))

    def forward(self, h: Tensor) -> Tensor:
        flat, chosen = h.reshape(-1, HIDDEN), self.choice(h).reshape(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            where = (chosen == index).nonzero().squeeze(1)
            if where.numel():
                out = out.index_add(0, where, torch.tanh(expert(flat[where])))
        return out.view_as(h)


def test_routed_tokens_of_a_list_of_experts_are_exact() -> None:
    model, samples = small_model(Experts()), toy_samples(vocab=VOCAB)
    capture, v = everything(model), directions(model)
    verify(capture, samples)
    answers = ask(capture, samples, [[0, 1, 2, 3], [4, 5]], "right", v)
    assert_exact(model, reference_gradients(model, samples), answers, v)


class WithIds(SmallLM):
    """Lets the body see the token ids."""

    def forward(self, input_ids: Tensor, use_cache: bool = False) -> object:
        self.body.ids = input_ids
        return super().forward(input_ids)


class RareWord(Experts):
    """Expert 2 sees the tokens of one word alone."""

    WORD = VOCAB - 1

    def choice(self, h: Tensor) -> Tensor:
        return torch.where(self.ids == self.WORD, 2, (h[..., 0] > 0).long())


def test_expert_that_verification_never_saw_is_exact_when_it_comes() -> None:
    """Three tokens in a batch of three samples, all in one sample: as many rows as samples, but not one each."""
    model = small_model(RareWord())
    model.__class__ = WithIds
    pool = toy_samples(8, vocab=VOCAB - 2)
    rare = RareWord.WORD
    last = pool[7]
    ids = (*last.input_ids[:2], rare, rare, rare, *last.input_ids[2:])
    samples = SampleSet([*pool[:7], Sample(last.id, ids, (-100, *ids[1:]))], "toy")
    capture, v = everything(model), directions(model)
    assert verify(capture, samples).unreached == {"body.experts.2.weight", "body.experts.2.bias"}
    answers = ask(capture, samples, [[0, 1, 2, 3, 4], [7, 5, 6]], "right", v)
    assert_exact(model, reference_gradients(model, samples), answers, v)


class ScaledTable(nn.Module):
    """Fixed positions times a learned vector: a constant of the model as large, by chance, as the batch."""

    def __init__(self, rows: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(HIDDEN))
        angles = torch.arange(rows)[:, None] / (1.0 + torch.arange(HIDDEN))
        self.register_buffer("table", angles.sin())

    def forward(self, h: Tensor) -> Tensor:
        return torch.tanh(h + (self.table * self.scale)[: h.shape[1]])


class ScaledSinusoids(ScaledTable):
    """The same, made anew in every forward."""

    def forward(self, h: Tensor) -> Tensor:
        angles = torch.arange(h.shape[1])[:, None] / (1.0 + torch.arange(HIDDEN))
        return torch.tanh(h + angles.sin() * self.scale)


@pytest.mark.parametrize(
    "body",
    [lambda: ScaledTable(64), lambda: ScaledTable(8), lambda: ScaledSinusoids(8)],
    ids=["as many rows as tokens", "as many rows as samples", "made anew"],
)
def test_constant_of_the_batchs_own_size_is_no_activation(body: Callable[[], nn.Module]) -> None:
    model = small_model(body())
    samples = toy_samples(8, VOCAB, 5, 8, 8)
    capture, v = everything(model), directions(model)
    verify(capture, samples)
    answers = ask(capture, samples, [list(range(8))], "right", v)  # 8 samples of 8 tokens
    assert_exact(model, reference_gradients(model, samples), answers, v)
    assert capture.fallback == {}
