"""Masks of rows: which positions of a step are read, and the weight of each.

A mask has the leading sizes of the activations that it is for: ``[B]``, ``[B, T]``, ``[B, H, W]``.

=========  =====================================================================================
Dtype      Meaning
=========  =====================================================================================
bool       rows are read where it is true
integer    rows are read where it is not 0; positions of one image with the same number are one
           sequence, so that several sequences may be packed into one row of the batch
floating   weights of the rows; those of weight 0 are not read
=========  =====================================================================================
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastcov.rows.view import MOST_DIMS

_COPIED_AT_ONCE = 1 << 21  # numbers


def as_mask(value: object) -> Tensor:
    """Value as a mask of rows.

    Raises:
        TypeError: If the value is no plain tensor.
        ValueError: If the value is a tensor of another shape or kind than masks have.

    Example:
        >>> as_mask(torch.ones(2, 3, dtype=torch.bool)).shape
        torch.Size([2, 3])
    """
    if not isinstance(value, Tensor):
        raise TypeError(
            f"the mask is a {type(value).__name__}, expected a tensor: [B], [B, T] or [B, H, W]"
        )
    if problem := _problem(value):
        raise ValueError(problem)
    return value


def _problem(mask: Tensor) -> str:
    if type(mask) is not Tensor:
        return f"the mask is a {type(mask).__name__}, expected a plain tensor"
    if torch._C._functorch.is_functorch_wrapped_tensor(mask):
        return "the mask is wrapped by a transform of torch.func: take rows without a mask there"
    if mask.layout is not torch.strided or mask.is_nested or mask.is_meta or mask.is_complex():
        return "the mask is complex, sparse, nested or on the meta device: give a dense one"
    if not 1 <= mask.dim() < MOST_DIMS:
        return (
            f"the mask has shape {list(mask.shape)}, expected [B], [B, T] or [B, H, W]: for an "
            "attention mask of queries and keys, give a function that returns one value a position"
        )
    return ""


def spread(weights: Tensor, sizes: torch.Size) -> Tensor | None:
    """Weights of rows, from those of the positions that their leading sizes name.

    Args:
        weights: One weight for each index of the leading sizes. [B], [B, T] or [B, H, W]
        sizes: Sizes of a row view without its channels. [B, ...]

    Returns:
        View of the weights; None where the leading sizes differ. [B, ...]

    Example:
        >>> spread(torch.tensor([1.0, 0.0]), torch.Size((2, 3))).tolist()
        [[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    """
    dims = weights.dim()
    if sizes[:dims] != weights.shape:
        return None
    return weights[(...,) + (None,) * (len(sizes) - dims)].expand(sizes)


class WeightedRows(NamedTuple):
    """Rows to add, and their weights.

    Attributes:
        rows: Rows, last dimension channels. [..., C]
        weights: One weight a row; None where all weigh the same. [N]
        scale: Factor on every row's weight.
    """

    rows: Tensor
    weights: Tensor | None
    scale: float


def weighted_parts(rows: Tensor, weights: Tensor) -> Iterator[WeightedRows]:
    """Parts of rows that are to be added one after the other, in the cheapest form.

    On a CPU the rows of a weight above 0 are copied, a few MB at a time: without weights they are
    added in a third of the time, and rows that are left out take none. On a GPU nothing is copied:
    the host would wait for the number of such rows.

    Args:
        rows: Any strides. [B, ..., C]
        weights: One weight a row, none below 0. [B, ...]

    Example:
        >>> rows, weights = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([2.0, 0.0, 2.0])
        >>> [(part.rows.tolist(), part.scale) for part in weighted_parts(rows, weights)]
        [([[1.0], [3.0]], 2.0)]
    """
    if not rows.is_cpu:
        yield WeightedRows(rows, weights.reshape(-1), 1.0)
        return
    images = max(1, _COPIED_AT_ONCE * len(rows) // max(1, rows.numel()))
    for first in range(0, len(rows), images):
        part, some = rows[first : first + images], weights[first : first + images]
        is_read = some > 0
        kept = some[is_read]
        if len(kept) == 0:
            continue
        if len(kept) < some.numel():
            part = part[is_read]
        if bool((kept == kept[0]).all()):
            yield WeightedRows(part, None, float(kept[0]))
        else:
            yield WeightedRows(part, kept, 1.0)


class RowMask:
    """Mask of one step.

    Args:
        mask: From :func:`as_mask`. [B], [B, T] or [B, H, W]
        is_per_image: True if every image, or every sequence that an integer mask numbers, weighs 1
            in a step: the mask's weights are then shares of this 1. A mask [B] has one weight an
            image, which stays.

    Raises:
        ValueError: If a weight on a CPU is negative or not finite.
    """

    def __init__(self, mask: Tensor, is_per_image: bool) -> None:
        self.shape = mask.shape
        self._spread: dict[tuple[torch.Size, torch.device], Tensor | None] = {}
        with torch.no_grad():
            mask = mask.detach()
            weights = mask.float() if mask.is_floating_point() else (mask != 0).float()
            # A GPU is not waited for: there such rows are skipped and counted.
            if weights.is_cpu and not bool((weights.isfinite() & (weights >= 0)).all()):
                raise ValueError(
                    "the mask holds a weight that is negative or not finite: give rows that are "
                    "not to be read the weight 0"
                )
            if is_per_image and mask.dim() > 1 and mask.numel():
                weights = weights * _factors(mask, weights)
        self._weights = weights

    def weights_of(self, sizes: torch.Size, device: torch.device) -> Tensor | None:
        """Weights of rows, float32, a view [B, ...]; None where the mask does not fit them.

        The sizes are those of the row view without its channels. Weights of an image's positions
        sum up to their number where each image weighs 1.
        """
        key = (sizes, device)
        if key not in self._spread:
            with torch.no_grad():
                self._spread[key] = spread(self._weights.to(device, non_blocking=True), sizes)
        return self._spread[key]


def _factors(mask: Tensor, weights: Tensor) -> Tensor:
    """Factors by which the weights of each sequence sum up to the positions of an image."""
    flat = weights.flatten(1)
    positions = flat.shape[1]
    is_counted = torch.isfinite(flat) & (flat > 0)
    counted = torch.where(is_counted, flat, 0.0)
    if mask.is_floating_point() or mask.dtype is torch.bool:
        totals = counted.sum(1, keepdim=True)
    else:
        totals = _sizes(mask.flatten(1)).to(counted)
    return torch.where(is_counted, positions / totals.clamp(min=1e-30), 1.0).view_as(weights)


def _sizes(numbers: Tensor) -> Tensor:
    """Number of positions of the image with the same number; nothing waits for a GPU."""
    ordered, order = numbers.sort(dim=1)
    is_new = torch.zeros_like(ordered, dtype=torch.int64)
    is_new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    group = is_new.cumsum(1)
    sizes = torch.zeros_like(group).scatter_add_(1, group, torch.ones_like(group))
    return torch.empty_like(group).scatter_(1, order, sizes.gather(1, group))
