r"""Trainings side by side: the dimensions of every layer over training, and how far they part.

The question of Shinya, Simo-Serra and Suzuki (arXiv 1909.04021): do a detector from scratch and one
from pretrained weights converge to similar models? Compared are the spectra that
:func:`fastcov.track` recorded during training: of two runs, or of two families of runs with several
seeds a side, where the question is whether the families differ by more than seeds do. Then the
final spectra of all runs are compared layer by layer and pair by pair. The separation of the
families is

.. math:: s = \overline{d}_{\text{between}} - \overline{d}_{\text{within}}

Where the families do not differ, any other division of the runs into two groups of these sizes
would separate as much: the p value is the share of divisions whose separation is at least as large,
for each layer and for the mean over layers (one division for all layers at once).

Of a layer whose dimension is in every run as large as its weights allow, the dimension says
nothing; such layers are marked and counted apart.
"""

from __future__ import annotations

import io
import itertools
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from torch import nn

from fastcov import History, Spectrum, load_history
from fastcov.spectra.compare import compare_histories
from fastcov.spectra.snapshot import Snapshot
from fastcov.spectra.spectrum import spectral_distance
from fastcov_detection import __version__
from fastcov_detection.config import read_saved, read_values
from fastcov_detection.detector.build import build_model, load_widths
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_file, write_text
from fastcov_detection.report.page import NARROW, WIDE, Block, Section, to_png, write_page
from fastcov_detection.report.pictures import Curves, draw_dims, draw_spectra
from fastcov_detection.report.tables import terminal_table
from fastcov_detection.search.verdicts import mean_and_error
from fastcov_detection.studies.pretrain import RESULT as CLASSIFIER
from fastcov_detection.studies.pretrain import PretrainResult
from fastcov_detection.train.folder import read_result, read_run_result

FAMILIES = "families.json"
"""File in which a comparison of families keeps its numbers, beside its figure."""
_MOST_DIVISIONS = 20_000
_THRESHOLD = 1e-3
_COLOURS = 64
_RECORD = "comparison.json"
_WIDTHS = (WIDE, NARROW)
_SPECTRA = ("spectra.png", "spectra-narrow.png")  # one a width

Numbers = dict[str, Any]
"""Content of comparison.json: everything that figures and page show, by layer."""


def layer_ceilings(run: Path) -> dict[str, int]:
    """Largest rank of the output of every convolution and linear layer of a run.

    A layer is linear, so its output has no more directions than it has outputs or inputs of a
    position (channels times kernel), and one more with a bias, which shifts every row alike.

    Args:
        run: Folder of the run, of which settings and widths are read; of a kept copy, from its
            ``run.json``.

    Returns:
        Ranks by the names under which the run was tracked; empty where the folder is no run.
    """
    if (run / "config.json").exists():
        values = read_values(run / "config.json")
        widths = load_widths(run / "widths.json")
    elif (run / "run.json").exists():
        content = read_values(run / "run.json")
        values, widths = content["config"], content["widths"]
    else:
        return {}
    # A classifier's configuration holds that of the detector whose backbone it trains.
    config = read_saved(values.get("train", values))
    with torch.device("meta"):
        classes = config.model.num_classes or 2
        model = build_model(replace(config.model, init="random"), widths, num_classes=classes)
    root = model if config.track == "model" else model.backbone
    return {
        name: min(len(module.weight), module.weight[0].numel() + (module.bias is not None))
        for name, module in root.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }


