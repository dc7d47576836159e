"""Arguments of launches: the same for a permuted view and for the tensor behind the view."""

from __future__ import annotations

import inspect
from collections import defaultdict
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="the kernels need triton")
from triton import knobs
from triton.backends.nvidia import driver as nvidia
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcov.bench.stubs import KernelStubs
from fastcov.kernels import covariance, flush, gather, job, launch
from fastcov.kernels.config import Architecture
from fastcov.kernels.launch import Launch, has_known_convention
from fastcov.kernels.launcher import LauncherCall
from fastcov.kernels.layout import row_layout, row_layout_of
from fastcov.ops import triangle

CPU = torch.device("cpu")
KERNELS = (
    job.gram_kernel,
    job.block_kernel,
    job.mask_kernel,
    job.reduce_kernel,
    job.shift_kernel,
)
H100 = Architecture("sm_90", 132)
ACCEPTED = (Tensor, TensorDescriptor, int, float, type(None))
Launches = list[tuple[Any, ...]]


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Kernel, grid, arguments and options of each, with tensors by what a kernel sees of them."""
    found: Launches = []

    def described(value: Any) -> Any:
        if isinstance(value, TensorDescriptor):
            return [described(value.base), value.shape, value.strides, value.block_shape]
        if isinstance(value, Tensor):
            # Workspace lies anywhere.
            return (value.dtype, value.numel(), value.data_ptr() if value is not None else 0)
        return value

    def run(kernel: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        assert not warmup
        found.append((kernel.__name__, grid, *map(described, arguments), options))

    monkeypatch.setattr(JITFunction, "run", run)
    monkeypatch.setattr(job, "architecture_of", lambda _device: H100)
    job.cached_job.cache_clear()
    yield found
    job.cached_job.cache_clear()


def state_of(channels: int) -> list[Tensor]:
    moment = triangle.zeros(channels)
    vectors = torch.zeros(2, channels, dtype=torch.float64)
    return [moment, *vectors, torch.zeros((), dtype=torch.float64), torch.zeros(2).long()]


def without_workspace(launches: Launches) -> Launches:
    """Tensors that each update takes anew may lie elsewhere."""

    def strip(value: Any) -> Any:
        return value[:2] if isinstance(value, tuple) and value[0] is torch.float32 else value

    return [tuple(map(strip, launch)) for launch in launches]


ACTIVATIONS = [
    (torch.empty(2, 64, 8, 8).to(memory_format=torch.channels_last), 1),
    (torch.empty(2, 300, 16, 16).to(memory_format=torch.channels_last), 1),
    (torch.empty(2, 64, 8, 8), 1),
    (torch.empty(2, 64, 7, 7), 1),
    (torch.empty(2, 8, 9, 64)[:, ::2, ::2], 3),
    (torch.empty(40, 3, 24), 2),
    (torch.empty(3, 24, 5).transpose(0, 1), 1),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("activation", "channel_dim"), ACTIVATIONS)
def test_channels_may_be_anywhere(
    launches: Launches, activation: Tensor, channel_dim: int, dtype: torch.dtype
) -> None:
    activation = torch.empty_strided(activation.shape, activation.stride(), dtype=dtype)
    rows = activation.movedim(channel_dim, -1)
    state = state_of(rows.shape[-1])
    covariance.launch_accumulate_(*state, rows)
    view, launches[:] = without_workspace(launches), []
    assert {name for name, *_ in view} >= {"reduce_kernel"}
    covariance.launch_accumulate_(*state, activation, channel_dim=channel_dim)
    assert without_workspace(launches) == view
    accumulation = covariance.Accumulation(*state, channel_dim)
    for _ in range(2):
        launches.clear()
        accumulation.add(activation)
        assert without_workspace(launches) == view


def test_an_accumulation_looks_at_every_address(launches: Launches) -> None:
    """A bulk copy from an address that is not aligned is an error on the device."""
    memory = torch.empty(64 * 64 + 1, dtype=torch.bfloat16)
    accumulation = covariance.Accumulation(*state_of(64))
    for first in (0, 1, 0, 1):
        launches.clear()
        accumulation.add(memory[first : first + 64 * 64].view(64, 64))
        name, _, _rows, aligned_rows, matrix, *_ = launches[0]
        assert name == "gram_kernel"
        assert (aligned_rows is None, matrix is None) == (first == 1, first == 1)


def test_a_descriptor_is_what_its_constructor_makes() -> None:
    rows = torch.empty(512, 64, dtype=torch.bfloat16)
    found = job.job_of(rows, False, "split", H100)
    assert found is not None
    made = found.descriptor(rows)
    expected = TensorDescriptor(rows, [512, 64], [64, 1], made.block_shape)
    assert made.base is rows
    for name in vars(expected).keys() - {"base"}:
        assert getattr(made, name) == getattr(expected, name)


def test_constants_are_those_of_the_kernel() -> None:
    constants = {"IS_DEEP": False, "EDGE": 2, "STEP": 1}
    assert Launch.of(job.mask_kernel, (7,), (5, 6), constants).arguments == (5, 6, 1, 2, False)
    for wrong in ({**constants, "MODE": 0}, {"STEP": 1, "EDGE": 2}):
        with pytest.raises(TypeError, match="mask_kernel takes"):
            Launch.of(job.mask_kernel, (7,), (), wrong)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Arguments of every call of the function in C that starts kernels, which is not called."""
    found: Launches = []
    wrap = nvidia.wrap_handle_tensordesc

    def wrapped(_function: Any, *arguments: Any) -> Any:
        def call(*given: Any) -> None:
            last = given[-1] if isinstance(given[-1], list | tuple) else ()
            found.append((*given[: len(given) - bool(last)], *last))

        return wrap(call, *arguments)

    monkeypatch.setattr(nvidia, "wrap_handle_tensordesc", wrapped)
    # Kernels that earlier tests have compiled have launchers of their own.
    for each in (*KERNELS, gather.cursor_gather_kernel, flush.flush_kernel):
        monkeypatch.setattr(each, "device_caches", defaultdict(each.create_binder))
    return found


