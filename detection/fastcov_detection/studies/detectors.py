"""Export of detectors, and COCO's numbers of a run, an export or torchvision's own detectors."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn
from torchvision.models import detection as torchvision_detection
from torchvision.models import get_model, get_model_weights, list_models

from fastcov_detection.config import DataConfig, ModelConfig
from fastcov_detection.data.dataset import load_on_ranks
from fastcov_detection.detector.build import (
    anchor_options,
    parse_name,
    roi_align_options,
    sampling_options,
    save_widths,
)
from fastcov_detection.detector.modules import unusual_groups
from fastcov_detection.detector.weights import fetch_state, read_state
from fastcov_detection.distributed import pick_device, process_group, rank
from fastcov_detection.errors import ConfigError, DataError, closest
from fastcov_detection.files import write_file, write_text
from fastcov_detection.report.tables import terminal_table
from fastcov_detection.search.arms import SEARCHED
from fastcov_detection.search.results import finished_runs, read_result
from fastcov_detection.studies.rebuild import rebuild
from fastcov_detection.train.evaluate import (
    NUMBERS,
    Evaluation,
    evaluate,
    has_masks,
    write_predictions,
)
from fastcov_detection.train.folder import category_ids, load_run
from fastcov_detection.train.loop import PRECISIONS

log = logging.getLogger("fastcov_detection")


def export_run(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, arm: str = SEARCHED
) -> Path:
    """Folder of a detector that can be used without this package.

    Args:
        source: Folder of a training run, or of a search.
        out: Folder that gets ``model.pt`` (tensors by torchvision's names), ``widths.json``,
            ``model.json`` (all other facts that building needs, with class names and category
            ids) and ``rebuild.py``.
        arm: Arm of a search, whose first seed is exported.

    Returns:
        The folder.

    Raises:
        ConfigError: If there is no finished run.
    """
    run = _find_run(Path(source), arm)
    model, _, _ = load_run(run)
    folder = Path(out)
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    classes = json.loads((run / "classes.json").read_text(encoding="utf-8"))
    ids = category_ids(run)
    write_file(folder / "model.pt", lambda file: torch.save(state, file))
    save_widths(model.widths, folder / "widths.json")
    described = describe(model.config, classes, ids) | {"groups": unusual_groups(model)}
    write_text(folder / "model.json", json.dumps(described, indent=2) + "\n")
    write_text(
        folder / "rebuild.py", Path(__file__).with_name("rebuild.py").read_text(encoding="utf-8")
    )
    return folder


def describe(
    config: ModelConfig, classes: list[str], category_ids: list[int] | None = None
) -> dict[str, Any]:
    """Arguments of torchvision's constructors for this detector, as JSON.

    Args:
        config: Settings of the detector.
        classes: Names of labels 1 to K.
        category_ids: Ids of the same classes in the annotation files; None where a run of an
            earlier version did not keep them.
    """
    predicts_masks, depth = parse_name(config.name)
    norm = "batch" if config.norm == "sync" else config.norm
    return {
        "classes": ["background", *classes],
        "category_ids": None if category_ids is None else [None, *category_ids],
        "masks": predicts_masks,
        "resnet": f"resnet{depth}",
        "norm": norm,
        "fpn_norm": config.fpn_norm,
        "head_norm": config.head_norm,
        "box_head": config.box_head,
        "options": {
            "num_classes": len(classes) + 1,
            "min_size": config.min_size,
            **sampling_options(config),
        },
        "anchors": anchor_options(config),
        "roi_align": roi_align_options(config),
        "pools": {"box_roi_pool": 7} | ({"mask_roi_pool": 14} if predicts_masks else {}),
    }


def _find_run(source: Path, arm: str) -> Path:
    if (source / "result.json").exists():
        runs = finished_runs(source, read_result(source), arm)
        if not runs:
            raise ConfigError(f"no run of arm {arm!r} in {source} is finished; search again first")
        return runs[0]
    if not (source / "run.json").exists():
        raise ConfigError(
            f"{source} is neither a finished run (run.json) nor a search (result.json); "
            "give the folder that was --out"
        )
    return source


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
    """Detector of a run, an export or torchvision, by folder or name.

    Args:
        source: Folder of a run, folder of an export, or the name of one of torchvision's detectors.
        weights: State_dict for torchvision's detector; None: torchvision's own weights, which are
            downloaded.
        best: Take the weights of a run's best evaluation.

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
    state = fetch_state(stock, "--weights") if weights is None else read_state(weights)
    categories = stock.meta["categories"]
    model = get_model(name, weights=None, weights_backbone=None, num_classes=len(categories))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(f"{weights or stock.url} does not fit {name} ({reason})") from None
    return Detector(model.eval(), dict(enumerate(categories)), None)


def category_ids_by_label(
    labels: Mapping[int, str], categories: Mapping[int, str]
) -> dict[int, int]:
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
            raise ConfigError(f"{source} does not name its data; give --data FOLDER")
        masks = has_masks(detector.model)
        val = load_on_ranks(data, with_masks=masks, progress=progress).val
        found = evaluate(
            detector.model.to(place),
            val,
            batch_size=batch_size,
            workers=data.workers,
            precision=PRECISIONS[precision],
            category_of=category_ids_by_label(detector.labels, val.file.categories),
            progress=progress,
        )
        if rank() == 0:
            folder = Path(out)
            content = {"source": source, "best": best, "data": str(val.file.path)}
            kept = ("images", "seconds", "numbers", "classes")
            content |= {key: getattr(found, key) for key in kept}
            write_text(folder / "evaluation.json", json.dumps(content, indent=2) + "\n")
            write_predictions(found, folder)
    return found


def print_scores(
    numbers: Mapping[str, float | None],
    classes: Mapping[str, Mapping[str, float | None]],
    console: Console | None = None,
) -> None:
    """Printed numbers: COCO's twelve, and the AP of every class, of boxes and masks."""
    prefixes = {"boxes": "", "masks": "segm_"}
    kinds = {name: one for name, one in prefixes.items() if numbers.get(f"{one}ap") is not None}
    rows = {name: [numbers[p + name] for p in kinds.values()] for name in NUMBERS if kinds}
    ranked = classes.get("ap", {}) if kinds else {}
    aps = {name: [classes[f"{p}ap"][name] for p in kinds.values()] for name in ranked}
    for heading, lines in (("", rows), ("AP of class", aps)):
        cells = [
            (name, *("-" if value is None else f"{value:.3f}" for value in values))
            for name, values in lines.items()
        ]
        if cells:
            (console or Console()).print(terminal_table((heading, *kinds), cells))
