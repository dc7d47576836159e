"""Two trainings, layer by layer, against distances and dimensions taken one by one."""

import math
from pathlib import Path

import pytest
import torch

from fastcov.spectra.compare import compare_histories
from fastcov.spectra.history import History, Snapshot
from fastcov.spectra.spectrum import Spectrum, spectral_distance


def _spectrum(step: int, channels: int, name: str = "") -> Spectrum:
    eigenvalues = torch.arange(1, channels + 1, dtype=torch.float64) ** -(1 + 0.01 * step)
    return Spectrum(eigenvalues, 16 * channels + step, float(eigenvalues.sum()), name)


def _snapshot(step: int, layers: dict[str, int]) -> Snapshot:
    spectra = {name: _spectrum(step, channels, name) for name, channels in layers.items()}
    return Snapshot(step, 0.5 * step, spectra)


def test_two_trainings_are_compared_layer_by_layer(tmp_path: Path) -> None:
    a, b = History(tmp_path / "scratch"), History()
    for step in (0, 10, 20):
        a.append(_snapshot(step, {"x": 6, "only here": 2, "y": 4}))
    for step in (5, 10, 20, 20, 40):
        b.append(_snapshot(step, {"y": 4, "z": 3} if step == 5 else {"y": 4, "x": 9, "z": 3}))
    comparison = compare_histories(a, b, threshold=0.3, label_b="pretrained")
    assert [layer.name for layer in comparison.layers] == ["x", "y"]
    assert comparison.only_a == ("only here",)
    assert comparison.only_b == ("z",)
    assert comparison.label_a == str(tmp_path / "scratch")
    assert comparison.label_b == "pretrained"
    x, y = comparison.layers
    assert (x.steps_a, x.steps_b, y.steps_b) == ([0, 10, 20], [10, 20, 40], [5, 10, 20, 40])
    assert x.dims_a == [_spectrum(step, 6).dim(0.3) for step in (0, 10, 20)]
    assert x.common_steps == [10, 20]
    assert x.distances == [
        spectral_distance(_spectrum(step, 6), _spectrum(step, 9)) for step in (10, 20)
    ]
    assert x.distance == spectral_distance(_spectrum(20, 6), _spectrum(40, 9))
    assert y.distances == [0.0, 0.0]
    assert y.distance > 0
    assert torch.equal(x.end_b.eigenvalues, _spectrum(40, 9).eigenvalues)


def test_what_cannot_be_compared_is_named() -> None:
    a, b, empty = History(), History(), History()
    a.append(_snapshot(0, {"x": 3}))
    b.append(_snapshot(0, {"y": 3}))
    with pytest.raises(ValueError, match="'b' has no snapshot"):
        compare_histories(a, empty)
    with pytest.raises(ValueError, match=r"no layer name in common .*\['x'\], \['y'\]"):
        compare_histories(a, b)
    with pytest.raises(ValueError, match="threshold"):
        compare_histories(a, a, threshold=math.nan)
