"""Tracker: what the collected statistics say, and how they are kept."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fastcov.arguments import check_decay, check_model, check_reading, check_steps
from fastcov.names import closest
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
from fastcov.stats.state import CovarianceState, sync_named_states
from fastcov.watch.keeper import Keeper
from fastcov.watch.select import Selector, Tap, find_taps


class Tracker(Keeper):
    """Statistics of a model's layers, kept by hooks; made by :func:`fastcov.track`.

    Reading them (:meth:`covariance`, :meth:`spectra`, :meth:`summary`) never disturbs training.
    :meth:`close` removes every hook; a tracker is also a context manager.
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
        # One process writes a folder: the ranks' snapshots differ only in the rows they sampled.
        is_first = not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0
        self._snapshots = SnapshotQueue(History(out if is_first else None), self)
        self.snapshot_every = snapshot_every
        super().__init__(model, taps, **options)

    def after_step(self) -> None:
        """Takes a snapshot where one is due, without waiting for its spectra on a GPU.

        One that fails (a full disk) is a warning, not the end of training.
        """
        if self.snapshot_every is None or is_capturing():
            return
        try:
            self._snapshots.poll()
            if self.steps % self.snapshot_every == 0:
                self._snapshots.add(self.steps, self._start_spectra())
        except Exception as error:
            what = f"{type(error).__name__}: {error}"
            warnings.warn(f"no snapshot at step {self.steps}, {what}", stacklevel=2)

    @property
    def history(self) -> History:
        """The snapshots, including those whose spectra had to be waited for."""
        self._snapshots.deliver()
        return self._snapshots.history

    # reading

    @torch.no_grad()
    def _state(self, name: str, needs_rows: bool = True) -> CovarianceState:
        if self._synced is not None and name in self._synced:
            return self._synced[name]
        if (reader := self.readers.get(name)) is not None:
            reader.flush()
            state = reader.state
            if state is None or (needs_rows and float(state.weight) == 0):
                reason = why_empty(self._layer_facts(name), self._run_facts())
                raise ValueError(f"layer {name!r} has seen no row: {reason}")
            return state
        raise KeyError(f"no layer {name!r} is tracked{closest(name, self.names())}")

    def covariance(self, name: str, centered: bool = False) -> Tensor:
        """Second-moment matrix of a layer's rows, the covariance if ``centered``.

        Args:
            name: One of :meth:`names`.
            centered: Whether the mean is subtracted.

        Returns:
            float64 on the layer's device; the divisor is the weight. [C, C]

        Raises:
            KeyError: If no such layer is tracked.
            ValueError: If it has seen no row.
        """
        return self._state(name).covariance(centered)

    def mean(self, name: str) -> Tensor:
        """Mean of a layer's rows, float64; raises as :meth:`covariance` does. [C]"""
        return self._state(name).mean()

    def count(self, name: str) -> int:
        """Rows read of a layer; rows with a NaN or an infinity are not among them.

        Raises:
            KeyError: If no such layer is tracked.
        """
        reader = self.readers.get(name)
        if reader is not None and reader.state is None and name not in (self._synced or {}):
            return 0
        return int(self._state(name, needs_rows=False).count[0])

    def spectrum(self, name: str, centered: bool = False) -> Spectrum:
        """Eigenvalues of a layer's covariance; arguments and errors as of :meth:`covariance`."""
        return self._pending({name: self._state(name)}, centered).get()[name]

    def spectra(self, centered: bool = False) -> dict[str, Spectrum]:
        """Spectra of all layers that have seen a row: one batched eigenvalue call."""
        return self._start_spectra(centered).get()

    def _start_spectra(self, centered: bool = False) -> PendingSpectra:
        states: dict[str, CovarianceState | None] = dict(self._synced or {})
        if self._synced is None:
            for name, reader in self.readers.items():
                reader.flush()
                states[name] = reader.state
        return self._pending({n: s for n, s in states.items() if s is not None}, centered)

    def _pending(self, states: dict[str, CovarianceState], centered: bool) -> PendingSpectra:
        # Numbers of this step, and nothing that holds the tracker or its model.
        return PendingSpectra(states, centered)

    @property
    def steps_read(self) -> int:
        """Steps whose activations were read; at least 1."""
        return max(1, -(-self.steps // self.every))

    def summary(self) -> Summary:
        """What every layer's spectrum looks like so far.

        Returns:
            A flat dict of floats, for any logger; ``print`` shows it as a table.
        """
        return Summary(self.statuses())

    def statuses(self) -> list[LayerStatus]:
        """One line a layer: rows, spectrum, and a note where something is missing."""
        spectra, run = self.spectra(), self._run_facts()
        untracked = [name for name in self.notes if name not in self.readers]
        facts = [self._layer_facts(name) for name in [*self.names(), *untracked]]
        return [layer_status(layer, run, spectra.get(layer.name)) for layer in facts]

    def _run_facts(self) -> RunFacts:
        readers = self.unique_readers()
        return RunFacts(
            steps=self.steps,
            steps_read=self.steps_read,
            decay=self.decay,
            train_only=self.train_only,
            refusal=self.step.not_counted,
            has_calls=any(reader.total_calls for reader in readers),
            has_calls_lately=any(reader.calls for reader in readers),
        )

    def _layer_facts(self, name: str) -> LayerFacts:
        reason = self.notes.get(name, "")
        if name not in self.readers:
            return LayerFacts(name, reason=reason)
        reader = self.readers[name]
        state = (self._synced or {}).get(name, reader.state)
        channels = {tap.name: tap.channels for tap in self.taps}[name]
        count, skipped = (0, 0) if state is None else state.count.tolist()
        return LayerFacts(
            name=name,
            channels=channels or (0 if state is None else state.channels),
            count=count,
            skipped=skipped,
            weight=0.0 if state is None else float(state.weight),
            reason=reason,
            has_calls=reader.total_calls > 0,
            has_calls_lately=reader.calls > 0,
        )

    # keeping

    def snapshot(self, step: int | None = None) -> Snapshot:
        """Reads all spectra now and appends them to :attr:`history`.

        Args:
            step: Label; the number of steps by default.

        Returns:
            The snapshot.

        Raises:
            ValueError: If ``step`` comes before the last snapshot's.
            OSError: If the folder cannot be written; the snapshots before it are intact.
        """
        snapshot = Snapshot(
            step=self.steps if step is None else step, wall_s=time.time(), spectra=self.spectra()
        )
        self.history.append(snapshot)
        return snapshot

    def close(self) -> None:
        """See :meth:`fastcov.watch.watcher.Collector.close`; the history is complete then."""
        super().close()
        self._snapshots.deliver()

    def sync(self, group: dist.ProcessGroup | None = None) -> Tracker:
        """Shows the statistics of all ranks together until the next step: the only collective.

        Every rank must call it. Each rank goes on collecting its own rows afterwards, so calling
        it again counts nothing twice.

        Returns:
            This tracker.

        Raises:
            RuntimeError: If the ranks track different layers.
        """
        if not (dist.is_available() and dist.is_initialized()):
            return self
        states: dict[str, CovarianceState | None] = {}
        for name, reader in self.readers.items():
            reader.flush()
            states[name] = reader.state
        self._synced = sync_named_states(states, group)
        return self

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """See :meth:`fastcov.watch.keeper.Keeper.load_state_dict`; later snapshots are dropped."""
        super().load_state_dict(state_dict)
        self.history.truncate(self.steps + 1)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    # showing

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
            ValueError: If it has seen no row.
        """
        from fastcov.show.plot import plot_spectrum

        return plot_spectrum(self.spectra() if layer is None else self.spectrum(layer), ax=ax)

    def report(self, path: str | Path) -> Path:
        """Writes one self-contained HTML page about every layer.

        Args:
            path: Of the page; folders are made as needed.

        Returns:
            The page's path.

        Raises:
            ImportError: Without matplotlib (the extra ``plot``).
            OSError: If it cannot be written.
        """
        from fastcov.show.page import write_report

        return write_report(path, self.statuses(), history=self.history)


def track(
    model: nn.Module,
    *,
    include: Selector | None = None,
    exclude: Selector | None = None,
    where: Literal["output", "input", "both"] = "output",
    rows: Literal["auto", "all"] | int | float = "auto",
    every: int = 1,
    weighting: Literal["position", "image"] = "position",
    decay: float | None = None,
    max_channels: int = 4096,
    train_only: bool = True,
    snapshot_every: int | None = None,
    out: str | Path | None = None,
) -> Tracker:
    """Watches the feature covariance of a model's layers while it trains.

    Nothing else in the training loop changes. Call it before the first compiled forward. A CUDA
    graph of whole steps is read where two have run eagerly before; a warning names what cannot be.

    Args:
        model: The module whose forward is one step; where gradients accumulate, each micro-batch.
        include: Glob patterns on module names, module types, or a predicate of (name, module);
            None watches every convolution, Linear and MultiheadAttention.
        exclude: Likewise, taken away from ``include``.
        where: The output of each module, its input (named ``layer:in``; consumers of one tensor
            share one tap), or both.
        rows: "auto" spends 1 % of the training flops; "all"; an int of rows a layer and step; or
            a share of all rows in (0, 1].
        every: Reads steps 0, every, 2 * every, ...
        weighting: "position": each row weighs 1. "image": each index of dim 0 weighs 1 a step,
            shared by its positions.
        decay: Factor in (0, 1) on all that was seen before, once a step; None keeps everything.
        max_channels: Wider layers are skipped and listed in the summary.
        train_only: Whether only forwards of a model in training mode are steps.
        snapshot_every: Steps between snapshots of all spectra; None takes none. One that fails (a
            full disk) is a warning.
        out: Folder where rank 0 appends snapshots; None keeps them in memory.

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
    check_reading(where, rows, weighting, max_channels)
    check_decay(decay)
    check_steps("every", every)
    if snapshot_every is not None:
        check_steps("snapshot_every", snapshot_every)
    return Tracker(
        model,
        find_taps(model, include, exclude, where),
        rows=rows,
        every=every,
        weighting=weighting,
        decay=decay,
        max_channels=max_channels,
        train_only=train_only,
        snapshot_every=snapshot_every,
        out=out,
    )
