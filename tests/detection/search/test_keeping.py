"""A search that goes on from what version control kept of it."""

import json
import shutil
from dataclasses import replace

import pytest

from fastcov_detection.cli import main
from fastcov_detection.config import SearchConfig, TrainConfig, load_config
from fastcov_detection.detector.build import load_widths
from fastcov_detection.errors import CheckpointError, ConfigError
from fastcov_detection.search.folder import keep, restore
from fastcov_detection.search.results import read_result
from fastcov_detection.search.run import run_search
from fastcov_detection.train.folder import load_run
from fastcov_detection.train.loop import train


@pytest.fixture
def trained_here(monkeypatch):
    """Labels of the runs that were trained, in this process and not in others."""
    labels = []

    def run_here(jobs, *, on_finish, **_):
        for job in jobs:
            if not job.is_finished:
                widths = load_widths(job.widths_file)
                config = load_config(TrainConfig, job.config_file)
                train(config, widths, run_dir=job.run_dir, seed=job.seed, progress=False)
                labels.append(job.label)
                on_finish()

    monkeypatch.setattr("fastcov_detection.search.run.run_jobs", run_here)
    return labels


@pytest.fixture
def config(tiny_run):
    """Baseline, searched and uniform at two seeds, two steps each."""
    return SearchConfig(
        train=replace(tiny_run, steps=2, checkpoint_every=2, track="none"),
        arms=("searched", "uniform"),
        seeds=2,
        measure_images=6,
        latency_runs=1,
    )


def _stop_at_a_new_run(jobs, **_):
    if not all(job.is_finished for job in jobs):
        raise KeyboardInterrupt


def _search(config, tmp_path, name):
    return run_search(config, tmp_path / name, results=tmp_path / "kept", progress=False)


@pytest.mark.slow
def test_a_fresh_clone_repeats_no_run_and_adds_seeds(
    config, trained_here, tmp_path, capsys, monkeypatch
):
    first = _search(config, tmp_path, "first")
    # Seed by seed, so that a search that is stopped leaves pairs.
    order = [
        f"{arm}, seed {seed}" for seed in (0, 1) for arm in ("baseline", "searched", "uniform")
    ]
    assert trained_here == order
    kept = sorted(str(path.relative_to(tmp_path / "kept")) for path in _files(tmp_path / "kept"))
    assert "arms/searched-round1/seed1/run.json" in kept
    assert "spectra/untrained.npz" in kept
    assert not [name for name in kept if name.endswith((".pt", ".jsonl", ".txt"))]
    assert not [
        f for f in _files(tmp_path / "kept") if str(tmp_path / "first").encode() in f.read_bytes()
    ]
    trained_here.clear()
    shutil.rmtree(tmp_path / "first")

    again = _search(config, tmp_path, "second")
    assert trained_here == []
    # Times of runs that were never here stay as they were measured.
    assert again["arms"] == first["arms"]
    # A search that is stopped before its first new run has recorded what was kept.
    (tmp_path / "second" / "result.json").unlink()
    with monkeypatch.context() as patch:
        patch.setattr("fastcov_detection.search.run.run_jobs", _stop_at_a_new_run)
        with pytest.raises(KeyboardInterrupt):
            _search(replace(config, seeds=3), tmp_path, "second")
    assert read_result(tmp_path / "second")["arms"] == first["arms"]
    more = _search(replace(config, seeds=3), tmp_path, "second")
    assert trained_here == [f"{arm}, seed 2" for arm in ("baseline", "searched", "uniform")]
    assert [run["seed"] for run in more["arms"]["searched"]["runs"]] == [0, 1, 2]
    assert read_result(tmp_path / "kept") == more

    assert main(["report", str(tmp_path / "second")]) == 0
    page = (tmp_path / "second" / "report.html").read_text(encoding="utf-8")
    assert "only results came back from version control" in page
    with pytest.raises(CheckpointError, match=r"whose weights are not here; delete .*run\.json"):
        load_run(tmp_path / "second" / "arms" / "baseline" / "seed0")
    assert main(["export", str(tmp_path / "second"), str(tmp_path / "out")]) == 2
    assert "weights are not here" in capsys.readouterr().err


@pytest.mark.slow
def test_a_first_run_without_spectra_is_trained_again(config, trained_here, tmp_path):
    """As after a kill between the first run's end and the measuring pass."""
    first = _search(config, tmp_path, "first")
    trained_here.clear()
    shutil.rmtree(tmp_path / "kept" / "spectra")
    again = _search(config, tmp_path, "second")
    assert trained_here == ["baseline, seed 0"]
    for name, arm in first["arms"].items():
        scores = [run["ap"] for run in arm["runs"]]
        assert [run["ap"] for run in again["arms"][name]["runs"]] == scores
        assert again["arms"][name]["widths"] == arm["widths"]


@pytest.mark.slow
def test_kept_results_of_another_search_are_refused(config, trained_here, tmp_path):
    _search(replace(config, arms=(), seeds=1), tmp_path, "first")
    other = replace(config, train=replace(config.train, lr=0.5))
    with pytest.raises(ConfigError, match=r"kept holds a search with train\.lr = 0\.01, not 0\.5"):
        _search(other, tmp_path, "second")
    assert not (tmp_path / "second" / "config.json").exists()


def test_restoring_copies_what_is_missing_and_nothing_else(tmp_path):
    kept, folder = tmp_path / "kept", tmp_path / "folder"
    assert restore(kept, folder) == []
    _write(folder / "widths" / "uniform.json", {"a": 1})
    _write(folder / "arms" / "uniform" / "seed0" / "run.json", {"here": True})
    (folder / "arms" / "uniform" / "seed0" / "model.pt").write_bytes(b"weights")
    keep(folder, kept)
    assert [path.name for path in _files(kept)] == ["run.json", "uniform.json"]
    _write(kept / "arms" / "uniform" / "seed0" / "run.json", {"here": False})
    _write(kept / "arms" / "uniform" / "seed1" / "run.json", {"here": False})
    assert [str(path) for path in restore(kept, folder)] == ["arms/uniform/seed1/run.json"]
    own = (folder / "arms" / "uniform" / "seed0" / "run.json").read_text(encoding="utf-8")
    assert json.loads(own) == {"here": True}


def test_two_plans_for_one_arm_are_refused(tmp_path):
    _write(tmp_path / "folder" / "widths" / "uniform.json", {"a": 1})
    _write(tmp_path / "kept" / "widths" / "uniform.json", {"a": 2})
    with pytest.raises(ConfigError, match="are different widths of the same arm"):
        restore(tmp_path / "kept", tmp_path / "folder")


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), encoding="utf-8")


def _files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())
