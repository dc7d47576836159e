"""Status of every layer: its numbers, a note on the numbers, or the reason why there are none.

A tracker states facts (:class:`RunFacts`, :class:`LayerFacts`); the rest are pure functions.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fastcov.rows.policy import ENOUGH_ROWS_PER_CHANNEL
from fastcov.show.tables import text_table
from fastcov.spectra.spectrum import Spectrum

_ROUNDING_SHARE = 0.01  # of all eigenvalues but the first, that negative ones may sum up to
_FARTHEST_MEAN = 1e3  # squared, in variances: 1e-5 of it is 1 %
_MEAN_ROUNDING = 1e-12  # of a squared mean: rows that are all the same have no variance
_FLOAT64_ROUNDING = 1e-12  # of the largest eigenvalue: error of the solver
COMPILED_BEFORE = (
    "steps were made, but no hook ran: the model was compiled before it was tracked; "
    "call track() before the first compiled forward, or torch.compiler.reset()"
)


@dataclass(frozen=True)
class RunFacts:
    """Facts of a run on which the notes of all layers rest.

    Args:
        steps: Steps done.
        steps_read: Steps whose activations were read.
        decay: Factor on the past, once a step; None keeps everything.
        train_only: True if only forwards in training mode are steps.
        refusal: Reason why the last forward that might have been a step was none; empty if it was.
        has_calls: True if some watched module was called in some step.
        has_calls_lately: True if some watched module was called in the last step.
        is_compiled: True if some module of the model was compiled.
    """

    steps: int
    steps_read: int
    decay: float | None
    train_only: bool
    refusal: str
    has_calls: bool
    has_calls_lately: bool
    is_compiled: bool


@dataclass(frozen=True)
class LayerFacts:
    """Facts of one layer.

    Args:
        name: Layer name.
        channels: Width C, 0 where no forward has shown it.
        sketch: Channels that its rows are projected to; 0 where all are kept.
        count: Rows read.
        skipped: Rows left out because they held NaN or inf.
        weight: Normaliser of the covariance; the count unless rows are weighted or decay.
        mean_square: Squared norm of the rows' mean.
        mean_from_shift: Squared distance of the mean from the vector that rows are read about.
        reason: Sentence of the tracker on why the layer is not read, or not wholly; else empty.
        has_calls: True if its module was called in some step.
        has_calls_lately: True if its module was called in the last step.
    """

    name: str
    channels: int = 0
    count: int = 0
    skipped: int = 0
    weight: float = 0.0
    mean_square: float = 0.0
    mean_from_shift: float = 0.0
    reason: str = ""
    has_calls: bool = False
    has_calls_lately: bool = False
    sketch: int = 0


@dataclass(frozen=True, eq=False)
class LayerStatus:
    """Numbers of one layer, and a note on them.

    Args:
        name: Layer name.
        channels: Width C, 0 where no forward has shown it.
        count: Rows read.
        skipped: Rows left out because they held NaN or inf.
        weight: Normaliser of the covariance; the count unless rows are weighted or decay.
        spectrum: None where no row was read.
        note: Reason why something is missing; empty where nothing is.
    """

    name: str
    channels: int
    count: int
    skipped: int
    weight: float
    spectrum: Spectrum | None
    note: str = ""

    @property
    def rows_wanted(self) -> int:
        """Rows for a trustworthy spectrum."""
        return ENOUGH_ROWS_PER_CHANNEL * self.channels


def layer_status(layer: LayerFacts, run: RunFacts, spectrum: Spectrum | None) -> LayerStatus:
    """Status of a layer: its facts, its spectrum if a row was read, and the note on both."""
    return LayerStatus(
        layer.name,
        layer.channels,
        layer.count,
        layer.skipped,
        layer.weight,
        spectrum,
        "; ".join([*_notes(layer, run), *_rounding_note(spectrum), *_mean_note(layer, spectrum)]),
    )


def _rounding_note(spectrum: Spectrum | None) -> list[str]:
    # A second moment has no negative eigenvalue. A spectrum holds those that were found as zeros,
    # so its sum exceeds the trace by them: that much is rounding.
    if spectrum is None:
        return []
    values = spectrum.eigenvalues
    largest, total = float(values[0]), float(values.sum())
    negative = total - spectrum.total
    if negative <= max(_ROUNDING_SHARE * (total - largest), _FLOAT64_ROUNDING * largest):
        return []
    return [
        f"small eigenvalues are rounding: negative ones sum up to {negative:.2g} beside a largest "
        f'of {largest:.2g}; track with precision="float64"'
    ]


def _mean_note(layer: LayerFacts, spectrum: Spectrum | None) -> list[str]:
    # Moments are right within 1e-5 of their largest entry, about the shift: GPUs read 16-bit rows
    # about 0, and under decay about the first rows' mean. A centred covariance is their difference.
    if spectrum is None or layer.mean_from_shift <= _MEAN_ROUNDING * layer.mean_square:
        return []
    variance = max(spectrum.total - layer.mean_square, 0.0)
    if layer.mean_from_shift <= _FARTHEST_MEAN * variance:
        return []
    return [
        f"the mean lies {math.sqrt(layer.mean_from_shift):.2g} from where rows are read, beside a "
        f"standard deviation of {math.sqrt(variance):.2g}: centred figures may be off by more than "
        '1 %; track with precision="float64"'
    ]


def _call(run: RunFacts) -> str:
    mode = " in train(), or track with train_only=False" if run.train_only else ""
    return f": call the tracked model{mode}"


def why_empty(layer: LayerFacts, run: RunFacts) -> str:
    """Clause on why no row of a layer was read."""
    if layer.reason:
        return layer.reason
    if run.steps == 0:
        mode = "training-mode " if run.train_only else ""
        if run.refusal:
            remedy = f" ({run.refusal}; track the module that is called)"
        elif run.is_compiled:
            remedy = f"{_call(run)}; if it was compiled before, torch.compiler.reset()"
        else:
            remedy = _call(run)
        return f"no {mode}forward of the whole model has run{remedy}"
    if not run.has_calls:
        return (
            COMPILED_BEFORE
            if run.is_compiled
            else "steps were made, but no watched module was called: their parents may use the "
            "weights themselves, as fused experts do; include the parents"
        )
    if not layer.has_calls:
        return (
            "its module was not called (its parent may use its weights itself), or gave no "
            "floating-point tensor with a row"
        )
    if layer.skipped:
        return "every row held a NaN or an infinity"
    return "the sampling has not reached it yet"


def _notes(layer: LayerFacts, run: RunFacts) -> list[str]:
    notes = [f"{layer.skipped} rows with NaN or inf skipped"] if layer.skipped else []
    if layer.reason:
        notes.append(layer.reason)
    if layer.sketch:
        notes.append(f"sketched to {layer.sketch} channels: estimates, but for the trace")
    if layer.count == 0:
        return notes if layer.reason else [*notes, why_empty(layer, run)]
    if run.has_calls_lately and not layer.has_calls_lately:
        notes.append("its module did not run in the last step: replaced since, or optional")
    wanted = ENOUGH_ROWS_PER_CHANNEL * layer.channels
    if (most := _most_independent_rows(run, layer.count)) < wanted:
        notes.append(
            f"decay={run.decay} is worth {most} rows, fewer than {ENOUGH_ROWS_PER_CHANNEL} a "
            "channel: raise rows or decay"
        )
    elif layer.count < wanted:
        steps = -(-(wanted - layer.count) * max(1, run.steps) // layer.count)
        notes.append(f"about {steps} more steps until {ENOUGH_ROWS_PER_CHANNEL} rows a channel")
    return notes


def _most_independent_rows(run: RunFacts, count: int) -> float:
    """Rows that the decay's window is worth, however long it is read; infinite without decay."""
    # With decay d a step weighs d times the next: about (1 + d) / (1 - d) steps count.
    if run.decay is None or run.decay == 1.0:
        return math.inf
    return round(count / run.steps_read * (1 + run.decay) / (1 - run.decay))


