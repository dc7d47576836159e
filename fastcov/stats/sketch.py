"""Sketch: random projection of a wide layer's rows to few channels, and the row's norm beside them.

The projection is linear, so that sums of projected rows merge, decay and are sent as others are.
The norms' second moment is the trace of the covariance.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator

import torch
from torch import Tensor

from fastcov.arguments import whole_number
from fastcov.ops import aten

_CHANNELS_AT_ONCE = 4096  # whose signs are converted to the rows' dtype at one time
_SEED = 20190409  # the same signs on every rank and in every run: their states may be merged


class _Signs:
    """Random signs of one width and device, shared by all layers of that width."""

    def __init__(self, channels: int, width: int, device: torch.device) -> None:
        generator = torch.Generator("cpu").manual_seed(_SEED + channels)
        with torch.inference_mode(False):
            bits = torch.randint(
                0, 2, (channels, width), generator=generator, dtype=torch.int8, device="cpu"
            )
            self.values = bits.mul_(2).sub_(1).to(device)


_shared: weakref.WeakValueDictionary[tuple[int, int, torch.device], _Signs] = (
    weakref.WeakValueDictionary()
)


class Sketch:
    """Projection of rows to r channels, by a matrix of random signs over sqrt(r).

    Args:
        channels: Length of a row, C.
        width: Channels of the sketch, r, fewer than C.

    Raises:
        ValueError: If ``width`` is not a number from 2 to C - 1.

    Example:
        >>> rows = torch.randn(5, 300)
        >>> Sketch(300, width=16).project(rows).shape
        torch.Size([5, 17])
    """

    def __init__(self, channels: int, width: int) -> None:
        kept = whole_number(width)
        if kept is None or not 2 <= kept < channels:
            raise ValueError(
                f"sketch={width!r}: expected a number of channels from 2 to {channels - 1}, fewer "
                f"than the {channels} of a row"
            )
        self.channels = channels
        self.width = kept
        self._signs: _Signs | None = None
        self._device: torch.device | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sketch) and self.sizes == other.sizes

    def __hash__(self) -> int:
        return hash(self.sizes)

    def __reduce__(self) -> tuple[type[Sketch], tuple[int, int]]:
        # The signs follow from the sizes.
        return Sketch, self.sizes

    @property
    def sizes(self) -> tuple[int, int]:
        """Channels of a row, and of the sketch."""
        return self.channels, self.width

    def project(self, rows: Tensor) -> Tensor:
        """Rows times the matrix, and each row's Euclidean norm behind them.

        Args:
            rows: Any strides. [..., C]

        Returns:
            float64 for rows of float64, else float32. [N, r + 1]
        """
        rows = rows.detach()
        signs = self._signs_on(rows.device)
        work = torch.float64 if rows.dtype == torch.float64 else torch.float32
        count = rows.numel() // self.channels
        projected = torch.zeros(count, self.width + 1, dtype=work, device=rows.device)
        first = 0
        with aten.full_precision(rows.device.type):
            for part in _matrices(rows):
                into = projected[first : first + len(part), : self.width]
                for start in range(0, self.channels, _CHANNELS_AT_ONCE):
                    some = slice(start, start + _CHANNELS_AT_ONCE)
                    into.add_(part[:, some].to(work) @ signs[some].to(work))
                # In float64: squares of float32 overflow.
                norms = torch.linalg.vector_norm(part, dim=1, dtype=torch.float64)
                projected[first : first + len(part), self.width] = norms.to(work)
                first += len(part)
        projected[:, : self.width] *= self.width**-0.5
        return projected

    def _signs_on(self, device: torch.device) -> Tensor:
        if self._signs is None or self._device != device:
            key = (*self.sizes, device)
            signs = _shared.get(key)
            if signs is None:
                signs = _shared[key] = _Signs(*key)
            self._signs, self._device = signs, device
        return self._signs.values


def _matrices(rows: Tensor) -> Iterator[Tensor]:
    """Parts [N, C] whose rows follow each other; only maps with channels first are copied."""
    if rows.dim() <= 2:
        yield rows.reshape(-1, rows.shape[-1])
        return
    try:
        yield rows.view(-1, rows.shape[-1])
    except RuntimeError:
        for entry in rows:
            yield from _matrices(entry) if entry.dim() > 3 else [entry.reshape(-1, rows.shape[-1])]
