"""Sampling sequence: number, start and spread of the rows that are read, without random numbers.

The sequence is golden-ratio and of low discrepancy. The rows of a call that a sample number stands
for are defined once, in :func:`fastcov.ops.reference.sample_index_reference`.
"""

from __future__ import annotations

import hashlib
import math

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
WHOLE = 1 << 32
"""Fraction 1, every row, in units of 2**-32. Such integers carry parts of rows without rounding, so
that all machines read the same rows."""
_CARRY_BITS = WHOLE - 1


def fixed_point(fraction: float) -> int:
    """Fraction in units of 2**-32, rounded up: k / N of N rows is then k rows, not one less."""
    return min(WHOLE, -int(-fraction * WHOLE // 1))


def rows_due(rows: int, fraction: int, carry: int) -> tuple[int, int]:
    """Rows to read in one call, and the fraction of a row carried to the next.

    Args:
        rows: Rows that the call offers.
        fraction: Share of the rows to read, from :func:`fixed_point`.
        carry: Carry that the call before returned, 0 at first.

    Returns:
        Number of rows, and the new carry.

    Example:
        >>> rows_due(10, fixed_point(0.25), 0)
        (2, 2147483648)
    """
    due = rows * fraction + carry
    return due >> 32, due & _CARRY_BITS


def first_fill(layer: int) -> float:
    """Share of a layer's buffer that is filled before it is emptied for the first time, in (0, 1].

    Equal rows per channel would fill the buffers of all layers in the same step. Another share for
    each layer keeps them apart, so that no step pays for all. A golden-ratio sequence spreads
    neighbours, whose widths are similar. Every rank has the same shares, so that no rank waits for
    another.

    Example:
        >>> [round(first_fill(layer), 2) for layer in range(4)]
        [1.0, 0.38, 0.76, 0.15]
    """
    return 1.0 - layer * _GOLDEN_RATIO % 1.0


def sequence_phase(name: str, rank: int = 0) -> int:
    """Start of a layer's sampling sequence, 64 bits; another for every layer and rank."""
    digest = hashlib.blake2b(f"0/{rank}/{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