class Measure(NamedTuple):
    """Number read off a spectrum: its key in a summary, and its column in a table.

    Args:
        key: Last part of the summary's keys.
        read: Function of a spectrum.
        heading: Heading of the column; empty where the table leaves it out.
        meaning: Meaning of the number, for the legend.
        digits: After the decimal point in the table.
    """

    key: str
    read: Callable[[Spectrum], float]
    heading: str = ""
    meaning: str = ""
    digits: int = 0


MEASURES = (
    Measure("dim", Spectrum.dim, "dim", "eigenvalues above 1e-3 of the largest"),
    Measure(
        "rank_at_99",
        Spectrum.rank_at,
        "rank 99 %",
        "fewest directions that hold 99 % of the variance",
    ),
    Measure(
        "dof",
        Spectrum.dof,
        "dof",
        "degrees of freedom, the sum of l / (l + 1e-3 of the largest) over all eigenvalues l",
        1,
    ),
    Measure(
        "participation_ratio",
        Spectrum.participation_ratio,
        "part. ratio",
        "participation ratio, squared trace over squared Frobenius norm",
        1,
    ),
    Measure("effective_rank", Spectrum.effective_rank),
    Measure("stable_rank", Spectrum.stable_rank),
)
"""All measures of a summary, in the order of the table."""

