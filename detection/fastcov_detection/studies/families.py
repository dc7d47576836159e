r"""Two families of runs: do their spectra differ by more than seeds do?

The question of Shinya, Simo-Serra and Suzuki (arXiv 1909.04021), whether detectors from scratch and
from a pretrained backbone converge to similar models, asked with several seeds a side. Of every
layer, the final spectra of all runs are compared pair by pair. What separates the families is

.. math:: s = \overline{d}_{\text{between}} - \overline{d}_{\text{within}}

Where the families do not differ, any other division of the runs into two groups of these sizes
would separate as much: the p value is the share of divisions whose separation is at least as large,
for each layer and for the mean over layers (one division for all layers at once).

A layer whose dimension is as large as its weights allow in every run cannot tell anything by its
dimension; it is left out and counted.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from numpy.typing import NDArray

from fastcov import History, Spectrum, load_history
from fastcov.spectra.spectrum import spectral_distance
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_file, write_text
from fastcov_detection.search.verdicts import mean_and_error
from fastcov_detection.studies.ceilings import layer_ceilings
from fastcov_detection.train.folder import read_run_result

_MOST_DIVISIONS = 20_000
_THRESHOLD = 1e-3
_COLUMNS = 6


@dataclass(frozen=True)
class LayerFamilies:
    """One layer in both families.

    ``dims_a`` and ``dims_b`` are the final dimensions by run, ``ceiling`` the largest one that the
    layer's weights allow. ``between`` and ``within`` are mean distances of final spectra.
    """

    name: str
    ceiling: int
    dims_a: list[int]
    dims_b: list[int]
    between: float
    within: float
    p: float

    @property
    def is_at_ceiling(self) -> bool:
        """True where every run's dimension is the largest possible one."""
        return all(dim >= self.ceiling for dim in (*self.dims_a, *self.dims_b))


@dataclass(frozen=True)
class Families:
    """Two families of runs compared; ``p`` is that of the mean over layers below their ceiling."""

    label_a: str
    label_b: str
    ap_a: list[float]
    ap_b: list[float]
    layers: list[LayerFamilies]
    separation: float
    p: float
    divisions: int

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"at_ceiling": sum(layer.is_at_ceiling for layer in self.layers)}


def compare_families(a: Sequence[Path], b: Sequence[Path], out: Path) -> Families:
    """Compares two families of finished runs and writes ``families.json`` and ``families.png``.

    Args:
        a: Run folders of the first family, one for each seed.
        b: Those of the second one.
        out: Folder to write.

    Raises:
        DataError: If a family has fewer than two runs, or runs lack snapshots or share no layer.
    """
    for runs in (a, b):
        if len(runs) < 2:
            raise DataError(
                f"a family needs at least two runs, got {', '.join(map(str, runs)) or 'none'}"
            )
    histories = [_history(run) for run in (*a, *b)]
    finals = [history[-1].spectra for history in histories]
    names = [name for name in finals[0] if all(name in spectra for spectra in finals)]
    if not names:
        raise DataError(f"{a[0]} and {b[0]} share no layer; track the same part of both")
    ceilings = layer_ceilings(a[0])
    found = divide(
        {name: [spectra[name] for spectra in finals] for name in names},
        len(a),
        {name: ceilings.get(name, finals[0][name].channels) for name in names},
    )
    aps = [[_ap(run) for run in runs] for runs in (a, b)]
    families = replace(found, label_a=_label(a), label_b=_label(b), ap_a=aps[0], ap_b=aps[1])
    write_text(out / "families.json", json.dumps(families.as_dict(), indent=2) + "\n")
    figure = draw_dims(histories[: len(a)], histories[len(a) :], families)
    write_file(out / "families.png", lambda file: figure.savefig(file, format="png", dpi=80))
    return families


def divide(
    spectra: Mapping[str, Sequence[Spectrum]], size_a: int, ceilings: Mapping[str, int]
) -> Families:
    """The permutation test on final spectra.

    Args:
        spectra: Of every layer, those of all runs, the first family's first.
        size_a: Runs of the first family.
        ceilings: Largest dimension that each layer can have.
    """
    (runs,) = {len(of_layer) for of_layer in spectra.values()}
    divisions = _divisions(runs, size_a)
    layers, separations = [], []
    for name, of_layer in spectra.items():
        distances = _distances(of_layer)
        between, within = _means(distances, divisions)
        separation = between - within
        layers.append(
            LayerFamilies(
                name,
                ceilings[name],
                *_split([one.dim(_THRESHOLD) for one in of_layer], size_a),
                float(between[0]),
                float(within[0]),
                _share(separation),
            )
        )
        separations.append(separation)
    told = [s for s, layer in zip(separations, layers, strict=True) if not layer.is_at_ceiling]
    overall = np.mean(told, axis=0) if told else np.zeros(len(divisions))
    return Families("a", "b", [], [], layers, float(overall[0]), _share(overall), len(divisions))


