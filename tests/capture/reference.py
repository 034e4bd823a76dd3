"""Per-sample gradients in float64 from batch-1 autograd, and the comparison of a capture's answers with them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fillm.capture import Capture, PerSampleGradients
from fillm.data import Sample, SampleSet, collate


def toy_samples(count: int = 6, vocab: int = 90, seed: int = 0, shortest: int = 5, longest: int = 20) -> SampleSet:
    """Random token samples, a third of each a prompt that does not count."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for index in range(count):
        length = int(torch.randint(shortest, longest + 1, (1,), generator=generator))
        ids = torch.randint(3, vocab, (length,), generator=generator).tolist()
        prompt = length // 3 + 1
        samples.append(Sample(f"toy#{index}", tuple(ids), tuple([-100] * prompt + ids[prompt:])))
    return SampleSet(samples, "toy")


def sample_loss(model: nn.Module, sample: Sample) -> Tensor:
    """The definition: mean negative log-likelihood of the labelled tokens, one sequence, no mask, no padding."""
    logits = model(input_ids=torch.tensor([sample.input_ids]), use_cache=False).logits[0]
    terms = [
        -torch.log_softmax(logits[t - 1], dim=-1)[label]
        for t, label in enumerate(sample.labels)
        if t > 0 and label != -100
    ]
    return torch.stack(terms).mean()


def reference_gradients(model: nn.Module, samples: SampleSet) -> list[dict[str, Tensor]]:
    """Float64 gradient of every sample's own loss with respect to every parameter; zero where none arrives."""
    twin = copy.deepcopy(model).double().eval()
    twin.requires_grad_(True)
    names, parameters = zip(*twin.named_parameters(), strict=True)
    out = []
    for sample in samples:
        gradients = torch.autograd.grad(sample_loss(twin, sample), parameters, allow_unused=True)
        out.append(
            {
                name: torch.zeros_like(p) if g is None else g
                for name, p, g in zip(names, parameters, gradients, strict=True)
            }
        )
    return out


@dataclass
class Answer:
    """What was said of one sample's gradient of one tensor, all in float64."""

    gradient: Tensor
    squared_norm: float
    dot: float
    rows: Tensor
    columns: Tensor


@dataclass
class Answers:
    """What a capture said of a whole sample set."""

    of: dict[tuple[str, int], Answer]
    weighted: dict[str, Tensor]
    plain: dict[str, Tensor]
    losses: dict[int, float]


def directions(model: nn.Module) -> dict[str, Tensor]:
    """A random tensor `v` of every parameter's shape."""
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(p.shape, generator=generator).to(p.dtype) for name, p in model.named_parameters()}


def sample_weights(count: int) -> Tensor:
    """Random weights of both signs, float64."""
    return torch.randn(count, generator=torch.Generator().manual_seed(4), dtype=torch.float64)


def ask(
    capture: Capture, samples: SampleSet, batches: Sequence[Sequence[int]], layout: str, v: dict[str, Tensor]
) -> Answers:
    """Runs the batches and asks every question of every tensor; no (tensor, sample) may come by twice."""
    answers = Answers({}, {}, {}, {})
    weights = sample_weights(len(samples))

    def observe(name: str, gradients: PerSampleGradients, positions: Tensor) -> None:
        q, d = gradients.squared_norms(), gradients.dots(v[name])
        rows, columns = gradients.axis_dots(v[name], 0), gradients.axis_dots(v[name], 1)
        for batch_row, position in enumerate(positions.tolist()):
            assert (name, position) not in answers.of, f"{name} of sample {position} came by twice"
            answers.of[name, position] = Answer(
                gradients.materialise(batch_row).double().clone(),
                float(q[batch_row]),
                float(d[batch_row]),
                rows[batch_row].clone(),
                columns[batch_row].clone(),
            )
        for totals, w in ((answers.weighted, weights[positions]), (answers.plain, None)):
            total = totals.setdefault(name, torch.zeros_like(v[name]))
            gradients.add_weighted_(total, w, alpha=0.5)

    for members in batches:
        losses = capture.run(collate(samples, members, layout), samples, observe)
        answers.losses |= dict(zip(members, losses.tolist(), strict=True))
    return answers


def assert_exact(
    model: nn.Module,
    references: list[dict[str, Tensor]],
    answers: Answers,
    v: dict[str, Tensor],
    tolerance: float = 1e-5,
    zero: Sequence[str] = (),
) -> None:
    """Every answer equals the float64 reference.

    Errors are measured against what float32 can promise: a sum's rounding is in proportion to `|g|` and `|g| |v|`.
    `tolerance` leaves room for the layers in between. Tensors in `zero` have no gradient in exact arithmetic, and must
    be zero to the bit.
    """
    weights = sample_weights(len(references))
    for name, _ in model.named_parameters():
        wide = v[name].double()
        scale = float(torch.stack([g[name].norm() for g in references]).norm())
        for position, gradients in enumerate(references):
            g, where = gradients[name], f"{name}, sample {position}"
            answer = answers.of.get((name, position))
            if answer is None:
                assert not g.any(), f"{where}: missing"
                continue
            if name in zero:
                assert float(g.norm()) < 1e-6 and not answer.gradient.any(), where
                assert answer.squared_norm == 0.0 and answer.dot == 0.0, where
                assert not answer.rows.any() and not answer.columns.any(), where
                continue
            norm = float(g.norm())
            bound = tolerance * norm * float(wide.norm())
            assert float((answer.gradient - g).norm()) <= tolerance * norm, where
            assert abs(answer.squared_norm - norm**2) <= 2 * tolerance * norm**2, where
            assert abs(answer.dot - float((g * wide).sum())) <= bound, where
            rows, columns = axis_dots(g, wide)
            assert answer.rows.shape == rows.shape and answer.columns.shape == columns.shape, where
            assert float((answer.rows - rows).norm()) <= bound, where
            assert float((answer.columns - columns).norm()) <= bound, where
        if name in answers.weighted and name not in zero:
            pairs = list(zip(weights.tolist(), references, strict=True))
            expected = 0.5 * sum(w * g[name] for w, g in pairs)
            assert float((answers.weighted[name] - expected).norm()) <= tolerance * 3 * scale, name
            expected = 0.5 * sum(g[name] for g in references)
            assert float((answers.plain[name] - expected).norm()) <= tolerance * 3 * scale, name


def axis_dots(g: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Row dots (leading dimensions flattened) and column dots of two tensors; a vector's entries for both."""
    product = g * v
    if product.ndim == 1:
        return product, product
    product = product.reshape(-1, product.shape[-1])
    return product.sum(1), product.sum(0)
