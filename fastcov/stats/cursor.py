"""Counters of one layer and its last call's layout, in memory that Python and operators share.

A call like the last one is then one operator, which sees that it is like it, counts it, and finds
which rows are due: each number that it is not given as an argument saves 0.2 us in every hook.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from typing import Protocol

import torch

from fastcov.rows.layout import ActivationLayout
from fastcov.rows.view import MOST_DIMS

# Places in the numbers; csrc/cursor.h has them in the same order.
CALLS = 0  # of the running step, then of the last one
OFFERED = 1  # rows, likewise
POSITIONS = 2  # of one image, likewise
FRACTION = 3  # of the rows that are read, in units of 2**-32; 0 where it is not known
CARRY = 4  # fraction of a row that is left over
SAMPLED = 5  # rows so far: the number of the next sample
FILL = 6  # rows in the buffer
LIMIT = 7  # rows that this fill of the buffer takes
PHASE = 8  # start of the sampling sequence
LAYOUT = 9  # ActivationLayout.numbers, from here on
FIELDS = LAYOUT + 4 + 2 * MOST_DIMS


class Cursor:
    """Where a layer stands.

    Args:
        numbers: int64 values in the order of this module's constants; zeros without.

    Attributes:
        numbers: For Python: an element takes a tenth of the time that one of a tensor does.
        tensor: The same memory, for operators: int64. [FIELDS]
        layout: Layout whose numbers are held, that operators compare calls with.
    """

    __slots__ = ("layout", "numbers", "tensor")

    def __init__(self, numbers: Iterable[int] = (0,) * FIELDS) -> None:
        self.numbers = array("q", numbers)
        self.layout: ActivationLayout | None = None
        with torch.inference_mode(False):
            self.tensor = torch.frombuffer(self.numbers, dtype=torch.int64)

    def expect(self, layout: ActivationLayout) -> None:
        """Sets the layout that operators compare the next calls with."""
        assert layout.numbers is not None
        self.numbers[LAYOUT:] = layout.numbers
        self.layout = layout

    def __reduce__(self) -> tuple[type[Cursor], tuple[list[int]]]:
        # Copied apart, numbers and tensor would no longer share memory.
        return Cursor, (self.numbers.tolist(),)


class HasCursor(Protocol):
    """What a :class:`Counter` may be an attribute of."""

    cursor: Cursor


class Counter:
    """Attribute that is a number of its owner's cursor.

    Args:
        place: One of this module's constants.
    """

    def __init__(self, place: int) -> None:
        self._place = place

    def __get__(self, owner: HasCursor, _kind: type | None = None) -> int:
        return owner.cursor.numbers[self._place]

    def __set__(self, owner: HasCursor, value: int) -> None:
        owner.cursor.numbers[self._place] = value
