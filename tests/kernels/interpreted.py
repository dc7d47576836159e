"""Every kernel in Triton's interpreter against ops.reference in float64.

Run by test_interpreter.py in a process of its own, because TRITON_INTERPRET must be set before
triton is imported. Sizes are small: a program takes about 10 ms there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastcov.kernels import config
from fastcov.kernels.config import Architecture, GramConfig
from fastcov.kernels.covariance import launch_accumulate_
from fastcov.kernels.flush import BufferedLayer, FlushTable, launch_flush_
from fastcov.kernels.gather import CURSOR_FIELDS, launch_cursor_gather_
from fastcov.kernels.tiles import IS_INTERPRETED
from fastcov.ops import triangle
from fastcov.ops.reference import accumulate_reference_
from fastcov.stats.state import CovarianceState

FAMILIES = ("sm_80", "sm_90")
_GUARD = 64  # numbers


class State(CovarianceState):
    """Its tensors in the order in which kernels take them."""

    @property
    def operands(self) -> tuple[Tensor, ...]:
        return self.tensors[:5]


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed)).to(dtype)


def matrix_of(state: State) -> Tensor:
    return triangle.unpack(state.moment, state.channels)


def assert_same(state: State, expected: State) -> None:
    # The interpreter adds with rounding: what is left is the split of float32, exact to 1e-7.
    tolerance = 1e-6
    if state.shift.any():  # 16-bit rows are multiplied as they are
        torch.testing.assert_close(state.shift, expected.shift, rtol=1e-7, atol=0)
    expected = expected.copy()
    expected.translate_(state.shift)
    matrix, expected_matrix = matrix_of(state), matrix_of(expected)
    largest = expected_matrix.abs().max().item()
    error = (matrix - expected_matrix).abs().max().item()
    assert error <= tolerance * largest, f"moment off by {error / largest:.1e}"
    # Sums about a shift near the mean cancel: hold them against what was added up.
    weight = max(expected.weight.item(), 1e-300)
    typical = (largest * weight) ** 0.5
    error = (state.sum - expected.sum).abs().max().item()
    assert error <= tolerance * typical, f"sum off by {error / typical:.1e}"
    torch.testing.assert_close(state.weight, expected.weight, rtol=1e-12, atol=0)
    assert state.count.tolist() == expected.count.tolist()
    cleared = triangle.cleared(state.moment, state.channels)
    assert torch.equal(state.moment, cleared), "wrote above the diagonal, or beyond the channels"


@contextmanager
def guarded_workspace() -> Iterator[list[Tensor]]:
    """Lists what launches allocate, behind which nothing may be written."""
    taken: list[Tensor] = []
    new_empty = Tensor.new_empty

    def guarded(like: Tensor, size: int, **options: torch.dtype) -> Tensor:
        taken.append(new_empty(like, size + _GUARD, **options).fill_(-7.0))
        return taken[-1][:size]

    with mock.patch.object(Tensor, "new_empty", guarded):
        yield taken
    assert all((whole[-_GUARD:] == -7.0).all() for whole in taken)


def check(
    *updates: Tensor,
    family: str = "sm_90",
    multiprocessors: int = 2,
    precision: str = "split",
    **options: object,
) -> State:
    """Updates a state with each tensor, and holds it against the reference after each."""
    channels = updates[0].shape[-1]
    state, expected = State(channels), State(channels)
    architecture = Architecture(family, multiprocessors)
    for rows in updates:
        with guarded_workspace() as taken:
            launch_accumulate_(
                *state.operands, rows, precision=precision, architecture=architecture, **options
            )
        assert taken or rows.numel() == 0
        accumulate_reference_(*expected.operands, rows, **options)
        assert_same(state, expected)
    return state


@pytest.fixture
def narrow_tiles(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Replaces all shapes, so that few channels already take triangles and rectangles."""

    def replace(panel: int, panels: int, left: int, right: int) -> None:
        shape = GramConfig(panel, panels, 32, warps=4, stages=2, left=left, right=right)
        for case in config.GRAM_CONFIGS:
            monkeypatch.setitem(config.GRAM_CONFIGS, case, (shape,))

    return replace


