"""Estimate of the memory and arithmetic that tracking would add, before anything is allocated."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastcov.arguments import check_model, check_reading
from fastcov.ops.backend import service_of
from fastcov.rows.policy import LayerLoad, Rows, policy_of
from fastcov.rows.view import plain_tensor, row_order, row_view
from fastcov.stats.buffering import (
    SKETCH_ROWS,
    buffer_rows,
    device_buffer_rows,
    direct_rows,
    projection_bytes,
    state_bytes,
)
from fastcov.stats.workspace import update_workspace_bytes
from fastcov.watch.budget import sketch_of
from fastcov.watch.select import Selector, Tap, find_taps, first_tensor
from fastcov.watch.sharing import SharedInputs

_COMPARED_FILLS = 32  # numbers of waiting rows, evenly spaced, whose workspaces are compared


@dataclass(frozen=True)
class LayerEstimate:
    """Memory and arithmetic that tracking one layer would add. Rows and flops are per step.

    Attributes:
        name: Canonical name of the tap.
        channels: Length of a row, C.
        rows_offered: Rows that a step brings.
        rows_read: Rows that are read of these, on average.
        state_bytes: Memory of the layer's sums, which stays.
        buffer_bytes: Memory of rows that wait to be added, which stays.
        flops: Arithmetic of the layer's second moment.
        workspace_bytes: Memory that one update of the state takes on a GPU and gives back, at most.
        sketch: Channels that rows are projected to, to fit into ``memory``; 0 where all are kept.
    """

    name: str
    channels: int
    rows_offered: int
    rows_read: float
    state_bytes: int
    buffer_bytes: int
    flops: float
    workspace_bytes: int = 0
    sketch: int = 0


@dataclass(frozen=True)
class Estimate:
    """Memory and arithmetic that tracking would add.

    Attributes:
        layers: Estimates of the watched layers.
        forward_flops: Flops of one forward of the model, by torch.utils.flop_counter.
        skipped: Channels of the layers that are wider than ``max_channels``, by name.
        projection_bytes: Memory of the random signs that project sketched layers' rows, which
            layers of one width share.
    """

    layers: list[LayerEstimate]
    forward_flops: int
    skipped: dict[str, int] = field(default_factory=dict)
    projection_bytes: int = 0

    @property
    def memory_bytes(self) -> int:
        """Bytes that are added at the peak: states, buffers, signs, the workspace of one update."""
        lasting = sum(layer.state_bytes + layer.buffer_bytes for layer in self.layers)
        return lasting + self.projection_bytes + self.workspace_bytes

    @property
    def workspace_bytes(self) -> int:
        """Bytes of the largest layer's workspace: updates take and give it back one by one.

        Part of :attr:`memory_bytes`. 0 on a CPU, whose operators work outside torch's allocator:
        see :func:`estimate`.
        """
        return max((layer.workspace_bytes for layer in self.layers), default=0)

    @property
    def flops(self) -> float:
        """Flops of one step's second moments, the lower half alone, from the rows themselves."""
        return sum(layer.flops for layer in self.layers)

    @property
    def flops_share(self) -> float:
        """:attr:`flops` over those of a training step, three times the forward's; NaN without."""
        return self.flops / (3 * self.forward_flops) if self.forward_flops else float("nan")

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers, {self.memory_bytes / 2**20:.1f} MiB, "
            f"{self.flops / 1e9:.3g} GFLOP a step ({self.flops_share:.2%} of a training step)"
        ]
        if self.workspace_bytes:
            largest = max(self.layers, key=lambda layer: layer.workspace_bytes)
            lines.append(
                f"  workspace: {self.workspace_bytes / 2**20:.2f} MiB of it, given back after each "
                f"update; the most for {largest.name}"
            )
        if sketched := [layer for layer in self.layers if layer.sketch]:
            lines.append(
                f"  sketched: {len(sketched)} layers to {sketched[0].sketch} channels, "
                f"{self.projection_bytes / 2**20:.1f} MiB of random signs; the others keep all"
            )
        lines += [
            f"  {layer.name}: C={layer.channels}{_to(layer.sketch)}, {layer.rows_read:.3g} of "
            f"{layer.rows_offered} rows a step, "
            f"{(layer.state_bytes + layer.buffer_bytes) / 2**20:.2f} MiB"
            for layer in self.layers
        ]
        lines += [f"  {name}: skipped, {width} channels" for name, width in self.skipped.items()]
        return "\n".join(lines)


