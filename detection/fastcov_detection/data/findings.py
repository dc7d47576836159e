"""Findings of a check of a data set: faults, which training refuses, and notes, which are told."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from fastcov_detection.errors import DataError

log = logging.getLogger("fastcov_detection")

SHOWN = 10
"""Faults of one kind and file that an error lists; the rest are counted."""
_EXAMPLES = 3


class Problem(NamedTuple):
    """One thing that a check found wrong with one entry."""

    text: str
    """The thing and its value, read after the entry's name: ``has bbox [1, 2]``."""
    remedy: str
    is_fault: bool = True
    """False: training goes on, and one line tells how many entries have it."""


class Finding(NamedTuple):
    """A problem and where it is."""

    file: str
    entry: str
    """For example ``annotation 7``; empty for the whole file."""
    problem: Problem
    check: str
    """Name of the check; findings are counted by it."""

    def __str__(self) -> str:
        text, remedy, _ = self.problem
        where = f"{self.file}: {self.entry}" if self.entry else self.file
        return f"{where} {text}; {remedy}"


def shorten(value: Any, length: int = 60) -> str:
    """A value as an error shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def refuse_faults(findings: Iterable[Finding], shown: int | None = SHOWN) -> None:
    """Refusal of a data set with faults, by one error that lists them; notes are left alone.

    Args:
        findings: Of a data set.
        shown: Faults of one kind and file that are listed; None: all.

    Raises:
        DataError: If there is a fault.
    """
    faults = [finding for finding in findings if finding.problem.is_fault]
    if not faults:
        return
    if len(faults) == 1:
        raise DataError(str(faults[0]))
    lines = [f"{len(faults)} faults in the data:"]
    for group in _kinds(faults):
        lines += map(str, group[:shown])
        if shown is not None and len(group) > shown:
            more = len(group) - shown
            lines.append(
                f"{group[0].file}: {more} more of this kind; fastcov-detection check lists all"
            )
    raise DataError("\n  ".join(lines))


def tell_notes(findings: Iterable[Finding]) -> list[str]:
    """Warnings about everything that training goes on with, a line for each kind and file.

    Returns:
        The lines.
    """
    notes = [finding for finding in findings if not finding.problem.is_fault]
    lines = [_note(group) for group in _kinds(notes)]
    for line in lines:
        log.warning("%s", line)
    return lines


def _kinds(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one check in one file, together."""
    kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.file, finding.check].append(finding)
    return list(kinds.values())


def _note(group: list[Finding]) -> str:
    first = group[0]
    if len(group) == 1:
        return str(first)
    others = ", ".join(finding.entry for finding in group[1 : 1 + _EXAMPLES])
    more = len(group) - 1 - _EXAMPLES
    tail = f" and {more} more" if more > 0 else ""
    text, remedy, _ = first.problem
    return f"{first.file}: {len(group)} times: {first.entry} {text}, so {others}{tail}; {remedy}"


def as_json(findings: Iterable[Finding]) -> list[list[Any]]:
    """Findings as JSON holds them; :func:`from_json` reads them again."""
    return [[f.file, f.entry, f.check, *f.problem] for f in findings]


def from_json(values: list[list[Any]]) -> list[Finding]:
    """The findings of :func:`as_json`."""
    return [
        Finding(file, entry, Problem(text, remedy, is_fault), check)
        for file, entry, check, text, remedy, is_fault in values
    ]


def about_file(path: Path, check: str, text: str, remedy: str, *, is_fault: bool = True) -> Finding:
    """A finding about a whole file."""
    return Finding(str(path), "", Problem(text, remedy, is_fault), check)
