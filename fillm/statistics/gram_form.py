"""The Gram form: everything that inner products of gradients answer, exact ones or a sketch's (docs/method.md (7)).

With `c` such that `w = (1/n) sum_i c_i g_i` and `u = -(1/lambda) (v - w)`, all that is asked of `u` follows from
`q_i = |g_i|^2`, `d_i = <g_i, v>`, `|v|` and the Gram matrix `K_ij = <g_i, g_j>` of the retain set:

    lambda^2 |u|^2 = |v|^2 - 2 S + c^T K c / n^2,   S = (1/n) c . d,   s = <g, u> = -(1/lambda) (d - K c / n)

DataInf has `c_i = d_i / (lambda + q_i)`, the true inverse `c = n (n lambda I + K)^-1 d`. Where the inner products come
from a sketch, their noise adds a known amount to every quadratic form on average; it is taken off.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fillm.statistics.gram import Gram, RowsGram

MOST_PAIRED = 256  # samples whose pairs say how alike retain gradients are, where only the noise depends on it


class Traces(NamedTuple):
    """What a curvature makes of noise that lies as the retain gradients do.

    Attributes:
        along: `tr(A' K)` of the form `S = d^T A' d`.
        explained: `tr(A K)` of the form `x = d^T A d / |v|^2`.
        pairs: `tr((A K)^2)`.
        dots: `tr(B K B^T) / n` of the mean square of `B d = -lambda <g, u>`.
        dots_pairs: `tr((B K B^T)^2) / n^2`.
    """

    along: float
    explained: float
    pairs: float
    dots: float
    dots_pairs: float


@dataclass(frozen=True)
class InnerProducts:
    """What is known of one tensor's gradients; one column for every right-hand side `v`.

    Attributes:
        numel: `P_l`.
        q: `|g_i|^2`, exact, [n], float64.
        cross: `d_ij = <g_i, v_j>`, [n, m], float64.
        squares: `|v_j|^2`, exact, [m], float64.
        gram: of the retain gradients.
        noise: variance of an entry of `cross` in units of `q_i |v_j|^2`, [m]; 0 where inner products are exact.
        primal: the gradients [n, P], in the type they are kept in, and the right-hand sides [P, m], float64, where they
            are at hand.
        targets: Gram matrix of the right-hand sides among themselves, where inner products come from sketches.
        halves: what each half of the numbers says alone, where the noise is that of projected factors, which depends on
            more than lengths and angles.
    """

    numel: int
    q: Tensor
    cross: Tensor
    squares: Tensor
    gram: Gram
    noise: Tensor
    primal: tuple[Tensor, Tensor] | None = None
    targets: RowsGram | None = None
    halves: "tuple[InnerProducts, InnerProducts] | None" = None

    def damping(self, factor: float) -> float:
        """`lambda`, equation (1) of docs/method.md."""
        return factor * float(self.q.mean()) / self.numel if self.q.numel() else 0.0


@dataclass(frozen=True)
class Step:
    """One curvature's answer for every right-hand side, all float64.

    Attributes:
        coefficients: `c`, [n, m].
        along: `S = <v, w>`, [m]; noise taken off.
        rest: `lambda^2 |u|^2 / |v|^2`, the part of v that the retain set leaves, [m]; noise taken off.
        error: one standard error of `rest`, [m]; 0 where inner products are exact.
        dots: `lambda <g_i, u>`, [n, m].
        dots_noise: what noise adds to the mean square of `dots`, [m]; not taken off.
        dots_error: one standard error of that mean square, [m].
        mean_error: one standard error of the mean of `dots`, [m].
        noise_share: what noise alone would have explained of v, [m]; already taken off.
        apart: square of how far two halves of the sketches differ in `rest`, in units of what `error` expects, [m]; NaN
            where there are none.
    """

    coefficients: Tensor
    along: Tensor
    rest: Tensor
    error: Tensor
    dots: Tensor
    dots_noise: Tensor
    dots_error: Tensor
    mean_error: Tensor
    noise_share: Tensor
    apart: Tensor


def datainf_step(products: InnerProducts, lambda_: float) -> Step:
    """The average of the inverses of rank-one curvatures, equation (2) (Kwon et al., arXiv 2310.00902).

    Args:
        products: of one tensor; n samples, m right-hand sides.
        lambda_: above 0.
    """
    (q, d), n, targets = (products.q, products.cross), max(1, products.q.numel()), products.cross.shape[1]
    weight = 1.0 / (lambda_ + q)
    c = weight[:, None] * d
    along = (c * d).sum(0) / n
    # The rows behind K may be many: both combinations in one go over them, and below likewise.
    ones = torch.ones(q.numel(), 1, dtype=torch.float64)
    product, square = products.gram.product_and_square(torch.cat([c, ones], 1))
    length, pulled = square[:targets] / n**2, product[:, :targets] / n  # pulled: <g_i, w>
    # With E = diag(1/(lambda+q)) and Z = E^1/2 K E^1/2 the form is A = E^1/2 (2/n - Z/n^2) E^1/2. What it makes of the
    # noise follows from the trace of Z, which is exact, and that of Z^2, which some samples tell.
    trace = float((weight * q).sum())
    paired = _paired(products) if bool(products.noise.any()) else None
    spread = _trace_of_square(products, weight, paired) if paired else 0.0
    overlap = 2.0 * trace / n - spread / n**2
    pairs = min(4.0 * spread / n**2, max(overlap, 0.0))
    dots = pulled - d
    # B = I - K E / n by its diagonal: all there is of one sample, nearly all for gradients far from parallel.
    own = 1.0 - weight * q / n
    left = float((q * own.square()).mean()) if q.numel() else 0.0
    apart = _trace_of_square(products, own.square(), paired) / n**2 if paired else 0.0
    # A d, as a combination of gradients, and B d by B's diagonal.
    slope, steep = products.gram.square(
        torch.cat([(2.0 * c - weight[:, None] * pulled) / n, own[:, None] * dots / n], 1)
    ).view(2, targets)
    summed = weight[:, None] * product[:, targets:] / n - ones  # B^T 1 for dots = B d
    traces = Traces(trace / n, overlap, pairs, left, apart)
    return _finished(products, c, along, length, traces, (slope, steep), dots, summed)


def woodbury_step(products: InnerProducts, lambda_: float) -> Step:
    """The true inverse of `(1/n) sum_i g_i g_i^T + lambda I`, in float64: in the primal where the tensor is small.

    Args:
        products: of one tensor; n samples, m right-hand sides.
        lambda_: above 0.
    """
    n = products.q.numel()
    if products.primal is not None and products.numel <= n:
        return _primal(products, lambda_)
    values, vectors = torch.linalg.eigh(products.gram.part(torch.arange(n)))
    values = values.clamp(min=0.0)
    kept = n * lambda_ / (n * lambda_ + values)  # of a direction, what the inverse leaves
    inner = (vectors.T @ products.cross) / (n * lambda_ + values)[:, None]  # of c / n, along every eigenvector
    c = n * (vectors @ inner)
    along = (c * products.cross).sum(0) / max(1, n)
    length = (inner.square() * values[:, None]).sum(0)
    slope = (((1.0 + kept)[:, None] * inner).square() * values[:, None]).sum(0)  # A = 2 M - M K M
    explained = 1.0 - kept.square()
    left = kept.square() * values  # of B K B^T with B = n lambda (n lambda I + K)^-1
    traces = Traces(
        float((1.0 - kept).sum()),
        float(explained.sum()),
        float(explained.square().sum()),
        float(left.sum()) / max(1, n),
        float(left.square().sum()) / max(1, n) ** 2,
    )
    steep = ((n * lambda_ * kept[:, None] * inner).square() * values[:, None]).sum(0) / max(1, n) ** 2
    summed = vectors @ (kept[:, None] * (vectors.T @ torch.ones(n, 1, dtype=torch.float64)))
    # d - K c / n = lambda c
    return _finished(products, c, along, length, traces, (slope, steep), c * -lambda_, summed)


def _primal(products: InnerProducts, lambda_: float) -> Step:
    rows, v = products.primal[0].double(), products.primal[1]
    n = max(1, rows.shape[0])
    matrix = rows.T @ rows / n
    matrix.diagonal().add_(lambda_)
    left = torch.linalg.solve(matrix, v)  # (F + lambda I)^-1 v = -u
    c = rows @ left
    along = (c * products.cross).sum(0) / n
    rest = (lambda_ * left).square().sum(0) / products.squares.clamp(min=torch.finfo(torch.float64).tiny)
    nothing = torch.zeros_like(rest)
    rest = torch.where(products.squares > 0, rest, 1.0)
    return Step(c, along, rest, nothing, c * -lambda_, *[nothing] * 4, torch.full_like(rest, torch.nan))


def _paired(products: InnerProducts) -> tuple[Tensor, Tensor]:
    """At most `MOST_PAIRED` samples, spread over all, and their part of `K`."""
    n = products.q.numel()
    some = torch.linspace(0, max(0, n - 1), min(n, MOST_PAIRED), dtype=torch.float64).round().long().unique()
    return some, products.gram.part(some)


def _trace_of_square(products: InnerProducts, weight: Tensor, paired: tuple[Tensor, Tensor]) -> float:
    """`tr Z^2` for `Z = E^1/2 K E^1/2`, its diagonal exact, its pairs from some samples.

    A sketch adds its noise to every squared pair; that is taken off.
    """
    n = weight.numel()
    diagonal = float((weight * products.q).square().sum())
    if n < 2:
        return diagonal
    some, part = paired
    root = weight[some].sqrt()
    pairs = part * root[:, None] * root
    lengths = weight[some] * products.q[some]
    h = some.numel()
    apart = float(pairs.square().sum() - pairs.diagonal().square().sum())
    apart -= float(products.noise.mean()) * float(lengths.sum() ** 2 - lengths.square().sum())
    return diagonal + max(apart, 0.0) * (n * (n - 1)) / (h * (h - 1))


def _finished(
    products: InnerProducts,
    c: Tensor,
    along: Tensor,
    length: Tensor,
    traces: Traces,
    slopes: tuple[Tensor, Tensor],
    dots: Tensor,
    summed: Tensor,
) -> Step:
    """Takes the noise's share off `1 - rest`, and says how far what is left may be off.

    With noise of covariance `K |v|^2 noise` in `d`, a form `x = d^T A d / |v|^2` grows by `e (1 - x)`, where
    `e = noise tr(A K)`, and has variance `2 noise^2 tr((A K)^2) + 4 noise d^T A K A d / |v|^2` times `(1 - x)^2`, since
    all lengths are exact: as a squared correlation has. The mean square of `B d` grows by
    `noise |v|^2 tr(B K B^T) / n`.

    `slopes` are `d^T A K A d` and, of the mean square of `B d`, `d^T B^T B K B^T B d / n^2`. `summed` is `B^T 1`,
    [n, 1]: the mean of `B d` has the noise's variance `noise |v|^2 1^T B K B^T 1 / n^2`.
    """
    cross, overlap, pairs, through, through_pairs = traces
    slope, dots_slope = slopes
    tiny = torch.finfo(torch.float64).tiny
    square, noise = products.squares.clamp(min=tiny), products.noise
    rest = torch.where(products.squares > 0, 1.0 + (length - 2.0 * along) / square, 1.0).clamp(min=0.0)
    share = noise * overlap
    left = (1.0 - share).clamp(min=tiny)
    rest = torch.where(share < 1.0, rest / left, 1.0)
    steep = (slope / square - noise * pairs).clamp(min=0.0)  # the noise adds to the slope too
    variance = (2.0 * noise.square() * pairs + 4.0 * noise * steep) * rest.clamp(max=1.0).square() / left
    error = torch.where(share < 1.0, variance.sqrt(), 1.0).clamp(max=1.0)
    along = (along - noise * cross * square) / (1.0 - noise * cross).clamp(min=tiny)
    along = torch.where(noise * cross < 1.0, along, 0.0).clamp(min=0.0)
    residual = noise * products.squares * rest.clamp(max=1.0) * left
    added = residual * through
    steep = (dots_slope - residual * through_pairs).clamp(min=0.0)  # and to this one
    dots_error = (2.0 * residual.square() * through_pairs + 4.0 * residual * steep).sqrt()
    mean_error = (residual * products.gram.square(summed)).sqrt() / max(1, len(dots))
    apart = torch.full_like(rest, torch.nan)
    return Step(c, along, rest, error, dots, added, dots_error, mean_error, share, apart)
