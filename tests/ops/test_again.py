"""Operators that read a call as the last one was read, against what they stand for."""

from __future__ import annotations

import copy
import gc
import pickle
import random
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastcov.ops import backend, library
from fastcov.ops.backend import Pretended
from fastcov.ops.covariance import Moments
from fastcov.rows.layout import ActivationLayout, ViewedRows, layout_numbers
from fastcov.rows.sequence import WHOLE, fixed_point
from fastcov.rows.view import Layout, row_order, row_view
from fastcov.stats.cursor import (
    CALLS,
    CARRY,
    FIELDS,
    FILL,
    FRACTION,
    LAYOUT,
    LIMIT,
    Cursor,
)
from fastcov.stats.layer import Layer
from fastcov.stats.route import MOST_LAYOUTS, LaunchAdd, Routes
from fastcov.stats.state import CovarianceState

SIZES = {"few rows": (3, 24, 4, 5), "many rows": (8, 24, 20, 20)}
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels first": lambda maps: maps,
    "channels last": lambda maps: maps.to(memory_format=torch.channels_last),
    "every other image": lambda maps: torch.cat([maps, maps])[::2],
    "half precision": lambda maps: maps.bfloat16(),
}


def layout_of(maps: Tensor) -> ActivationLayout:
    rows = row_view(maps, Layout.CHANNELS_FIRST)
    return ActivationLayout(rows, maps, row_order(4, Layout.CHANNELS_FIRST))


MODULE = nn.Identity()


class Tap:
    """Calls led to a layer as a tracker's hooks lead them."""

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.routes = Routes(layer)

    def take(self, maps: Tensor) -> None:
        if not self.routes.take_known(maps, MODULE, ()):
            layout = layout_of(maps)
            self.routes.read(ViewedRows(maps, layout, maps.shape), None, is_kept=True)


def steps(reader: Layer, sizes: list[str], layout: str) -> dict[str, Any]:
    """State and counters after some steps, a few layouts of which alternate."""
    torch.manual_seed(0)
    tap = Tap(reader)
    for step, name in enumerate(sizes, 1):
        reader.begin_step(step)
        for _ in range(1 + step % 2):
            maps = LAYOUTS[layout](torch.randn(SIZES[name]))
            tap.take(maps)
        if reader.fraction is None:
            reader.plan(0.03)
        reader.end_step()
    counters = (reader.calls, reader.offered_rows, reader.total_calls)
    return {**reader.state_dict(), "counters": counters}


def bound(state: CovarianceState, _rows: Tensor, channel_dim: int) -> Callable[[Tensor], None]:
    """As on a GPU: what adds rows to these tensors, whatever becomes of the state."""
    to = (state.moment, state.sum, state.shift, state.weight, state.count)
    return lambda rows: library.accumulate_(*to, rows, channel_dim)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "options",
    [
        {"fraction": None},
        {"fraction": 0.01},
        {"fraction": 0.7},
        {"fraction": 1.0},
        {"fraction": None, "decay": 0.9},
        {"fraction": None, "weighting": "image"},
        {"fraction": 1.0, "decay": 0.9},
        {"fraction": 1.0, "weighting": "image"},
    ],
    ids=str,
)
def test_layers_read_the_same_with_and_without(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], layout: str
) -> None:
    draw = random.Random(1)
    sizes = ["many rows"] * 30 + draw.choices(list(SIZES), [1, 3], k=30)
    arguments = {"weighting": "position", "decay": None, **options}
    fast = steps(Layer("layer", phase=77, **arguments), sizes, layout)
    monkeypatch.setattr(backend, "active", Pretended(backend.HOST))
    slow = steps(Layer("layer", phase=77, **arguments), sizes, layout)
    monkeypatch.setattr(library, "accumulation_of", bound)
    as_on_a_gpu = steps(Layer("layer", phase=77, **arguments), sizes, layout)
    for name, value in slow.pop("state").items():
        assert torch.equal(fast["state"][name], value), name
        assert torch.equal(as_on_a_gpu["state"][name], value), name
    fast.pop("state"), as_on_a_gpu.pop("state")
    assert fast == slow == as_on_a_gpu


@pytest.mark.parametrize(
    ("options", "is_bound"),
    [
        ({}, True),
        ({"fraction": 0.5}, False),
        ({"decay": 0.9}, False),
        ({"weighting": "image"}, False),
    ],
    ids=str,
)
def test_rows_of_weight_1_that_are_all_read_are_added_by_one_call_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], is_bound: bool
) -> None:
    calls = []
    monkeypatch.setattr(backend, "active", Pretended(backend.HOST))
    monkeypatch.setattr(library, "accumulation_of", lambda *_: calls.append)
    arguments = {"weighting": "position", "decay": None, "fraction": 1.0, **options}
    reader = Layer("layer", phase=77, **arguments)
    maps = torch.randn(SIZES["many rows"])
    tap = Tap(reader)
    for step in range(4):
        reader.begin_step(step)
        tap.take(maps)
    assert [call is maps for call in calls] == [True] * 3 * is_bound


