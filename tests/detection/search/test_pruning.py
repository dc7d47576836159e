"""Torch-Pruning as an arm of the search."""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from fastcov_detection.config import SearchConfig, TrainConfig, load_config
from fastcov_detection.detector.build import Costs, build_model, load_widths
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.errors import ConfigError
from fastcov_detection.search import run as search
from fastcov_detection.search.arms import Wider
from fastcov_detection.search.pruning import WIDER, peer_version, prune_to_budget
from fastcov_detection.train.loop import train


@pytest.fixture
def config(tiny_model, tiny_run):
    """Three arms, the peer among them, two steps a run."""
    run = replace(tiny_run, steps=2, checkpoint_every=2, track="none")
    arms = ("searched", "torch-pruning")
    return SearchConfig(train=run, arms=arms, seeds=2, measure_images=6, latency_runs=1)


def test_as_little_is_pruned_as_meets_the_budget(tiny_model):
    pytest.importorskip("torch_pruning")
    model_config = replace(tiny_model, num_classes=11)
    groups = [replace(g, floor=4) for g in width_groups(build_model(model_config))]
    costs = Costs(model_config, 64)
    search = SimpleNamespace(groups=groups, costs=costs, budget=float(costs(None).macs))
    wider = Wider().propose(search)
    assert wider.macs > search.budget
    assert wider.alpha == WIDER
    torch.manual_seed(0)
    model = build_model(model_config, wider.widths)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pruned = prune_to_budget(model, groups, costs.macs, search.budget)
    assert 0.9 * search.budget < costs.macs(pruned.widths) <= search.budget
    assert set(pruned.widths) == set(wider.widths)
    assert all(4 <= width <= wider.widths[name] for name, width in pruned.widths.items())
    # Weights fit a detector built at these widths, are a part of the wider one's, and the wider
    # one is as it was.
    build_model(model_config, pruned.widths).load_state_dict(pruned.state)
    stem = before["backbone.body.conv1.weight"]
    for kept in pruned.state["backbone.body.conv1.weight"]:
        assert any(torch.equal(kept, filter_) for filter_ in stem)
    assert torch.equal(
        pruned.state["rpn.head.cls_logits.weight"], before["rpn.head.cls_logits.weight"]
    )
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_magnitude_decides_what_goes(tiny_model):
    """Channels inside a block whose weights are tiny everywhere go before any other."""
    pytest.importorskip("torch_pruning")
    model_config = replace(tiny_model, num_classes=11)
    groups = [replace(g, floor=4) for g in width_groups(build_model(model_config))]
    costs = Costs(model_config, 64)
    model = build_model(model_config)
    block = model.backbone.body.layer4[1]
    weak = list(range(0, block.conv1.out_channels, 2))
    with torch.no_grad():
        block.conv1.weight[weak] *= 1e-3
        block.bn1.weight[weak] = 1e-3
        block.conv2.weight[:, weak] *= 1e-3
    whole = {group.name: group.width for group in groups}
    wanted = whole | {"layer4.1.inner1": whole["layer4.1.inner1"] - 2}
    pruned = prune_to_budget(model, groups, costs.macs, costs.macs(wanted))
    assert pruned.widths["layer4.1.inner1"] < whole["layer4.1.inner1"]
    assert {n: w for n, w in pruned.widths.items() if n != "layer4.1.inner1"} == {
        n: w for n, w in whole.items() if n != "layer4.1.inner1"
    }


def test_a_budget_out_of_reach_is_refused(tiny_model):
    pytest.importorskip("torch_pruning")
    model = build_model(replace(tiny_model, num_classes=11))
    with pytest.raises(ConfigError, match=r"to the budget of 1 MACs; raise the budget"):
        prune_to_budget(model, width_groups(model), lambda _: 2.0, 1.0)


