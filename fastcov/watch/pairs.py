"""Pairs of watched tensors: the joint second moment of their rows, position by position.

A pair has one layer, whose rows are those of both tensors side by side. The blocks of its second
moment are the two tensors' own and their cross-covariance.
"""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from fastcov.rows.layout import ViewedRows, view_rows
from fastcov.rows.mask import RowMask
from fastcov.rows.view import plain_tensor
from fastcov.stats.layer import Draw, Layer
from fastcov.watch.isolation import has_modes, is_transformed, isolated
from fastcov.watch.select import Tap, gradient_name, named_tap
from fastcov.watch.steps import RunningStep

Side = int
"""0 for the first tensor of a pair, 1 for the second."""


class _Waiting(NamedTuple):
    """Rows of one side of a pair that wait for those of the other side."""

    side: Side
    draw: Draw
    rows: Tensor
    weights: Tensor | None
    sizes: torch.Size


@dataclass
class Pair:
    """Two tensors, and the layer of their rows side by side.

    Args:
        names: Names of the tensors.
        layer: Statistics of the rows of both. [N, C_0 + C_1]

    Attributes:
        channels: C_0 and C_1; zeros before the first rows.
        note: Reason why rows are missing; empty where all is well.
        is_stopped: True after :meth:`stop`.
    """

    names: tuple[str, str]
    layer: Layer
    channels: tuple[int, int] = (0, 0)
    note: str = ""
    is_stopped: bool = False
    _waiting: deque[_Waiting] = field(default_factory=deque)

    def see(self, side: Side, viewed: ViewedRows, mask: RowMask | None) -> None:
        """Call of one side, which waits for the call of the other side that is due."""
        if self.is_stopped:
            return
        tensor, layout, sizes = viewed
        if not self._waiting or self._waiting[0].side == side:
            draw = self.layer.draw(layout)
            rows = self.layer.drawn(draw, tensor, layout)
            drawn = None
            weights = None if mask is None else mask.weights_of(sizes, layout.device)
            if weights is not None:
                drawn = self.layer.drawn_weights(draw, weights)
                if self.layer.fraction is None:
                    self.layer.early.leave_out(weights)
            self._waiting.append(_Waiting(side, draw, rows, drawn, sizes))
            return
        first = self._waiting.popleft()
        if first.sizes != sizes:
            self.note = (
                f"{self.names[first.side]!r} has rows of {list(first.sizes)}, "
                f"{self.names[side]!r} of {list(sizes)}: not paired"
            )
            return
        rows = self.layer.drawn(first.draw, tensor, layout)
        sides = (first.rows, rows) if side else (rows, first.rows)
        dtype = torch.promote_types(sides[0].dtype, sides[1].dtype)
        joint = torch.cat([each.to(first.rows.device, dtype) for each in sides], 1)
        channels = (sides[0].shape[1], sides[1].shape[1])
        if self.channels not in ((0, 0), channels):
            self.stop(f"gave {channels} channels after {self.channels}: not read since then")
            return
        self.channels = channels
        self.layer.add_drawn(first.draw, joint, first.weights)

    def merge(self, other: Pair, step: int) -> None:
        """Addition of the rows of the same pair in another tracker, both decayed up to ``step``."""
        if self.channels == (0, 0):
            self.channels = other.channels
        self.layer.merge(other.layer, step)

    def stop(self, reason: str) -> None:
        """End of the reading; the note says why."""
        self.note = reason
        self.is_stopped = True
        self._waiting.clear()

    def end_step(self) -> None:
        """Removal of the calls that found no other one."""
        if self._waiting:
            missing = self.names[1 - self._waiting[0].side]
            self.note = self.note or f"no call of {missing!r} came for some of the other's"
            self._waiting.clear()

    def begin_step(self, step: int) -> None:
        """Start of a step."""
        self._waiting.clear()
        self.layer.begin_step(step)


class _Leg(NamedTuple):
    """One side of a pair, and the tap of its tensor."""

    pair: Pair
    side: Side
    tap: Tap


