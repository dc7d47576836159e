"""Which rows are read at which step: a deterministic budget and a low-discrepancy sequence.

``rows="auto"`` spends 1 % of the watched modules' training flops on second moments and gives every
layer the same number of rows per channel, so that all spectra have the same statistical quality.
Where the rows of a call lie is defined once, in
:func:`fastcov.ops.reference.sample_index_reference`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

AUTO_BUDGET = 0.01
"""Share of the training flops that ``rows="auto"`` spends."""

ENOUGH_ROWS_PER_CHANNEL = 16
"""Rows per channel from which summary() calls a layer well measured."""

BUFFER_ROWS_PER_CHANNEL = 2
"""Rows per channel gathered before a state is updated once: below, state traffic dominates."""

MOST_DEVICE_ROWS = 4096
"""Rows a step up to which a GPU's narrow layers are sampled into a buffer. One program adds all of
them to a block: 128 turns of its loop, as many as the 2C rows of 2048 channels take."""

_DIRECT_ROWS_PER_CHANNEL = 1 / 3
"""Rows per channel of one call that a CPU adds at once: its kernel hides the traffic from there."""

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
_TRAINING_TO_FORWARD = 3  # flops of forward and backward over those of forward
WHOLE = 1 << 32
"""Every row, as a fixed-point fraction: carried parts are then exact on every machine."""
_PART = WHOLE - 1  # bits of a carried part


def direct_rows(channels: int, is_cpu: bool) -> int:
    """Rows of one call from which on they are added at once, where every row is read.

    Example:
        >>> direct_rows(1536, is_cpu=True), direct_rows(1536, is_cpu=False)
        (512, 3072)
    """
    per_channel = _DIRECT_ROWS_PER_CHANNEL if is_cpu else BUFFER_ROWS_PER_CHANNEL
    return math.ceil(per_channel * channels)


def device_buffer_rows(channels: int, rows: float, calls: int) -> tuple[int, int] | None:
    """What a buffer with counters on the device must hold, where one serves.

    Args:
        channels: Of a row.
        rows: That a step brings to it.
        calls: That bring them: each may round up.

    Returns:
        Rows from which it counts as full, and the most of a step: it holds both together. None
        where a step brings more than one launch adds in good time.

    Example:
        >>> device_buffer_rows(64, 90.5, calls=1), device_buffer_rows(64, 400, calls=2)
        ((128, 92), (1, 402))
    """
    threshold, most_rows = BUFFER_ROWS_PER_CHANNEL * channels, math.ceil(rows) + calls
    if most_rows > max(threshold, MOST_DEVICE_ROWS):
        return None
    # What one step fills is emptied in every step: no room for two of them.
    return threshold if most_rows <= threshold else 1, most_rows


@dataclass(frozen=True)
class LayerLoad:
    """What one layer offers and costs in one step."""

    channels: int
    rows: int
    macs: int


def rows_per_channel(loads: Sequence[LayerLoad], budget: float = AUTO_BUDGET) -> float:
    r"""Rows per channel and step for which second moments cost a share of the training flops.

    .. math:: \sum_l k_l \frac{C_l (C_l + 1)}{2} = \text{budget} \cdot 3 \sum_l \text{macs}_l,
        \quad k_l = \min(N_l, \rho C_l)

    Water-filling: layers that offer fewer than rho C rows are read whole, and what they leave goes
    to the others.

    Args:
        loads: Channels, rows and forward MACs of each layer, of one step.
        budget: Share of the training flops.

    Returns:
        rho; infinite where the budget pays for every row.

    Example:
        >>> rows_per_channel([LayerLoad(channels=10, rows=1000, macs=100_000)])
        5.454545454545454
    """
    offered = [load for load in loads if load.rows > 0]
    # Taps on modules without weights alone: as if a C x C layer read each of them.
    macs = sum(load.macs for load in offered) or sum(
        load.rows * load.channels**2 for load in offered
    )
    left = budget * _TRAINING_TO_FORWARD * macs
    offered.sort(key=lambda load: load.rows / load.channels)
    for position, load in enumerate(offered):
        cost = sum(other.channels * _row_cost(other.channels) for other in offered[position:])
        if left < load.rows / load.channels * cost:
            return left / cost
        left -= load.rows * _row_cost(load.channels)
    return math.inf


def read_fraction(load: LayerLoad, rho: float) -> float:
    """Share of a layer's rows that ``rho`` rows per channel and step are, at most 1."""
    return min(1.0, rho * load.channels / load.rows)


def _row_cost(channels: int) -> float:
    return channels * (channels + 1) / 2


def fixed_point(fraction: float) -> int:
    """A fraction in units of 2**-32, rounded up, so that rows / N of N rows gives all of them."""
    return min(WHOLE, -int(-fraction * WHOLE // 1))


def rows_due(rows: int, fraction: int, carry: int) -> tuple[int, int]:
    """Rows to read in one call, and the fraction of a row carried to the next.

    Args:
        rows: Rows that the call offers.
        fraction: From :func:`fixed_point`.
        carry: What the call before returned, 0 at first.

    Returns:
        Number of rows and new carry.

    Example:
        >>> rows_due(10, fixed_point(0.25), 0)
        (2, 2147483648)
    """
    due = rows * fraction + carry
    return due >> 32, due & _PART


def first_fill(layer: int) -> float:
    """Share of a buffer that fills before it is emptied for the first time.

    Equal rows per channel fill the buffers of all layers in the same step. Emptied once before,
    each at another moment, they stay apart: no step pays for all. A golden-ratio sequence spreads
    neighbours, which are of like width; every rank has the same, so that ranks wait for no other.

    Args:
        layer: Its number.

    Returns:
        In (0, 1].

    Example:
        >>> [round(first_fill(layer), 2) for layer in range(4)]
        [1.0, 0.38, 0.76, 0.15]
    """
    return 1.0 - layer * _GOLDEN_RATIO % 1.0


def sequence_phase(name: str, rank: int = 0, seed: int = 0) -> int:
    """Start of a layer's sampling sequence: another on every layer, rank and seed.

    Returns:
        64 bits as a signed integer.
    """
    digest = hashlib.blake2b(f"{seed}/{rank}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
