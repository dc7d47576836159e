"""COCO's numbers of any detector: a run's, an exported one, or one of torchvision's."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn
from torchvision.models import detection as torchvision_detection
from torchvision.models import get_model, get_model_weights, list_models

from fastcov_detection.config import ConfigError, DataConfig, closest
from fastcov_detection.data.dataset import load_data
from fastcov_detection.detector.weights import read_state
from fastcov_detection.distributed import barrier, pick_device, process_group, rank
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_text
from fastcov_detection.studies.rebuild import rebuild
from fastcov_detection.train.evaluate import Evaluation, evaluate, write_predictions
from fastcov_detection.train.folder import load_run
from fastcov_detection.train.scoring import NUMBERS, PREFIXES
from fastcov_detection.train.steps import PRECISIONS

log = logging.getLogger("fastcov_detection")


class Detector(NamedTuple):
    """A detector, the name of each of its labels, and the data that it was trained on."""

    model: nn.Module
    labels: dict[int, str]
    """Class names by label."""
    data: DataConfig | None
    """None where the source does not say."""


def open_detector(
    source: str, *, weights: str | os.PathLike[str] | None = None, best: bool = False
) -> Detector:
    """A detector from wherever it is.

    Args:
        source: Folder of a run, folder of an export, or the name of one of torchvision's detectors.
        weights: Of torchvision's detector: a state_dict; None: torchvision's own, which are
            downloaded.
        best: Of a run: the weights of the best evaluation.

    Raises:
        ConfigError: If there is no such detector, or its weights cannot be had.
    """
    folder = Path(source)
    if (folder / "model.json").exists():
        classes = json.loads((folder / "model.json").read_text(encoding="utf-8"))["classes"]
        return Detector(rebuild(folder), dict(enumerate(classes)), None)
    if (folder / "config.json").exists():
        model, config, _ = load_run(folder, best=best)
        classes = json.loads((folder / "classes.json").read_text(encoding="utf-8"))
        return Detector(model, dict(enumerate(classes, 1)), config.data)
    known = list_models(module=torchvision_detection)
    if source not in known:
        raise ConfigError(
            f"{source!r} is no folder of a run (config.json) or an export (model.json), and no "
            f"detector of torchvision{closest(source, known)}"
        )
    return _of_torchvision(source, None if weights is None else Path(weights))


def _of_torchvision(name: str, weights: Path | None) -> Detector:
    stock = get_model_weights(name).DEFAULT
    if weights is not None:
        state = read_state(weights)
    else:
        try:
            state = stock.get_state_dict(progress=False, check_hash=True)
        except (URLError, OSError) as error:
            raise ConfigError(
                f"cannot fetch the weights of {name} ({error}); download {stock.url} on a machine "
                "with a connection and give the file as --weights"
            ) from None
    categories = stock.meta["categories"]
    model = get_model(name, weights=None, weights_backbone=None, num_classes=len(categories))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{weights or stock.url} does not fit {name} ({reason})") from None
    return Detector(model.eval(), dict(enumerate(categories)), None)


def translate(labels: Mapping[int, str], categories: Mapping[int, str]) -> dict[int, int]:
    """Category ids of a data set by the labels of a detector, matched by name.

    Args:
        labels: Names by label.
        categories: Names by category id.

    Raises:
        DataError: If not one name is the same.
    """
    ids = {name: key for key, name in categories.items()}
    found = {label: ids[name] for label, name in labels.items() if name in ids}
    if not found:
        raise DataError(
            f"the detector knows {', '.join(list(labels.values())[:5])}..., the data has "
            f"{', '.join(list(ids)[:5])}...: no class has the same name"
        )
    unknown = [name for key, name in categories.items() if key not in found.values()]
    if unknown:
        log.warning(
            "the detector does not know %d of %d classes, which score 0: %s",
            len(unknown),
            len(categories),
            ", ".join(unknown[:5]),
        )
    return found


def evaluate_detector(
    source: str,
    out: str | os.PathLike[str],
    *,
    data: DataConfig | None = None,
    weights: str | os.PathLike[str] | None = None,
    best: bool = False,
    batch_size: int = 1,
    precision: str = "float32",
    device: str = "auto",
    progress: bool = True,
) -> Evaluation:
    """COCO's numbers of a detector on validation images, in a folder.

    The folder gets ``evaluation.json`` and the predictions in COCO's results format. Under torchrun
    the processes share the images.

    Args:
        source: See :func:`open_detector`.
        out: Folder to write.
        data: Data set; None: that of the run.
        weights: See :func:`open_detector`.
        best: See :func:`open_detector`.
        batch_size: Images of one forward pass.
        precision: ``float32``, ``bfloat16`` or ``float16``.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        progress: Show a bar.

    Raises:
        ConfigError: If there is no such detector, or no data is given for it.
        DataError: If the data cannot be used, or shares no class with the detector.
    """
    if precision not in PRECISIONS:
        raise ConfigError(f"unknown precision {precision!r}{closest(precision, PRECISIONS)}")
    place = pick_device(device)
    with process_group(place):
        detector = open_detector(source, weights=weights, best=best)
        data = data or detector.data
        if data is None:
            raise ConfigError(f"{source} does not say what data it is for; give --data FOLDER")
        heads = getattr(detector.model, "roi_heads", None)
        with_masks = heads is not None and bool(heads.has_mask())
        loaded = None
        if rank() == 0:
            loaded = load_data(data, with_masks=with_masks, progress=progress)
        barrier()
        val = (loaded or load_data(data, with_masks=with_masks, progress=False)).val
        found = evaluate(
            detector.model.to(place),
            val,
            batch_size=batch_size,
            workers=data.workers,
            precision=PRECISIONS[precision],
            category_of=translate(detector.labels, val.file.categories),
            progress=progress,
        )
        if rank() == 0:
            folder = Path(out)
            content = {
                "source": source,
                "best": best,
                "data": str(val.file.path),
                "images": found.images,
                "seconds": found.seconds,
                "numbers": found.numbers,
                "classes": found.classes,
            }
            write_text(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
            write_predictions(found, folder)
    return found


def with_data(name: str | None, workers: int = 0) -> DataConfig | None:
    """The data set of a command's option; None where none is given."""
    return None if name is None else replace(DataConfig(), name=name, workers=workers)


def print_scores(
    numbers: Mapping[str, float | None],
    classes: Mapping[str, Mapping[str, float | None]],
    console: Console | None = None,
) -> None:
    """Prints COCO's twelve numbers, and the AP of every class, of boxes and masks."""
    if not numbers:  # of a run of an earlier version
        return
    console = console or Console()
    kinds = {
        kind: prefix for kind, prefix in PREFIXES.items() if numbers.get(f"{prefix}ap") is not None
    }
    named = {"bbox": "boxes", "segm": "masks"}
    headings = [named[kind] for kind in kinds]
    lines = [[name, *(_text(numbers[p + name]) for p in kinds.values())] for name in NUMBERS]
    _print(console, ["", *headings], lines)
    first = classes.get("ap", {})
    lines = [
        [name, *(_text(classes[f"{prefix}ap"][name]) for prefix in kinds.values())]
        for name in first
    ]
    _print(console, ["AP of class", *headings], lines)


def _text(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _print(console: Console, headings: Sequence[str], lines: Sequence[Sequence[Any]]) -> None:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    console.print(table)
