"""Widths of the arms, and the files and records that a search keeps of them."""

import json
from dataclasses import replace

import pytest
import torch

from fastcov import Spectrum
from fastcov_detection.config import ModelConfig, SearchConfig, TrainConfig, load_config
from fastcov_detection.detector.build import Costs, build_model
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.errors import ConfigError, DataError
from fastcov_detection.search.arms import (
    Baseline,
    Exponent,
    Power,
    Prepared,
    Quarter,
    Random,
    Searched,
    Uniform,
    check_arms,
    has_settled,
)
from fastcov_detection.search.folder import load_plan, load_spectra, save_spectra
from fastcov_detection.search.results import ArmRecord, compare_arms, read_result
from fastcov_detection.train.folder import RunResult


class Searching:
    """A search as its arms see it, with nothing trained."""

    def __init__(self, model, config=None, size=96, groups=None):
        self.config = config or SearchConfig(train=TrainConfig(model=model))
        self.costs = Costs(model, size)
        self.budget = float(self.costs(None).macs)
        with torch.device("meta"):
            self.groups = groups or width_groups(build_model(model))
        self.plans = {}

    def prepared(self, arm):
        return Prepared(arm, arm.name, {0: (arm.name, self.plans[arm])})


@pytest.fixture(scope="module")
def search():
    return Searching(
        ModelConfig(
            name="fasterrcnn_resnet18_fpn",
            num_classes=4,
            width_multiplier=0.5,
            fpn_channels=32,
            box_head_width=64,
            rpn_post_nms_test=10,
        )
    )


def test_controls_meet_what_they_are_held_to(search):
    baseline = Baseline().propose(search)
    assert baseline.macs == search.budget
    searched = search.plans[Searched()] = replace(baseline, params=0.85 * baseline.params)
    uniform = Uniform().propose(search)
    assert 0.995 * searched.params <= uniform.params <= searched.params
    assert uniform.macs == search.costs.macs(uniform.widths) < 0.95 * baseline.macs
    matched = Power().propose(search)
    assert 0.995 * search.budget <= matched.macs <= search.budget
    # Twelve groups in four sizes: those of one size move together, so the match is coarse.
    assert abs(matched.params - searched.params) < 0.5 * (baseline.params - searched.params)
    assert matched.power < 1
    drawn = Random().draw(search, 3)
    assert 0.99 * search.budget <= drawn.macs <= search.budget
    assert drawn.widths != Random().draw(search, 4).widths


def test_widths_have_settled_when_none_moved_by_its_rounding(search):
    plan = Baseline().propose(search)
    assert has_settled(search.groups, plan, plan)
    moved = plan.widths | {"layer3": plan.widths["layer3"] + 4}
    assert not has_settled(search.groups, plan, replace(plan, widths=moved))


def _names(arms):
    return [arm.name for arm in check_arms(arms)]


def test_arms_are_checked():
    assert _names(["uniform", "searched"]) == ["baseline", "searched", "uniform"]
    with pytest.raises(ConfigError, match="unknown arm 'serched'; did you mean 'searched'"):
        check_arms(["serched"])
    with pytest.raises(ConfigError, match="add 'searched' to the arms"):
        check_arms(["baseline", "power"])


def test_arms_of_further_rules_and_exponents_are_checked():
    arms = ["exponent-1.25", "power-gradient", "exponent-0.5", "searched-gradient", "quarter"]
    assert _names(arms) == [
        *("baseline", "searched-gradient", "power-gradient", "quarter"),
        *("exponent-0.5", "exponent-1.25"),
    ]
    with pytest.raises(ConfigError, match="add 'searched-gradient' to the arms"):
        check_arms(["searched", "uniform-gradient"])
    for wrong in ("exponent-", "exponent-0", "exponent-0.50", "exponent-3", "exponent-half"):
        with pytest.raises(ConfigError, match="the exponent is"):
            check_arms([wrong])


