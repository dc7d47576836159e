"""Where a search keeps what: shared by the search, its report and the export."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcov.widths import find_rule
from fastcov_detection.config import ConfigError, closest
from fastcov_detection.search.proposals import SEARCHED, load_plan


def run_dir(folder: Path, arm_folder: str, seed: int) -> Path:
    """Folder of one training run."""
    return folder / "arms" / arm_folder / f"seed{seed}"


def plan_path(folder: Path, name: str) -> Path:
    """File of one plan of widths."""
    return folder / "widths" / f"{name}.json"


def spectra_path(folder: Path, name: str) -> Path:
    """File of one measuring pass."""
    return folder / "spectra" / f"{name}.npz"


def measured_path(folder: Path, name: str, rule: str) -> Path:
    """File of the measuring pass of a network that a rule reads: of features, or of gradients."""
    return spectra_path(folder, name if find_rule(rule).reads == "features" else f"{name}-{rule}")


def start_path(folder: Path, name: str) -> Path:
    """File of the weights that a run starts from, where they are not random."""
    return folder / "starts" / f"{name}.pt"


def searched_folder(number: int) -> str:
    """Folder of the arm that a round of the search proposed."""
    return f"{SEARCHED}-round{number}"


def finished_runs(folder: Path, result: Mapping[str, Any], arm: str) -> list[Path]:
    """Folders of an arm's finished runs, in the order of its seeds.

    Args:
        folder: Of the search.
        result: Its result.json.
        arm: Name of the arm.

    Raises:
        ConfigError: If the search has no such arm.
    """
    if arm not in result["arms"]:
        raise ConfigError(f"{folder} has no arm {arm!r}{closest(arm, list(result['arms']))}")
    name = arm
    if arm == SEARCHED:
        name = _final_round(folder, result["arms"][arm]["widths"])
    runs = (run_dir(folder, name, run["seed"]) for run in result["arms"][arm]["runs"])
    return [run for run in runs if (run / "run.json").exists()]


def _final_round(folder: Path, widths: Mapping[str, int]) -> str:
    """The round whose plan became the searched arm: the last one with these widths."""
    rounds = sorted((folder / "widths").glob(f"{SEARCHED}-round*.json"), reverse=True)
    for path in rounds:
        if load_plan(path).widths.items() <= widths.items():
            return path.stem
    raise ConfigError(
        f"no plan in {folder / 'widths'} has the searched widths of result.json; "
        "run the search again, finished runs are kept"
    )
