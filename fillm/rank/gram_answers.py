"""What one tensor's inner products say, kept small, so that a Gram matrix can be dropped once it was asked."""

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from fillm.models import TensorInfo
from fillm.rank.config import RankConfig
from fillm.rank.gram_sources import TensorProducts
from fillm.rank.soir import NOISE
from fillm.statistics import Estimate, InnerProducts, Step, curved_step, mean_absolute


@dataclass(frozen=True)
class Answer:
    """One tensor; one column for every right-hand side.

    Attributes:
        lambda_: equation (1) of docs/method.md.
        mean_q: mean `|g_i|^2`.
        norms: `|v_j|`, [m], float64.
        rest, error, apart: as in `Step`, [m].
        along: `S`, [m].
        mean_dot, mean_square_dot: moments over the retain set of `<g_i, u>`, [m].
        dot_error, square_error: one standard error of `mean_dot` and of `mean_square_dot`, [m].
        estimated: whether inner products come from sketches, which other tensors' answers help to judge.
        coefficients: `c`, [n, m], where `u` is to be formed.
        total: the score of `first-order`, with its error.
        cosine: of v and the mean retain gradient, and its standard error.
        mean_absolute: mean `|v|` over entries.
        note: `unused` or `no retain gradient`.
    """

    info: TensorInfo
    lambda_: float
    mean_q: float
    norms: Tensor
    rest: Tensor
    error: Tensor
    along: Tensor
    mean_dot: Tensor
    mean_square_dot: Tensor
    dot_error: Tensor
    square_error: Tensor
    apart: Tensor
    estimated: bool = False
    coefficients: Tensor | None = None
    total: Estimate | None = None
    cosine: tuple[float, float] = (0.0, 0.0)
    mean_absolute: float = 0.0
    note: str = ""

    @property
    def gain(self) -> Tensor:
        """`-v . u`, [m]; infinite where nothing damps the step."""
        square = self.norms.square()
        if self.lambda_ == 0.0:
            return torch.where(square > 0, torch.inf, 0.0)
        return (square - self.along) / self.lambda_


def answer(of: TensorProducts, config: RankConfig, keep_coefficients: bool = False) -> Answer:
    """Asks one tensor's inner products what the settings' method wants to know."""
    products = of.products
    lambda_ = products.damping(config.damping)
    idle = unused(of.info, products.squares.sqrt(), lambda_, float(products.q.mean()) if len(products.q) else 0.0)
    if config.canonical_method == "first-order":
        return dataclasses.replace(idle, total=mean_absolute(products))
    if config.canonical_method == "memflex":
        return dataclasses.replace(idle, cosine=_cosine(products), mean_absolute=of.mean_absolute)
    if lambda_ == 0.0:
        return idle
    step = curved_step(products, lambda_, "woodbury" if config.curvature == "woodbury" else "datainf")
    mean_square, square_error = _mean_square(step, lambda_)
    return dataclasses.replace(
        idle,
        rest=step.rest,
        error=step.error,
        along=step.along,
        mean_dot=step.dots.mean(0) / lambda_,
        mean_square_dot=mean_square,
        dot_error=step.mean_error / lambda_,
        square_error=square_error,
        apart=step.apart,
        estimated=bool(products.noise.any()),
        coefficients=step.coefficients if keep_coefficients else None,
    )


def unused(info: TensorInfo, norms: Tensor, lambda_: float = 0.0, mean_q: float = 0.0) -> Answer:
    """The answer of a tensor of which nothing was asked yet, with its note: all that follows from `u` is 0."""
    note = "" if lambda_ > 0 else "no retain gradient" if bool(norms.any()) else "unused"
    nothing = torch.zeros_like(norms)
    return Answer(info, lambda_, mean_q, norms, *[nothing] * 8, note=note)


def without_noise(answers: list[Answer]) -> list[Answer]:
    """Tensors whose gradients of both sets are far below one rounding of the largest tensor's become unused.

    See `fillm.rank.soir`: divided by its own square, what backpropagation leaves there would rank first.
    """
    size = [max(one.mean_q, float(one.norms.square().max())) for one in answers]
    floor = NOISE**2 * max(size, default=0.0)
    return [
        unused(one.info, torch.zeros_like(one.norms)) if 0.0 < value < floor else one
        for one, value in zip(answers, size, strict=True)
    ]


def _mean_square(step: Step, lambda_: float) -> tuple[Tensor, Tensor]:
    """Mean of `<g_i, u>^2` with the noise's share off, and its standard error, [m] each."""
    mean_square = (step.dots.square().mean(0) - step.dots_noise).clamp(min=0.0)
    return mean_square / lambda_**2, step.dots_error / lambda_**2


def _cosine(products: InnerProducts) -> tuple[float, float]:
    """Cosine of v and the mean retain gradient r: `<v, r> = mean d_i`, `|r|^2` from the Gram matrix, diagonal exact."""
    n = products.q.numel()
    ones = torch.ones(n, 1, dtype=torch.float64)
    length = float(products.gram.square(ones)) ** 0.5 / max(1, n)
    size = float(products.squares[0]) ** 0.5
    if length == 0.0 or size == 0.0:
        return 0.0, 0.0
    cosine = float(products.cross[:, 0].mean()) / (length * size)
    cosine = min(max(cosine, -1.0), 1.0)
    return cosine, (1.0 - cosine**2) * float(products.noise[0]) ** 0.5
