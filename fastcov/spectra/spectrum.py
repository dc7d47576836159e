"""Spectrum, and pure functions of eigenvalues ``[..., C]`` in any order.

Feature covariance spectra and the count above 1e-3 follow Shinya, Simo-Serra and Suzuki,
"Understanding the Effects of Pre-Training for Object Detectors via Eigenspectrum", arXiv
1909.04021; degrees of freedom as in spectral pruning, arXiv 1808.08558; effective rank as in Roy
and Vetterli, EUSIPCO 2007. Measures of embeddings have their names in the field: RankMe (Garrido et
al. 2023, arXiv 2210.02885), alpha of alpha-ReQ (Agrawal et al., NeurIPS 2022, fitted as in Stringer
et al. 2019, doi 10.1038/s41586-019-1346-5), NESum (He and Ozay, ICML 2022), condition number
(Tsitsulin et al. 2023, arXiv 2305.16562), log-determinant as in the coding rate (Yu et al. 2020,
arXiv 2006.08558).

C is channels, N rows. A ValueError refuses eigenvalues that are NaN, infinite, missing or not
floating point.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastcov.spectra.sketched import SketchFacts, estimated_eigenvalues
from fastcov.spectra.uncertainty import MOST_SIMULATED_CHANNELS, error_bound

_CONFIDENCE = 0.95
_LEAST_FITTED_RANKS = 3


class PowerLaw(NamedTuple):
    r"""Fit :math:`\lambda_i \approx a\, i^{-\text{exponent}}`; see :func:`power_law`."""

    exponent: float
    error: float


@dataclass(frozen=True, eq=False, repr=False)
class Spectrum:
    """Eigenvalues of one layer's covariance, with the measures that are read off them.

    Args:
        eigenvalues: Values in any order; kept on the CPU in float64, descending, negatives as
            zero. [C]
        count: Rows behind the covariance. With decay or unequal row weights pass the effective
            number, (sum w)^2 / sum w^2, or ``uncertainty`` is too narrow.
        total: Trace of the covariance.
        name: Layer name.
        sketch: Facts of the sketch that the eigenvalues were estimated from; None where they are
            those of the covariance itself. See :meth:`of`.

    Raises:
        ValueError: If a value is not finite, or the shape, count or total is impossible.

    Example:
        >>> spectrum = Spectrum(torch.tensor([1.0, 4.0, 0.0]), count=4096, total=5.0, name="conv1")
        >>> spectrum
        Spectrum('conv1', channels=3, count=4096, total=5, dim=2)
        >>> spectrum.rank_at(0.9), round(spectrum.participation_ratio(), 3), spectrum.stable_rank()
        (2, 1.471, 1.25)
    """

    eigenvalues: Tensor
    count: int
    total: float
    name: str = ""
    sketch: SketchFacts | None = None

    def __post_init__(self) -> None:
        descending = _descending(self.eigenvalues).detach().cpu()
        if descending.dim() != 1:
            raise ValueError(
                f"Spectrum {self.name!r} needs eigenvalues of shape [C], got "
                f"{list(descending.shape)}; build one Spectrum per matrix"
            )
        count, total = int(self.count), float(self.total)
        if count < 0 or count != self.count:
            raise ValueError(f"count must be a whole number of rows >= 0, got {self.count}")
        if not math.isfinite(total) or total < 0:
            raise ValueError(
                f"total must be the trace, finite and >= 0, got {total}; "
                "exclude rows with NaN or inf before forming the covariance"
            )
        object.__setattr__(self, "eigenvalues", descending)
        object.__setattr__(self, "count", count)
        object.__setattr__(self, "total", total)

    @classmethod
    def of(
        cls,
        eigenvalues: Tensor,
        *,
        count: int,
        total: float,
        squares: float,
        channels: int,
        name: str = "",
    ) -> Spectrum:
        """Spectrum of a covariance, or the estimate from a sketch where that has fewer eigenvalues.

        Args:
            eigenvalues: Eigenvalues of the covariance [C], or of its sketch, [r] with r < C.
            count: Rows behind the covariance.
            total: Trace of the covariance; rounding may have made it negative.
            squares: Sum of a sketch, from :func:`fastcov.spectra.sketched.squared_norm`.
            channels: C.
            name: Layer name.
        """
        total, facts = max(0.0, total), None
        if len(eigenvalues) < channels:
            eigenvalues, facts = estimated_eigenvalues(eigenvalues.cpu(), squares, channels, total)
        return cls(eigenvalues, count, total, name, facts)

    def __repr__(self) -> str:
        sketched = "" if self.sketch is None else f", sketched to {self.sketch.width}"
        return (
            f"Spectrum({self.name!r}, channels={self.channels}, count={self.count}, "
            f"total={self.total:.4g}, dim={self.dim()}{sketched})"
        )

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return self.eigenvalues.shape[0]

    def dim(self, threshold: float = 1e-3, relative: bool = True) -> int:
        """Number of eigenvalues above a threshold; see :func:`dim`."""
        return int(dim(self.eigenvalues, threshold, relative))

    def rank_at(self, share: float = 0.99) -> int:
        """Smallest number of directions that holds ``share``; see :func:`rank_at`."""
        return int(rank_at(self.eigenvalues, share))

    def dof(self, lam: float | None = None) -> float:
        """Degrees of freedom at ridge ``lam``; see :func:`dof`."""
        return float(dof(self.eigenvalues, lam))

    def spectral_entropy(self) -> float:
        """Entropy of the eigenvalues' shares of the variance; see :func:`spectral_entropy`."""
        return float(spectral_entropy(self.eigenvalues))

    def effective_rank(self) -> float:
        """Exponential of the spectral entropy; see :func:`effective_rank`."""
        return float(effective_rank(self.eigenvalues))

    def rankme(self) -> float:
        """Effective rank of the rows' matrix, by its singular values; see :func:`rankme`."""
        return float(rankme(self.eigenvalues))

    def participation_ratio(self) -> float:
        """Trace squared over squared Frobenius norm; see :func:`participation_ratio`.

        Of a sketched spectrum, from the sketch's own estimate of the norm.
        """
        if self.sketch is not None and self.sketch.squares > 0:
            return self.total**2 / self.sketch.squares
        return float(participation_ratio(self.eigenvalues))

    def stable_rank(self) -> float:
        """Trace over largest eigenvalue; see :func:`stable_rank`.

        Of a sketched spectrum an estimate that is too small where the spectrum is flat: by a factor
        of 3 where all eigenvalues are the same and the sketch has C/4 channels.
        :attr:`stable_rank_interval` tells between which numbers the truth lies.
        """
        return float(stable_rank(self.eigenvalues))

    @property
    def stable_rank_interval(self) -> tuple[float, float]:
        """95 % interval of :meth:`stable_rank`, by that of the largest eigenvalue: lower and upper.

        The trace is taken as it is known. Of a sketched spectrum the upper end is no more than
        :meth:`participation_ratio`, which no stable rank exceeds. NaN where the trace is 0.

        Example:
            >>> low, high = Spectrum(torch.ones(4), count=4096, total=4.0).stable_rank_interval
            >>> round(low, 2), round(high, 2)
            (3.43, 4.0)
        """
        if self.total <= 0:
            return math.nan, math.nan
        lower, upper = (float(ends[0]) for ends in self.interval)
        most = float(self.channels)
        if self.sketch is not None:
            most = min(most, self.participation_ratio())
        high = min(most, self.total / lower) if lower > 0 else most
        return min(max(1.0, self.total / upper), high), high

    def nesum(self) -> float:
        """Sum of the eigenvalues over the largest: the field's name for :meth:`stable_rank`."""
        return self.stable_rank()

    def condition_number(self) -> float:
        """Largest over smallest eigenvalue; see :func:`condition_number`."""
        return float(condition_number(self.eigenvalues))

    def log_determinant(self, ridge: float = 0.0) -> float:
        """Sum of the eigenvalues' logarithms; see :func:`log_determinant`."""
        return float(log_determinant(self.eigenvalues, ridge))

    def power_law(self) -> PowerLaw:
        """Exponent and fit error of a power law; see :func:`power_law`."""
        exponent, error = power_law(self.eigenvalues)
        return PowerLaw(float(exponent), float(error))

    def alpha(self, first: int = 12, last: int = 100) -> float:
        """Exponent of alpha-ReQ over a range of ranks; see :func:`alpha`."""
        return float(alpha(self.eigenvalues, first, last))

    def distance(self, other: Spectrum) -> float:
        """Distance of the shapes of two spectra, in [0, 1]; see :func:`spectral_distance`."""
        return spectral_distance(self, other)

    @property
    def uncertainty(self) -> Tensor:
        r"""95 % bound on all :math:`|\hat\lambda_i - \lambda_i|` at once, float64. [C]

        Promised for ``count`` independent Gaussian rows: of simulated spectra of 12 channels with 4
        to 64 rows a channel, 97 to 98 % lay within on average, single ones 94 to 100 %. Eigenvalues
        do not tell how their rows were related: correlated positions make the bound far too narrow
        (rows in groups of 4 equal ones: hardly any within), heavy tails narrower than it should be.
        Where ``count`` is :func:`fastcov.spectra.uncertainty.gaussian_rows` of them, 96 to 99 % lay
        within on average, single ones 88 to 100 %: the bound is too wide rather than too narrow
        where single values have heavy tails (benchmarks/uncertainty_coverage.py makes a table).

        Infinite where there are too few rows (see :func:`interval`). Above 256 channels the bound
        is that of :func:`interval`: never too narrow, and up to five times too wide.

        Of a sketched spectrum, the wider side of :attr:`interval`: a bound on the sketch's error,
        without the error of the rows.
        """
        if self.sketch is not None:
            lower, upper = self.interval
            return torch.maximum(upper - self.eigenvalues, self.eigenvalues - lower)
        closed = uncertainty(self.eigenvalues, self.count)
        if self.channels > MOST_SIMULATED_CHANNELS or not bool(closed.isfinite().all()):
            return closed
        return error_bound(self.eigenvalues, self.count)

    @property
    def interval(self) -> tuple[Tensor, Tensor]:
        """95 % interval of each eigenvalue, lower and upper end; see :func:`interval`. [C], [C]

        Of a sketched spectrum, the interval that the sketch leaves for the eigenvalues of the
        covariance of the rows that were read: see :func:`fastcov.spectra.sketched.head_interval`.
        """
        if self.sketch is not None:
            return self.sketch.interval(self.channels, self.total)
        return interval(self.eigenvalues, self.count)