def compare_runs(
    a: str | os.PathLike[str], b: str | os.PathLike[str], out: str | os.PathLike[str]
) -> Numbers:
    """Comparison of two runs, with its figures and numbers in a folder.

    Args:
        a: Folder of the first run; a folder of snapshots does as well.
        b: Folder of the second run.
        out: Folder that gets ``comparison.json``, ``comparison.html``, ``dims.png``,
            ``spectra.png`` and ``spectra-narrow.png``.

    Returns:
        Content of comparison.json.

    Raises:
        DataError: If a run has no snapshots, or the runs share no layer.
    """
    places = Path(a), Path(b)
    histories = [_history(place) for place in places]
    labels = _labels(*places)
    try:
        found = compare_histories(
            *histories, threshold=_THRESHOLD, label_a=labels[0], label_b=labels[1]
        )
    except ValueError as error:
        raise DataError(f"cannot compare {a} with {b}: {error}") from None
    layers: dict[str, dict[str, Any]] = {
        layer.name: {
            "steps_a": layer.steps_a,
            "dims_a": layer.dims_a,
            "width_a": layer.end_a.channels,
            "dof_a": layer.end_a.dof(),
            "steps_b": layer.steps_b,
            "dims_b": layer.dims_b,
            "width_b": layer.end_b.channels,
            "dof_b": layer.end_b.dof(),
            "distance": layer.distance,
            "common_steps": layer.common_steps,
            "distances": layer.distances,
        }
        for layer in found.layers
    }
    numbers: Numbers = {
        "a": labels[0],
        "b": labels[1],
        "threshold": found.threshold,
        "layers": layers,
        "only_a": list(found.only_a),
        "only_b": list(found.only_b),
    }
    panels = {
        layer.name: {f"a: {labels[0]}": layer.end_a, f"b: {labels[1]}": layer.end_b}
        for layer in found.layers
    }
    _write(numbers, places, Path(out), [_drawing(draw_spectra(panels, width)) for width in _WIDTHS])
    return numbers


def redraw_comparison(folder: str | os.PathLike[str]) -> Numbers:
    """Figures and page of a comparison, drawn again from ``comparison.json``.

    Ceilings follow from the settings of the runs, which lie in the folder under their labels.

    Raises:
        DataError: If the folder holds no comparison.
    """
    place = Path(folder)
    try:
        numbers: Numbers = json.loads((place / _RECORD).read_text(encoding="utf-8"))
        runs = place / numbers["a"], place / numbers["b"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{place / _RECORD} is no comparison ({error}); give two run folders to make one"
        ) from None
    spectra = [place / name for name in _SPECTRA]
    _write(numbers, runs, place, [path.read_bytes() for path in spectra if path.exists()])
    return numbers


def _write(numbers: Numbers, runs: tuple[Path, Path], folder: Path, spectra: list[bytes]) -> None:
    """Numbers with their ceilings, their figures and the page, written.

    ``spectra`` holds pictures of two widths; those of an old comparison are one, or none.
    """
    layers = numbers["layers"]
    for side, run in zip("ab", runs, strict=True):
        ceilings = layer_ceilings(run)
        for name, layer in layers.items():
            known = layer.get(f"ceiling_{side}", layer[f"width_{side}"])
            layer[f"ceiling_{side}"] = ceilings.get(name, known)
    full = {name for name, layer in layers.items() if _is_full(layer)}
    numbers["at_ceiling"] = sorted(full)
    write_text(folder / _RECORD, json.dumps(numbers, indent=2) + "\n")
    # Panels of layers at their ceiling would be flat lines; they are counted instead.
    drawn = {name: layer for name, layer in layers.items() if name not in full} or layers
    curves: dict[str, list[Curves]] = {
        name: [
            (f"{side}: {numbers[side]}", layer[f"steps_{side}"], [layer[f"dims_{side}"]])
            for side in "ab"
        ]
        for name, layer in drawn.items()
    }
    tops = {name: max(layer["ceiling_a"], layer["ceiling_b"]) for name, layer in drawn.items()}
    titles = {name: starred(numbers, name) for name in drawn}
    note = f"grey: ceiling; {len(full)} of {len(layers)} layers end at it in both runs"
    note += ", and are not drawn" if len(drawn) < len(layers) else ""
    dims, narrow = (_drawing(draw_dims(curves, tops, titles, note, width)) for width in _WIDTHS)
    _save(folder / "dims.png", dims)
    for name, drawing in zip(_SPECTRA, spectra, strict=False):
        _save(folder / name, drawing)
    headings, lines = comparison_rows(numbers)
    caption = (
        "Dimension of the layers that do not end at their structural ceiling (grey, the smaller "
        "of a layer's inputs and outputs) in both runs."
    )
    lead, legend = lead_and_legend(numbers)
    sections = [
        Section("", [Block(lead, "lead"), Block(legend)]),
        Section("Dimension over training", [Block(picture=dims, narrow=narrow, caption=caption)]),
        Section("Layers", [Block(headings=headings, rows=lines)]),
    ]
    if spectra:
        every = "Spectra of every layer at the end"
        block = Block(picture=spectra[0], narrow=b"".join(spectra[1:]), caption=every, fold=every)
        sections.append(Section("Spectra", [block]))
    title = f"{numbers['a']} (a) against {numbers['b']} (b)"
    write_page(folder / "comparison.html", title, sections, f"fastcov-detection {__version__}")


