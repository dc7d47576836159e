r"""Spectrum of a covariance of which a random sketch is known: R^T S R instead of S.

R is [C, r], its entries are 1 / sqrt(r) with random signs, so that R^T S R is the covariance of the
rows times R. Its trace estimates that of S, its entries off the diagonal the Frobenius norm without
bias (Alon, Matias, Szegedy 1999), and its eigenvalues are those of a sample of r rows whose
covariance is S: each is too large by what the smaller ones add, which the Stieltjes transform tells
(Bai and Ding 2012, Estimation of spiked eigenvalues). The errors are measured in
benchmarks/sketches.py; docs/memory.md holds the table.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

HEAD_SHARE = 1 / 8
"""Eigenvalues that are estimated one by one, as a share of the sketch's width. Behind them a power
law that starts at the last of them has what is left of the trace."""

_ROUNDING = 1e-13  # of the largest eigenvalue: size of a zero eigenvalue in float64
_MOST_BOUNDED = 32  # eigenvalues that an interval is given for: the fewer, the tighter
_CONFIDENCE = 0.95


class SketchFacts(NamedTuple):
    """Facts of a sketched spectrum that its eigenvalues do not tell.

    Attributes:
        width: Channels of the sketch, r.
        squares: Estimate of the sum of the squared eigenvalues.
        lower: Lower ends of the intervals of the largest eigenvalues: see :func:`head_interval`.
        upper: Upper ends.
    """

    width: int
    squares: float
    lower: tuple[float, ...] = ()
    upper: tuple[float, ...] = ()

    def interval(self, channels: int, total: float) -> tuple[Tensor, Tensor]:
        """Lower and upper ends for all eigenvalues: behind the head, 0 and total / i. [C] each"""
        lower = torch.zeros(channels, dtype=torch.float64, device="cpu")
        upper = total / torch.arange(1, channels + 1, dtype=torch.float64, device="cpu")
        lower[: len(self.lower)] = torch.tensor(self.lower, dtype=torch.float64, device="cpu")
        known = torch.tensor(self.upper, dtype=torch.float64, device="cpu")
        upper[: len(known)] = torch.minimum(upper[: len(known)], known)
        return lower, upper.cummin(0).values


def head_size(width: int) -> int:
    """Number of eigenvalues that are estimated one by one, from a sketch of r channels."""
    return max(1, int(width * HEAD_SHARE))


def squared_norm(sketch: Tensor) -> Tensor:
    """Squared Frobenius norm of S, unbiased, from R^T S R. [r, r] to []"""
    width = len(sketch)
    off_diagonal = sketch.square().sum() - sketch.diagonal().square().sum()
    return off_diagonal * width / max(1, width - 1)


def estimated_eigenvalues(
    sketched: Tensor, squares: float, channels: int, total: float
) -> tuple[Tensor, SketchFacts]:
    """Eigenvalues of S [C], descending, from those of R^T S R [r], and the facts of the sketch.

    The trace of S is known, the squares come from :func:`squared_norm`.
    """
    width = len(sketched)
    values = sketched.double().clamp(min=0).sort(descending=True).values
    seen = float(values.sum())
    if total <= 0 or seen <= 0:
        return values.new_zeros(channels), SketchFacts(width, 0.0)
    lower, upper = head_interval(values, total)
    # Trace and eigenvalues of a sketch err together: the known trace takes out the common error.
    scale = total / seen
    values = values * scale
    squares = min(max(squares * scale**2, total**2 / channels), total**2)
    facts = SketchFacts(width, squares, tuple(lower.tolist()), tuple(upper.tolist()))
    # About half of the eigenvalues that are rounding are negative: they tell how large it is.
    rounding = max(8 * scale * max(0.0, -float(sketched.min())), _ROUNDING * float(values[0]))
    rank = int((values > rounding).sum())
    if rank < width:
        # Every direction of the rows shows in the sketch: there is nothing behind.
        found = _leading(values, rank)
        found = torch.cat([found, found.new_zeros(channels - rank)])
        return found * (total / float(found.sum())), facts
    return _filled(_leading(values, head_size(width)), channels, total), facts


def _leading(values: Tensor, count: int) -> Tensor:
    width = len(values)
    largest = []
    for index in range(count):
        # Gaps to smaller eigenvalues alone: close larger ones would add nothing but noise.
        gaps = (values[index] - values[index + 1 :]).clamp(min=1e-9 * float(values[index]))
        inverse = float((1 / gaps).sum())
        largest.append((width - 1) / inverse if inverse else float(values[index]))
    return torch.tensor(largest, dtype=torch.float64, device="cpu").sort(descending=True).values


def _filled(head: Tensor, channels: int, total: float) -> Tensor:
    rest = total - float(head.sum())
    behind = channels - len(head)
    if rest <= 0 or behind == 0:
        return torch.cat([head * (total / float(head.sum())), head.new_zeros(behind)])
    ranks = torch.arange(len(head) + 1, channels + 1, dtype=torch.float64, device="cpu") / len(head)
    low, high = 0.0, 64.0
    for _ in range(50):
        exponent = (low + high) / 2
        if float(head[-1]) * float((ranks**-exponent).sum()) > rest:
            low = exponent
        else:
            high = exponent
    tail = ranks**-high
    # A flat tail of less than its share of the trace: the head has the rest of it.
    tail = torch.minimum(tail * (rest / float(tail.sum())), head[-1])
    return torch.cat([head + (rest - tail.sum()).clamp(min=0) / len(head), tail])


def head_interval(sketched: Tensor, total: float) -> tuple[Tensor, Tensor]:
    r"""95 % interval of the k largest eigenvalues of S, of all at once; k is 32 at most.

    With t^2 = 2 ln(2 k / 0.05), and T_i, the trace less the eigenvalues before i:

    .. math:: \frac{\sqrt{\ell_i} - \sqrt{T_i / r}}{1 + t/\sqrt r} \le \sqrt{\lambda_i} \le
        \frac{\sqrt{\ell_i}}{1 - \sqrt{i/r} - t/\sqrt r}

    A theorem for R of Gaussian entries (Davidson and Szarek 2001); for signs the interval held in
    every case that was tried. S is the covariance of the rows that were read: the error of reading
    few rows comes on top.

    Args:
        sketched: Eigenvalues of R^T S R, in any order. [r]
        total: Trace of S, T_1, which bounds the upper ends where r is too small.

    Returns:
        Lower and upper ends. [k] each
    """
    width = len(sketched)
    head = min(_MOST_BOUNDED, head_size(width))
    roots = sketched.double().clamp(min=0).sort(descending=True).values[:head].sqrt()
    spread = math.sqrt(2 * math.log(2 * head / (1 - _CONFIDENCE)) / width)
    ranks = torch.arange(1, head + 1, dtype=torch.float64, device="cpu")
    shrink = 1 - (ranks / width).sqrt() - spread
    upper = torch.where(shrink > 0, (roots / shrink.clamp(min=1e-9)).square(), torch.inf)
    lower, left = [], total
    for root in roots.tolist():
        end = max(0.0, (root - math.sqrt(left / width)) / (1 + spread)) ** 2
        lower.append(end)
        left = max(0.0, left - end)
    return torch.tensor(lower, dtype=torch.float64, device="cpu"), upper.clamp(max=total)