def dim(eigenvalues: Tensor, threshold: float = 1e-3, relative: bool = True) -> Tensor:
    r"""Intrinsic dimension: number of eigenvalues above a threshold.

    .. math:: \#\{i : \lambda_i > \text{threshold} \cdot \lambda_{\max}\}

    Args:
        eigenvalues: Values in any order; negatives count as zero. [..., C]
        threshold: Finite, at least 0.
        relative: Compare with ``threshold`` times the largest eigenvalue; otherwise with
            ``threshold`` itself, which saturates at C on features that are not normalised.

    Returns:
        Integer tensor, 0 where every eigenvalue is zero. [...]

    Raises:
        ValueError: If ``threshold`` is negative or not finite.

    Example:
        >>> dim(torch.tensor([10.0, 1.0, 0.005]))
        tensor(2)
        >>> dim(torch.tensor([10.0, 1.0, 0.005]), relative=False)
        tensor(3)
    """
    if not (_is_number(threshold) and math.isfinite(threshold) and threshold >= 0):
        raise ValueError(
            f"threshold must be finite and >= 0, got {threshold!r}; 1e-3 is the usual choice"
        )
    descending = _descending(eigenvalues)
    bound = descending[..., :1] * threshold if relative else threshold
    return (descending > bound).sum(-1)


