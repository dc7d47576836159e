"""Spectra of a measuring pass on disk: one .npz of eigenvalues by feature map."""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from fastcov import Spectrum
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_file

_SCALARS = "count,total"
_LARGEST_BYTES = 256 * 2**20


def save_spectra(spectra: Mapping[str, Spectrum], path: Path) -> None:
    """Writes eigenvalues by name, and beside each the rows read and the trace."""
    arrays: dict[str, np.ndarray] = {}
    for name, spectrum in spectra.items():
        arrays[name] = spectrum.eigenvalues.numpy()
        arrays[f"{name}/{_SCALARS}"] = np.array([spectrum.count, spectrum.total])
    packed = io.BytesIO()
    np.savez_compressed(packed, allow_pickle=False, **arrays)
    write_file(path, lambda file: file.write(packed.getvalue()))


def load_spectra(path: Path) -> dict[str, Spectrum]:
    """Reads spectra that :func:`save_spectra` wrote, without pickle.

    Raises:
        DataError: If the file is missing, damaged or larger than spectra can be.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(entry.file_size for entry in archive.infolist())
        if size > _LARGEST_BYTES:
            raise DataError(
                f"{path} unpacks to {size:,} bytes, more than {_LARGEST_BYTES:,}; "
                "it is not a file of spectra"
            )
        with np.load(path, allow_pickle=False) as arrays:
            names = [name for name in arrays.files if not name.endswith(f"/{_SCALARS}")]
            spectra = {}
            for name in names:
                count, total = arrays[f"{name}/{_SCALARS}"].tolist()
                values = torch.from_numpy(arrays[name])
                spectra[name] = Spectrum(values, int(count), total, name)
    except FileNotFoundError:
        raise DataError(f"no spectra at {path}; the search measures them") from None
    except (OSError, KeyError, ValueError, zipfile.BadZipFile) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(
            f"{path} does not hold spectra ({error}); delete it, the search measures them again"
        ) from None
    return spectra
