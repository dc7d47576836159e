"""The gather kernels in Triton's interpreter; run as interpreted.py is."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcov.kernels.gather import CURSOR_FIELDS, launch_cursor_gather_, launch_gather_
from fastcov.kernels.tiles import IS_INTERPRETED
from fastcov.ops.reference import gather_reference_


def normal(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_runs_in_the_interpreter():
    assert IS_INTERPRETED


class TestGather:
    @pytest.mark.parametrize("phase", [0, -5, 12345678901234567])
    @pytest.mark.parametrize(
        ("shape", "order", "run_length"),
        [
            ((3, 5, 7, 20), (0, 1, 2, 3), 1),
            ((3, 20, 5, 7), (0, 2, 3, 1), 8),
            ((50, 33), (0, 1), 3),
            ((4, 6, 3, 2, 9), (3, 1, 0, 2, 4), 2),
        ],
    )
    def test_host_counters(self, shape, order, run_length, phase):
        rows = normal(*shape, dtype=torch.bfloat16).permute(order)
        buffer = torch.zeros(40, rows.shape[-1], dtype=rows.dtype)
        expected = buffer.clone()
        for first_sample in (17, (1 << 40) + 3):
            arguments = (rows, 3, first_sample, 30, run_length, phase)
            launch_gather_(buffer, *arguments)
            gather_reference_(expected, *arguments)
            assert torch.equal(buffer, expected)

    def test_cursor_counts_like_the_host(self):
        from fastcov.rows.sequence import fixed_point, rows_due

        rows = normal(3, 5, 4, 9)
        rows[1, 2, 3, 8] = float("nan")
        buffer, expected = torch.zeros(2, 200, 9)
        row_step = torch.zeros(200, dtype=torch.int32)
        cursor = torch.zeros(CURSOR_FIELDS, dtype=torch.int64)
        step = torch.zeros((), dtype=torch.int64)
        fraction = fixed_point(0.3)
        sampled = carry = 0
        for number in range(5):
            step.fill_(number)
            launch_cursor_gather_(buffer, row_step, cursor, step, rows, fraction, 2, 77)
            due, carry = rows_due(60, fraction, carry)
            gather_reference_(expected, rows, sampled, sampled, due, 2, 77)
            steps = torch.full((due,), number, dtype=torch.int32)
            is_finite = torch.isfinite(expected[sampled : sampled + due]).all(1)
            assert torch.equal(
                row_step[sampled : sampled + due], steps.where(is_finite, torch.tensor(-1))
            )
            sampled += due
            assert cursor.tolist() == [sampled, sampled, carry, 0, 0, 0, 0, 0]
        torch.testing.assert_close(buffer, expected, rtol=0, atol=0, equal_nan=True)

    def test_cursor_drops_what_finds_no_room(self):
        rows = normal(40, 9)
        buffer = torch.zeros(50, 9)
        row_step = torch.zeros(50, dtype=torch.int32)
        cursor = torch.zeros(CURSOR_FIELDS, dtype=torch.int64)
        for _ in range(2):
            launch_cursor_gather_(
                buffer, row_step, cursor, torch.zeros((), dtype=torch.int64), rows, 1 << 32
            )
        assert torch.equal(buffer, torch.cat([rows, rows[:10]]))
        assert cursor.tolist() == [50, 50, 0, 0, 0, 0, 30, 0]