def rank_at(eigenvalues: Tensor, share: float = 0.99) -> Tensor:
    r"""Smallest number of directions that holds ``share`` of the variance.

    .. math:: k^* = \min\{k : \sum_{i \le k} \lambda_i \ge \text{share} \sum_i \lambda_i\}

    Args:
        eigenvalues: Values in any order; negatives count as zero. [..., C]
        share: Fraction of the variance to keep, in (0, 1].

    Returns:
        Integer tensor, 0 where the total variance is zero. [...]

    Raises:
        ValueError: If ``share`` is outside (0, 1].

    Example:
        >>> rank_at(torch.tensor([4.0, 1.0, 0.0]), share=0.9)
        tensor(2)
    """
    if not (_is_number(share) and 0 < share <= 1):
        raise ValueError(f"share must be in (0, 1], got {share!r}; 0.99 keeps 99 % of the variance")
    cumulative = _relative(eigenvalues).cumsum(-1)
    total = cumulative[..., -1:]
    rank = (cumulative < share * total).sum(-1) + 1
    return torch.where(total[..., 0] > 0, rank, torch.zeros_like(rank))


def dof(eigenvalues: Tensor, lam: float | Tensor | None = None) -> Tensor:
    r"""Degrees of freedom of a ridge regression on the features.

    .. math:: \sum_i \frac{\lambda_i}{\lambda_i + \text{lam}}

    Args:
        eigenvalues: Values in any order; negatives count as zero. [..., C]
        lam: Positive and finite, a number or one per matrix ``[...]``; None means 1e-3 times the
            largest eigenvalue.

    Returns:
        float64 tensor, 0 where every eigenvalue is zero. [...]

    Raises:
        ValueError: If ``lam`` is not positive and finite.

    Example:
        >>> dof(torch.tensor([3.0, 1.0, 0.0]), lam=1.0)
        tensor(1.2500, dtype=torch.float64)
    """
    descending = _descending(eigenvalues)
    if lam is None:
        ratios = _relative(eigenvalues)
        return (ratios / (ratios + 1e-3)).sum(-1)
    ridge = torch.as_tensor(lam, dtype=torch.float64, device=descending.device)
    if not bool(((ridge > 0) & ridge.isfinite()).all()):
        raise ValueError(f"lam must be positive and finite, got {lam}; None is 1e-3 * lambda_max")
    if ridge.dim() and ridge.shape != descending.shape[:-1]:
        raise ValueError(
            f"lam must be a number or have shape {list(descending.shape[:-1])}, one per matrix, "
            f"got {list(ridge.shape)}"
        )
    return (descending / (descending + ridge.unsqueeze(-1))).sum(-1)