def test_calls_on_a_gpu_after_the_plan_or_the_dtype_has_changed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(backend, "active", Pretended(backend.HOST))
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(SIZES["many rows"], generator=generator) + 3 for _ in range(14)]

    def result() -> dict[str, Any]:
        reader = Layer("layer", phase=77, fraction=1.0, weighting="position", decay=None)
        tap = Tap(reader)
        for step, maps in enumerate(batches):
            reader.begin_step(step)
            if step == 7:
                reader.reset()  # float32 rows choose a shift, which 16-bit rows then give up
            if step == 11:
                reader.set_fraction(0.4)
            tap.take(maps)
            if step % 4 == 1:
                tap.take(maps[:3, :, :4, :5].contiguous())
            if step % 4 == 2:
                tap.take(maps.bfloat16())
        counters = (reader.calls, reader.offered_rows, reader.total_calls)
        return {**reader.state_dict(), "counters": counters}

    expected = result()
    monkeypatch.setattr(library, "accumulation_of", bound)
    found = result()
    for name, value in expected.pop("state").items():
        assert torch.equal(found["state"][name], value), name
    found.pop("state")
    assert found == expected


def test_a_state_is_not_added_to_where_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing may hold the tensors of a state that has moved to another device."""
    monkeypatch.setattr(backend, "active", Pretended(backend.HOST))
    monkeypatch.setattr(library, "accumulation_of", bound)
    reader = Layer("layer", phase=77, fraction=1.0, weighting="position", decay=None)
    maps = torch.randn(SIZES["many rows"])
    tap = Tap(reader)
    tap.take(maps)
    assert isinstance(tap.routes.last.route, LaunchAdd)
    assert reader.state is not None
    before = weakref.ref(reader.state.moment)
    reader.prepare(maps.shape[1], torch.device("meta"))
    assert reader.state.moment.is_meta
    gc.collect()
    assert before() is None


def test_a_bounded_number_of_layouts_is_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "active", Pretended(backend.HOST))
    monkeypatch.setattr(library, "accumulation_of", bound)
    tap = Tap(Layer("layer", phase=77, fraction=1.0, weighting="position", decay=None))
    for height in range(1, MOST_LAYOUTS + 20):
        tap.take(torch.randn(2, 3, height, 20))
        assert 0 < len(tap.routes) <= MOST_LAYOUTS


def test_copies_hold_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "active", Pretended(backend.HOST))
    monkeypatch.setattr(library, "accumulation_of", bound)  # what it makes cannot be pickled
    reader = Layer("layer", phase=77, fraction=1.0, weighting="position", decay=None)
    maps = torch.randn(SIZES["many rows"])
    Tap(reader).take(maps)
    for other in (copy.deepcopy(reader), pickle.loads(pickle.dumps(reader))):
        Tap(other).take(maps)
        assert reader.state is not None
        assert other.state is not None
        assert (int(reader.state.count[0]), int(other.state.count[0])) == (3200, 6400)


@pytest.mark.parametrize(("fraction", "name"), [(0.001, "gather_again_"), (1, "accumulate_again_")])
def test_repeated_calls_take_one_operator(
    monkeypatch: pytest.MonkeyPatch, fraction: float, name: str
) -> None:
    real, taken = getattr(library, name), []

    def spy(*tensors: Tensor) -> int:
        taken.append(real(*tensors) >= 0)
        return real(*tensors) if not taken[-1] else 0

    monkeypatch.setattr(library, name, spy)
    reader = Layer("layer", phase=77, fraction=fraction, weighting="position", decay=None)
    steps(reader, ["many rows"] * 30, "channels last")
    # The first call decides, and calls that find the buffer full.
    assert sum(taken) >= 40


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))])
def test_copies_count_for_themselves(copied: Callable[[Layer], Layer]) -> None:
    reader = Layer("layer", phase=77, fraction=0.001, weighting="position", decay=None)
    steps(reader, ["many rows"] * 5, "channels last")
    other = copied(reader)
    before = reader.cursor.numbers.tolist()
    for each in (other, reader):
        assert each.cursor.numbers.tolist() == each.cursor.tensor.tolist() == before
    steps(other, ["many rows"] * 3, "channels last")
    assert reader.cursor.numbers.tolist() == reader.cursor.tensor.tolist() == before
    assert other.cursor.numbers.tolist() == other.cursor.tensor.tolist() != before


def cursor_of(maps: Tensor, **numbers: int) -> Cursor:
    """Counters of a layer that saw tensors like ``maps``."""
    cursor = Cursor()
    cursor.numbers[LAYOUT:] = layout_numbers(maps, run_length=1, channel_dim=1)
    given = {"FRACTION": fixed_point(0.1), "LIMIT": 20}
    places = {"FRACTION": FRACTION, "LIMIT": LIMIT, "FILL": FILL, "CARRY": CARRY}
    for name, number in {**given, **numbers}.items():
        cursor.numbers[places[name]] = number
    return cursor


@pytest.mark.parametrize(
    ("numbers", "rows"),
    [
        ({}, 12),
        ({"CARRY": WHOLE - 1}, 13),
        ({"FILL": 8}, 12),
        ({"FILL": 9}, -1),  # no room
        ({"FRACTION": 0}, -1),  # not planned yet
        ({"FRACTION": WHOLE}, -1),  # every row
        ({"FRACTION": WHOLE - 1, "LIMIT": 10**6, "CARRY": WHOLE - 1}, -1),  # every row of this call
        ({"FRACTION": 1}, 0),
    ],
)
def test_what_is_due_is_gathered_or_nothing_is_changed(numbers: dict[str, int], rows: int) -> None:
    maps, buffer = torch.ones(3, 24, 8, 5), torch.zeros(20, 24)
    cursor = cursor_of(maps, **numbers)
    before = cursor.numbers.tolist()
    assert library.gather_again_(cursor.tensor, buffer, maps) == rows
    assert buffer.sum() == max(rows, 0) * 24
    assert cursor.numbers[CALLS] == (rows >= 0)
    assert cursor.numbers[FILL] == before[FILL] + max(rows, 0)
    if rows < 0:
        assert cursor.numbers.tolist() == before


def test_every_row_is_added_or_nothing_is_changed() -> None:
    maps, moments = torch.randn(3, 24, 8, 5), Moments(24)
    assert library.accumulate_again_(cursor_of(maps).tensor, *vars(moments).values(), maps) == -1
    assert not any(tensor.any() for tensor in vars(moments).values())
    cursor, expected = cursor_of(maps, FRACTION=WHOLE), Moments(24)
    assert library.accumulate_again_(cursor.tensor, *vars(moments).values(), maps) == 120
    library.accumulate_(*vars(expected).values(), maps, 1)
    assert all(torch.equal(vars(moments)[name], value) for name, value in vars(expected).items())
    assert cursor.numbers[CALLS] == 1


@pytest.mark.parametrize(
    "other",
    [
        lambda maps: maps[:2],
        lambda maps: maps.permute(0, 1, 3, 2),
        lambda maps: maps.to(memory_format=torch.channels_last),
        lambda maps: maps.double(),
        lambda maps: maps.int(),
        lambda maps: maps[..., 0],
        lambda maps: maps[None],
    ],
)
def test_calls_unlike_the_last_one_are_left_alone(other: Callable[[Tensor], Tensor]) -> None:
    maps, moments = torch.randn(3, 24, 5, 5), Moments(24)
    for fraction, operator, to in (
        (fixed_point(0.1), library.gather_again_, [torch.zeros(20, 24)]),
        (WHOLE, library.accumulate_again_, list(vars(moments).values())),
    ):
        cursor = cursor_of(maps, FRACTION=fraction)
        before = cursor.numbers.tolist()
        assert operator(cursor.tensor, *to, other(maps)) == -1
        assert not any(tensor.any() for tensor in to)
        assert cursor.numbers.tolist() == before
        assert operator(cursor.tensor, *to, maps) > 0


@pytest.mark.parametrize(
    "numbers",
    [
        torch.zeros(FIELDS),
        torch.zeros(FIELDS - 1, dtype=torch.int64),
        torch.zeros(2 * FIELDS, dtype=torch.int64)[::2],
    ],
)
def test_what_is_no_cursor_is_refused(numbers: Tensor) -> None:
    with pytest.raises(RuntimeError):
        library.gather_again_(numbers, torch.zeros(20, 24), torch.zeros(3, 24, 8, 5))


def test_a_buffer_of_other_rows_is_refused() -> None:
    maps = torch.zeros(3, 24, 8, 5)
    for buffer in (torch.zeros(20, 23), torch.zeros(20, 24).double(), torch.zeros(9, 24)):
        with pytest.raises(RuntimeError):
            library.gather_again_(cursor_of(maps).tensor, buffer, maps)