def test_fixed_plans_meet_what_they_are_held_to(search):
    baseline = Baseline().propose(search)
    quarter = Quarter().propose(search)
    share = search.costs(quarter.widths).backbone_params / search.costs(None).backbone_params
    assert 0.24 < share <= 0.25
    forward = Exponent(0.5).propose(search)
    assert 0.995 * search.budget <= forward.macs <= search.budget
    assert forward.widths["layer1"] > baseline.widths["layer1"]
    assert forward.widths["layer4"] < baseline.widths["layer4"]


def _run(seed, ap, params=100):
    return RunResult(ap, ap, None, 1.0, params, params, params, 1, seed, "")


def test_comparisons_ask_the_right_question():
    arms = [
        ArmRecord("baseline", {}, [_run(0, 0.50), _run(1, 0.52), _run(2, 0.51)]),
        ArmRecord("searched", {}, [_run(0, 0.501), _run(1, 0.520), _run(2, 0.511)]),
        ArmRecord("random", {}, [_run(0, 0.45), _run(1, 0.48), _run(2, 0.46)]),
    ]
    found = {(one.arm, one.versus): one for one in compare_arms(arms)}
    assert found["searched", "baseline"].question == "no loss"
    assert found["searched", "baseline"].verdict == "no loss"
    assert found["searched", "random"].verdict == "better"
    assert found["random", "baseline"].verdict.startswith("not shown")
    # Draws of the random arm differ in size: the record holds the mean.
    assert ArmRecord("random", {}, [_run(0, 0.4, 90), _run(1, 0.4, 110)]).mean_cost("params") == 100


def test_arms_of_unequal_seeds_are_compared_by_those_they_share():
    arms = [
        ArmRecord("baseline", {}, [_run(seed, 0.5 + 0.01 * seed) for seed in range(4)]),
        ArmRecord("searched", {}, [_run(seed, 0.6 + 0.02 * seed) for seed in (1, 3)]),
        ArmRecord("random", {}, [_run(seed, 0.3) for seed in (0, 2)]),
        ArmRecord("power", {}, []),
    ]
    found = {(one.arm, one.versus): one for one in compare_arms(arms)}
    # No seed is shared by searched and random, and power has none: nothing is said of them.
    assert set(found) == {("searched", "baseline"), ("random", "baseline")}
    assert found["searched", "baseline"].n == 2
    assert found["searched", "baseline"].mean == pytest.approx((0.62 - 0.51 + 0.66 - 0.53) / 2)


def test_spectra_round_trip_and_damage_is_named(tmp_path):
    values = torch.rand(5, dtype=torch.float64).sort(descending=True).values
    spectra = {"backbone.body.layer1.0.conv1:in": Spectrum(values, 77, float(values.sum()))}
    save_spectra(spectra, tmp_path / "s.npz")
    (found,) = load_spectra(tmp_path / "s.npz").values()
    assert torch.equal(found.eigenvalues, values)
    assert (found.count, found.total) == (77, float(values.sum()))
    content = (tmp_path / "s.npz").read_bytes()
    (tmp_path / "s.npz").write_bytes(content[: len(content) // 2])
    with pytest.raises(DataError, match="does not hold spectra"):
        load_spectra(tmp_path / "s.npz")
    with pytest.raises(DataError, match="no spectra at"):
        load_spectra(tmp_path / "none.npz")


def test_result_of_another_kind_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"no result\.json"):
        read_result(tmp_path)
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ConfigError, match="is not JSON"):
        read_result(tmp_path)
    (tmp_path / "result.json").write_text(json.dumps({"schema_version": 99}))
    with pytest.raises(ConfigError, match="schema_version 99"):
        read_result(tmp_path)


def test_plan_of_another_kind_is_refused(tmp_path):
    (tmp_path / "plan.json").write_text('{"widths": {}}')
    with pytest.raises(ConfigError, match="does not hold a plan"):
        load_plan(tmp_path / "plan.json")
    with pytest.raises(ConfigError):
        load_config(SearchConfig, tmp_path / "plan.json")