def _is_full(layer: Mapping[str, Any]) -> bool:
    """True for a layer that ends at its ceiling in both runs: its dimension tells nothing."""
    return all(layer[f"dims_{side}"][-1] >= layer[f"ceiling_{side}"] for side in "ab")


def starred(numbers: Numbers, name: str) -> str:
    """Name of a layer, with a star where both runs end at its ceiling."""
    return f"{name} *" if name in numbers["at_ceiling"] else name


def lead_and_legend(numbers: Numbers) -> tuple[str, str]:
    """Result of a comparison in words, and the meaning of its columns."""
    layers, full = numbers["layers"], set(numbers["at_ceiling"])
    free = [layer for name, layer in layers.items() if name not in full]
    same = sum(layer["dims_a"][-1] == layer["dims_b"][-1] for layer in free)
    distances = [layer["distances"] for layer in free if layer["distances"]]
    nearer = sum(over_steps[-1] < over_steps[0] for over_steps in distances)
    return (
        f"{len(full)} of {len(layers)} layers (marked *) end at their structural ceiling in both "
        "runs, the smaller of a layer's inputs and outputs, which tells nothing about training; of "
        f"the other {len(free)}, {same} end with the same dimension, and the spectra of {nearer} "
        "end nearer to each other than they began. One run a side: no difference is shown to be "
        "more than seeds make.",
        "Distance: half the sum of |p - q| over the trace-normalised eigenvalues in descending "
        "order, the share of the variance that would have to change rank (0 same shape, 1 at "
        f"most). Dim: eigenvalues above {numbers['threshold']:g} of the largest.",
    )


def comparison_rows(numbers: Numbers) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and a line for each layer; layers that only one run has come last."""
    sides = [(f"{what} {side}", f"{what}_{side}") for what in ("width", "ceiling") for side in "ab"]
    headings = ("layer", *(heading for heading, _ in sides))
    headings += ("dim a", "dim b", "dof a", "dof b", "distance")
    lines = [
        (
            starred(numbers, name),
            *(str(one[key]) for _, key in sides),
            *(str(one[f"dims_{side}"][-1]) for side in "ab"),
            *(f"{one[f'dof_{side}']:.1f}" for side in "ab"),
            f"{one['distance']:.3f}",
        )
        for name, one in numbers["layers"].items()
    ]
    blanks = [""] * (len(headings) - 2)
    for side in "ab":
        lines += [(name, *blanks, f"only in {side}") for name in numbers[f"only_{side}"]]
    return headings, lines


def print_comparison(numbers: Numbers, console: Console | None = None) -> None:
    """Printed lines, one a layer: dimensions and demands at the end, and the distance."""
    console = console or Console(width=None if sys.stdout.isatty() else 120)
    headings, lines = comparison_rows(numbers)
    console.print(f"a: {numbers['a']}", f"b: {numbers['b']}", sep="\n", markup=False)
    console.print(terminal_table(headings, lines))
    for sentence in lead_and_legend(numbers):
        console.print(sentence, markup=False, highlight=False)


def _history(run: Path) -> History:
    """The snapshots of a run, or of the folder that was given as ``out=`` to fastcov.track."""
    for folder in (run / "spectra", run):
        if (folder / "history.jsonl").is_file() and len(history := load_history(folder)):
            return _as_backbone(history) if (run / CLASSIFIER).exists() else history
    raise DataError(
        f"no snapshots in {run} (looked for history.jsonl there and in spectra/); train with "
        "--set track=backbone and snapshot_every below the number of steps"
    )


def _as_backbone(classifier: History) -> History:
    """A classifier's snapshots, its layers named as those of a detector's backbone."""
    renamed = History()
    for snapshot in classifier:
        spectra = {f"body.{name}": spectrum for name, spectrum in snapshot.spectra.items()}
        renamed.append(Snapshot(snapshot.step, snapshot.wall_s, spectra))
    return renamed


def _labels(a: Path, b: Path) -> tuple[str, str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in (a, b)]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if ends[0] != ends[1]:
            return ends[0], ends[1]
    return f"{a} (a)", f"{b} (b)"


def _save(path: Path, content: bytes) -> None:
    write_file(path, lambda file: file.write(content))


def _drawing(figure: Figure) -> bytes:
    """PNG with a palette of 64 colours, a third of the size for version control."""
    packed = io.BytesIO()
    with Image.open(io.BytesIO(to_png(figure))) as picture:
        small = picture.convert("RGB").quantize(_COLOURS, Image.Quantize.MEDIANCUT)
        small.save(packed, format="PNG", optimize=True)
    return packed.getvalue()


@dataclass(frozen=True)
class LayerFamilies:
    """One layer in both families.

    ``dims_a`` and ``dims_b`` are the final dimensions by run, ``ceiling`` is the largest dimension
    that the layer's weights allow. ``between`` and ``within`` are mean distances of final spectra.
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
    """Two families of runs compared; ``p`` is that of the mean over layers below their ceiling.

    Scores are by run: AP of detectors, accuracy of classifiers.
    """

    label_a: str
    label_b: str
    scores_a: list[float]
    scores_b: list[float]
    layers: list[LayerFamilies]
    separation: float
    p: float
    divisions: int
    measure_a: str = "AP"
    measure_b: str = "AP"

    def as_dict(self) -> dict[str, Any]:
        """Everything, for a file."""
        return asdict(self) | {"at_ceiling": sum(layer.is_at_ceiling for layer in self.layers)}


