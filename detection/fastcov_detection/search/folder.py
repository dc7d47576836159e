"""Where a search keeps what: shared by the search, its report and the export."""

from __future__ import annotations

from pathlib import Path

from fastcov.widths import find_rule


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
