"""Rows of a layer's first step, kept until the share of the rows to read is known."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

import torch
from torch import Tensor

_KEPT_SHARE = 1 / 64  # of a call's rows


@dataclass
class EarlyCall:
    """Rows of one call: all of them, or a sample.

    Attributes:
        rows: The rows. [..., C]
        offered: Rows that the call offered.
        is_whole: True if ``rows`` are all of them.
        weights: Weights of the rows, where they differ. [N]
    """

    rows: Tensor
    offered: int
    is_whole: bool
    weights: Tensor | None = None


class EarlyRows:
    """Calls of a first step, in their order.

    Attributes:
        calls: The calls.
        left_out: Rows of weight 0 that the calls offered.
    """

    def __init__(self) -> None:
        self.calls: list[EarlyCall] = []
        self.left_out = 0

    def limit(self, offered: int, channels: int, capacity: int) -> int:
        """Most rows to keep of the next call: the room of a buffer, and a share at least."""
        kept = sum(call.rows.numel() for call in self.calls) // channels
        return max(capacity - kept, ceil(offered * _KEPT_SHARE))

    def leave_out(self, weights: Tensor) -> None:
        """Addition of the rows of weight 0 to :attr:`left_out`; waits for a GPU."""
        self.left_out += int((weights == 0).sum())

    def take(self) -> list[EarlyCall]:
        """Removal and return of all calls."""
        taken, self.calls = self.calls, []
        return taken

    def to(self, device: torch.device) -> None:
        """Move of the rows, which a first step that an exception has ended may have left."""
        for call in self.calls:
            call.rows = call.rows.to(device)
            call.weights = None if call.weights is None else call.weights.to(device)
