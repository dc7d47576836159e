"""Committed results of searches as a Markdown section, so that no table is typed by hand."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastcov_detection.errors import ConfigError
from fastcov_detection.files import write_text
from fastcov_detection.search.arms import BASELINE
from fastcov_detection.search.results import read_result, verdict_of
from fastcov_detection.search.verdicts import LARGEST_LOSS, mean_and_error
from fastcov_detection.studies.compare import FAMILIES, Families, read_families, sentences
from fastcov_detection.studies.planned import TUNING, TWICE, criteria
from fastcov_detection.studies.primary import (
    MAIN_RULE,
    PLAN,
    answer,
    primary_comparisons,
    seeds_wanted,
)

BEGIN, END = "<!-- evidence: generated -->", "<!-- evidence: end -->"


def write_evidence(results: Path, readme: Path) -> None:
    """Tables between the two marks of a Markdown file, written anew.

    Args:
        results: Folder of one folder for each search, as ``search --results`` keeps them.
        readme: File that holds both marks.

    Raises:
        ConfigError: If a mark is missing, or there are no results.
    """
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ConfigError(f"{readme} lacks {BEGIN} or {END}; put both where the tables belong")
    write_text(readme, f"{before}{BEGIN}\n{evidence(results)}{END}{after}")


def evidence(results: Path) -> str:
    """Markdown of every search that is kept in a folder, by name.

    Raises:
        ConfigError: If there is none.
    """
    folders = sorted(path.parent for path in results.glob("*/result.json"))
    if not folders:
        raise ConfigError(f"no NAME/result.json in {results}; give the folder of kept searches")
    found = {folder.name: read_result(folder) for folder in folders}
    sections = [_section(name, result, found) for name, result in found.items()]
    compared = sorted(path.parent for path in results.glob(f"*/{FAMILIES}"))
    sections += [_families(folder.name, read_families(folder)) for folder in compared]
    if all(name in found for name in PLAN.searches):
        sections.append(_question(found))
    return "\n".join(sections)


def _section(name: str, result: Mapping[str, Any], found: Mapping[str, Mapping[str, Any]]) -> str:
    arms = result["arms"]
    # A search that was stopped has seeds that not every arm finished: pairs count, not rows.
    lines = [f"### {name}", ""]
    has_masks = any(run["segm_ap"] is not None for arm in arms.values() for run in arm["runs"])
    metrics = ["ap", "ap50", *(["segm_ap"] if has_masks else [])]
    names = {"ap": "AP", "ap50": "AP50", "segm_ap": "mask AP"}
    headings = ["arm", "parameters", "of the backbone", "MACs, millions"]
    headings += [*(names[metric] for metric in metrics), "CPU seconds a run", "seeds"]
    lines += [_row(headings), _row(["---"] * len(headings))]
    for arm_name, arm in arms.items():
        lines.append(_row(_cells(arm_name, arm, arms[BASELINE], metrics)))
    lines.append("")
    if name.endswith(TWICE):
        return "\n".join(lines)
    if name.endswith(TUNING):
        task = name.removesuffix(TUNING)
        return "\n".join([*lines, *_criteria(task, result, found.get(f"{task}{TWICE}"))])
    if name in PLAN.searches:
        return "\n".join([*lines, *_primary(result)])
    if any(one["n"] > 1 for one in result["comparisons"]):
        lines += _comparisons(result["comparisons"], names)
    else:
        lines += ["One seed: which network is more accurate is not shown.", ""]
    return "\n".join(lines)


def _primary(result: Mapping[str, Any]) -> list[str]:
    """The plan's five comparisons of each rule, with Holm's correction."""
    headings = ["searched by", "against", "difference of AP", "n", "p", "p, Holm", "verdict"]
    lines = [_row(headings), _row(["---"] * len(headings))]
    for rule in PLAN.rules:
        for one in primary_comparisons(result, rule):
            numbers = [f"{one.p:.4f}", f"{one.p_holm:.4f}"] if one.n > 1 else ["-", "-"]
            cells = [rule or MAIN_RULE, one.versus, _difference(one.mean, one.se, one.n)]
            lines.append(_row([*cells, str(one.n), *numbers, one.verdict]))
    wanted = seeds_wanted(result)
    has = min(one.n for rule in PLAN.rules for one in primary_comparisons(result, rule))
    state = "done by the stopping rule" if has >= wanted else f"unfinished: {wanted} seeds wanted"
    said = (
        "Differences are paired by seed, ± one standard error; p is one-sided, against the "
        f"baseline of a loss of {-LARGEST_LOSS} AP or more, and corrected over the five "
        f"comparisons of a rule. This search is {state}."
    )
    return [*lines, "", said, ""]


def _families(name: str, compared: Families) -> str:
    """Two families of runs: what separates them, and every layer that can tell."""
    lines = [f"### {name}", "", *(f"- {sentence}" for sentence in sentences(compared)), ""]
    headings = ["layer", "largest dimension", compared.label_a, compared.label_b]
    headings += ["distance between", "within", "p"]
    lines += [_row(headings), _row(["---"] * len(headings))]
    for layer in compared.layers:
        if not layer.is_at_ceiling:
            dims = [", ".join(map(str, side)) for side in (layer.dims_a, layer.dims_b)]
            distances = [f"{layer.between:.4f}", f"{layer.within:.4f}", f"{layer.p:.3f}"]
            lines.append(_row([f"`{layer.name}`", str(layer.ceiling), *dims, *distances]))
    return "\n".join([*lines, ""])


def _criteria(task: str, once: Mapping[str, Any], twice: Mapping[str, Any] | None) -> list[str]:
    """Criteria that a task had to meet on the tuning images."""
    headings = ["asked of the task", "difference of AP", "n", ""]
    lines = [_row(headings), _row(["---"] * len(headings))]
    for one in criteria(task, once, twice):
        difference = _difference(one.mean or 0.0, one.se, one.n)
        lines.append(_row([one.asks, difference, str(one.n), one.verdict]))
    return [*lines, ""]


def _question(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Answer to the plan's question: one rule against every exponent and the baseline."""
    lines = ["### One rule on both tasks", ""]
    headings = ["searched by", "better than", "difference of AP", "n", "p"]
    lines += [_row(headings), _row(["---"] * len(headings))]
    answers = [answer(found, rule) for rule in PLAN.rules]
    for one in answers:
        for part in one.tests:
            p = f"{part.p:.4f}" if part.n > 1 else "-"
            difference = _difference(part.mean, part.se, part.n)
            lines.append(_row([one.rule, part.name, difference, str(part.n), p]))
    lines.append("")
    for one in answers:
        verb = "does" if one.is_shown else "is not shown to do"
        lines.append(
            f"- {one.rule} {verb} all of it: beat each fixed exponent on the two tasks taken "
            "together, and the baseline on both."
        )
    return "\n".join([*lines, ""])


