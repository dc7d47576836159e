"""A reader whose model moves, and weights of rows on a GPU, for which the meta device stands."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcov.rows.layout import ActivationLayout
from fastcov.stats.cursor import Cursor
from fastcov.stats.host_buffer import HostBuffer, _filled
from fastcov.stats.layer import Layer

META = torch.device("meta")


def layer(**options: Any) -> Layer:
    defaults: dict[str, Any] = {"weighting": "image", "decay": 0.9, "fraction": 1.0, "phase": 0}
    return Layer("layer", **{**defaults, **options})


def read(tap: Layer, rows: Tensor) -> None:
    tap.read(rows, ActivationLayout(rows))


def test_the_second_state_of_pooled_calls_moves_with_the_model() -> None:
    tap = layer()
    for step in range(2):
        tap.begin_step(step)
        read(tap, torch.randn(2, 40, 8))
        read(tap, torch.randn(2, 20, 8))
        tap.end_step()
    tap.begin_step(2)
    read(tap, torch.randn(2, 40, 8, device=META))
    read(tap, torch.randn(2, 20, 8, device=META))
    tap.end_step()
    assert tap._image is not None
    for state in (tap.state, tap._image.sums):
        assert state is not None
        assert state.moment.is_meta
        assert state.excess.is_meta


def test_rows_of_a_first_step_that_failed_move_with_the_model() -> None:
    tap = layer(weighting="position", decay=None, fraction=None)
    tap.begin_step(0)
    read(tap, torch.randn(30, 8))  # an exception ends this step: its rows stay
    tap.begin_step(0)
    read(tap, torch.randn(30, 8, device=META))
    assert {part.rows.device for part in tap.early.calls} == {META}
    tap.plan(0.5)
    tap.plan(1.0)


def test_weights_of_waiting_rows_are_copied_from_no_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Tensor:
        raise AssertionError("a GPU waits for a tensor that is made from a list")

    def weights(device: torch.device) -> Tensor | None:
        buffer = HostBuffer(Cursor(), is_marked=True)
        rows = torch.zeros(20, 4, device=device)
        for step, count in ((3, 2), (4, 5), (6, 1)):
            buffer.room(ActivationLayout(rows), count, capacity=8)
            buffer.mark(count, step)
            buffer.weigh(step, 1.0 + step)
        return buffer.row_weight(0.5, device)

    expected = weights(torch.device("cpu"))
    assert expected is not None
    assert expected.tolist() == [0.5] * 2 + [1.25] * 5 + [7.0]
    monkeypatch.setattr(torch, "tensor", refuse)
    found = weights(META)
    assert found is not None
    assert (found.shape, found.dtype, found.device) == (expected.shape, expected.dtype, META)


@pytest.mark.parametrize("weights", [[1.0], [0.5, 0.5, 2.0], [3.0, 1.0, 3.0]], ids=str)
def test_weights_filled_in_are_weights_repeated(weights: list[float]) -> None:
    rows = list(range(2, 2 + len(weights)))
    expected = torch.repeat_interleave(torch.tensor(weights).double(), torch.tensor(rows))
    assert torch.equal(_filled(weights, rows, torch.device("cpu")), expected)
