"""The closed forms of DataInf (arXiv 2310.00902) from scalars: docs/method.md (1) to (3b)."""

from dataclasses import dataclass

import torch
from torch import Tensor

# The bracket is widened by this much relative to |v|: the error of float32 accumulators, so that it holds for them too.
BRACKET_SLACK = 3e-5


@dataclass(frozen=True)
class Scalars:
    """What one tensor's two passes leave behind.

    Attributes:
        numel: `P_l`.
        forget_sq_norm: `|v|^2`.
        q: [n] `|g_i|^2`, float64.
        d: [n] `<g_i, v>`, float64.
        damping: the factor in (1).
    """

    numel: int
    forget_sq_norm: float
    q: Tensor
    d: Tensor
    damping: float

    @property
    def lambda_(self) -> float:
        """Equation (1) of docs/method.md."""
        return self.damping * float(self.q.mean()) / self.numel if self.q.numel() else 0.0

    def coefficients(self, lambda_: float | None = None) -> Tensor:
        """`c_i = d_i / (lambda + q_i)`, [n]; zero for a sample without a gradient."""
        denominator = (self.lambda_ if lambda_ is None else lambda_) + self.q
        return torch.where(denominator > 0, self.d / denominator.clamp(min=torch.finfo(torch.float64).tiny), 0.0)

    @property
    def cross(self) -> float:
        """`S = (1/n) sum_i c_i d_i = <v, w>`."""
        return float((self.coefficients() * self.d).mean())

    @property
    def gain(self) -> float:
        """`-v . u`, the first-order rise of the forget loss for the step `-u`."""
        return (self.forget_sq_norm - self.cross) / self.lambda_ if self.lambda_ > 0 else float("inf")

    def bracket(self) -> tuple[float, float]:
        """Lower and upper bound of `|u|`, (3b) of docs/method.md, widened by `BRACKET_SLACK`."""
        nothing = torch.zeros_like(self.q, dtype=torch.bool)
        return self.partial_bracket(nothing, self.forget_sq_norm, 0.0, 0.0)

    def partial_bracket(
        self, summed: Tensor, rest_sq_norm: float, sum_sq_norm: float, sum_error: float
    ) -> tuple[float, float]:
        """The same, (3c) of docs/method.md, given the weighted sum `w_A` over some of the samples.

        Args:
            summed: [n] bool, the samples of `A`; those of the rest `B` count by their scalars alone.
            rest_sq_norm: `|v - w_A|^2`.
            sum_sq_norm: `|w_A|^2`.
            sum_error: bound of the error of `w_A`, same unit as `|v|`.

        Returns:
            The bounds; equal for `v = 0` and for a tensor without retain gradient (infinite).
        """
        square = self.forget_sq_norm
        if square == 0.0:
            return 0.0, 0.0
        if self.lambda_ == 0.0:
            return float("inf"), float("inf")
        c, n = self.coefficients(), self.q.numel()
        along = c * self.d / n
        along_a, along_b = float(along[summed].sum()), float(along[~summed].sum())  # <v, w_A>, <v, w_B>
        longest_b = float((c.abs() * self.q.sqrt())[~summed].sum()) / n  # |w_B| at most
        # What lies along v is known exactly; across v, only how long w_A is and w_B can be.
        across_a = max(sum_sq_norm - along_a**2 / square, 0.0) ** 0.5
        across_b = max(longest_b**2 - along_b**2 / square, 0.0) ** 0.5
        known = rest_sq_norm - 2.0 * along_b + (2.0 * along_a * along_b + along_b**2) / square
        most = across_b**2 + 2.0 * across_a * across_b
        least = -(across_a**2) if across_a <= across_b else across_b**2 - 2.0 * across_a * across_b
        slack = BRACKET_SLACK * square**0.5 + sum_error
        low = max(known + least, 0.0) ** 0.5 - slack
        high = max(known + most, 0.0) ** 0.5 + slack
        return max(low, 0.0) / self.lambda_, high / self.lambda_


def relative_width(low: float, high: float) -> float:
    """`(high - low) / middle`; 0 where both are 0 or both infinite."""
    if high == low:
        return 0.0
    return (high - low) / (0.5 * (high + low)) if high + low > 0 else float("inf")


def uncertified(brackets: dict[str, tuple[float, float]], tolerance: float) -> set[str]:
    """Tensors whose bracket is wider than `tolerance`, or overlaps that of another tensor.

    Overlaps are found among neighbours by the middle, and among all whom a wide bracket reaches over.
    """
    failed = {name for name, (low, high) in brackets.items() if relative_width(low, high) > tolerance}
    reaching: str | None = None  # the bracket that reaches furthest up so far
    for name in sorted(brackets, key=lambda name: (brackets[name][0], name)):
        low, high = brackets[name]
        if reaching is not None and low <= brackets[reaching][1]:
            points = low == high and brackets[reaching][0] == brackets[reaching][1]
            if not points:  # two points (0, or infinite) are a tie, which names decide
                failed |= {name, reaching}
        if reaching is None or high > brackets[reaching][1]:
            reaching = name
    return failed