def has_tensors(launches: Launches) -> list[bool]:
    """True for launches that get tensors, as from Triton's own call."""
    return [any(isinstance(value, Tensor) for value in launch) for launch in launches]


UPDATES = [
    (torch.empty(2, 64, 8, 8).to(memory_format=torch.channels_last), torch.bfloat16),
    (torch.empty(2, 300, 16, 16).to(memory_format=torch.channels_last), torch.bfloat16),
    (torch.empty(2, 64, 8, 8), torch.float32),
    (torch.empty(2, 64, 7, 7), torch.float16),
    (torch.empty(2, 64, 8, 8)[:, :, ::2, ::2], torch.float32),
]


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(("activation", "dtype"), UPDATES)
def test_a_direct_start_hands_over_what_triton_does(
    started: Launches, activation: Tensor, dtype: torch.dtype, is_weighted: bool
) -> None:
    activation = torch.empty_strided(activation.shape, activation.stride(), dtype=dtype)
    channels = activation.shape[1]
    state = state_of(channels)
    number = activation.numel() // channels
    weight = torch.ones(number, dtype=torch.float64) if is_weighted else None
    known = {tensor.data_ptr(): index for index, tensor in enumerate([*state, activation])}

    def described(value: Any) -> Any:
        if isinstance(value, SimpleNamespace | knobs.HookChain):
            return None  # for profilers
        if type(value).__name__ == "PyCUtensorMap":
            return "map"
        address = value.data_ptr() if isinstance(value, Tensor) else value
        is_address = isinstance(address, int) and address > 1 << 32
        return known.get(address, "workspace") if is_address else address

    with KernelStubs(CPU):
        accumulation = covariance.Accumulation(*state, 1, 0.5, 0.9)
        accumulation.add(activation, weight)
        through_triton = [[*map(described, launch)] for launch in started]
        assert all(has_tensors(started))
        accumulation.add(activation, weight)
        for _ in range(2):
            started.clear()
            with mock.patch.object(JITFunction, "run", side_effect=AssertionError):
                accumulation.add(activation, weight)
            assert [[*map(described, launch)] for launch in started] == through_triton
            assert not any(has_tensors(started))


