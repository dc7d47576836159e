"""Which share of its rows each reader reads, decided when it has seen its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from fastcov.rows.sequence import LayerLoad, read_fraction, rows_per_channel
from fastcov.stats.reader import Reader
from fastcov.watch.select import Tap


class RowPlan:
    """Spends a budget of rows over the readers of a model.

    Args:
        rows: "auto", "all", rows a layer and step, or a share of all rows.

    Attributes:
        rho: Rows per channel and step, found in the first step; None before, and where ``rows``
            is a number.
    """

    def __init__(self, rows: Literal["auto", "all"] | int | float) -> None:
        self.rows = rows
        self.rho: float | None = None

    @property
    def first_fraction(self) -> float | None:
        """What is known before any row was seen; None where the plan waits for a step."""
        if self.rows == "all":
            return 1.0
        return self.rows if isinstance(self.rows, float) else None

    def fractions(self, taps: Sequence[Tap], readers: Sequence[Reader]) -> dict[Reader, float]:
        """Shares of the rows to read, for readers that have just seen their first step.

        Args:
            taps: All of a model.
            readers: Of each tap; some share one.
        """
        unplanned = {
            reader: LayerLoad(reader.state.channels, reader.offered_rows, 0)
            for reader in dict.fromkeys(readers)
            if reader.fraction is None and reader.calls and reader.state is not None
        }
        if isinstance(self.rows, int):
            return {reader: min(1.0, self.rows / load.rows) for reader, load in unplanned.items()}
        if unplanned and self.rho is None:
            # What a shared tap feeds adds to the flops; its rows are read once.
            macs = dict.fromkeys(readers, 0)
            for tap, reader in zip(taps, readers, strict=True):
                macs[reader] += reader.offered_rows * tap.macs_per_row
            self.rho = rows_per_channel(
                [
                    LayerLoad(reader.state.channels, reader.offered_rows, macs[reader])
                    for reader in macs
                    if reader.state is not None
                ]
            )
        return {reader: read_fraction(load, self.rho or 0.0) for reader, load in unplanned.items()}
