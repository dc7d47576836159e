"""The compiled gather with counters on the device, where the host stands for the device."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov.ops import backend
from fastcov.ops.counted import CallCounters, CountedGather
from fastcov.ops.library import gather_counted_
from fastcov.ops.reference import gather_reference_
from fastcov.rows.layout import ActivationLayout
from fastcov.rows.sequence import fixed_point, rows_due
from fastcov.stats.cursor import CALLS, OFFERED, POSITIONS, Cursor
from fastcov.stats.device_buffer import DeviceBuffer
from fastcov.stats.state import CovarianceState

FILL, SAMPLED, CARRY, DROPPED = 0, 1, 2, 6
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "rows": lambda x: x,
    "planes": lambda x: x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1),
    "tokens": lambda x: x.flatten(1, 2)[:, 1:],
    "deep": lambda x: x.transpose(0, 2)[::2, :, ::2],
    "one channel": lambda x: x[..., :1],
    "every other channel": lambda x: x[..., ::2],
}


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("run_length", "phase"), [(1, 0), (4, -5), (16, 12345678901234567)])
def test_counts_and_copies_like_the_host(
    layout: str, dtype: torch.dtype, run_length: int, phase: int
) -> None:
    rows = LAYOUTS[layout](normal(3, 5, 4, 10, dtype=dtype))
    number, channels = rows.shape[:-1].numel(), rows.shape[-1]
    buffer, expected = torch.zeros(2, 200, channels, dtype=dtype)
    row_step = torch.zeros(200, dtype=torch.int32)
    cursor, step = torch.zeros(8, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    fraction = fixed_point(0.3)
    gather = CountedGather(buffer, row_step, cursor, step, rows, fraction, run_length, phase)
    sampled = carry = 0
    for at in range(5):
        rows.copy_(normal(*rows.shape, dtype=dtype, seed=at))
        rows[(1, *(rows.dim() - 1) * [-1])] = (float("nan"), float("-inf"))[at % 2]
        step.fill_(at)
        gather.launch_(rows)
        due, carry = rows_due(number, fraction, carry)
        gather_reference_(expected, rows, sampled, sampled, due, run_length, phase)
        is_finite = torch.isfinite(expected[sampled : sampled + due]).all(1)
        marks = torch.full((due,), at, dtype=torch.int32).where(is_finite, torch.tensor(-1))
        assert torch.equal(row_step[sampled : sampled + due], marks)
        sampled += due
        assert cursor.tolist() == [sampled, sampled, carry, 0, 0, 0, 0, 0]
    assert torch.equal(buffer.view(torch.uint8), expected.view(torch.uint8))


def test_every_row_comes_in_order_and_what_finds_no_room_is_counted() -> None:
    rows, buffer = normal(40, 9), torch.zeros(50, 9)
    row_step, cursor = torch.zeros(50, dtype=torch.int32), torch.zeros(8, dtype=torch.int64)
    step = torch.zeros((), dtype=torch.int64)
    gather = CountedGather(buffer, row_step, cursor, step, rows, 1 << 32)
    for _ in range(2):
        gather.launch_(rows)
    assert torch.equal(buffer, torch.cat([rows, rows[:10]]))
    assert cursor.tolist() == [50, 50, 0, 0, 0, 0, 30, 0]


@pytest.mark.parametrize(
    "wrong",
    [lambda rows: rows[:-1], lambda rows: rows.double(), lambda rows: rows.to("meta")],
    ids=["size", "dtype", "device"],
)
def test_rows_that_were_not_prepared_for_are_an_error(wrong: Callable[[Tensor], Tensor]) -> None:
    rows, buffer = normal(40, 9), torch.zeros(50, 9)
    cursor = torch.zeros(8, dtype=torch.int64)
    marks, step = torch.zeros(50, dtype=torch.int32), torch.zeros((), dtype=torch.int64)
    gather = CountedGather(buffer, marks, cursor, step, rows, 1 << 32)
    with pytest.raises(ValueError, match="prepare another"):
        gather.launch_(wrong(rows))
    assert not cursor.any()
    assert not buffer.any()


@pytest.mark.parametrize("is_compiled", [True, False])
def test_a_buffer_takes_the_operator_and_triton_without_a_library(
    monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    gpu = backend.GPU._replace(has_compiled_gather=is_compiled)
    monkeypatch.setattr(backend, "active", backend.Pretended(gpu))
    rows = torch.randn(2, 5, 5, 8)
    buffer = DeviceBuffer(
        CovarianceState(8),
        rows.dtype,
        step=torch.zeros((), dtype=torch.int64),
        threshold=16,
        first_threshold=16,
        most_rows=60,
        sampled=0,
        carry=0,
        state_step=0,
    )
    layout = ActivationLayout(rows, rows, (0, 1, 2, 3))
    gather = buffer.prepare(rows, layout, fixed_point(0.5), phase=3)
    assert isinstance(gather, CountedGather) == is_compiled


def _counted(rows: Tensor, most: int) -> tuple[CountedGather, Cursor, Tensor, Tensor]:
    cursor, room = Cursor(), torch.tensor([0, most])
    device_cursor, buffer = torch.zeros(8, dtype=torch.int64), torch.zeros(200, rows.shape[1])
    layout = ActivationLayout(rows.permute(0, 2, 3, 1), rows, (0, 2, 3, 1))
    assert layout.numbers is not None
    gather = CountedGather(
        buffer,
        torch.zeros(200, dtype=torch.int32),
        device_cursor,
        torch.zeros((), dtype=torch.int64),
        layout.view(rows),
        fixed_point(0.5),
        counters=CallCounters(cursor.tensor, room, layout.numbers),
    )
    return gather, cursor, room, device_cursor


def test_one_operator_counts_the_call_on_the_host_and_copies() -> None:
    rows = normal(2, 3, 4, 5)
    gather, cursor, room, device_cursor = _counted(rows, most=100)
    for call in (1, 2):
        assert gather_counted_(gather.prepared, rows) == 1
        assert cursor.numbers[CALLS] == call
        assert cursor.numbers[OFFERED] == 40 * call
        assert cursor.numbers[POSITIONS] == 20 * call
        assert room.tolist() == [40 * call, 100]
        assert int(device_cursor[FILL]) == 20 * call


@pytest.mark.parametrize(
    "other",
    [
        lambda x: x.transpose(2, 3),
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.half(),
        lambda x: x.view(torch.int32),
        lambda x: x.flatten(1),
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.to_mkldnn(),
        lambda x: torch.nested.nested_tensor(list(x)),
    ],
)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_another_layout_is_neither_counted_nor_copied(other: Callable[[Tensor], Tensor]) -> None:
    rows = normal(2, 3, 4, 4)
    gather, cursor, room, device_cursor = _counted(rows, most=100)
    assert gather_counted_(gather.prepared, other(rows)) == 0
    assert cursor.numbers[CALLS] == 0
    assert room.tolist() == [0, 100]
    assert not device_cursor.any()


def test_what_finds_no_room_in_a_step_is_left_to_the_layer() -> None:
    rows = normal(2, 3, 4, 5)
    # Half of 40 rows a call, and each call may round up by one.
    for most, calls in ((20, 0), (21, 1), (41, 1), (42, 2)):
        gather, cursor, room, _ = _counted(rows, most)
        taken = [gather_counted_(gather.prepared, rows) for _ in range(3)]
        assert taken == [int(call < calls) for call in range(3)]
        assert cursor.numbers[CALLS] == calls
        assert room.tolist() == [40 * calls, most]
    room[0] = 2**31 - 41  # more rows than 31 bits hold would overflow
    assert gather_counted_(gather.prepared, rows) == 0
