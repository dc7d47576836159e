"""The width search end to end at a tiny size, and its parts."""

import json
import subprocess
import sys
import time
from dataclasses import dataclass, replace

import pytest
import torch
from fastcov_detection.cli import main
from fastcov_detection.config import (
    ConfigError,
    ModelConfig,
    SearchConfig,
    TrainConfig,
    load_config,
)
from fastcov_detection.cost import cost_of
from fastcov_detection.engine import load_run, train
from fastcov_detection.errors import DataError
from fastcov_detection.groups import width_groups
from fastcov_detection.latency import measure_latency
from fastcov_detection.layout import finished_runs
from fastcov_detection.model import build_model, load_widths
from fastcov_detection.proposals import Costs, Proposer, check_arms, has_settled, load_plan
from fastcov_detection.results import ArmRecord, RunResult, compare_arms, read_result
from fastcov_detection.runner import Job, RunError, locked, read_position, run_jobs
from fastcov_detection.search import run_search
from fastcov_detection.spectra import load_spectra, save_spectra

from fastcov import Spectrum

TINY = {
    "model.name": "fasterrcnn_resnet18_fpn",
    "model.width_multiplier": 0.125,
    "model.fpn_channels": 16,
    "model.box_head_width": 16,
    "model.min_size": 64,
    "model.max_size": 64,
    "model.anchor_ratios": "[1.0]",
    "model.rpn_batch": 16,
    "model.rpn_pre_nms_train": 20,
    "model.rpn_pre_nms_test": 20,
    "model.rpn_post_nms_train": 10,
    "model.rpn_post_nms_test": 10,
    "model.roi_batch": 8,
    "model.detections_per_image": 5,
    "data.mini.train": 12,
    "data.mini.val": 6,
    "data.mini.canvas": 64,
    "data.mini.digits": "1,3",
    "data.mini.sizes": "14,36",
    "steps": 4,
    "batch_size": 4,
    "warmup_steps": 2,
    "snapshot_every": 2,
    "log_every": 1,
    "checkpoint_every": 2,
}


def _demo_words(root, folder):
    settings = [f"{name}={value}" for name, value in ({"data.root": root} | TINY).items()]
    words = ["demo", "--quiet", "--out", str(folder)]
    return words + [word for setting in settings for word in ("--set", setting)]


