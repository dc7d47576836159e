"""The report of a search: one HTML page that holds its own pictures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from fastcov import load_history
from fastcov.show.figures import free_axes, png
from fastcov.show.plot import plot_dims
from fastcov.widths import demand
from fastcov_detection import __version__
from fastcov_detection.config import SearchConfig, load_config, read_saved
from fastcov_detection.data.dataset import load_data
from fastcov_detection.detector.build import build_model
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.files import write_file
from fastcov_detection.progress import progress_bar
from fastcov_detection.report import pictures
from fastcov_detection.report.page import Block, Section, figure_block, write_page
from fastcov_detection.report.tables import class_rows, coco_rows, columns, rows, sentences
from fastcov_detection.search.arms import BASELINE, SEARCHED, UNTRAINED
from fastcov_detection.search.folder import load_plan, load_spectra, measured_path, plan_path
from fastcov_detection.search.results import finished_runs, read_result, verdict_of
from fastcov_detection.train.drawing import LEGEND, draw_pictures, in_grid
from fastcov_detection.train.folder import has_weights, load_run
from fastcov_detection.train.logbook import read_log

_DRAWN_IMAGES = 6
_NO_WEIGHTS = (
    "The first runs' weights are not in this folder (only results came back from version control), "
    "so no detections are drawn and no latency is measured."
)


def write_report(folder: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Page ``report.html`` of a search, with the pictures of detections under ``pictures/``.

    Args:
        folder: Folder of a search that has a result.json.
        progress: Show a bar.

    Returns:
        The page's path.

    Raises:
        ConfigError: If the folder holds no search.
    """
    report = _Report(Path(folder))
    makers: dict[str, Callable[[], list[Block]]] = {
        "": report.outcome,
        "Detections": report.detections,
        "Widths": report.widths,
        "Demand": report.demand,
        "Spectra": report.spectra,
        "Dimensions over training": report.dynamics,
        "Settings": report.settings,
    }
    sections = []
    with progress_bar("writing the report", len(makers), enabled=progress) as advance:
        for heading, make in makers.items():
            sections.append(Section(heading, make()))
            advance(1)
    train = report.config.train
    versions = f"fastcov-detection {__version__}"
    made_by = [versions, f"torch {torch.__version__}", report.result["commit"]]
    footer = ", ".join(dict.fromkeys(made_by)) + f"; data {train.data.name}"
    title = f"Width search: {train.model.name} on {Path(train.data.name).name}"
    return write_page(report.folder / "report.html", title, sections, footer)


