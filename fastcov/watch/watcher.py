"""Watcher: leads every watched tensor to its layer, step by step."""

from __future__ import annotations

import copy
import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from threading import Lock, get_ident
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
from fastcov.rows.view import plain_tensor, row_order, row_view
from fastcov.stats.affine import AffineMap, is_affine
from fastcov.stats.capture import DeviceCounters, is_capturing, warn_left_out
from fastcov.stats.layer import Layer
from fastcov.stats.ranks import rank_and_ranks
from fastcov.stats.route import Route, Routes
from fastcov.watch.coverage import coverage, module_note
from fastcov.watch.gradients import NO_GRADIENT, GradientHook
from fastcov.watch.hooks import Gate, Hook, StepHook
from fastcov.watch.isolation import (
    has_modes,
    is_recomputing,
    is_transformed,
    is_undisturbed,
    isolated,
)
from fastcov.watch.layers import is_sharded
from fastcov.watch.masking import Masked, MaskSource
from fastcov.watch.pairs import Pair, Side, pair_name
from fastcov.watch.select import Of, Tap, gradient_name, gradient_tap, named_tap
from fastcov.watch.sharing import Following, Leading, Order, SharedInputs
from fastcov.watch.steps import OVERLAP, Steps

_NUMBERS = itertools.count(1)
# Attributes that no copy has: hooks, references to the model and functions of the user.
_LEFT_BEHIND = frozenset(
    (
        "_routes",
        "_inputs",
        "_handles",
        "modules",
        "root",
        "on_step_end",
        "mask",
        "_row_mask",
        "unscale",
        "_gradient_lock",
        "_leaf_handles",
    )
)
_NO_MODULE = nn.Module()  # stands for the module of a gradient, which no route asks for


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
        weighting: See :class:`fastcov.stats.layer.Layer`.
        decay: See :class:`fastcov.stats.layer.Layer`.
        max_channels: Wider layers are skipped and listed in ``notes``.
        train_only: True if only forwards in training mode are steps.
        on_step_end: Called when a step that was read has ended.
        precision: See :class:`fastcov.stats.layer.Layer`.
        sketch: See :class:`fastcov.stats.layer.Layer`.
        mask: Source of the mask of the rows; None reads every row.
        unscale: Function that gives the factor by which the loss is scaled; None is 1.
        of: Whether activations, gradients or both are read of the tensors that the user names.
        pairs: Names of pairs of tensors whose joint second moment is kept.

    Attributes:
        taps: The taps that are watched, in the model's order.
        modules: Weak references to the taps' modules.
        layers: Layer of each tap, by name; taps that see the same tensors have the same layer.
        notes: Remarks on single layers, by name.
        steps: Counts the steps.
        steps_begun: Steps that were begun and read, including those that an exception ended.
        is_reading: True inside a step that is read.
        is_skipping: True inside a forward of the root that is not read.
        mask: See the argument.
        unscale: See the argument.
        of: See the argument.
        pairs: Pairs of tensors, by names.
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
        self.unscale = unscale
        self.of = of
        self.weighting = weighting
        self.decay = decay
        self.precision: Precision = precision
        self.sketch = sketch
        self.max_channels = max_channels
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
        self.taps: list[Tap] = []
        self.modules: list[Callable[[], nn.Module | None]] = []
        self.layers: dict[str, Layer] = {}
        self.notes: dict[str, str] = {}
        self.steps = Steps()
        self.steps_begun = 0
        self.is_reading = False
        self.is_skipping = False
        self._row_mask: RowMask | None = None  # of the running step
        self._steps_without_mask = 0
        self._reads_gradients = False  # of the last forward
        self._gradients_are_settled = True
        self._gradient_lock = Lock()  # a backward pass has a thread for each device
        self._leaf_handles: list[Any] = []  # hooks on tensors that outlive the step
        self._loss_scale: float | None = None  # of the running step
        self._has_half_gradients = False
        self._gate = Gate()
        self._routes: list[Routes] = []
        self._unique_layers: list[Layer] = []
        self._forward_layers: list[Layer] = []
        self._gradient_layers: list[Layer] = []
        self._given_up: set[int] = set()
        self._inputs = SharedInputs()
        self._named: dict[str, tuple[int | None, int | None]] = {}  # taps of value and gradient
        self._legs: list[tuple[Pair, Side, Tap]] = []
        self.pairs = {
            names: Pair(names, self._layer(pair_name(names), number))
            for number, names in enumerate(pairs)
        }
        self._counters: DeviceCounters | None = None
        self._is_paused = False
        self._handles: list[Any] = []
        self._install(model, taps)

    def _install(self, model: nn.Module, taps: list[tuple[Tap, nn.Module]]) -> None:
        watched = []
        for tap, module in taps:
            if tap.channels is not None and tap.channels > self.max_channels:
                self._skip_wide(tap.name, tap.channels)
            else:
                watched.append((tap, module))
        if not watched:
            raise ValueError(
                f"nothing to track: every selected layer is wider than max_channels="
                f"{self.max_channels}; raise max_channels"
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
            self._watch_legs(tap, module)
        self._list_unique_layers()
        self._handles.append(model.register_forward_hook(step.end, always_call=True))
        observers[self.number] = self

    def _watch(self, tap: Tap, module: nn.Module) -> None:
        number = len(self.taps)
        self.taps.append(tap)
        self.modules.append(weakref.ref(module))
        layer = self._new_layer(number)
        if tap.is_gradient:
            self._routes.append(Routes(layer))
            self.layers[tap.name] = layer
            watching = GradientHook(self, number)
            if tap.position == "output":
                self._handles.append(module.register_forward_hook(watching.output))
            else:
                handle = module.register_forward_pre_hook(watching.input, with_kwargs=True)
                self._handles.append(handle)
            return
        hook = Hook(self, number, self._gate)
        affine = None
        if tap.position == "output" and layer.fraction == 1 and is_affine(module):
            affine = AffineMap(module)
        hook.routes = Routes(layer, affine, hook.is_first)
        self._routes.append(hook.routes)
        self.layers[tap.name] = layer
        if self.mask is not None or tap.position == "input":
            hook.routes.wrap = partial(self._wrapped, number)
        if tap.position == "output":
            self._handles.append(module.register_forward_hook(hook.output))
        else:
            handle = module.register_forward_pre_hook(hook.input, with_kwargs=True)
            self._handles.append(handle)

    def _watch_legs(self, tap: Tap, module: nn.Module) -> None:
        for pair in self.pairs.values():
            if tap.name in pair.names:
                self._legs.append((pair, pair.names.index(tap.name), tap))
                # Numbers below 0 stand for the legs.
                hook = Hook(self, -len(self._legs))
                if tap.position == "output":
                    self._handles.append(module.register_forward_hook(hook.output))
                else:
                    handle = module.register_forward_pre_hook(hook.input, with_kwargs=True)
                    self._handles.append(handle)

    def add_named(self, name: str) -> tuple[int | None, int | None]:
        """Taps of a tensor that the user names: its values and its gradient, as ``of`` says.

        Args:
            name: Name of the tensor, which is new or was added before.

        Returns:
            Numbers in ``taps``; None for the one that is not watched.

        Raises:
            ValueError: If a module's tensor has the name.
        """
        if name in self._named:
            return self._named[name]
        value = named_tap(name)
        if name in self.layers or name in self.notes:
            raise ValueError(
                f"observe({name!r}): a module's tensor has this name already; choose another"
            )
        numbers: list[int | None] = []
        for is_watched, tap in (
            (self.of != "gradient", value),
            (self.of != "activation", gradient_tap(value, counts_macs=False)),
        ):
            if not is_watched:
                numbers.append(None)
                continue
            numbers.append(len(self.taps))
            self.taps.append(tap)
            self.modules.append(_no_model)
            layer = self._new_layer(len(self.taps) - 1)
            layer.begin_step(self.steps.done)
            self._routes.append(Routes(layer))
            if self.mask is not None and not tap.is_gradient:
                self._routes[-1].wrap = partial(self._wrapped, len(self.taps) - 1)
            self.layers[tap.name] = layer
        self._named[name] = (numbers[0], numbers[1])
        self._list_unique_layers()
        return self._named[name]

    def named(self) -> list[str]:
        """Names of the tensors that the user has named."""
        return list(self._named)

    def _new_layer(self, tap: int) -> Layer:
        return self._layer(self.taps[tap].name, tap, self.sketch)

    def _layer(self, name: str, number: int, sketch: int | None = None) -> Layer:
        rank, _ = rank_and_ranks()
        return Layer(
            name,
            weighting=self.weighting,
            decay=self.decay,
            phase=sequence_phase(name, rank),
            fraction=self.policy.first_fraction,
            first_fill=first_fill(number),
            precision=self.precision,
            sketch=sketch,
        )

    def _skip_wide(self, name: str, channels: int) -> None:
        self.notes[name] = f"skipped: {channels} channels > max_channels={self.max_channels}"

    # steps

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
        """Begins a forward of the root module; see :meth:`fastcov.watch.steps.Steps.begin`."""
        counters, steps = self._counters, self.steps
        can_replay = (
            counters is not None and counters.is_warm and self.every == 1 and self.mask is None
        )
        if not steps.begin(counts and not self._is_paused, is_nested, can_replay):
            if steps.take_overlap():
                warnings.warn(OVERLAP, stacklevel=3)
            self._set_reading(self.is_reading and steps.is_running)
            self._reads_gradients &= not self._is_paused
            if reason := steps.take_refusal():
                self._note_left_out(dict.fromkeys(self._unique_layers, reason))
            return
        is_read = steps.done % self.every == 0
        self._row_mask = None
        if steps.is_captured:
            self._reads_gradients = False  # nor are those of before ended: replays would repeat it
        else:
            self._begin_gradients(is_read)
        if counters is not None:
            if steps.is_captured:
                counters.begin_capture(self._forward_layers)
                for routes in self._routes:
                    routes.close()
            counters.begin_step(steps.done, is_read, self.decay)
        self._set_reading(is_read)
        if is_read:
            self.steps_begun += 1
            self._inputs.forget_step()
            for layer in self._forward_layers:
                layer.begin_step(steps.done)
            for pair in self.pairs.values():
                pair.begin_step(steps.done)

    def take_mask(self, mask: object) -> None:
        """Sets the mask of the step that has begun.

        Args:
            mask: Tensor that the source found; None where the forward was given none.
        """
        if not self.is_reading or mask is None:
            return
        try:
            with torch.no_grad(), isolated() if has_modes() else nullcontext():
                self._row_mask = RowMask(as_mask(mask), self.weighting == "image")
        except Exception as error:
            self.fail_all(error)

    def fail_all(self, error: Exception) -> None:
        """Stops reading all layers after an error that concerns them all."""
        reason = f"not read since step {self.step}, {type(error).__name__}: {error}"
        for layer in self._unique_layers:
            self._give_up(layer, reason)
        warnings.warn(f"fastcov no longer reads any layer: {error}", stacklevel=3)

    def _set_reading(self, is_reading: bool) -> None:
        steps = self.steps
        self.is_reading = is_reading
        self.is_skipping = steps.is_inside and not is_reading
        # No routes while a CUDA graph captures: each call is checked for what replays can repeat.
        self._gate.thread = steps.thread if is_reading and not steps.is_captured else 0

    def end_step(self) -> None:
        """Ends a forward of the root module; called after an exception too."""
        was_reading = self.is_reading
        is_done = self.steps.end()
        self._set_reading(was_reading and self.steps.is_running)
        if not (is_done and was_reading):
            return
        if self.mask is not None and self._row_mask is None:
            self._steps_without_mask += 1
        with torch.no_grad(), isolated() if has_modes() else nullcontext():
            for tap in self._inputs.diverged():
                if tap not in self._given_up:
                    self._split(tap)
            for tap in self._inputs.end_step():
                if not self._inputs.is_noted(tap):
                    self._routes[tap].reconsider()  # to drop Leading: no tap asks for its tensors
            self._end_layers(self._forward_layers)
            if self.pairs:
                for pair in self.pairs.values():
                    pair.end_step()
                self._end_layers([pair.layer for pair in self.pairs.values()])
            self._end_on_device()
            self.on_step_end()

    def _end_layers(self, layers: list[Layer]) -> None:
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
            self._fail(layer, error)

    def _plan(self, layers: list[Layer]) -> dict[str, float]:
        # Shares of the rows to read, for layers that have just had their first step.
        new = {
            layer.name
            for layer in layers
            if layer.fraction is None and layer.calls and layer.state is not None
        }
        for layer in layers:
            if layer.name in new and layer.offered_rows == layer.left_out_rows:
                layer.forget_early()  # the mask left out every row: the next step shows the rows
                new.remove(layer.name)
        if not new:
            return {}
        macs = dict.fromkeys((layer.name for layer in layers), 0)
        for tap in self.taps:
            # Every consumer of a shared tensor adds its own flops, though the rows are read once.
            layer = self.layers[tap.name]
            if layer.name not in macs:
                continue
            macs[layer.name] += layer.offered_rows * tap.macs_per_row
        loads = {
            layer.name: LayerLoad(
                layer.state.channels,
                layer.offered_rows - layer.left_out_rows,
                macs[layer.name],
                layer.state.sketch_width,
            )
            for layer in layers
            if layer.state is not None
        }
        for name, load in list(loads.items()):
            # The gradients that will come take their part of the budget.
            if gradient_name(name) in self.layers:
                loads[gradient_name(name)] = replace(load, macs=0)
        return self.policy.fractions({name: loads[name] for name in loads if name in new}, loads)

    def _end_on_device(self) -> None:
        last = self.steps.done - 1
        if self._counters is not None:
            self._counters.end_step(self.decay)
            if self.steps.is_captured:
                self._note_left_out(self._counters.left_out)
            self._counters = self._counters.renewed(self._forward_layers, last)
        elif DeviceCounters.serve(self._forward_layers):
            self._counters = DeviceCounters(self._forward_layers, last)

    def _note_left_out(self, reasons: Mapping[Layer, str]) -> None:
        for tap, routes in enumerate(self._routes):
            if routes.layer in reasons and tap not in self._given_up:
                reason = reasons[routes.layer]
                self.refuse(tap, f"not read by replays of a CUDA graph: {reason}")
        warn_left_out(reasons)

    # activations that no route took

    def observe(
        self,
        tap: int,
        activation: Tensor,
        batch_dims: int = 0,
        *,
        module: nn.Module | None = None,
        args: Any = (),
    ) -> None:
        """Reads one activation.

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
                self._observe_legs([self._legs[-1 - tap]], activation, batch_dims)
            elif module is None or batch_dims or not self._recall(tap, activation, module, args):
                is_wrapped = is_transformed()
                with isolated() if has_modes() else nullcontext():
                    self._observe(tap, activation, batch_dims, is_wrapped, module, args)
        except Exception as error:
            self.fail(tap, error)

    def observe_named(
        self, name: str, tensor: Tensor, channel_dim: int, is_compiled: bool = False
    ) -> None:
        """Reads a tensor that the user's forward names.

        Args:
            name: See :meth:`fastcov.Tracker.observe`.
            tensor: See :meth:`fastcov.Tracker.observe`.
            channel_dim: See :meth:`fastcov.Tracker.observe`.
            is_compiled: True if compiled code calls.
        """
        check_observed(name, tensor, channel_dim)
        if is_recomputing():
            gradient = self._named.get(name, (None, None))[1]
            if gradient is not None:
                self.watch_gradient(gradient, tensor, channel_dim)
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
            self.watch_gradient(gradient, tensor, channel_dim)
        moved = tensor.detach().movedim(channel_dim, -1)
        if value is not None:
            self.observe(value, moved, module=None if is_compiled else _NO_MODULE)
        for pair in self.pairs.values():
            if name in pair.names and get_ident() == self.steps.thread:
                leg = (pair, pair.names.index(name), named_tap(name))
                self._observe_legs([leg], moved, 0)

    def _observe_legs(
        self, legs: Sequence[tuple[Pair, Side, Tap]], activation: Tensor, batch_dims: int
    ) -> None:
        is_wrapped = is_transformed()
        for leg in legs:
            try:
                with torch.no_grad(), isolated() if has_modes() else nullcontext():
                    self._observe_leg(leg, activation, batch_dims, is_wrapped)
            except Exception as error:
                leg[0].stop(f"not read since step {self.step}, {type(error).__name__}: {error}")
                warnings.warn(f"fastcov no longer reads {leg[0].note}", stacklevel=3)

    def _observe_leg(
        self,
        leg: tuple[Pair, Side, Tap],
        activation: Tensor,
        batch_dims: int,
        is_wrapped: bool,
    ) -> None:
        pair, side, tap = leg
        found = plain_tensor(activation, is_wrapped)
        if isinstance(found, str):
            pair.note = f"{tap.name!r} {found}"
            return
        plain, hidden_dims = found
        batch_dims += hidden_dims
        rows = row_view(plain.detach(), tap.layout, tap.batched_rank, batch_dims)
        if rows.numel() == 0:
            return
        if rows.shape[-1] > self.max_channels or self.steps.is_captured:
            is_wide = rows.shape[-1] > self.max_channels
            pair.note = (
                f"{tap.name!r} has {rows.shape[-1]} channels > max_channels={self.max_channels}"
                if is_wide
                else "not read by replays of a CUDA graph"
            )
            return
        order = row_order(plain.dim(), tap.layout, tap.batched_rank, batch_dims)
        layout = ActivationLayout(rows, plain, order)
        sizes = rows.shape[:-1]
        mask = self._row_mask
        weights = None if mask is None else mask.weights_of(sizes, rows.device)
        tensor = plain if layout.key is not None else rows
        pair.see(side, tensor, layout, sizes, weights)

    def _recall(self, tap: int, activation: Tensor, module: nn.Module, args: Any) -> bool:
        # Takes the route of a known layout. False where the call must be read the whole way.
        if self.steps.is_captured or type(activation) is not Tensor or not is_undisturbed():
            return False
        return self._take_known(self._routes[tap], activation, module, args)

    @staticmethod
    def _take_known(routes: Routes, activation: Tensor, module: nn.Module, args: Any) -> bool:
        # The expected one first: no hook has asked it about a tensor inside a tuple or a keyword.
        known = routes.last.follower
        if not known.route.take(activation, module, args):
            if not routes.recall(activation):
                return False
            known = routes.last.follower
            if not known.route.take(activation, module, args):
                return False
        routes.last = known
        return True

    def _observe(
        self,
        tap: int,
        activation: Tensor,
        batch_dims: int,
        is_wrapped: bool,
        module: nn.Module | None,
        args: Any,
    ) -> None:
        if tap in self._given_up or not activation.is_floating_point():
            return
        spec = self.taps[tap]
        found = plain_tensor(activation, is_wrapped)
        if isinstance(found, str):
            self.refuse(tap, found)
            return
        plain, hidden_dims = found
        batch_dims += hidden_dims
        viewed = self._viewed(tap, plain, batch_dims)
        if viewed is None:
            return
        rows, layout = viewed
        if spec.position == "input":
            # Compiled code (no module) reuses memory behind the same tensor object: never shared.
            shared_order = None if module is None or batch_dims else layout.order
            if not self._reads_input(tap, activation, shared_order):
                return
        routes = self._routes[tap]
        layer = routes.layer
        if self.steps.is_captured and self._counters and self._counters.leaves_out(layer, layout):
            return
        if not self._is_as_wide(layer, layout):
            return
        is_plain = layout.key is not None and plain is activation and module is not None
        tensor = plain if layout.key is not None else rows
        weights = self._weights_of(tap, rows.shape[:-1], rows.device)
        if weights is not None:
            layer.read_weighted(tensor, layout, weights)
            if is_plain and not self.steps.is_captured:
                routes.remember(layout, plain)
            return
        source = routes.source(module, args, plain) if is_plain and module is not None else None
        layer.read(tensor, layout, source)
        if is_plain and not self.steps.is_captured:
            routes.remember(layout, plain)

    def _viewed(
        self, tap: int, plain: Tensor, batch_dims: int
    ) -> tuple[Tensor, ActivationLayout] | None:
        # Row view of a tensor and its layout; None where there is no row, or none can be read.
        spec = self.taps[tap]
        rows = row_view(plain.detach(), spec.layout, spec.batched_rank, batch_dims)
        channels = rows.shape[-1]
        if rows.numel() == 0:
            return None
        if channels > self.max_channels:
            self._skip_wide(spec.name, channels)
            return None
        if spec.channels not in (None, channels) and is_sharded(self.modules[tap]()):
            whole = f"{spec.channels} channels"
            self.refuse(tap, f"has {channels} of {whole} on this rank (tensor parallel): not read")
            return None
        order = row_order(plain.dim(), spec.layout, spec.batched_rank, batch_dims)
        return rows, ActivationLayout(rows, plain, order)

    def _is_as_wide(self, layer: Layer, layout: ActivationLayout) -> bool:
        # False where the channels differ from those of before: the layer is then given up.
        if layer.state is None or layer.state.channels == layout.channels:
            return True
        reason = f"gave {layout.channels} channels after {layer.state.channels}"
        self._give_up(layer, f"{reason}: not read since then")
        return False

    # gradients

    def watch_gradient(self, tap: int, tensor: Tensor, channel_dim: int | None = None) -> None:
        """Reads the gradient of a tensor of the running step, once it comes.

        Args:
            tap: Number of the tap of the gradient in ``taps``.
            tensor: Tensor that a module returned or was given, or that the user names.
            channel_dim: Dimension of the channels; None where the tap's layout tells.
        """
        is_again = is_recomputing()
        if tap in self._given_up or (is_again and not self._reads_gradients):
            return
        if not is_again and get_ident() != self.steps.thread:
            return
        if self.steps.is_captured:
            self.refuse(tap, "not read by replays of a CUDA graph: gradients are read by the host")
        elif is_transformed():
            self.refuse(tap, "gradients under torch.func are not read")
        elif tensor.requires_grad:
            handle = tensor.register_hook(
                partial(self._on_gradient, tap, self._row_mask, channel_dim=channel_dim)
            )
            if tensor.grad_fn is None:
                self._leaf_handles.append(handle)
        elif not is_again:
            self.notes.setdefault(self.taps[tap].name, NO_GRADIENT)

    def observe_gradient(self, tap: int, gradient: Tensor) -> None:
        """Reads the gradient of a tensor of compiled code."""
        if self._reads_gradients:
            self._on_gradient(tap, self._row_mask, gradient)

    def _on_gradient(
        self, tap: int, mask: RowMask | None, gradient: Tensor, channel_dim: int | None = None
    ) -> None:
        if observers.get(self.number) is not self or tap in self._given_up:
            return  # closed since the forward
        try:
            with (
                self._gradient_lock,
                torch.no_grad(),
                isolated() if has_modes() else nullcontext(),
            ):
                if channel_dim is not None:
                    gradient = gradient.movedim(channel_dim, -1)
                self._read_gradient(tap, mask, gradient)
        except Exception as error:
            self.fail(tap, error)

    def _read_gradient(self, tap: int, mask: RowMask | None, gradient: Tensor) -> None:
        if self._gradients_are_settled:
            self._gradients_are_settled = False
            for layer in self._gradient_layers:
                layer.begin_step(layer.step)
        name, routes = self.taps[tap].name, self._routes[tap]
        if self.notes.get(name) == NO_GRADIENT:
            del self.notes[name]
        self._has_half_gradients |= gradient.dtype is torch.float16
        is_simple = self.mask is None and self.unscale is None and type(gradient) is Tensor
        if is_simple and self._take_known(routes, gradient, _NO_MODULE, ()):
            return
        found = plain_tensor(gradient)
        if isinstance(found, str):
            self.refuse(tap, found)
            return
        plain = found[0]
        if self.unscale is not None:
            if self._loss_scale is None:
                self._loss_scale = float(self.unscale())  # waits for a GPU, once a step
            plain = plain.to(torch.promote_types(plain.dtype, torch.float32)) / self._loss_scale
        viewed = self._viewed(tap, plain, 0)
        if viewed is None or not self._is_as_wide(routes.layer, viewed[1]):
            return
        rows, layout = viewed
        tensor = plain if layout.key is not None else rows
        weights = self._weights_of(tap, rows.shape[:-1], rows.device, mask)
        if weights is not None:
            routes.layer.read_weighted(tensor, layout, weights)
            return
        routes.layer.read(tensor, layout)
        if is_simple and layout.key is not None and plain is gradient:
            routes.remember(layout, plain)

    def _begin_gradients(self, is_read: bool) -> None:
        # The gradients of a step come after its forward: the step ends where the next one begins.
        self.settle()
        self._reads_gradients = is_read
        self._loss_scale = None
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles.clear()
        if is_read:
            for layer in self._gradient_layers:
                layer.begin_step(self.steps.done)

    def settle(self) -> None:
        """Ends the step of the gradients that have come, so that they can be shown."""
        if self._gradients_are_settled:
            return
        with self._gradient_lock, torch.no_grad(), isolated() if has_modes() else nullcontext():
            self._gradients_are_settled = True
            self._end_layers(self._gradient_layers)

    # inputs that several modules share

    def _reads_input(self, tap: int, activation: Tensor, order: Order) -> bool:
        # False where another tap has read the same rows already.
        has_rows = self._routes[tap].layer.total_calls > 0
        role = self._inputs.see(tap, activation, order, has_rows)
        if role == "splits":
            self._split(tap)
        elif role == "shares":
            assert order is not None
            owner = self._inputs.owner[tap]
            self._assign(tap, self._routes[owner].layer)
            self._routes[tap].follow(Following(self._inputs, tap, owner, order))
        return role != "shares"

    def _weights_of(
        self,
        tap: int,
        sizes: torch.Size,
        device: torch.device,
        mask: RowMask | None = None,
    ) -> Tensor | None:
        # Weights of rows, in the running step by default; None where all weigh the same.
        mask = mask or self._row_mask
        if mask is None:
            return None
        weights = mask.weights_of(sizes, device)
        if weights is None:
            self.notes.setdefault(
                self.taps[tap].name,
                f"ignores the mask: {list(mask.shape)} fits no rows of {list(sizes)}",
            )
        return weights

    def _wrapped(self, tap: int, route: Route) -> Route:
        if self.mask is not None:
            route = Masked(route, self._routes[tap], partial(self._weights_of, tap))
        if self.taps[tap].position != "input":
            return route
        if self._inputs.is_noted(tap):
            return Leading(route, partial(self._inputs.note, tap), route.layout.order)
        return route

    def note(self, name: str) -> str:
        """Remark on a watched or skipped layer, by name; empty where all is well."""
        found = self.notes.get(name, "")
        for tap, module in zip(self.taps, self.modules, strict=False):
            if tap.name == name and tap.position != "named":
                found = found or module_note(self.root(), tap.module_name, module())
        return found

    def remarks(self) -> list[str]:
        """Remarks on the whole model: overlapping forwards, and the share that is watched."""
        root = self.root()
        modules = [module for each in self.modules if (module := each()) is not None]
        lines = [OVERLAP] if self.steps.has_overlapped else []
        if self._steps_without_mask and self.mask is not None:
            lines.append(
                f"{self._steps_without_mask} of {self.steps_read} steps had no mask "
                f"({self.mask.name}): all of their rows were read"
            )
        if self._has_half_gradients and self.unscale is None:
            lines.append(
                "gradients in float16 were read as they came: where a GradScaler scales the loss, "
                "pass track(..., unscale=scaler)"
            )
        return [*lines, coverage(root, modules)] if root is not None else lines

    def refuse(self, tap: int, reason: str) -> None:
        """Notes why an activation is not read."""
        if tap < 0:
            self._legs[-1 - tap][0].note = reason
            return
        self.notes[self.taps[tap].name] = reason

    def fail(self, tap: int, error: Exception) -> None:
        """Stops reading a tap's layer after an error."""
        if tap < 0:
            self._legs[-1 - tap][0].stop(f"{type(error).__name__}: {error}")
            return
        # The layer is looked up now: a split in this very call may have changed it.
        self._fail(self._routes[tap].layer, error)

    def _fail(self, layer: Layer, error: Exception) -> None:
        message = f"{type(error).__name__}: {error}"
        self._give_up(layer, f"not read since step {self.step}, {message}")
        warnings.warn(f"fastcov no longer reads layer {layer.name!r}: {message}", stacklevel=3)

    def _give_up(self, layer: Layer, reason: str) -> None:
        for tap, routes in enumerate(self._routes):
            if routes.layer is layer:
                self._given_up.add(tap)
                routes.close()
                self.refuse(tap, reason)

    def _split(self, tap: int) -> None:
        shared = self._routes[tap].layer
        layer = self._new_layer(tap)
        layer.begin_step(self.step)
        self._assign(tap, layer)
        self.refuse(
            tap, f"rows of its own since step {self.step}; shared those of {shared.name} before"
        )

    def _assign(self, tap: int, layer: Layer) -> None:
        self._routes[tap].assign(layer)
        if self.layers[self.taps[tap].name] is not layer:
            self.layers[self.taps[tap].name] = layer
            self._list_unique_layers()

    def _list_unique_layers(self) -> None:
        self._unique_layers = list(dict.fromkeys(routes.layer for routes in self._routes))
        gradients = {self.layers[tap.name] for tap in self.taps if tap.is_gradient}
        self._gradient_layers = [each for each in self._unique_layers if each in gradients]
        self._forward_layers = [each for each in self._unique_layers if each not in gradients]

    def is_training(self) -> bool:
        """True unless the root is in evaluation mode."""
        root = self.root()
        return root is None or root.training

    # names, saving and closing

    def names(self) -> list[str]:
        """Names of the watched tensors, in the model's order."""
        return [tap.name for tap in self.taps]

    def unique_layers(self) -> list[Layer]:
        """Layers in the model's order, shared ones once."""
        return self._unique_layers

    def shared(self) -> dict[str, str]:
        """Name of the layer that a following tap shares, by the tap's name."""
        return {name: layer.name for name, layer in self.layers.items() if name != layer.name}

    def load_layers(
        self, layers: Mapping[str, dict[str, Any]], shared: Mapping[str, str], with_rows: bool
    ) -> None:
        """Continues with saved layers, shared as they were, and by no other taps.

        Args:
            layers: From :meth:`fastcov.stats.layer.Layer.state_dict`, by name.
            shared: From :meth:`shared`.
            with_rows: False to take the plans alone.
        """
        self._share(shared)
        for name, saved in layers.items():
            self.layers[name].load_state_dict(saved, with_rows)
        for tap, routes in enumerate(self._routes):
            if routes.layer.total_calls:
                self._inputs.settle(tap)

    def _share(self, shared: Mapping[str, str]) -> None:
        self._inputs.owner.clear()
        for number, tap in enumerate(self.taps):
            if self._routes[number].layer.name != tap.name:
                self._assign(number, self._new_layer(number))
        number_of = {tap.name: number for number, tap in enumerate(self.taps)}
        for name, owner in shared.items():
            self._inputs.owner[number_of[name]] = number_of[owner]
            self._assign(number_of[name], self._routes[number_of[owner]].layer)
        for owner in set(shared.values()):
            self._routes[number_of[owner]].reconsider()

    def share_no_more_than(self, other: Watcher) -> None:
        """Parts taps that share a layer here, but not in another watcher.

        Each keeps the rows that it shows.
        """
        for number, tap in enumerate(self.taps):
            shared = self._routes[number].layer
            if shared.name == tap.name or tap.name not in other.layers:
                continue
            if other.layers[tap.name] is not other.layers.get(shared.name):
                layer = copy.deepcopy(shared)
                new = self._new_layer(number)
                layer.name, layer.phase = new.name, new.phase
                self._inputs.split(number)
                self._assign(number, layer)

    def leave_device(self) -> None:
        """Moves all counters back to the host, waiting for the device.

        Raises:
            RuntimeError: If a captured CUDA graph writes into this tracker.
        """
        if self._counters is not None and self._counters.is_captured:
            raise RuntimeError(
                "a captured CUDA graph writes into this tracker: merge, load or reset before the "
                "capture, or make a new tracker"
            )
        self.settle()
        for layer in self._unique_layers:
            layer.leave_device()
        self._counters = None

    def __getstate__(self) -> dict[str, Any]:
        """Attributes to copy or pickle: statistics, without hooks or references to the model."""
        self.settle()
        if self._counters is not None:
            self.leave_device()
        copied = {name: value for name, value in self.__dict__.items() if name not in _LEFT_BEHIND}
        return {
            **copied,
            "_unique_layers": [],
            "_forward_layers": [],
            "_gradient_layers": [],
            "_layer_of": [routes.layer for routes in self._routes],
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        layer_of = state.pop("_layer_of")
        self.__dict__.update(state)
        self.root = _no_model
        self.on_step_end = _do_nothing
        self.mask = self._row_mask = self.unscale = None
        self._gradient_lock, self._leaf_handles = Lock(), []
        self.modules, self._handles, self._inputs = [], [], SharedInputs()
        self._routes = [Routes(layer) for layer in layer_of]
        self._list_unique_layers()

    def close(self) -> None:
        """Removes every hook; the statistics stay readable, and captured graphs add to them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if observers.get(self.number) is self:  # a copy has the same number
            del observers[self.number]
        self.release()

    def release(self) -> None:
        """Lets go of hooks, routes and the tracker: the root is closed or gone.

        They refer to each other, and would keep the statistics until Python looks for cycles.
        """
        self.on_step_end = _do_nothing
        for routes in self._routes:
            routes.release()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which nothing is read and no step counted."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before


def _no_model() -> None:
    return None


def _do_nothing() -> None:
    pass


def _release(watcher: weakref.ref[Watcher]) -> Callable[[object], None]:
    # Called when a model has gone, with its hooks: nothing is read any more.
    def release(_: object) -> None:
        if (alive := watcher()) is not None:
            alive.release()

    return release