def test_a_bulk_copy_map_is_made_for_every_address(
    started: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows elsewhere must not be read where the last ones were; the same place is encoded once."""
    encoded = []
    expand = LauncherCall.expand

    def noted(call: LauncherCall, descriptor: TensorDescriptor) -> Any:
        encoded.append(descriptor.base.data_ptr())
        return expand(call, descriptor)

    monkeypatch.setattr(LauncherCall, "expand", noted)
    monkeypatch.setattr(covariance, "_MOST_ADDRESSES", 2)
    memory = torch.empty(4, 512, 64, dtype=torch.bfloat16)
    places = [each.data_ptr() for each in memory]
    with KernelStubs(CPU):
        accumulation = covariance.Accumulation(*state_of(64))
        for number in (0, 0, 0, 1, 0, 1):
            accumulation.add(memory[number])
        assert encoded == places[:2]
        started.clear()
        for number in (2, 0, 3):
            accumulation.add(memory[number])
    assert encoded == [*places[:2], places[2], places[0], places[3]]
    maps = [
        next(v for v in launch if type(v).__name__ == "PyCUtensorMap") for launch in started[::2]
    ]
    assert len({*map(id, maps)}) == 3


@pytest.mark.parametrize("change", ["scratch", "reordered", "strict", "twice"])
def test_a_launcher_of_another_kind_is_left_to_triton(
    started: Launches, monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    call = nvidia.CudaLauncher.__call__
    make = nvidia.CudaLauncher.__init__

    def changed(launcher: Any, *given: Any) -> None:
        if change == "reordered":
            given = (*given[:9], given[10], given[9], *given[11:])
        if change == "strict" and not all(isinstance(value, ACCEPTED) for value in given[9:]):
            raise TypeError
        call(launcher, *given)
        if change == "twice":
            call(launcher, *given)

    def with_scratch(launcher: Any, *given: Any) -> None:
        make(launcher, *given)
        launcher.global_scratch_size = 8

    if change == "scratch":
        monkeypatch.setattr(nvidia.CudaLauncher, "__init__", with_scratch)
        allocator = mock.Mock(get=lambda: lambda *_: None)
        monkeypatch.setattr(nvidia._allocation, "_allocator", allocator)
    else:
        monkeypatch.setattr(nvidia.CudaLauncher, "__call__", changed)
    state, rows = state_of(64), torch.empty(512, 64, dtype=torch.bfloat16)
    with KernelStubs(CPU):
        accumulation = covariance.Accumulation(*state)
        for _ in range(3):
            accumulation.add(rows)
    assert len(started) == (12 if change == "twice" else 6)
    assert all(has_tensors(started))


def test_gathers_and_flushes_start_directly_too(started: Launches) -> None:
    rows = torch.empty(2, 3, 8, dtype=torch.bfloat16)
    buffer, excess = torch.empty(9, 8, dtype=torch.bfloat16), torch.zeros(())
    marks, cursor, step = torch.zeros(9).int(), torch.zeros(8).long(), torch.zeros(()).long()
    with KernelStubs(CPU):
        prepared = gather.CursorGather(buffer, marks, cursor, step, rows, 1 << 31, 1, 7)
        layer = flush.BufferedLayer(*state_of(8), excess, buffer, marks, cursor, 6)
        table = flush.FlushTable([layer])
        for _ in range(3):
            prepared.launch_(rows)
            flush.launch_flush_(table, step, decay=0.9)
    firsts, seconds = started[:2], started[4:]
    for first, second in zip(firsts, seconds, strict=True):
        for_profilers = (SimpleNamespace, knobs.HookChain)
        addresses = [v.data_ptr() if isinstance(v, Tensor) else v for v in first]
        expected = [None if isinstance(v, for_profilers) else v for v in addresses]
        assert expected == list(second)
    assert not any(has_tensors(seconds))


def test_a_profiler_sees_every_launch(started: Launches) -> None:
    state, rows = state_of(64), torch.empty(512, 64, dtype=torch.bfloat16)
    stubs = KernelStubs(CPU)
    with stubs:
        accumulation = covariance.Accumulation(*state)
        for _ in range(3):
            accumulation.add(rows)
        assert has_tensors(started[4:]) == [False, False]
        started.clear()
        hooks = knobs.runtime.launch_enter_hook
        hooks.add(print)
        try:
            accumulation.add(rows)
        finally:
            hooks.remove(print)
        assert has_tensors(started) == [True, True]
        started.clear()
        accumulation.add(rows)
        assert has_tensors(started) == [False, False]


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("channels", [64, 600])
def test_launches_that_wait_are_those_that_come_early(family: Any, channels: int) -> None:
    """A kernel that came early and did not wait would read what is not written yet."""
    rows = torch.empty(4096, channels, dtype=torch.bfloat16)
    found = job.job_of(rows, False, "split", Architecture(family, 132))
    assert found is not None
    assert found.gram is not None
    for each in filter(None, (found.gram, found.block, found.reduce)):
        names = [name for name in each.kernel.arg_names if name.isupper()]
        constants = dict(zip(names, each.arguments[-len(names) :], strict=True))
        assert constants["OVERLAPS"] == (family != "sm_80")
        comes_early = each.options.get("launch_pdl", False)
        assert comes_early == (family != "sm_80" and each is not found.gram)
    if (shift := job.job_of(rows.float(), False, "split", Architecture(family, 132)).shift) is None:
        pytest.fail("float32 rows need a shift")
    assert "launch_pdl" not in shift.options  # its writes are read without a wait


def test_another_calling_convention_is_noticed() -> None:
    assert has_known_convention(JITFunction.run)
    source = inspect.getsource(JITFunction.run)
    for old, new in (
        ("kernel.packed_metadata, launch_metadata", "launch_metadata, kernel.packed_metadata"),
        ("kernel.run(", "kernel.start("),
        ("*bound_args.values())\n        return", "bound_args)\n        return"),
    ):
        assert old in source
        with mock.patch.object(inspect, "getsource", return_value=source.replace(old, new)):
            assert not has_known_convention(JITFunction.run)
    assert not has_known_convention(len)


def test_an_unknown_convention_goes_through_triton(started: Launches) -> None:
    state, rows = state_of(64), torch.empty(512, 64, dtype=torch.bfloat16)
    with KernelStubs(CPU), mock.patch.object(launch, "STARTS_DIRECTLY", False):
        accumulation = covariance.Accumulation(*state)
        for _ in range(3):
            accumulation.add(rows)
    assert has_tensors(started) == 6 * [True]


def test_a_gather_names_no_constant_and_has_them_in_order(launches: Launches) -> None:
    rows = torch.empty(2, 3, 8, dtype=torch.bfloat16)
    tensors = torch.zeros(8).int(), torch.zeros(8).long(), torch.zeros(()).long()
    prepared = gather.CursorGather(rows[0], *tensors, rows, 1 << 32, 1, 7)
    prepared.launch_(rows)
    (launch,) = launches
    values = dict(zip(gather.cursor_gather_kernel.arg_names, launch[2:-1], strict=True))
    constants = {name: value for name, value in values.items() if name.isupper()}
    assert constants == {"IS_ORDERED": True, "ROWS": 16, "COLUMNS": 128, "IS_DEEP": False}
    assert (values["channels"], values["positions"], values["row_count"]) == (8, 6, 6)
    assert values["image_rows"] == 3
    assert values["phase"] == 7


def test_a_layout_of_channels_anywhere_is_that_of_the_view() -> None:
    for activation, channel_dim in ACTIVATIONS:
        view = activation.movedim(channel_dim, -1)
        sizes = (activation.shape, activation.stride(), 4, True)
        assert row_layout_of(*sizes, channel_dim) == row_layout(view)
