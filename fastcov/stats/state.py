"""CovarianceState: the running second moment of one layer, with declared reductions.

Sums over rows are additive only about one shift, so merging and syncing first translate every
state to a common one (Chan, Golub, LeVeque 1983: parallel updating of variances).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fastcov.ops.covariance import Moments, accumulate_

REDUCTIONS = {
    "count": "sum",
    "weight": "sum",
    "excess": "sum",
    "sum": "sum",
    "moment": "sum",
    "shift": "common",  # translated to one value before the others are added
}
"""Every tensor of a state and how two states' values combine."""


class CovarianceState(Moments):
    """Running second moment of feature rows about a fixed shift.

    Args:
        channels: Length of a row, C.
        device: Where the tensors live.

    Attributes:
        count: Rows read and rows skipped as non-finite, int64. [2]
        weight: Sum of the rows' weights, float64: the divisor. []
        excess: Sum of the squared weights less the sum of the weights, float64: rows of weight 1
            leave it alone, so following it costs them nothing. []
        sum: Weighted sum of the shifted rows, float64. [C]
        moment: Weighted second moment of the shifted rows, float64, lower half valid. [C, C]
        shift: Fixed by the first finite rows, float64. [C]

    Example:
        >>> state = CovarianceState(2)
        >>> state.update(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> state.mean()
        tensor([2., 2.], dtype=torch.float64)
    """

    def __init__(self, channels: int, device: torch.device | str | None = None) -> None:
        super().__init__(channels, device)
        with torch.inference_mode(False):
            self.excess = torch.zeros((), dtype=torch.float64, device=device)

    @property
    def channels(self) -> int:
        """Length of a row."""
        return len(self.sum)

    @property
    def squared_weight(self) -> Tensor:
        """Sum of the rows' squared weights; decay d multiplies what was there by d^2. []"""
        return self.weight + self.excess

    @property
    def effective_count(self) -> Tensor:
        r"""Rows of equal weight that would say as much: their number where all weigh the same.

        .. math:: \Bigl(\sum_r w_r\Bigr)^2 / \sum_r w_r^2

        float64; NaN where no row was seen. []
        """
        return self.weight**2 / self.squared_weight

    def update(
        self,
        rows: Tensor,
        row_weight: Tensor | None = None,
        *,
        row_scale: float = 1.0,
        decay: float = 1.0,
    ) -> None:
        """Adds rows; see :func:`fastcov.ops.accumulate_`."""
        if row_weight is None and row_scale == 1.0 and decay == 1.0:
            accumulate_(self, rows)
            return
        with self.weighing(rows, row_weight, row_scale, decay):
            accumulate_(self, rows, row_weight, row_scale=row_scale, decay=decay)

    @contextmanager
    def weighing(
        self, rows: Tensor, row_weight: Tensor | None, row_scale: float, decay: float
    ) -> Iterator[None]:
        """Follows the squared weights through one call of an operator that adds rows.

        Needed where some row may weigh other than 1, or decay is applied. No host synchronisation.

        Args:
            rows: What is added. With ``row_weight`` channels are last. [..., C]
            row_weight: Likewise. [N]
            row_scale: Likewise.
            decay: Likewise.
        """
        before = self.weight * decay
        yield
        if decay != 1.0:
            # Squares carry d^2: d^2 (excess + weight) - d weight, of what was there before.
            self.excess.mul_(decay**2).add_(before, alpha=decay - 1)
        if row_weight is None:
            self.excess.add_(self.weight - before, alpha=row_scale - 1)
        else:
            is_read = torch.isfinite(rows.detach()).all(-1).flatten()
            weights = torch.where(is_read, row_weight.double() * row_scale, 0.0)
            self.excess.add_((weights * (weights - 1)).sum())

    def translate_(self, shift: Tensor) -> None:
        """Expresses the sums about another shift. [C]"""
        step = self.shift - shift
        outer = torch.outer(step, self.sum)
        self.moment += outer + outer.T + self.weight * torch.outer(step, step)
        self.sum += self.weight * step
        self.shift.copy_(shift)

    def scale_(self, factor: float) -> None:
        """Multiplies every row's weight."""
        self.excess.mul_(factor**2).add_(self.weight, alpha=factor**2 - factor)
        for tensor in (self.weight, self.sum, self.moment):
            tensor *= factor

    def merge(self, other: CovarianceState, scale: float = 1.0) -> None:
        """Adds what another state has seen, leaving that state as it is.

        Args:
            other: Same number of channels; moved to this state's device if need be.
            scale: Factor on the other's weights.

        Raises:
            ValueError: If the numbers of channels differ.
        """
        if other.channels != self.channels:
            raise ValueError(
                f"cannot merge a state of {other.channels} channels into one of {self.channels}: "
                "merge states of the same layer"
            )
        device = self.moment.device
        # Sync-free: an empty state takes the other's shift. The other's sums are then expressed
        # about that shift without touching the other.
        shift = torch.where(self.count[0] == 0, other.shift.to(device), self.shift)
        self.shift.copy_(shift)
        step = other.shift.to(device) - shift
        sum, weight = other.sum.to(device), other.weight.to(device)
        outer = torch.outer(step, sum)
        moment = other.moment.to(device) + outer + outer.T + weight * torch.outer(step, step)
        self.moment.add_(moment, alpha=scale)
        self.sum.add_(sum + weight * step, alpha=scale)
        self.excess.add_(other.excess.to(device), alpha=scale**2)
        self.excess.add_(weight, alpha=scale**2 - scale)
        self.weight.add_(weight, alpha=scale)
        self.count += other.count.to(device)

    def reset(self) -> None:
        """Forgets every row."""
        for name in REDUCTIONS:
            getattr(self, name).zero_()

    def to(self, device: torch.device | str) -> CovarianceState:
        """Moves the tensors, in place."""
        for name in REDUCTIONS:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def copy(self) -> CovarianceState:
        """An independent state with the same content."""
        twin = CovarianceState(self.channels, self.moment.device)
        for name in REDUCTIONS:
            getattr(twin, name).copy_(getattr(self, name))
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors, by name."""
        return {name: getattr(self, name).clone() for name in REDUCTIONS}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores :meth:`state_dict`.

        One that an older version saved has no ``excess``: its rows count as equal, so that
        :attr:`effective_count` is ``count[0]``.

        Raises:
            KeyError: If another tensor is missing.
            ValueError: If a shape differs.
        """
        if "excess" not in state_dict and {"weight", "count"} <= state_dict.keys():
            weight, count = state_dict["weight"], state_dict["count"]
            excess = weight**2 / count[0].clamp(min=1) - weight
            state_dict = {**state_dict, "excess": excess}
        for name in REDUCTIONS:
            if name not in state_dict:
                raise KeyError(f"state has no tensor {name!r}; it holds {sorted(state_dict)}")
            tensor, own = state_dict[name], getattr(self, name)
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}: "
                    "the file belongs to a layer of another width"
                )
            own.copy_(tensor)


