"""Function in C that starts a compiled kernel, and the arguments that Triton's launcher gives it.

Around that function Triton has Python that runs at every launch: it asks whether the kernel needs
scratch memory, and copies some 50 arguments one by one where one of them is a tensor descriptor: 5
of the 6 us of such a launch (two cores of an Intel Xeon). Nothing there depends on more than the
descriptor, so a call with markers in place of arguments shows once where each one goes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import copy
from types import CellType, FunctionType
from typing import Any

from triton.tools.tensor_descriptor import TensorDescriptor

_WRAPPED = "launcher"  # variable of Triton's wrapper that holds the function in C


class UnknownLauncherError(Exception):
    """Launcher that does more than to pass on a kernel's arguments with descriptors expanded."""


class LauncherCall:
    """Call of the function in C that starts one kernel.

    The function takes ``head``, the stream, ``middle`` and the kernel's arguments, each descriptor
    expanded: one by one, or as one tuple.

    Args:
        launcher: Launcher of a compiled kernel, its attribute ``run``.
        head: Arguments of the launcher before the stream.
        tail: Arguments of the launcher between the stream and those of the kernel.
        values: Arguments of the kernel, with None and at most one descriptor in their places.

    Attributes:
        function: Function in C.
        head: Its arguments before the stream.
        middle: Its arguments between the stream and those of the kernel.
        is_nested: True if it takes the kernel's arguments as one tuple.

    Raises:
        UnknownLauncherError: If the launcher gives the kernel scratch memory, or is none that
            Triton 3.6 to 3.8 have.
    """

    __slots__ = (
        "_head",
        "_launcher",
        "_markers",
        "_tail",
        "function",
        "head",
        "is_nested",
        "middle",
    )

    def __init__(
        self,
        launcher: Any,
        head: tuple[Any, ...],
        tail: tuple[Any, ...],
        values: Sequence[Any],
    ) -> None:
        if launcher.global_scratch_size or launcher.profile_scratch_size:
            raise UnknownLauncherError
        self._head = head
        self._tail = tail
        self._launcher, self.function = _noting(launcher)
        self._markers = tuple(
            value if value is None or isinstance(value, TensorDescriptor) else object()
            for value in values
        )
        stream = object()
        given = self._given(stream, self._markers)
        place = _index(given, stream)
        self.head, rest = given[:place], given[place + 1 :]
        self.is_nested = isinstance(rest[-1], list | tuple)
        first = len(rest) - 1 if self.is_nested else _index(rest, self._markers[0])
        self.middle = rest[:first]
        self._without_descriptor(rest[-1] if self.is_nested else rest[first:], self._markers)

    def expand(self, descriptor: TensorDescriptor) -> tuple[Any, ...]:
        """Arguments that take the place of a descriptor: its address; the tensor is not kept."""
        markers = [descriptor if isinstance(m, TensorDescriptor) else m for m in self._markers]
        given = self._given(None, markers)
        passed = given[-1] if self.is_nested else given[len(self.head) + 1 + len(self.middle) :]
        return self._without_descriptor(passed, markers)

    def _given(self, stream: Any, values: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments that the launcher gives the function in C, which is not called."""
        seen: list[tuple[Any, ...]] = self._launcher.seen
        seen.clear()
        try:
            self._launcher(*self._head, stream, *self._tail, *values)
        except Exception as error:  # it does more with them than to pass them on
            raise UnknownLauncherError from error
        if len(seen) != 1:
            raise UnknownLauncherError
        return seen[0]

    @staticmethod
    def _without_descriptor(passed: Sequence[Any], values: Sequence[Any]) -> tuple[Any, ...]:
        """Arguments in place of the descriptor, where the others are passed on unchanged."""
        places = [n for n, value in enumerate(values) if isinstance(value, TensorDescriptor)]
        before = places[0] if places else len(values)
        end = len(passed) - max(0, len(values) - before - 1)
        kept = [*passed[:before], *passed[end:]]
        others = [value for n, value in enumerate(values) if n not in places]
        if len(places) > 1 or len(kept) != len(others) or any(map(_differ, kept, others)):
            raise UnknownLauncherError
        return tuple(passed[before:end])


def _noting(launcher: Any) -> tuple[Any, Callable[..., None]]:
    """Copy of a launcher that notes the C function and arguments it would call."""
    seen: list[tuple[Any, ...]] = []

    def note(*given: Any) -> None:
        seen.append(given)

    twin = copy(launcher)
    twin.seen = seen
    function = launcher.launch
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    if _WRAPPED not in names:
        twin.launch = note
        return twin, function
    cells = dict(zip(names, function.__closure__, strict=True))
    twin.launch = FunctionType(
        function.__code__,
        function.__globals__,
        closure=tuple(CellType(note) if name == _WRAPPED else cells[name] for name in names),
    )
    return twin, cells[_WRAPPED].cell_contents


def _index(values: Sequence[Any], wanted: object) -> int:
    found = next((n for n, value in enumerate(values) if value is wanted), None)
    if found is None:
        raise UnknownLauncherError
    return found


def _differ(one: object, other: object) -> bool:
    return one is not other
