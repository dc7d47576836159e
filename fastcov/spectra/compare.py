"""Comparison of two trainings: how the spectra of their common layers differ over the steps."""

from collections.abc import Iterator
from dataclasses import dataclass

from fastcov.spectra.history import History
from fastcov.spectra.snapshot import Snapshot
from fastcov.spectra.spectrum import Spectrum, spectral_distance


@dataclass(frozen=True, eq=False)
class LayerComparison:
    """One layer in two trainings.

    Args:
        name: Layer name.
        steps_a: Steps at which the first training has a spectrum of the layer.
        dims_a: Intrinsic dimension (relative, 1e-3 unless chosen otherwise) at these steps.
        steps_b: Such steps of the second training.
        dims_b: Dimension at those steps.
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
        threshold: Threshold of the intrinsic dimensions, relative to the largest eigenvalue.
    """

    layers: tuple[LayerComparison, ...]
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    label_a: str
    label_b: str
    threshold: float


def compare_histories(
    a: History,
    b: History,
    *,
    threshold: float = 1e-3,
    label_a: str | None = None,
    label_b: str | None = None,
) -> Comparison:
    """Comparison of the spectra of two trainings over their steps, layer by layer.

    Args:
        a: First training.
        b: Second training; widths may differ.
        threshold: Threshold of the intrinsic dimension, relative to the largest eigenvalue.
        label_a: Name for tables and figures; None takes the folder's.
        label_b: Name of the second training.

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
    """Steps, dimensions and last spectrum of one layer, gathered snapshot by snapshot."""

    end: Spectrum

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.dims: list[int] = []

    def add(self, step: int, spectrum: Spectrum, threshold: float) -> None:
        self.steps.append(step)
        self.dims.append(spectrum.dim(threshold))
        self.end = spectrum


def _side_by_side(a: History, b: History) -> Iterator[tuple[Snapshot | None, Snapshot | None]]:
    """Snapshots of both by step, one of each in memory; of a step stored twice the last counts."""
    last_of = [{step: index for index, step in enumerate(h.steps())} for h in (a, b)]
    for step in sorted(last_of[0].keys() | last_of[1].keys()):
        yield (
            a[last_of[0][step]] if step in last_of[0] else None,
            b[last_of[1][step]] if step in last_of[1] else None,
        )