def spectral_entropy(eigenvalues: Tensor) -> Tensor:
    r"""Entropy of the eigenvalues' shares of the variance, in nats.

    .. math:: -\sum_i p_i \ln p_i, \quad p_i = \lambda_i / \sum_j \lambda_j

    Returns:
        float64 tensor between 0 and ln C, 0 where every eigenvalue is zero. [...]

    Example:
        >>> round(spectral_entropy(torch.tensor([2.0, 2.0, 0.0])).item(), 6)
        0.693147
    """
    ratios = _relative(eigenvalues)
    shares = ratios / ratios.sum(-1, keepdim=True).clamp_min(1.0)
    entropy: Tensor = torch.special.entr(shares).sum(-1)
    return entropy


def effective_rank(eigenvalues: Tensor) -> Tensor:
    r"""Exponential of the spectral entropy.

    .. math:: \exp\bigl(-\sum_i p_i \ln p_i\bigr), \quad p_i = \lambda_i / \sum_j \lambda_j

    Returns:
        float64 tensor between 1 and C, 0 where every eigenvalue is zero. [...]

    Example:
        >>> round(effective_rank(torch.tensor([2.0, 2.0, 0.0])).item(), 6)
        2.0
    """
    has_variance = _relative(eigenvalues)[..., 0] > 0
    return torch.where(has_variance, spectral_entropy(eigenvalues).exp(), 0.0)


def rankme(eigenvalues: Tensor) -> Tensor:
    r"""RankMe: effective rank of the matrix of rows, whose singular values are the roots.

    .. math:: \exp\bigl(-\sum_i p_i \ln p_i\bigr), \quad
              p_i = \sqrt{\lambda_i} / \sum_j \sqrt{\lambda_j}

    Of the uncentred covariance, as the paper's embeddings are not centred; the paper's guard of
    1e-7 on every :math:`p_i` is left out.

    Returns:
        float64 tensor between 1 and C, 0 where every eigenvalue is zero. [...]

    Example:
        >>> round(rankme(torch.tensor([4.0, 4.0, 0.0])).item(), 6)
        2.0
    """
    return effective_rank(_relative(eigenvalues).sqrt())


