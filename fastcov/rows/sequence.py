"""Which positions are read when: a deterministic low-discrepancy sequence.

Where the rows of a call lie is defined once, in
:func:`fastcov.ops.reference.sample_index_reference`.
"""

from __future__ import annotations

import hashlib
import math

_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
WHOLE = 1 << 32
"""Every row, as a fixed-point fraction: carried parts are then exact on every machine."""
_PART = WHOLE - 1  # bits of a carried part


def fixed_point(fraction: float) -> int:
    """A fraction in units of 2**-32, rounded up, so that rows / N of N rows gives all of them."""
    return min(WHOLE, -int(-fraction * WHOLE // 1))


def rows_due(rows: int, fraction: int, carry: int) -> tuple[int, int]:
    """Rows to read in one call, and the fraction of a row carried to the next.

    Args:
        rows: Rows that the call offers.
        fraction: From :func:`fixed_point`.
        carry: The carry that the call before returned, 0 at first.

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
        layer: Number of the layer.

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
