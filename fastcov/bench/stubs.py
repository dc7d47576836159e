"""Stubs in place of the work that a hook starts, so that the hook's own host time is left."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fastcov import kernels
from fastcov.bench.peers import MissingPeerError
from fastcov.ops import backend, counted, library
from fastcov.ops.backend import service_of
from fastcov.stats.state import CovarianceState

_INHERITED = object()


class Stubs:
    """Attributes that are others inside a ``with`` block.

    Args:
        replaced: Owner, name and value of each.
    """

    def __init__(self, *replaced: tuple[Any, str, Any]) -> None:
        self._replaced = replaced
        self._saved: list[tuple[Any, str, Any]] = []

    def __enter__(self) -> None:
        for owner, name, value in self._replaced:
            # An inherited attribute is not the class's own to give back.
            self._saved.append((owner, name, vars(owner).get(name, _INHERITED)))
            setattr(owner, name, value)

    def __exit__(self, *_error: object) -> None:
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _INHERITED:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


class OperatorStubs(Stubs):
    """A CPU's operators, still called, with no row to read.

    Attributes:
        repeats_calls: True if they include those that read a call like the last one. These are no
            stubs: the work that they do beside copying and adding rows stays.
    """

    def __init__(self) -> None:
        self.repeats_calls = service_of(torch.float32, torch.device("cpu")).repeats_calls
        again: list[tuple[Any, str, Any]] = []
        if self.repeats_calls:
            again = [
                (library, "gather_again_", library.gather_again_),
                (library, "accumulate_again_", _accumulate_again()),
            ]
        super().__init__(
            *again,
            (library, "GATHER", dict.fromkeys(library.GATHER, _dispatched_gather())),
            (library, "ACCUMULATE", dict.fromkeys(library.ACCUMULATE, _dispatched_accumulate())),
        )

    @contextmanager
    def counted(self) -> Iterator[list[str]]:
        """Names of the operators that hooks call inside: takes time of its own."""
        calls: list[str] = []

        def counting(name: str, stub: Any) -> Any:
            if isinstance(stub, dict):
                return {kernels: counting(name, each) for kernels, each in stub.items()}

            def call(*arguments: Any, **options: Any) -> Any:
                calls.append(name)
                return stub(*arguments, **options)

            return call

        with self:
            for owner, name, stub in self._replaced:
                setattr(owner, name, counting(name, stub))
            yield calls


class KernelStubs(Stubs):
    """Launches of kernels as far as the driver's call: of no program, it is left out.

    On a CPU its tensors stand for those of an H100 (bench/stand_in.py), and nothing reads them.

    Args:
        device: A GPU, or a CPU.

    Raises:
        MissingPeerError: If Triton cannot be used there.
    """

    def __init__(self, device: torch.device) -> None:
        if reason := kernels.unavailable_reason():
            raise MissingPeerError(f"needs Triton: {reason}")
        from fastcov.kernels.launch import Launch

        simulated: list[tuple[Any, str, Any]] = []
        if device.type == "cpu":
            is_compiled = library.has_kernel("gather_counted_", "CPU")
            gpu = backend.GPU._replace(has_compiled_gather=is_compiled)
            simulated = [*_stand_in_gpu(), (backend, "active", backend.Pretended(gpu))]
        elif not (found := backend.backends()["triton"]).active:
            raise MissingPeerError(f"needs Triton: {found.reason}")
        of = Launch.of

        def of_no_program(*arguments: Any, **options: Any) -> Launch:
            return replace(of(*arguments, **options), grid=(0, 1, 1))

        super().__init__(
            *simulated, (Launch, "of", of_no_program), (counted, "blocks_of", lambda *_: 0)
        )

    def __enter__(self) -> None:
        _forget_launches()
        super().__enter__()

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        _forget_launches()

    @contextmanager
    def counted(self) -> Iterator[list[str]]:
        """Names of the kernels that hooks launch inside: takes time of its own."""
        gather_ = library.gather_counted_

        def gather_counted_(*arguments: Any) -> int:
            calls.append("gather_counted_")
            return gather_(*arguments)

        with (
            self,
            Stubs((library, "gather_counted_", gather_counted_)),
            _noted_launches() as calls,
        ):
            yield calls


@contextmanager
def _noted_launches() -> Iterator[list[str]]:
    """Names of the kernels that are launched inside, through Triton's hooks."""
    from triton import knobs

    names: list[str] = []

    def note(launch: Any) -> None:
        names.append(launch.get()["name"])

    hooks = knobs.runtime.launch_enter_hook
    hooks.add(note)
    try:
        yield names
    finally:
        hooks.remove(note)


def _forget_launches() -> None:
    # Launches of no program must not be reused outside the stubs, nor others' inside.
    from fastcov.kernels.job import cached_job

    cached_job.cache_clear()


def _stand_in_gpu() -> list[tuple[Any, str, Any]]:
    from fastcov.bench.stand_in import stand_in_gpu

    try:
        return stand_in_gpu()
    except RuntimeError as error:
        raise MissingPeerError(str(error)) from error


def _accumulate_again() -> Callable[..., int]:
    # At a fraction below 1 the operator compares the call with the last one, and adds nothing.
    real = library.accumulate_again_
    return lambda *arguments: real(*arguments) and 0


def _dispatched_gather() -> Callable[..., None]:
    real = library.gather_

    def stub(
        buffer: Tensor, rows: Tensor, row: int, first: int, _due: int, run: int, phase: int, c: int
    ) -> None:
        real(buffer, rows, row, first, 0, run, phase, c)

    return stub


def _dispatched_accumulate() -> Callable[..., None]:
    real = library.accumulate_
    state, none = CovarianceState(1), torch.zeros(0, 1)
    moments = (state.moment, state.sum, state.shift, state.weight, state.count)
    return lambda *_arguments: real(*moments, none, -1)
