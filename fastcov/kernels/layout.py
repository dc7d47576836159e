"""Layouts: places of a row view's rows in memory, in the few shapes that kernels read natively."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import Tensor

LayoutKind = Literal["rows", "planes", "strided"]
"""rows: channels contiguous (channels_last, tokens, [N, C]); planes: positions contiguous (NCHW);
strided: anything else, read element by element with 64-bit offsets."""

VECTOR_BYTES = 16
_INT32_MAX = 2**31 - 1
_MAX_BLOCK_ROWS = 128  # rows of the longest tile, for the bound on 32-bit offsets


class Geometry(NamedTuple):
    """Place of every row in memory as device code reads it: numbers of a layout, by their names.

    Kernels take them as arguments of their own, whose types Triton must know, and join them again.
    """

    steps_per_image: Any
    channels: Any
    positions: Any
    size_1: Any
    size_2: Any
    stride_0: Any
    stride_1: Any
    stride_2: Any
    stride_position: Any
    stride_channel: Any


@dataclass(frozen=True)
class RowLayout:
    """Rows as images of positions: row (image, position) = image * positions + position.

    Image ``i`` starts at the sum of three strides times the digits of ``i`` in the mixed radix
    (any, size_1, size_2), which covers four leading dimensions of any strides.
    """

    kind: LayoutKind
    is_aligned: bool
    channels: int
    images: int
    positions: int
    size_1: int
    size_2: int
    stride_0: int
    stride_1: int
    stride_2: int
    stride_position: int
    stride_channel: int

    @property
    def rows(self) -> int:
        """Number of rows, N."""
        return self.images * self.positions

    def geometry(self, steps_per_image: int) -> Geometry:
        """Numbers that kernels take to find rows.

        Args:
            steps_per_image: Steps of a kernel that an image takes; 0 where it counts none.
        """
        return Geometry(steps_per_image, *(getattr(self, name) for name in Geometry._fields[1:]))

    @property
    def is_matrix(self) -> bool:
        """True if a two-dimensional tensor descriptor can describe it."""
        return (
            self.kind == "rows"
            and self.is_aligned
            and self.images == 1
            and self.stride_position >= self.channels
        )


def is_address_aligned(rows: Tensor) -> bool:
    """True if the first element lies where vectors can begin."""
    return rows.data_ptr() % VECTOR_BYTES == 0


def row_layout(rows: Tensor) -> RowLayout:
    """Layout of a row view by its strides; no element is read.

    Args:
        rows: Up to four leading dimensions, any strides. [..., C]

    Returns:
        The layout with the fewest dimensions that describes it.

    Raises:
        ValueError: If more than four leading dimensions remain after joining neighbours.
    """
    return row_layout_of(rows.shape, rows.stride(), rows.element_size(), is_address_aligned(rows))


# Activations come with the same strides every step.
@lru_cache(maxsize=4096)
def row_layout_of(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    element_bytes: int,
    is_address_aligned: bool,
    channel_dim: int = -1,
) -> RowLayout:
    """Layout as of :func:`row_layout`, for a tensor that holds its channels anywhere.

    Args:
        shape: Shape of the tensor.
        strides: Strides of the tensor, in elements.
        element_bytes: Bytes of an element.
        is_address_aligned: See :func:`is_address_aligned`.
        channel_dim: Dimension of the channels; rows run over the other dimensions, in order.
    """
    if channel_dim != -1:
        shape, strides = (
            (*of[:channel_dim], *of[channel_dim + 1 :], of[channel_dim]) for of in (shape, strides)
        )
    channels = shape[-1]
    leading = _joined(shape[:-1], strides[:-1])
    if len(leading) > 4:
        raise ValueError(
            f"rows of shape {tuple(shape)} with strides {strides} have {len(leading)} separate "
            "leading dimensions; the kernels take 4: make them contiguous"
        )
    (size_0, stride_0), (size_1, stride_1), (size_2, stride_2), (positions, stride_position) = [
        (1, 0)
    ] * (4 - len(leading)) + leading
    stride_channel = strides[-1] if channels > 1 else 1
    is_small = channels * abs(stride_channel) + _MAX_BLOCK_ROWS * abs(stride_position) <= _INT32_MAX
    kind: LayoutKind = "strided"
    if len(leading) <= 2 and is_small:
        if stride_channel == 1:
            kind = "rows"
        elif stride_position == 1:
            kind = "planes"
    inner, outer_stride = (
        (positions, stride_channel) if kind == "planes" else (channels, stride_position)
    )
    vector = VECTOR_BYTES // element_bytes
    is_aligned = (
        kind != "strided"
        and is_address_aligned
        and all(extent % vector == 0 for extent in (inner, outer_stride, stride_2))
    )
    return RowLayout(
        kind=kind,
        is_aligned=is_aligned,
        channels=channels,
        images=size_0 * size_1 * size_2,
        positions=positions,
        size_1=size_1,
        size_2=size_2,
        stride_0=stride_0,
        stride_1=stride_1,
        stride_2=stride_2,
        stride_position=stride_position,
        stride_channel=stride_channel,
    )


def _joined(sizes: tuple[int, ...], strides: tuple[int, ...]) -> list[tuple[int, int]]:
    joined: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if joined and joined[-1][1] == size * stride:
            joined[-1] = (joined[-1][0] * size, stride)
        else:
            joined.append((size, stride))
    return joined