def _to(sketch: int) -> str:
    return f" to {sketch}" if sketch else ""


def estimate(
    model: nn.Module,
    example: Any,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    where: Literal["output", "input", "both"] = "output",
    rows: Rows = "auto",
    weighting: Literal["position", "image"] = "position",
    memory: int | str | None = None,
    max_channels: int = 4096,
    training: bool = False,
) -> Estimate:
    """Memory and flops that :func:`fastcov.track` would add, before it allocates anything.

    One forward runs with the example, without gradients. A model on the meta device is estimated
    without memory or arithmetic of its own, as if it trained on an H100 (whose workspace is counted
    where triton is installed).

    Memory is that of states and buffers, which stays, and on a GPU the largest workspace of one
    update: updates follow one another on a stream. The workspace adds to the peak of a step only
    where the update runs at that peak. Left out, as they come and go within one call:

    - On a CPU, the scratch memory of the compiled operators, which the thread that runs the forward
      keeps outside torch's allocator and profiler: about 16 MiB at most, or 0.8 MiB for each of
      torch's threads where that is more (4 KiB a channel above 4096). A layer that is read through
      its inputs (``rows="all"``) needs in scratch memory 8 bytes for each weight and 4 for each
      entry of the inputs' second moment, and takes 8 more for each entry from torch.
    - On a CPU, the copy of a call's sampled rows, where they are more than 2 C.
    - Temporaries of plain torch, where it takes the place of a compiled operator or of Triton
      (:func:`fastcov.backends`), and for float64 rows on a GPU.
    - Of a sketched layer, the projected rows of one call, and a copy of the rows that are due where
      they are more than 64.
    - With ``weighting="image"``, temporaries of a module called several times a step, whose states
      are merged: up to four times the 8 C^2 bytes of a state.

    Args:
        model: Module whose forward is one step.
        example: Input of the model: a tensor, a tuple of arguments or a mapping of keyword
            arguments, on the model's device.
        include: See :func:`fastcov.track`.
        exclude: See :func:`fastcov.track`.
        where: See :func:`fastcov.track`.
        rows: See :func:`fastcov.track`.
        weighting: See :func:`fastcov.track`.
        memory: See :func:`fastcov.track`.
        max_channels: See :func:`fastcov.track`.
        training: True runs the forward in training mode, for models with other shapes there, as
            detectors, whose example then holds targets. Batch norm stays in evaluation mode. A
            tracker of this model counts the forward as a step, unless the tracker is paused.

    Returns:
        Sums, and one entry a layer; ``print`` shows both.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or a pattern matches no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = estimate(model, torch.zeros(32, 8))
        >>> [layer.channels for layer in report.layers], report.flops_share < 0.011
        ([16, 4], True)
    """
    # torch's flop counter imports triton: a plain `import fastcov` must not.
    from torch.utils.flop_counter import FlopCounterMode

    check_model(model)
    policy = policy_of(rows)
    check_reading(where, weighting, max_channels)
    taps = find_taps(model, include, exclude, where)
    sketch = sketch_of(model, taps, memory)
    survey = _Survey(taps, max_channels if memory is None else sys.maxsize)
    devices = {weight.device for weight in model.parameters() if weight.is_cuda}
    with (
        survey.watching(model, training),
        torch.random.fork_rng(list(devices)),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        _call(model, example)
    loads = survey.loads(sketch)
    fractions = policy.fractions(loads, loads)
    layers = [
        _layer_estimate(survey.tap_loads[name], name, fractions[name], weighting == "image", load)
        for name, load in loads.items()
    ]
    signs = 0
    if sketch is not None:
        signs = projection_bytes([load.channels for load in loads.values()], sketch)
    return Estimate(layers, counter.get_total_flops(), survey.skipped, signs)


@dataclass
class _TapLoad:
    """Sizes of the tensors that one tap is given in one step.

    Attributes:
        channels: Length of a row.
        dtype: Dtype of the rows.
        device: Device of the rows.
        calls: Number of rows of each call.
        views: Row view of each call, on the meta device; empty for a CPU.
    """

    channels: int
    dtype: torch.dtype
    device: torch.device
    calls: list[int] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)


