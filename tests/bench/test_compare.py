"""Result files: kept, read back, and what moved between two of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastcov.bench import command, compare, results
from fastcov.bench.contest import Row


def result(times: dict[str, float], spread: float = 0.01, **machine_: object) -> results.Result:
    rows = []
    for contender, seconds in times.items():
        low, high = seconds * (1 - spread), seconds * (1 + spread)
        rows.append(
            Row("work", contender, 20, low, seconds, high, low, high, "fastcov", 1.0, 1.0, 1.0)
        )
    about = {"device": "d", "driver": None, "threads": 2, "versions": {"torch": "2"}, **machine_}
    return results.Result("case", "default", about, {}, {}, {}, rows)


PEERS = {f"peer {i}": 1.0 for i in range(6)}


@pytest.mark.parametrize(
    ("ours", "machine_factor", "verdict"),
    [(1.0, 1.0, "same"), (1.3, 1.0, "slower"), (0.7, 1.0, "faster"), (1.3, 1.3, "same")],
)
def test_only_what_peers_do_not_explain_has_moved(
    tmp_path: Path, ours: float, machine_factor: float, verdict: str
) -> None:
    before = result({"fastcov": 1.0, **PEERS})
    after = result({"fastcov": ours, **dict.fromkeys(PEERS, machine_factor)})
    a, b = before.save(tmp_path / "a"), after.save(tmp_path / "b")
    changes = compare.compare_results(a, b)
    assert [change.verdict for change in changes.rows] == [verdict]
    assert changes.drift_from == 6
    assert changes.drift == pytest.approx(max(0.02, machine_factor - 1), rel=1e-3)


def test_overlapping_intervals_are_the_same(tmp_path: Path) -> None:
    before = result({"fastcov": 1.0, **PEERS}, spread=0.2).save(tmp_path / "a")
    after = result({"fastcov": 1.3, **PEERS}, spread=0.2).save(tmp_path / "b")
    assert compare.compare_results(before, after).rows[0].verdict == "same"


def test_comparison_says_what_is_not_comparable(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result({"fastcov": 1.0, "fastcov, old": 1.0}).save(tmp_path / "a")
    result({"fastcov": 1.0}, device="e", versions={"torch": "3"}).save(tmp_path / "b")
    assert command.main(["--compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr().out
    assert "device differs: d and e" in printed
    assert "torch differs: 2 and 3" in printed
    assert "not in B: case: work: fastcov, old" in printed
    assert "fewer than 5 peers" in printed


def test_damaged_result_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "case.json"
    for content in ("{", "[]", '{"schema_version": 999}', '{"schema_version": 1, "rows": [{}]}'):
        path.write_text(content)
        with pytest.raises(ValueError, match="is no result of 'fastcov bench'"):
            results.load_results(path)


def test_result_survives_a_round_trip(tmp_path: Path) -> None:
    before = result({"fastcov": 1.5, "peer": 2.5}, spread=0.5)
    before.rows[0].notes["updates_s"] = 0.125
    before.missing["cupy"] = "needs a GPU"
    after = results.load_results(before.save(tmp_path))["case"]
    assert after.rows == before.rows
    assert (after.missing, after.machine) == (before.missing, before.machine)
