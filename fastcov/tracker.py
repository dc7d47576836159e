"""Tracker: access to the statistics of a watched model, their snapshots and checkpoints."""

from __future__ import annotations

import time
import warnings
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcov.arguments import check_decay, check_model, check_reading, check_steps
from fastcov.names import closest
from fastcov.rows.policy import Rows, policy_of
from fastcov.show.status import (
    LayerFacts,
    LayerStatus,
    RunFacts,
    Summary,
    layer_status,
    why_empty,
)
from fastcov.spectra.history import History, Snapshot
from fastcov.spectra.pending import PendingSpectra, SnapshotQueue
from fastcov.spectra.spectrum import Spectrum
from fastcov.stats.capture import is_capturing
from fastcov.stats.layer import Layer
from fastcov.stats.ranks import rank_and_ranks, sync_named_states
from fastcov.stats.state import CovarianceState
from fastcov.watch.hooks import watchers_of
from fastcov.watch.isolation import is_compiled
from fastcov.watch.select import Selector, Tap, find_taps
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
        snapshot_every: See :func:`fastcov.track`.
        out: See :func:`fastcov.track`.
        options: Other arguments of :class:`fastcov.watch.watcher.Watcher`.

    Attributes:
        watcher: Hooks and layers.
        snapshot_every: See :func:`fastcov.track`.
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
        self.snapshot_every = snapshot_every
        # States of all ranks together, shown until another step begins than those counted here.
        self._synced: dict[str, CovarianceState] = {}
        self._synced_at = -1
        self._snapshots = SnapshotQueue(History(out if rank == 0 else None), self)
        self._owns_history = False  # True once the history's snapshots are all of this run
        self.watcher = Watcher(model, taps, on_step_end=self._end_step, **options)

    def _end_step(self) -> None:
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
        self._synced, self._synced_at = {}, -1

    def _begin_history(self) -> None:
        # Snapshots of two runs in one history would read as one training.
        if not self._owns_history:
            self._owns_history = True
            if (apart := self._snapshots.history.start_anew()) is not None:
                warnings.warn(
                    f"the snapshots of an earlier run were moved to {apart}: a run is continued "
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
        return self.watcher.names()

    # statistics

    @torch.no_grad()
    def _state(self, name: str, needs_rows: bool = True) -> CovarianceState:
        if self._is_synced and name in self._synced:
            return self._synced[name]
        if (layer := self.watcher.layers.get(name)) is not None:
            layer.flush()
            state = layer.state
            if state is None or (needs_rows and float(state.weight) == 0):
                reason = why_empty(self._layer_facts(name), self._run_facts())
                raise ValueError(f"layer {name!r} has seen no row: {reason}")
            return state
        raise KeyError(f"no layer {name!r} is tracked{closest(name, self.names())}")

    def covariance(self, name: str, centered: bool = False) -> Tensor:
        """Second-moment matrix of a layer's rows, the covariance if ``centered``.

        Args:
            name: One of :meth:`names`.
            centered: True subtracts the mean.

        Returns:
            float64 on the layer's device; the divisor is the weight. [C, C]

        Raises:
            KeyError: If no such layer is tracked.
            ValueError: If the layer has read no row.
        """
        return self._state(name).covariance(centered)

    def mean(self, name: str) -> Tensor:
        """Mean of a layer's rows, float64; raises as :meth:`covariance` does. [C]"""
        return self._state(name).mean()

    def count(self, name: str) -> int:
        """Number of rows read of a layer, without those that hold a NaN or an infinity.

        Args:
            name: One of :meth:`names`.

        Raises:
            KeyError: If no such layer is tracked.
        """
        layer = self.watcher.layers.get(name)
        if (
            layer is not None
            and layer.state is None
            and not (self._is_synced and name in self._synced)
        ):
            return 0
        return int(self._state(name, needs_rows=False).count[0])

    def spectrum(self, name: str, centered: bool = False) -> Spectrum:
        """Eigenvalues of a layer's covariance; arguments and errors as of :meth:`covariance`."""
        return self._pending({name: self._state(name)}, centered).get()[name]

    def spectra(self, centered: bool = False) -> dict[str, Spectrum]:
        """Spectra of all layers that have read a row, by name: one batched eigenvalue call."""
        return self._start_spectra(centered).get()

    def _start_spectra(self, centered: bool = False) -> PendingSpectra:
        states: dict[str, CovarianceState | None] = dict(self._synced)
        if not self._is_synced:
            states = {}
            for name, layer in self.watcher.layers.items():
                layer.flush()
                states[name] = layer.state
        return self._pending({n: s for n, s in states.items() if s is not None}, centered)

    def _pending(self, states: dict[str, CovarianceState], centered: bool) -> PendingSpectra:
        # Copies of this step's numbers, with no reference to the tracker or its model.
        return PendingSpectra(states, centered)

    @property
    def steps_read(self) -> int:
        """Steps whose activations were read; at least 1."""
        return self.watcher.steps_read

    def summary(self) -> Summary:
        """Summary of every layer's rows and spectrum so far.

        Returns:
            Flat dict of floats, for any logger; ``print`` shows it as a table.
        """
        return Summary(self.statuses(), self.watcher.remarks())

    def statuses(self) -> list[LayerStatus]:
        """Statuses of all layers: rows, spectrum, and a note where something is missing."""
        spectra, run = self.spectra(), self._run_facts()
        untracked = [name for name in self.watcher.notes if name not in self.watcher.layers]
        facts = [self._layer_facts(name) for name in [*self.names(), *untracked]]
        return [layer_status(layer, run, spectra.get(layer.name)) for layer in facts]

    def _run_facts(self) -> RunFacts:
        watcher = self.watcher
        layers = watcher.unique_layers()
        return RunFacts(
            steps=self.steps,
            steps_read=self.steps_read,
            decay=watcher.decay,
            train_only=watcher.train_only,
            refusal=watcher.steps.not_counted,
            has_calls=any(layer.total_calls for layer in layers),
            has_calls_lately=any(layer.calls for layer in layers),
            is_compiled=is_compiled(watcher.root()),
        )

    def _layer_facts(self, name: str) -> LayerFacts:
        watcher = self.watcher
        reason = watcher.note(name)
        if name not in watcher.layers:
            return LayerFacts(name, reason=reason)
        layer = watcher.layers[name]
        state = self._synced.get(name, layer.state) if self._is_synced else layer.state
        channels = {tap.name: tap.channels for tap in watcher.taps}[name]
        count, skipped = (0, 0) if state is None else state.count.tolist()
        return LayerFacts(
            name=name,
            channels=channels or (0 if state is None else state.channels),
            count=count,
            skipped=skipped,
            weight=0.0 if state is None else float(state.weight),
            mean_square=float(state.mean().square().sum()) if state and count else 0.0,
            mean_from_shift=float((state.sum / state.weight).square().sum())
            if state and count
            else 0.0,
            reason=reason,
            has_calls=layer.total_calls > 0,
            has_calls_lately=layer.calls > 0,
        )

    # snapshots, ranks and checkpoints

    def snapshot(self, step: int | None = None) -> Snapshot:
        """Computes all spectra now and appends them to :attr:`history`.

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
        """Removes every hook; the statistics stay readable, and captured graphs add to them."""
        self.watcher.close()
        self._snapshots.deliver()

    def paused(self) -> AbstractContextManager[None]:
        """Context in which nothing is read and no step counted: ``with tracker.paused():``."""
        return self.watcher.paused()

    def sync(self, group: dist.ProcessGroup | None = None) -> Tracker:
        """Shows the statistics of all ranks together until the next step: the only collective.

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
        states: dict[str, CovarianceState | None] = {}
        for name, layer in self.watcher.layers.items():
            layer.flush()
            states[name] = layer.state
        self._synced = sync_named_states(states, group)
        self._synced_at = self.watcher.steps_begun
        return self

    def merge(self, other: Tracker) -> None:
        """Adds the rows of another tracker of the same layers, which stays as it is.

        Args:
            other: Tracker of a model with these layers, on any device.

        Raises:
            TypeError: If ``other`` is no tracker.
            ValueError: If no layer is common, a width differs, or decay is used and the trackers
                stand at different steps.
        """
        if not isinstance(other, Tracker):
            raise TypeError(f"other is a {type(other).__name__}, expected what fastcov.track gives")
        own, given = self.watcher, other.watcher
        common = [name for name in own.layers if name in given.layers]
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
        self._show_own_rows()
        own.leave_device()
        own.share_no_more_than(given)
        done: set[Layer] = set()
        for name in common:
            mine, theirs = own.layers[name], given.layers[name]
            if mine not in done:
                done.add(mine)
                mine.merge(theirs, self.steps)
        if own.decay is None:
            own.step = self.steps + other.steps

    def state_dict(self) -> dict[str, Any]:
        """Checkpoint of the tracker: tensors and numbers only, made without a collective.

        After :meth:`Tracker.sync`, or of a single process, the dict holds all rows: any number of
        ranks may load it, rank 0 then carries the rows and the others start at zero. Else the dict
        holds this rank's rows: the same number of ranks may load them again, each its own.
        """
        rank, ranks = rank_and_ranks()
        layers = {}
        for layer in self.watcher.unique_layers():
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
            "shared": self.watcher.shared(),
            "layers": layers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`.

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
        unknown = [name for name in (*layers, *shared) if name not in self.watcher.layers]
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
        rows_are_on_rank_0 = state_dict["is_synced"] and rank > 0
        watcher = self.watcher
        self._show_own_rows()
        watcher.leave_device()
        watcher.step = state_dict["steps"]
        watcher.policy.rho = state_dict["rho"]
        watcher.load_layers(layers, shared, with_rows=not rows_are_on_rank_0)
        self._owns_history = True
        self.history.truncate(self.steps + 1)

    def reset(self) -> None:
        """Forgets every row and step; the shares of the rows that were planned stay."""
        self._show_own_rows()
        self.watcher.leave_device()
        self.watcher.step = 0
        for layer in self.watcher.unique_layers():
            layer.reset()

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # plots and reports

    def plot(self, layer: str | None = None, ax: Any = None) -> Any:
        """Draws spectra (of one layer, or all), as :func:`fastcov.show.plot.plot_spectrum` does.

        Args:
            layer: One of :meth:`names`; None draws all.
            ax: Axes to draw into; None makes a figure.

        Returns:
            The matplotlib axes.

        Raises:
            ImportError: Without matplotlib (the extra ``plot``).
            KeyError: If no such layer is tracked.
            ValueError: If the layer has read no row.
        """
        from fastcov.show.plot import plot_spectrum

        return plot_spectrum(self.spectra() if layer is None else self.spectrum(layer), ax=ax)

    def report(self, path: str | Path) -> Path:
        """Writes one self-contained HTML page about every layer.

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
    rows: Rows = "auto",
    every: int = 1,
    weighting: Literal["position", "image"] = "position",
    decay: float | None = None,
    max_channels: int = 4096,
    train_only: bool = True,
    snapshot_every: int | None = None,
    out: str | Path | None = None,
    replace: bool = False,
) -> Tracker:
    """Watches the feature covariance of a model's layers while it trains.

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
        rows: "auto" spends 1 % of the watched modules' training flops; "all"; an int of rows a
            layer and step; or a float, the share of all rows in (0, 1].
        every: Reads steps 0, every, 2 * every, ...
        weighting: "position": each row weighs 1. "image": each index of dim 0 weighs 1 a step,
            shared by its positions.
        decay: Factor in (0, 1) on all rows read before, once a step; None keeps everything.
        max_channels: Wider layers are skipped and listed in the summary.
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

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> tracker = track(model, rows="all")
        >>> _ = model(torch.randn(32, 8))
        >>> tracker.count("0"), tracker.spectrum("2").channels
        (32, 4)
    """
    check_model(model)
    policy = policy_of(rows)
    check_reading(where, weighting, max_channels)
    check_decay(decay)
    check_steps("every", every)
    if snapshot_every is not None:
        check_steps("snapshot_every", snapshot_every)
    taps = find_taps(model, include, exclude, where)
    _close_or_warn_of_others(model, taps, replace)
    return Tracker(
        model,
        taps,
        policy=policy,
        every=every,
        weighting=weighting,
        decay=decay,
        max_channels=max_channels,
        train_only=train_only,
        snapshot_every=snapshot_every,
        out=out,
    )


def _close_or_warn_of_others(
    model: nn.Module, taps: list[tuple[Tap, nn.Module]], replace: bool
) -> None:
    names = {tap.name for tap, _ in taps}
    others = [each for each in watchers_of(model) if replace or names & set(each.names())]
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