_COLUMNS = [measure for measure in MEASURES if measure.heading]
HEADINGS = ("layer", "channels", "rows", *(measure.heading for measure in _COLUMNS), "note")
"""Headings of a summary's table."""


class Summary(dict[str, float]):
    """Flat dict of floats for any logger; printed, a table with one line a layer.

    Keys are ``layer/measure``: channels, rows and skipped always; those of :data:`MEASURES` where
    the layer has a spectrum.

    Args:
        statuses: One a layer, in the order of the table.
        remarks: Lines below the table.

    Example:
        >>> spectrum = Spectrum(torch.tensor([3.0, 1.0, 0.0]), count=64, total=4.0)
        >>> summary = Summary([LayerStatus("conv1", 3, 64, 0, 64.0, spectrum)])
        >>> summary["conv1/dim"], round(summary["conv1/participation_ratio"], 6)
        (2.0, 1.6)
        >>> print(summary)
        layer  channels  rows  dim  rank 99 %  dof  part. ratio  note
        -----  --------  ----  ---  ---------  ---  -----------  ----
        conv1         3    64    2          2  2.0          1.6
    """

    def __init__(self, statuses: Sequence[LayerStatus], remarks: Sequence[str] = ()) -> None:
        super().__init__()
        self.statuses = tuple(statuses)
        self.remarks = tuple(remarks)
        for status in self.statuses:
            self[f"{status.name}/channels"] = float(status.channels)
            self[f"{status.name}/rows"] = float(status.count)
            self[f"{status.name}/skipped"] = float(status.skipped)
            if status.spectrum is not None:
                for measure in MEASURES:
                    self[f"{status.name}/{measure.key}"] = float(measure.read(status.spectrum))

    @property
    def spectra(self) -> dict[str, Spectrum]:
        """Spectra of the layers that have one, by name."""
        return {s.name: s.spectrum for s in self.statuses if s.spectrum is not None}

    def __str__(self) -> str:
        return "\n".join([text_table(HEADINGS, self.rows()), *self.remarks])

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, one line a layer."""
        return [
            (
                status.name,
                str(status.channels or ""),
                str(status.count),
                *(
                    ""
                    if status.spectrum is None
                    else f"{self[f'{status.name}/{measure.key}']:.{measure.digits}f}"
                    for measure in _COLUMNS
                ),
                "; ".join(filter(None, [status.note or _fallback_note(status), _bounds(status)])),
            )
            for status in self.statuses
        ]


def _bounds(status: LayerStatus) -> str:
    if status.spectrum is None or status.spectrum.sketch is None:
        return ""
    low, high = status.spectrum.stable_rank_interval
    return f"stable rank between {low:.3g} and {high:.3g}"


def _fallback_note(status: LayerStatus) -> str:
    if status.count == 0:
        return "no row"
    if status.count < status.rows_wanted:
        return f"only {status.count} of {status.rows_wanted} rows: eigenvalues are uncertain"
    return ""
