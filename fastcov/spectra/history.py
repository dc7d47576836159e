"""Snapshots of spectra over training, and how the spectra of two trainings differ."""

import math
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fastcov.spectra.folder import HistoryFolder
from fastcov.spectra.spectrum import Spectrum


@dataclass(frozen=True)
class Snapshot:
    """Spectra of all layers at one step.

    Args:
        step: Steps done, at least 0.
        wall_s: Wall clock when it was taken, in seconds; the tracker writes Unix time.
        spectra: Layer name to spectrum; a layer without rows is left out.

    Raises:
        ValueError: If ``step`` or ``wall_s`` is negative or not finite.
    """

    step: int
    wall_s: float
    spectra: dict[str, Spectrum]

    def __post_init__(self) -> None:
        if isinstance(self.step, bool) or not isinstance(self.step, int) or self.step < 0:
            raise ValueError(f"step must be an integer >= 0, got {self.step!r}")
        if not (math.isfinite(self.wall_s) and self.wall_s >= 0):
            raise ValueError(f"wall_s must be finite and >= 0 seconds, got {self.wall_s!r}")


class History:
    """Snapshots in order of their steps, in memory or appended to a folder as they come.

    In a folder, memory does not grow with the number of snapshots, a kill at any moment loses at
    most the snapshot being written, and opening the folder again continues it.

    Args:
        folder: Created by the first append; an existing history in it is continued. None keeps
            everything in memory.

    Raises:
        ValueError: If the folder holds a history that cannot be read.

    Example:
        >>> history = History()
        >>> spectrum = Spectrum(torch.tensor([4.0, 1.0, 0.0]), count=64, total=5.0, name="conv1")
        >>> for step in (0, 100):
        ...     history.append(Snapshot(step, wall_s=step / 10, spectra={"conv1": spectrum}))
        >>> len(history), history.steps(), history[-1].spectra["conv1"].dim()
        (2, [0, 100], 2)
        >>> history.dims()
        (['conv1'], [0, 100], tensor([[2., 2.]], dtype=torch.float64))
    """

    def __init__(self, folder: str | os.PathLike[str] | None = None) -> None:
        self._stored = None if folder is None else HistoryFolder(Path(folder))
        self._in_memory: list[Snapshot] = []

    @property
    def folder(self) -> Path | None:
        """Where the snapshots are, or None when they are in memory."""
        return None if self._stored is None else self._stored.folder

    def __len__(self) -> int:
        return len(self._in_memory if self._stored is None else self._stored.steps)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Snapshot:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"snapshot {index} of a history of {length}")
        if self._stored is None:
            return self._in_memory[index]
        return Snapshot(*self._stored.read(index % length))

    def __repr__(self) -> str:
        steps = self.steps()
        span = f", steps {steps[0]} to {steps[-1]}" if steps else ""
        place = "in memory" if self.folder is None else f"in {str(self.folder)!r}"
        return f"<History {place}: {len(self)} snapshots{span}>"

    def steps(self) -> list[int]:
        """Step of every snapshot, ascending; a step that was stored twice appears twice."""
        if self._stored is None:
            return [snapshot.step for snapshot in self._in_memory]
        return self._stored.steps.tolist()

    def layers(self) -> list[str]:
        """Names of the layers of all snapshots, in order of first appearance."""
        names: dict[str, None] = {}
        for index in range(len(self)):
            if self._stored is None:
                names.update(dict.fromkeys(self._in_memory[index].spectra))
            else:
                names.update(dict.fromkeys(self._stored.layer_names(index)))
        return list(names)

    def dims(
        self, threshold: float = 1e-3, relative: bool = True
    ) -> tuple[list[str], list[int], Tensor]:
        """Intrinsic dimension of every layer at every snapshot.

        Args:
            threshold: As in ``Spectrum.dim``.
            relative: As in ``Spectrum.dim``.

        Returns:
            Layer names, steps, and a float64 tensor that is NaN where a layer had no rows yet.
            [layers, steps]
        """
        row_of: dict[str, int] = {}
        columns: list[dict[int, int]] = []
        for snapshot in self:
            columns.append(
                {
                    row_of.setdefault(name, len(row_of)): spectrum.dim(threshold, relative)
                    for name, spectrum in snapshot.spectra.items()
                }
            )
        table = torch.full((len(row_of), len(columns)), math.nan, dtype=torch.float64, device="cpu")
        for index, column in enumerate(columns):
            for row, value in column.items():
                table[row, index] = value
        return list(row_of), self.steps(), table

    def append(self, snapshot: Snapshot) -> None:
        """Adds a snapshot; with a folder, it is on disk when this returns.

        Args:
            snapshot: Its step must not lie before the last one.

        Raises:
            ValueError: If its step lies before the last one, or another process wrote here.
            OSError: If the disk is full or not writable. Everything stored before is intact, and
                the same call may be repeated.
        """
        steps = self._stored.steps if self._stored is not None else array("q", self.steps()[-1:])
        if len(steps) and snapshot.step < steps[-1]:
            raise ValueError(
                f"the snapshot of step {snapshot.step} comes after one of step {steps[-1]}; "
                f"call truncate({snapshot.step}) first when resuming from an older checkpoint, or "
                "give a new run its own folder"
            )
        if self._stored is None:
            self._in_memory.append(snapshot)
        else:
            self._stored.append(snapshot.step, snapshot.wall_s, snapshot.spectra)

    def truncate(self, step: int) -> None:
        """Drops the snapshots of this step and later: before resuming from an older checkpoint.

        Args:
            step: First step to drop.
        """
        keep = sum(kept < step for kept in self.steps())
        if keep == len(self):
            return
        if self._stored is None:
            del self._in_memory[keep:]
        else:
            self._stored.truncate(keep)


