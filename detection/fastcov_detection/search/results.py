"""The record of a search, result.json: one schema for the demo and for every other search.

``{schema_version, macs_input, commit, arms, comparisons}``: under ``arms`` each arm's params,
backbone_params, macs, widths by group, latency_ms and runs (seed, ap, ap50, segm_ap or null,
train_s, cpu_s, and COCO's other numbers and every class's AP where the run has them); comparisons
are paired by seed. AP is in 0-1. The random arm is drawn anew for
every seed: its widths and latency are those of the first seed, its costs the mean over seeds, and
the widths of each run lie in the run's folder. So are those of torch-pruning, where ``made_with``
gives the program's version.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastcov_detection.config import ModelConfig
from fastcov_detection.detector.build import BOX_REGIONS, MASK_REGIONS, parse_name
from fastcov_detection.errors import ConfigError, closest
from fastcov_detection.files import commit, write_text
from fastcov_detection.search.arms import BASELINE, find_arm
from fastcov_detection.search.folder import run_dir
from fastcov_detection.search.verdicts import Comparison, compare_paired
from fastcov_detection.train.folder import RunResult

SCHEMA_VERSION = 1


@dataclass
class ArmRecord:
    """Record of one arm: its costs, and the results of its runs."""

    name: str
    widths: dict[str, int]
    runs: list[RunResult] = field(default_factory=list)
    latency_ms: float | None = None
    made_with: str | None = None
    """Name and version of the other program whose arm this is."""

    def mean_cost(self, name: str) -> int:
        """Mean over the runs of ``params``, ``backbone_params`` or ``macs``."""
        values: list[int] = [getattr(run, name) for run in self.runs]
        return round(sum(values) / len(values))

    def by_seed(self, metric: str) -> dict[int, float]:
        """A metric of the finished runs, where it was measured."""
        found = {run.seed: getattr(run, metric) for run in self.runs}
        return {seed: value for seed, value in found.items() if value is not None}

    def as_dict(self) -> dict[str, Any]:
        """The arm as result.json holds it."""
        peer = {} if self.made_with is None else {"made_with": self.made_with}
        keys = ("seed", "ap", "ap50", "segm_ap", "train_s", "cpu_s")
        return {
            "params": self.mean_cost("params"),
            "backbone_params": self.mean_cost("backbone_params"),
            "macs": self.mean_cost("macs"),
            "widths": self.widths,
            "latency_ms": self.latency_ms,
            **peer,
            "runs": [
                {key: getattr(run, key) for key in keys}
                | {key: getattr(run, key) for key in ("numbers", "classes") if getattr(run, key)}
                for run in self.runs
            ],
        }


def compare_arms(records: Sequence[ArmRecord]) -> list[Comparison]:
    """Comparisons of all pairs of arms that have a question: searched arms first."""
    arms = [(find_arm(record.name), record) for record in records]
    arms.sort(key=lambda pair: not pair[0].is_searched)
    found = []
    for metric in ("ap", "segm_ap"):
        for arm, record in arms:
            for versus, other in arms:
                question = arm.question(versus)
                if arm == versus or question is None:
                    continue
                values = record.by_seed(metric), other.by_seed(metric)
                comparison = compare_paired(arm.name, versus.name, metric, *values, question)
                if comparison is not None:
                    found.append(comparison)
    return found


def finished_runs(folder: Path, result: Mapping[str, Any], name: str) -> list[Path]:
    """Folders of an arm's finished runs, in the order of its seeds.

    Args:
        folder: Folder of the search.
        result: Content of the search's result.json.
        name: Name of the arm.

    Raises:
        ConfigError: If the search has no such arm.
    """
    if name not in result["arms"]:
        raise ConfigError(f"{folder} has no arm {name!r}{closest(name, list(result['arms']))}")
    record = result["arms"][name]
    runs_of = find_arm(name).run_folder(folder, record["widths"])
    runs = (run_dir(folder, runs_of, run["seed"]) for run in record["runs"])
    return [run for run in runs if (run / "run.json").exists()]


def macs_input(model: ModelConfig, image_size: int) -> dict[str, Any]:
    """Sizes of the input on which MACs are counted."""
    predicts_masks, _ = parse_name(model.name)
    return {
        "image": [3, image_size, image_size],
        "boxes": min(BOX_REGIONS, model.rpn_post_nms_test),
        "masks": min(MASK_REGIONS, model.detections_per_image) if predicts_masks else 0,
    }


def write_result(
    path: Path, arms: Sequence[ArmRecord], comparisons: Sequence[Comparison], counted_on: Any
) -> dict[str, Any]:
    """Content of result.json, after it was written."""
    result = {
        "schema_version": SCHEMA_VERSION,
        "macs_input": counted_on,
        "commit": commit(),
        "arms": {arm.name: arm.as_dict() for arm in arms if arm.runs},
        "comparisons": [comparison.as_dict() for comparison in comparisons],
    }
    write_text(path, json.dumps(result, indent=2) + "\n")
    return result


def read_result(folder: Path) -> dict[str, Any]:
    """Content of a search's result.json.

    Raises:
        ConfigError: If it is missing, damaged or of another version.
    """
    path = folder / "result.json"
    try:
        result: Any = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(f"no result.json in {folder}; give the folder of a search") from None
    except ValueError as error:
        raise ConfigError(f"{path} is not JSON ({error}); run the search again") from None
    version = result.get("schema_version") if isinstance(result, Mapping) else None
    if version != SCHEMA_VERSION:
        raise ConfigError(
            f"{path} has schema_version {version!r}, this program reads {SCHEMA_VERSION}; "
            "run the search again, finished runs are kept"
        )
    checked: dict[str, Any] = result
    return checked


def verdict_of(comparison: Mapping[str, Any]) -> str:
    """Verdict of a comparison, in the words of today for older records too."""
    shown = "no loss" if comparison["versus"] == BASELINE else "a gain"
    verdict: str = comparison["verdict"]
    return verdict.replace("would show it", f"would show {shown}")
