"""CovarianceState: the running second moment of one layer, in tensors that declare themselves.

Sums over rows are additive only about one shift, so merging first translates both states to a
common one (Chan, Golub, LeVeque 1983: parallel updating of variances).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any, Literal, NamedTuple, get_type_hints

import torch
from torch import Tensor

from fastcov.ops.covariance import accumulate_, covariance_of


class Declared(NamedTuple):
    """Declaration of one tensor of a state: its size, and how it is combined.

    Attributes:
        shape: Sizes; "C" stands for the number of channels.
        dtype: Of the values.
        reduction: How the tensors of two states about one shift become one: "sum", or "common",
            where both hold the same.
        power: A factor f on every row's weight is a factor f**power on this tensor.
        is_lower: Whether the lower half alone is valid.
    """

    shape: tuple[int | Literal["C"], ...]
    dtype: torch.dtype = torch.float64
    reduction: Literal["sum", "common"] = "sum"
    power: int = 1
    is_lower: bool = False

    def zeros(self, channels: int, device: torch.device | str | None) -> Tensor:
        """Tensor of a state that has seen no row."""
        sizes = [channels if size == "C" else size for size in self.shape]
        return torch.zeros(sizes, dtype=self.dtype, device=device)


class StateTensors(
    NamedTuple(
        "StateTensors",
        [
            ("moment", Annotated[Tensor, Declared(("C", "C"), is_lower=True)]),
            ("sum", Annotated[Tensor, Declared(("C",))]),
            ("shift", Annotated[Tensor, Declared(("C",), reduction="common", power=0)]),
            ("weight", Annotated[Tensor, Declared(())]),
            ("count", Annotated[Tensor, Declared((2,), torch.int64, power=0)]),
            ("excess", Annotated[Tensor, Declared((), power=2)]),
        ],
    )
):
    """Tensors of a running second moment; operators take the first five in this order.

    Attributes:
        moment: Weighted second moment of the shifted rows. [C, C]
        sum: Weighted sum of the shifted rows. [C]
        shift: Fixed by the first finite rows. [C]
        weight: Sum of the rows' weights: the divisor. []
        count: Rows read and rows skipped as non-finite. [2]
        excess: Sum of the squared weights less the sum of the weights: rows of weight 1 leave it
            alone, so following it costs them nothing. []
    """

    __slots__ = ()


DECLARED: dict[str, Declared] = {
    name: hint.__metadata__[0]
    for name, hint in get_type_hints(StateTensors, include_extras=True).items()
}
"""Declarations of a state's tensors by name, in the order of :class:`StateTensors`."""


