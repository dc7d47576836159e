"""Collector: hooks that lead every watched activation to its reader, step by step."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcov.ops.library import observers
from fastcov.reader import Reader
from fastcov.rows import row_view
from fastcov.sampling import LayerLoad, read_fraction, rows_per_channel, sequence_phase
from fastcov.state import CovarianceState
from fastcov.taps import Hook, StepHook, Tap

_NUMBERS = itertools.count(1)
_FORMAT = 1


class Collector:
    """The half of a tracker that runs inside the training loop.

    A step is one forward of the root module (in training mode with ``train_only``). Between a
    step's begin and its end activations are read, outside nothing is.

    Args:
        model: Root module.
        taps: What to watch, from :func:`fastcov.taps.find_taps`.
        rows: "auto", "all", rows a layer and step, or a share of all rows.
        every: Steps from one that is read to the next.
        weighting: See :class:`fastcov.reader.Reader`.
        decay: See :class:`fastcov.reader.Reader`.
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
        self.rows = rows
        self.every = every
        self.weighting = weighting
        self.decay = decay
        self.max_channels = max_channels
        self.train_only = train_only
        self.steps = 0
        self.number = next(_NUMBERS)
        self.clock = torch.zeros(1, dtype=torch.int64)  # orders the operators of a compiled step
        self.taps: list[Tap] = []
        self.readers: dict[str, Reader] = {}
        self.notes: dict[str, str] = {}
        self._by_tap: list[Reader] = []
        self._shared: set[int] = set()  # input taps whose tensor an earlier tap reads
        self._inputs: list[tuple[weakref.ref[Tensor], int]] = []  # of the running step
        self._rho: float | None = None
        self._is_reading = False
        self._is_paused = False
        self._handles: list[Any] = []
        self._synced: dict[str, CovarianceState] | None = None  # all ranks' rows, until a step
        self._install(model, taps)

    def _install(self, model: nn.Module, taps: list[tuple[Tap, nn.Module]]) -> None:
        rank = dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
        fraction: float | None = None
        if self.rows == "all":
            fraction = 1.0
        elif isinstance(self.rows, float):
            fraction = self.rows
        for tap, module in taps:
            if tap.channels is not None and tap.channels > self.max_channels:
                self._skip_wide(tap.name, tap.channels)
                continue
            hook = Hook(self, len(self.taps))
            self.taps.append(tap)
            reader = Reader(
                tap.name,
                weighting=self.weighting,
                decay=self.decay,
                phase=sequence_phase(tap.name, rank),
                fraction=fraction,
            )
            self._by_tap.append(reader)
            self.readers[tap.name] = reader
            self._handles.append(
                module.register_forward_hook(hook.output)
                if tap.position == "output"
                else module.register_forward_pre_hook(hook.input, with_kwargs=True)
            )
        if not self.taps:
            raise ValueError(
                f"nothing to track: every selected layer is wider than max_channels="
                f"{self.max_channels}; raise max_channels"
            )
        step = StepHook(self)
        self._handles.append(model.register_forward_pre_hook(step.begin, prepend=True))
        self._handles.append(model.register_forward_hook(step.end))
        observers[self.number] = self

    def _skip_wide(self, name: str, channels: int) -> None:
        self.notes[name] = f"skipped: {channels} channels > max_channels={self.max_channels}"

    # called by the hooks, in eager mode directly, in compiled code through operators

    def begin_step(self) -> None:
        """Starts a step: called by the root module's hook."""
        self._is_reading = not self._is_paused and self.steps % self.every == 0
        if not self._is_reading:
            return
        self._synced = None
        self._inputs.clear()
        for reader in self.unique_readers():
            reader.begin_step(self.steps)

    def observe(self, tap: int, activation: Tensor) -> None:
        """Reads one activation: called by a module's hook.

        Outside a step nothing is read; so the recomputation of a checkpointed block, which runs in
        the backward pass, does not count twice.
        """
        if not self._is_reading:
            return
        spec = self.taps[tap]
        if spec.position == "input" and self._is_shared(tap, activation):
            return
        rows = row_view(activation.detach(), spec.layout, spec.batched_rank)
        if rows.shape[-1] > self.max_channels:
            self._skip_wide(spec.name, rows.shape[-1])
            return
        reader = self._by_tap[tap]
        state = reader.state
        if state is not None and state.channels != rows.shape[-1]:
            raise ValueError(
                f"layer {spec.name!r} gave {rows.shape[-1]} channels after {state.channels}: its "
                "width changes from call to call, exclude it"
            )
        reader.read(rows)

    @torch.no_grad()
    def end_step(self) -> None:
        """Ends a step: called by the root module's hook."""
        if not self._is_paused:
            self.steps += 1
        if not self._is_reading:
            return
        self._is_reading = False
        self._inputs.clear()
        self._plan()
        for reader in self.unique_readers():
            reader.end_step()
        self.after_step()

    def after_step(self) -> None:
        """Called when a step that was read has ended."""

    def _is_shared(self, tap: int, activation: Tensor) -> bool:
        # Consumers of one tensor share one tap: the first that sees it in a step reads it.
        if tap in self._shared:
            return True
        if self._by_tap[tap].total_calls:
            return False
        for reference, owner in self._inputs:
            if reference() is activation and owner != tap:
                self._share(tap, owner)
                return True
        self._inputs.append((weakref.ref(activation), tap))
        return False

    def names(self) -> list[str]:
        """Names of the watched tensors, in the model's order."""
        return [tap.name for tap in self.taps]

    def unique_readers(self) -> list[Reader]:
        """Readers in the model's order, shared ones once."""
        return list(dict.fromkeys(self._by_tap))

    def _share(self, tap: int, owner: int) -> None:
        self._shared.add(tap)
        self._by_tap[tap] = self.readers[self.taps[tap].name] = self._by_tap[owner]

    def _plan(self) -> None:
        unplanned = [
            (reader, LayerLoad(reader.state.channels, reader.offered_rows, 0))
            for reader in self.unique_readers()
            if reader.fraction is None and reader.calls and reader.state is not None
        ]
        if not unplanned:
            return
        if isinstance(self.rows, int):
            for reader, load in unplanned:
                reader.plan(min(1.0, self.rows / load.rows))
            return
        if self._rho is None:
            self._rho = rows_per_channel(
                [
                    LayerLoad(reader.state.channels, rows, rows * tap.macs_per_row)
                    for tap, reader in zip(self.taps, self._by_tap, strict=True)
                    if reader.state is not None and (rows := reader.offered_rows)
                ]
            )
        for reader, load in unplanned:
            reader.plan(read_fraction(load, self._rho))

    def close(self) -> None:
        """Removes every hook; the statistics stay readable."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        observers.pop(self.number, None)

    def merge(self, other: Collector) -> None:
        """Adds what another tracker of the same layers has seen; that one stays as it is.

        Raises:
            ValueError: If no layer is common, a width differs, or decay is used and the trackers
                stand at different steps.
        """
        common = [name for name in self.readers if name in other.readers]
        if not common:
            raise ValueError(
                f"nothing to merge: no layer in common; this tracker has {self.names()[:3]}..., "
                f"the other {other.names()[:3]}..."
            )
        if self.decay != other.decay or (self.decay is not None and self.steps != other.steps):
            raise ValueError(
                f"cannot merge: decay {self.decay} at step {self.steps} with decay {other.decay} "
                f"at step {other.steps}; decayed states must stand at the same step"
            )
        self._synced = None
        done: set[Reader] = set()
        for name in common:
            mine, theirs = self.readers[name], other.readers[name]
            if mine not in done:
                done.add(mine)
                mine.merge(theirs, self.steps)
        if self.decay is None:
            self.steps += other.steps

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: tensors and numbers only, no collective.

        After :meth:`Tracker.sync` it holds all ranks' rows: load it on any number of ranks, rank 0
        then carries them and the others start at zero.
        """
        layers = {}
        for reader in self.unique_readers():
            layers[reader.name] = reader.state_dict()
            if self._synced is not None and reader.name in self._synced:
                layers[reader.name]["state"] = self._synced[reader.name].state_dict()
        return {
            "format": _FORMAT,
            "steps": self.steps,
            "rho": self._rho,
            "is_synced": self._synced is not None,
            "shared": {n: r.name for n, r in self.readers.items() if n != r.name},
            "layers": layers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`.

        Raises:
            ValueError: If it is of another format, or holds layers that are not tracked here.
        """
        if state_dict.get("format") != _FORMAT:
            raise ValueError(
                f"state_dict has format {state_dict.get('format')!r}, expected {_FORMAT}: it was "
                "not written by Tracker.state_dict() of this version"
            )
        layers = state_dict["layers"]
        unknown = [name for name in layers if name not in self.readers]
        if unknown:
            raise ValueError(
                f"state_dict holds layers that are not tracked here: {', '.join(unknown[:3])}; "
                "track the same model with the same include and exclude"
            )
        is_elsewhere = (
            state_dict["is_synced"]
            and dist.is_available()
            and dist.is_initialized()
            and dist.get_rank() > 0
        )
        self._synced = None
        self.steps = state_dict["steps"]
        self._rho = state_dict["rho"]
        tap_of = {tap.name: index for index, tap in enumerate(self.taps)}
        for name, owner in state_dict["shared"].items():
            self._share(tap_of[name], tap_of[owner])
        for name, saved in layers.items():
            self.readers[name].load_state_dict(saved, with_rows=not is_elsewhere)

    def reset(self) -> None:
        """Forgets every row and step; what was planned from the first step's shapes stays."""
        self._synced = None
        self.steps = 0
        for reader in self.unique_readers():
            reader.reset()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Reads nothing and counts no step inside the ``with`` block."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before
