"""The permutation test on spectra made by hand, and the command on two tiny families."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from fastcov import Spectrum
from fastcov_detection.cli import main
from fastcov_detection.config import TrainConfig
from fastcov_detection.errors import DataError
from fastcov_detection.studies import compare
from fastcov_detection.studies.compare import compare_families, permutation_test, sentences
from fastcov_detection.train.loop import train


def _spectrum(first: float) -> Spectrum:
    """Three eigenvalues; the first one's share of the variance is given."""
    rest = (1 - first) / 2
    values = torch.tensor([first, rest, rest], dtype=torch.float64)
    return Spectrum(values, 100, 1.0, "x")


def test_families_that_differ_are_told_apart() -> None:
    a, b = (0.50, 0.51, 0.52, 0.53), (0.70, 0.71, 0.72, 0.73)
    found = permutation_test({"x": [_spectrum(share) for share in (*a, *b)]}, 4, {"x": 4})
    (layer,) = found.layers
    # The distance of two spectra is the difference of their first shares.
    assert layer.between == pytest.approx(0.2)
    assert layer.within == pytest.approx((3 * 0.01 + 2 * 0.02 + 0.03) / 6)
    # Of the 70 divisions, the true one and its mirror separate most.
    assert found.divisions == 70
    assert layer.p == found.p == pytest.approx(2 / 70)
    assert found.separation == pytest.approx(layer.between - layer.within)


def test_seeds_alone_are_told_apart_as_rarely_as_promised() -> None:
    """Equal families: p of at most 5 % in about 5 % of 400 draws."""
    draw = random.Random(3)
    low = 0
    for _ in range(400):
        spectra = [_spectrum(draw.uniform(0.4, 0.8)) for _ in range(8)]
        low += permutation_test({"x": spectra}, 4, {"x": 4}).p <= 0.05
    # Binomial with p = 0.05 at most: mean 20, four standard deviations 17.
    assert low <= 37


def test_layers_at_their_ceiling_are_left_out_and_counted() -> None:
    far = [_spectrum(share) for share in (0.5, 0.51, 0.7, 0.71)]
    same = [_spectrum(share) for share in (0.5, 0.7, 0.51, 0.71)]
    found = permutation_test({"full": far, "free": same}, 2, {"full": 3, "free": 4})
    assert [layer.is_at_ceiling for layer in found.layers] == [True, False]
    assert found.as_dict()["at_ceiling"] == 1
    # What is left does not separate: between 0.1067 at most, within 0.2.
    assert found.separation < 0
    both = permutation_test({"full": far, "free": same}, 2, {"full": 4, "free": 4})
    assert both.separation > found.separation
    assert permutation_test({"full": far}, 2, {"full": 3}).p == 1.0


def test_many_runs_are_sampled_with_the_true_division_among_them() -> None:
    shares = [0.4 + 0.001 * k for k in range(10)] + [0.6 + 0.001 * k for k in range(10)]
    found = permutation_test({"x": [_spectrum(share) for share in shares]}, 10, {"x": 4})
    assert found.divisions == 20_000
    assert 1 / 20_000 <= found.p < 0.001


@pytest.mark.slow
def test_two_tiny_families_leave_numbers_and_a_figure(
    tiny_run: TrainConfig,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[str] = []
    draw = compare.draw_dims

    def noted(curves: dict[str, Any], *others: Any) -> Figure:
        drawn.extend(curves)
        return draw(curves, *others)

    monkeypatch.setattr(compare, "draw_dims", noted)
    config = replace(tiny_run, steps=2, snapshot_every=1, checkpoint_every=2)
    folders = []
    for family, first in (("scratch", 0), ("tuned", 2)):
        for seed in (first, first + 1):
            folders.append(tmp_path / family / f"seed{seed}")
            train(config, run_dir=folders[-1], seed=seed, progress=False)
    out = tmp_path / "out"
    words = ["families", "--a", *map(str, folders[:2]), "--b", *map(str, folders[2:])]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "scratch: AP" in said
    found = json.loads((out / "families.json").read_text())
    assert (found["label_a"], found["label_b"], found["divisions"]) == ("scratch", "tuned", 6)
    layers = {layer["name"]: layer for layer in found["layers"]}
    assert layers["body.conv1"]["ceiling"] == 8
    assert len(layers["body.conv1"]["dims_a"]) == 2
    full = {
        name for name, one in layers.items() if min(one["dims_a"] + one["dims_b"]) >= one["ceiling"]
    }
    assert 0 < len(full) == found["at_ceiling"]
    assert set(drawn) == layers.keys() - full
    with Image.open(out / "families.png") as picture:
        assert picture.width > 500
    with pytest.raises(DataError, match="at least two runs"):
        compare_families(folders[:1], folders[2:], out)
    with pytest.raises(DataError, match="no snapshots in"):
        compare_families([tmp_path, tmp_path], folders[2:], out)


def test_words_say_what_is_not_shown() -> None:
    same = [_spectrum(share) for share in (0.5, 0.7, 0.51, 0.71)]
    found = replace(
        permutation_test({"x": same}, 2, {"x": 4}), scores_a=[0.5, 0.6], scores_b=[0.5, 0.5]
    )
    text = "\n".join(sentences(found))
    assert "are not shown to differ by more than seeds do" in text
    assert "a: AP 0.550 ± 0.050 (2 seeds)" in text
    assert "0 of 1 layers are at their ceiling" in text
