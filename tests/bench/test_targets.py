"""Targets are judged by the rows that they name."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcov import bench
from fastcov.bench import (
    covariance,
    eigen,
    hooks,
    machine,
    models,
    peers,
    results,
    table,
    targets,
    training,
)
from fastcov.bench.contest import Row, Setting

CPU = torch.device("cpu")
H100 = "NVIDIA H100 80GB HBM3"
GPU_RATES = machine.Rates(torch.device("cuda"), 1e12, {"float32": 1e13, "float64": 1e13})


def row(work: str, contender: str, seconds: float, ratio: float = 1.0) -> Row:
    spread = 0.9 * seconds, seconds, 1.1 * seconds
    bounds = spread[0], spread[2]
    return Row(work, contender, 9, *spread, *bounds, "fastcov", ratio, 0.9 * ratio, 1.1 * ratio)


def target(measure: targets.Measure, bound: float, contender: str = "fastcov") -> targets.Target:
    return targets.Target("cuda", "case", "work", contender, measure, bound)


def judged(
    one: targets.Target, rows: list[Row], monkeypatch: pytest.MonkeyPatch
) -> targets.Verdict:
    monkeypatch.setattr(targets, "TARGETS", (one,))
    (verdict,) = targets.judge("cuda", {"case": rows}, H100)
    return verdict


@pytest.mark.parametrize(
    ("measure", "bound", "outcome"),
    [
        ("seconds", 2.1, "met"),
        ("seconds", 1.9, "missed"),
        ("share of floor", 0.74, "met"),
        ("share of floor", 0.76, "missed"),
    ],
)
def test_times_and_shares(
    measure: targets.Measure, bound: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = replace(row("work", "fastcov", 2.0), floor_s=1.5)
    verdict = judged(target(measure, bound), [row("other", "fastcov", 9.0), ours], monkeypatch)
    assert verdict.outcome == outcome
    assert (verdict.measured_s, verdict.floor_s) == (2.0, 1.5)
    assert verdict.low is not None
    assert verdict.high is not None
    assert verdict.value is not None
    assert verdict.low < verdict.value < verdict.high
    assert verdict.as_dict()["floor_ratio"] == pytest.approx(2.0 / 1.5)


@pytest.mark.parametrize(("bound", "outcome"), [(1.6, "met"), (1.8, "missed")])
def test_speed_up_is_the_peers_time_over_ours(
    bound: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [row("work", "fastcov", 1.0), row("work", "torch.mm", 1.7, ratio=1.7)]
    verdict = judged(target("times faster", bound, "torch.mm"), rows, monkeypatch)
    assert verdict.outcome == outcome
    assert verdict.measured_s == 1.0  # ours: the peer's time is not what is promised


def test_times_untracked_are_judged_by_the_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    bare = replace(row("work", "untracked", 1.0), versus="untracked")
    ours = replace(row("work", "fastcov, default", 1.005, 1.005), versus="untracked")
    one = target("times untracked", 1.01, "fastcov, default")
    assert judged(one, [bare, ours], monkeypatch).outcome == "met"
    verdict = judged(one, [bare, replace(ours, ratio=1.02)], monkeypatch)
    assert (verdict.outcome, verdict.value) == ("missed", pytest.approx(1.02))
    assert verdict.floor_s == 1.0


@pytest.mark.parametrize(("bound", "outcome"), [(11e-6, "met"), (9e-6, "missed")])
def test_seconds_per_hook_are_what_a_hook_adds(
    bound: float, outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    bare = replace(row("work", "no hook", 100e-6), versus="no hook")
    ours = replace(row("work", "fastcov, default", 600e-6), versus="no hook")
    ours.notes["per_hook_s"] = 10e-6  # of 50
    one = target("seconds per hook", bound, "fastcov, default")
    verdict = judged(one, [bare, ours], monkeypatch)
    assert (verdict.outcome, verdict.value, verdict.measured_s) == (outcome, 10e-6, 10e-6)
    assert verdict.low == pytest.approx((540e-6 - 100e-6) / 50)
    assert verdict.high == pytest.approx((660e-6 - 100e-6) / 50)
    cells = table.target_cells(verdict)
    assert "10 us" in cells
    assert cells[-1] == outcome
    for incomplete in ([ours], [bare, replace(ours, notes={})]):
        assert judged(one, incomplete, monkeypatch).outcome == "not measured"


def test_absent_row_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    verdict = judged(target("seconds", 1.0), [row("other", "fastcov", 0.1)], monkeypatch)
    assert (verdict.outcome, verdict.value) == ("not measured", None)
    unknown_floor = judged(target("share of floor", 0.5), [row("work", "fastcov", 1)], monkeypatch)
    assert unknown_floor.outcome == "not measured"


def test_every_target_names_a_row_that_a_case_measures() -> None:
    # A renamed work would leave its target unmeasured for ever.
    setting = Setting(torch.device("cuda"), "default", _rates=GPU_RATES)
    assert len(targets.TARGETS) > 20
    for one in targets.TARGETS:
        kind = setting if one.kind == "cuda" else Setting(torch.device("cpu"))
        assert one.work in {work.name for work in bench.works(one.case, kind)}, one


@pytest.mark.parametrize(("kind", "bounds"), [("cpu", (1.02, 1.15)), ("cuda", (1.01, 1.05))])
@pytest.mark.parametrize("network", ["resnet50", "vit", "faster_rcnn"])
def test_steps_of_every_network_are_judged(
    network: str, kind: str, bounds: tuple[float, float]
) -> None:
    def verdicts(excess: float) -> list[targets.Verdict]:
        names = ("fastcov, default", "fastcov, every row")
        rows = [
            row(f"{network} training step", name, 1.0, bound + excess)
            for name, bound in zip(names, bounds, strict=True)
        ]
        return targets.judge(kind, {f"training-{network}": rows}, H100)

    met, missed = verdicts(-0.001), verdicts(0.001)
    assert sum(one.outcome == "met" for one in met) == 2
    assert sum(one.outcome == "missed" for one in missed) == 2


def test_every_target_names_a_contender_of_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    # As would a renamed contender. Those of a case are the same at every size; peers need not run.
    monkeypatch.setattr(peers, "find", lambda _setting, _name, _make: lambda _index: None)
    setting = Setting(CPU, "tiny", _rates=replace(GPU_RATES, device=CPU))
    found = {"training": {*training.contest(models.small_convnet(CPU), setting).contenders}}
    for case, module in (("covariance", covariance), ("eigen", eigen), ("hooks", hooks)):
        contests = [work.build(setting) for work in module.works(setting)]
        found[case] = {name for contest in contests for name in contest.contenders}
    for one in targets.TARGETS:
        assert one.contender in found[one.case.partition("-")[0]], one


def test_targets_of_kernels_come_first_on_a_gpu() -> None:
    # Where time runs out, what is promised has been measured.
    setting = Setting(torch.device("cuda"), "default", _rates=GPU_RATES)
    for case, module in (("covariance", covariance), ("eigen", eigen)):
        promised = {one.work for one in targets.TARGETS if one.case == case}
        names = [work.name for work in module.works(setting)]
        assert set(names[: len(promised)]) == promised


def test_result_file_holds_its_targets(tmp_path: Path) -> None:
    ours = row("n=128 B=1024, float32", "fastcov", 0.3e-3)
    machine = {"kind": "cuda", "device": H100}
    result = results.Result("eigen", "default", machine, {}, {}, {}, [ours])
    content = json.loads(result.save(tmp_path).read_text())
    outcomes = {one["work"]: one["outcome"] for one in content["targets"]}
    assert outcomes["n=128 B=1024, float32"] == "met"
    assert outcomes["n=512 B=64, float32"] == "not measured"
    assert "ResNet-50 convs, batch 256 at 224, bfloat16" not in outcomes  # another case's
    assert results.load_results(tmp_path)["eigen"].rows == [ours]


def test_table_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {"eigen": [replace(row("n=128 B=1024, float32", "fastcov", 0.3e-3), floor_s=0.1e-3)]}
    table.print_targets(targets.judge("cuda", rows, H100), H100)
    printed = capsys.readouterr().out
    assert "1 met, 0 missed" in printed
    line = next(line for line in printed.splitlines() if "n=128" in line)
    for cell in ("300 us", "100 us", "3.00", "400 us", "met"):
        assert cell in line


def test_a_slower_gpu_neither_meets_nor_misses_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(targets, "TARGETS", (target("seconds", 3.0), target("share of floor", 0.9)))
    rows = {"case": [replace(row("work", "fastcov", 2.0), floor_s=1.0)]}
    names = (H100, "NVIDIA H200", "NVIDIA B200", "NVIDIA A100-SXM4-80GB", "")
    outcomes = {
        device: [one.outcome for one in targets.judge("cuda", rows, device)] for device in names
    }
    for device in names[:3]:
        assert outcomes[device] == ["met", "missed"]
    for device in names[3:]:
        assert outcomes[device] == ["another device", "missed"]
    verdicts = targets.judge("cuda", rows, "NVIDIA A100-SXM4-80GB")
    assert verdicts[0].as_dict()["outcome"] == "another device"
    table.print_targets(verdicts, "NVIDIA A100-SXM4-80GB")
    printed = capsys.readouterr().out
    assert "targets on NVIDIA A100" in printed
    assert "0 met, 1 missed, 0 not measured, 1 another device" in printed


def test_a_target_that_tiles_bound_says_its_ceiling() -> None:
    bounded = [one for one in targets.TARGETS if one.measure == "times faster" and one.ceiling]
    assert [(one.bound, round(one.ceiling, 2)) for one in bounded] == [(1.6, 1.78), (1.6, 1.88)]
    cells = table.target_cells(targets.Verdict(bounded[1]))
    assert "at least 1.60x faster (1.88x at best)" in cells