def condition_number(eigenvalues: Tensor) -> Tensor:
    r"""Largest over smallest eigenvalue, the square of the condition number of the rows' matrix.

    .. math:: \lambda_{\max} / \lambda_{\min}

    Returns:
        float64 tensor, infinite where some eigenvalue is zero, NaN where every one is. [...]

    Example:
        >>> condition_number(torch.tensor([1.0, 8.0]))
        tensor(8., dtype=torch.float64)
    """
    descending = _descending(eigenvalues)
    return descending[..., 0] / descending[..., -1]


def log_determinant(eigenvalues: Tensor, ridge: float = 0.0) -> Tensor:
    r"""Logarithm of the determinant of the covariance plus a ridge.

    .. math:: \sum_i \ln(\lambda_i + \text{ridge})

    Args:
        eigenvalues: Values in any order; negatives count as zero. [..., C]
        ridge: Finite, at least 0.

    Returns:
        float64 tensor, minus infinity where an eigenvalue is zero and there is no ridge. [...]

    Raises:
        ValueError: If ``ridge`` is negative or not finite.

    Example:
        >>> round(log_determinant(torch.tensor([math.e, 1.0])).item(), 6)
        1.0
    """
    if not (_is_number(ridge) and math.isfinite(ridge) and ridge >= 0):
        raise ValueError(f"ridge must be finite and >= 0, got {ridge!r}; 0 adds nothing")
    return (_descending(eigenvalues) + ridge).log().sum(-1)


def participation_ratio(eigenvalues: Tensor) -> Tensor:
    r"""Squared trace over squared Frobenius norm.

    .. math:: \bigl(\sum_i \lambda_i\bigr)^2 / \sum_i \lambda_i^2

    Returns:
        float64 tensor between 1 and C, 0 where every eigenvalue is zero. [...]

    Example:
        >>> participation_ratio(torch.tensor([1.0, 1.0, 0.0]))
        tensor(2., dtype=torch.float64)
    """
    ratios = _relative(eigenvalues)
    return ratios.sum(-1).square() / ratios.square().sum(-1).clamp_min(1.0)


def stable_rank(eigenvalues: Tensor) -> Tensor:
    r"""Trace over the largest eigenvalue: the stable rank of the feature matrix behind S.

    .. math:: \sum_i \lambda_i / \lambda_{\max}

    Returns:
        float64 tensor between 1 and C, 0 where every eigenvalue is zero. [...]

    Example:
        >>> stable_rank(torch.tensor([4.0, 1.0, 1.0]))
        tensor(1.5000, dtype=torch.float64)
    """
    return _relative(eigenvalues).sum(-1)


def power_law(eigenvalues: Tensor) -> tuple[Tensor, Tensor]:
    r"""Exponent of :math:`\lambda_i \approx a\, i^{-\text{exponent}}` and the error of the fit.

    Unweighted least squares of :math:`\ln\lambda_i` on :math:`\ln i` over the ranks that hold 99 %
    of the variance (``i = 1 .. rank_at(0.99)``; at least the first three ranks), zero eigenvalues
    left out. The cut keeps out the tail, where sampling noise bends every spectrum down. The error
    is the root mean square residual of :math:`\ln\lambda_i` over these ranks: 0.1 means
    eigenvalues within about 10 % of the line.

    Returns:
        Exponent and error, float64; NaN below two positive eigenvalues. [...], [...]

    Example:
        >>> exponent, error = power_law(torch.arange(1, 101).double() ** -1.5)
        >>> round(exponent.item(), 6), round(error.item(), 6)
        (1.5, 0.0)
    """
    ratios = _relative(eigenvalues)
    ranks = torch.arange(1, ratios.shape[-1] + 1, dtype=torch.float64, device=ratios.device)
    last = rank_at(ratios, 0.99).clamp_min(_LEAST_FITTED_RANKS).unsqueeze(-1)
    return _fit_power_law(ratios, (ranks <= last).double())