class CovarianceState:
    """Running second moment of feature rows about a fixed shift.

    Args:
        channels: Length of a row, C.
        device: Where the tensors live.

    Attributes:
        tensors: All that the state holds; its fields are attributes of the state too.

    Example:
        >>> state = CovarianceState(2)
        >>> state.update(torch.tensor([[1.0, 2.0], [3.0, 2.0]]))
        >>> state.mean()
        tensor([2., 2.], dtype=torch.float64)
    """

    def __init__(self, channels: int, device: torch.device | str | None = None) -> None:
        # Tensors made under inference_mode could not be updated in training later.
        with torch.inference_mode(False):
            self.tensors = StateTensors._make(
                declared.zeros(channels, device) for declared in DECLARED.values()
            )

    @property
    def moment(self) -> Tensor:
        """Weighted second moment of the shifted rows, float64, lower half valid. [C, C]"""
        return self.tensors.moment

    @property
    def sum(self) -> Tensor:
        """Weighted sum of the shifted rows, float64. [C]"""
        return self.tensors.sum

    @property
    def shift(self) -> Tensor:
        """Vector subtracted from every row, fixed by the first finite rows, float64. [C]"""
        return self.tensors.shift

    @property
    def weight(self) -> Tensor:
        """Sum of the rows' weights, float64: the divisor. []"""
        return self.tensors.weight

    @property
    def count(self) -> Tensor:
        """Rows read and rows skipped as non-finite, int64. [2]"""
        return self.tensors.count

    @property
    def excess(self) -> Tensor:
        """Sum of the squared weights less the sum of the weights, float64. []"""
        return self.tensors.excess

    @property
    def channels(self) -> int:
        """Length of a row."""
        return len(self.tensors.sum)

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

    def covariance(self, centered: bool = False) -> Tensor:
        """Symmetric matrix of the rows seen so far. [C, C]"""
        return covariance_of(self, centered)

    def mean(self) -> Tensor:
        """Mean of the rows seen so far. [C]"""
        return self.sum / self.weight + self.shift

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
            rows: Rows that the operator adds; with ``row_weight``, channels last. [..., C]
            row_weight: Weights that the operator is given. [N]
            row_scale: Factor on every row's weight that the operator is given.
            decay: Factor on the state that the operator is given.
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
        moment, sum = _about(self.tensors, shift)
        self.moment.copy_(moment)
        self.sum.copy_(sum)
        self.shift.copy_(shift)

    def scale_(self, factor: float) -> None:
        """Multiplies every row's weight."""
        weight = self.weight.clone()
        for tensor, declared in zip(self.tensors, DECLARED.values(), strict=True):
            if declared.power:
                tensor.mul_(factor**declared.power)
        self.excess.add_(weight, alpha=factor**2 - factor)

    def merge(self, other: CovarianceState, scale: float = 1.0) -> None:
        """Adds what another state has seen, leaving that state as it is.

        Args:
            other: State of as many channels; its tensors are moved to this state's device if need
                be.
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
        added = StateTensors._make(tensor.to(device) for tensor in other.tensors)
        # An empty state takes the other's shift, without a host synchronisation. The other's sums
        # are then expressed about the common shift, in tensors of their own.
        self.shift.copy_(torch.where(self.count[0] == 0, added.shift, self.shift))
        moment, sum = _about(added, self.shift)
        added = added._replace(moment=moment, sum=sum)
        for declared, own, part in zip(DECLARED.values(), self.tensors, added, strict=True):
            if declared.reduction == "sum":
                own.add_(part * scale**declared.power if declared.power else part)
        self.excess.add_(added.weight, alpha=scale**2 - scale)

    def reset(self) -> None:
        """Forgets every row."""
        for tensor in self.tensors:
            tensor.zero_()

    def to(self, device: torch.device | str) -> CovarianceState:
        """Moves the tensors, in place."""
        self.tensors = StateTensors._make(tensor.to(device) for tensor in self.tensors)
        return self

    def copy(self) -> CovarianceState:
        """State of its own with the same content."""
        twin = CovarianceState.__new__(CovarianceState)
        with torch.inference_mode(False):
            twin.tensors = StateTensors._make(tensor.clone() for tensor in self.tensors)
        return twin

    def state_dict(self) -> dict[str, Tensor]:
        """Copies of the tensors, by name."""
        return {name: tensor.clone() for name, tensor in self.tensors._asdict().items()}

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
        for name, own in self.tensors._asdict().items():
            if name not in state_dict:
                raise KeyError(f"state has no tensor {name!r}; it holds {sorted(state_dict)}")
            tensor = state_dict[name]
            if tensor.shape != own.shape:
                raise ValueError(
                    f"{name} has shape {tuple(tensor.shape)}, expected {tuple(own.shape)}: "
                    "the file belongs to a layer of another width"
                )
            own.copy_(tensor)


def _about(tensors: StateTensors, shift: Tensor) -> tuple[Tensor, Tensor]:
    # Second moment and sum about another shift: new tensors, the given ones stay as they are.
    step = tensors.shift - shift
    outer = torch.outer(step, tensors.sum)
    moment = tensors.moment + outer + outer.T + tensors.weight * torch.outer(step, step)
    return moment, tensors.sum + tensors.weight * step
