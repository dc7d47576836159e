"""The width search end to end at a tiny size, and its parts."""

import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch

from fastcov.widths import demand
from fastcov_detection.cli import main
from fastcov_detection.config import SearchConfig, TrainConfig, load_config
from fastcov_detection.detector.build import Costs, load_widths
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.errors import ConfigError
from fastcov_detection.report.report import write_report
from fastcov_detection.search.engines import locked
from fastcov_detection.search.folder import load_plan, load_spectra
from fastcov_detection.search.results import finished_runs, read_result, write_result
from fastcov_detection.search.run import run_search
from fastcov_detection.train.folder import load_run
from fastcov_detection.train.loop import initial_model, train

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
        assert set(run) == {
            "seed",
            "ap",
            "ap50",
            "segm_ap",
            "train_s",
            "cpu_s",
            "numbers",
            "classes",
        }
        assert 0 <= run["ap"] <= run["ap50"] <= 1
        assert run["segm_ap"] is None
        assert run["cpu_s"] > 0
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
        cost = Costs(config.model, 64)(arm["widths"])
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
def test_killed_demo_takes_its_runs_along(tiny_root, tmp_path):
    words = _demo_words(tiny_root, tmp_path / "killed")
    command = [sys.executable, "-P", "-m", "fastcov_detection.cli", *words, "--set", "steps=100000"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as search:
        log = tmp_path / "killed" / "arms" / "baseline" / "seed0" / "log.jsonl"
        deadline = time.monotonic() + 120
        while search.poll() is None and not (log.exists() and log.stat().st_size):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        search.terminate()
        _, said = search.communicate(timeout=60)
    assert search.returncode == 130, said
    assert "the same command goes on from here" in said
    # The lock is free again: no run was left behind.
    with locked(tmp_path / "killed"):
        pass
    steps = log.stat().st_size
    time.sleep(0.5)
    assert log.stat().st_size == steps > 0


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


@pytest.fixture
def trained_here(monkeypatch):
    """The same runs without the seconds that a process needs to start: (job, runs at once)."""
    done = []

    def run_here(jobs, *, engine, on_finish, **_):
        for job in jobs:
            if job.is_finished:
                continue
            config = load_config(TrainConfig, job.config_file)
            widths = load_widths(job.widths_file)
            train(config, widths, run_dir=job.run_dir, seed=job.seed, progress=False)
            done.append((job, engine.at_once))
            on_finish()

    monkeypatch.setattr("fastcov_detection.search.run.run_jobs", run_here)
    return done


def _demands(folder, plan, spectra, rule):
    """Demands of a plan, and those of a file of spectra by a rule."""
    model, _, _ = load_run(folder / "arms" / "baseline" / "seed0")
    found = demand(load_spectra(folder / "spectra" / spectra), width_groups(model), rule)
    return load_plan(folder / "widths" / plan).demand, pytest.approx(found)


@pytest.mark.slow
def test_rounds_every_control_and_several_seeds(tiny_run, tmp_path, trained_here):
    config = SearchConfig(
        train=replace(tiny_run, steps=2, checkpoint_every=2),
        rounds=2,
        arms=(
            *("searched", "random", "untrained", "power", "searched-share", "uniform-share"),
            *("quarter", "exponent-0.5"),
        ),
        seeds=2,
        jobs=2,
        measure_images=6,
        latency_runs=2,
    )
    folder = tmp_path / "search"
    result = run_search(config, folder, progress=False)
    assert {at_once for _, at_once in trained_here} == {2}
    arms = result["arms"]
    assert list(arms) == [
        *("baseline", "searched", "random", "untrained", "power", "searched-share"),
        *("uniform-share", "quarter", "exponent-0.5"),
    ]
    for name, arm in arms.items():
        assert [run["seed"] for run in arm["runs"]] == [0, 1]
        assert arm["macs"] <= arms["baseline"]["macs"], name
    plans = folder / "widths"
    # Every seed of the random arm has a draw of its own, and trains it.
    drawn = [load_plan(plans / f"random-seed{seed}.json").widths for seed in (0, 1)]
    assert drawn[0] != drawn[1]
    for seed, widths in enumerate(drawn):
        model, _, _ = load_run(folder / "arms" / "random" / f"seed{seed}")
        assert widths.items() <= dict(model.widths).items()
    assert load_plan(plans / "searched-share.json").rule == "share"
    # What each rule read: the trained baseline, the network before training, the first round's.
    first, expected = _demands(folder, "searched-round1.json", "baseline.npz", "dof")
    assert first == expected
    before, expected = _demands(folder, "untrained.json", "untrained.npz", "dof")
    assert before == expected
    assert before != first
    second, expected = _demands(folder, "searched-round2.json", "searched-round1.npz", "dof")
    assert second == expected
    # The power has the searched network's parameters as nearly as any of the tries that it made.
    searched, power = (load_plan(plans / f"{n}.json") for n in ("searched-round2", "power"))
    baseline = load_plan(plans / "baseline.json")
    assert abs(power.params - searched.params) <= abs(baseline.params - searched.params)
    shown = [(one["arm"], one["versus"]) for one in result["comparisons"]]
    assert ("searched", "random") in shown
    assert ("searched-share", "power") in shown
    # A further rule's control has its searched network's parameters, and answers for it alone.
    further, control = (load_plan(plans / f"{n}-share.json") for n in ("searched", "uniform"))
    assert control.params <= further.params
    assert ("searched-share", "uniform-share") in shown
    assert ("searched", "uniform-share") not in shown
    assert all(one["n"] == 2 and one["se"] is not None for one in result["comparisons"])


@pytest.mark.slow
def test_a_file_tells_after_every_run_what_is_known(tiny_run, tmp_path, trained_here, monkeypatch):
    known = []

    def noting(path, records, *rest):
        known.append({record.name: len(record.runs) for record in records if record.runs})
        return write_result(path, records, *rest)

    monkeypatch.setattr("fastcov_detection.search.run.write_result", noting)
    config = SearchConfig(
        train=replace(tiny_run, steps=2, checkpoint_every=2, track="none"),
        arms=("searched", "uniform"),
        seeds=2,
        measure_images=3,
        latency_runs=1,
    )
    run_search(config, tmp_path / "search", progress=False)
    # Once more before the arms are trained, for a search that goes on from what was kept.
    assert known[1] == known[0]
    assert known[1:7] == [
        {"baseline": 1},
        {"baseline": 1, "searched": 1},
        {"baseline": 1, "searched": 1, "uniform": 1},
        {"baseline": 2, "searched": 1, "uniform": 1},
        {"baseline": 2, "searched": 2, "uniform": 1},
        {"baseline": 2, "searched": 2, "uniform": 2},
    ]


@pytest.mark.slow
def test_gradient_rule_reads_passes_of_its_own(tiny_run, tmp_path, trained_here):
    config = SearchConfig(
        train=replace(tiny_run, steps=2, checkpoint_every=2, track="none"),
        rule="gradient",
        arms=("searched", "untrained", "searched-dof", "untrained-dof"),
        measure_images=4,
        latency_runs=1,
    )
    folder = tmp_path / "search"
    result = run_search(config, folder, progress=False)
    files = {
        "searched-round1.json": ("baseline-gradient.npz", "gradient"),
        "untrained.json": ("untrained-gradient.npz", "gradient"),
        "searched-dof.json": ("baseline.npz", "dof"),
        "untrained-dof.json": ("untrained.npz", "dof"),
    }
    for plan, (spectra, rule) in files.items():
        found, expected = _demands(folder, plan, spectra, rule)
        assert found == expected, plan
        assert load_plan(folder / "widths" / plan).rule == rule
    assert sorted(path.name for path in (folder / "spectra").iterdir()) == sorted(
        name for name, _ in files.values()
    )
    shown = {(one["arm"], one["versus"]) for one in result["comparisons"]}
    assert ("searched", "untrained-dof") in shown
    assert ("searched-dof", "untrained") in shown
    # The report of such a search draws the demand that its rule read.
    page = write_report(folder).read_text(encoding="utf-8")
    assert "<h2>Demand</h2>" in page
    assert "<h2>Spectra</h2>" in page


@pytest.mark.slow
def test_untrained_spectra_are_those_of_the_network_that_training_starts_from(tiny_run, tmp_path):
    """With next to no learning rate, a run ends with the weights that it began with."""
    run = replace(tiny_run, steps=2, lr=1e-30, track="none")
    train(run, None, run_dir=tmp_path / "run", seed=3, progress=False)
    model, _, _ = load_run(tmp_path / "run")
    own = replace(run.model, num_classes=11)
    before = dict(initial_model(own, None, 3).named_parameters())
    assert before.keys() == dict(model.named_parameters()).keys()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=0, atol=1e-20, msg=name)


@pytest.mark.parametrize("name", ["seeds", "rounds", "jobs", "measure_images", "latency_runs"])
def test_impossible_numbers_are_refused_before_any_work(name, tiny_run, tmp_path):
    config = replace(SearchConfig(train=tiny_run), **{name: 0})
    with pytest.raises(ConfigError, match=f"{name} is 0; give at least 1"):
        run_search(config, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_search_from_pretrained_weights_is_refused(tiny_run, tmp_path):
    pretrained = replace(tiny_run, model=replace(tiny_run.model, init="imagenet"))
    with pytest.raises(ConfigError, match="pretrained weights fit one set of widths"):
        run_search(SearchConfig(train=pretrained), tmp_path / "never")
