"""fastcov: the eigenspectrum of every layer while a network trains, and widths from it."""

from fastcov import ops
from fastcov.estimate import estimate
from fastcov.ops.backend import backends
from fastcov.spectra.history import History, load_history
from fastcov.spectra.spectrum import Spectrum
from fastcov.stats.state import CovarianceState
from fastcov.tracker import Tracker, track
from fastcov.version import __version__ as __version__
from fastcov.widths import WidthGroup, suggest_widths

__all__ = [
    "CovarianceState",
    "History",
    "Spectrum",
    "Tracker",
    "WidthGroup",
    "backends",
    "estimate",
    "load_history",
    "ops",
    "suggest_widths",
    "track",
]
