"""A process killed before, or in the midst of, every single write of an append."""

from __future__ import annotations

import io
import os
from pathlib import Path

import torch

from fastcov.spectra.history import History, Snapshot, load_history
from fastcov.spectra.spectrum import Spectrum

KILLED = 9


def _snapshot(step: int) -> Snapshot:
    eigenvalues = torch.arange(8, 0, -1, dtype=torch.float64) + step
    spectrum = Spectrum(eigenvalues, 128 + step, float(eigenvalues.sum()), "conv1")
    return Snapshot(step, float(step), {"conv1": spectrum})


def _assert_holds(history: History, steps: list[int]) -> None:
    assert history.steps() == steps
    for snapshot in history:
        (spectrum,) = snapshot.spectra.values()
        assert torch.equal(
            spectrum.eigenvalues, _snapshot(snapshot.step).spectra["conv1"].eigenvalues
        )


def _append_and_die(folder: Path, moment: int) -> None:
    """In a forked child: appends, and is gone at one of its writes, renames, flushes or cuts."""
    passed = 0

    def dies_here() -> bool:
        nonlocal passed
        passed += 1
        return passed > moment

    def killing(name: str) -> None:
        real = getattr(os, name)

        def call(*arguments: object) -> object:
            if dies_here():
                os._exit(KILLED)
            return real(*arguments)

        setattr(os, name, call)

    class Dying(io.FileIO):
        """A file that may die in the midst of a write."""

        def write(self, content: bytes) -> int:
            if dies_here():
                super().write(content[: len(content) // 2])
                os._exit(KILLED)
            return super().write(content)

    def open_dying(path: Path, mode: str = "r", *_: object, **__: object) -> Dying:
        return Dying(path, mode)

    for name in ("fsync", "replace", "open", "unlink"):
        killing(name)
    Path.open = open_dying
    History(folder).append(_snapshot(1))
    os._exit(0)


def test_a_kill_at_every_write_leaves_a_history_that_loads_and_goes_on(tmp_path: Path) -> None:
    ends = []
    for moment in range(50):
        folder = tmp_path / str(moment)
        History(folder).append(_snapshot(0))
        child = os.fork()
        if child == 0:
            try:
                _append_and_die(folder, moment)
            finally:
                os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == 0:
            break
        assert code == KILLED
        stored = load_history(folder).steps()
        assert stored in ([0], [0, 1])
        _assert_holds(load_history(folder), stored)
        ends.append(stored)
        resumed = History(folder)
        resumed.truncate(1)
        resumed.append(_snapshot(1))
        resumed.append(_snapshot(2))
        _assert_holds(load_history(folder), [0, 1, 2])
        assert len(list((folder / "spectra").iterdir())) == 3
    assert 6 <= len(ends) < 50
    # The line alone makes a snapshot: before its write there is none, after it there is one.
    assert ends == sorted(ends)
    assert ends[0] == [0]
    assert ends[-1] == [0, 1]