def alpha(eigenvalues: Tensor, first: int = 12, last: int = 100) -> Tensor:
    r"""Exponent of alpha-ReQ: power law of the eigenvalues over a range of ranks.

    .. math:: \min_{\alpha, a} \sum_{i=\text{first}}^{\text{last}}
              \tfrac1i \bigl(\ln\lambda_i - a + \alpha \ln i\bigr)^2

    The default range is that of published code. The paper's spectra are of centred rows.

    Args:
        eigenvalues: Values in any order; negatives count as zero and are not fitted. [..., C]
        first: Smallest rank, from 1.
        last: Largest rank; ranks above C are left out.

    Returns:
        float64 tensor; NaN below two positive eigenvalues in the range. [...]

    Raises:
        ValueError: If the range holds fewer than two ranks.

    Example:
        >>> round(alpha(torch.arange(1, 201).double() ** -1.5).item(), 6)
        1.5
    """
    if not 1 <= first < last:
        raise ValueError(f"ranks must be 1 <= first < last, got first={first}, last={last}")
    ratios = _relative(eigenvalues)
    ranks = torch.arange(1, ratios.shape[-1] + 1, dtype=torch.float64, device=ratios.device)
    return _fit_power_law(ratios, ((ranks >= first) & (ranks <= last)) / ranks)[0]


