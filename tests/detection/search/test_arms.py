"""Arms as objects: one class makes a control, one rule makes its arms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fastcov_detection
from fastcov.widths import RULES, Rule
from fastcov_detection.report.pictures import colour_of
from fastcov_detection.search import arms
from fastcov_detection.search.arms import Arm, Baseline, Searched, Uniform, find_arm
from fastcov_detection.search.results import ArmRecord, compare_arms
from fastcov_detection.train.folder import RunResult


class Half(Arm):
    """A control of this test alone: half of every width."""

    stem = "half"
    colour = "#123456"

    def prepare(self, search: arms.Search) -> arms.Prepared:
        return arms.Prepared(self, self.name, {})


def _record(name: str, ap: float) -> ArmRecord:
    runs = [RunResult(ap + 0.001 * k, ap, None, 1.0, 1, 1, 1, 1, k, "") for k in range(3)]
    return ArmRecord(name, {}, runs)


def test_a_control_is_one_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arms, "KINDS", (*arms.KINDS, Half))
    assert [arm.name for arm in arms.check_arms(["half"])] == ["baseline", "half"]
    assert colour_of("half", ["half"]) == "#123456"
    records = [_record(name, 0.5) for name in ("baseline", "searched", "half")]
    asked = {(one.arm, one.versus): one.question for one in compare_arms(records)}
    assert asked == {
        ("searched", "baseline"): "no loss",
        ("searched", "half"): "better",
        ("half", "baseline"): "no loss",
    }


def test_a_rule_brings_its_arms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "entropy", Rule("entropy", lambda one, _: one.effective_rank()))
    assert find_arm("searched-entropy") == Searched("entropy")
    assert find_arm("uniform-entropy").needs == Searched("entropy")


def test_arms_are_values() -> None:
    assert find_arm("baseline") == Baseline()
    assert find_arm("uniform-share") == Uniform("share") != Uniform()
    assert len({Searched(), Searched(), Searched("share")}) == 2


def test_no_file_compares_the_name_of_an_arm_or_of_a_rule() -> None:
    """Names stand in comparisons, calls of startswith() and cases of no file."""
    words = {kind.stem for kind in arms.KINDS} | set(RULES)
    # Words with another meaning where they are compared: a start of weights.
    allowed = {("weights.py", "random"), ("run.py", "random")}
    found = []
    package = Path(fastcov_detection.__file__).parent
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            inside: list[ast.AST] = []
            if isinstance(node, ast.Compare | ast.match_case):
                inside = [node]
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
                inside = list(node.args) if node.func.attr == "startswith" else []
            found += [
                (path.name, one.value)
                for part in inside
                for one in ast.walk(part)
                if isinstance(one, ast.Constant) and one.value in words
            ]
    assert set(found) <= allowed, found