class _Report:
    """Contents of the page, section by section."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result: dict[str, Any] = read_result(folder)
        self.config = load_config(SearchConfig, folder / "config.json")
        self.first_runs = {
            arm: runs[0]
            for arm in self.result["arms"]
            if (runs := finished_runs(folder, self.result, arm))
        }
        # The configuration with the number of classes that the data has.
        path = self.first_runs[BASELINE] / "run.json"
        saved = json.loads(path.read_text(encoding="utf-8"))["config"]
        self.model_config = read_saved(saved).model
        with torch.device("meta"):
            baseline = build_model(replace(self.model_config, init="random"))
        self.groups = width_groups(baseline, vary=self.config.vary)

    def outcome(self) -> list[Block]:
        """AP beside parameters, and the conclusions from the numbers."""
        statements = sentences(self.result)
        has_spread = any(len(arm["runs"]) > 1 for arm in self.result["arms"].values())
        blocks = [
            Block(statements[0], "lead"),
            Block(headings=columns(self.result), rows=rows(self.result)),
            Block(self._conditions(), "note"),
        ]
        if has_spread:
            blocks.append(self._comparisons())
        blocks.append(Block(statements[-1]))
        for title, (headings, lines) in (
            ("COCO's twelve numbers", coco_rows(self.result)),
            ("AP of every class", class_rows(self.result)),
        ):
            fold = f"{title}, means over seeds" if lines else ""
            blocks.append(Block(headings=headings, rows=lines, fold=fold))
        caption = (
            "A dot is one run, a diamond the mean of several. Axes do not start at zero; their "
            "ranges are at least as wide as seeds make a result differ."
        )
        for metric in ("ap", "segm_ap") if "mask AP" in columns(self.result) else ("ap",):
            draw = partial(pictures.draw_accuracy, self.result, metric)
            blocks.append(figure_block(draw, caption))
        curves = {
            arm: [
                (entry["step"], entry["loss"])
                for entry in read_log(run)
                if entry["kind"] == "train"
            ]
            for arm, run in self.first_runs.items()
        }
        if any(curves.values()):
            draw = partial(pictures.draw_losses, curves)
            blocks.append(figure_block(draw, "Training loss of each arm's first seed."))
        return blocks

    def _conditions(self) -> str:
        counted = self.result["macs_input"]
        height, width = counted["image"][1:]
        masks = f" and {counted['masks']} masks" if counted["masks"] else ""
        return (
            f"MACs on {width}x{height} pixels with {counted['boxes']} boxes{masks}, counted on the "
            "built models; in brackets: change of backbone parameters against the baseline. AP in "
            f"0-1; latency is the median of {self.config.latency_runs} forward passes of one "
            "validation image, arms in turn; training runs side by side share the machine, which "
            "their seconds show."
        )

    def _comparisons(self) -> Block:
        headings = ("arm", "against", "metric", "mean difference", "standard error", "n", "verdict")
        lines = [
            (
                *(comparison["arm"], comparison["versus"], comparison["metric"]),
                f"{comparison['mean']:+.4f}",
                "-" if comparison["se"] is None else f"{comparison['se']:.4f}",
                str(comparison["n"]),
                verdict_of(comparison),
            )
            for comparison in self.result["comparisons"]
        ]
        return Block(headings=headings, rows=lines, words=("against", "metric", "verdict"))

    def detections(self) -> list[Block]:
        """Validation images with the detections of the baseline and the searched network."""
        note = Block(f"Detections with a score of at least 0.5. {LEGEND}", "note")
        blocks = []
        for arm in (BASELINE, SEARCHED):
            if arm in self.first_runs and has_weights(self.first_runs[arm]):
                model, _, _ = load_run(self.first_runs[arm])
                masks = "mask" in self.model_config.name
                val = load_data(self.config.train.data, with_masks=masks, progress=False).val
                drawn = draw_pictures(model, val, count=_DRAWN_IMAGES)
                path = self.folder / "pictures" / f"detections-{arm}.png"
                content = _png(in_grid(drawn, 3))
                write_file(path, lambda file, c=content: file.write(c))
                text = f"{arm}, first seed, validation images:"
                blocks.append(
                    Block(text, caption=arm, gallery=[_png(picture) for picture in drawn])
                )
        return [note, *blocks] if blocks else [Block(_NO_WEIGHTS, "note")]

    def widths(self) -> list[Block]:
        """Widths of every arm, and the floors, caps and budgets that bent the searched ones."""
        arms = self.result["arms"]
        if len(arms) < 2:
            return []
        blocks = []
        if SEARCHED in self.first_runs:
            plan = load_plan(plan_path(self.folder, self.first_runs[SEARCHED].parent.name))
            text = (
                f"Searched widths follow {plan.alpha:.3g} x demand^{plan.power:.3g}; they use "
                f"{100 * plan.macs / plan.budget:.2f} % of the budget of {plan.budget:,.0f} MACs."
            )
            notes = (f"{note}." for note in plan.notes)
            blocks.append(Block(" ".join([text, *notes]), "note"))
        groups = [group.name for group in self.groups]
        draw = partial(pictures.draw_widths, self.result, groups)
        caption = "Channels of every width group relative to the baseline."
        lines = [(group, *(str(arm["widths"][group]) for arm in arms.values())) for group in groups]
        table = Block(headings=("group", *arms), rows=lines, fold="all widths")
        return [*blocks, figure_block(draw, caption), table]

    def demand(self) -> list[Block]:
        """Demand of every width group."""
        rule = self.config.rule
        trained, untrained = (self._measured(name, rule) for name in (BASELINE, UNTRAINED))
        if trained is None:
            return []
        demands = [
            None if found is None else demand(found, self.groups, rule)
            for found in (trained, untrained)
        ]
        draw = partial(pictures.draw_demand, self.groups, demands[0] or {}, demands[1], rule)
        caption = "Share of its width that each group's feature maps use, from the measuring pass."
        return [figure_block(draw, caption)]

    def spectra(self) -> list[Block]:
        """Spectra of the stages, and of every map."""
        trained = self._measured(BASELINE)
        if trained is None:
            return []
        untrained = self._measured(UNTRAINED)
        draw = partial(pictures.draw_stage_spectra, self.groups, trained, untrained)
        caption = (
            "Spectra of the stages' outputs, relative to the largest eigenvalue; dashed: 1e-3."
        )
        short = {
            name.removeprefix("backbone.body."): spectrum for name, spectrum in trained.items()
        }
        panels = {
            f"{name}: {spectrum.dim()} of {spectrum.channels}": {"trained": spectrum}
            for name, spectrum in short.items()
        }
        every = figure_block(
            partial(pictures.draw_spectra, panels),
            "Every measured feature map; dimension: eigenvalues above 1e-3 of the largest.",
        )
        return [figure_block(draw, caption), replace(every, fold="every feature map")]

    def dynamics(self) -> list[Block]:
        """Live dimensions of the baseline while it trained."""
        folder = self.first_runs[BASELINE] / "spectra"
        if not (folder / "history.jsonl").exists():
            return []
        history = load_history(folder)
        layers = len(history.layers())
        if not len(history) or not layers:
            return []
        note = (
            "Tracked while the baseline trained, from sampled rows of features that move; widths "
            "come from the measuring pass above."
        )
        drawn = png(plot_dims(history, free_axes(layers)))
        caption = "Live dimensions of the baseline while it trained"
        fold = f"{layers} layers, {len(history)} snapshots"
        return [Block(note, "note"), Block(picture=drawn, caption=caption, fold=fold)]

    def settings(self) -> list[Block]:
        """Every setting of the search."""
        text = json.dumps(json.loads((self.folder / "config.json").read_text()), indent=2)
        return [Block(listing=text, fold="every setting")]

    def _measured(self, name: str, rule: str = "dof") -> Mapping[str, Any] | None:
        path = measured_path(self.folder, name, rule)
        return load_spectra(path) if path.exists() else None


def _png(pixels: NDArray[np.uint8]) -> bytes:
    packed = io.BytesIO()
    Image.fromarray(pixels).save(packed, format="PNG")
    return packed.getvalue()
