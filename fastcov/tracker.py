"""Tracker: access to the statistics of a watched model, their snapshots and checkpoints."""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcov.arguments import (
    check_decay,
    check_model,
    check_of,
    check_out,
    check_reading,
    check_steps,
    loss_scale_of,
)
from fastcov.names import closest
from fastcov.ops.covariance import Precision, check_precision
from fastcov.rows.policy import Rows, policy_of
from fastcov.show.status import (
    COMPILED_BEFORE,
    LayerFacts,
    LayerStatus,
    RunFacts,
    Summary,
    layer_status,
    why_empty,
)
from fastcov.spectra.history import History, Snapshot
from fastcov.spectra.pending import PendingSpectra, SnapshotQueue
from fastcov.spectra.sensitivity import sensitivity_spectrum
from fastcov.spectra.spectrum import Spectrum
from fastcov.stats.capture import is_capturing
from fastcov.stats.directions import Directions
from fastcov.stats.layer import Layer
from fastcov.stats.ranks import rank_and_ranks, sync_named_states
from fastcov.stats.state import CovarianceState
from fastcov.watch.budget import sketch_of
from fastcov.watch.hooks import watchers_of
from fastcov.watch.isolation import is_compiled, is_exporting
from fastcov.watch.masking import Mask, MaskSource
from fastcov.watch.pairs import Pair, check_pairs, linear_cka, pair_name
from fastcov.watch.select import Of, Selector, Tap, find_taps, gradient_name
from fastcov.watch.watcher import Watcher

_FORMAT = 1