def _layer_estimate(
    tap_load: _TapLoad, name: str, fraction: float, is_by_image: bool, load: LayerLoad
) -> LayerEstimate:
    size, offered, sketch = load.channels, load.rows, load.sketch
    is_sketched = sketch is not None and size > sketch
    order = sketch + 1 if sketch is not None and is_sketched else size
    layer_state = state_bytes(order)
    due = [fraction * count for count in tap_load.calls]
    # As in fastcov.stats.layer: calls of many rows are added at once, the others wait in a buffer.
    service = service_of(tap_load.dtype, tap_load.device)
    threshold = SKETCH_ROWS if is_sketched else buffer_rows(size, service.is_host)
    direct = SKETCH_ROWS if is_sketched else direct_rows(size, service.is_host)
    buffered = [count <= threshold if fraction < 1 else count < direct for count in due]
    capacity = threshold if any(buffered) else 0
    if is_by_image and len(due) > 1:
        # Rows are weighed after the step's last call. Until then they wait in the buffer, or their
        # sums in a second state.
        capacity = max(
            capacity, ceil(sum(d for d, waits in zip(due, buffered, strict=True) if waits))
        )
        layer_state *= 1 if all(buffered) else 2
    most_waiting, has_device_buffer = capacity, False
    row_bytes = size * tap_load.dtype.itemsize
    is_on_gpu = tap_load.device.type == "meta" or service.counts_on_device
    if is_on_gpu and not is_sketched and not is_by_image and (fraction < 1 or any(buffered)):
        waiting = fraction * offered if fraction < 1 else min(offered, len(due) * (direct - 1))
        if sizes := device_buffer_rows(size, waiting, len(due)):
            capacity, row_bytes = sum(sizes), row_bytes + 4  # 4 for the step of each row
            has_device_buffer = True
    return LayerEstimate(
        name=name,
        channels=size,
        rows_offered=offered,
        rows_read=fraction * offered,
        state_bytes=layer_state,
        buffer_bytes=capacity * row_bytes,
        flops=2 * fraction * offered * load.row_macs,
        workspace_bytes=0
        if is_sketched
        else _workspace_bytes(
            tap_load, fraction, buffered, most_waiting, is_by_image, has_device_buffer
        ),
        sketch=order - 1 if is_sketched else 0,
    )


def _workspace_bytes(
    tap_load: _TapLoad,
    fraction: float,
    buffered: list[bool],
    most_waiting: int,
    is_by_image: bool,
    has_device_buffer: bool,
) -> int:
    """Workspace of the largest update, be it of a call's rows or of rows that have waited.

    In the first steps rows wait with counters on the host, and the same kernels add them. A buffer
    with counters on the device is made later, and emptied without workspace.
    """
    if not tap_load.views:
        return 0

    def rows(count: int) -> Tensor:
        return torch.empty(count, tap_load.channels, dtype=tap_load.dtype, device="meta")

    sizes = [0]
    for view, count, waits in zip(tap_load.views, tap_load.calls, buffered, strict=True):
        if not waits and fraction < 1:
            sample = rows(ceil(fraction * count))
            gathered = 0 if has_device_buffer else sample.nbytes  # a copy, made for the update
            sizes.append(gathered + update_workspace_bytes(sample, tap_load.device))
        elif not waits:
            sizes.append(update_workspace_bytes(view, tap_load.device))
    # Not only of the most rows: fewer may be divided among more programs, and take more.
    for part in range(1, _COMPARED_FILLS + 1):
        waiting = rows(ceil(most_waiting * part / _COMPARED_FILLS))
        sizes.append(update_workspace_bytes(waiting, tap_load.device, is_weighted=is_by_image))
    return max(sizes)


