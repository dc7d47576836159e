"""Folder of snapshots: its format, and appends that a kill at any moment cannot spoil.

``history.jsonl`` holds one line of numbers per snapshot, ``spectra/00000000.npy`` the eigenvalues
of snapshot 0 laid end to end, float64. The spectra are written first, under a temporary name that
is then renamed; only the complete line makes the snapshot exist. Leftovers of a kill (a partial
last line, a spectra file that no line names) are ignored by readers and removed by the next append.
Only the steps and places of the lines are kept in memory: 16 bytes a snapshot.
"""

import io
import itertools
import json
import math
import operator
import os
from array import array
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastcov.files import flush_to_disk, replacing
from fastcov.spectra.sketched import SketchFacts
from fastcov.spectra.snapshot import Snapshot
from fastcov.spectra.spectrum import Spectrum

FORMAT = 1
_MOST_LINE_BYTES = 64 * 2**20


class HistoryFolder:
    """Snapshots on disk, oldest first.

    Args:
        folder: Need not exist; nothing is written before the first append.

    Raises:
        ValueError: If the folder holds a history that cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines_path = folder / "history.jsonl"
        self.steps = array("q")
        self._line_starts = array("q")  # byte offsets in the file of lines, one a snapshot
        self._lines_end = 0  # offset at which the last complete line ends
        self._known_bytes = 0  # size of the file of lines when this object last used it
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; a history needs a folder")
        if self.lines_path.exists():
            self._scan()

    def channels(self, index: int) -> dict[str, int]:
        """Widths of the layers of one snapshot, without reading its spectra."""
        return {layer["name"]: layer["channels"] for layer in self._read_line(index)["layers"]}

    def read(self, index: int) -> Snapshot:
        """Snapshot of that number, oldest first."""
        line = self._read_line(index)
        eigenvalues = _read_spectra(self._spectra_paths(index)[0], line["length"])
        spectra = {}
        for layer in line["layers"]:
            part = eigenvalues[layer["offset"] : layer["offset"] + layer["channels"]]
            spectra[layer["name"]] = Spectrum(
                part, layer["count"], layer["total"], layer["name"], _sketch(layer)
            )
        return Snapshot(line["step"], line["wall_s"], spectra)

    def append(self, snapshot: Snapshot) -> None:
        """Durable append: the snapshot is on disk when this returns, or nothing changed."""
        index = len(self.steps)
        spectra_path, temporary_path = self._spectra_paths(index)
        spectra_bytes, line_bytes = _encode(snapshot, spectra_path.name)
        self._refuse_second_writer()  # before anything is written, or undone
        try:
            if self._known_bytes != self._lines_end:
                self._cut_lines(self._lines_end)
            self._remove_orphans()
            with replacing(spectra_path, temporary=temporary_path, durable=True):
                temporary_path.write_bytes(spectra_bytes)
            with self.lines_path.open("ab") as lines:
                lines.write(line_bytes)
            flush_to_disk(self.lines_path)
            flush_to_disk(self.folder)
        except BaseException as error:
            self._roll_back(spectra_path)
            if isinstance(error, OSError):
                raise OSError(
                    error.errno,
                    f"cannot store the snapshot of step {snapshot.step} in {self.folder} "
                    f"({len(spectra_bytes) + len(line_bytes)} bytes): {error.strerror}; the "
                    f"{index} snapshots before it are intact: free space or permit writing, then "
                    "snapshot again",
                ) from error
            raise
        self.steps.append(snapshot.step)
        self._line_starts.append(self._lines_end)
        self._lines_end += len(line_bytes)
        self._known_bytes = self._lines_end

    def truncate(self, keep: int) -> None:
        """Removal of all snapshots but the first ``keep``."""
        self._refuse_second_writer()
        end = self._line_starts[keep] if keep < len(self.steps) else self._lines_end
        # The lines go first and reach the disk: a line must never name another snapshot's spectra.
        self._cut_lines(end)
        self._lines_end = end
        del self.steps[keep:], self._line_starts[keep:]
        self._remove_orphans()

    def _spectra_paths(self, index: int) -> tuple[Path, Path]:
        """Path of a snapshot's spectra, and the temporary one that is renamed to it."""
        name = f"{index:08d}.npy"
        return self.folder / "spectra" / name, self.folder / "spectra" / f"{name}.tmp"

    def _scan(self) -> None:
        for number, line in enumerate(_whole_lines(self.lines_path), 1):
            start = self._lines_end
            try:
                step = parse_line(line, len(self.steps))["step"]
            except ValueError as error:
                at_the_end = start + len(line) == self.lines_path.stat().st_size
                if isinstance(error, json.JSONDecodeError) and at_the_end:
                    break  # a power cut can leave zeros where the last line should be
                raise ValueError(
                    f"{self.lines_path}, line {number}: {error}; move the folder away, or delete "
                    "this line and all after it to keep the snapshots before it"
                ) from error
            if self.steps and step < self.steps[-1]:
                raise ValueError(
                    f"{self.lines_path}, line {number}: step {step} follows step "
                    f"{self.steps[-1]}; two runs wrote here, give each its own folder"
                )
            self.steps.append(step)
            self._line_starts.append(start)
            self._lines_end = start + len(line)
        self._known_bytes = self.lines_path.stat().st_size

    def _read_line(self, index: int) -> dict[str, Any]:
        start = self._line_starts[index]
        is_last = index + 1 == len(self._line_starts)
        end = self._lines_end if is_last else self._line_starts[index + 1]
        with self.lines_path.open("rb") as lines:
            lines.seek(start)
            return parse_line(lines.read(end - start), index)

    def _refuse_second_writer(self) -> None:
        found = self.lines_path.stat().st_size if self.lines_path.exists() else 0
        if found != self._known_bytes:
            raise ValueError(
                f"{self.lines_path} changed from {self._known_bytes} to {found} bytes since it was "
                "read: another process writes here; give each run (and each rank) its own folder"
            )

    def _cut_lines(self, end: int) -> None:
        with self.lines_path.open("r+b") as lines:
            lines.truncate(end)
            os.fsync(lines.fileno())
        self._known_bytes = end

    def _remove_orphans(self) -> None:
        """Removal of spectra that no line names: their numbers follow the last snapshot's."""
        for index in itertools.count(len(self.steps)):
            orphans = [path for path in self._spectra_paths(index) if path.exists()]
            if not orphans:
                return
            for path in orphans:
                path.unlink(missing_ok=True)

    def _roll_back(self, spectra_path: Path) -> None:
        """Repair after a failed append, as far as the disk allows; the next append ends it."""
        try:
            if self.lines_path.exists() and self.lines_path.stat().st_size > self._lines_end:
                self._cut_lines(self._lines_end)
            spectra_path.unlink(missing_ok=True)
        except OSError:
            self._known_bytes = self.lines_path.stat().st_size if self.lines_path.exists() else 0