def test_a_missing_package_is_named(config, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    with pytest.raises(ConfigError, match=r"pip install torch-pruning=="):
        search.run_search(config, tmp_path / "never")
    assert not (tmp_path / "never").exists()


def test_a_norm_that_pruning_changes_is_refused(config, tmp_path):
    pytest.importorskip("torch_pruning")
    model = replace(config.train.model, norm="group")
    with pytest.raises(ConfigError, match=r"model\.norm is 'group'"):
        search.run_search(replace(config, train=replace(config.train, model=model)), tmp_path / "n")


@pytest.fixture
def trained(monkeypatch):
    """Runs that were trained, in this process and not in others: folder, seed, start."""
    done = []

    def run_here(jobs, *, on_finish, **_):
        for job in jobs:
            if job.is_finished:
                continue
            run, widths = load_config(TrainConfig, job.config_file), load_widths(job.widths_file)
            train(
                run,
                widths,
                run_dir=job.run_dir,
                seed=job.seed,
                start=job.start_file,
                progress=False,
            )
            done.append((job.run_dir.parent.name, job.seed, job.start_file))
            on_finish()

    monkeypatch.setattr(search, "run_jobs", run_here)
    return done


@pytest.mark.slow
def test_peer_is_an_arm_at_the_budget_for_one_seed(config, tmp_path, trained):
    pytest.importorskip("torch_pruning")
    result = search.run_search(config, tmp_path / "one", results=tmp_path / "kept", progress=False)
    start = tmp_path / "one" / "starts" / "torch-pruning-seed0.pt"
    assert trained[-2:] == [("torch-pruning-from", 0, None), ("torch-pruning", 0, start)]
    arms = result["arms"]
    assert list(arms) == ["baseline", "searched", "torch-pruning"]
    peer = arms["torch-pruning"]
    assert peer["made_with"] == peer_version()
    assert "made_with" not in arms["searched"]
    assert [run["seed"] for run in peer["runs"]] == [0]
    assert peer["macs"] <= arms["baseline"]["macs"]
    shown = {(one["arm"], one["versus"]): one["n"] for one in result["comparisons"]}
    assert shown["searched", "torch-pruning"] == 1
    trained.clear()
    again = search.run_search(config, tmp_path / "two", results=tmp_path / "kept", progress=False)
    assert trained == []
    assert again["arms"] == arms


@pytest.mark.slow
def test_the_peer_can_share_the_steps_of_every_other_arm(config, tmp_path, trained):
    pytest.importorskip("torch_pruning")
    shared = replace(config, peer_steps="shared", seeds=1)
    result = search.run_search(shared, tmp_path / "one", progress=False)
    runs = tmp_path / "one" / "arms"
    steps = {
        name: json.loads((runs / name / "seed0" / "run.json").read_text())["result"]["steps"]
        for name in ("baseline", "torch-pruning-from", "torch-pruning")
    }
    assert steps == {"baseline": 2, "torch-pruning-from": 1, "torch-pruning": 1}
    assert list(result["arms"]) == ["baseline", "searched", "torch-pruning"]


@pytest.mark.slow
def test_pruned_widths_start_from_random_weights_at_every_seed(config, tmp_path, trained):
    """The control for the steps that the pruned weights have seen: widths alone are compared."""
    pytest.importorskip("torch_pruning")
    arms = ("searched", "torch-pruning-scratch")
    result = search.run_search(
        replace(config, arms=arms), tmp_path / "one", results=tmp_path / "kept", progress=False
    )
    runs = [run for run in trained if run[0].startswith("torch-pruning")]
    assert runs == [
        ("torch-pruning-from", 0, None),
        ("torch-pruning-scratch", 0, None),
        ("torch-pruning-scratch", 1, None),
    ]
    arm = result["arms"]["torch-pruning-scratch"]
    assert arm["made_with"] == peer_version()
    assert [run["seed"] for run in arm["runs"]] == [0, 1]
    pruned = load_widths(tmp_path / "one" / "widths" / "torch-pruning-seed0.json")
    assert pruned.items() <= arm["widths"].items()
    shown = {(one["arm"], one["versus"]): one["n"] for one in result["comparisons"]}
    assert shown["searched", "torch-pruning-scratch"] == 2
    # In a fresh clone, one more seed needs neither the wider detector nor its weights.
    trained.clear()
    more = replace(config, arms=arms, seeds=3)
    search.run_search(more, tmp_path / "two", results=tmp_path / "kept", progress=False)
    assert [run[:2] for run in trained if run[0].startswith("torch-pruning")] == [
        ("torch-pruning-scratch", 2)
    ]
