"""Routes: short ways to read calls whose layout is that of an earlier call of the same tap.

The first call of a layout goes the whole way: :meth:`fastcov.stats.layer.Layer.read`. After it
:func:`choose` decides once, and later calls only use the chosen route, :meth:`Route.take`. Changes
that make the decision wrong (of fraction, dtype, buffer or device) end in
:meth:`fastcov.stats.layer.Layer.changed`, and the next call decides anew.

==================  ==============================================================================
Route               base: the layer decides in each call
AddOnHost           every row, added by one operator that compares the layout itself
SampleOnHost        the rows that are due, copied by one operator that compares the layout itself
AddThroughInput     every row of an affine layer, added by way of its input
SampleOnDevice      the rows that are due, copied on a GPU by one operator of the same kind
LaunchAdd           every row, added by GPU launches that were prepared before
LaunchSample        the rows that are due, copied by a GPU launch that was prepared before
Closed              no call is read
==================  ==============================================================================
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.ops import library
from fastcov.ops.counted import CountedGather
from fastcov.rows.layout import ActivationLayout, Key, ViewedRows, key_of
from fastcov.rows.sequence import WHOLE
from fastcov.stats.affine import AffineMap
from fastcov.stats.cursor import CALLS, FRACTION, OFFERED, POSITIONS
from fastcov.stats.device_buffer import DeviceBuffer
from fastcov.stats.layer import Layer

MOST_LAYOUTS = 128
"""Most layouts kept of one tap: a detector's heads see several sizes a step, new ones each time."""


class Known:
    """Entry of one known layout: its route, and the layout that came next the last time.

    Attributes:
        layout: The layout; None for :data:`START` and where one route takes every layout.
        route: Route of the layout's calls.
        follower: Entry of the layout that came next the last time, and is tried first.
    """

    __slots__ = ("follower", "layout", "route")

    def __init__(self, layout: ActivationLayout | None, route: Route) -> None:
        self.layout = layout
        self.route = route
        self.follower: Known = self


class Route:
    """Way to read the calls of one layout; the base lets the layer decide, call by call."""

    __slots__ = ("_routes", "layer", "layout")

    def __init__(self, routes: Routes, layout: ActivationLayout) -> None:
        self._routes = routes
        self.layer = routes.layer
        self.layout = layout

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Reading of a call; False, with nothing done, where the tensor has another layout.

        The tensor is one that the module returned or was given; ``args`` are those of its forward.
        """
        if not self.layout.fits(value):
            return False
        self.layer.read(value, self.layout, self._routes.source(module, args, value))
        self._routes.settle(self.layout, value)
        return True


class AddOnHost(Route):
    """Route that adds every row by one operator."""

    __slots__ = ("_cursor", "_state")

    def __init__(self, routes: Routes, layout: ActivationLayout) -> None:
        super().__init__(routes, layout)
        state = routes.layer.state
        assert state is not None
        self._cursor = routes.layer.cursor
        self._state = (state.moment, state.sum, state.shift, state.weight, state.count)

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`Route.take`."""
        cursor = self._cursor
        if cursor.layout is not self.layout:
            if not self.layout.fits(value):
                return False
            cursor.expect(self.layout)
        # Negative where the layout differs: the base then finds out which layout this is.
        if library.accumulate_again_(cursor.tensor, *self._state, value) >= 0:
            return True
        return super().take(value, module, args)


class SampleOnHost(Route):
    """Route that copies the rows that are due into the buffer, by one operator."""

    __slots__ = ("_cursor", "_mark_step", "_storage")

    def __init__(self, routes: Routes, layout: ActivationLayout) -> None:
        super().__init__(routes, layout)
        buffer = routes.layer.buffer
        assert buffer.storage is not None
        self._cursor = routes.layer.cursor
        self._storage = buffer.storage
        self._mark_step = buffer.mark_step if buffer.is_marked else None

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`Route.take`."""
        cursor = self._cursor
        if cursor.layout is not self.layout:
            if not self.layout.fits(value):
                return False
            cursor.expect(self.layout)
        # Negative where the layout differs, and where the buffer is full.
        due = library.gather_again_(cursor.tensor, self._storage, value)
        if due < 0:
            return super().take(value, module, args)
        if due > 0 and self._mark_step is not None:
            self._mark_step(due, self.layer.step)
        return True


class AddThroughInput(Route):
    """Route that adds every row of an affine layer by way of the input, where a check allows it."""

    __slots__ = ()

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`Route.take`."""
        if not self.layout.fits(value):
            return False
        self.layer.read(value, self.layout, self._routes.source(module, args, value))
        return True


