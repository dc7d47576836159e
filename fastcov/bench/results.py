"""Result files: one JSON a case, written whole or not at all."""

from __future__ import annotations

import datetime
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from fastcov.bench.contest import Row
from fastcov.bench.targets import judge
from fastcov.files import replacing

SCHEMA_VERSION = 1


@dataclass
class Result:
    """Rows of one case on one machine, with all that is needed to judge them.

    Attributes:
        case: Name of the case.
        size: "tiny", "default" or "full".
        machine: Device, driver, versions and commit; see fastcov.bench.machine.describe.
        rates: Rates of the machine, measured in the same run.
        clocks: Clocks before and after.
        missing: Reasons by peer, of peers that could not run.
        rows: One for each piece of work and contender.
        started: Time of the start, UTC, ISO 8601.
        wall_s: Seconds of the whole case.
        failures: Reasons by piece of work, where nothing was measured: an error, or time was up.
    """

    case: str
    size: str
    machine: dict[str, Any]
    rates: dict[str, Any]
    clocks: dict[str, Any]
    missing: dict[str, str]
    rows: list[Row]
    started: str = field(default_factory=lambda: now())
    wall_s: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)

    def save(self, folder: Path) -> Path:
        """File ``folder/case.json``, written under a temporary name, then renamed.

        Returns:
            The file.
        """
        path = folder / f"{self.case}.json"
        content = {"schema_version": SCHEMA_VERSION, **vars(self)}
        content["rows"] = [_rounded(row.as_dict()) for row in self.rows]
        content["rates"] = _rounded(self.rates)
        verdicts = judge(
            self.machine.get("kind", ""),
            {self.case: self.rows},
            self.machine.get("device", ""),
        )
        content["targets"] = [
            _rounded(verdict.as_dict()) for verdict in verdicts if verdict.target.case == self.case
        ]
        with replacing(path) as part:
            part.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        return path


def load_results(path: Path) -> dict[str, Result]:
    """Results of one file, or of every file of a folder, by case.

    Raises:
        ValueError: If there is none, or a file is no result of this version.
    """
    files = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise ValueError(f"no benchmark result at {path}: give a JSON file or a folder of them")
    return {result.case: result for result in map(_load, files)}


def _load(path: Path) -> Result:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise ValueError(f"schema_version is {version}, expected {SCHEMA_VERSION}")
        content.pop("targets", None)  # judged anew from the rows, by the targets of this version
        known = {f.name for f in fields(Row)}
        rows = [Row(**{k: v for k, v in row.items() if k in known}) for row in content.pop("rows")]
        return Result(rows=rows, **content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{path} is no result of 'fastcov bench' ({type(error).__name__}: {error}); "
            "measure again with this version"
        ) from error


def _rounded(value: Any) -> Any:
    # Five digits: a clock gives no more, and a diff stays readable.
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return value


def now() -> str:
    """Current time, UTC, ISO 8601: later times are later in the order of strings."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
