"""What `--compression auto` measures before it chooses: how alike some samples' gradients are, tensor by tensor.

A few samples' exact inner products stand for those of all: their mean squares are what the noise of (9) in
docs/method.md depends on, and do not change with the number of samples. Of the true inverse, which fits all of them at
once, the part that is explained is taken to go on growing as it grew among those few.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from fillm.capture import Capture, SketchMap
from fillm.data import SampleSet
from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.console import Console
from fillm.rank.gram_passes import exact_grams
from fillm.rank.gram_sources import needs_mean, products_of_gram
from fillm.rank.machine import free_memory
from fillm.rank.passes import Passes
from fillm.statistics import (
    BAR,
    LEAST_SPREAD,
    UNEVEN,
    DenseGram,
    GradientSketches,
    InnerProducts,
    RowsGram,
    TensorGram,
    Together,
    curved_step,
    measured_noise,
)

MOST_FORGET, MOST_RETAIN = 8, 16  # samples
MOST_TENSORS = 32
PROBED_DIMS = (256, 4096)  # of the two-sided kind, whose noise is a power of the size between them
MOST_EXPLAINED = 0.95  # of v, that an extrapolation may say
FACTORED = "factored-sjlt"


@dataclass(frozen=True)
class Alikeness:
    """One tensor's gradients, all lengths 1; one column for every right-hand side `v`, float64.

    Attributes:
        numel: `P_l`.
        pairs: mean square cosine of two retain gradients.
        own, crossed: mean of `y_i^2`, and of `y_i y_j <g_i, g_j>` of different samples, with
            `y_i = 2 d_i - mean_j d_j <g_i, g_j>`: the slope of DataInf's `x`, [m].
        explained: `x` by DataInf's formula, [m].
        fitted, growth: `x` of the true inverse of all samples probed, and the power of their number that it grows by.
        probed: number of retain samples.
        factored_noise: variance of an inner product in a `FACTORED` sketch at each of `PROBED_DIMS`; 0 where the
            tensor has no more entries.
    """

    numel: int
    pairs: float
    own: Tensor
    crossed: Tensor
    explained: Tensor
    fitted: Tensor
    growth: Tensor
    probed: int
    factored_noise: tuple[float, ...]

    def noise(self, kind: str, dim: int) -> float:
        """`nu` of a sketch of `dim` numbers."""
        if kind != FACTORED:
            return 1.0 / dim
        (small, large), (least, most) = self.factored_noise, PROBED_DIMS
        power = math.log(small / large) / math.log(most / least) if large > 0 and small > 0 else 1.0
        return small * (least / dim) ** min(max(power, 0.5), 1.0)

    def correction(self, retain: int, curvature: str) -> Tensor:
        """`x` to be expected with `retain` samples, [m]."""
        if curvature == "woodbury":
            return (self.fitted * (retain / self.probed) ** self.growth).clamp(max=MOST_EXPLAINED)
        return self.explained

    def bars(self, kind: str, dim: int, retain: int, curvature: str, spread: Tensor) -> Tensor:
        """The relative error bars of a score to be expected with `retain` samples, [m]; 1 where sketches say nothing.

        (9) of docs/method.md, and what all tensors together know of one's `x`, whose `spread` over them is [m].
        """
        noise, n, x = self.noise(kind, dim), max(1, retain), self.correction(retain, curvature)
        if curvature == "woodbury":
            pairs, slope, share = float(n), x, n * noise
        else:
            own = 1.0 / n
            pairs = 4.0 * (own + (1.0 - own) * self.pairs)
            slope, share = (own * self.own + (1.0 - own) * self.crossed).clamp(min=0.0), 2.0 * noise
        if share >= 1.0:
            return torch.ones_like(x)
        variance = (2.0 * noise**2 * pairs + 4.0 * noise * slope) * (1.0 - x).square() / (1.0 - share)
        if kind == FACTORED:
            variance = UNEVEN**2 * variance + (0.5 * share**2) ** 2
        known = spread.square()
        error = (variance * known / (variance + known).clamp(min=torch.finfo(torch.float64).tiny)).sqrt()
        return (0.5 * BAR * error / (1.0 - x)).clamp(max=1.0)


def probe(
    config: RankConfig, capture: Capture, scope: Sequence[TensorInfo], forget: SampleSet, retain: SampleSet
) -> list[Alikeness]:
    """Measures up to `MOST_TENSORS` tensors on up to `MOST_FORGET` and `MOST_RETAIN` samples, evenly over each.

    Raises:
        FillmError: as the passes of the run itself would.
    """
    sizable = [info for info in scope if info.numel > PROBED_DIMS[0]]
    infos = [sizable[i] for i in _evenly(len(sizable), MOST_TENSORS)]
    few = [some.subset(_evenly(len(some), most)) for some, most in ((forget, MOST_FORGET), (retain, MOST_RETAIN))]
    if not infos or not all(few):
        return []
    restricted = capture.like([info.name for info in infos])
    # One by one: whether samples may share a batch is found out later.
    passes = Passes(Console.silent(), config.layout, tokens_per_batch=1)
    noises = _factored_noise(config, restricted, infos, few[1], passes)
    count = len(forget) if needs_mean(config.canonical_method) else None
    grams = exact_grams(passes, restricted, *few, free_memory() // 2)
    return [
        _alikeness(gram, config.damping, count, noises[gram.name])
        for gram in grams
        if bool(gram.retain.any()) and bool(gram.forget.any())
    ]


def expected_bar(found: Sequence[Alikeness], kind: str, dim: int, retain: int, curvature: str) -> float:
    """The median over tensors and right-hand sides, of those that are sketched; 0 where none is."""
    sketched = [one for one in found if one.numel > dim]
    if not sketched:
        return 0.0
    x = torch.stack([one.correction(retain, curvature) for one in sketched])
    spread = torch.maximum(x.std(0, correction=0), LEAST_SPREAD * x.mean(0))
    return float(torch.cat([one.bars(kind, dim, retain, curvature, spread) for one in sketched]).median())


def _evenly(count: int, most: int) -> list[int]:
    return sorted({round(i) for i in torch.linspace(0, count - 1, min(count, most), dtype=torch.float64).tolist()})


def _factored_noise(
    config: RankConfig, capture: Capture, infos: Sequence[TensorInfo], retain: SampleSet, passes: Passes
) -> dict[str, tuple[float, ...]]:
    sketches = {}
    for dim in PROBED_DIMS:
        maps = {info.name: SketchMap.of(FACTORED, dim, info.name, info.shape, config.seed) for info in infos}
        sketches[str(dim)] = GradientSketches(maps, len(retain))
    passes.run("probe", "probe", capture, retain, Together(sketches))
    out = {}
    for info in infos:
        noises = []
        for dim, some in zip(PROBED_DIMS, sketches.values(), strict=True):
            rows, q = some.sketches(info.name), some.q[info.name]
            lengths = rows.double().square().sum(1)
            scale = torch.where(lengths > 0, (q / lengths).sqrt(), 0.0)
            measured = measured_noise(RowsGram(rows, scale), q) if info.numel > dim else 0.0
            noises.append(1.0 / dim if measured is None else measured)
        out[info.name] = tuple(noises)
    return out


def _alikeness(gram: TensorGram, damping: float, count: int | None, noises: tuple[float, ...]) -> Alikeness:
    """Of every forget sample, or, with `count`, of the mean of so many of which those probed are some."""
    kept = gram.retain.diagonal() > 0
    each = _Forms.of(products_of_gram(gram, mean=False), kept, damping)
    forms = each
    if count is not None:
        forms = each.of_mean(_Forms.of(products_of_gram(gram, mean=True), kept, damping), count)
    n = int(kept.sum())
    squares = forms.squares.clamp(min=torch.finfo(torch.float64).tiny)
    explained, fitted, half = (
        (form / squares).clamp(0.0, MOST_EXPLAINED) for form in (forms.explained, forms.fitted, forms.half)
    )
    lengths = gram.retain.diagonal()[kept].sqrt()
    cosines = gram.retain[kept][:, kept] / (lengths[:, None] * lengths)
    pairs = float(cosines.square().sum() - cosines.diagonal().square().sum()) / (n * max(1, n - 1))
    return Alikeness(
        numel=gram.numel,
        pairs=pairs,
        own=forms.own / squares,
        crossed=forms.crossed / squares,
        explained=explained,
        fitted=fitted,
        growth=torch.where(half > 0, (fitted / half.clamp(min=1e-12)).clamp(1.0, 2.0).log2(), 1.0),
        probed=n,
        factored_noise=noises,
    )


@dataclass(frozen=True)
class _Forms:
    """What `Alikeness` holds, not yet in units of `|v|^2`: quadratic forms in v, [m]; `half` is `fitted` of half."""

    squares: Tensor
    own: Tensor
    crossed: Tensor
    explained: Tensor
    fitted: Tensor
    half: Tensor

    @classmethod
    def of(cls, products: InnerProducts, kept: Tensor, damping: float) -> "_Forms":
        some = _some(products, kept)
        n = some.q.numel()
        lengths, others = some.q.sqrt(), max(1, n - 1)
        cosines = some.gram.part(torch.arange(n)) / (lengths[:, None] * lengths)
        d = some.cross / lengths[:, None]  # [n, m]
        apart = cosines - torch.diag(cosines.diagonal())
        y = 2.0 * d - apart @ d / others
        fitted, half = (_fitted(part, damping) for part in (some, _some(some, torch.arange(n) % 2 == 0)))
        return cls(
            squares=some.squares,
            own=y.square().mean(0),
            crossed=((apart @ y) * y).sum(0) / (n * others),
            explained=2.0 * d.square().mean(0) - ((apart @ d) * d).sum(0) / (n * others),
            fitted=fitted,
            half=half,
        )

    def of_mean(self, together: "_Forms", count: int) -> "_Forms":
        """Of the mean of `count` vectors, from these of several each and those of their mean: without bias."""
        m = self.squares.numel()
        found = {}
        for field in fields(self):
            each, mean = getattr(self, field.name).mean()[None], getattr(together, field.name)
            crossed = (m * mean - each) / (m - 1) if m > 1 else each  # of two different vectors
            found[field.name] = (crossed + (each - crossed) / count).clamp(min=0.0)
        return _Forms(**found)


def _some(products: InnerProducts, kept: Tensor) -> InnerProducts:
    at = kept.nonzero()[:, 0]
    gram = DenseGram(products.gram.part(at))
    return replace(products, q=products.q[at], cross=products.cross[at], gram=gram, primal=None)


def _fitted(products: InnerProducts, damping: float) -> Tensor:
    """`x |v|^2` of the true inverse, [m]."""
    rest = curved_step(products, products.damping(damping), "woodbury").rest
    return (1.0 - rest).clamp(min=0.0) * products.squares
