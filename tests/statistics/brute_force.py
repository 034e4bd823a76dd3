"""Section 2 of docs/method.md for one tensor, as it is written: loops over samples, dense P x P solves, float64.

Nothing here is quick or shares code with `fillm`. `g` [n, P] are the retain samples' gradients, `f` [m, P] the forget
samples', `v` [P] is the direction that is asked about, the mean of `f` unless said.
"""

from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[Tensor, Tensor, float], Tensor]  # g, v, lambda -> u


def mean_forget(f: Tensor) -> Tensor:
    """`v = (1/m) sum_j f_j`, [P]."""
    total = torch.zeros(f.shape[1], dtype=torch.float64)
    for one in f:
        total += one.double()
    return total / len(f)


def damping_of(g: Tensor, damping: float) -> float:
    """(1): `lambda = damping * mean_i(mean_p(g_i[p]^2))`."""
    total = 0.0
    for one in g.double():
        total += sum(entry**2 for entry in one.tolist()) / len(one)
    return damping * total / len(g)


def datainf_step(g: Tensor, v: Tensor, lambda_: float) -> Tensor:
    """(2), the mean of the inverses of `lambda I + g_i g_i^T` applied to `v`, each a dense solve: `u`, [P]."""
    v = v.double()
    identity, total = torch.eye(len(v), dtype=torch.float64), torch.zeros_like(v)
    for one in g.double():
        total += torch.linalg.solve(lambda_ * identity + torch.outer(one, one), v)
    return -total / len(g)


def datainf_step_as_printed(g: Tensor, v: Tensor, lambda_: float) -> Tensor:
    """(2) in its closed form, term by term: `u = -(1/(n lambda)) sum_i (v - g_i (g_i . v) / (lambda + |g_i|^2))`."""
    v = v.double()
    total = torch.zeros_like(v)
    for one in g.double():
        total += v - one * float((one * v).sum()) / (lambda_ + float((one * one).sum()))
    return -total / (len(g) * lambda_)


def woodbury_step(g: Tensor, v: Tensor, lambda_: float) -> Tensor:
    """The true inverse: `u = -((1/n) sum_i g_i g_i^T + lambda I)^-1 v` by a dense P x P solve, [P]."""
    v = v.double()
    curvature = torch.zeros(len(v), len(v), dtype=torch.float64)
    for one in g.double():
        curvature += torch.outer(one, one) / len(g)
    return -torch.linalg.solve(curvature + lambda_ * torch.eye(len(v), dtype=torch.float64), v)


def score(f: Tensor, g: Tensor, damping: float, step: Step = datainf_step) -> float:
    """(3): `|u|_2` for `v` the mean forget gradient."""
    return float(step(g, mean_forget(f), damping_of(g, damping)).norm())


def scores_per_sample(f: Tensor, g: Tensor, damping: float, step: Step = datainf_step) -> list[float]:
    """`soir-per-sample`: (3) with `v = f_j`, for every forget sample alone."""
    return [float(step(g, one, damping_of(g, damping)).norm()) for one in f]


def first_order(f: Tensor, g: Tensor) -> float:
    """`first-order`: `(1/m) sum_j sum_i |f_j . g_i|`."""
    return sum(abs(float((a.double() * b.double()).sum())) for a in f for b in g) / len(f)


def memflex(f: Tensor, g: Tensor) -> tuple[float, float]:
    """`cos(v, mean g)`, 0 where either is zero, and `mean |v|` over the entries."""
    v, r = mean_forget(f), mean_forget(g)
    lengths = float(v.norm()) * float(r.norm())
    cosine = float((v * r).sum()) / lengths if lengths > 0 else 0.0
    return cosine, sum(abs(entry) for entry in v.tolist()) / len(v)


def gain(v: Tensor, u: Tensor) -> float:
    """`-v . u`, the first-order rise of the forget loss for the step `-u`."""
    return -float((v.double() * u).sum())


def retain_dots(g: Tensor, u: Tensor) -> list[float]:
    """`s_i = <g_i, u>`."""
    return [float((one.double() * u).sum()) for one in g]


def damage(g: Tensor, u: Tensor) -> float:
    """(8): `(1/2) u^T F u` with the dense `F = (1/n) sum_i g_i g_i^T`."""
    curvature = torch.zeros(len(u), len(u), dtype=torch.float64)
    for one in g.double():
        curvature += torch.outer(one, one) / len(g)
    return 0.5 * float(u @ curvature @ u)


def trade_off(g: Tensor, v: Tensor, u: Tensor, forget_rise: float = 0.01) -> float:
    """(8): the retain change `-eta mean(s) + (eta^2/2) mean(s^2)` at the `eta` at which `eta * gain` is `forget_rise`.

    Infinite where no step raises the forget loss.
    """
    if gain(v, u) <= 0:
        return float("inf")
    eta, dots = forget_rise / gain(v, u), retain_dots(g, u)
    mean, mean_square = sum(dots) / len(dots), sum(s * s for s in dots) / len(dots)
    return -eta * mean + 0.5 * eta**2 * mean_square
