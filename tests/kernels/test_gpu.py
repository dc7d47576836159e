"""The kernels on a real GPU: STYLE's grid, same bits, graphs, no synchronisation, long chains."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from threading import Thread
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastcov.ops import triangle
from fastcov.ops.reference import accumulate_reference_, gather_reference_

pytestmark = pytest.mark.gpu


DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def needs_triton() -> None:
    pytest.importorskip("triton", reason="the kernels need triton")


def empty_state(channels: int) -> list[Tensor]:
    double = partial(torch.zeros, dtype=torch.float64, device="cuda")
    count = torch.zeros(2, dtype=torch.int64, device="cuda")
    return [triangle.zeros(channels, "cuda"), double(channels), double(channels), double(()), count]


def normal(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(*size, generator=generator, device="cuda").to(dtype)


def launch(state: list[Tensor], rows: Tensor, *arguments: object, **options: object) -> None:
    from fastcov.kernels import launch_accumulate_

    launch_accumulate_(*state, rows, *arguments, **options)


def about(state: list[Tensor], shift: Tensor) -> list[Tensor]:
    """The same rows about another shift."""
    moment, total, before, weight, count = state
    step = before - shift
    moment = moment + triangle.translation(step, total, weight)
    return [moment, total + weight * step, shift, weight, count]


def assert_same(state: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    channels = len(expected[1])
    if state[2].any():  # 16-bit rows are multiplied as they are
        torch.testing.assert_close(state[2], expected[2], rtol=1e-6, atol=1e-12)
    expected = about(expected, state[2])
    largest = expected[0].abs().max().item()
    error = triangle.cleared(state[0] - expected[0], channels).abs().max().item()
    assert error <= tolerance * largest, f"moment off by {error / max(largest, 1e-300):.1e}"
    typical = (largest * max(expected[3].item(), 0.0)) ** 0.5
    error = (state[1] - expected[1]).abs().max().item()
    assert error <= tolerance * typical, f"sum off by {error / max(typical, 1e-300):.1e}"
    torch.testing.assert_close(state[3], expected[3], rtol=1e-12, atol=0)
    assert torch.equal(state[4], expected[4])


def check(*updates: Tensor, tolerance: float | None = None, **options: object) -> list[Tensor]:
    channels = updates[0].shape[-1]
    state, expected = empty_state(channels), empty_state(channels)
    for rows in updates:
        launch(state, rows, **options)
        definition = {k: v for k, v in options.items() if k not in ("precision", "architecture")}
        accumulate_reference_(*expected, rows, **definition)
    assert_same(state, expected, tolerance or 1e-5)
    return state


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [1, 3, 41, 64, 123, 256, 1128])
@pytest.mark.parametrize("rows", [0, 1, 199, 8192])
def test_grid(dtype, channels, rows):
    check(normal(rows, channels, dtype=dtype), normal(64, channels, dtype=dtype, seed=1))


def layouts(channels: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    maps = normal(3, channels, 14, 16, dtype=dtype)
    odd = normal(5, channels, 7, 7, dtype=dtype)
    tokens = normal(4, 65, channels, dtype=dtype)
    return (
        maps.permute(0, 2, 3, 1),
        maps.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        odd.permute(0, 2, 3, 1),
        odd[:, :, 1:, ::2].permute(0, 2, 3, 1),
        tokens[:, 1:],
        tokens[..., ::2],
        tokens[..., 1:],
        normal(1, channels, dtype=dtype).expand(300, channels),
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [40, 64, 192, 512])
def test_layouts(dtype, channels):
    for rows in layouts(channels, dtype):
        check(rows)


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [40, 512])
def test_an_update_takes_its_workspace_and_no_copy_of_the_rows(dtype, channels, is_weighted):
    from fastcov.kernels import workspace_bytes
    from fastcov.ops import library

    def requested(point: str) -> int:  # before the allocator rounds up
        return torch.cuda.memory_stats()[f"requested_bytes.all.{point}"]

    state = empty_state(channels)
    for rows in layouts(channels, dtype):
        number = rows.shape[:-1].numel()
        weight = torch.ones(number, dtype=torch.float64, device="cuda") if is_weighted else None
        library.accumulate_(*state, rows, -1, weight)  # compiles
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = requested("current")
        library.accumulate_(*state, rows, -1, weight)
        taken = requested("peak") - before
        assert 0 < taken <= workspace_bytes(rows, is_weighted=is_weighted), rows.stride()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [24, 256, 600])
def test_non_finite_rows(dtype, channels):
    rows = normal(9000, channels, dtype=dtype)
    rows[0, channels - 1] = float("nan")
    rows[4097, 0] = float("inf")
    rows[4097, 1] = float("-inf")
    rows[8999] = float("nan")
    state = check(rows)
    assert state[4].tolist() == [8997, 3]
    check(torch.full_like(rows, float("nan")), rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [24, 256, 600])
def test_several_chains_in_a_slot(dtype, channels):
    """Planned for one multiprocessor: so few slots that each takes several chains."""
    from fastcov.kernels import job
    from fastcov.kernels import launch as starting

    architecture = replace(starting.architecture_of(torch.device("cuda")), multiprocessors=1)
    rows = normal(60_000, channels, dtype=dtype)
    plan = job.job_of(rows, False, "split", architecture).plan
    assert plan.chains > plan.chunks
    states = [check(rows, rows, architecture=architecture) for _ in range(2)]
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))
    for row in (0, 30_001, 59_999):
        rows[row, row % channels] = float("nan")
    state = check(rows, architecture=architecture)
    assert state[4].tolist() == [59_997, 3]
    weight = torch.rand(60_000, device="cuda", dtype=torch.float64)
    check(rows, row_weight=weight, architecture=architecture)


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_decay_and_precisions(dtype):
    rows = normal(5000, 200, dtype=dtype)
    weight = torch.rand(5000, device="cuda", dtype=torch.float64)
    check(rows, rows, row_weight=weight, row_scale=0.3, decay=0.9)
    check(rows, rows, row_scale=1 / 3, decay=0.99)
    if dtype == torch.float32:
        check(rows, precision="ieee", tolerance=2e-6)
        check(rows, precision="tf32", tolerance=1e-3)


def test_mean_far_from_zero_does_not_cancel():
    rows = normal(50_000, 96) + 1e4
    state = check(rows)
    mean = state[1] / 50_000
    centred = triangle.unpack(state[0], len(mean)) / 50_000 - mean[:, None] * mean
    expected = torch.cov(rows.double().T, correction=0)
    assert (centred - expected).tril().abs().max() <= 1e-5 * expected.max()


def test_constant_channel_and_mixed_dtypes():
    rows = normal(500, 40)
    rows[:, 7] = 3.0
    assert check(rows)[0][7].abs().max() == 0
    check(rows + 2, (rows + 2).bfloat16())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["one sign", "two values"])
@pytest.mark.parametrize("channels", [64, 256, 512])
def test_a_million_rows_of_one_sign(channels, kind, dtype):
    """Every truncation of the matrix instructions goes the same way: chains must be short."""
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.rand(1 << 20, channels, generator=generator, device="cuda") + 0.5
    if kind == "two values":  # that two bfloat16 cannot hold
        rows = torch.where(rows < 1, -1.0, 1.0) * (1 + 2**-8 + 2**-16 - 2**-20)
    rows = rows.to(dtype)
    state = empty_state(channels)
    launch(state, rows)
    shift = state[2]
    exact = torch.zeros(channels, channels, dtype=torch.float64, device="cuda")
    total = torch.zeros(channels, dtype=torch.float64, device="cuda")
    for part in rows.split(1 << 16):
        shifted = part.double() - shift
        exact += shifted.T @ shifted
        total += shifted.sum(0)
    assert (triangle.unpack(state[0], len(exact)) - exact).abs().max() <= 1e-5 * exact.max()
    assert (state[1] - total).abs().max() <= 1e-5 * (exact.max() * len(rows)).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [1.0, 0.9])
@pytest.mark.parametrize("channels", [63, 256])
def test_a_flush_of_many_rows_of_one_sign(channels, decay, dtype):
    from fastcov.kernels.flush import BufferedLayer, FlushTable, launch_flush_
    from fastcov.kernels.gather import CURSOR_FIELDS, FILL

    generator = torch.Generator("cuda").manual_seed(0)
    rows = (torch.rand(4096, channels, generator=generator, device="cuda") + 0.5).to(dtype)
    state, excess = empty_state(channels), torch.zeros(2, dtype=torch.float64, device="cuda")
    row_step = torch.zeros(4096, dtype=torch.int32, device="cuda")
    cursor = torch.zeros(CURSOR_FIELDS, dtype=torch.int64, device="cuda")
    cursor[FILL.value] = 4096
    table = FlushTable([BufferedLayer(*state, excess, rows, row_step, cursor, 4096)])
    launch_flush_(table, torch.ones((), dtype=torch.int64, device="cuda"), decay=decay)
    assert state[4].tolist() == [4096, 0]
    shifted = rows.double() - state[2]
    exact = decay * shifted.T @ shifted
    assert (triangle.unpack(state[0], len(exact)) - exact).abs().max() <= 1e-5 * exact.max()
    total = decay * shifted.sum(0)
    assert (state[1] - total).abs().max() <= 1e-5 * (exact.max() * 4096).sqrt()


@pytest.mark.parametrize("dtype", DTYPES)
def test_ten_thousand_updates(dtype):
    rows = normal(64, 48, dtype=dtype)
    state, expected = empty_state(48), empty_state(48)
    for _ in range(10_000):
        launch(state, rows)
    accumulate_reference_(*expected, rows, row_scale=10_000)
    expected[4] *= 10_000
    assert_same(state, expected, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 256, 1024])
def test_same_input_same_bits(dtype, channels):
    rows = normal(30_000, channels, dtype=dtype)
    states = []
    for _ in range(3):
        state = empty_state(channels)
        for _ in range(2):
            launch(state, rows)
        states.append(state)
    for state in states[1:]:
        assert all(torch.equal(one, other) for one, other in zip(state, states[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 512])
def test_no_synchronisation_and_no_lasting_memory(dtype, channels):
    rows = normal(20_000, channels, dtype=dtype)
    state = empty_state(channels)
    launch(state, rows)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    with no_synchronisation():
        for _ in range(3):
            launch(state, rows)
    assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 512])
def test_captured_update_replays_with_right_counts(dtype, channels):
    rows = normal(5000, channels, dtype=dtype)
    rows[17, 3] = float("nan")
    state = empty_state(channels)
    launch(state, rows)  # compiles
    for tensor in state:
        tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch(state, rows)
    expected = empty_state(channels)
    for seed in range(4):
        rows.copy_(normal(5000, channels, dtype=dtype, seed=seed))
        graph.replay()
        accumulate_reference_(*expected, rows)
    assert_same(state, expected, 1e-5)


@pytest.mark.parametrize(
    "device", [f"cuda:{at}" for at in range(max(1, torch.cuda.device_count()))]
)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gpu_from_a_fresh_thread(dtype, device):
    """The thread has no current device and no context: launches must bring their own."""
    found: list[Tensor] = []

    def run() -> None:
        rows = normal(3000, 96, dtype=dtype).to(device)
        state = [tensor.to(device) for tensor in empty_state(96)]
        accumulation = Accumulation(*state)
        for _ in range(3):
            accumulation.add(rows)
        found.extend(tensor.to("cuda:0") for tensor in state)

    from fastcov.kernels import Accumulation

    torch.cuda.set_device(0)
    thread = Thread(target=run)
    thread.start()
    thread.join()
    expected = empty_state(96)
    for _ in range(3):
        accumulate_reference_(*expected, normal(3000, 96, dtype=dtype))
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [64, 600])
def test_repeated_updates_start_directly(dtype, channels):
    """The kept kernel's launcher, given addresses, does what Triton's own call does."""
    from fastcov.kernels import Accumulation
    from fastcov.kernels.launch import STARTS_DIRECTLY, Launch

    assert STARTS_DIRECTLY
    rows = normal(5000, channels, dtype=dtype)
    states = [empty_state(channels) for _ in range(2)]
    direct = Accumulation(*states[0])
    for _ in range(2):
        direct.add(rows)
    with mock.patch.object(Launch, "start", side_effect=AssertionError):
        for _ in range(3):
            direct.add(rows)
    for _ in range(5):
        launch(states[1], rows)
    assert all(torch.equal(one, other) for one, other in zip(*states, strict=True))


@pytest.mark.parametrize("fraction", [0.3, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_compiled_gather_does_what_tritons_does(dtype, fraction):
    from fastcov.kernels import CURSOR_FIELDS
    from fastcov.kernels.gather import CursorGather
    from fastcov.ops.backend import service_of
    from fastcov.ops.counted import CountedGather

    service = service_of(dtype, torch.device("cuda", 0))
    assert service.has_compiled_gather, "build the CUDA library first: make dev"
    for rows in layouts(40, dtype):
        rows = rows.clone(memory_format=torch.preserve_format)
        results = []
        for kind in (CountedGather, CursorGather):
            buffer = torch.zeros(900, rows.shape[-1], dtype=dtype, device="cuda")
            marks = torch.zeros(900, dtype=torch.int32, device="cuda")
            cursor = torch.zeros(CURSOR_FIELDS, dtype=torch.int64, device="cuda")
            step = torch.ones((), dtype=torch.int64, device="cuda")
            gather = kind(buffer, marks, cursor, step, rows, int(fraction * 2**32), 4, 99)
            with no_synchronisation():
                for _ in range(3):
                    gather.launch_(rows)
            results.append((buffer, marks, cursor))
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other), rows.stride()


@pytest.mark.parametrize("run_length", [1, 16])
@pytest.mark.parametrize("phase", [0, -5, 12345678901234567])
def test_gather(run_length, phase):
    from fastcov.kernels import launch_gather_

    for rows in (
        normal(8, 14, 14, 300, dtype=torch.bfloat16),
        normal(8, 300, 14, 14, dtype=torch.bfloat16).permute(0, 2, 3, 1),
        normal(1000, 33),
    ):
        buffer = torch.zeros(600, rows.shape[-1], dtype=rows.dtype, device="cuda")
        expected = buffer.clone()
        arguments = (rows, 3, (1 << 33) + 17, 500, run_length, phase)
        with no_synchronisation():
            launch_gather_(buffer, *arguments)
        gather_reference_(expected, *arguments)
        assert torch.equal(buffer, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_gather_and_flush_in_a_graph(dtype, decay):
    """One captured step, replayed: every count and every row as if the host had kept them."""
    from fastcov.kernels.flush import BufferedLayer, FlushTable, launch_flush_
    from fastcov.kernels.gather import CURSOR_FIELDS, launch_cursor_gather_
    from fastcov.rows.sequence import fixed_point, rows_due

    widths, images, fraction, steps = (64, 200, 513), 4, fixed_point(0.123), 40
    inputs = [torch.empty(images, 50, width, dtype=dtype, device="cuda") for width in widths]
    states = [empty_state(width) for width in widths]
    excesses = [torch.zeros(2, dtype=torch.float64, device="cuda") for _ in widths]
    capacity, threshold = 160, 120
    buffers = [torch.zeros(capacity, width, dtype=dtype, device="cuda") for width in widths]
    row_steps = [torch.zeros(capacity, dtype=torch.int32, device="cuda") for _ in widths]
    cursors = [torch.zeros(CURSOR_FIELDS, dtype=torch.int64, device="cuda") for _ in widths]
    step = torch.zeros((), dtype=torch.int64, device="cuda")
    table = FlushTable(
        [
            BufferedLayer(*state, excess, buffer, row_step, cursor, threshold, 0.5)
            for state, excess, buffer, row_step, cursor in zip(
                states, excesses, buffers, row_steps, cursors, strict=True
            )
        ]
    )

    def one_step(force: bool = False) -> None:
        for rows, buffer, row_step, cursor in zip(inputs, buffers, row_steps, cursors, strict=True):
            launch_cursor_gather_(buffer, row_step, cursor, step, rows, fraction, 1, 7)
        launch_flush_(table, step, decay=decay, force=force)
        step.add_(1)

    def fill(number: int) -> None:
        for layer, rows in enumerate(inputs):
            rows.copy_(normal(*rows.shape, dtype=dtype, seed=100 * number + layer) + layer)
            rows[0, 0, 3] = float("nan")

    fill(0)
    one_step()  # compiles
    for tensor in (*(t for state in states for t in state), *excesses, *cursors, step):
        tensor.zero_()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        one_step()
    expected = [empty_state(width) for width in widths]
    squared_weight = [0.0 for _ in widths]
    sampled = carry = 0
    for number in range(steps):
        fill(number)
        graph.replay()
        due, carry = rows_due(images * 50, fraction, carry)
        for layer, rows in enumerate(inputs):
            picked = torch.empty(due, widths[layer], dtype=dtype, device="cuda")
            gather_reference_(picked, rows, 0, sampled, due, 1, 7)
            accumulate_reference_(*expected[layer], picked, row_scale=0.5, decay=decay)
            read = int(torch.isfinite(picked).all(1).sum())
            squared_weight[layer] = squared_weight[layer] * decay**2 + 0.25 * read
        sampled += due
    # What is still buffered belongs to the last replayed step.
    step.sub_(1)
    launch_flush_(table, step, decay=decay, force=True)
    for layer in range(len(widths)):
        assert int(cursors[layer][1]) == sampled
        assert int(cursors[layer][0]) == 0
        assert torch.equal(states[layer][4], expected[layer][4])
        torch.testing.assert_close(states[layer][3], expected[layer][3], rtol=1e-9, atol=0)
        squared = float(excesses[layer][0] + states[layer][4][0] - excesses[layer][1])
        assert squared == pytest.approx(squared_weight[layer], rel=1e-9)
        # The shifts differ (a buffer's first rows against a step's): compare about zero.
        for state in (states[layer], expected[layer]):
            moment = triangle.unpack(state[0], len(state[1]))
            moment += torch.outer(state[1], state[2]) + torch.outer(state[2], state[1])
            state[0] = moment + state[3] * torch.outer(state[2], state[2])
        largest = expected[layer][0].max()
        assert (states[layer][0] - expected[layer][0]).abs().max() <= 1e-5 * largest