def test_runs_in_the_interpreter():
    assert IS_INTERPRETED


class TestAccumulate:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    @pytest.mark.parametrize(("rows", "channels"), [(1, 1), (199, 3), (40, 41), (33, 123)])
    def test_grid(self, dtype, rows, channels):
        family = FAMILIES[channels % 2]
        check(normal(rows, channels, dtype=dtype), family=family)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_layouts(self, family, dtype):
        nchw = normal(2, 24, 4, 8, dtype=dtype)
        small_maps = normal(3, 24, 7, 7, dtype=dtype)
        tokens = normal(2, 21, 24, dtype=dtype)
        for rows in (
            nchw.permute(0, 2, 3, 1),
            nchw.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
            small_maps.permute(0, 2, 3, 1),
            small_maps[:, 1:, 1:].permute(0, 2, 3, 1),
            tokens[:, 1:],
            tokens[:, :, 4:20],
        ):
            check(rows, family=family)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_any_strides(self, dtype):
        block = normal(2, 3, 2, 4, 12, dtype=dtype)
        for rows in (
            block.permute(3, 1, 0, 2, 4)[::2, ::2],
            block[:, :, :, :1, ::5],
            normal(1, 12, dtype=dtype).expand(50, 12),
        ):
            check(rows)

    @pytest.mark.parametrize("family", FAMILIES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_non_finite_rows_are_skipped_and_counted(self, family, dtype):
        rows = normal(150, 24, dtype=dtype)
        rows[0, 3] = float("nan")
        rows[70, 23] = float("inf")
        rows[70, 22] = float("-inf")
        rows[149] = float("nan")
        state = check(rows, rows[1:70], family=family, multiprocessors=8)
        assert state.count.tolist() == [147 + 69, 3]

    @pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "sm_120"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_one_broken_row_of_80_channels(self, family, dtype):
        """More than one triangle for some families, one of a kind with rectangles for sm_100."""
        rows = normal(40, 80, dtype=dtype)
        rows[17, 70] = float("nan")
        state = check(rows, family=family)
        assert state.count.tolist() == [39, 1]

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_no_finite_row_leaves_the_shift_open(self, dtype):
        broken = torch.full((5, 8), float("nan"), dtype=dtype)
        state = check(broken, broken[:0], normal(9, 8, dtype=dtype) + 3, decay=0.5)
        assert state.count.tolist() == [9, 5]

    def test_shift_is_the_mean_of_the_first_finite_rows(self):
        rows = normal(140, 70) + 100
        rows[:70:2, 69] = float("inf")
        state = check(rows)
        finite = torch.isfinite(rows).all(1)
        expected = rows[finite][:64].double().mean(0)
        torch.testing.assert_close(state.shift, expected.float().double(), rtol=1e-7, atol=0)

    def test_mean_far_from_zero_does_not_cancel(self):
        rows = normal(190, 20) + 1e4
        state = check(rows)
        mean = state.sum / 190
        centred = matrix_of(state) / 190 - mean[:, None] * mean
        expected = torch.cov(rows.double().T, correction=0)
        assert (centred - expected).tril().abs().max() <= 1e-5 * expected.max()

    @pytest.mark.parametrize("layout", ["rows", "planes", "strided", "weighted"])
    def test_values_that_two_bfloat16_cannot_hold(self, layout):
        worst = 1 + 2**-8 + 2**-16 - 2**-20
        rows = worst * normal(2, 24, 4, 8).sign()
        rows[:, 5] = worst * rows[:, 4].sign()  # and the largest off the diagonal
        views = {
            "rows": rows.permute(0, 2, 3, 1).contiguous(),
            "planes": rows.permute(0, 2, 3, 1),
            "strided": rows.permute(0, 2, 3, 1)[:, ::2, ::2],
            "weighted": rows.permute(0, 2, 3, 1).contiguous(),
        }
        weight = torch.full((64,), worst, dtype=torch.float64) if layout == "weighted" else None
        check(views[layout], row_weight=weight)

    def test_constant_channel(self):
        rows = normal(100, 20)
        rows[:, 7] = 3.0
        state = check(rows)
        assert matrix_of(state)[7].abs().max() == 0

    @pytest.mark.parametrize(
        ("dtype", "weight_dtype"),
        [(torch.float32, torch.float64), (torch.bfloat16, torch.float32), (torch.float16, None)],
    )
    def test_weights_and_decay(self, dtype, weight_dtype):
        rows = normal(75, 20, dtype=dtype)
        rows[4, 4] = float("nan")
        if weight_dtype is None:
            check(rows, rows, row_scale=1 / 3, decay=0.99)
            return
        weight = torch.rand(75, generator=torch.Generator().manual_seed(0), dtype=weight_dtype)
        check(rows, rows, row_weight=weight, row_scale=0.3, decay=0.9)

    def test_decay_without_rows(self):
        check(normal(9, 4), normal(0, 4), normal(2, 4), decay=0.5)

    @pytest.mark.parametrize("precision", ["tf32", "ieee"])
    def test_other_precisions(self, precision):
        check(normal(75, 40), precision=precision)

    def test_half_precision_rows_on_a_shifted_state(self):
        first = normal(50, 20) + 2
        check(first, (normal(30, 20, seed=1) + 2).bfloat16(), first)

    def test_bfloat16_beyond_float16(self):
        check(normal(50, 8, dtype=torch.bfloat16) * 1e15)
        check((normal(50, 8) * 100 + 6e4).clamp(max=65504).half())

    @pytest.mark.parametrize(
        ("family", "dtype", "shape"),
        [
            ("sm_90", torch.float32, (32, 2, 1, 2)),
            ("sm_80", torch.bfloat16, (32, 2, 2, 2)),
            ("sm_90", torch.bfloat16, (32, 1, 1, 1)),
            ("sm_90", torch.float32, (16, 3, 1, 3)),
        ],
    )
    def test_more_channels_than_one_triangle(self, narrow_tiles, family, dtype, shape):
        narrow_tiles(*shape)
        rows = normal(70, 73, dtype=dtype)
        broken = rows.clone()
        broken[66, 72] = float("nan")
        check(rows, broken, family=family, multiprocessors=1)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_same_input_same_bits(self, dtype):
        rows = normal(199, 20, dtype=dtype)
        states = [check(rows, multiprocessors=8) for _ in range(2)]
        for one, other in zip(states[0].tensors, states[1].tensors, strict=True):
            assert torch.equal(one, other)


class TestFlush:
    @pytest.mark.parametrize("decay", [1.0, 0.9])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_flush_is_one_update_per_full_buffer(self, dtype, decay):
        widths = (70, 16)
        fraction, capacity, threshold = 1 << 30, 60, 40
        states = [State(width) for width in widths]
        expected = [State(width) for width in widths]
        weights = [torch.zeros(0, dtype=torch.float64) for _ in widths]  # of every finite row
        buffers = [torch.zeros(capacity, width, dtype=dtype) for width in widths]
        row_steps = [torch.zeros(capacity, dtype=torch.int32) for _ in widths]
        cursors = [torch.zeros(CURSOR_FIELDS, dtype=torch.int64) for _ in widths]
        step = torch.zeros((), dtype=torch.int64)
        # The second layer never fills: only the forced flush at the end takes its rows.
        thresholds = (threshold, capacity)
        table = FlushTable(
            [
                BufferedLayer(*state.tensors, buffer, row_step, cursor, least, 0.5)
                for state, buffer, row_step, cursor, least in zip(
                    states, buffers, row_steps, cursors, thresholds, strict=True
                )
            ]
        )
        last_step = [0, 0]
        flushes = [0, 0]
        for number in range(4):
            step.fill_(number)
            for layer, width in enumerate(widths):
                rows = normal(2, 30, width, dtype=dtype, seed=number) + layer
                rows[0, 0, 3] = float("nan")
                launch_cursor_gather_(
                    buffers[layer], row_steps[layer], cursors[layer], step, rows, fraction, 1, 9
                )
            is_last = number == 3
            for layer in range(len(widths)):
                fill = int(cursors[layer][0])
                if fill < thresholds[layer] and not is_last:
                    continue
                flushes[layer] += 1
                marks = row_steps[layer][:fill]
                ages = torch.where(marks >= 0, number - marks, 0)
                accumulate_reference_(
                    *expected[layer].operands,
                    buffers[layer][:fill],
                    row_weight=decay ** ages.double(),
                    row_scale=0.5,
                    decay=decay ** (number - last_step[layer]),
                )
                kept = weights[layer] * decay ** (number - last_step[layer])
                new = 0.5 * decay ** ages[marks >= 0].double()
                weights[layer] = torch.cat([kept, new])
                last_step[layer] = number
            launch_flush_(table, step, decay=decay, force=is_last)
            for layer in range(len(widths)):
                if flushes[layer]:
                    assert_same(states[layer], expected[layer])
                squares = weights[layer].square().sum()
                torch.testing.assert_close(
                    states[layer].squared_weight, squares, rtol=1e-12, atol=0
                )
        assert flushes == [2, 1]
        assert [int(cursor[0]) for cursor in cursors] == [0, 0]

    def test_the_first_flush_of_a_layer_comes_at_its_own_moment(self):
        state, cursor = State(20), torch.zeros(CURSOR_FIELDS, dtype=torch.int64)
        buffer, row_step = torch.zeros(60, 20), torch.zeros(60, dtype=torch.int32)
        step = torch.zeros((), dtype=torch.int64)
        layer = BufferedLayer(*state.tensors, buffer, row_step, cursor, 40, first_threshold=15)
        table, rows, fills = FlushTable([layer]), normal(10, 20), []
        for number in range(12):
            launch_cursor_gather_(buffer, row_step, cursor, step, rows, 1 << 32)
            launch_flush_(table, step, force=number == 7)
            fills.append(int(cursor[0]))
        # After 20 rows, then every 40; forced in between, after 20 again.
        assert fills == [10, 0, 10, 20, 30, 0, 10, 0, 10, 0, 10, 20]
        assert int(state.count[0]) == 100

    def test_half_precision_rows_on_a_shifted_state(self):
        state, expected = State(20), State(20)
        first = normal(50, 20) + 2
        for target in (state, expected):
            accumulate_reference_(*target.operands, first)
        state.moment.copy_(triangle.cleared(state.moment, 20))
        rows = (normal(30, 20, seed=1) + 2).bfloat16()
        buffer = torch.zeros(30, 20, dtype=torch.bfloat16)
        row_step = torch.zeros(30, dtype=torch.int32)
        cursor = torch.zeros(CURSOR_FIELDS, dtype=torch.int64)
        step = torch.zeros((), dtype=torch.int64)
        launch_cursor_gather_(buffer, row_step, cursor, step, rows, 1 << 32)
        launch_flush_(
            FlushTable([BufferedLayer(*state.tensors, buffer, row_step, cursor, 30)]), step
        )
        accumulate_reference_(*expected.operands, rows)
        assert_same(state, expected)

    def test_wrong_cursor_is_named(self):
        state = State(4)
        with pytest.raises(ValueError, match="cursor has 3 fields, expected 8"):
            FlushTable(
                [
                    BufferedLayer(
                        *state.tensors,
                        torch.zeros(2, 4),
                        torch.zeros(2, dtype=torch.int32),
                        torch.zeros(3, dtype=torch.int64),
                        2,
                    )
                ]
            )