def _difference(mean: float, error: float | None, n: int) -> str:
    if n == 0:
        return "-"
    return f"{mean:+.3f}" if error is None else f"{mean:+.3f} ± {error:.3f}"


def _cells(
    name: str, arm: Mapping[str, Any], baseline: Mapping[str, Any], metrics: list[str]
) -> list[str]:
    change = 100 * (arm["backbone_params"] / baseline["backbone_params"] - 1)
    seconds = [run["cpu_s"] for run in arm["runs"] if run.get("cpu_s") is not None]
    backbone = f"{arm['backbone_params']:,}"
    return [
        _label(name, arm),
        f"{arm['params']:,}",
        backbone if arm is baseline else f"{backbone} ({change:+.0f} %)",
        f"{arm['macs'] / 1e6:.1f}",
        *(_spread([run[m] for run in arm["runs"] if run[m] is not None]) for m in metrics),
        f"{sum(seconds) / len(seconds):.0f}" if seconds else "-",
        str(len(arm["runs"])),
    ]


def _label(name: str, arm: Mapping[str, Any]) -> str:
    """The arm's name, with the version of the other program where one made it."""
    made_with = str(arm.get("made_with", name))
    return made_with if made_with.split()[0] == name else f"{name} ({made_with})"


def _comparisons(comparisons: list[Mapping[str, Any]], names: Mapping[str, str]) -> list[str]:
    headings = ["arm", "against", "metric", "difference", "n", "verdict"]
    lines = [_row(headings), _row(["---"] * len(headings))]
    for one in comparisons:
        error = "" if one["se"] is None else f" ± {one['se']:.3f}"
        lines.append(
            _row(
                [
                    one["arm"],
                    one["versus"],
                    names[one["metric"]],
                    f"{one['mean']:+.3f}{error}",
                    str(one["n"]),
                    verdict_of(one),
                ]
            )
        )
    shown = [one for one in comparisons if not one["verdict"].startswith("not shown")]
    said = (
        "Differences are paired by seed, ± one standard error, one-sided 95 % bound: "
        f'"no loss" above {LARGEST_LOSS}, "better" above 0; no correction for the number of '
        f"comparisons. Shown: {len(shown)} of {len(comparisons)}."
    )
    return [*lines, "", said, ""]


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _spread(values: list[float]) -> str:
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if error is None else f"{mean:.3f} ± {error:.3f}"