@pytest.fixture(scope="module")
def demo(tiny_root, tmp_path_factory):
    """Folder of a finished demo: baseline, searched, uniform, four steps each."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    assert main(_demo_words(tiny_root, folder)) == 0
    return folder


@pytest.mark.slow
def test_demo_leaves_a_result_of_the_schema(demo):
    result = read_result(demo)
    assert set(result) == {"schema_version", "macs_input", "commit", "arms", "comparisons"}
    assert list(result["arms"]) == ["baseline", "searched", "uniform"]
    assert result["macs_input"] == {"image": [3, 64, 64], "boxes": 10, "masks": 0}
    for arm in result["arms"].values():
        assert set(arm) == {"params", "backbone_params", "macs", "widths", "latency_ms", "runs"}
        assert arm["latency_ms"] > 0
        (run,) = arm["runs"]
        assert set(run) == {"seed", "ap", "ap50", "segm_ap", "train_s"}
        assert 0 <= run["ap"] <= run["ap50"] <= 1
        assert run["segm_ap"] is None
        assert run["train_s"] > 0
    assert [(one["arm"], one["versus"]) for one in result["comparisons"]] == [
        ("searched", "baseline"),
        ("searched", "uniform"),
        ("uniform", "baseline"),
    ]
    for one in result["comparisons"]:
        assert set(one) == {"arm", "versus", "metric", "mean", "se", "n", "verdict"}
        assert one["n"] == 1
        assert one["se"] is None


@pytest.mark.slow
def test_demo_costs_are_those_of_the_networks_that_were_trained(demo):
    arms = read_result(demo)["arms"]
    assert min(arms["uniform"]["widths"].values()) >= 8
    for name, arm in arms.items():
        model, config, run = load_run(finished_runs(demo, {"arms": arms}, name)[0])
        assert sum(parameter.numel() for parameter in model.parameters()) == arm["params"]
        assert dict(model.widths) == arm["widths"]
        assert run.macs == arm["macs"]
        cost = cost_of(config.model, arm["widths"], 64)
        assert (cost.params, cost.macs) == (arm["params"], arm["macs"])
    assert arms["searched"]["macs"] <= arms["baseline"]["macs"]
    assert arms["uniform"]["params"] <= arms["searched"]["params"]
    assert load_widths(demo / "widths.json") == arms["searched"]["widths"]


@pytest.mark.slow
def test_demo_leaves_spectra_of_every_group_before_and_after_training(demo):
    model, _, _ = load_run(demo / "arms" / "baseline" / "seed0")
    members = {member for group in width_groups(model) for member in group.members}
    trained, untrained = (
        load_spectra(demo / "spectra" / f"{n}.npz") for n in ("baseline", "untrained")
    )
    assert set(trained) == set(untrained) == members
    assert any(
        not torch.allclose(trained[name].eigenvalues, untrained[name].eigenvalues)
        for name in members
    )
    plan = load_plan(demo / "widths" / "searched-round1.json")
    group = width_groups(model)[-1]
    expected = sum(trained[name].dof() for name in group.members) / len(group.members)
    assert plan.demand[group.name] == pytest.approx(expected)


@pytest.mark.slow
def test_demo_goes_on_where_it_stopped_and_repeats_nothing(demo, tiny_root, capsys):
    runs = sorted((demo / "arms").glob("*/seed0/run.json"))
    before = {path: path.stat().st_mtime_ns for path in runs}
    first = read_result(demo)
    # As after a kill in the middle of one arm: a checkpoint and no result.
    half_done = demo / "arms" / "uniform" / "seed0"
    (half_done / "run.json").unlink()
    (half_done / "model.pt").unlink()
    assert main(_demo_words(tiny_root, demo)) == 0
    after = {path: path.stat().st_mtime_ns for path in runs}
    assert [path.parent.parent.name for path in runs if after[path] != before[path]] == ["uniform"]
    again = read_result(demo)
    for name, arm in first["arms"].items():
        assert [run["ap"] for run in again["arms"][name]["runs"]] == [r["ap"] for r in arm["runs"]]
    out = capsys.readouterr().out
    assert "One seed shows that every step works" in out
    assert "backbone" in out


@pytest.mark.slow
def test_demo_folder_refuses_another_search(demo, tiny_root, capsys):
    assert main([*_demo_words(tiny_root, demo), "--set", "lr=0.5"]) == 2
    assert "train.lr = 0.04, not 0.5" in capsys.readouterr().err


@pytest.mark.slow
def test_report_holds_its_pictures_and_loads_nothing(demo):
    text = (demo / "report.html").read_text(encoding="utf-8")
    assert text.count("data:image/png;base64,") >= 7
    for forbidden in ("<script", "http://", "https://", 'src="/', "<link"):
        assert forbidden not in text
    for heading in ("Detections", "Widths", "Demand", "Spectra", "Settings"):
        assert f"<h2>{heading}</h2>" in text
    for arm in ("baseline", "searched"):
        assert (demo / "pictures" / f"detections-{arm}.png").stat().st_size > 1000


@pytest.mark.slow
def test_export_is_rebuilt_by_torchvision_alone(demo, tmp_path, tiny_root):
    assert main(["export", str(demo), str(tmp_path / "out")]) == 0
    script = (
        "import sys, torch; sys.path.insert(0, '.'); from rebuild import rebuild\n"
        "torch.manual_seed(0); image = torch.rand(3, 64, 64)\n"
        "assert not any(name.startswith('fastcov') for name in sys.modules)\n"
        "torch.save(dict(rebuild()([image])[0]), 'found.pt')\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path / "out", check=True, timeout=120)
    found = torch.load(tmp_path / "out" / "found.pt", weights_only=True)
    model, _, _ = load_run(demo / "arms" / "searched-round1" / "seed0")
    torch.manual_seed(0)
    with torch.no_grad():
        expected = model([torch.rand(3, 64, 64)])[0]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    assert load_widths(tmp_path / "out" / "widths.json") == dict(model.widths)


@pytest.mark.slow
def test_rounds_every_control_and_several_seeds(tiny_run, tmp_path, monkeypatch):
    def run_here(jobs, **_):
        """The same runs without the seconds that a process needs to start."""
        for job in jobs:
            config = load_config(TrainConfig, job.config_file)
            widths = load_widths(job.widths_file)
            train(config, widths, run_dir=job.run_dir, seed=job.seed, progress=False)

    monkeypatch.setattr("fastcov_detection.search.run_jobs", run_here)
    config = SearchConfig(
        train=replace(tiny_run, steps=2, checkpoint_every=2),
        rounds=2,
        arms=("searched", "random", "untrained", "power", "searched-share"),
        seeds=2,
        jobs=2,
        measure_images=6,
        latency_runs=2,
    )
    result = run_search(config, tmp_path / "search", progress=False)
    arms = result["arms"]
    assert list(arms) == ["baseline", "searched", "random", "untrained", "power", "searched-share"]
    for name, arm in arms.items():
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        assert arm["macs"] <= arms["baseline"]["macs"], name
    plans = tmp_path / "search" / "widths"
    assert (
        load_plan(plans / "random-seed0.json").widths
        != load_plan(plans / "random-seed1.json").widths
    )
    assert load_plan(plans / "searched-share.json").rule == "share"
    # The second round measured the network of the first.
    assert (tmp_path / "search" / "spectra" / "searched-round1.npz").exists()
    assert (plans / "searched-round2.json").exists()
    shown = [(one["arm"], one["versus"]) for one in result["comparisons"]]
    assert ("searched", "random") in shown
    assert ("searched-share", "power") in shown
    assert all(one["n"] == 2 and one["se"] is not None for one in result["comparisons"])


@pytest.fixture(scope="module")
def proposer():
    model = ModelConfig(
        name="fasterrcnn_resnet18_fpn",
        num_classes=4,
        width_multiplier=0.5,
        fpn_channels=32,
        box_head_width=64,
        rpn_post_nms_test=10,
    )
    config = SearchConfig(train=TrainConfig(model=model))
    with torch.device("meta"):
        groups = width_groups(build_model(model))
    return Proposer(config, groups, Costs(model, 96))


def test_controls_meet_what_they_are_held_to(proposer):
    baseline = proposer.baseline()
    assert baseline.macs == proposer.budget
    searched = replace(baseline, params=0.85 * baseline.params)
    uniform = proposer.uniform(searched)
    assert 0.995 * searched.params <= uniform.params <= searched.params
    assert uniform.macs == proposer.costs.macs(uniform.widths) < 0.95 * baseline.macs
    matched = proposer.power(searched)
    assert 0.995 * proposer.budget <= matched.macs <= proposer.budget
    # Twelve groups in four sizes: those of one size move together, so the match is coarse.
    assert abs(matched.params - searched.params) < 0.5 * (baseline.params - searched.params)
    assert matched.power < 1
    drawn = proposer.random(3)
    assert 0.99 * proposer.budget <= drawn.macs <= proposer.budget
    assert drawn.widths != proposer.random(4).widths


def test_widths_have_settled_when_none_moved_by_its_rounding(proposer):
    plan = proposer.baseline()
    assert has_settled(proposer.groups, plan, plan)
    moved = plan.widths | {"layer3": plan.widths["layer3"] + 4}
    assert not has_settled(proposer.groups, plan, replace(plan, widths=moved))


def test_arms_are_checked():
    assert check_arms(["uniform", "searched"]) == ("baseline", "searched", "uniform")
    with pytest.raises(ConfigError, match="unknown arm 'serched'; did you mean 'searched'"):
        check_arms(["serched"])
    with pytest.raises(ConfigError, match="add 'searched' to the arms"):
        check_arms(["baseline", "power"])


@pytest.mark.parametrize("name", ["seeds", "rounds", "jobs", "measure_images", "latency_runs"])
def test_impossible_numbers_are_refused_before_any_work(name, tiny_run, tmp_path):
    config = replace(SearchConfig(train=tiny_run), **{name: 0})
    with pytest.raises(ConfigError, match=f"{name} is 0; give at least 1"):
        run_search(config, tmp_path / "never")
    assert not (tmp_path / "never").exists()


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


@dataclass(frozen=True)
class _Script(Job):
    """A job that runs a few lines of Python instead of a training."""

    code: str = ""

    def command(self):
        return [sys.executable, "-c", self.code, str(self.run_dir)]


def _script(folder, name, code):
    return _Script(name, folder / name, folder / "c.json", None, 0, 3, code=code)


FINISH = "import sys, pathlib; pathlib.Path(sys.argv[1], 'run.json').write_text('{}')"


def test_jobs_run_side_by_side_and_finished_ones_are_left_alone(tmp_path, capsys):
    # Each waits for the other's file: one after the other they would never end.
    meet = (
        "import sys, time, pathlib; here = pathlib.Path(sys.argv[1]); (here / 'up').touch()\n"
        "other = here.parent / {'a': 'b', 'b': 'a'}[here.name] / 'up'\n"
        "while not other.exists(): time.sleep(0.02)\n"
        "(here / 'run.json').write_text('{}')\n"
    )
    jobs = [_script(tmp_path, name, meet) for name in ("a", "b")]
    run_jobs(jobs, at_once=2, progress=True)
    assert all(job.is_finished for job in jobs)
    told = capsys.readouterr().err
    assert "a: 3/3 done" in told
    assert "b: 3/3 done" in told
    done = _script(tmp_path, "a", "raise SystemExit('ran again')")
    run_jobs([done], progress=False)


def test_failed_job_tells_its_last_words_and_stops_the_others(tmp_path):
    bad = _script(tmp_path, "bad", "raise SystemExit('no space in the box')")
    slow = _script(tmp_path, "slow", "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)bad ended with exit status 1.*no space in the box"):
        run_jobs([bad, slow], at_once=2, progress=False)
    assert time.monotonic() - start < 30


def test_job_that_ends_without_a_result_is_an_error(tmp_path):
    with pytest.raises(RunError, match="exit status 0"):
        run_jobs([_script(tmp_path, "empty", "pass")], progress=False)


def test_folder_in_use_is_refused_even_when_the_owner_was_killed(tmp_path):
    with locked(tmp_path / "s") as handle:
        with pytest.raises(RunError, match="in use by another search"), locked(tmp_path / "s"):
            pass
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(handle,)
        )
    try:
        with pytest.raises(RunError, match="in use"), locked(tmp_path / "s"):
            pass
    finally:
        child.communicate(b"\n", timeout=30)
    with locked(tmp_path / "s"):
        pass


def test_position_is_read_from_complete_lines_only(tmp_path):
    log = tmp_path / "log.jsonl"
    assert read_position(log) == (0, "")
    log.write_text('{"step": 4, "loss": 1.5}\n{"step": 5, "lo')
    assert read_position(log) == (4, "loss 1.500")
    log.write_text('{"step": 4, "loss": 1.5}\n{"kind": "eval", "step": 5, "ap": 0.5}\n')
    assert read_position(log) == (5, "")


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


def test_latency_is_the_median_of_turns_on_one_image():
    class Sleeper(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.calls = seconds, 0

        def forward(self, images):
            assert not self.training
            self.calls += 1
            # One pass in five is disturbed; the median does not see it.
            time.sleep(0.2 if self.calls == 5 else self.seconds)

    models = {"fast": Sleeper(0.002), "slow": Sleeper(0.02)}
    found = measure_latency(models, torch.rand(3, 8, 8), runs=5)
    assert 2 <= found["fast"] < 15
    assert 20 <= found["slow"] < 100
    assert models["fast"].calls == models["slow"].calls == 8
    with pytest.raises(ValueError, match="latency_runs is 0"):
        measure_latency(models, torch.rand(3, 8, 8), runs=0)


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
