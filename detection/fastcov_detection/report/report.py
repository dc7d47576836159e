"""The report of a search: one HTML page that holds its own pictures."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image

from fastcov import load_history
from fastcov.show.figures import free_axes, png, spectra_grid
from fastcov.show.plot import plot_dims
from fastcov.widths import demand
from fastcov_detection import __version__
from fastcov_detection.config import (
    ModelConfig,
    SearchConfig,
    TrainConfig,
    from_dict,
    load_config,
)
from fastcov_detection.data.dataset import load_data
from fastcov_detection.detector.build import build_model
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.files import write_file
from fastcov_detection.progress import progress_bar
from fastcov_detection.report import page, pictures
from fastcov_detection.report.tables import (
    class_rows,
    coco_rows,
    columns,
    rows,
    sentences,
)
from fastcov_detection.search.arms import BASELINE, SEARCHED, UNTRAINED
from fastcov_detection.search.folder import measured_path, plan_path
from fastcov_detection.search.proposals import load_plan
from fastcov_detection.search.results import finished_runs, read_result, verdict_of
from fastcov_detection.search.spectra import load_spectra
from fastcov_detection.train.drawing import LEGEND, draw_pictures, in_grid
from fastcov_detection.train.folder import has_weights, load_run
from fastcov_detection.train.logbook import read_log

_DRAWN_IMAGES = 6
_NO_WEIGHTS = (
    "The first runs' weights are not in this folder (only results came back from version control), "
    "so no detections are drawn and no latency is measured."
)


def write_report(folder: str | os.PathLike[str], *, progress: bool = False) -> Path:
    """Writes ``report.html`` of a search, and the pictures of detections under ``pictures/``.

    Args:
        folder: Of a search whose result.json exists.
        progress: Show a bar.

    Returns:
        The page's path.

    Raises:
        ConfigError: If the folder holds no search.
    """
    search = _Search(Path(folder))
    makers = (
        search.outcome,
        search.detections,
        search.widths,
        search.demand,
        search.spectra,
        search.dynamics,
        search.settings,
    )
    parts: list[str] = []
    with progress_bar("writing the report", len(makers), enabled=progress) as advance:
        for make in makers:
            parts.append(make())
            advance(1)
    detector = search.config.train.model.name
    versions = f"fastcov-detection {__version__}"
    made_by = [versions, f"torch {torch.__version__}", search.result["commit"]]
    footer = ", ".join(dict.fromkeys(made_by)) + f"; data {search.config.train.data.name}"
    title = f"Width search: {detector} on {Path(search.config.train.data.name).name}"
    return page.write_page(search.folder / "report.html", title, parts, footer)


class _Search:
    """What the page is made of."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.result: dict[str, Any] = read_result(folder)
        self.config = load_config(SearchConfig, folder / "config.json")
        self.first_runs = {
            arm: runs[0]
            for arm in self.result["arms"]
            if (runs := finished_runs(folder, self.result, arm))
        }
        self.model_config = self._trained_config()
        with torch.device("meta"):
            baseline = build_model(replace(self.model_config, init="random"))
        self.groups = width_groups(baseline, vary=self.config.vary)

    def _trained_config(self) -> ModelConfig:
        """The detector's configuration with the number of classes that the data has."""
        path = self.first_runs[BASELINE] / "run.json"
        config = json.loads(path.read_text(encoding="utf-8"))["config"]
        return from_dict(TrainConfig, config).model

    def outcome(self) -> str:
        said = sentences(self.result)
        with_spread = any(len(arm["runs"]) > 1 for arm in self.result["arms"].values())
        parts = [page.paragraph(said[0], "lead")]
        parts.append(page.table(columns(self.result), rows(self.result)))
        parts.append(page.paragraph(self._conditions(), "note"))
        if with_spread:
            parts.append(self._comparisons())
        parts.append(page.paragraph(said[-1]))
        parts.append(self._coco())
        drawn = ["ap"] + (["segm_ap"] if "mask AP" in columns(self.result) else [])
        caption = (
            "Accuracy against size. A dot is a single run, a diamond the mean of several. Axes do "
            "not start at zero; their ranges are at least those of what seeds change."
        )
        figures = [
            _figure(pictures.draw_accuracy(self.result, metric), caption) for metric in drawn
        ]
        curves = {arm: _loss_curve(run) for arm, run in self.first_runs.items()}
        if any(curves.values()):
            losses = pictures.draw_losses(curves)
            figures.append(_figure(losses, "Training loss of each arm's first seed."))
        return "".join([*parts, *figures])

    def _coco(self) -> str:
        """COCO's other numbers, and every class, folded away."""
        folded = []
        for title, (headings, lines) in (
            ("COCO's twelve numbers", coco_rows(self.result)),
            ("AP of every class", class_rows(self.result)),
        ):
            if lines:
                folded.append(
                    page.folded(f"{title}, means over seeds", page.table(headings, lines))
                )
        return "".join(folded)

    def _conditions(self) -> str:
        counted = self.result["macs_input"]
        height, width = counted["image"][1:]
        masks = f" and {counted['masks']} masks" if counted["masks"] else ""
        change = "change of backbone parameters against the baseline"
        return (
            f"MACs on {width}x{height} pixels with {counted['boxes']} boxes{masks}, counted on the "
            f"built models; in brackets: {change}. AP in 0-1; latency is the median of "
            f"{self.config.latency_runs} forward passes of one validation image, arms in turn; "
            "training runs side by side share the machine, which their seconds show."
        )

    def _comparisons(self) -> str:
        headings = ("arm", "against", "metric", "mean difference", "standard error", "n", "verdict")
        lines = [
            (
                one["arm"],
                one["versus"],
                one["metric"],
                f"{one['mean']:+.4f}",
                "-" if one["se"] is None else f"{one['se']:.4f}",
                str(one["n"]),
                verdict_of(one),
            )
            for one in self.result["comparisons"]
        ]
        return page.table(headings, lines, text=("against", "metric", "verdict"))

    def detections(self) -> str:
        parts = []
        for arm in (BASELINE, SEARCHED):
            if arm in self.first_runs and has_weights(self.first_runs[arm]):
                model, _, _ = load_run(self.first_runs[arm])
                path = self.folder / "pictures" / f"detections-{arm}.png"
                loaded = load_data(
                    self.config.train.data, with_masks="mask" in self.model_config.name
                )
                drawn = draw_pictures(model, loaded.val, count=_DRAWN_IMAGES)
                write_file(path, partial(_save_png, in_grid(drawn, 3)))
                parts.append(page.paragraph(f"{arm}, first seed, validation images:"))
                parts.append(page.gallery([_png(one) for one in drawn], arm))
        if not parts:
            return page.section("Detections", page.paragraph(_NO_WEIGHTS, "note"))
        note = f"Detections with a score of at least 0.5. {LEGEND}"
        return page.section("Detections", page.paragraph(note, "note"), *parts)

    def widths(self) -> str:
        if len(self.result["arms"]) < 2:
            return ""
        groups = [group.name for group in self.groups]
        figure = pictures.draw_widths(self.result, groups)
        arms = self.result["arms"]
        headings = ("group", *arms)
        lines = [(group, *(str(arm["widths"][group]) for arm in arms.values())) for group in groups]
        return page.section(
            "Widths",
            *self._notes(),
            _figure(figure, "Channels of every width group relative to the baseline."),
            page.folded("all widths", page.table(headings, lines)),
        )

    def _notes(self) -> list[str]:
        """What bent the searched widths: floors, caps, budgets that could not be met."""
        if SEARCHED not in self.first_runs:
            return []
        plan = load_plan(plan_path(self.folder, self.first_runs[SEARCHED].parent.name))
        text = (
            f"Searched widths follow {plan.alpha:.3g} x demand^{plan.power:.3g}; they use "
            f"{100 * plan.macs / plan.budget:.2f} % of the budget of {plan.budget:,.0f} MACs."
        )
        return [page.paragraph(" ".join([text, *(f"{note}." for note in plan.notes)]), "note")]

    def demand(self) -> str:
        rule = self.config.rule
        trained = self._measured(BASELINE, rule)
        untrained = self._measured(UNTRAINED, rule)
        if trained is None:
            return ""
        figure = pictures.draw_demand(
            self.groups,
            demand(trained, self.groups, rule),
            None if untrained is None else demand(untrained, self.groups, rule),
            rule,
        )
        caption = "What each group's feature maps use of its width, from the measuring pass."
        return page.section("Demand", _figure(figure, caption))

    def spectra(self) -> str:
        trained = self._measured(BASELINE)
        if trained is None:
            return ""
        stages = pictures.draw_stage_spectra(self.groups, trained, self._measured(UNTRAINED))
        short = {name.removeprefix("backbone.body."): one for name, one in trained.items()}
        everything = page.picture(png(spectra_grid(short)), "Every measured feature map")
        caption = (
            "Spectra of what the stages hand on, relative to the largest eigenvalue; dashed: 1e-3."
        )
        return page.section(
            "Spectra", _figure(stages, caption), page.folded("every feature map", everything)
        )

    def dynamics(self) -> str:
        folder = self.first_runs[BASELINE] / "spectra"
        if not (folder / "history.jsonl").exists():
            return ""
        history = load_history(folder)
        if not len(history) or not history.layers():
            return ""
        drawing = plot_dims(history, free_axes(len(history.layers())))
        content = page.picture(png(drawing), "Live dimensions of the baseline while it trained")
        note = (
            "What fastcov.track saw while the baseline trained: sampled rows, features that move; "
            "widths come from the measuring pass above."
        )
        return page.section(
            "Dimensions over training",
            page.paragraph(note, "note"),
            page.folded(f"{len(history.layers())} layers, {len(history)} snapshots", content),
        )

    def settings(self) -> str:
        text = json.dumps(json.loads((self.folder / "config.json").read_text()), indent=2)
        return page.section("Settings", page.folded("every setting", page.listing(text)))

    def _measured(self, name: str, rule: str = "dof") -> Mapping[str, Any] | None:
        path = measured_path(self.folder, name, rule)
        return load_spectra(path) if path.exists() else None


def _loss_curve(run: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_log(run) if line.get("kind") == "train"]


def _save_png(pixels: NDArray[np.uint8], file: IO[bytes]) -> None:
    Image.fromarray(pixels).save(file, format="PNG")


def _png(pixels: NDArray[np.uint8]) -> bytes:
    packed = io.BytesIO()
    _save_png(pixels, packed)
    return packed.getvalue()


def _figure(figure: Figure, caption: str) -> str:
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=pictures.DPI, facecolor="white")
    return page.picture(packed.getvalue(), caption)
