"""Collector: hooks that lead every watched activation to its reader, step by step."""

from __future__ import annotations

import itertools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcov.ops.library import observers
from fastcov.rows.sequence import first_fill, sequence_phase
from fastcov.rows.view import plain_tensor, row_order, row_view
from fastcov.stats.adder import RowSource
from fastcov.stats.capture import DeviceCounters, is_capturing, warn_left_out
from fastcov.stats.reader import Reader
from fastcov.stats.seen import Seen
from fastcov.stats.state import CovarianceState
from fastcov.watch.hooks import StepHook, watch
from fastcov.watch.isolation import (
    has_modes,
    is_recomputing,
    is_transformed,
    is_undisturbed,
    isolated,
)
from fastcov.watch.plan import RowPlan
from fastcov.watch.select import Tap, is_sharded
from fastcov.watch.sharing import SharedInputs
from fastcov.watch.steps import Steps

_NUMBERS = itertools.count(1)


class Collector:
    """The half of a tracker that runs inside the training loop.

    Between a step's begin and end (:class:`fastcov.watch.steps.Steps`) activations are read,
    outside nothing is. Rows of a forward that fails half-way stay. No failure of reading ends a
    forward: the layer is given up with a warning, and its note says why.

    Args:
        model: Root module.
        taps: What to watch, from :func:`fastcov.watch.select.find_taps`.
        rows: "auto", "all", rows a layer and step, or a share of all rows.
        every: Steps from one that is read to the next.
        weighting: See :class:`fastcov.stats.reader.Reader`.
        decay: See :class:`fastcov.stats.reader.Reader`.
        max_channels: Wider layers are skipped and listed in ``notes``.
        train_only: Whether only forwards in training mode are steps.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: list[tuple[Tap, nn.Module]],
        *,
        rows: Literal["auto", "all"] | int | float,
        every: int,
        weighting: Literal["position", "image"],
        decay: float | None,
        max_channels: int,
        train_only: bool,
    ) -> None:
        self.every = every
        self.weighting = weighting
        self.decay = decay
        self.max_channels = max_channels
        self.train_only = train_only
        self.number = next(_NUMBERS)
        # What torch.compile returns shares its mode with what it wraps, but cannot be traced.
        self.root: Callable[[], nn.Module | None] = weakref.ref(getattr(model, "_orig_mod", model))
        with torch.inference_mode(False):  # orders the operators of a compiled step
            self.clock = torch.tensor([self.number], device="cpu")
        self.taps: list[Tap] = []
        self.readers: dict[str, Reader] = {}
        self.notes: dict[str, str] = {}
        self.step = Steps()
        self._modules: list[Callable[[], nn.Module | None]] = []
        self._by_tap: list[Reader] = []
        self._unique: list[Reader] = []
        self._seen: list[Seen | None] = []
        self._reads_output: list[bool] = []
        self._given_up: set[int] = set()
        self._inputs = SharedInputs()
        self._counters: DeviceCounters | None = None
        self._plan = RowPlan(rows)
        self._is_reading = False
        self._is_paused = False
        self._handles: list[Any] = []
        self._synced: dict[str, CovarianceState] | None = None  # all ranks' rows, until a step
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
        # The root may be tapped too: its step begins before and ends after. (Not by prepend=True:
        # torch.compile then guards the wrong hooks, torch 2.11.)
        step = StepHook(self)
        self._handles.append(model.register_forward_pre_hook(step.begin))
        for number, (tap, module) in enumerate(watched):
            self.taps.append(tap)
            self._modules.append(weakref.ref(module))
            reader = self._make_reader(tap)
            self._by_tap.append(reader)
            self._seen.append(None)
            self.readers[tap.name] = reader
            self._reads_output.append(tap.position == "output")
            self._handles.append(watch(self, number, tap, module, reader.fraction == 1))
        self._unique = list(self._by_tap)
        self._handles.append(model.register_forward_hook(step.end, always_call=True))
        observers[self.number] = self

    def _make_reader(self, tap: Tap) -> Reader:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        return Reader(
            tap.name,
            weighting=self.weighting,
            decay=self.decay,
            phase=sequence_phase(tap.name, rank),
            fraction=self._plan.first_fraction,
            first_fill=first_fill(self.taps.index(tap)),
        )

    def _skip_wide(self, name: str, channels: int) -> None:
        self.notes[name] = f"skipped: {channels} channels > max_channels={self.max_channels}"

    # called by the hooks, in eager mode directly, in compiled code through operators

    @property
    def steps(self) -> int:
        """Steps so far, read or not."""
        if self._counters is not None and self._counters.is_captured and not is_capturing():
            self.step.done = int(self._counters.step) + 1  # waits for the device
        return self.step.done

    def begin_step(self, counts: bool = True, is_nested: bool = False) -> None:
        """A forward of the root module begins; see :meth:`fastcov.watch.steps.Steps.begin`."""
        counters = self._counters
        can_replay = counters is not None and counters.is_warm and self.every == 1
        if not self.step.begin(counts and not self._is_paused, is_nested, can_replay):
            self._is_reading = self._is_reading and self.step.is_running
            if reason := self.step.take_refusal():
                self._note_left_out(dict.fromkeys(self._unique, reason))
            return
        self._is_reading = self.step.done % self.every == 0
        if counters is not None:
            if self.step.is_captured:
                counters.begin_capture(self._unique)
                self._seen = [None] * len(self.taps)  # every call is looked at
            counters.begin_step(self.step.done, self._is_reading, self.decay)
        if not self._is_reading:
            return
        self._synced = None
        self._inputs.forget_step()
        for reader in self._unique:
            reader.begin_step(self.step.done)

    def observe_again(self, tap: int, value: Any, source: RowSource | None = None) -> bool:
        """What nearly every call of a hook comes to: a tensor laid out as the last one.

        Args:
            tap: Its number in ``taps``.
            value: What the module returned or was given.
            source: Adds the same rows for less, where it can.

        Returns:
            False, with nothing done, where there is more to ask: :meth:`observe` does.
        """
        if not self._is_reading:
            return self.step.is_inside
        last = self._seen[tap]
        if last is None or type(value) is not Tensor or not is_undisturbed():
            return False
        reader, seen = self._by_tap[tap], last.follower
        try:
            if self._reads_output[tap]:
                if not reader.read_again(value, seen, source):
                    return self._recall(tap, value, source)
            elif self._inputs.reads(tap, reader.earlier_calls > 0):
                if not reader.read_again(value, seen):
                    return self._recall(tap, value)
                self._inputs.note(tap, value)
            elif not seen.fits(value):
                return self._recall(tap, value)
            elif (owner := self._owner(tap, value)) is not None:
                owner.read(value, seen)
            self._seen[tap] = seen
        except Exception as error:
            self._fail(self._by_tap[tap], error)  # which a split may have changed
        return True

    def _recall(self, tap: int, value: Tensor, source: RowSource | None = None) -> bool:
        # Sizes alternate, or come back: what was decided about them holds.
        last = self._seen[tap]
        return last is not None and last.recall(value) and self.observe_again(tap, value, source)

    def observe(self, tap: int, activation: Tensor, batch_dims: int = 0) -> None:
        """Reads one activation: called by a module's hook.

        Args:
            tap: Its number in ``taps``.
            activation: What the module returned or was given.
            batch_dims: Dimensions in front that torch.vmap has hidden from the module.
        """
        if not batch_dims and self.observe_again(tap, activation):
            return
        if not self._is_reading:
            if not self.step.is_inside:
                self.step.not_counted = "its layers ran, but in no forward of the tracked module"
            return
        if is_recomputing():
            return
        try:
            is_wrapped = is_transformed()
            with isolated() if has_modes() else nullcontext():
                self._observe(tap, activation, batch_dims, is_wrapped)
        except Exception as error:
            self._fail(self._by_tap[tap], error)

    def _observe(self, tap: int, activation: Tensor, batch_dims: int, is_wrapped: bool) -> None:
        if tap in self._given_up or not activation.is_floating_point():
            return
        spec = self.taps[tap]
        found = plain_tensor(activation, is_wrapped)
        if isinstance(found, str):
            self.refuse(tap, found)
            return
        plain, hidden_dims = found
        batch_dims += hidden_dims
        rows = row_view(plain.detach(), spec.layout, spec.batched_rank, batch_dims)
        channels = rows.shape[-1]
        if rows.numel() == 0:
            return
        if channels > self.max_channels:
            self._skip_wide(spec.name, channels)
            return
        if spec.channels not in (None, channels) and is_sharded(self._modules[tap]()):
            whole = f"{spec.channels} channels"
            self.refuse(tap, f"has {channels} of {whole} on this rank (tensor parallel): not read")
            return
        order = row_order(plain.dim(), spec.layout, spec.batched_rank, batch_dims)
        seen = Seen(rows, plain, order)
        is_again = seen.is_repeatable and plain is activation and not self.step.is_captured
        reader: Reader | None = self._by_tap[tap]
        if spec.position == "input" and (reader := self._owner(tap, activation)) is None:
            self._seen[tap] = seen.join(self._seen[tap]) if is_again else None
            return
        assert reader is not None
        if self.step.is_captured and self._counters and self._counters.leaves_out(reader, seen):
            return
        state = reader.state
        if state is not None and state.channels != channels:
            reason = f"gave {channels} channels after {state.channels}: not read since then"
            self._give_up(reader, reason)
            return
        reader.read(plain if seen.is_repeatable else rows, seen)
        self._seen[tap] = seen.join(self._seen[tap]) if is_again else None

    def _owner(self, tap: int, activation: Tensor) -> Reader | None:
        # Who reads a module's input: None where another tap has read this tensor already.
        reader = self._by_tap[tap]
        role = self._inputs.see(tap, activation, reader.earlier_calls > 0 or reader.calls > 0)
        if role == "reads":
            return reader
        if role == "splits":
            return self._split(tap)
        self._assign(tap, self._by_tap[self._inputs.owner[tap]])
        return None

    def refuse(self, tap: int, reason: str) -> None:
        """Notes why an activation is not read."""
        self.notes[self.taps[tap].name] = reason

    def end_step(self) -> None:
        """A forward of the root module ends, or an exception ends it."""
        is_done = self.step.end()
        was_reading, self._is_reading = self._is_reading, self._is_reading and self.step.is_running
        if not (is_done and was_reading):
            return
        with torch.no_grad(), isolated() if has_modes() else nullcontext():
            for tap in self._inputs.diverged():
                self._split(tap)
            self._inputs.forget_step()
            fractions = self._plan.fractions(self.taps, self._by_tap)
            # Of rows that weigh the same there is nothing more to say.
            for reader in fractions if self.weighting == "position" else self._unique:
                try:
                    if reader in fractions:
                        reader.plan(fractions[reader])
                    reader.end_step()
                except Exception as error:
                    self._fail(reader, error)
            self._end_on_device()
            self.after_step()

    def _end_on_device(self) -> None:
        if self._counters is not None:
            self._counters.end_step(self.decay)
            if self.step.is_captured:
                self._note_left_out(self._counters.left_out)
            self._counters = self._counters.renewed(self._unique, self.step.done - 1)
        elif DeviceCounters.serve(self._unique):
            self._counters = DeviceCounters(self._unique, self.step.done - 1)

    def _note_left_out(self, reasons: Mapping[Reader, str]) -> None:
        for tap, reader in enumerate(self._by_tap):
            if reader in reasons and tap not in self._given_up:
                self.refuse(tap, f"not read by replays of a CUDA graph: {reasons[reader]}")
        warn_left_out(reasons)

    def after_step(self) -> None:
        """Called when a step that was read has ended."""

    def _fail(self, reader: Reader, error: Exception) -> None:
        what = f"{type(error).__name__}: {error}"
        self._give_up(reader, f"not read since step {self.steps}, {what}")
        warnings.warn(f"fastcov no longer reads layer {reader.name!r}: {what}", stacklevel=2)

    def _give_up(self, reader: Reader, reason: str) -> None:
        for tap, own in enumerate(self._by_tap):
            if own is reader:
                self._given_up.add(tap)
                self._seen[tap] = None
                self.refuse(tap, reason)

    def _split(self, tap: int) -> Reader:
        shared = self._by_tap[tap]
        reader = self._make_reader(self.taps[tap])
        reader.begin_step(self.steps)
        self._assign(tap, reader)
        self.refuse(
            tap, f"rows of its own since step {self.steps}; shared those of {shared.name} before"
        )
        return reader

    def _assign(self, tap: int, reader: Reader) -> None:
        if self._by_tap[tap] is not reader:
            self._by_tap[tap] = self.readers[self.taps[tap].name] = reader
            self._unique = list(dict.fromkeys(self._by_tap))

    def names(self) -> list[str]:
        """Names of the watched tensors, in the model's order."""
        return [tap.name for tap in self.taps]

    def unique_readers(self) -> list[Reader]:
        """Readers in the model's order, shared ones once."""
        return self._unique

    def leave_device(self) -> None:
        """Takes all counters back to the host: waits for the device.

        Raises:
            RuntimeError: If a captured CUDA graph writes into this tracker.
        """
        if self._counters is not None and self._counters.is_captured:
            raise RuntimeError(
                "a captured CUDA graph writes into this tracker: merge, load or reset before the "
                "capture, or make a new tracker"
            )
        for reader in self.unique_readers():
            reader.leave_device()
        self._counters = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy holds: the statistics, tied to no model."""
        if self._counters is not None:
            self.leave_device()
        untied = {"root": _no_model, "_modules": [], "_handles": [], "_inputs": SharedInputs()}
        return {**self.__dict__, **untied, "_seen": [None] * len(self.taps)}

    def close(self) -> None:
        """Removes every hook; the statistics stay readable, and captured graphs add to them."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        observers.pop(self.number, None)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reads nothing and counts no step inside the ``with`` block."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before


def _no_model() -> None:
    return None
