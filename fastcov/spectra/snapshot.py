"""Snapshot: the spectra of all layers at one step."""

import math
from dataclasses import dataclass

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