def sync_states(
    states: Sequence[CovarianceState], group: dist.ProcessGroup | None = None
) -> list[CovarianceState]:
    """Merges the states of all ranks: two collectives, whatever the number of layers.

    Args:
        states: One a layer, in the same order on every rank, on one device.
        group: Process group; None is the default group.

    Returns:
        New states, equal on every rank; the given ones stay as they are.
    """
    if not states:
        return []
    device = states[0].moment.device
    merged = [state.copy() for state in states]
    seen = torch.stack([(state.count[0] > 0).double() for state in merged])
    local = torch.cat([seen, *(state.shift for state in merged)])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    start = len(merged)
    for layer, state in enumerate(merged):
        stop = start + state.channels
        # The first rank that has seen a row lends its shift.
        shift = torch.zeros_like(state.shift)
        for rank in reversed(gathered):
            shift = torch.where(rank[layer] > 0, rank[start:stop], shift)
        state.translate_(shift)
        start = stop
    tril = [torch.tril_indices(s.channels, s.channels, device=device) for s in merged]
    flat = torch.cat(
        [
            torch.cat(
                [s.count.double(), s.weight[None], s.excess[None], s.sum, s.moment[i[0], i[1]]]
            )
            for s, i in zip(merged, tril, strict=True)
        ]
    )
    dist.all_reduce(flat, group=group)
    start = 0
    for state, index in zip(merged, tril, strict=True):
        size = 4 + state.channels + index.shape[1]
        part = flat[start : start + size]
        state.count.copy_(part[:2].round().long())
        state.weight.copy_(part[2])
        state.excess.copy_(part[3])
        state.sum.copy_(part[4 : 4 + state.channels])
        state.moment[index[0], index[1]] = part[4 + state.channels :]
        start += size
    return merged


def sync_named_states(
    states: Mapping[str, CovarianceState | None], group: dist.ProcessGroup | None = None
) -> dict[str, CovarianceState]:
    """Merges named states of all ranks; a rank may have seen no row of some of them.

    Args:
        states: By layer, in the same order on every rank; None where this rank has none.
        group: Process group; None is the default group.

    Returns:
        New states of the layers of which some rank has seen a row, equal on every rank.

    Raises:
        RuntimeError: On every rank, if names or widths differ between ranks.
    """
    own = {name: 0 if state is None else state.channels for name, state in states.items()}
    gathered: list[dict[str, int]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, own, group=group)
    widths = {name: max(rank.get(name, 0) for rank in gathered) for name in own}
    for rank, found in enumerate(gathered):
        if list(found) != list(own) or any(found[n] not in (0, widths[n]) for n in own):
            raise RuntimeError(
                f"rank {rank} tracks other layers or widths than this rank: track the same model "
                "with the same arguments on every rank"
            )
    is_nccl = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
    names = [name for name, width in widths.items() if width]
    local = []
    for name in names:
        state = states[name]
        empty = CovarianceState(widths[name], device)
        local.append(empty if state is None else state.copy().to(device))
    merged = zip(names, sync_states(local, group), strict=True)
    return {name: state for name, state in merged if int(state.count[0]) > 0}
