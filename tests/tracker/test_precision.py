"""precision="float64": rows of any magnitude leave the others' second moments right."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.ops import accumulate_, covariance, triangle
from fastcov.ops.covariance import Moments

CHANNELS = 48


def rows_with_sinks(count: int = 2048, dtype: torch.dtype = torch.float32) -> Tensor:
    """Rows of about unit variance; one in 64 has norm 1e5, along one direction of all channels."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, CHANNELS, generator=generator)
    direction = torch.nn.functional.normalize(torch.randn(CHANNELS, generator=generator), dim=0)
    rows[::64] += 1e5 * direction
    return rows.to(dtype)


def oracle_of(rows: Tensor) -> Tensor:
    wide = rows.double().flatten(0, -2)
    return wide.T @ wide / len(wide)


def bulk_error(found: Tensor, expected: Tensor) -> float:
    """Largest error beside the sinks' direction, as a share of the largest entry there."""
    _, vectors = torch.linalg.eigh(expected)
    beside = vectors[:, :-1]
    error = beside.T @ (found - expected) @ beside
    return float(error.abs().max() / (beside.T @ expected @ beside).abs().max())


def adds_by_update(rows: Tensor, **options: Any) -> Tensor:
    state = fastcov.CovarianceState(CHANNELS)
    for part in rows.split(500):
        state.update(part, **options)
    return state.covariance()


def adds_by_operator(rows: Tensor, **options: Any) -> Tensor:
    moments = Moments(CHANNELS)
    accumulate_(moments, rows, **options)
    return moments.covariance()


@pytest.mark.parametrize("add", [adds_by_update, adds_by_operator, covariance])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_sinks_leave_the_bulk_right(add: Any, dtype: torch.dtype) -> None:
    rows = rows_with_sinks(dtype=torch.float32)
    if dtype == torch.float16:
        rows = rows / 64  # its largest number is 65504
    rows = rows.to(dtype)
    expected = oracle_of(rows)
    assert bulk_error(add(rows, precision="float64"), expected) < 1e-6
    found = torch.linalg.eigvalsh(add(rows, precision="float64"))
    assert bool((found > 0).all())
    torch.testing.assert_close(found[:-1], torch.linalg.eigvalsh(expected)[:-1], rtol=1e-6, atol=0)
    if dtype == torch.float32:  # what the default cannot do
        assert bulk_error(add(rows), expected) > 1e-4


def test_pieces_of_maps_and_weights_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows are converted a few at a time: weights follow, and decay is applied once."""
    from fastcov.ops import aten, library

    monkeypatch.setattr(aten, "_CONVERTED_BYTES", 8 * 7 * CHANNELS)  # a piece: 7 rows, or an image
    generator = torch.Generator().manual_seed(1)
    maps = torch.randn(5, CHANNELS, 4, 3, generator=generator)
    weights = torch.rand(5 * 12, generator=generator)
    first = torch.randn(20, CHANNELS, generator=generator)
    whole, pieces = Moments(CHANNELS), Moments(CHANNELS)
    for moments, rows, precision in ((whole, maps.double(), "split"), (pieces, maps, "float64")):
        tensors = tuple(vars(moments).values())
        accumulate_(moments, first.double())
        options = (1, weights, 0.5, 0.9)
        library.accumulate_at_precision_(*tensors, rows, precision, *options)
    for name, tensor in vars(whole).items():
        found = getattr(pieces, name)
        if name == "moment":
            tensor, found = (triangle.unpack(each, CHANNELS) for each in (tensor, found))
        torch.testing.assert_close(found, tensor, rtol=1e-12, atol=1e-12)
    one = Moments(CHANNELS)
    accumulate_(one, first[0], precision="float64")
    assert int(one.count[0]) == 1


class Sinks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(CHANNELS, 8)
        self.conv = nn.Conv2d(CHANNELS, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        maps = x.view(-1, 16, 16, CHANNELS).permute(0, 3, 1, 2)
        return self.layer(x).square().mean() + self.conv(maps).square().mean()


@pytest.mark.parametrize(
    "options",
    [
        {"rows": "all"},
        {"rows": 0.5},
        {"rows": "all", "weighting": "image"},
        {"rows": "all", "decay": 0.9},
    ],
    ids=["all", "sampled", "image", "decay"],
)
def test_a_tracker_keeps_the_bulk_right(options: dict[str, Any]) -> None:
    model, rows = Sinks(), rows_with_sinks()
    tracker = fastcov.track(model, where="input", precision="float64", **options)
    for _ in range(3):
        model(rows).backward()
    for name in tracker.names():
        assert tracker.count(name) > 1000
        values = tracker.spectrum(name).eigenvalues
        smallest = float(values[-1])
        assert smallest > 0.2, name  # of rows of unit variance, however they are sampled
        assert float(values[1]) < 3, name
        assert "rounding" not in str(tracker.summary())
    if options == {"rows": "all"}:
        for name in tracker.names():
            assert bulk_error(tracker.covariance(name), oracle_of(rows)) < 1e-6


def test_outputs_are_not_read_through_their_inputs_in_float32() -> None:
    """With every row, a Linear's outputs are usually added from its inputs' second moment."""
    model, rows = Sinks(), rows_with_sinks()
    tracker = fastcov.track(model, rows="all", precision="float64")
    for _ in range(2):
        model(rows)
    with torch.no_grad():
        outputs = model.layer(rows)
    torch.testing.assert_close(
        tracker.covariance("layer"), oracle_of(outputs), rtol=1e-9, atol=1e-6
    )


def test_compiled_models_keep_it() -> None:
    model, rows = Sinks(), rows_with_sinks()
    tracker = fastcov.track(model, where="input", rows="all", precision="float64")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        compiled(rows)
    assert bulk_error(tracker.covariance("layer:in"), oracle_of(rows)) < 1e-6


def test_a_wrong_choice_is_refused_before_any_hook_is_set() -> None:
    model = Sinks()
    with pytest.raises(ValueError, match=r"precision='double': choose one of 'split', .*'float64'"):
        fastcov.track(model, precision="double")
    assert not model.layer._forward_hooks
    with pytest.raises(ValueError, match="precision='double'"):
        fastcov.CovarianceState(3).update(torch.randn(2, 3), precision="double")


def test_replays_of_a_graph_say_that_they_do_not_read_it() -> None:
    from fastcov.stats.layer import Layer

    layer = Layer(
        "layer", phase=0, fraction=0.5, weighting="position", decay=None, precision="float64"
    )
    assert "float64" in layer.on_device.why_on_host
    assert not layer.wants_device_buffer