class Pairs(Mapping[tuple[str, str], Pair]):
    """Pairs of a tracker by the names of their tensors, and the legs that hooks read for them.

    A leg is one side of a pair. Numbers below 0 stand for the legs, as others do for the taps.

    Args:
        names: Names of each pair.
        new_layer: Function of a layer's name and number that makes the layer of a pair.
        max_channels: Tensors with more channels are not read.
    """

    def __init__(
        self,
        names: Sequence[tuple[str, str]],
        new_layer: Callable[[str, int], Layer],
        max_channels: int,
    ) -> None:
        self._pairs = {
            each: Pair(each, new_layer(pair_name(each), number))
            for number, each in enumerate(names)
        }
        self._max_channels = max_channels
        self._legs: list[_Leg] = []

    def __getitem__(self, names: tuple[str, str]) -> Pair:
        return self._pairs[names]

    def __iter__(self) -> Iterator[tuple[str, str]]:
        return iter(self._pairs)

    def __len__(self) -> int:
        return len(self._pairs)

    def layers(self) -> list[Layer]:
        """Layers of the pairs."""
        return [pair.layer for pair in self._pairs.values()]

    def add_legs(self, tap: Tap) -> list[int]:
        """Numbers of the new legs of a module's tensor, one for each pair that names the tensor."""
        legs = self._legs_of(tap)
        self._legs += legs
        return [-number for number in range(len(self._legs) - len(legs) + 1, len(self._legs) + 1)]

    def _legs_of(self, tap: Tap) -> list[_Leg]:
        pairs = [pair for pair in self._pairs.values() if tap.name in pair.names]
        return [_Leg(pair, pair.names.index(tap.name), tap) for pair in pairs]

    def begin_step(self, step: int) -> None:
        """Start of a step."""
        for pair in self._pairs.values():
            pair.begin_step(step)

    def end_step(self) -> None:
        """Removal of the calls that found no other one."""
        for pair in self._pairs.values():
            pair.end_step()

    def observe(self, leg: int, activation: Tensor, batch_dims: int, running: RunningStep) -> None:
        """Reading of one activation of a leg; arguments as of :meth:`.Watcher.observe`."""
        self._observe(self._legs[-1 - leg], activation, batch_dims, running)

    def observe_named(self, name: str, tensor: Tensor, running: RunningStep) -> None:
        """Reading of a tensor that the user's forward names, its channels last."""
        for leg in self._legs_of(named_tap(name)):
            self._observe(leg, tensor, 0, running)

    def refuse(self, leg: int, reason: str) -> None:
        """Note why an activation of a leg is not read."""
        self._legs[-1 - leg].pair.note = reason

    def fail(self, leg: int, error: Exception) -> None:
        """End of the reading of a leg's pair, after an error."""
        self._legs[-1 - leg].pair.stop(f"{type(error).__name__}: {error}")

    def _observe(
        self, leg: _Leg, activation: Tensor, batch_dims: int, running: RunningStep
    ) -> None:
        is_wrapped = is_transformed()
        try:
            with torch.no_grad(), isolated() if has_modes() else nullcontext():
                self._read(leg, activation, batch_dims, is_wrapped, running)
        except Exception as error:
            leg.pair.stop(f"not read since step {running.step}, {type(error).__name__}: {error}")
            warnings.warn(f"fastcov no longer reads {leg.pair.note}", stacklevel=4)

    def _read(
        self,
        leg: _Leg,
        activation: Tensor,
        batch_dims: int,
        is_wrapped: bool,
        running: RunningStep,
    ) -> None:
        pair, side, tap = leg
        found = plain_tensor(activation, is_wrapped)
        if isinstance(found, str):
            pair.note = f"{tap.name!r} {found}"
            return
        plain, hidden_dims = found
        viewed = view_rows(plain, tap.layout, tap.batched_rank, batch_dims + hidden_dims)
        if viewed is None:
            return
        channels = viewed.layout.channels
        if channels > self._max_channels:
            pair.note = f"{tap.name!r} has {channels} channels > max_channels={self._max_channels}"
            return
        if running.steps.is_captured:
            pair.note = "not read by replays of a CUDA graph"
            return
        pair.see(side, viewed, running.row_mask)


def check_pairs(pairs: Iterable[Sequence[str]]) -> list[tuple[str, str]]:
    """Pairs as the argument of :func:`fastcov.track` gives them.

    Raises:
        TypeError: If an entry is not two names.
        ValueError: If an entry names one tensor twice, a gradient, or a pair that is there already.

    Example:
        >>> check_pairs([["encoder", "decoder"]])
        [('encoder', 'decoder')]
    """
    checked: list[tuple[str, str]] = []
    for pair in pairs:
        is_two = isinstance(pair, (tuple, list)) and len(pair) == 2
        if not is_two or not all(isinstance(name, str) for name in pair):
            raise TypeError(f'pairs holds {pair!r}: give two names each, as [("conv1", "conv2")]')
        names = (pair[0], pair[1])
        if names[0] == names[1] or names in checked or names[::-1] in checked:
            raise ValueError(f"pairs holds {pair!r}: give two different names, each pair once")
        if any(name.endswith(gradient_name("")) for name in names):
            raise ValueError(f"pairs holds {pair!r}: gradients are not paired")
        checked.append(names)
    return checked


def pair_name(names: tuple[str, str]) -> str:
    """Name under which a pair is saved.

    Example:
        >>> pair_name(("conv1", "conv2"))
        'conv1 x conv2'
    """
    return " x ".join(names)


def linear_cka(covariance: Tensor, channels: int) -> float:
    r"""Linear centred kernel alignment of two tensors (Kornblith et al. 2019, arXiv 1905.00414).

    .. math:: \|C_{ab}\|_F^2 / (\|C_{aa}\|_F \|C_{bb}\|_F)

    Args:
        covariance: Covariance of both tensors' rows side by side. [C_a + C_b, C_a + C_b]
        channels: C_a.

    Returns:
        A number in [0, 1]; NaN where one of both is constant.
    """
    own, other = covariance[:channels, :channels], covariance[channels:, channels:]
    cross = covariance[:channels, channels:]
    return float(cross.square().sum() / (own.norm() * other.norm()))
