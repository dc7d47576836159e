"""Counters of one layer and its last call's layout, in memory that Python and operators share.

One operator then does all of a call whose layout is that of the last one: it compares the layouts,
counts the call, and finds the rows that are due. Each number that need not be passed as an argument
saves 0.2 us in every hook.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Protocol

import torch

from fastcov.rows.layout import ActivationLayout
from fastcov.rows.view import MOST_DIMS

# Places in the numbers; csrc/cursor.h has them in the same order. Calls, rows and positions are
# those of the running step, and after its end those of the last one.
CALLS = 0  # calls of the layer
OFFERED = 1  # rows that these calls offered
POSITIONS = 2  # positions of one image, summed over these calls
FRACTION = 3  # share of the rows to read, in units of 2**-32; 0 while it is not known
CARRY = 4  # fraction of a row carried to the next call, in the same units
SAMPLED = 5  # rows sampled in all steps: the number of the next sample
FILL = 6  # rows in the buffer
LIMIT = 7  # most rows that the buffer takes before it is emptied
PHASE = 8  # start of the sampling sequence
LAYOUT = 9  # first of ActivationLayout.numbers
FIELDS = LAYOUT + 4 + 2 * MOST_DIMS


class Cursor:
    """Numbers of one layer: its counters, and the layout that operators compare calls with.

    Args:
        numbers: int64 values in the order of this module's constants; zeros by default.

    Attributes:
        numbers: Array for Python, which reads an element ten times as fast as a tensor's.
        tensor: int64 tensor for operators, on the memory of ``numbers``. [FIELDS]
        layout: Layout that ``numbers`` holds; None before :meth:`expect`.
    """

    __slots__ = ("layout", "numbers", "tensor")

    def __init__(self, numbers: Iterable[int] = (0,) * FIELDS) -> None:
        self.numbers = array("q", numbers)
        self.layout: ActivationLayout | None = None
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self.numbers, dtype=torch.int64)

    def expect(self, layout: ActivationLayout) -> None:
        """Setter of the layout that operators compare the next calls with."""
        assert layout.numbers is not None
        self.numbers[LAYOUT:] = layout.numbers
        self.layout = layout

    def __reduce__(self) -> tuple[type[Cursor], tuple[list[int]]]:
        # Copied apart, numbers and tensor would no longer share memory.
        return Cursor, (self.numbers.tolist(),)


class HasCursor(Protocol):
    """Object with a cursor, of which a :class:`Counter` may be an attribute."""

    cursor: Cursor


class Counter:
    """Descriptor that reads and writes one number of its owner's cursor, by its place."""

    def __init__(self, place: int) -> None:
        self._place = place

    def __get__(self, owner: HasCursor, _kind: type | None = None) -> int:
        return owner.cursor.numbers[self._place]

    def __set__(self, owner: HasCursor, value: int) -> None:
        owner.cursor.numbers[self._place] = value