def _split(values: list[int], size_a: int) -> tuple[list[int], list[int]]:
    return values[:size_a], values[size_a:]


def _divisions(runs: int, size_a: int) -> NDArray[np.bool_]:
    """Membership of the first group in every division, the true one first. [divisions, runs]"""
    true = tuple(range(size_a))
    if math.comb(runs, size_a) <= _MOST_DIVISIONS:
        others = [
            chosen for chosen in itertools.combinations(range(runs), size_a) if chosen != true
        ]
    else:
        draw = np.random.default_rng(0)
        others = [
            tuple(draw.permutation(runs)[:size_a].tolist()) for _ in range(_MOST_DIVISIONS - 1)
        ]
    members = np.zeros((len(others) + 1, runs), dtype=bool)
    for row, chosen in enumerate((true, *others)):
        members[row, list(chosen)] = True
    return members


def _distances(spectra: Sequence[Spectrum]) -> NDArray[np.float64]:
    """Distance of every two runs. [runs, runs]"""
    table = np.zeros((len(spectra), len(spectra)))
    for i, j in itertools.combinations(range(len(spectra)), 2):
        table[i, j] = table[j, i] = spectral_distance(spectra[i], spectra[j])
    return table


def _means(
    distances: NDArray[np.float64], divisions: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Mean distance between and within the groups of every division. [divisions] each"""
    first, second = np.triu_indices(len(distances), 1)
    values = distances[first, second]
    is_between = divisions[:, first] != divisions[:, second]
    between = (is_between * values).sum(1) / is_between.sum(1)
    within = (~is_between * values).sum(1) / (~is_between).sum(1)
    return between, within


def _share(separations: NDArray[np.float64]) -> float:
    """Share of the divisions that separate at least as much as the first, itself included."""
    # Sums of the same numbers in another order may differ in their last bits.
    return float((separations >= separations[0] - 1e-12).mean())


def _history(run: Path) -> History:
    folder = run / "spectra"
    if not (folder / "history.jsonl").is_file() or not len(load_history(folder)):
        raise DataError(
            f"no snapshots in {run}; train with --set track=backbone and snapshot_every below the "
            "number of steps"
        )
    return load_history(folder)


def _ap(run: Path) -> float:
    result = read_run_result(run)
    if result is None:
        raise DataError(f"{run} has not ended; finish it first")
    return result.ap


def _label(runs: Sequence[Path]) -> str:
    """Name of the folder that holds the runs of a family."""
    return runs[0].parent.name


def draw_dims(a: Sequence[History], b: Sequence[History], families: Families) -> Figure:
    """Dimensions of every layer over both trainings: mean, and from the lowest seed to the highest.

    Args:
        a: Histories of the first family.
        b: Those of the second one.
        families: Their comparison.
    """
    rows = -(-len(families.layers) // _COLUMNS)
    figure = Figure(figsize=(2.3 * _COLUMNS, 1.6 * rows), layout="constrained")
    tables = [[history.dims(_THRESHOLD) for history in side] for side in (a, b)]
    for place, layer in enumerate(families.layers, 1):
        axes = figure.add_subplot(rows, _COLUMNS, place)
        for side, colour, label in zip(
            tables, ("C0", "C1"), (families.label_a, families.label_b), strict=True
        ):
            steps = side[0][1]
            curves = np.array([dims[names.index(layer.name)].numpy() for names, _, dims in side])
            axes.plot(steps, curves.mean(0), colour, label=label)
            axes.fill_between(steps, curves.min(0), curves.max(0), color=colour, alpha=0.25, lw=0)
        axes.axhline(layer.ceiling, color="0.7", lw=0.6)
        axes.set_title(f"{layer.name}, p = {layer.p:.2f}", fontsize=6)
        axes.tick_params(labelsize=5)
    figure.get_axes()[0].legend(fontsize=5)
    return figure


def sentences(families: Families) -> list[str]:
    """The comparison in words."""
    told = [layer for layer in families.layers if not layer.is_at_ceiling]
    spreads = []
    for label, aps in ((families.label_a, families.ap_a), (families.label_b, families.ap_b)):
        mean, error = mean_and_error(aps)
        spreads.append(f"{label}: AP {mean:.3f} ± {error or 0:.3f} ({len(aps)} seeds)")
    alone = sum(layer.p <= 0.05 for layer in told)
    verb = "differ" if families.p <= 0.05 else "are not shown to differ"
    return [
        "; ".join(spreads),
        f"{len(families.layers) - len(told)} of {len(families.layers)} layers are at their ceiling "
        "in every run and left out",
        f"final spectra {verb} by more than seeds do: separation {families.separation:.4f}, "
        f"p = {families.p:.4f} of {families.divisions} divisions",
        f"{alone} of {len(told)} layers alone have p of at most 0.05",
    ]