def parse_line(line: bytes, index: int) -> dict[str, Any]:
    """Fields of one line of ``history.jsonl``: step, wall_s, length and layers, each checked.

    A layer has name, offset, channels, count and total.

    Raises:
        ValueError: If a field is wrong; names the field. json.JSONDecodeError where it is no JSON
            at all.
    """
    try:
        fields = json.loads(line.decode("utf-8", errors="replace"))
    except RecursionError as error:
        raise ValueError("nested too deeply for a snapshot") from error
    if not isinstance(fields, dict) or "format" not in fields:
        raise ValueError('no snapshot: the field "format" is missing')
    if fields["format"] != FORMAT:
        raise ValueError(
            f"format {fields['format']!r} is not {FORMAT}, the one this fastcov-torch reads; "
            "install the version that wrote it"
        )
    _check(fields, "step", _is_whole)
    _check(fields, "wall_s", _is_amount)
    _check(fields, "file", lambda value: value == f"{index:08d}.npy")
    _check(fields, "layers", lambda value: isinstance(value, list))
    offset = 0
    for layer in fields["layers"]:
        if not isinstance(layer, dict):
            raise ValueError(f"layers holds {layer!r}, which is no layer")
        _check(layer, "name", lambda value: isinstance(value, str))
        _check(layer, "channels", lambda value: _is_whole(value) and value >= 1)
        _check(layer, "offset", partial(operator.eq, offset))
        _check(layer, "count", _is_whole)
        _check(layer, "total", _is_amount)
        if "sketch" in layer:
            _check(layer, "sketch", _is_sketch)
        offset += layer["channels"]
    _check(fields, "length", lambda value: value == offset)
    return fields


