"""History: the snapshots of one training, in memory or in a folder."""

import itertools
import math
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastcov.spectra.folder import HistoryFolder
from fastcov.spectra.snapshot import Snapshot as Snapshot


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
        >>> from fastcov import Spectrum
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
        self.folder = None if folder is None else Path(folder)
        self._store = _Memory() if self.folder is None else HistoryFolder(self.folder)

    def __len__(self) -> int:
        return len(self._store.steps)

    def __iter__(self) -> Iterator[Snapshot]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Snapshot:
        length = len(self)
        if not -length <= index < length:
            raise IndexError(f"snapshot {index} of a history of {length}")
        return self._store.read(index % length)

    def __repr__(self) -> str:
        steps = self.steps()
        span = f", steps {steps[0]} to {steps[-1]}" if steps else ""
        place = "in memory" if self.folder is None else f"in {str(self.folder)!r}"
        return f"<History {place}: {len(self)} snapshots{span}>"

    def steps(self) -> list[int]:
        """Step of every snapshot, ascending; a step that was stored twice appears twice."""
        return list(self._store.steps)

    def channels(self) -> dict[str, int]:
        """Width of every layer in the last snapshot that has it, in order of first appearance."""
        widths: dict[str, int] = {}
        for index in range(len(self)):
            widths.update(self._store.channels(index))
        return widths

    def layers(self) -> list[str]:
        """Names of the layers of all snapshots, in order of first appearance."""
        return list(self.channels())

    def dims(
        self, threshold: float = 1e-3, relative: bool = True
    ) -> tuple[list[str], list[int], Tensor]:
        """Intrinsic dimension of every layer at every snapshot.

        Args:
            threshold: See ``Spectrum.dim``.
            relative: See ``Spectrum.dim``.

        Returns:
            Layer names, steps, and a float64 tensor that is NaN where a layer had no rows yet.
            [layers, steps]
        """
        layers = self.layers()
        table = torch.full((len(layers), len(self)), math.nan, dtype=torch.float64, device="cpu")
        for column, snapshot in enumerate(self):
            for row, name in enumerate(layers):
                if name in snapshot.spectra:
                    table[row, column] = snapshot.spectra[name].dim(threshold, relative)
        return layers, self.steps(), table

    def append(self, snapshot: Snapshot) -> None:
        """Addition of a snapshot at the end; with a folder, it is on disk when this returns.

        Args:
            snapshot: Snapshot whose step must not lie before the last one.

        Raises:
            ValueError: If its step lies before the last one, or another process wrote here.
            OSError: If the disk is full or not writable. Everything stored before is intact, and
                the same call may be repeated.
        """
        if len(self) and snapshot.step < (last := self._store.steps[-1]):
            raise ValueError(
                f"the snapshot of step {snapshot.step} comes after one of step {last}; "
                f"call truncate({snapshot.step}) first when resuming from an older checkpoint, or "
                "give a new run its own folder"
            )
        self._store.append(snapshot)

    def truncate(self, step: int) -> None:
        """Removal of the snapshots of a step and later, for a resume from an older checkpoint."""
        keep = sum(kept < step for kept in self._store.steps)
        if keep < len(self):
            self._store.truncate(keep)

    def start_anew(self) -> Path | None:
        """Removal of an earlier run's snapshots to a new folder ``earlier-1``, returned."""
        if self.folder is None or not len(self):
            return None
        numbers = itertools.count(1)
        target = next(p for n in numbers if not (p := self.folder / f"earlier-{n}").exists())
        target.mkdir()
        # The lines go first: without them the spectra are leftovers that the next append replaces.
        for name in ("history.jsonl", "spectra"):
            (self.folder / name).rename(target / name)
        self._store = HistoryFolder(self.folder)
        return target


class _Memory:
    """Snapshots in memory, with the methods of a ``HistoryFolder``."""

    def __init__(self) -> None:
        self._snapshots: list[Snapshot] = []
        self.steps: list[int] = []

    def channels(self, index: int) -> dict[str, int]:
        return {name: s.channels for name, s in self._snapshots[index].spectra.items()}

    def read(self, index: int) -> Snapshot:
        return self._snapshots[index]

    def append(self, snapshot: Snapshot) -> None:
        self._snapshots.append(snapshot)
        self.steps.append(snapshot.step)

    def truncate(self, keep: int) -> None:
        del self._snapshots[keep:], self.steps[keep:]


def load_history(folder: str | os.PathLike[str]) -> History:
    """History that a training left in a folder; nothing is written.

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
        if Path(folder).is_file():
            remedy = f"{folder} is a file: give the folder that holds it"
        elif inside:
            remedy = f"there is one in {' and in '.join(inside[:3])}: give that folder"
        elif Path(folder).is_dir():
            remedy += ", after its first snapshot: snapshot_every= or tracker.snapshot() takes them"
        raise FileNotFoundError(f"no history in {folder}: {path} does not exist; {remedy}")
    return History(folder)