class _Survey:
    """Collector of the sizes of all tapped tensors in one forward."""

    def __init__(self, taps: list[tuple[Tap, nn.Module]], max_channels: int) -> None:
        self.taps = taps
        self.max_channels = max_channels
        self.tap_loads: dict[str, _TapLoad] = {}
        self.skipped: dict[str, int] = {}
        self._shared = SharedInputs()
        self._macs = [0] * len(taps)

    @contextmanager
    def watching(self, model: nn.Module, training: bool) -> Iterator[None]:
        """Context with hooks on all taps and the model in one mode; restores both afterwards."""
        handles = [
            module.register_forward_hook(self._output_hook(number))
            if tap.position == "output"
            else module.register_forward_pre_hook(self._input_hook(number), with_kwargs=True)
            for number, (tap, module) in enumerate(self.taps)
        ]
        modes = [(module, module.training) for module in model.modules()]
        model.train(training)
        for module in model.modules():
            if isinstance(module, _NormBase):
                module.eval()
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            for module, mode in modes:
                module.training = mode

    def loads(self, sketch: int | None) -> dict[str, LayerLoad]:
        """Loads of the layers that would be made, by name.

        Args:
            sketch: Channels to which wider rows are projected; None keeps all.
        """
        self._shared.diverged()
        macs = dict.fromkeys(self.tap_loads, 0)
        for number, (tap, _) in enumerate(self.taps):
            owner = self.taps[self._shared.owner.get(number, number)][0].name
            if owner in self.tap_loads:
                macs[owner] += self._macs[number]
            if owner != tap.name:
                self.tap_loads.pop(tap.name, None)
        return {
            name: LayerLoad(tap_load.channels, sum(tap_load.calls), macs[name], sketch)
            for name, tap_load in self.tap_loads.items()
        }

    def _output_hook(self, number: int) -> Any:
        return lambda _module, _args, output: self._note(number, output)

    def _input_hook(self, number: int) -> Any:
        return lambda _module, args, kwargs: self._note(number, (args, kwargs))

    def _note(self, number: int, value: Any) -> None:
        tap = self.taps[number][0]
        activation = first_tensor(value)
        plain = None if activation is None else _sized(activation)
        if activation is None or plain is None:
            return
        rows = row_view(plain, tap.layout, tap.batched_rank)
        channels = rows.shape[-1]
        if rows.numel() == 0:
            return
        if channels > self.max_channels:
            self.skipped[tap.name] = channels
            return
        count = rows.numel() // channels
        self._macs[number] += count * tap.macs_per_row
        if tap.position == "input":
            order = row_order(plain.dim(), tap.layout, tap.batched_rank)
            self._shared.see(number, activation, order, tap.name in self.tap_loads)
        tap_load = self.tap_loads.setdefault(tap.name, _TapLoad(channels, rows.dtype, rows.device))
        tap_load.calls.append(count)
        if tap_load.device.type != "cpu":
            layout = torch.empty_strided(rows.shape, rows.stride(), dtype=rows.dtype, device="meta")
            tap_load.views.append(layout)


def _sized(activation: Tensor) -> Tensor | None:
    # The tensor whose sizes count; None where no rows can be read. Meta tensors have sizes, and no
    # more is needed here, though plain_tensor refuses them.
    if activation.is_meta and activation.dim() > 0:
        return activation
    found = plain_tensor(activation)
    return None if isinstance(found, str) else found[0]


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)
