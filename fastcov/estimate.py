"""What tracking would add, known before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastcov.rows import row_view
from fastcov.sampling import (
    BUFFER_ROWS_PER_CHANNEL,
    LayerLoad,
    read_fraction,
    rows_per_channel,
)
from fastcov.taps import Selector, Tap, find_taps, first_tensor


@dataclass(frozen=True)
class LayerEstimate:
    """One layer's part. Bytes are of its state and its buffer; rows and flops are per step."""

    name: str
    channels: int
    rows_offered: int
    rows_read: float
    state_bytes: int
    buffer_bytes: int
    flops: float


@dataclass(frozen=True)
class Estimate:
    """Memory and arithmetic that tracking would add.

    Attributes:
        layers: What is watched.
        skipped: Wider than ``max_channels``, with their channels.
        forward_flops: Of one forward of the model, by torch.utils.flop_counter.
    """

    layers: list[LayerEstimate]
    forward_flops: int
    skipped: dict[str, int] = field(default_factory=dict)

    @property
    def memory_bytes(self) -> int:
        """States and buffers together, in bytes."""
        return sum(layer.state_bytes + layer.buffer_bytes for layer in self.layers)

    @property
    def flops(self) -> float:
        """Flops of one step's second moments, the lower half alone."""
        return sum(layer.flops for layer in self.layers)

    @property
    def flops_share(self) -> float:
        """Those flops over a training step's, three times the forward's."""
        return self.flops / (3 * self.forward_flops) if self.forward_flops else float("nan")

    def __str__(self) -> str:
        lines = [
            f"{len(self.layers)} layers, {self.memory_bytes / 2**20:.1f} MiB, "
            f"{self.flops / 1e9:.3g} GFLOP a step ({self.flops_share:.2%} of a training step)"
        ]
        lines += [
            f"  {layer.name}: C={layer.channels}, {layer.rows_read:.3g} of {layer.rows_offered} "
            f"rows a step, {(layer.state_bytes + layer.buffer_bytes) / 2**20:.2f} MiB"
            for layer in self.layers
        ]
        lines += [f"  {name}: skipped, {width} channels" for name, width in self.skipped.items()]
        return "\n".join(lines)


def estimate(
    model: nn.Module,
    example: Any,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    where: Literal["output", "input", "both"] = "output",
    rows: Literal["auto", "all"] | int | float = "auto",
    max_channels: int = 4096,
) -> Estimate:
    """Memory and flops that :func:`fastcov.track` would add, before it allocates anything.

    One forward runs with the example, in evaluation mode and without gradients. A model on the
    meta device is estimated without memory or arithmetic of its own.

    Args:
        model: As for :func:`fastcov.track`.
        example: Its input: a tensor, a tuple of arguments or a mapping of keyword arguments, on
            the model's device.
        include: As for :func:`fastcov.track`.
        exclude: As for :func:`fastcov.track`.
        where: As for :func:`fastcov.track`.
        rows: As for :func:`fastcov.track`.
        max_channels: As for :func:`fastcov.track`.

    Returns:
        Sums and one entry a layer; ``print`` shows them.

    Raises:
        ValueError: If a pattern matches no module.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> report = estimate(model, torch.zeros(32, 8))
        >>> [layer.channels for layer in report.layers], report.flops_share < 0.011
        ([16, 4], True)
    """
    # torch's flop counter imports triton: a plain `import fastcov` must not.
    from torch.utils.flop_counter import FlopCounterMode

    offered: dict[str, tuple[int, int, int]] = {}
    shared: dict[int, tuple[str, Tensor]] = {}
    taps = find_taps(model, include, exclude, where)
    handles = []
    for tap, module in taps:
        handles.append(_watch(tap, module, offered, shared))
    was_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            _call(model, example)
    finally:
        for handle in handles:
            handle.remove()
        for module in was_training:
            module.training = True
    loads = {
        tap.name: LayerLoad(channels, count, count * tap.macs_per_row)
        for tap, _ in taps
        if tap.name in offered
        for channels, count, _itemsize in [offered[tap.name]]
        if channels <= max_channels
    }
    rho = rows_per_channel(list(loads.values())) if rows == "auto" else float("inf")
    layers = []
    for name, load in loads.items():
        read = float(load.rows)
        if rows == "auto":
            read *= read_fraction(load, rho)
        elif isinstance(rows, float):
            read *= rows
        elif isinstance(rows, int):
            read = float(min(rows, load.rows))
        size = load.channels
        buffer_rows = BUFFER_ROWS_PER_CHANNEL * size
        is_buffered = read < buffer_rows if rows == "all" else read <= buffer_rows
        layers.append(
            LayerEstimate(
                name=name,
                channels=size,
                rows_offered=load.rows,
                rows_read=read,
                state_bytes=8 * (size * size + 2 * size + 3),
                buffer_bytes=buffer_rows * size * offered[name][2] if is_buffered else 0,
                flops=read * size * (size + 1),
            )
        )
    skipped = {name: width for name, (width, _, _) in offered.items() if width > max_channels}
    return Estimate(layers, counter.get_total_flops(), skipped)


def _watch(
    tap: Tap,
    module: nn.Module,
    offered: dict[str, tuple[int, int, int]],
    seen: dict[int, tuple[str, Tensor]],
) -> Any:
    def note(value: Any) -> None:
        activation = first_tensor(value)
        if activation is None or activation.numel() == 0:
            return
        rows = row_view(activation, tap.layout, tap.batched_rank)
        channels = rows.shape[-1]
        before = offered.get(tap.name, (channels, 0, 0))[1]
        count = before + rows.numel() // channels
        offered[tap.name] = (channels, count, activation.element_size())

    if tap.position == "output":
        return module.register_forward_hook(lambda _module, _args, output: note(output))

    def note_input(_module: nn.Module, args: Any, kwargs: Any) -> None:
        # Consumers of one tensor share one tap. Kept alive, a tensor's identity stays its own.
        tensor = first_tensor((args, kwargs))
        if tensor is not None and seen.setdefault(id(tensor), (tap.name, tensor))[0] == tap.name:
            note(tensor)

    return module.register_forward_pre_hook(note_input, with_kwargs=True)


def _call(model: nn.Module, example: Any) -> Any:
    if isinstance(example, Mapping):
        return model(**example)
    if isinstance(example, tuple):
        return model(*example)
    return model(example)
