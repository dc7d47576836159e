"""Keeper: merging, saving and restoring what was collected."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from fastcov.stats.reader import Reader
from fastcov.watch.watcher import Collector

_FORMAT = 1


class Keeper(Collector):
    """The half of a tracker that moves statistics between processes, runs and files."""

    def merge(self, other: Keeper) -> None:
        """Adds what another tracker of the same layers has seen; that one stays as it is.

        Args:
            other: Of a model with these layers, whatever its device.

        Raises:
            TypeError: If ``other`` is no tracker.
            ValueError: If no layer is common, a width differs, or decay is used and the trackers
                stand at different steps.
        """
        if not isinstance(other, Keeper):
            raise TypeError(f"other is a {type(other).__name__}, expected what fastcov.track gives")
        common = [name for name in self.readers if name in other.readers]
        if not common:
            raise ValueError(
                f"nothing to merge: no layer in common; this tracker has {self.names()[:3]}..., "
                f"the other {other.names()[:3]}..."
            )
        if self.decay != other.decay or (self.decay is not None and self.steps != other.steps):
            raise ValueError(
                f"cannot merge: decay {self.decay} at step {self.steps} with decay {other.decay} "
                f"at step {other.steps}; decayed states must stand at the same step"
            )
        self._synced = None
        self.leave_device()
        done: set[Reader] = set()
        for name in common:
            mine, theirs = self.readers[name], other.readers[name]
            if mine not in done:
                done.add(mine)
                mine.merge(theirs, self.steps)
        if self.decay is None:
            self.step.done += other.steps

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue: tensors and numbers only, no collective.

        After :meth:`Tracker.sync`, or of a single process, it holds all rows: load it on any number
        of ranks, rank 0 then carries them and the others start at zero. Else it holds this rank's
        rows: as many ranks may load them again, each its own.
        """
        rank, ranks = _rank_and_ranks()
        layers = {}
        for reader in self.unique_readers():
            layers[reader.name] = reader.state_dict()
            if self._synced is not None and reader.name in self._synced:
                layers[reader.name]["state"] = self._synced[reader.name].state_dict()
        return {
            "format": _FORMAT,
            "steps": self.steps,
            "rho": self._plan.rho,
            "is_synced": self._synced is not None or ranks == 1,
            "rank": rank,
            "world_size": ranks,
            "shared": {n: r.name for n, r in self.readers.items() if n != r.name},
            "layers": layers,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continues from :meth:`state_dict`.

        Raises:
            ValueError: If it is of another format, holds layers that are not tracked here, or is
                one of several ranks' own rows and this is another rank, or one of more or fewer.
        """
        if state_dict.get("format") != _FORMAT:
            raise ValueError(
                f"state_dict has format {state_dict.get('format')!r}, expected {_FORMAT}: it was "
                "not written by Tracker.state_dict() of this version"
            )
        layers = state_dict["layers"]
        unknown = [name for name in layers if name not in self.readers]
        if unknown:
            raise ValueError(
                f"state_dict holds layers that are not tracked here: {', '.join(unknown[:3])}; "
                "track the same model with the same include and exclude"
            )
        rank, ranks = _rank_and_ranks()
        saved_rank = state_dict.get("rank", rank)  # older ones do not tell
        saved_ranks = state_dict.get("world_size", ranks)
        if not state_dict["is_synced"] and (saved_rank, saved_ranks) != (rank, ranks):
            raise ValueError(
                f"state_dict holds the rows of rank {saved_rank} of {saved_ranks} alone, "
                f"but rank {rank} of {ranks} loads it: rows would be lost or counted twice. Call "
                "sync() on every rank before state_dict(), then any number of ranks may load it; "
                f"or load on {saved_ranks} ranks, each its own"
            )
        is_elsewhere = state_dict["is_synced"] and rank > 0
        self._synced = None
        self.leave_device()
        self.step.done = state_dict["steps"]
        self._plan.rho = state_dict["rho"]
        tap_of = {tap.name: index for index, tap in enumerate(self.taps)}
        for name, owner in state_dict["shared"].items():
            self._inputs.owner[tap_of[name]] = tap_of[owner]
            self._assign(tap_of[name], self._by_tap[tap_of[owner]])
        for name, saved in layers.items():
            self.readers[name].load_state_dict(saved, with_rows=not is_elsewhere)

    def reset(self) -> None:
        """Forgets every row and step; what was planned from the first step's shapes stays."""
        self._synced = None
        self.leave_device()
        self.step.done = 0
        for reader in self.unique_readers():
            reader.reset()


def _rank_and_ranks() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1
