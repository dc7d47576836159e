"""Input taps that see the same tensors share one reader."""

from __future__ import annotations

import weakref
from typing import Literal

from torch import Tensor


class SharedInputs:
    """Follows which tap sees which tensor, call by call.

    The first tap that sees a tensor in a step reads it; a tap that has read nothing yet then
    shares its rows. Sharing ends where the two see different tensors: a branch that runs at times,
    a module called once more than the other. Others may have seen some of the tensors before both:
    the heads of a detector share all levels, though the last one also feeds a coarser level.

    Attributes:
        owner: The tap that reads for it, by sharing tap.
    """

    def __init__(self) -> None:
        self.owner: dict[int, int] = {}
        # By id, of the running step: the tensor, and the taps that saw it in their order.
        self._seen: dict[int, tuple[weakref.ref[Tensor], list[int]]] = {}
        self._calls: dict[int, int] = {}  # likewise
        self._apart: set[int] = set()  # split once: they never share again

    def see(
        self, tap: int, activation: Tensor, has_rows: bool
    ) -> Literal["reads", "shares", "splits"]:
        """What a call means for a tap.

        Args:
            tap: Whose module is called.
            activation: Its input.
            has_rows: Whether the tap has read rows of its own.

        Returns:
            "reads" for itself, "shares" the rows of ``owner[tap]``, or "splits" from its owner
            and reads for itself from now on.
        """
        self._calls[tap] = self._calls.get(tap, 0) + 1
        entry = self._seen.get(id(activation))
        if entry is None or entry[0]() is not activation:
            entry = self._seen[id(activation)] = (weakref.ref(activation), [])
        seen_by = entry[1]
        seen_by.append(tap)
        first = seen_by[0]
        owner = self.owner.get(tap)
        if owner is not None and owner not in seen_by:
            del self.owner[tap]
            self._apart.add(tap)
            return "splits"
        if owner is not None:
            return "shares"
        if first == tap or has_rows or tap in self._apart:
            return "reads"
        self.owner[tap] = first
        return "shares"

    def diverged(self) -> list[int]:
        """Taps that were called more or less often than their owner in this step; they split."""
        taps = [
            tap
            for tap, owner in self.owner.items()
            if self._calls.get(tap, 0) != self._calls.get(owner, 0)
        ]
        for tap in taps:
            del self.owner[tap]
        self._apart.update(taps)
        return taps

    def forget_step(self) -> None:
        """Forgets the tensors of the running step."""
        self._seen.clear()
        self._calls.clear()
