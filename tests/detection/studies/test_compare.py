"""Comparing what fastcov.track left of two trainings."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastcov import Spectrum, load_history
from fastcov.spectra.history import History, Snapshot
from fastcov_detection.cli import main
from fastcov_detection.config import TrainConfig
from fastcov_detection.errors import DataError
from fastcov_detection.studies.compare import (
    compare_runs,
    layer_ceilings,
    print_comparison,
)
from fastcov_detection.train.loop import train

STEPS = (0, 10, 20)


def _spectrum(name, channels, rank):
    """Exactly ``rank`` equal eigenvalues."""
    values = torch.zeros(channels, dtype=torch.float64)
    values[:rank] = 2.0
    return Spectrum(values, 1000, 2.0 * rank, name)


def _run(folder, ranks, extra=()):
    """A run whose layers have the given ranks at each of the steps."""
    history = History(folder / "spectra")
    for index, step in enumerate(STEPS):
        spectra = {
            name: _spectrum(name, channels, found[index])
            for name, (channels, found) in ranks.items()
        }
        spectra |= {name: _spectrum(name, 4, 2) for name in extra}
        history.append(Snapshot(step, float(step), spectra))
    return folder


@pytest.fixture
def runs(tmp_path):
    scratch = {"body.conv1": (16, (2, 8, 12)), "body.layer1.0.conv1": (8, (8, 8, 8))}
    tuned = {"body.conv1": (16, (12, 12, 12)), "body.layer1.0.conv1": (8, (8, 4, 4))}
    return (
        _run(tmp_path / "one" / "scratch", scratch, extra=["body.only"]),
        _run(tmp_path / "two" / "scratch", tuned),
    )


def test_dims_over_training_of_both_runs(runs, tmp_path):
    found = compare_runs(*runs, tmp_path / "out")
    assert found == json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert (found["a"], found["b"]) == ("one/scratch", "two/scratch")
    conv1 = found["layers"]["body.conv1"]
    assert conv1["steps_a"] == conv1["steps_b"] == conv1["common_steps"] == list(STEPS)
    assert conv1["dims_a"] == [2, 8, 12]
    assert conv1["dims_b"] == [12, 12, 12]
    # Shares 1/2 of two against 1/12 of twelve: half of 2 * 5/12 + 10 * 1/12 is 5/6.
    assert conv1["distances"][0] == pytest.approx(5 / 6)
    assert conv1["distance"] == 0.0
    inner = found["layers"]["body.layer1.0.conv1"]
    assert inner["distance"] == pytest.approx(0.5)
    assert inner["dof_b"] == pytest.approx(4 / 1.001)
    assert found["only_a"] == ["body.only"]
    assert found["only_b"] == []


def test_figures_and_page_are_written(runs, tmp_path, capsys):
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    for name in ("dims", "spectra", "spectra-narrow"):
        with Image.open(tmp_path / "out" / f"{name}.png") as picture:
            assert min(picture.size) > 100
            assert picture.mode == "P", "a palette, small enough for version control"
    page = (tmp_path / "out" / "comparison.html").read_text(encoding="utf-8")
    assert page.count('<source media="(max-width:699px)"') == 2, "a drawing for narrow windows"
    assert "body.layer1.0.conv1" in page
    assert "<script" not in page
    out = capsys.readouterr().out
    assert "layer1.0.conv1" in out
    assert "a: one/scratch" in out


def test_folder_of_snapshots_can_be_given_itself(runs, tmp_path):
    comparison = compare_runs(runs[0] / "spectra", runs[1], tmp_path / "out")
    assert comparison["a"] == "spectra"
    assert len(load_history(runs[0] / "spectra")) == 3


def test_run_without_snapshots_is_named_with_the_remedy(runs, tmp_path):
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match=r"no snapshots in .*bare.*--set track=backbone"):
        compare_runs(runs[0], tmp_path / "bare", tmp_path / "out")


def test_runs_without_a_common_layer_are_named(runs, tmp_path):
    other = _run(tmp_path / "other", {"elsewhere": (4, (1, 2, 3))})
    with pytest.raises(DataError, match="no layer name in common"):
        compare_runs(runs[0], other, tmp_path / "out")


def test_layers_at_their_ceiling_are_marked_and_counted_apart(
    tiny_run: TrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first 1x1 projection has fewer inputs than outputs: its dimension cannot be larger."""
    runs = [tmp_path / name for name in ("a", "b")]
    config = replace(tiny_run, track_rows=512)
    for seed, run in enumerate(runs):
        train(config, run_dir=run, seed=seed, progress=False)
    ceilings = layer_ceilings(runs[0])
    assert ceilings["body.layer2.0.downsample.0"] == 8
    assert ceilings["body.layer2.0.conv1"] == 16
    assert layer_ceilings(tmp_path) == {}
    out = tmp_path / "out"
    numbers = compare_runs(*runs, out)
    full, layers = numbers["at_ceiling"], numbers["layers"]
    assert "body.layer2.0.downsample.0" in full
    assert len(full) < len(layers)
    assert layers["body.layer2.0.downsample.0"]["ceiling_b"] == 8
    print_comparison(numbers)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{len(full)} of {len(layers)} layers (marked *)" in said
    assert "body.layer2.0.downsample.0 *" in said
    page = (out / "comparison.html").read_text(encoding="utf-8")
    assert page.index(f"{len(full)} of {len(layers)} layers (marked *)") < page.index("<table")
    assert "body.layer2.0.downsample.0 *" in page
    # What is kept of the runs is enough to draw the figures again.
    for run in runs:
        (out / run.name).mkdir()
        (out / run.name / "run.json").write_bytes((run / "run.json").read_bytes())
    before = {name: (out / name).read_bytes() for name in ("dims.png", "comparison.json")}
    for layer in layers.values():
        del layer["ceiling_a"], layer["ceiling_b"]
    (out / "comparison.json").write_text(json.dumps(numbers))
    (out / "dims.png").unlink()
    assert main(["redraw", str(out)]) == 0
    assert json.loads(before["comparison.json"]) == json.loads(
        (out / "comparison.json").read_text()
    )
    assert (out / "dims.png").read_bytes() == before["dims.png"]
    assert main(["redraw", str(runs[0])]) == 2
