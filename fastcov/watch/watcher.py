"""Watcher: leads every watched tensor to its layer, step by step."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from threading import get_ident
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcov.arguments import check_observed
from fastcov.ops.covariance import Precision
from fastcov.ops.library import observers
from fastcov.rows.layout import ActivationLayout
from fastcov.rows.mask import RowMask, as_mask
from fastcov.rows.policy import LayerLoad, Policy
from fastcov.rows.sequence import first_fill, sequence_phase
from fastcov.stats.affine import AffineMap, is_affine
from fastcov.stats.capture import DeviceCounters, is_capturing, warn_left_out
from fastcov.stats.layer import Layer
from fastcov.stats.ranks import rank_and_ranks
from fastcov.stats.route import Route
from fastcov.watch.coverage import coverage
from fastcov.watch.gradients import GradientHook, Gradients
from fastcov.watch.hooks import Gate, Hook, StepHook
from fastcov.watch.isolation import (
    has_modes,
    is_recomputing,
    is_transformed,
    is_undisturbed,
    isolated,
    outside_modes,
)
from fastcov.watch.masking import Masked, MaskSource
from fastcov.watch.pairs import Pairs
from fastcov.watch.select import Of, Tap, gradient_name, gradient_tap, named_tap
from fastcov.watch.sharing import Leading
from fastcov.watch.steps import OVERLAP, Steps
from fastcov.watch.taps import NO_MODULE, Taps, WatchedTap, no_module

_NUMBERS = itertools.count(1)
# Attributes that no copy has: hooks, references to the model and functions of the user.
_LEFT_BEHIND = ("_handles", "root", "on_step_end", "mask", "row_mask")


class Watcher:
    """Part of a tracker that runs inside the training loop: hooks, steps and layers.

    Activations are read between the begin and the end of a step
    (:class:`fastcov.watch.steps.Steps`). Rows of a forward that fails half-way stay. No failure of
    reading ends a forward: the layer is read no more, a warning and the layer's note say why.

    Args:
        model: Root module.
        taps: Tensors to watch, from :func:`fastcov.watch.select.find_taps`.
        policy: Sampling policy: the share of the rows that each layer reads.
        every: Period of reading: steps 0, every, 2 * every, ... are read.
        weighting, decay, precision, sketch: See :class:`fastcov.stats.layer.Layer`.
        max_channels: Wider layers are skipped and listed in ``notes``.
        train_only: True if only forwards in training mode are steps.
        on_step_end: Called when a step that was read has ended.
        mask: Source of the mask of the rows; None reads every row.
        unscale: Function that gives the factor by which the loss is scaled; None is 1.
        of: Kind of tensor to read of the tensors that the user names: activations, gradients, both.
        pairs: Names of pairs of tensors whose joint second moment is kept.

    Attributes:
        taps: The taps that are watched, and their layers.
        steps: Counts the steps.
        steps_begun: Steps that were begun and read, including those that an exception ended.
        is_reading: True inside a step that is read.
        is_skipping: True inside a forward of the root that is not read.
        gradients: Reader of the gradients.
        pairs: Pairs of tensors, by names.
        row_mask: Mask of the rows of the running step; None where every row is read.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: list[tuple[Tap, nn.Module]],
        *,
        policy: Policy,
        every: int,
        weighting: Literal["position", "image"],
        decay: float | None,
        max_channels: int,
        train_only: bool,
        on_step_end: Callable[[], None],
        precision: Precision = "split",
        sketch: int | None = None,
        mask: MaskSource | None = None,
        unscale: Callable[[], float] | None = None,
        of: Of = "activation",
        pairs: Sequence[tuple[str, str]] = (),
    ) -> None:
        self.mask = mask
        self.policy = policy
        self.every = every
        self.of = of
        self.weighting = weighting
        self.decay = decay
        self.precision: Precision = precision
        self.train_only = train_only
        self.on_step_end = on_step_end
        self.number = next(_NUMBERS)
        # The wrapper that torch.compile returns cannot be traced in compiled code, where hooks ask
        # for the root's mode. The module inside has the same mode.
        root: nn.Module = getattr(model, "_orig_mod", model)
        self.root: Callable[[], nn.Module | None] = weakref.ref(root, _release(weakref.ref(self)))
        # Compiled code passes the clock to the step operators, which claim to change it: this keeps
        # them in order, and tells them the watcher's number.
        with torch.inference_mode(False):
            self.clock = torch.tensor([self.number], device="cpu")
        new_layer = partial(
            _new_layer,
            weighting=weighting,
            decay=decay,
            fraction=policy.first_fraction,
            precision=precision,
        )
        self.taps = Taps(partial(new_layer, sketch=sketch), max_channels)
        self.gradients = Gradients(self.taps, unscale)
        self.pairs = Pairs(pairs, new_layer, max_channels)
        self.steps = Steps()
        self.steps_begun = 0
        self.is_reading = False
        self.is_skipping = False
        self.row_mask: RowMask | None = None
        self._steps_without_mask = 0
        self._gate = Gate()
        self._named: dict[str, tuple[int | None, int | None]] = {}  # taps of value and gradient
        self._counters: DeviceCounters | None = None
        self._is_paused = False
        self._handles: list[Any] = []
        self._install(model, taps, max_channels)

    def _install(
        self, model: nn.Module, taps: list[tuple[Tap, nn.Module]], max_channels: int
    ) -> None:
        watched = []
        for tap, module in taps:
            if tap.channels is not None and tap.channels > max_channels:
                self.taps.skip_wide(tap.name, tap.channels)
            else:
                watched.append((tap, module))
        if not watched:
            raise ValueError(
                f"nothing to track: every selected layer is wider than max_channels="
                f"{max_channels}; raise max_channels"
            )
        # The root may be tapped too: its step must begin before the tap's hooks run and end after,
        # so its hooks are registered first and last. Not by prepend=True: torch.compile then guards
        # the wrong hooks (torch 2.11).
        step = StepHook(self)
        if self.mask is None:
            handle = model.register_forward_pre_hook(step.begin)
        else:
            handle = model.register_forward_pre_hook(step.begin_masked, with_kwargs=True)
        self._handles.append(handle)
        for tap, module in watched:
            self._watch(tap, module)
        for tap, module in taps:
            for leg in self.pairs.add_legs(tap):
                self._hook(tap, module, Hook(self, leg))
        self._handles.append(model.register_forward_hook(step.end, always_call=True))
        observers[self.number] = self

    def _watch(self, tap: Tap, module: nn.Module) -> None:
        watched = self.taps.add(tap, weakref.ref(module))
        if tap.is_gradient:
            self._hook(tap, module, GradientHook(self, watched.number))
            return
        hook = Hook(self, watched.number, self._gate)
        hook.routes = routes = watched.routes
        if tap.position == "output" and routes.layer.fraction == 1 and is_affine(module):
            routes.read_through(AffineMap(module), hook.is_first)
        if self.mask is not None or tap.position == "input":
            routes.wrap = partial(self._wrapped, watched)
        self._hook(tap, module, hook)

    def _hook(self, tap: Tap, module: nn.Module, hook: Hook | GradientHook) -> None:
        if tap.position == "output":
            handle = module.register_forward_hook(hook.output)
        else:
            handle = module.register_forward_pre_hook(hook.input, with_kwargs=True)
        self._handles.append(handle)

    def add_named(self, name: str) -> tuple[int | None, int | None]:
        """Numbers of the taps of a tensor that the user names, new or not: values and gradient.

        None for the one that ``of`` leaves out. A ValueError refuses the name of a module's tensor.
        """
        if name in self._named:
            return self._named[name]
        if name in self.taps.layers or name in self.taps.notes:
            raise ValueError(
                f"observe({name!r}): a module's tensor has this name already; choose another"
            )
        value = gradient = None
        if self.of != "gradient":
            watched = self._add_named(named_tap(name))
            value = watched.number
            if self.mask is not None:
                watched.routes.wrap = partial(self._wrapped, watched)
        if self.of != "activation":
            gradient = self._add_named(gradient_tap(named_tap(name), counts_macs=False)).number
        self._named[name] = (value, gradient)
        return value, gradient

    def _add_named(self, tap: Tap) -> WatchedTap:
        watched = self.taps.add(tap, no_module)
        watched.routes.layer.begin_step(self.steps.done)
        return watched

    def named(self) -> list[str]:
        """Names of the tensors that the user has named."""
        return list(self._named)

    @property
    def step(self) -> int:
        """Steps so far, read or not."""
        counters = self._counters
        if counters is not None and counters.is_captured and not is_capturing():
            self.steps.done = int(counters.step) + 1  # waits for the device
        return self.steps.done

    @step.setter
    def step(self, value: int) -> None:
        self.steps.done = value

    @property
    def steps_read(self) -> int:
        """Steps whose activations were read; at least 1."""
        return max(1, -(-self.step // self.every))

    def begin_step(self, counts: bool = True, is_nested: bool = False) -> None:
        """Start of a forward of the root module; see :meth:`fastcov.watch.steps.Steps.begin`."""
        counters, steps = self._counters, self.steps
        can_replay = (
            counters is not None and counters.is_warm and self.every == 1 and self.mask is None
        )
        if not steps.begin(counts and not self._is_paused, is_nested, can_replay):
            if steps.take_overlap():
                warnings.warn(OVERLAP, stacklevel=3)
            self._set_reading(self.is_reading and steps.is_running)
            self.gradients.is_reading &= not self._is_paused
            if reason := steps.take_refusal():
                self._note_left_out(dict.fromkeys(self.taps.unique_layers, reason))
            return
        is_read = steps.done % self.every == 0
        self.row_mask = None
        if steps.is_captured:
            # The step of earlier gradients is not ended here: replays would repeat the end.
            self.gradients.is_reading = False
        else:
            self.gradients.begin_step(is_read, self)
        if counters is not None:
            if steps.is_captured:
                counters.begin_capture(self.taps.forward_layers)
                for watched in self.taps:
                    watched.routes.close()
            counters.begin_step(steps.done, is_read, self.decay)
        self._set_reading(is_read)
        if is_read:
            self.steps_begun += 1
            self.taps.inputs.forget_step()
            for layer in self.taps.forward_layers:
                layer.begin_step(steps.done)
            self.pairs.begin_step(steps.done)

    def take_mask(self, mask: object) -> None:
        """Mask of the step that has begun; None where the forward was given none."""
        if not self.is_reading or mask is None:
            return
        try:
            with outside_modes():
                self.row_mask = RowMask(as_mask(mask), self.weighting == "image")
        except Exception as error:
            self.fail_all(error)

    def fail_all(self, error: Exception) -> None:
        """End of the reading of all layers, after an error that concerns them all."""
        reason = f"not read since step {self.step}, {type(error).__name__}: {error}"
        for layer in self.taps.unique_layers:
            self.taps.give_up(layer, reason)
        warnings.warn(f"fastcov no longer reads any layer: {error}", stacklevel=3)

    def _set_reading(self, is_reading: bool) -> None:
        steps = self.steps
        self.is_reading = is_reading
        self.is_skipping = steps.is_inside and not is_reading
        # No routes while a CUDA graph captures: each call is checked for being repeatable.
        self._gate.thread = steps.thread if is_reading and not steps.is_captured else 0

    def end_step(self) -> None:
        """End of a forward of the root module; called after an exception too."""
        was_reading = self.is_reading
        is_done = self.steps.end()
        self._set_reading(was_reading and self.steps.is_running)
        if not (is_done and was_reading):
            return
        if self.mask is not None and self.row_mask is None:
            self._steps_without_mask += 1
        with outside_modes():
            self.taps.end_step(self)
            self.end_layers(self.taps.forward_layers)
            if self.pairs:
                self.pairs.end_step()
                self.end_layers(self.pairs.layers())
            self._end_on_device()
            self.on_step_end()

    def end_layers(self, layers: list[Layer]) -> None:
        """End of the step of layers: plans the new ones, and settles the weights of rows."""
        fractions = self._plan(layers)
        # Layers with a share and rows of equal weight have nothing to settle.
        for layer in layers:
            if layer.name in fractions or self.weighting == "image":
                self._end_layer(layer, fractions.get(layer.name))

    def _end_layer(self, layer: Layer, fraction: float | None) -> None:
        try:
            if fraction is not None:
                layer.plan(fraction)
            layer.end_step()
        except Exception as error:
            self.taps.fail(layer, error, self.step)

    def _plan(self, layers: list[Layer]) -> dict[str, float]:
        """Shares of the rows to read, for layers that have just had their first step."""
        new = {
            layer.name
            for layer in layers
            if layer.fraction is None and layer.calls and layer.state is not None
        }
        for layer in layers:
            if layer.name in new and layer.offered_rows == layer.early.left_out:
                layer.early.take()  # the mask left out every row: the next step shows the rows
                new.remove(layer.name)
        if not new:
            return {}
        macs = dict.fromkeys((layer.name for layer in layers), 0)
        for watched in self.taps:
            # Every consumer of a shared tensor adds its own flops, though the rows are read once.
            layer = watched.routes.layer
            if layer.name in macs:
                macs[layer.name] += layer.offered_rows * watched.tap.macs_per_row
        loads = {
            layer.name: LayerLoad(
                layer.state.channels,
                layer.offered_rows - layer.early.left_out,
                macs[layer.name],
                layer.state.sketch_width,
            )
            for layer in layers
            if layer.state is not None
        }
        for name, load in list(loads.items()):
            # The gradients that will come take their part of the budget.
            if gradient_name(name) in self.taps.layers:
                loads[gradient_name(name)] = replace(load, macs=0)
        return self.policy.fractions({name: loads[name] for name in loads if name in new}, loads)

    def _end_on_device(self) -> None:
        last = self.steps.done - 1
        if self._counters is not None:
            self._counters.end_step(self.decay)
            if self.steps.is_captured:
                self._note_left_out(self._counters.left_out)
            self._counters = self._counters.renewed(self.taps.forward_layers, last)
        elif DeviceCounters.serve(self.taps.forward_layers):
            self._counters = DeviceCounters(self.taps.forward_layers, last)

    def _note_left_out(self, reasons: Mapping[Layer, str]) -> None:
        self.taps.note_left_out(reasons)
        warn_left_out(reasons)

    def observe(
        self,
        tap: int,
        activation: Tensor,
        batch_dims: int = 0,
        *,
        module: nn.Module | None = None,
        args: Any = (),
    ) -> None:
        """Reading of one activation.

        Args:
            tap: Number of the tap in ``taps``.
            activation: A tensor that the module returned or was given.
            batch_dims: Dimensions in front that torch.vmap has hidden from the module.
            module: The module, in eager mode; None in compiled code.
            args: Arguments of the module's forward.
        """
        if is_recomputing():
            return
        if not self.is_reading:
            if not self.steps.is_inside:
                reason = "its layers ran, but in no forward of the tracked module"
                self.steps.not_counted = reason
            return
        if get_ident() != self.steps.thread:
            if not self.steps.has_overlapped:
                self.refuse(tap, "runs in another thread than the tracked module: not read")
            return
        try:
            if tap < 0:
                self.pairs.observe(tap, activation, batch_dims, self)
            elif not (
                module is not None
                and batch_dims == 0
                and self._take_known(tap, activation, module, args)
            ):
                is_wrapped = is_transformed()
                with isolated() if has_modes() else nullcontext():
                    self.taps.read(
                        self.taps[tap], activation, batch_dims, is_wrapped, module, args, self
                    )
        except Exception as error:
            self.fail(tap, error)

    def observe_named(
        self, name: str, tensor: Tensor, channel_dim: int, is_compiled: bool = True
    ) -> None:
        """Reading of a tensor that the user's forward names: see :meth:`.Tracker.observe`."""
        check_observed(name, tensor, channel_dim)
        if is_recomputing():
            gradient = self._named.get(name, (None, None))[1]
            if gradient is not None:
                self.gradients.watch(gradient, tensor, self, channel_dim)
            return
        if not self.is_reading:
            if not self.steps.is_inside:
                reason = f"observe({name!r}) ran, but in no forward of the tracked module"
                self.steps.not_counted = reason
            return
        value, gradient = self.add_named(name)
        if gradient is not None and is_compiled:
            self.refuse(gradient, "gradients of named tensors are not read in compiled code")
        elif gradient is not None:
            self.gradients.watch(gradient, tensor, self, channel_dim)
        moved = tensor.detach().movedim(channel_dim, -1)
        if value is not None:
            self.observe(value, moved, module=None if is_compiled else NO_MODULE)
        if get_ident() == self.steps.thread:
            self.pairs.observe_named(name, moved, self)

    def _take_known(self, tap: int, activation: Tensor, module: nn.Module, args: Any) -> bool:
        # No route while a graph is captured: each call is checked for being repeatable.
        if self.steps.is_captured or type(activation) is not Tensor or not is_undisturbed():
            return False
        return self.taps[tap].routes.take_known(activation, module, args)

    def leave_out(self, layer: Layer, layout: ActivationLayout) -> bool:
        """Note of a call that the captured CUDA graph must not hold; True if it is left out."""
        return self._counters is not None and self._counters.leave_out(layer, layout)

    def observe_gradient(self, tap: int, gradient: Tensor) -> None:
        """Reading of the gradient of a tensor of compiled code."""
        self.gradients.observe(tap, gradient, self)

    def settle(self) -> None:
        """End of the step of the gradients that have come, so that they can be shown."""
        self.gradients.settle(self)

    def _weights_of(
        self, watched: WatchedTap, sizes: torch.Size, device: torch.device
    ) -> Tensor | None:
        return self.taps.weights_of(watched, sizes, device, self.row_mask)

    def _wrapped(self, watched: WatchedTap, route: Route) -> Route:
        if self.mask is not None:
            route = Masked(route, watched.routes, partial(self._weights_of, watched))
        inputs, number = self.taps.inputs, watched.number
        if watched.tap.position == "input" and inputs.is_noted(number):
            return Leading(route, partial(inputs.note, number), route.layout.order)
        return route

    def remarks(self) -> list[str]:
        """Remarks on the whole model: overlapping forwards, and the share that is watched."""
        root = self.root()
        modules = [module for each in self.taps if (module := each.module()) is not None]
        lines = [OVERLAP] if self.steps.has_overlapped else []
        if self._steps_without_mask and self.mask is not None:
            lines.append(
                f"{self._steps_without_mask} of {self.steps_read} steps had no mask "
                f"({self.mask.name}): all of their rows were read"
            )
        if remark := self.gradients.remark():
            lines.append(remark)
        return [*lines, coverage(root, modules)] if root is not None else lines

    def refuse(self, tap: int, reason: str) -> None:
        """Note why an activation is not read."""
        if tap < 0:
            self.pairs.refuse(tap, reason)
        else:
            self.taps.notes[self.taps[tap].tap.name] = reason

    def fail(self, tap: int, error: Exception) -> None:
        """End of the reading of a tap's layer, after an error."""
        if tap < 0:
            self.pairs.fail(tap, error)
        else:
            # The layer is looked up now: a split in this call may have changed it.
            self.taps.fail(self.taps[tap].routes.layer, error, self.step)

    def is_training(self) -> bool:
        """True unless the root is in evaluation mode."""
        root = self.root()
        return root is None or root.training

    def leave_device(self) -> None:
        """Move of all counters back to the host, waiting for the device.

        Raises:
            RuntimeError: If a captured CUDA graph writes into this tracker.
        """
        if self._counters is not None and self._counters.is_captured:
            raise RuntimeError(
                "a captured CUDA graph writes into this tracker: merge, load or reset before the "
                "capture, or make a new tracker"
            )
        self.settle()
        for layer in self.taps.unique_layers:
            layer.leave_device()
        self._counters = None

    def __getstate__(self) -> dict[str, Any]:
        """Attributes to copy or pickle: statistics, without hooks or references to the model."""
        self.settle()
        if self._counters is not None:
            self.leave_device()
        return {name: value for name, value in self.__dict__.items() if name not in _LEFT_BEHIND}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.root, self.on_step_end = no_module, _do_nothing
        self.mask = self.row_mask = None
        self._handles = []

    def close(self) -> None:
        """Removal of every hook; the statistics stay readable, and captured graphs add to them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if observers.get(self.number) is self:  # a copy has the same number
            del observers[self.number]
        self.gradients.close()
        self.release()

    def release(self) -> None:
        """Removal of hooks, routes and the reference to the tracker: the root is closed or gone.

        The watcher and its routes refer to each other, and would keep the statistics until Python
        looks for cycles.
        """
        self.on_step_end = _do_nothing
        for watched in self.taps:
            watched.routes.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is read and no step counted."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before


def _new_layer(name: str, number: int, **options: Any) -> Layer:
    rank, _ = rank_and_ranks()
    phase = sequence_phase(name, rank)
    return Layer(name, phase=phase, first_fill=first_fill(number), **options)


def _do_nothing() -> None:
    pass


def _release(watcher: weakref.ref[Watcher]) -> Callable[[object], None]:
    # Called when a model has gone, with its hooks: nothing is read any more.
    def release(_: object) -> None:
        if (alive := watcher()) is not None:
            alive.release()

    return release
