"""Input taps that see the same tensors share one reader."""

from __future__ import annotations

from collections import defaultdict
from typing import Literal
from weakref import ref

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
        # Of the running step: what each tap saw, and the taps in the order of all calls.
        self._seen: defaultdict[int, list[ref[Tensor]]] = defaultdict(list)
        self._order: list[int] = []
        self._apart: set[int] = set()  # split once: they never share again

    def reads(self, tap: int, has_rows: bool) -> bool:
        """Whether :meth:`see` says "reads" for a tap, whatever its tensor."""
        return has_rows and tap not in self.owner

    def note(self, tap: int, activation: Tensor) -> None:
        """What :meth:`see` does for such a tap."""
        self._seen[tap].append(ref(activation))
        self._order.append(tap)

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
        self.note(tap, activation)
        owner = self.owner.get(tap)
        if owner is None:
            if has_rows or tap in self._apart or (first := self._first(activation)) == tap:
                return "reads"
            self.owner[tap] = first
            return "shares"
        for seen in self._seen[owner]:
            if seen() is activation:
                return "shares"
        del self.owner[tap]
        self._apart.add(tap)
        return "splits"

    def _first(self, activation: Tensor) -> int:
        calls = {tap: iter(seen) for tap, seen in self._seen.items()}
        return next(tap for tap in self._order if next(calls[tap])() is activation)

    def diverged(self) -> list[int]:
        """Taps that were called more or less often than their owner in this step; they split."""
        taps = [
            tap
            for tap, owner in self.owner.items()
            if len(self._seen[tap]) != len(self._seen[owner])
        ]
        for tap in taps:
            del self.owner[tap]
        self._apart.update(taps)
        return taps

    def forget_step(self) -> None:
        """Forgets the tensors of the running step."""
        for seen in self._seen.values():
            seen.clear()
        self._order.clear()