def _check(fields: Mapping[str, Any], key: str, is_valid: Callable[[Any], bool]) -> None:
    value = fields.get(key)
    if not is_valid(value):
        raise ValueError(f"the field {key!r} is {value!r}, which cannot be")


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_amount(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value) and value >= 0)


def _is_sketch(value: object) -> bool:
    if not isinstance(value, dict) or value.keys() != set(SketchFacts._fields):
        return False
    ends = (value["lower"], value["upper"])
    are_ends = all(isinstance(end, list) and all(map(_is_amount, end)) for end in ends)
    return _is_whole(value["width"]) and _is_amount(value["squares"]) and are_ends


def _sketch(layer: Mapping[str, Any]) -> SketchFacts | None:
    if "sketch" not in layer:
        return None
    facts = layer["sketch"]
    return SketchFacts(
        facts["width"], facts["squares"], tuple(facts["lower"]), tuple(facts["upper"])
    )


def _whole_lines(path: Path) -> Iterator[bytes]:
    with path.open("rb") as lines:
        for line in iter(lambda: lines.readline(_MOST_LINE_BYTES), b""):
            if line.endswith(b"\n"):
                yield line
            elif len(line) == _MOST_LINE_BYTES:
                raise ValueError(
                    f"{path} has a line of more than {_MOST_LINE_BYTES >> 20} MiB; "
                    "this is no history that fastcov wrote"
                )


def _encode(snapshot: Snapshot, file_name: str) -> tuple[bytes, bytes]:
    """Content of the file of spectra, and the line that makes the snapshot exist."""
    parts: list[Tensor] = []
    layers: list[dict[str, Any]] = []
    offset = 0
    for name, spectrum in snapshot.spectra.items():
        parts.append(spectrum.eigenvalues)
        layers.append(
            {
                "name": name,
                "offset": offset,
                "channels": spectrum.channels,
                "count": spectrum.count,
                "total": spectrum.total,
                "dim": spectrum.dim(),
                "rank_at_99": spectrum.rank_at(0.99),
                "dof": spectrum.dof(),
                "participation_ratio": spectrum.participation_ratio(),
            }
        )
        if spectrum.sketch is not None:
            layers[-1]["sketch"] = spectrum.sketch._asdict()
        offset += spectrum.channels
    line = {
        "format": FORMAT,
        "step": snapshot.step,
        "wall_s": snapshot.wall_s,
        "file": file_name,
        "length": offset,
        "layers": layers,
    }
    flat = torch.cat(parts).numpy() if parts else np.zeros(0)
    stored = io.BytesIO()
    np.save(stored, flat.astype("<f8", copy=False), allow_pickle=False)
    return stored.getvalue(), json.dumps(line, allow_nan=False).encode() + b"\n"


def _read_spectra(path: Path, length: int) -> Tensor:
    """Eigenvalues of one snapshot, after header and size agree with the line. [length]"""
    try:
        stored = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(stored, np.ndarray):
            raise ValueError("an archive, not one array")
        if stored.dtype != np.dtype("<f8") or stored.shape != (length,):
            raise ValueError(f"{stored.dtype} of shape {stored.shape}, not float64 of ({length},)")
        return torch.from_numpy(np.array(stored))
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read ({error}); restore it, or drop this snapshot and the later "
            "ones with truncate()"
        ) from error
