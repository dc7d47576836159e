"""Start of kernels: through Triton the first time, then by the compiled kernel's launcher alone.

``JITFunction.run`` binds some 25 arguments, looks up a compilation and compares every constant of
the module: 10 us a launch on two cores of an AMD EPYC, in every hook. Nothing of that can change
between launches whose tensors keep their dtypes, alignment and device, so the compiled kernel that
the first launch returns is kept and started directly, with addresses in place of tensors: by the
function in C that Triton's launcher ends in (launcher.py).
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from triton import knobs
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcov.kernels.config import Architecture
from fastcov.kernels.launcher import LauncherCall, UnknownLauncherError
from fastcov.kernels.tiles import IS_INTERPRETED

_CONVENTION = (
    "grid_0, grid_1, grid_2, stream, kernel.function, kernel.packed_metadata, launch_metadata, "
    "knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook, *bound_args.values()"
)


@lru_cache
def architecture_of(device: torch.device) -> Architecture:
    """Kind of GPU that a tensor lies on.

    The interpreter stands for an sm_90 of two multiprocessors, a CPU without it for an H100.
    """
    if IS_INTERPRETED:
        return Architecture("sm_90", 2)
    if device.type == "cpu":
        return Architecture("sm_90", 132)
    return Architecture.of(torch.cuda.get_device_properties(device))


def is_current(device: int) -> bool:
    """True if a device is the current one, or a CPU (number -1), so that launches need no switch.

    A switch to another device and back takes 0.8 us of every hook, and is seldom needed.
    """
    return device < 0 or device == torch.cuda.current_device()


def has_known_convention(run: Callable[..., Any]) -> bool:
    """True if Triton calls the launcher of a compiled kernel as :class:`Starter` does.

    Read from the source of ``JITFunction.run``, which is the same in Triton 3.6.0, 3.7.1 and 3.8.0.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(run)))
    except (OSError, TypeError, SyntaxError):
        return False
    calls = (node for node in ast.walk(tree) if isinstance(node, ast.Call))
    found = [
        ", ".join(map(ast.unparse, call.args))
        for call in calls
        if ast.unparse(call.func) == "kernel.run"
    ]
    return found == [_CONVENTION]


STARTS_DIRECTLY = has_known_convention(JITFunction.run)
"""True if compiled kernels are started without Triton's own call: decided at import."""


def is_watched() -> bool:
    """True if a profiler wants to be called at each launch, as only Triton's own call does."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


@dataclass(frozen=True)
class Launch:
    """One launch of a kernel, but for its tensors.

    Attributes:
        kernel: A function of Triton's.
        grid: Programs in three dimensions.
        arguments: Behind the tensors, in the kernel's order: numbers, then constants. Passed by
            name, the constants would take 0.8 us in every launch.
        options: Numbers of warps and stages.
    """

    kernel: Any
    grid: tuple[int, ...]
    arguments: tuple[Any, ...]
    options: Mapping[str, int]

    @classmethod
    def of(
        cls,
        kernel: Any,
        grid: tuple[int, ...],
        numbers: tuple[Any, ...],
        constants: Mapping[str, Any],
        **options: int,
    ) -> Launch:
        """A launch whose constants are given by name.

        Args:
            kernel: Its compile-time arguments are in capitals and come last.
            grid: Programs in one to three dimensions.
            numbers: Arguments between the tensors and the constants.
            constants: Every compile-time argument.
            options: Numbers of warps and stages.

        Raises:
            TypeError: If the kernel takes other constants.
        """
        names = [name for name in kernel.arg_names if name.isupper()]
        if set(names) != constants.keys():
            raise TypeError(f"{kernel.__name__} takes {names}, not {list(constants)}")
        whole_grid = (*grid, 1, 1)[:3]
        return cls(kernel, whole_grid, (*numbers, *(constants[n] for n in names)), options)

    def start(self, *tensors: Any) -> Any:
        """Launch through Triton, which compiles the kernel if that has not been done.

        Args:
            tensors: Tensors, descriptors or None in the kernel's order, and numbers that follow
                them there.

        Returns:
            The compiled kernel; None in the interpreter.
        """
        # kernel[grid](...) would make a function for it, which copies all arguments.
        return self.kernel.run(
            *tensors, *self.arguments, grid=self.grid, warmup=False, **self.options
        )


class Starter:
    """A launch made again and again, with tensors that keep their dtypes, alignment and device.

    Args:
        launch: With all its numbers.
        device: Number of the GPU.

    Attributes:
        directly: Starts the compiled kernel, given addresses or None in the places of the tensors,
            :meth:`expand` of descriptors, and the same numbers; None until two launches through
            Triton, and where Triton has to start the kernel.
    """

    __slots__ = ("_call", "_compiled", "_device", "_launch", "directly")

    def __init__(self, launch: Launch, device: int) -> None:
        self._launch = launch
        self._device = device
        self._compiled: Any = None
        self._call: LauncherCall | None = None
        self.directly: Callable[..., None] | None = None

    def through_triton(self, *tensors: Any) -> None:
        """Launch by Triton's own call, which keeps the compiled kernel."""
        launch, before = self._launch, self._compiled
        compiled = self._compiled = launch.start(*tensors)
        # Many launches are made only once, by a layout of rows that never comes again.
        if not STARTS_DIRECTLY or compiled is None or compiled is not before or self._call:
            return
        tail = (compiled.function, compiled.packed_metadata, None, None, None)
        values = (*tensors, *launch.arguments)
        try:
            self._call = LauncherCall(compiled.run, launch.grid, tail, values)
        except UnknownLauncherError:
            return
        self.directly = _direct_start(self._call, launch.arguments, self._device)

    def expand(self, descriptor: TensorDescriptor) -> tuple[Any, ...]:
        """Values that :attr:`directly` takes in place of a descriptor: see LauncherCall.expand.

        Args:
            descriptor: Its tensor may lie anywhere; sizes and dtype are those of the first launch.
        """
        assert self._call is not None
        return self._call.expand(descriptor)


def _direct_start(
    call: LauncherCall, arguments: tuple[Any, ...], device: int
) -> Callable[..., None]:
    # Functions over local variables: attributes would be looked up at every launch.
    function, head, middle = call.function, call.head, call.middle
    stream_of = driver.active.get_current_stream

    def start(*values: Any) -> None:
        function(*head, stream_of(device), *middle, *values, *arguments)

    def start_nested(*values: Any) -> None:
        function(*head, stream_of(device), *middle, (*values, *arguments))

    return start_nested if call.is_nested else start