class LaunchAdd(Route):
    """Route that adds every row by GPU launches that were prepared before."""

    __slots__ = ("_add", "_numbers")

    def __init__(
        self, routes: Routes, layout: ActivationLayout, add: Callable[[Tensor], None]
    ) -> None:
        super().__init__(routes, layout)
        self._numbers = routes.layer.cursor.numbers
        self._add = add

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`Route.take`."""
        layout = self.layout
        if not layout.fits(value):
            return False
        numbers = self._numbers
        numbers[CALLS] += 1
        numbers[OFFERED] += layout.rows
        numbers[POSITIONS] += layout.positions
        # ActivationLayout.source, written out to save a Python call in every hook.
        self._add(value if layout.channel_dim > 0 else layout.view(value))
        return True


class SampleOnDevice(Route):
    """Route that copies the rows that are due into the device's buffer, by one operator."""

    __slots__ = ("_gather", "_prepared")

    def __init__(self, routes: Routes, layout: ActivationLayout, gather: CountedGather) -> None:
        super().__init__(routes, layout)
        self._gather = gather  # keeps what the operator knows by address
        self._prepared = gather.prepared

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`Route.take`."""
        # 0 where the layout differs, and where the buffer has no room for the rows.
        if library.gather_counted_(self._prepared, value):
            return True
        return super().take(value, module, args)


class LaunchSample(Route):
    """Route that copies the rows that are due into the device's buffer, by a prepared launch."""

    __slots__ = ("_buffer", "_launch_", "_numbers")

    def __init__(
        self, routes: Routes, layout: ActivationLayout, buffer: DeviceBuffer, value: Tensor
    ) -> None:
        super().__init__(routes, layout)
        self._buffer = buffer
        self._numbers = numbers = routes.layer.cursor.numbers
        gather = buffer.prepare(value, layout, numbers[FRACTION], routes.layer.phase)
        self._launch_ = gather.launch_

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`Route.take`."""
        layout = self.layout
        if not layout.fits(value):
            return False
        numbers, buffer = self._numbers, self._buffer
        calls = numbers[CALLS] + 1
        step_rows = buffer.step_rows + layout.rows
        if (step_rows * numbers[FRACTION] >> 32) + calls > buffer.most_rows:
            return super().take(value, module, args)
        numbers[CALLS] = calls
        numbers[OFFERED] += layout.rows
        numbers[POSITIONS] += layout.positions
        buffer.step_rows = step_rows
        self._launch_(value)
        return True


class Closed(Route):
    """Route that takes no call: nothing is known of the tap, or its layer is read no more."""

    __slots__ = ()

    def __init__(self) -> None:
        pass

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """False: see :meth:`Route.take`."""
        del value, module, args
        return False


START = Known(None, Closed())
"""Entry of a tap without known layouts: its next call goes the whole way."""


def choose(routes: Routes, layout: ActivationLayout, value: Tensor) -> Route:
    """Shortest route for calls of a layout, in the present state of the layer.

    The tensor is that of a call that was read; its values are not read again.
    """
    layer = routes.layer
    state, service, buffer = layer.state, layer.service, layer.on_device.buffer
    fraction = layer.cursor.numbers[FRACTION]
    undecided = Route(routes, layout)  # asks the layer in each call, then choose() again
    if state is None or service is None or layer.placement is None or not fraction:
        return undecided
    if layer.dtype is not layout.dtype or state.moment.device != layout.device:
        return undecided
    if fraction == WHOLE and routes.maps(layout):
        return AddThroughInput(routes, layout)
    repeats = service.repeats_calls and layout.numbers is not None
    if layer.adds_at_once(layout):
        if repeats:
            return AddOnHost(routes, layout)
        add = library.accumulation_of(state, value, layout.channel_dim)
        return undecided if add is None else LaunchAdd(routes, layout, add)
    if buffer is not None and buffer.dtype is layout.dtype and buffer.device == layout.device:
        gather = buffer.prepare_counted(value, layout, fraction, layer.phase, layer.cursor.tensor)
        if gather is not None:
            return SampleOnDevice(routes, layout, gather)
        return LaunchSample(routes, layout, buffer, value)
    is_small = layer.placement.waits(-(-layout.rows * fraction // WHOLE), is_whole=False)
    if repeats and fraction < WHOLE and is_small and layer.buffer.storage is not None:
        return SampleOnHost(routes, layout)
    return undecided


def _is_unknown(module: nn.Module) -> bool:
    del module
    return False


class Routes:
    """Routes of one tap, by layout.

    Args:
        layer: Layer that the tap feeds.

    Attributes:
        layer: Layer that the tap feeds; see :meth:`assign`.
        last: Entry of the last call's layout, whose follower is tried first.
        wrap: Function that puts a route around each chosen one; None leaves routes as they are.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.last = START
        self.wrap: Callable[[Route], Route] | None = None
        self._affine: AffineMap | None = None
        self._is_unchanged: Callable[[nn.Module], bool] = _is_unknown
        self._known: dict[Key, Known] = {}
        layer.listen(self.reconsider)

    def __len__(self) -> int:
        """Number of layouts that are known."""
        return len(self._known)

    def read_through(self, affine: AffineMap, is_unchanged: Callable[[nn.Module], bool]) -> None:
        """Permission to read rows by way of the module's inputs, where cheaper and exact.

        The predicate tells that no other hook may have changed a module's output.
        """
        self._affine, self._is_unchanged = affine, is_unchanged

    def assign(self, layer: Layer) -> None:
        """Assignment of a layer, which the tap feeds from now on."""
        if layer is not self.layer:
            self.layer = layer
            layer.listen(self.reconsider)
        self.close()

    def close(self) -> None:
        """Removal of all layouts: the next call goes the whole way."""
        # Entries follow themselves and each other: they would keep the layer until Python looks
        # for cycles.
        for known in self._known.values():
            known.follower = START
        self._known.clear()
        self.last = START

    def release(self) -> None:
        """Removal of the hook and of all layouts: the tap is read no more."""
        self.close()
        self.wrap = None
        self._is_unchanged = _is_unknown

    def follow(self, route: Route) -> None:
        """One route for all calls, whatever their layout."""
        self.close()
        self.last = Known(None, route)

    def reconsider(self) -> None:
        """Removal of the choices, not of the layouts: the next call of each chooses anew."""
        for known in self._known.values():
            assert known.layout is not None
            known.route = self._wrapped(Route(self, known.layout))

    def _wrapped(self, route: Route) -> Route:
        return route if self.wrap is None else self.wrap(route)

    def take_known(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Reading of a call whose layout is known; see :meth:`Route.take`.

        The layout is expected after the last one from now on: the heads of a detector see the
        levels of a pyramid in the same order in every step.
        """
        # The expected one first: no hook has asked it about a tensor inside a tuple or a keyword.
        known: Known | None = self.last.follower
        assert known is not None
        if not known.route.take(value, module, args):
            key = key_of(value)
            known = None if key is None else self._known.get(key)
            # Of the same key as the expected one, the tensor can only be on another device.
            if known is None or known is self.last.follower:
                return False
            self.last.follower = known
            if not known.route.take(value, module, args):
                return False
        self.last = known
        return True

    def read(
        self,
        viewed: ViewedRows,
        weights: Tensor | None,
        *,
        is_kept: bool,
        module: nn.Module | None = None,
        args: Any = (),
    ) -> None:
        """Reading of a call the whole way.

        Args:
            viewed: Rows of the call.
            weights: Weights of the rows, where they differ. [B, ...]
            is_kept: True if the layout is kept, for the calls to come.
            module: The module; None where rows are not read by way of its input.
            args: Arguments of the module's forward.
        """
        tensor, layout, _ = viewed
        if weights is not None:
            self.layer.read_weighted(tensor, layout, weights)
        else:
            source = None if module is None else self.source(module, args, tensor)
            self.layer.read(tensor, layout, source)
        if is_kept and layout.key is not None:
            self._remember(layout, layout.key, tensor)

    def _remember(self, layout: ActivationLayout, key: Key, value: Tensor) -> None:
        if len(self._known) >= MOST_LAYOUTS:
            self._known.pop(next(iter(self._known))).follower = START
        known = Known(layout, self._wrapped(choose(self, layout, value)))
        self._known[key] = known
        if self.last is not START:
            self.last.follower = known
        self.last = known

    def settle(self, layout: ActivationLayout, value: Tensor) -> None:
        """Route of a layout, chosen again after a call that the layer decided about."""
        route = choose(self, layout, value)
        if type(route) is not Route and layout.key is not None:
            known = self._known.get(layout.key)
            if known is not None:
                known.route = self._wrapped(route)

    def maps(self, layout: ActivationLayout) -> bool:
        """True if calls of a layout are added by way of the module's input, where that is exact."""
        service = self.layer.service
        return (
            self._affine is not None
            and service is not None
            and service.is_host
            and layout.dtype is torch.float32
            and self._affine.pays(layout.rows)
        )

    def source(self, module: nn.Module, args: Any, output: Tensor) -> Callable[..., bool] | None:
        """Function that adds the rows of a call by way of the input; None where none can."""
        service = self.layer.service
        if self._affine is None or service is None or not service.is_host:
            return None
        if not self._is_unchanged(module):
            return None
        return partial(self._affine.add_to, module, args, output)
