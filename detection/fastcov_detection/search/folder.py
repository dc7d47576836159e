"""Folder of a search: paths of its files, checks that they are of this search, and kept copies.

A folder of kept files (``search --results``) has the same layout without weights, checkpoints and
logs, so that a search goes on from a fresh clone without repeating a finished run. Latency and
pictures need runs that were trained in the folder itself.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastcov import Spectrum
from fastcov.widths import WidthPlan, find_rule
from fastcov_detection.config import (
    DATA_PLACES,
    SearchConfig,
    comparable_settings,
    load_config,
    to_dict,
)
from fastcov_detection.errors import ConfigError, DataError
from fastcov_detection.files import write_file, write_text

_KEPT = (
    "config.json",
    "data.json",
    "widths/*.json",
    "spectra/*.npz",
    "arms/*/seed*/run.json",
    "widths.json",
    "result.json",
)
_PLANS = "widths/*.json"
# Settings that may change when a search goes on in a folder: any other would mix experiments.
_MAY_GROW = ("arms", "seeds", "peer_seeds", "jobs", "latency_runs")
_DATA = "data.json"
_SCALARS = "/count,total"
_LARGEST_BYTES = 256 * 2**20


def run_dir(folder: Path, arm_folder: str, seed: int) -> Path:
    """Folder of one training run."""
    return folder / "arms" / arm_folder / f"seed{seed}"


def plan_path(folder: Path, name: str) -> Path:
    """File of one plan of widths."""
    return folder / "widths" / f"{name}.json"


def measured_path(folder: Path, name: str, rule: str) -> Path:
    """File of the measuring pass of a network that a rule reads: of features, or of gradients."""
    name = name if find_rule(rule).reads == "features" else f"{name}-{rule}"
    return folder / "spectra" / f"{name}.npz"


def start_path(folder: Path, name: str) -> Path:
    """File of the weights that a run starts from, where they are not random."""
    return folder / "starts" / f"{name}.pt"


def save_plan(plan: WidthPlan, path: Path) -> None:
    """JSON file of a plan; ``--widths`` reads it."""
    write_text(path, json.dumps(asdict(plan), indent=2) + "\n")


def load_plan(path: Path) -> WidthPlan:
    """Plan from a file of :func:`save_plan`.

    Raises:
        ConfigError: If the file does not hold a plan.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return WidthPlan(**{**values, "notes": tuple(values["notes"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} does not hold a plan of widths ({error}); delete it, the search makes it anew"
        ) from None


def save_spectra(spectra: Mapping[str, Spectrum], path: Path) -> None:
    """File (.npz) of eigenvalues by name, each with the rows read and the trace."""
    arrays = {name: spectrum.eigenvalues.numpy() for name, spectrum in spectra.items()}
    arrays |= {f"{name}{_SCALARS}": np.array([s.count, s.total]) for name, s in spectra.items()}
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    write_file(path, lambda file: file.write(packed.getvalue()))


def load_spectra(path: Path) -> dict[str, Spectrum]:
    """Spectra from a file of :func:`save_spectra`, read without pickle.

    Raises:
        DataError: If the file is missing, damaged or larger than spectra can be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _LARGEST_BYTES:
            raise ValueError(f"it unpacks to {size:,} bytes, more than {_LARGEST_BYTES:,}")
        spectra = {}
        with np.load(path, allow_pickle=False) as arrays:
            for name in arrays.files:
                if not name.endswith(_SCALARS):
                    count, total = arrays[f"{name}{_SCALARS}"].tolist()
                    values = torch.from_numpy(arrays[name])
                    spectra[name] = Spectrum(values, int(count), total, name)
        return spectra
    except FileNotFoundError:
        raise DataError(f"no spectra at {path}; the search measures them") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        raise DataError(
            f"{path} does not hold spectra ({error}); delete it, the search measures them again"
        ) from None


def check_same_search(folder: Path, config: SearchConfig) -> None:
    """Refusal of a folder that holds another search.

    Raises:
        ConfigError: Naming the first setting that differs.
    """
    if not (folder / "config.json").exists():
        return
    # A setting that came later had its default then.
    before = comparable_settings(to_dict(load_config(SearchConfig, folder / "config.json")))
    now = comparable_settings(to_dict(config))
    free = {f"train.{place}" for place in DATA_PLACES} if (folder / _DATA).exists() else set()
    for name in sorted(before.keys() | now.keys()):
        old, new = before.get(name), now.get(name)
        if old != new and name not in free and name.split(".")[0] not in _MAY_GROW:
            raise ConfigError(
                f"{folder} holds a search with {name} = {old!r}, not {new!r}; "
                "choose another folder, or the same settings to go on with it"
            )


def check_same_data(folder: Path, content: Mapping[str, str]) -> None:
    """Comparison of a search's data with the digests that its folder holds; a new one gets them.

    Args:
        folder: Folder of the search.
        content: Digests of the data set, as
            :func:`fastcov_detection.data.dataset.load_data` gives them.

    Raises:
        ConfigError: Naming the parts that have changed.
    """
    path = folder / _DATA
    if not path.exists():
        write_text(path, json.dumps(dict(content), indent=2) + "\n")
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in {**known, **content} if known.get(key) != content.get(key)]
    if changed:
        raise ConfigError(
            f"{folder} holds a search on other data: {', '.join(sorted(changed))} changed since; "
            "choose another folder"
        )


def restore(kept: Path, folder: Path) -> list[Path]:
    """Copy of the files that an earlier search kept and this folder lacks.

    Returns:
        Paths of the copied files, relative to the folder.

    Raises:
        ConfigError: If both hold a plan of widths and the two differ: later runs follow from it.
    """
    restored = []
    for path in _files(kept):
        target = folder / path
        if not target.exists():
            _copy(kept / path, target)
            restored.append(path)
        elif path.match(_PLANS) and target.read_bytes() != (kept / path).read_bytes():
            raise ConfigError(
                f"{target} and {kept / path} are different widths of the same arm; "
                "choose another folder for --out or for --results"
            )
    return restored


def keep(folder: Path, kept: Path) -> None:
    """Copy of the files that are new or changed since the last call; each appears whole."""
    for path in _files(folder):
        target = kept / path
        if not target.exists() or target.read_bytes() != (folder / path).read_bytes():
            _copy(folder / path, target)


def _files(folder: Path) -> list[Path]:
    return [path.relative_to(folder) for kind in _KEPT for path in sorted(folder.glob(kind))]


def _copy(source: Path, target: Path) -> None:
    content: Any = source.read_bytes()
    write_file(target, lambda file: file.write(content))