class Tracker:
    """Statistics of a model's layers, kept by hooks; made by :func:`fastcov.track`.

    Reading them (:meth:`covariance`, :meth:`spectra`, :meth:`summary`) never disturbs training.
    :meth:`close` removes every hook; a tracker is also a context manager.

    Forwards of the model may run in any thread, one after the other. Where they overlap in several
    threads, the first to begin is read, and the summary says so.

    Args:
        model: Root module.
        taps: Tensors to watch.
        snapshot_every, out: See :func:`fastcov.track`.
        options: Further arguments of :class:`fastcov.watch.watcher.Watcher`.

    Attributes:
        watcher: Hooks and layers.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: list[tuple[Tap, nn.Module]],
        *,
        snapshot_every: int | None,
        out: str | Path | None,
        **options: Any,
    ) -> None:
        # Only rank 0 writes: the ranks' snapshots differ only in the rows that they sampled.
        rank, _ = rank_and_ranks()
        if rank == 0:
            check_out(out)
        self.snapshot_every = snapshot_every
        # States of all ranks together. They are shown until the next step begins, which changes
        # `Watcher.steps_begun` from the number in `_synced_at`.
        self._synced: dict[str, CovarianceState] = {}
        self._synced_pairs: dict[str, CovarianceState] = {}
        self._synced_at = -1
        self._snapshots = SnapshotQueue(History(out if rank == 0 else None), self)
        self._owns_history = False  # True once no snapshot in the history is of an earlier run
        self._has_stepped = False
        self.watcher = Watcher(model, taps, on_step_end=self._end_step, **options)

    def _warn_if_compiled_before(self) -> None:
        taps = self.watcher.taps
        unread = [not layer.calls and layer.name not in taps.notes for layer in taps.forward_layers]
        if unread and all(unread) and is_compiled(self.watcher.root()):
            warnings.warn(f"fastcov reads nothing: {COMPILED_BEFORE}", stacklevel=4)

    def _end_step(self) -> None:
        if not self._has_stepped:
            self._has_stepped = True
            self._warn_if_compiled_before()
        if self._synced and not self._is_synced:
            self._show_own_rows()  # frees the other ranks' rows
        # A snapshot that fails (a full disk) gives a warning and does not end the training.
        if self.snapshot_every is None or is_capturing():
            return
        try:
            self._snapshots.poll()
            if self.steps % self.snapshot_every == 0:
                self._begin_history()
                self._snapshots.add(self.steps, self._start_spectra())
        except Exception as error:
            message = f"{type(error).__name__}: {error}"
            warnings.warn(f"no snapshot at step {self.steps}, {message}", stacklevel=2)

    @property
    def steps(self) -> int:
        """Steps so far, read or not."""
        return self.watcher.step

    @property
    def _is_synced(self) -> bool:
        return self._synced_at == self.watcher.steps_begun

    def _show_own_rows(self) -> None:
        self._synced, self._synced_pairs, self._synced_at = {}, {}, -1

    def _begin_history(self) -> None:
        # Snapshots of two runs in one history would read as one training.
        if not self._owns_history:
            self._owns_history = True
            if (target := self._snapshots.history.start_anew()) is not None:
                warnings.warn(
                    f"the snapshots of an earlier run were moved to {target}: a run is continued "
                    "by load_state_dict() before its first snapshot",
                    stacklevel=3,
                )

    @property
    def history(self) -> History:
        """Snapshots so far; waits for the spectra that are still being computed."""
        self._snapshots.deliver()
        return self._snapshots.history

    def names(self) -> list[str]:
        """Names of the watched tensors, in the model's order."""
        return self.watcher.taps.names()

    def observe(self, name: str, tensor: Tensor, channel_dim: int = -1) -> None:
        """Tap on a tensor of the model's forward: like any other, under a name.

        To be called inside a forward of the model, in eager or compiled code; elsewhere, and in
        forwards that are no steps, nothing is read. A name may come several times in a step.

        Args:
            name: Name of the tensor in :meth:`names`, which no module's tensor has.
            tensor: Floating-point tensor; dimension 0 of the rows holds the images.
            channel_dim: Dimension that holds the channels; the others are rows.

        Raises:
            TypeError: If ``name`` is no string, or ``tensor`` no tensor of floating point.
            ValueError: If the tensor has no such dimension, or a module's tensor has the name.

        Example:
            >>> class Heads(nn.Module):
            ...     def forward(self, x):
            ...         tracker.observe("heads", x.unflatten(-1, (2, 4)))
            >>> model = Heads()
            >>> tracker = track(model, include=Heads, rows="all")
            >>> model(torch.randn(3, 5, 8))
            >>> tracker.count("heads"), tracker.spectrum("heads").channels
            (30, 4)
        """
        watcher = self.watcher
        if not torch.compiler.is_compiling():
            watcher.observe_named(name, tensor, channel_dim, is_compiled=False)
        elif not is_exporting() and (not watcher.train_only or watcher.is_training()):
            torch.ops.fastcov.observe_named_(watcher.clock, name, tensor, channel_dim)

    @torch.no_grad()
    def _state_or_none(self, name: str) -> CovarianceState | None:
        if self._is_synced and name in self._synced:
            return self._synced[name]
        layer = self.watcher.taps.layers.get(name)
        if layer is None:
            raise KeyError(
                f"no layer {name!r} is tracked{closest(name, self.names())}; "
                "tracker.names() lists all"
            )
        self.watcher.settle()
        layer.flush()
        return layer.state

    def _state(self, name: str) -> CovarianceState:
        state = self._state_or_none(name)
        if state is None or float(state.weight) == 0:
            reason = why_empty(self._layer_facts(name), self._run_facts())
            raise ValueError(f"layer {name!r} has seen no row: {reason}")
        return state

    def _whole_state(self, name: str) -> CovarianceState:
        state = self._state(name)
        if state.sketch is not None:
            raise ValueError(
                f"layer {name!r} is sketched, {state.channels} channels to {state.sketch.width}: "
                "it has a spectrum, but no covariance, mean or directions; give track() more "
                "memory, or fewer layers (include=)"
            )
        return state

    def covariance(self, name: str, centered: bool = False) -> Tensor:
        """Second-moment matrix of a layer's rows, the covariance if ``centered``.

        Args:
            name: One of :meth:`names`.
            centered: True subtracts the mean.

        Returns:
            float64 on the layer's device; the divisor is the weight. [C, C]

        Raises:
            KeyError: If no such layer is tracked.
            ValueError: If the layer has read no row, or is sketched.
        """
        return self._whole_state(name).covariance(centered)

    def directions(
        self, name: str, k: int | None = None, *, centered: bool = False, correction: float = 0
    ) -> Directions:
        """Directions of a layer's largest variance: eigenvalues and eigenvectors.

        Args:
            name: One of :meth:`names`.
            k: Number of directions; None for all.
            centered: True subtracts the mean: principal components.
            correction: Degrees of freedom to take off the divisor; 1 for the unbiased covariance.

        Returns:
            ``eigenvalues`` [k], descending, and ``vectors`` [C, k], float64 on the layer's device.

        Raises:
            KeyError: If no such layer is tracked.
            ValueError: If the layer has read no row or is sketched, or ``k`` is out of range.
        """
        return self._whole_state(name).directions(k, centered, correction)

    def mean(self, name: str) -> Tensor:
        """Mean of a layer's rows, float64; raises as :meth:`covariance` does. [C]"""
        return self._whole_state(name).mean()

    def count(self, name: str) -> int:
        """Number of rows read of a layer, without those that hold a NaN or an infinity.

        Args:
            name: One of :meth:`names`.

        Raises:
            KeyError: If no such layer is tracked.
        """
        state = self._state_or_none(name)
        return 0 if state is None else int(state.count[0])

    def spectrum(self, name: str, centered: bool = False) -> Spectrum:
        """Eigenvalues of a layer's covariance; arguments and errors as of :meth:`covariance`."""
        return self._pending({name: self._state(name)}, centered).get()[name]

    def spectra(self, centered: bool = False) -> dict[str, Spectrum]:
        """Spectra of all layers that have read a row, by name: one batched eigenvalue call."""
        return self._start_spectra(centered).get()

    def sensitivity(self, name: str) -> Spectrum:
        r"""Spectrum of :math:`S^{1/2} G S^{1/2}`: the directions of a layer that the loss feels.

        S is the second moment of the layer's rows, G that of the loss's gradient with respect to
        them. An eigenvalue is the squared change of the loss, to first order and on average over
        the rows, if its direction went. The width rule ``"gradient"`` reads such spectra.

        Args:
            name: Name of a tensor that is watched with ``of="both"``.

        Raises:
            KeyError: If no such layer is tracked.
            ValueError: If its gradient is not tracked, or one of both has no row or is sketched.
        """
        if name in self.watcher.taps.layers and gradient_name(name) not in self.watcher.taps.layers:
            raise ValueError(
                f'the gradient of layer {name!r} is not tracked: pass track(..., of="both")'
            )
        state = self._whole_state(name)
        gradient = self._whole_state(gradient_name(name))
        count = min(float(state.effective_count), float(gradient.effective_count))
        return sensitivity_spectrum(state.covariance(), gradient.covariance(), round(count), name)

    def cross_covariance(self, first: str, second: str, centered: bool = False) -> Tensor:
        """Mean of the products of the rows of a pair of ``track(..., pairs=...)``.

        Args:
            first: Name of a tensor.
            second: Name of the other tensor of a pair.
            centered: True subtracts the means.

        Returns:
            float64; the divisor is the weight. [C_first, C_second]

        Raises:
            KeyError: If the two are no pair.
            ValueError: If no rows of the two have been paired.
        """
        joint, channels = self._joint_covariance(first, second, centered)
        block = joint[:channels, channels:]
        return block if (first, second) in self.watcher.pairs else block.T

    def cka(self, first: str, second: str) -> float:
        """Linear centred kernel alignment of a pair: 1 where one is a rotation of the other.

        With few rows the measure is too high: N rows of independent tensors have about
        sqrt(p q) / N of it, with the participation ratios p and q of their covariances. Arguments
        and errors are those of :meth:`cross_covariance`.
        """
        return linear_cka(*self._joint_covariance(first, second, centered=True))

    @torch.no_grad()
    def _joint_covariance(self, first: str, second: str, centered: bool) -> tuple[Tensor, int]:
        pairs = self.watcher.pairs
        pair = pairs.get((first, second)) or pairs.get((second, first))
        if pair is None:
            listed = ", ".join(map(str, pairs)) or "none"
            raise KeyError(
                f"{first!r} and {second!r} are no pair: pass track(..., pairs=[({first!r}, "
                f"{second!r})]); the pairs are: {listed}"
            )
        name = pair_name(pair.names)
        pair.layer.flush()
        state = self._synced_pairs.get(name) if self._is_synced else None
        state = state or pair.layer.state
        if state is None or float(state.weight) == 0:
            raise ValueError(f"no rows of {name} have been paired: {self._why_unpaired(pair)}")
        return state.covariance(centered), pair.channels[0]

    def _why_unpaired(self, pair: Pair) -> str:
        unseen = [name for name in pair.names if name not in self.watcher.taps.layers]
        if unseen and not pair.note:
            return f"nothing is named {unseen[0]!r}{closest(unseen[0], self.names())}"
        return pair.note or "no step has shown both"

    def _start_spectra(self, centered: bool = False) -> PendingSpectra:
        states = self._synced if self._is_synced else self._own_states()
        return self._pending({n: s for n, s in states.items() if s is not None}, centered)

    def _own_states(self) -> dict[str, CovarianceState | None]:
        """States of this rank's own rows, by layer; None where no row was read."""
        self.watcher.settle()
        layers = self.watcher.taps.layers
        for layer in layers.values():
            layer.flush()
        return {name: layer.state for name, layer in layers.items()}

    def _pending(self, states: dict[str, CovarianceState], centered: bool) -> PendingSpectra:
        """Spectra to compute, from copies of the numbers: without a reference to the model."""
        return PendingSpectra(states, centered, in_float64=self.watcher.precision == "float64")

    def summary(self) -> Summary:
        """Summary of every layer's rows and spectrum so far.

        Returns:
            Flat dict of floats, for any logger; ``print`` shows it as a table.
        """
        pairs: dict[str, float] = {}
        lines = []
        for names, pair in self.watcher.pairs.items():
            name = pair_name(names)
            try:
                pairs[f"{name}/cka"] = self.cka(*names)
            except ValueError as error:
                lines.append(str(error))
                continue
            note = f"; {pair.note}" if pair.note else ""
            lines.append(f"{name}: linear CKA {pairs[f'{name}/cka']:.3f}{note}")
        summary = Summary(self.statuses(), [*lines, *self.watcher.remarks()])
        summary.update(pairs)
        return summary

    def statuses(self) -> list[LayerStatus]:
        """Statuses of all layers: rows, spectrum, and a note where something is missing."""
        spectra, run = self.spectra(), self._run_facts()
        taps = self.watcher.taps
        untracked = [name for name in taps.notes if name not in taps.layers]
        facts = [self._layer_facts(name) for name in [*self.names(), *untracked]]
        return [layer_status(layer, run, spectra.get(layer.name)) for layer in facts]

    def _run_facts(self) -> RunFacts:
        watcher = self.watcher
        layers = watcher.taps.unique_layers
        return RunFacts(
            steps=self.steps,
            steps_read=watcher.steps_read,
            decay=watcher.decay,
            train_only=watcher.train_only,
            refusal=watcher.steps.not_counted,
            has_calls=any(layer.total_calls for layer in layers),
            has_calls_lately=any(layer.calls for layer in layers),
            is_compiled=is_compiled(watcher.root()),
        )

    def _layer_facts(self, name: str) -> LayerFacts:
        watcher = self.watcher
        reason = watcher.taps.note(name, watcher.root())
        if name not in watcher.taps.layers:
            return LayerFacts(name, reason=reason)
        layer = watcher.taps.layers[name]
        state = self._synced.get(name, layer.state) if self._is_synced else layer.state
        tap = next(each.tap for each in watcher.taps if each.tap.name == name)
        count, skipped = (0, 0) if state is None else state.count.tolist()
        if watcher.mask is not None and layer.total_calls and not (reason or count or skipped):
            reason = "the mask left out every row so far"
        if not (reason or layer.total_calls) and self.steps and tap.is_gradient:
            reason = "no backward pass has reached it"
        whole = state if state is not None and count and state.sketch is None else None
        return LayerFacts(
            name=name,
            channels=tap.channels or (0 if state is None else state.channels),
            sketch=(state and state.sketch_width) or 0,
            count=count,
            skipped=skipped,
            weight=0.0 if state is None else float(state.weight),
            mean_square=float(whole.mean().square().sum()) if whole else 0.0,
            mean_from_shift=float((whole.sum / whole.weight).square().sum()) if whole else 0.0,
            reason=reason,
            has_calls=layer.total_calls > 0,
            # Gradients of the last step may still be on their way.
            has_calls_lately=layer.calls > 0 or tap.is_gradient,
        )

    def snapshot(self, step: int | None = None) -> Snapshot:
        """Snapshot of all spectra now, appended to :attr:`history`.

        Args:
            step: Label of the snapshot; None is the number of steps.

        Returns:
            The snapshot.

        Raises:
            ValueError: If ``step`` comes before the last snapshot's.
            OSError: If the folder cannot be written; the earlier snapshots are intact.
        """
        self._begin_history()
        snapshot = Snapshot(
            step=self.steps if step is None else step, wall_s=time.time(), spectra=self.spectra()
        )
        self.history.append(snapshot)
        return snapshot

    def close(self) -> None:
        """Removal of every hook; the statistics stay readable, and captured graphs add to them."""
        self.watcher.close()
        self._snapshots.deliver()

    def paused(self) -> AbstractContextManager[None]:
        """Context in which nothing is read and no step counted: ``with tracker.paused():``."""
        return self.watcher.paused()

    def sync(self, group: dist.ProcessGroup | None = None) -> Tracker:
        """View of all ranks' statistics together until the next step: the only collective.

        Every rank must call this method. Each rank goes on collecting its own rows afterwards, so
        that another call counts nothing twice.

        Args:
            group: Process group; None is the default group.

        Returns:
            This tracker.

        Raises:
            RuntimeError: If the ranks track different layers.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        states = self._own_states()
        names = [pair_name(pair.names) for pair in self.watcher.pairs.values()]
        for name, pair in zip(names, self.watcher.pairs.values(), strict=True):
            pair.layer.flush()
            states[name] = pair.layer.state
        synced = sync_named_states(states, group)
        self._synced_pairs = {name: synced.pop(name) for name in names if name in synced}
        self._synced = synced
        self._synced_at = self.watcher.steps_begun
        return self

    def merge(self, other: Tracker) -> None:
        """Addition of the rows of another tracker of the same layers, which stays as it is.

        Args:
            other: Tracker of a model with these layers, on any device.

        Raises:
            TypeError: If ``other`` is no tracker.
            ValueError: If no layer is common, a width differs, or decay is used and the trackers
                stand at different steps.
        """
        if not isinstance(other, Tracker):
            raise TypeError(f"other is a {type(other).__name__}, expected a fastcov.Tracker")
        own, given = self.watcher, other.watcher
        for name in given.named():
            own.add_named(name)
        common = [name for name in own.taps.layers if name in given.taps.layers]
        if not common:
            raise ValueError(
                f"nothing to merge: no layer in common; this tracker has {self.names()[:3]}..., "
                f"the other {other.names()[:3]}..."
            )
        if own.decay != given.decay or (own.decay is not None and self.steps != other.steps):
            raise ValueError(
                f"cannot merge: decay {own.decay} at step {self.steps} with decay {given.decay} "
                f"at step {other.steps}; decayed states must stand at the same step"
            )
        for name in common:
            mine_state, their_state = own.taps.layers[name].state, given.taps.layers[name].state
            if mine_state and their_state and mine_state.sketch != their_state.sketch:
                raise ValueError(
                    f"cannot merge layer {name!r}: sketched to {their_state.sketch_width} channels "
                    f"there, to {mine_state.sketch_width} here (None: all kept); track both with "
                    "the same memory="
                )
        self._show_own_rows()
        own.leave_device()
        given.settle()
        own.taps.share_no_more_than(given.taps)
        done: set[Layer] = set()
        for name in common:
            mine, theirs = own.taps.layers[name], given.taps.layers[name]
            if mine not in done:
                done.add(mine)
                mine.merge(theirs, self.steps)
        for names, pair in own.pairs.items():
            if (other_pair := given.pairs.get(names)) is not None:
                pair.merge(other_pair, self.steps)
        if own.decay is None:
            own.step = self.steps + other.steps

    def state_dict(self) -> dict[str, Any]:
        """Checkpoint of the tracker: tensors and numbers only, made without a collective.

        After :meth:`Tracker.sync`, or of a single process, the dict holds all rows: any number of
        ranks may load it, rank 0 then carries the rows and the others start at zero. Else the dict
        holds this rank's rows: the same number of ranks may load them again, each its own.
        """
        rank, ranks = rank_and_ranks()
        self.watcher.settle()
        layers = {}
        for layer in self.watcher.taps.unique_layers:
            layers[layer.name] = layer.state_dict()
            if self._is_synced and layer.name in self._synced:
                layers[layer.name]["state"] = self._synced[layer.name].state_dict()
        return {
            "format": _FORMAT,
            "steps": self.steps,
            "rho": self.watcher.policy.rho,
            "is_synced": self._is_synced or ranks == 1,
            "rank": rank,
            "world_size": ranks,
            "shared": self.watcher.taps.shared(),
            "layers": layers,
            "named": self.watcher.named(),
            "pairs": self._saved_pairs(),
        }

    def _saved_pairs(self) -> dict[str, Any]:
        saved: dict[str, dict[str, Any]] = {}
        for names, pair in self.watcher.pairs.items():
            name = pair_name(names)
            saved[name] = {"layer": pair.layer.state_dict(), "channels": list(pair.channels)}
            if self._is_synced and name in self._synced_pairs:
                saved[name]["layer"]["state"] = self._synced_pairs[name].state_dict()
        return saved

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Return to the statistics of a :meth:`state_dict`.

        Args:
            state_dict: Result of :meth:`state_dict`.

        Raises:
            ValueError: If ``state_dict`` is of another format, holds layers that are not tracked
                here, or holds one rank's own rows and this is another rank or number of ranks.
        """
        if state_dict.get("format") != _FORMAT:
            raise ValueError(
                f"state_dict has format {state_dict.get('format')!r}, expected {_FORMAT}: it was "
                "not written by Tracker.state_dict() of this version"
            )
        layers, shared = state_dict["layers"], state_dict["shared"]
        for name in state_dict.get("named", ()):
            self.watcher.add_named(name)
        unknown = [name for name in (*layers, *shared) if name not in self.watcher.taps.layers]
        if unknown:
            raise ValueError(
                f"state_dict holds layers that are not tracked here: {', '.join(unknown[:3])}; "
                "track the same model with the same include and exclude"
            )
        rank, ranks = rank_and_ranks()
        saved_rank = state_dict.get("rank", rank)  # checkpoints of older versions have no rank
        saved_ranks = state_dict.get("world_size", ranks)
        if not state_dict["is_synced"] and (saved_rank, saved_ranks) != (rank, ranks):
            raise ValueError(
                f"state_dict holds the rows of rank {saved_rank} of {saved_ranks} alone, "
                f"but rank {rank} of {ranks} loads it: rows would be lost or counted twice. Call "
                "sync() on every rank before state_dict(), then any number of ranks may load it; "
                f"or load on {saved_ranks} ranks, each its own"
            )
        with_rows = not state_dict["is_synced"] or rank == 0
        watcher = self.watcher
        self._show_own_rows()
        watcher.leave_device()
        watcher.step = state_dict["steps"]
        watcher.policy.rho = state_dict["rho"]
        watcher.taps.load(layers, shared, with_rows)
        saved_pairs = state_dict.get("pairs", {})
        for names, pair in watcher.pairs.items():
            if (saved := saved_pairs.get(pair_name(names))) is not None:
                pair.channels = (saved["channels"][0], saved["channels"][1])
                pair.layer.load_state_dict(saved["layer"], with_rows)
        self._owns_history = True
        self.history.truncate(self.steps + 1)

    def reset(self) -> None:
        """Removal of every row and step; the shares of the rows that were planned stay."""
        self._show_own_rows()
        self.watcher.leave_device()
        self.watcher.step = 0
        for layer in self.watcher.taps.unique_layers:
            layer.reset()
        for pair in self.watcher.pairs.values():
            pair.layer.reset()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def plot(
        self,
        layer: str | None = None,
        ax: Any = None,
        *,
        kind: Literal["spectrum", "ridges", "dims", "demand"] = "spectrum",
    ) -> Any:
        """Figure of the spectra of now or over the snapshots; see :mod:`fastcov.show.plot`.

        Args:
            layer: One of :meth:`names`; None draws all, which "ridges" cannot.
            ax: Axes to draw into; None makes a figure.
            kind: "spectrum": eigenvalues by rank, now. "demand": degrees of freedom against width,
                now. "ridges": a layer's eigenvalues over the snapshots. "dims": dimension of every
                layer over the snapshots.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: Without matplotlib (the extra ``plot``).
            KeyError: If no such layer is tracked.
            ValueError: If there is no such kind, if the layer has read no row, if no snapshot
                holds it, or if "dims" is given a layer.
        """
        from fastcov.show.plot import plot_demand, plot_dims, plot_ridges, plot_spectrum

        if kind == "ridges":
            return plot_ridges(self.history, layer, ax)
        if kind == "dims":
            if layer is not None:
                raise ValueError(
                    f'kind="dims" draws every layer, got layer={layer!r}; leave layer out, or '
                    'draw one with kind="ridges"'
                )
            return plot_dims(self.history, ax)
        if kind == "spectrum":
            return plot_spectrum(self.spectra() if layer is None else self.spectrum(layer), ax)
        if kind == "demand":
            spectra = self.spectra() if layer is None else {layer: self.spectrum(layer)}
            return plot_demand(spectra, ax)
        raise ValueError(f"kind={kind!r}: choose 'spectrum', 'ridges', 'dims' or 'demand'")

    def report(self, path: str | Path) -> Path:
        """Self-contained HTML page about every layer.

        Args:
            path: Path of the page; folders are made as needed.

        Returns:
            The page's path.

        Raises:
            ImportError: Without matplotlib (the extra ``plot``).
            OSError: If the page cannot be written.
        """
        from fastcov.show.page import write_report

        return write_report(path, self.statuses(), history=self.history)


