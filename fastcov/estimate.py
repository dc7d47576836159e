"""Estimate of the memory and arithmetic that tracking would add, before anything is allocated."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from fastcov.arguments import check_model, check_of, check_reading
from fastcov.ops.backend import service_of
from fastcov.rows.layout import view_rows
from fastcov.rows.policy import LayerLoad, Rows, policy_of
from fastcov.rows.view import plain_tensor
from fastcov.stats.buffering import device_buffer_rows, projection_bytes, state_bytes
from fastcov.stats.placement import Placement
from fastcov.stats.workspace import update_workspace_bytes
from fastcov.watch.budget import sketch_of
from fastcov.watch.masking import Mask, MaskSource
from fastcov.watch.pairs import check_pairs, pair_name
from fastcov.watch.select import Of, Selector, Tap, find_taps, first_tensor
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
            f"{len(self.layers)} layers, {_mebibytes(self.memory_bytes)} MiB, "
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
            f"  {layer.name}: C={layer.channels}{_to(layer.sketch)}, {_count(layer.rows_read)} of "
            f"{layer.rows_offered} rows a step, "
            f"{(layer.state_bytes + layer.buffer_bytes) / 2**20:.2f} MiB"
            for layer in self.layers
        ]
        lines += [f"  {name}: skipped, {width} channels" for name, width in self.skipped.items()]
        return "\n".join(lines)


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.{1 if size >= 2**20 else 2}f}"


def _count(rows: float) -> str:
    return f"{rows:.0f}" if rows >= 10 else f"{rows:.2g}"


def _to(sketch: int) -> str:
    return f" to {sketch}" if sketch else ""


def estimate(
    model: nn.Module,
    example: Any,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    where: Literal["output", "input", "both"] = "output",
    of: Of = "activation",
    rows: Rows = "auto",
    mask: Mask | None = None,
    weighting: Literal["position", "image"] = "position",
    memory: int | str | None = None,
    max_channels: int = 4096,
    pairs: Iterable[Sequence[str]] = (),
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
      are merged: up to twice the 4 C^2 bytes of a state.

    Args:
        model: Module whose forward is one step.
        example: Input of the model: a tensor, a tuple of arguments or a mapping of keyword
            arguments, on the model's device.
        include: See :func:`fastcov.track`.
        exclude: See :func:`fastcov.track`.
        where: See :func:`fastcov.track`.
        of: See :func:`fastcov.track`. Gradients are counted as if every watched tensor had one.
        rows: See :func:`fastcov.track`.
        mask: See :func:`fastcov.track`; the mask is that of the example.
        weighting: See :func:`fastcov.track`.
        memory: See :func:`fastcov.track`.
        max_channels: See :func:`fastcov.track`.
        pairs: See :func:`fastcov.track`. Pairs with a tensor that no module gives are not counted.
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
    check_of(of)
    pair_names = check_pairs(pairs)
    check_reading(where, weighting, max_channels)
    taps = find_taps(model, include, exclude, where, of)
    sketch = sketch_of(model, taps, memory, pair_names)
    source = None if mask is None else MaskSource(mask, model)
    survey = _Survey(taps, max_channels if memory is None else sys.maxsize, source)
    devices = {weight.device for weight in model.parameters() if weight.is_cuda}
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with (
        survey.watching(model, training),
        torch.random.fork_rng(list(devices)),
        torch.no_grad(),
        _unfused(),
        FlopCounterMode(display=False, custom_mapping={attention: _attention_flops}) as counter,
    ):
        _call(model, example)
    tap_loads, loads = survey.loads(sketch)
    joint_loads = survey.pair_loads(pair_names)
    joint = {
        name: LayerLoad(each.channels, each.rows_read, 0) for name, each in joint_loads.items()
    }
    fractions = {**policy.fractions(loads, loads), **policy.fractions(joint, joint)}
    layers = [
        _layer_estimate(name, each, fractions[name], weighting == "image", (loads | joint)[name])
        for name, each in (*tap_loads.items(), *joint_loads.items())
    ]
    signs = 0
    if sketch is not None:
        signs = projection_bytes([load.channels for load in loads.values()], sketch)
    return Estimate(layers, counter.get_total_flops(), survey.skipped, signs)


@contextmanager
def _unfused() -> Iterator[None]:
    """Context in which torch fuses no encoder layer and no nn.MultiheadAttention.

    In evaluation mode it makes operators of them that its flop counter does not know, and nested
    tensors of padded batches, which the counter refuses.
    """
    is_fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(is_fused)


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *_: Any, **__: Any
) -> int:
    """Flops of a CPU's attention, which torch's counter leaves out. Sizes: [B, heads, T, width]"""
    return 2 * query[:3].numel() * key[-2] * (query[-1] + value[-1])


@dataclass
class _TapLoad:
    """Sizes of the tensors that one tap is given in one step.

    Attributes:
        channels: Length of a row.
        dtype: Dtype of the rows.
        device: Device of the rows.
        calls: Number of rows of each call.
        views: Row view of each call, on the meta device; empty for a CPU.
        left_out: Rows that the mask gives the weight 0.
        is_copied: True if rows that are due are copied before they are placed: those with weights
            of their own, and those of pairs.
        has_weights: True if each row has a weight.
        is_forward: True if the rows come in the forward: others never have a buffer with counters
            on a GPU.
    """

    channels: int
    dtype: torch.dtype
    device: torch.device
    calls: list[int] = field(default_factory=list)
    views: list[Tensor] = field(default_factory=list)
    left_out: int = 0
    is_copied: bool = False
    has_weights: bool = False
    is_forward: bool = True

    @property
    def rows_read(self) -> int:
        """Rows of a step that the mask does not leave out."""
        return sum(self.calls) - self.left_out


def _layer_estimate(
    name: str, load: _TapLoad, fraction: float, is_by_image: bool, planned: LayerLoad
) -> LayerEstimate:
    size, offered, sketch = load.channels, sum(load.calls), planned.sketch
    is_sketched = sketch is not None and size > sketch
    order = sketch + 1 if sketch is not None and is_sketched else size
    layer_state = state_bytes(order)
    due = [fraction * count for count in load.calls]
    service = service_of(load.dtype, load.device)
    placement = Placement(size, service.is_host, is_sketched=is_sketched, is_by_image=is_by_image)
    is_whole = fraction == 1 or load.is_copied
    buffered = [placement.waits(count, is_whole) for count in due]
    capacity = placement.capacity if any(buffered) else 0
    if is_by_image and len(due) > 1:
        # Rows are weighed after the step's last call. Until then they wait in the buffer, or their
        # sums in a second state.
        waiting = sum(count for count, waits in zip(due, buffered, strict=True) if waits)
        capacity = max(capacity, ceil(waiting))
        layer_state *= 1 if all(buffered) else 2
    most_waiting, has_device_buffer = capacity, False
    row_bytes = size * load.dtype.itemsize + 8 * load.has_weights
    is_counted_there = load.device.type == "meta" or service.counts_on_device
    if is_counted_there and load.is_forward and (fraction < 1 or any(buffered)):
        rows = placement.rows_on_device(offered, len(due), fraction)
        if rows is not None and (sizes := device_buffer_rows(size, rows, len(due))):
            capacity, row_bytes = sum(sizes), row_bytes + 4  # 4 for the step of each row
            has_device_buffer = True
    is_weighted = is_by_image or load.has_weights
    return LayerEstimate(
        name=name,
        channels=size,
        rows_offered=offered,
        rows_read=fraction * load.rows_read,
        state_bytes=layer_state,
        buffer_bytes=capacity * row_bytes,
        flops=2 * fraction * load.rows_read * planned.row_macs,
        workspace_bytes=0
        if is_sketched
        else _workspace_bytes(
            load, fraction, buffered, most_waiting, is_weighted, has_device_buffer
        ),
        sketch=order - 1 if is_sketched else 0,
    )


def _workspace_bytes(
    tap_load: _TapLoad,
    fraction: float,
    buffered: list[bool],
    most_waiting: int,
    is_weighted: bool,
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
        sizes.append(update_workspace_bytes(waiting, tap_load.device, is_weighted=is_weighted))
    return max(sizes)


class _Survey:
    """Collector of the sizes of all tapped tensors in one forward."""

    def __init__(
        self, taps: list[tuple[Tap, nn.Module]], max_channels: int, source: MaskSource | None
    ) -> None:
        self.taps = taps
        self.max_channels = max_channels
        self.skipped: dict[str, int] = {}
        self._source = source
        self._mask: Tensor | None = None
        self._tap_loads: dict[str, _TapLoad] = {}
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
        if self._source is not None:
            handles.append(model.register_forward_pre_hook(self._find_mask, with_kwargs=True))
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

    def _find_mask(self, _module: nn.Module, args: Any, kwargs: Any) -> None:
        if self._source is not None and self._mask is None:
            self._mask = self._source.find(args, kwargs)

    def loads(self, sketch: int | None) -> tuple[dict[str, _TapLoad], dict[str, LayerLoad]]:
        """Sizes and loads of the layers that would be made, by name.

        Args:
            sketch: Channels to which wider rows are projected; None keeps all.
        """
        self._shared.split_diverged()
        macs = dict.fromkeys(self._tap_loads, 0)
        own = dict(self._tap_loads)
        for number, (tap, _) in enumerate(self.taps):
            owner = self.taps[self._shared.owner.get(number, number)][0].name
            if owner in macs:
                macs[owner] += self._macs[number]
            if owner != tap.name:
                own.pop(tap.name, None)
        return own, {
            name: LayerLoad(each.channels, each.rows_read, macs[name], sketch)
            for name, each in own.items()
        }

    def pair_loads(self, pairs: list[tuple[str, str]]) -> dict[str, _TapLoad]:
        """Sizes of the rows of pairs, side by side, by name."""
        found = {}
        for names in pairs:
            first, second = (self._tap_loads.get(name) for name in names)
            if first is not None and second is not None:
                found[pair_name(names)] = _TapLoad(
                    first.channels + second.channels,
                    torch.promote_types(first.dtype, second.dtype),
                    first.device,
                    first.calls,
                    left_out=first.left_out,
                    is_copied=True,
                    has_weights=first.has_weights,
                    is_forward=False,
                )
        return found

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
        viewed = view_rows(plain, tap.layout, tap.batched_rank)
        if viewed is None:
            return
        _, layout, sizes = viewed
        if layout.channels > self.max_channels:
            self.skipped[tap.name] = layout.channels
            return
        self._macs[number] += layout.rows * tap.macs_per_row
        if tap.position == "input" and not tap.is_gradient:
            self._shared.see(number, activation, layout.order, tap.name in self._tap_loads)
        load = self._tap_loads.setdefault(
            tap.name,
            _TapLoad(layout.channels, layout.dtype, layout.device, is_forward=not tap.is_gradient),
        )
        load.calls.append(layout.rows)
        mask = self._mask
        if mask is not None and sizes[: mask.dim()] == mask.shape:
            load.has_weights = load.is_copied = True
            load.is_forward = False
            if not mask.is_meta:
                load.left_out += int((mask == 0).sum()) * layout.rows // mask.numel()
        if load.device.type != "cpu":
            rows = layout.view(plain) if layout.key is not None else viewed.tensor
            size, stride = rows.shape, rows.stride()
            load.views.append(torch.empty_strided(size, stride, dtype=rows.dtype, device="meta"))


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
