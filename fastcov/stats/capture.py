"""Counters on the device, with which a CUDA graph replays a tracked step and still counts right."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from fastcov.ops.backend import service_of
from fastcov.rows.layout import ActivationLayout
from fastcov.stats.cursor import FRACTION
from fastcov.stats.device_buffer import flush_full_, is_table_of, make_flush_table
from fastcov.stats.layer import Layer

_MOST_NAMED = 3  # reasons in a warning, and layers of each reason
_kept_forever: list[Any] = []
"""Tensors that captured graphs write into: nobody tells when a graph is freed, and its replays
would write to memory that a closed tracker's tensors left to others."""


class DeviceCounters:
    """Step number on the device, and the one launch that empties the full buffers of all layers.

    Args:
        layers: Layers of the tracker, after a step that has shown dtypes, row counts and devices.
        step: Number of that step.

    Attributes:
        step: int64, number of the running step, or of the last one. []
        is_captured: True if a graph holds a step: replays then move ``step`` on their own.
        is_warm: True if an eager step has launched every kernel once: a kernel that is compiled
            and loaded while a graph is captured may break the capture.
        left_out: Reasons by layer, for layers that the last captured graph does not hold.
    """

    def __init__(self, layers: Sequence[Layer], step: int) -> None:
        device = next(each.state.moment.device for each in layers if each.state is not None)
        with torch.inference_mode(False):
            self.step = torch.full((), step, dtype=torch.int64, device=device)
        self.is_captured = False
        self.is_warm = False
        self._is_inside_step = False  # True from the begin of a step that is read to its end
        self.left_out: dict[Layer, str] = {}
        moved = [layer.use_device_buffer(self.step) for layer in layers]
        self._buffers = [buffer for buffer in moved if buffer is not None]
        self._table = make_flush_table(self._buffers) if self._buffers else None

    @staticmethod
    def serve(layers: Sequence[Layer]) -> bool:
        """True if all layers that have read a row are on one GPU that can count on its own."""
        states = (layer.state for layer in layers if layer.state is not None)
        if (first := next(states, None)) is None:
            return False
        device = first.moment.device
        # Runs at the end of every step. On a CPU the first condition is false: a cheap answer.
        return service_of(torch.float32, device).counts_on_device and all(
            state.moment.device == device for state in states
        )

    def renewed(self, layers: Sequence[Layer], step: int) -> DeviceCounters | None:
        """Counters for the steps after one: new ones if layers were added, moved or removed.

        None where the host counts from now on.
        """
        if self.is_captured or not self._is_outdated(layers):
            return self
        if self.serve(layers):
            return DeviceCounters(layers, step)
        return self if any(layer.on_device.buffer is not None for layer in layers) else None

    def _is_outdated(self, layers: Sequence[Layer]) -> bool:
        states = (layer.state for layer in layers if layer.state is not None)
        first = next(states, None)
        return (first is not None and first.moment.device != self.step.device) or any(
            layer.wants_device_buffer for layer in layers
        )

    def begin_step(self, number: int, is_read: bool, decay: float | None) -> None:
        """Start of a step by the host's count; ``is_read`` tells if its activations are read."""
        if self._is_inside_step:  # An exception ended the last step: empty its full buffers now.
            self.end_step(decay)
        self._is_inside_step = is_read
        if self.is_captured:
            self.step += 1  # replays, which the host does not see, have moved it
        else:
            self.step.fill_(number)

    def begin_capture(self, layers: Sequence[Layer]) -> None:
        """Preparation for a CUDA graph that captures the step about to begin."""
        self.left_out = {}
        if not self.is_captured:
            self.is_captured = True
            _kept_forever.append((self.step, self._table, [layer.state for layer in layers]))
            for buffer in self._buffers:
                buffer.is_captured = True

    def leave_out(self, layer: Layer, layout: ActivationLayout) -> bool:
        """Note of a call that a graph must not hold, with the reason; True if it is left out.

        After one call that was left out, all later calls of the layer are left out too.
        """
        if layer in self.left_out:
            return True
        if not (reason := why_not_replayed(layer, layout)):
            return False
        if layer.calls:
            reason += " (some calls of its module are read)"
        self.left_out[layer] = reason
        return True

    def end_step(self, decay: float | None) -> None:
        """Addition of all layers' full buffers to their states, decayed a step: one launch."""
        if self._table is not None:
            if not is_table_of(self._table, self._buffers):
                self._table = make_flush_table(self._buffers)
            flush_full_(self._table, self.step, decay or 1.0)
        self.is_warm = True
        self._is_inside_step = False


def why_not_replayed(layer: Layer, layout: ActivationLayout) -> str:
    """Reason, with a remedy, why replays of a CUDA graph would read the wrong rows of a next call.

    Empty where replays read and count the right rows.
    """
    state, buffer = layer.state, layer.on_device.buffer
    if layer.weighting == "image":
        return 'weighting="image" weighs rows on the host; take weighting="position"'
    if state is None or layer.fraction is None or state.moment.device != layout.device:
        return f"has not run on {layout.device} before; run a step eagerly, then capture"
    if buffer is None and layer.fraction == 1 and layer.decay is not None:
        return f'decay={layer.decay} with every row is applied by the host; take rows="auto"'
    if buffer is None and layer.on_device.why_on_host:
        return layer.on_device.why_on_host
    if layer.adds_at_once(layout) and layout.dtype is layer.dtype:
        # Smaller calls of the same module, if any, wait in a buffer. With that buffer on the host,
        # replays would leave them out: then this call is left out as well.
        if buffer is not None or layer.buffer.storage is None:
            return ""
    elif layer.on_device.has_room(layout, layer.cursor.numbers[FRACTION], layer.calls + 1):
        return ""
    return (
        f"reads {layout.rows} rows of {layout.dtype}, other sizes or another dtype than in the "
        "steps before; run one with these eagerly, then capture"
    )


def warn_left_out(reasons: Mapping[Layer, str]) -> None:
    """Warning about the layers that a graph does not hold, if there are any."""
    if not reasons:
        return
    layers: dict[str, list[str]] = {}
    for layer, reason in reasons.items():
        layers.setdefault(reason, []).append(repr(layer.name))
    parts = []
    for reason, names in list(layers.items())[:_MOST_NAMED]:
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        parts.append(f"{', '.join(names[:_MOST_NAMED])}{more}: {reason}")
    if len(layers) > _MOST_NAMED:
        parts.append("other layers: see summary()")
    unread = "; ".join(parts)
    warnings.warn(f"replays of a captured CUDA graph do not read {unread}", stacklevel=2)


def is_capturing() -> bool:
    """True while a CUDA graph is captured; starts no CUDA context."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