def compare_families(a: Sequence[Path], b: Sequence[Path], out: Path) -> Families:
    """Comparison of two families of finished runs, as ``families.json`` and ``families.png``.

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
    found = permutation_test(
        {name: [spectra[name] for spectra in finals] for name in names},
        len(a),
        {name: ceilings.get(name, finals[0][name].channels) for name in names},
    )
    scores = [[_score(run) for run in runs] for runs in (a, b)]
    labels = a[0].parent.name, b[0].parent.name
    families = replace(
        found,
        label_a=labels[0],
        label_b=labels[1],
        measure_a=_measure(a[0]),
        measure_b=_measure(b[0]),
        scores_a=scores[0],
        scores_b=scores[1],
    )
    write_text(out / FAMILIES, json.dumps(families.as_dict(), indent=2) + "\n")
    figure = _draw_families(histories[: len(a)], histories[len(a) :], families)
    _save(out / "families.png", _drawing(figure))
    return families


def read_families(folder: Path) -> Families:
    """A comparison that :func:`compare_families` left in a folder.

    Raises:
        DataError: If the folder holds none.
    """
    path = folder / FAMILIES
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        del values["at_ceiling"]
        layers = [LayerFamilies(**layer) for layer in values.pop("layers")]
        return Families(layers=layers, **values)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise DataError(
            f"{path} holds no comparison of families ({error}); run the families command again"
        ) from None


def permutation_test(
    spectra: Mapping[str, Sequence[Spectrum]], size_a: int, ceilings: Mapping[str, int]
) -> Families:
    """Permutation test of two families by their final spectra.

    Args:
        spectra: Spectra of all runs by layer, the first family's runs first.
        size_a: Runs of the first family.
        ceilings: Largest dimension that each layer can have.
    """
    (runs,) = {len(of_layer) for of_layer in spectra.values()}
    divisions = _divisions(runs, size_a)
    first, second = np.triu_indices(runs, 1)
    is_between = divisions[:, first] != divisions[:, second]
    layers, separations = [], []
    for name, of_layer in spectra.items():
        pairs = zip(first, second, strict=True)
        distances = np.array([spectral_distance(of_layer[i], of_layer[j]) for i, j in pairs])
        between = (is_between * distances).sum(1) / is_between.sum(1)
        within = (~is_between * distances).sum(1) / (~is_between).sum(1)
        separations.append(between - within)
        dims = [spectrum.dim(_THRESHOLD) for spectrum in of_layer]
        means = float(between[0]), float(within[0]), _p_value(separations[-1])
        layers.append(LayerFamilies(name, ceilings[name], dims[:size_a], dims[size_a:], *means))
    free = [s for s, layer in zip(separations, layers, strict=True) if not layer.is_at_ceiling]
    overall = np.mean(free, axis=0) if free else np.zeros(len(divisions))
    return Families(
        label_a="a",
        label_b="b",
        scores_a=[],
        scores_b=[],
        layers=layers,
        separation=float(overall[0]),
        p=_p_value(overall),
        divisions=len(divisions),
    )


def _divisions(runs: int, size_a: int) -> NDArray[np.bool_]:
    """True for the runs of the first group, by division, the true one first. [divisions, runs]"""
    if math.comb(runs, size_a) <= _MOST_DIVISIONS:
        chosen = list(itertools.combinations(range(runs), size_a))
    else:
        draw = np.random.default_rng(0)
        drawn = (draw.permutation(runs)[:size_a] for _ in range(_MOST_DIVISIONS - 1))
        chosen = [tuple(range(size_a)), *map(tuple, drawn)]
    members = np.zeros((len(chosen), runs), dtype=bool)
    np.put_along_axis(members, np.array(chosen), True, axis=1)
    return members


def _p_value(separations: NDArray[np.float64]) -> float:
    """Share of the divisions that separate at least as much as the first, itself included."""
    # Sums of the same numbers in another order may differ in their last bits.
    return float((separations >= separations[0] - 1e-12).mean())


def _measure(run: Path) -> str:
    return "accuracy" if (run / CLASSIFIER).exists() else "AP"


def _score(run: Path) -> float:
    if (run / CLASSIFIER).exists():
        classifier = read_result(run, PretrainResult, CLASSIFIER)
        if classifier is not None:
            return classifier.accuracy
    elif (detector := read_run_result(run)) is not None:
        return detector.ap
    raise DataError(f"{run} has not ended; finish it first")


def _draw_families(a: Sequence[History], b: Sequence[History], families: Families) -> Figure:
    """Dimensions over both families' trainings, of the layers that are not at their ceiling."""
    tables = [[history.dims(_THRESHOLD) for history in side] for side in (a, b)]
    labels = families.label_a, families.label_b
    drawn = [layer for layer in families.layers if not layer.is_at_ceiling]
    curves: dict[str, list[Curves]] = {
        layer.name: [
            (
                label,
                side[0][1],
                [dims[names.index(layer.name)].tolist() for names, _, dims in side],
            )
            for side, label in zip(tables, labels, strict=True)
        ]
        for layer in drawn
    }
    ceilings = {layer.name: layer.ceiling for layer in drawn}
    titles = {layer.name: f"{layer.name}\np = {layer.p:.2f}" for layer in drawn}
    left_out = len(families.layers) - len(drawn)
    note = f"grey: ceiling; {left_out} layers are at theirs in every run and not drawn"
    return draw_dims(curves, ceilings, titles, note)


def sentences(families: Families) -> list[str]:
    """Result of a comparison of families in words."""
    free = [layer for layer in families.layers if not layer.is_at_ceiling]
    spreads = []
    for label, measure, scores in (
        (families.label_a, families.measure_a, families.scores_a),
        (families.label_b, families.measure_b, families.scores_b),
    ):
        mean, error = mean_and_error(scores)
        spreads.append(f"{label}: {measure} {mean:.3f} ± {error or 0:.3f} ({len(scores)} seeds)")
    alone = sum(layer.p <= 0.05 for layer in free)
    verb = "differ" if families.p <= 0.05 else "are not shown to differ"
    return [
        "; ".join(spreads),
        f"{len(families.layers) - len(free)} of {len(families.layers)} layers are at their ceiling "
        "in every run and left out",
        f"final spectra {verb} by more than seeds do: separation {families.separation:.4f}, "
        f"p = {families.p:.4f} of {families.divisions} divisions",
        f"{alone} of {len(free)} layers alone have p of at most 0.05",
    ]
