"""Counters on the device: what lets a CUDA graph replay a tracked step with right counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastcov.ops.backend import service_of
from fastcov.rows.layout import ActivationLayout
from fastcov.stats.device_buffer import flush_full_, make_flush_table
from fastcov.stats.layer import Layer

_MOST_TOLD = 3  # layers of a reason, and reasons, in a warning
_held: list[Any] = []
"""What captured graphs write into. They cannot be asked whether they live, and would go on writing
where a closed tracker's memory has been given to others."""


class DeviceCounters:
    """Number of the running step, and the full buffers' one launch, without a host number.

    Args:
        layers: After a step that has shown dtypes, row counts and devices.
        step: Number of that step.

    Attributes:
        step: int64, number of the running step, or of the last one. []
        is_captured: Whether a graph holds a step: replays then move ``step`` on their own.
        is_warm: Whether an eager step has launched all this once: a kernel that is compiled and
            loaded while a graph is captured may break the capture.
        left_out: Layers that the last capture does not hold, and why.
    """

    def __init__(self, layers: Sequence[Layer], step: int) -> None:
        device = next(each.state.moment.device for each in layers if each.state is not None)
        with torch.inference_mode(False):
            self.step = torch.full((), step, dtype=torch.int64, device=device)
        self.is_captured = False
        self.is_warm = False
        self._is_open = False  # a step that is read has begun and not ended
        self.left_out: dict[Layer, str] = {}
        moved = [layer.use_device_buffer(self.step) for layer in layers]
        self._buffers = [buffer for buffer in moved if buffer is not None]
        self._table = make_flush_table(self._buffers) if self._buffers else None

    @staticmethod
    def serve(layers: Sequence[Layer]) -> bool:
        """Whether all layers that have seen a row are on one GPU that can do this."""
        states = (layer.state for layer in layers if layer.state is not None)
        if (first := next(states, None)) is None:
            return False
        device = first.moment.device
        # Asked at the end of every step: on a CPU the first state answers.
        return service_of(torch.float32, device).counts_on_device and all(
            state.moment.device == device for state in states
        )

    def renewed(self, layers: Sequence[Layer], step: int) -> DeviceCounters | None:
        """What serves from the next step on: itself, unless layers have come, moved or left.

        Args:
            layers: After a step.
            step: Number of that step.

        Returns:
            None where the host counts from now on.
        """
        if self.is_captured or not self._is_outdated(layers):
            return self
        if self.serve(layers):
            return DeviceCounters(layers, step)
        return self if any(layer.device_buffer is not None for layer in layers) else None

    def _is_outdated(self, layers: Sequence[Layer]) -> bool:
        states = (layer.state for layer in layers if layer.state is not None)
        first = next(states, None)
        return (first is not None and first.moment.device != self.step.device) or any(
            layer.wants_device_buffer for layer in layers
        )

    def begin_step(self, number: int, is_read: bool, decay: float | None) -> None:
        """Moves to the next step.

        Args:
            number: Of that step, as the host counts.
            is_read: Whether its activations are read.
            decay: As for :meth:`end_step`.
        """
        if self._is_open:  # an exception ended the last one, whose rows need room too
            self.end_step(decay)
        self._is_open = is_read
        if self.is_captured:
            self.step += 1  # replays, which the host does not see, have moved it
        else:
            self.step.fill_(number)

    def begin_capture(self, layers: Sequence[Layer]) -> None:
        """A CUDA graph captures the step that is about to begin."""
        self.left_out = {}
        if not self.is_captured:
            self.is_captured = True
            _held.append((self.step, self._table, [layer.state for layer in layers]))
            for buffer in self._buffers:
                buffer.is_captured = True

    def leaves_out(self, layer: Layer, layout: ActivationLayout) -> bool:
        """True if a graph must not hold a call, or has not held one of that layer before."""
        if layer in self.left_out:
            return True
        if not (reason := why_not_replayed(layer, layout)):
            return False
        if layer.calls:
            reason += " (some calls of its module are read)"
        self.left_out[layer] = reason
        return True

    def end_step(self, decay: float | None) -> None:
        """Adds the full buffers of all layers to their states: one launch."""
        if self._table is not None:
            flush_full_(self._table, self.step, decay or 1.0)
        self.is_warm = True
        self._is_open = False


def why_not_replayed(layer: Layer, layout: ActivationLayout) -> str:
    """Why a CUDA graph must not hold the next call of a layer: it would read the wrong rows.

    Args:
        layer: The layer.
        layout: Layout of the call.

    Returns:
        The reason and a remedy; empty where replays are counted right.
    """
    state, buffer = layer.state, layer.device_buffer
    if layer.weighting == "image":
        return 'weighting="image" weighs rows on the host; take weighting="position"'
    if state is None or layer.fraction is None or state.moment.device != layout.device:
        return f"has not run on {layout.device} before; run a step eagerly, then capture"
    if buffer is None and layer.fraction == 1 and layer.decay is not None:
        return f'decay={layer.decay} with every row is applied by the host; take rows="auto"'
    if buffer is None and layer.why_on_host:
        return layer.why_on_host
    if layer.adds_at_once(layout) and layout.dtype is layer.dtype:
        # A module's smaller calls, if any, wait: all of them are replayed, or none.
        if buffer is not None or layer.buffer.storage is None:
            return ""
    elif buffer is not None and layer.has_room(layout, layer.calls + 1):
        return ""
    return (
        f"reads {layout.rows} rows of {layout.dtype}, other sizes or another dtype than in the "
        "steps before; run one with these eagerly, then capture"
    )


def warn_left_out(reasons: Mapping[Layer, str]) -> None:
    """One warning about the layers that a graph does not hold, if there are any."""
    if not reasons:
        return
    layers: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        layers.setdefault(reason, []).append(repr(layer.name))
    parts = []
    for reason, names in list(layers.items())[:_MOST_TOLD]:
        more = f" and {len(names) - _MOST_TOLD} more" if len(names) > _MOST_TOLD else ""
        parts.append(f"{', '.join(names[:_MOST_TOLD])}{more}: {reason}")
    if len(layers) > _MOST_TOLD:
        parts.append("other layers: see summary()")
    what = "; ".join(parts)
    warnings.warn(f"replays of a captured CUDA graph do not read {what}", stacklevel=2)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured; starts no CUDA context."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