def load_history(folder: str | os.PathLike[str]) -> History:
    """Opens the history that a training left in a folder; nothing is written.

    Args:
        folder: The ``out`` folder of ``fastcov.track``.

    Returns:
        The history; its spectra are read when asked for.

    Raises:
        FileNotFoundError: If there is no history in the folder.
        ValueError: If it cannot be read.
    """
    path = Path(folder) / "history.jsonl"
    if not path.is_file():
        inside = sorted(str(found.parent) for found in Path(folder).glob("*/history.jsonl"))
        remedy = "give the folder that was passed as out= to fastcov.track"
        if inside:
            remedy = f"there is one in {' and in '.join(inside[:3])}: give that folder"
        raise FileNotFoundError(f"no history in {folder}: {path} does not exist; {remedy}")
    return History(folder)


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One layer in two trainings.

    Args:
        name: Layer name.
        steps_a: Steps at which the first training has a spectrum of the layer.
        dims_a: Intrinsic dimension (relative, 1e-3 unless chosen otherwise) at these steps.
        steps_b: As ``steps_a``, second training.
        dims_b: As ``dims_a``, second training.
        end_a: Last spectrum of the first training.
        end_b: Last spectrum of the second training.
        distance: Between ``end_a`` and ``end_b``; see :func:`spectral_distance`.
        common_steps: Steps at which both have a spectrum.
        distances: Distance at each of the common steps.
    """

    name: str
    steps_a: list[int]
    dims_a: list[int]
    steps_b: list[int]
    dims_b: list[int]
    end_a: Spectrum
    end_b: Spectrum
    distance: float
    common_steps: list[int]
    distances: list[float]


@dataclass(frozen=True, eq=False)
class Comparison:
    """Two trainings, layer by layer; see :func:`compare_histories`.

    Args:
        layers: Layers of both, in the first training's order.
        only_a: Layers that only the first training has.
        only_b: Layers that only the second training has.
        label_a: Name of the first training, its folder where it has one.
        label_b: Name of the second training.
        threshold: Of the intrinsic dimensions, relative to the largest eigenvalue.
    """

    layers: tuple[LayerComparison, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    label_a: str
    label_b: str
    threshold: float


def spectral_distance(a: Spectrum, b: Spectrum) -> float:
    r"""Share of the variance that would have to change rank to turn one spectrum into the other.

    .. math:: d = \tfrac12 \sum_i |p_i - q_i|, \quad p_i = \lambda_i^a / \sum_j \lambda_j^a

    with eigenvalues in descending order and the shorter list filled with zeros: the total variation
    distance of the trace-normalised spectra. 0 for the same shape at any scale, 1 at most. It
    compares how variance is spread, not in which directions: equal spectra may span different
    subspaces.

    Args:
        a: Spectrum of any width.
        b: Spectrum of any width.

    Returns:
        Distance in [0, 1]; 1 where exactly one of them has no variance, 0 where neither has.

    Example:
        >>> flat = Spectrum(torch.tensor([1.0, 1.0]), count=64, total=2.0)
        >>> steep = Spectrum(torch.tensor([9.0, 1.0, 0.0]), count=64, total=10.0)
        >>> round(spectral_distance(flat, steep), 6)
        0.4
    """
    width = max(a.channels, b.channels)
    shares = torch.zeros(2, width, dtype=torch.float64, device="cpu")
    for row, spectrum in enumerate((a, b)):
        largest = spectrum.eigenvalues[0].clamp_min(torch.finfo(torch.float64).tiny)
        relative = spectrum.eigenvalues / largest
        shares[row, : spectrum.channels] = relative / relative.sum().clamp_min(1e-300)
    empty = [not bool(spectrum.eigenvalues[0] > 0) for spectrum in (a, b)]
    if any(empty):
        return 0.0 if all(empty) else 1.0
    return float((shares[0] - shares[1]).abs().sum() / 2)


def compare_histories(
    a: History,
    b: History,
    *,
    threshold: float = 1e-3,
    label_a: str | None = None,
    label_b: str | None = None,
) -> Comparison:
    """Compares the spectra of two trainings over their steps, layer by layer.

    Args:
        a: First training.
        b: Second training; widths may differ.
        threshold: Of the intrinsic dimension, relative to the largest eigenvalue.
        label_a: Name for tables and figures; None takes the folder's.
        label_b: As ``label_a``.

    Returns:
        Dimensions over steps, last spectra and their distance for the layers of both; the names of
        the others.

    Raises:
        ValueError: If a history is empty, or they have no layer in common.
    """
    labels = [
        label or (str(history.folder) if history.folder else side)
        for label, history, side in ((label_a, a, "a"), (label_b, b, "b"))
    ]
    for label, history in zip(labels, (a, b), strict=True):
        if not len(history):
            raise ValueError(f"the history {label!r} has no snapshot; nothing to compare")
    names_a, names_b = a.layers(), b.layers()
    common = [name for name in names_a if name in set(names_b)]
    if not common:
        raise ValueError(
            f"{labels[0]!r} and {labels[1]!r} have no layer name in common "
            f"(first of each: {names_a[:1]}, {names_b[:1]}); compare runs of one architecture"
        )
    tracks_a, tracks_b = ({name: _Track() for name in common} for _ in range(2))
    met: dict[str, tuple[list[int], list[float]]] = {name: ([], []) for name in common}
    for snapshot_a, snapshot_b in _side_by_side(a, b):
        for snapshot, tracks in ((snapshot_a, tracks_a), (snapshot_b, tracks_b)):
            for name in common:
                if snapshot is not None and name in snapshot.spectra:
                    tracks[name].add(snapshot.step, snapshot.spectra[name], threshold)
        if snapshot_a is not None and snapshot_b is not None:
            for name in set(common) & set(snapshot_a.spectra) & set(snapshot_b.spectra):
                met[name][0].append(snapshot_a.step)
                met[name][1].append(
                    spectral_distance(snapshot_a.spectra[name], snapshot_b.spectra[name])
                )
    layers = [
        LayerComparison(
            name,
            tracks_a[name].steps,
            tracks_a[name].dims,
            tracks_b[name].steps,
            tracks_b[name].dims,
            tracks_a[name].end,
            tracks_b[name].end,
            spectral_distance(tracks_a[name].end, tracks_b[name].end),
            *met[name],
        )
        for name in common
    ]
    return Comparison(
        tuple(layers),
        tuple(name for name in names_a if name not in set(common)),
        tuple(name for name in names_b if name not in set(common)),
        labels[0],
        labels[1],
        threshold,
    )


class _Track:
    """What is kept of one layer while its snapshots pass by."""

    end: Spectrum

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.dims: list[int] = []

    def add(self, step: int, spectrum: Spectrum, threshold: float) -> None:
        self.steps.append(step)
        self.dims.append(spectrum.dim(threshold))
        self.end = spectrum


def _side_by_side(a: History, b: History) -> Iterator[tuple[Snapshot | None, Snapshot | None]]:
    """Merges by step, one snapshot of each in memory; of a step stored twice the last counts."""
    last_of = [{step: index for index, step in enumerate(h.steps())} for h in (a, b)]
    for step in sorted(last_of[0].keys() | last_of[1].keys()):
        yield (
            a[last_of[0][step]] if step in last_of[0] else None,
            b[last_of[1][step]] if step in last_of[1] else None,
        )
