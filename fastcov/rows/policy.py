r"""Sampling policies of track() and estimate(): the share of its rows that each layer reads.

A policy computes the shares from the rows that layers offer in one step. A new policy is one class
here and one line in :func:`policy_of`.

``rows="auto"`` spends 1 % of the watched modules' training flops on second moments and gives every
layer the same number of rows per channel, so that all spectra have the same statistical quality.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

Rows = Literal["auto", "all"] | int | float
"""Type of the argument ``rows`` of :func:`fastcov.track`."""

AUTO_BUDGET = 0.01
"""Share of the watched modules' training flops that ``rows="auto"`` spends."""

ENOUGH_ROWS_PER_CHANNEL = 16
"""Rows per channel from which summary() calls a layer well measured."""

_TRAINING_TO_FORWARD = 3  # flops of forward and backward over those of forward


@dataclass(frozen=True)
class LayerLoad:
    """Rows that one layer offers in one step, and the cost of its forward.

    Attributes:
        channels: Length of a row, C.
        rows: Rows offered.
        macs: Multiply-accumulates of the layer's forward.
        sketch: Channels that the rows are projected to; None, or as many as a row has, keeps all.
    """

    channels: int
    rows: int
    macs: int
    sketch: int | None = None

    @property
    def row_macs(self) -> float:
        """Multiply-accumulates that one row takes: of its projection, and of half a moment.

        Example:
            >>> LayerLoad(1000, 1, 0).row_macs, LayerLoad(1000, 1, 0, sketch=99).row_macs
            (500500.0, 104050.0)
        """
        order, projection = self.channels, 0
        if self.sketch is not None and self.sketch < self.channels:
            order, projection = self.sketch + 1, self.sketch * self.channels
        return projection + order * (order + 1) / 2


class Policy(Protocol):
    """Rule that gives each layer the share of its rows to read.

    Attributes:
        first_fraction: Share from the first row on; None where a first step must show row counts.
        rho: Rows per channel and step; None where the policy has none, or does not know it yet.
    """

    first_fraction: float | None
    rho: float | None

    def fractions(
        self, new: Mapping[str, LayerLoad], everything: Mapping[str, LayerLoad]
    ) -> dict[str, float]:
        """Shares of the rows to read, in (0, 1], by name of layers that are new in a step.

        Their loads come apart, and among those of all layers in that step.
        """


class Auto:
    """Policy of ``rows="auto"``: a budget of flops, the same rows per channel on every layer."""

    first_fraction: float | None = None

    def __init__(self) -> None:
        self.rho: float | None = None  # from the first step; layers that run first later keep to it

    def fractions(
        self, new: Mapping[str, LayerLoad], everything: Mapping[str, LayerLoad]
    ) -> dict[str, float]:
        """Implementation of :meth:`Policy.fractions`."""
        if new and self.rho is None:
            self.rho = rows_per_channel(list(everything.values()))
        rho = self.rho or 0.0
        return {name: min(1.0, rho * load.channels / load.rows) for name, load in new.items()}


class Share:
    """Policy of ``rows`` as a float, the share of all rows; 1.0 is ``rows="all"``."""

    rho: float | None = None

    def __init__(self, fraction: float) -> None:
        self.first_fraction: float | None = fraction

    def fractions(
        self, new: Mapping[str, LayerLoad], everything: Mapping[str, LayerLoad]
    ) -> dict[str, float]:
        """Implementation of :meth:`Policy.fractions`."""
        del everything
        assert self.first_fraction is not None
        return dict.fromkeys(new, self.first_fraction)


class Fixed:
    """Policy of ``rows`` as an int, the number of rows a layer and step."""

    first_fraction: float | None = None
    rho: float | None = None

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def fractions(
        self, new: Mapping[str, LayerLoad], everything: Mapping[str, LayerLoad]
    ) -> dict[str, float]:
        """Implementation of :meth:`Policy.fractions`."""
        del everything
        return {name: min(1.0, self._rows / load.rows) for name, load in new.items()}


def policy_of(rows: object) -> Policy:
    """Policy that the argument ``rows`` of :func:`fastcov.track` names.

    Raises:
        TypeError: If ``rows`` is neither a string nor a number.
        ValueError: If ``rows`` is out of range, or an unknown string.

    Example:
        >>> policy_of(0.25).first_fraction
        0.25
    """
    if isinstance(rows, str):
        if rows not in ("auto", "all"):
            raise ValueError(f"rows={rows!r}: choose one of 'auto', 'all'")
        return Auto() if rows == "auto" else Share(1.0)
    if isinstance(rows, bool) or not isinstance(rows, (int, float)):
        raise TypeError(f'rows={rows!r}: give "auto", "all", an int or a float')
    if isinstance(rows, int):
        if rows < 1:
            raise ValueError(f"rows={rows}: an int of rows a layer and step must be at least 1")
        return Fixed(rows)
    if not 0 < rows <= 1:
        raise ValueError(f"rows={rows}: a float is a share of all rows and must be in (0, 1]")
    return Share(rows)


def rows_per_channel(loads: Sequence[LayerLoad]) -> float:
    r"""Rows per channel and step for which second moments cost a share of the training flops.

    .. math:: \sum_l k_l \frac{C_l (C_l + 1)}{2} = \text{budget} \cdot 3 \sum_l \text{macs}_l,
        \quad k_l = \min(N_l, \rho C_l)

    A row of a sketched layer costs :attr:`LayerLoad.row_macs`, for the projection and the sketch's
    moment. Water-filling: layers that offer fewer than rho C rows are read whole, and the flops
    that they leave go to the others.

    Args:
        loads: Loads of all layers in one step.

    Returns:
        Rows per channel, rho; infinite where the budget pays for every row.

    Example:
        >>> rows_per_channel([LayerLoad(channels=10, rows=1000, macs=100_000)])
        5.454545454545454
    """
    offered = [load for load in loads if load.rows > 0]
    # Where no watched module has weights, as if a C x C layer read the rows of each.
    macs = sum(load.macs for load in offered) or sum(
        load.rows * load.channels**2 for load in offered
    )
    macs_left = AUTO_BUDGET * _TRAINING_TO_FORWARD * macs
    offered.sort(key=lambda load: load.rows / load.channels)
    for position, load in enumerate(offered):
        # Of one row per channel on this layer and all that offer more rows per channel.
        cost = sum(other.channels * other.row_macs for other in offered[position:])
        if macs_left < load.rows / load.channels * cost:
            return macs_left / cost
        macs_left -= load.rows * load.row_macs
    return math.inf