def track(
    model: nn.Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    where: Literal["output", "input", "both"] = "output",
    of: Of = "activation",
    rows: Rows = "auto",
    mask: Mask | None = None,
    unscale: Any = None,
    every: int = 1,
    weighting: Literal["position", "image"] = "position",
    decay: float | None = None,
    precision: Precision = "split",
    memory: int | str | None = None,
    max_channels: int = 4096,
    pairs: Iterable[Sequence[str]] = (),
    train_only: bool = True,
    snapshot_every: int | None = None,
    out: str | Path | None = None,
    replace: bool = False,
) -> Tracker:
    """Tracker of the feature covariance of a model's layers, kept while it trains.

    Nothing else in the training loop changes. Call :func:`track` before the first compiled forward.
    Replays of a CUDA graph of whole steps are read if two steps have run eagerly before the
    capture; a warning names the layers that are left out, and why.

    Args:
        model: Module whose forward is one step; where gradients accumulate, each micro-batch.
        include: Glob patterns on module names, module types, or a predicate of (name, module);
            None watches every convolution, Linear and MultiheadAttention.
        exclude: Patterns, types or a predicate as for ``include``, of modules not to watch.
        where: Side of each module: "output", "input" (named ``layer:in``; modules that are given
            one tensor share its statistics), or "both".
        of: "activation"; "gradient": of the loss with respect to the same tensor, named
            ``layer:grad``, read in the backward pass; or "both".
        rows: "auto" spends 1 % of the watched modules' training flops; "all"; an int of rows a
            layer and step; or a float, the share of all rows in (0, 1].
        mask: Name of an argument of the model's forward, or a function of its arguments, that gives
            a tensor [B], [B, T] or [B, H, W] in each step: layers whose leading sizes are these
            read a row where it is true (or not 0), or with its weight (floating point). The other
            layers read all rows, and say so in the summary. With ``weighting="image"`` a mask of
            integers numbers the sequences that are packed into one index of dim 0.
        unscale: GradScaler, or a function that gives the factor by which the loss is scaled:
            gradients are divided by it. Needed for ``of`` with float16 alone.
        every: Reads steps 0, every, 2 * every, ...
        weighting: "position": each row weighs 1. "image": each index of dim 0 weighs 1 a step,
            shared by its positions.
        decay: Factor in (0, 1) on all rows read before, once a step; None keeps everything. Where
            the mean moves far from the first rows, centred covariances on a GPU lose digits, and
            the summary says so (docs/precision.md).
        precision: Precision of the rows' products, as of :func:`fastcov.ops.accumulate_`. "float64"
            keeps small eigenvalues right beside attention sinks, for about twice the time.
        memory: Bytes for all states and buffers, as an int or a text such as "2GiB". Layers that do
            not fit are sketched to fewer channels: their trace is exact, the other numbers of their
            spectra are estimates (docs/memory.md), and the summary says so. No layer is too wide
            then. ``pairs`` keep all channels and are counted; observed tensors come on top, as
            their widths are not known before. None keeps all channels.
        max_channels: Without ``memory``, wider layers are skipped and listed in the summary.
        pairs: Pairs of names of tensors of one step, modules' or observed ones, whose
            :meth:`Tracker.cross_covariance` and :meth:`Tracker.cka` are kept.
        train_only: True counts only forwards of a model in training mode as steps.
        snapshot_every: Steps between snapshots of all spectra; None takes none. A snapshot that
            fails (a full disk) gives a warning.
        out: Folder where rank 0 appends snapshots; None keeps them in memory. Snapshots of an
            earlier run are kept in a folder beside, unless :meth:`Tracker.load_state_dict`
            continues that run.
        replace: True closes the trackers that the model has already; else they go on reading, and
            a warning says so.

    Returns:
        The tracker.

    Raises:
        TypeError: If an argument is of the wrong type.
        ValueError: If an argument is out of range, or a pattern matches no module.
        OSError: If the folder ``out`` cannot be made or written to.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> tracker = track(model, rows="all")
        >>> _ = model(torch.randn(32, 8))
        >>> tracker.count("0"), tracker.spectrum("2").channels
        (32, 4)
    """
    check_model(model)
    policy = policy_of(rows)
    check_of(of)
    pair_names = check_pairs(pairs)
    loss_scale = loss_scale_of(unscale)
    check_reading(where, weighting, max_channels)
    check_decay(decay)
    check_precision(precision)
    check_steps("every", every)
    if snapshot_every is not None:
        check_steps("snapshot_every", snapshot_every)
    taps = find_taps(model, include, exclude, where, of)
    sketch = sketch_of(model, taps, memory, pair_names)
    source = None if mask is None else MaskSource(mask, model)
    _close_or_warn_of_others(model, taps, replace)
    return Tracker(
        model,
        taps,
        policy=policy,
        mask=source,
        unscale=loss_scale,
        of=of,
        pairs=pair_names,
        every=every,
        weighting=weighting,
        decay=decay,
        precision=precision,
        sketch=sketch,
        max_channels=max_channels if memory is None else sys.maxsize,
        train_only=train_only,
        snapshot_every=snapshot_every,
        out=out,
    )


def _close_or_warn_of_others(
    model: nn.Module, taps: list[tuple[Tap, nn.Module]], replace: bool
) -> None:
    names = {tap.name for tap, _ in taps}
    others = [each for each in watchers_of(model) if replace or names & set(each.taps.names())]
    if replace:
        for watcher in others:
            watcher.close()
    elif others:
        one = len(others) == 1
        warnings.warn(
            f"layers of this {type(model).__name__} are tracked already: {len(others)} earlier "
            f"tracker{'' if one else 's'} go{'es' if one else ''} on reading them, at the same "
            "cost each; call close() on them, or track(model, replace=True)",
            stacklevel=3,
        )
