"""The updates of states that rows in buffers bring: once in many steps, so no median shows them.

With the default a layer's buffer is added to its state once in 8 to 170 steps for ResNet-50 with 8
images of 112 pixels: rows of the buffer over rows read a step. Buffers are emptied in different
steps, so 40 timed steps hold their share of the updates in sum, but the few that take long are in
so few of them that the median holds almost none. So updates are kept out of the timed steps, and
out only: what one costs is timed apart, and its share of every step is added to the times and
ratios.
"""

from __future__ import annotations

import torch

import fastcov
from fastcov.bench.contest import Row, Setting
from fastcov.bench.covariance import update_seconds
from fastcov.stats.buffering import buffer_rows, direct_rows

_RARE_STEPS = 10  # between updates of a layer; those that come sooner are left in the timed steps


class Updates:
    """The updates of one tracker, in or between the timed steps.

    Args:
        tracker: Tracker after the steps that planned its sampling.
    """

    def __init__(self, tracker: fastcov.Tracker) -> None:
        self._tracker = tracker

    def _rare(self) -> list[tuple[int, float]]:
        """Channels, and steps between two updates, of each layer on which updates are rare."""
        rare = []
        for layer in self._tracker.watcher.taps.unique_layers:
            if layer.state is None or not layer.fraction or layer.state.moment.is_cuda:
                continue  # added in one launch at the end of a step: the mean of all steps has it
            channels, read = layer.state.channels, layer.offered_rows * layer.fraction
            if layer.fraction == 1 and read >= layer.calls * direct_rows(channels, is_host=True):
                continue  # added at once
            steps = buffer_rows(channels, is_host=True) / read if read else 0.0
            if steps > _RARE_STEPS:
                rare.append((channels, steps))
        return rare

    def hold_back(self) -> None:
        """Emptying of the buffers, untimed, so that none is full in the step that follows."""
        if not self._rare():
            return
        for layer in self._tracker.watcher.taps.unique_layers:
            layer.flush()

    def add_to(self, row: Row, untracked: Row, dtype: torch.dtype, setting: Setting) -> None:
        """Correction of the tracker's row by each step's share of the updates held back.

        Args:
            row: Row whose times and ratios grow; its notes get the share.
            untracked: Row that the ratios refer to.
            dtype: Dtype of the layers' rows.
            setting: Setting of the contest.
        """
        rare = self._rare()
        if not rare:
            return
        seconds = update_seconds(sorted({width for width, _ in rare}), dtype, setting)
        share_s = sum(seconds[width] / steps for width, steps in rare)
        row.notes["steps_between_updates"] = min(steps for _, steps in rare)
        row.notes["updates_s"] = share_s
        row.notes["ratio_without_updates"] = row.ratio
        for name in ("p20_s", "p50_s", "p80_s", "low_s", "high_s"):
            setattr(row, name, getattr(row, name) + share_s)
        for name in ("ratio", "ratio_low", "ratio_high"):
            setattr(row, name, getattr(row, name) + share_s / untracked.p50_s)