def _fit_power_law(ratios: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Exponent and root mean square residual of a weighted fit without the zeros. [...], [...]"""
    ranks = torch.arange(1, ratios.shape[-1] + 1, dtype=torch.float64, device=ratios.device)
    weights = weights * (ratios > 0)
    total = weights.sum(-1, keepdim=True)
    log_rank = ranks.log().expand_as(ratios)
    log_value = torch.where(ratios > 0, ratios, 1.0).log()
    rank_offset = log_rank - (weights * log_rank).sum(-1, keepdim=True) / total
    value_offset = log_value - (weights * log_value).sum(-1, keepdim=True) / total
    covariation = (weights * rank_offset * value_offset).sum(-1, keepdim=True)
    slope = covariation / (weights * rank_offset.square()).sum(-1, keepdim=True)
    residual = (weights * (value_offset - slope * rank_offset).square()).sum(-1, keepdim=True)
    has_two = (weights > 0).sum(-1, keepdim=True) >= 2
    exponent = torch.where(has_two, -slope, math.nan)
    error = torch.where(has_two, (residual / total).sqrt(), math.nan)
    return exponent[..., 0], error[..., 0]


def interval(eigenvalues: Tensor, count: int) -> tuple[Tensor, Tensor]:
    r"""Simultaneous 95 % interval of the true eigenvalues behind a sampled spectrum.

    .. math:: \hat\lambda_i / (1 + r)^2 \le \lambda_i \le \hat\lambda_i / (1 - r)^2, \quad
              r = \sqrt{C / N} + \sqrt{2 \ln(2 / 0.05) / N}

    Ostrowski's theorem turns the extreme eigenvalues of the whitened sample covariance into bounds
    on every ratio at once; Davidson and Szarek bound those extremes. Assumed: N independent
    Gaussian rows of equal weight and zero mean (a covariance about the estimated mean loses one
    row, a fixed mean adds one channel: negligible). Positions of one image are correlated, so the
    truth about an activation may lie outside, the more so the fewer the images; heavy tails add.

    Args:
        eigenvalues: Those of a covariance of ``count`` rows; negatives count as zero. [..., C]
        count: Rows N, at least 0.

    Returns:
        Lower and upper ends, descending, float64; the upper end is infinite where r >= 1, that is
        below about C + 5.5 sqrt(C) + 7.4 rows. [..., C], [..., C]

    Raises:
        ValueError: If ``count`` is negative.

    Example:
        >>> lower, upper = interval(torch.tensor([2.0, 1.0]), count=10_000)
        >>> [round(x, 3) for x in (*lower.tolist(), *upper.tolist())]
        [1.844, 0.922, 2.176, 1.088]
    """
    if count < 0:
        raise ValueError(f"count must be a number of rows >= 0, got {count}")
    descending = _descending(eigenvalues)
    if count == 0:
        return torch.zeros_like(descending), torch.full_like(descending, math.inf)
    tail = math.sqrt(2 * math.log(2 / (1 - _CONFIDENCE)))
    r = (math.sqrt(descending.shape[-1]) + tail) / math.sqrt(count)
    lower = descending / (1 + r) ** 2
    upper = descending / (1 - r) ** 2 if r < 1 else torch.full_like(descending, math.inf)
    return lower, upper


def uncertainty(eigenvalues: Tensor, count: int) -> Tensor:
    r"""95 % bound on all :math:`|\hat\lambda_i - \lambda_i|`: the wider side of :func:`interval`.

    Args:
        eigenvalues: Those of a covariance of ``count`` rows; negatives count as zero. [..., C]
        count: Independent rows, at least 0.

    Returns:
        float64, descending; infinite where there are too few rows. [..., C]

    Raises:
        ValueError: If ``count`` is negative.

    Example:
        >>> uncertainty(torch.tensor([2.0, 1.0]), count=10_000)
        tensor([0.1760, 0.0880], dtype=torch.float64)
    """
    return interval(eigenvalues, count)[1] - _descending(eigenvalues)


def spectral_distance(a: Spectrum, b: Spectrum) -> float:
    r"""Share of the variance that would have to change rank to turn one spectrum into the other.

    .. math:: d = \tfrac12 \sum_i |p_i - q_i|, \quad p_i = \lambda_i^a / \sum_j \lambda_j^a

    with eigenvalues in descending order and the shorter list filled with zeros: the total variation
    distance of the trace-normalised spectra. 0 for the same shape at any scale, 1 at most. It
    compares how variance is spread, not in which directions: equal spectra may span different
    subspaces.

    Args:
        a: Spectrum of any width.
        b: Spectrum of any width.

    Returns:
        Distance in [0, 1]; 1 where exactly one of them has no variance, 0 where neither has.

    Example:
        >>> flat = Spectrum(torch.tensor([1.0, 1.0]), count=64, total=2.0)
        >>> steep = Spectrum(torch.tensor([9.0, 1.0, 0.0]), count=64, total=10.0)
        >>> round(spectral_distance(flat, steep), 6)
        0.4
    """
    width = max(a.channels, b.channels)
    shares = torch.zeros(2, width, dtype=torch.float64, device="cpu")
    for row, spectrum in enumerate((a, b)):
        relative = _relative(spectrum.eigenvalues)
        shares[row, : spectrum.channels] = relative / relative.sum().clamp_min(1.0)
    has_variance = shares.sum(-1) > 0
    if not bool(has_variance.all()):
        return float(has_variance.any())
    return float((shares[0] - shares[1]).abs().sum() / 2)


def _is_number(value: object) -> bool:
    return hasattr(value, "__float__")


def _descending(eigenvalues: Tensor) -> Tensor:
    if not isinstance(eigenvalues, Tensor) or not eigenvalues.is_floating_point():
        kind = eigenvalues.dtype if isinstance(eigenvalues, Tensor) else type(eigenvalues).__name__
        raise ValueError(
            f"eigenvalues must be a floating-point tensor, got {kind}; convert with .double()"
        )
    if eigenvalues.dim() == 0 or eigenvalues.shape[-1] == 0:
        raise ValueError(
            f"eigenvalues need shape [..., C] with C >= 1, got {list(eigenvalues.shape)}; "
            "a layer without rows has no spectrum"
        )
    finite = eigenvalues.isfinite()
    if not bool(finite.all()):
        raise ValueError(
            f"eigenvalues must be finite, got {eigenvalues[~finite][0].item()} in "
            f"{int((~finite).sum())} of {eigenvalues.numel()} places; drop such matrices first"
        )
    return eigenvalues.double().clamp_min(0.0).sort(-1, descending=True).values


def _relative(eigenvalues: Tensor) -> Tensor:
    """Descending eigenvalues over the largest, so that no scale overflows; 0 stays 0. [..., C]"""
    descending = _descending(eigenvalues)
    largest = descending[..., :1]
    return descending / torch.where(largest > 0, largest, 1.0)
