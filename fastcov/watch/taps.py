"""Watched taps of a tracker: the layer that each feeds, and remarks on those that are not read."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.rows.layout import ActivationLayout, ViewedRows, view_rows
from fastcov.rows.mask import RowMask
from fastcov.rows.view import plain_tensor
from fastcov.stats.layer import Layer
from fastcov.stats.route import Routes
from fastcov.watch.coverage import module_note
from fastcov.watch.layers import is_sharded
from fastcov.watch.select import Tap
from fastcov.watch.sharing import Following, Order, SharedInputs
from fastcov.watch.steps import RunningStep

NO_MODULE = nn.Module()
"""Module of tensors that have none, named ones and gradients: no route asks for it."""


class WatchedTap:
    """One tap, its number, its module, and its routes to a layer, read until it is given up.

    A copy has neither module nor layouts.
    """

    def __init__(
        self, number: int, tap: Tap, module: Callable[[], nn.Module | None], routes: Routes
    ) -> None:
        self.number = number
        self.tap = tap
        self.module = module
        self.routes = routes
        self.is_given_up = False

    def __getstate__(self) -> tuple[int, Tap, Layer, bool]:
        return self.number, self.tap, self.routes.layer, self.is_given_up

    def __setstate__(self, state: tuple[int, Tap, Layer, bool]) -> None:
        self.number, self.tap, layer, self.is_given_up = state
        self.module, self.routes = no_module, Routes(layer)


class Taps:
    """Watched taps by number, and the layers that they feed, one or several taps a layer.

    Args:
        new_layer: Function of a name and a number that makes a layer.
        max_channels: Wider tensors are skipped, and listed in ``notes``.

    Attributes:
        layers: Layer of each tap, by name.
        notes: Remarks on single layers, by name.
        unique_layers: Layers in the model's order, shared ones once.
        forward_layers: Layers of activations.
        gradient_layers: Layers of gradients.
        inputs: Record of the inputs that taps have seen.
    """

    def __init__(self, new_layer: Callable[[str, int], Layer], max_channels: int) -> None:
        self.layers: dict[str, Layer] = {}
        self.notes: dict[str, str] = {}
        self.unique_layers: list[Layer] = []
        self.forward_layers: list[Layer] = []
        self.gradient_layers: list[Layer] = []
        self.inputs = SharedInputs()
        self._new_layer = new_layer
        self.max_channels = max_channels
        self._watched: list[WatchedTap] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": SharedInputs()}

    def __getitem__(self, number: int) -> WatchedTap:
        return self._watched[number]

    def __len__(self) -> int:
        return len(self._watched)

    def __iter__(self) -> Iterator[WatchedTap]:
        return iter(self._watched)

    def add(self, tap: Tap, module: Callable[[], nn.Module | None]) -> WatchedTap:
        """New tap that feeds a new layer."""
        layer = self._new_layer(tap.name, len(self))
        watched = WatchedTap(len(self), tap, module, Routes(layer))
        self._watched.append(watched)
        self.layers[tap.name] = layer
        self.unique_layers.append(layer)
        (self.gradient_layers if tap.is_gradient else self.forward_layers).append(layer)
        return watched

    def names(self) -> list[str]:
        """Names of the watched tensors, in the model's order."""
        return [each.tap.name for each in self._watched]

    def read(
        self,
        watched: WatchedTap,
        activation: Tensor,
        batch_dims: int,
        is_wrapped: bool,
        module: nn.Module | None,
        args: Any,
        running: RunningStep,
    ) -> None:
        """Reading of an activation the whole way, by no known layout.

        Args:
            watched: Tap of the activation.
            activation: A tensor that the module returned or was given.
            batch_dims: Dimensions in front that torch.vmap has hidden from the module.
            is_wrapped: True if transforms of torch.func may have wrapped the activation.
            module: The module, in eager mode; None in compiled code.
            args: Arguments of the module's forward.
            running: Step that is read.
        """
        if watched.is_given_up or not activation.is_floating_point():
            return
        found = plain_tensor(activation, is_wrapped)
        if isinstance(found, str):
            self.notes[watched.tap.name] = found
            return
        plain, hidden_dims = found
        batch_dims += hidden_dims
        viewed = self._view(watched, plain, batch_dims)
        if viewed is None:
            return
        layout = viewed.layout
        if watched.tap.position == "input":
            # Compiled code (no module) reuses memory behind the same tensor object: never shared.
            order = None if module is None or batch_dims else layout.order
            if not self._join_or_part(watched, activation, order, running):
                return
        if running.steps.is_captured and running.leave_out(watched.routes.layer, layout):
            return
        is_plain = plain is activation and module is not None
        self._read_rows(
            watched,
            viewed,
            running.row_mask,
            is_kept=is_plain and not running.steps.is_captured,
            module=module if is_plain and layout.key is not None else None,
            args=args,
        )

    def read_gradient(
        self, watched: WatchedTap, plain: Tensor, mask: RowMask | None, is_kept: bool
    ) -> None:
        """Reading of a gradient, a dense tensor, by no known layout."""
        viewed = self._view(watched, plain, 0)
        if viewed is not None:
            self._read_rows(watched, viewed, mask, is_kept)

    def _read_rows(
        self,
        watched: WatchedTap,
        viewed: ViewedRows,
        mask: RowMask | None,
        is_kept: bool,
        module: nn.Module | None = None,
        args: Any = (),
    ) -> None:
        if self._check_width(watched.routes.layer, viewed.layout):
            weights = self.weights_of(watched, viewed.sizes, viewed.layout.device, mask)
            watched.routes.read(viewed, weights, is_kept=is_kept, module=module, args=args)

    def _view(self, watched: WatchedTap, plain: Tensor, batch_dims: int) -> ViewedRows | None:
        """View of a tensor; None where the tensor has no rows, or the tap cannot read them."""
        tap = watched.tap
        viewed = view_rows(plain, tap.layout, tap.batched_rank, batch_dims)
        if viewed is None:
            return None
        channels = viewed.layout.channels
        if channels > self.max_channels:
            self.skip_wide(tap.name, channels)
            return None
        if tap.channels not in (None, channels) and is_sharded(watched.module()):
            self.notes[tap.name] = (
                f"has {channels} of {tap.channels} channels on this rank (tensor parallel): "
                "not read"
            )
            return None
        return viewed

    def _check_width(self, layer: Layer, layout: ActivationLayout) -> bool:
        """False, and the layer is given up, where the channels differ from earlier ones."""
        if layer.state is None or layer.state.channels == layout.channels:
            return True
        reason = f"gave {layout.channels} channels after {layer.state.channels}"
        self.give_up(layer, f"{reason}: not read since then")
        return False

    def weights_of(
        self, watched: WatchedTap, sizes: torch.Size, device: torch.device, mask: RowMask | None
    ) -> Tensor | None:
        """Weights of a tap's rows by a mask; None where all weigh the same. [B, ...]"""
        if mask is None:
            return None
        weights = mask.weights_of(sizes, device)
        if weights is None:
            reason = f"ignores the mask: {list(mask.shape)} fits no rows of {list(sizes)}"
            self.notes.setdefault(watched.tap.name, reason)
        return weights

    def skip_wide(self, name: str, channels: int) -> None:
        """Note that a tensor has too many channels."""
        self.notes[name] = f"skipped: {channels} channels > max_channels={self.max_channels}"

    def fail(self, layer: Layer, error: Exception, step: int) -> None:
        """End of the reading of a layer after an error, with a warning."""
        message = f"{type(error).__name__}: {error}"
        self.give_up(layer, f"not read since step {step}, {message}")
        warnings.warn(f"fastcov no longer reads layer {layer.name!r}: {message}", stacklevel=4)

    def give_up(self, layer: Layer, reason: str) -> None:
        """End of the reading of a layer: its taps take no more calls."""
        for watched in self._watched:
            if watched.routes.layer is layer:
                watched.is_given_up = True
                watched.routes.close()
                self.notes[watched.tap.name] = reason

    def note_left_out(self, reasons: Mapping[Layer, str]) -> None:
        """Note why replays of a CUDA graph do not read some layers."""
        for watched in self._watched:
            if watched.routes.layer in reasons and not watched.is_given_up:
                reason = reasons[watched.routes.layer]
                self.notes[watched.tap.name] = f"not read by replays of a CUDA graph: {reason}"

    def note(self, name: str, root: nn.Module | None) -> str:
        """Remark on a watched or skipped layer, by name; empty where all is well."""
        found = self.notes.get(name, "")
        for watched in self._watched:
            if watched.tap.name == name and watched.tap.position != "named":
                found = found or module_note(root, watched.tap.module_name, watched.module())
        return found

    def _join_or_part(
        self, watched: WatchedTap, tensor: Tensor, order: Order, running: RunningStep
    ) -> bool:
        # Makes the tap share a layer, or no longer. False where another tap has read the rows.
        # Without an order it shares with nobody.
        number = watched.number
        role = self.inputs.see(number, tensor, order, watched.routes.layer.total_calls > 0)
        if role == "splits":
            self._split(watched, running.step)
        elif role == "shares":
            assert order is not None
            owner = self.inputs.owner[number]
            self._assign(watched, self._watched[owner].routes.layer)
            watched.routes.follow(Following(self.inputs, number, owner, order))
        return role != "shares"

    def end_step(self, running: RunningStep) -> None:
        """End of the sharing of taps that have seen other tensors than their layer's own tap."""
        for number in self.inputs.split_diverged():
            if not self._watched[number].is_given_up:
                self._split(self._watched[number], running.step)
        for number in self.inputs.end_step():
            if not self.inputs.is_noted(number):
                # Drops Leading: no tap asks for this one's tensors.
                self._watched[number].routes.reconsider()

    def _split(self, watched: WatchedTap, step: int) -> None:
        shared = watched.routes.layer
        layer = self._new_layer(watched.tap.name, watched.number)
        layer.begin_step(step)
        self._assign(watched, layer)
        self.notes[watched.tap.name] = (
            f"rows of its own since step {step}; shared those of {shared.name} before"
        )

    def _assign(self, watched: WatchedTap, layer: Layer) -> None:
        watched.routes.assign(layer)
        if self.layers[watched.tap.name] is not layer:
            self.layers[watched.tap.name] = layer
            self._list_layers()

    def _list_layers(self) -> None:
        self.unique_layers = list(dict.fromkeys(self.layers.values()))
        gradients = {each.routes.layer for each in self._watched if each.tap.is_gradient}
        self.gradient_layers = [each for each in self.unique_layers if each in gradients]
        self.forward_layers = [each for each in self.unique_layers if each not in gradients]

    def shared(self) -> dict[str, str]:
        """Name of the layer that a following tap shares, by the tap's name."""
        return {name: layer.name for name, layer in self.layers.items() if name != layer.name}

    def load(
        self, layers: Mapping[str, dict[str, Any]], shared: Mapping[str, str], with_rows: bool
    ) -> None:
        """Return to saved layers, shared as they were, and by no other taps.

        Args:
            layers: Results of :meth:`fastcov.stats.layer.Layer.state_dict`, by name.
            shared: Result of :meth:`shared`.
            with_rows: False to take the plans alone.
        """
        self._share(shared)
        for name, saved in layers.items():
            self.layers[name].load_state_dict(saved, with_rows)
        for watched in self._watched:
            if watched.routes.layer.total_calls:
                self.inputs.settle(watched.number)

    def _share(self, shared: Mapping[str, str]) -> None:
        self.inputs.owner.clear()
        for watched in self._watched:
            if watched.routes.layer.name != watched.tap.name:
                self._assign(watched, self._new_layer(watched.tap.name, watched.number))
        by_name = {each.tap.name: each for each in self._watched}
        for name, owner in shared.items():
            self.inputs.owner[by_name[name].number] = by_name[owner].number
            self._assign(by_name[name], by_name[owner].routes.layer)
        for owner in set(shared.values()):
            by_name[owner].routes.reconsider()

    def share_no_more_than(self, other: Taps) -> None:
        """End of the sharing of taps that share a layer here, but not among other taps.

        Each keeps the rows that it shows.
        """
        for watched in self._watched:
            name, shared = watched.tap.name, watched.routes.layer
            if shared.name == name or name not in other.layers:
                continue
            if other.layers[name] is not other.layers.get(shared.name):
                layer = copy.deepcopy(shared)
                new = self._new_layer(name, watched.number)
                layer.name, layer.phase = new.name, new.phase
                self.inputs.split(watched.number)
                self._assign(watched, layer)


def no_module() -> None:
    """None: the reference to a module of a tap that has none."""
    return
