"""Rows reach the kernels' launchers as hooks were given them: no cast, no copy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastcov.ops import backend, library
from fastcov.ops.backend import Pretended
from fastcov.rows.layout import ActivationLayout
from fastcov.stats.device_buffer import DeviceBuffer
from fastcov.stats.layer import Layer
from fastcov.stats.state import CovarianceState

kernels = pytest.importorskip("fastcov.kernels")
pytest.importorskip("triton", reason="the launchers need triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS: dict[str, tuple[Callable[[Tensor], Tensor], int]] = {
    "nchw": (lambda x: x, 1),
    "channels_last": (lambda x: x.to(memory_format=torch.channels_last), 1),
    "nchw view": (lambda x: x.permute(0, 2, 3, 1), -1),
    "channels_last view": (
        lambda x: x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        -1,
    ),
    "token slice": (lambda x: x.flatten(2).mT.contiguous()[:, 1:], -1),
    "channel slice": (lambda x: x.flatten(2).mT.contiguous()[..., 1:], -1),
    "sequence first": (lambda x: x.flatten(2).permute(2, 0, 1).contiguous().transpose(0, 1), -1),
    "strided": (lambda x: x[:, :, 1:, ::2].permute(0, 2, 3, 1), -1),
    "every other channel": (lambda x: x[:, ::2], 1),
    "expanded": (lambda x: x[:1, :, :1, :1].expand(3, -1, 4, 5), 1),
}


@pytest.fixture(params=DTYPES, ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    return request.param


@pytest.fixture(params=LAYOUTS)
def given(request: pytest.FixtureRequest, dtype: torch.dtype) -> tuple[Tensor, int]:
    """An activation and the dimension of its channels."""
    make, channel_dim = LAYOUTS[request.param]
    generator = torch.Generator().manual_seed(0)
    return make(torch.randn(3, 24, 6, 8, generator=generator).to(dtype)), channel_dim


@pytest.fixture(autouse=True)
def triton_serves() -> Iterator[None]:
    with mock.patch.object(backend, "active", Pretended(backend.GPU)):
        yield


def assert_untouched(launched: Tensor, activation: Tensor, channel_dim: int) -> None:
    rows = activation.movedim(channel_dim, -1)
    assert launched.data_ptr() == rows.data_ptr()
    assert launched.dtype is rows.dtype
    assert launched.shape == rows.shape
    assert launched.stride() == rows.stride()


@pytest.mark.parametrize("is_weighted", [False, True])
def test_accumulate(given: tuple[Tensor, int], is_weighted: bool) -> None:
    activation, channel_dim = given
    channels = activation.shape[channel_dim]
    state = CovarianceState(channels)
    tensors = (state.moment, state.sum, state.shift, state.weight, state.count)
    count = activation.numel() // channels
    row_weight = torch.ones(count, dtype=torch.float64) if is_weighted else None
    with mock.patch("fastcov.kernels.covariance.launch_accumulate_") as launch:
        library._accumulate_cuda(*tensors, activation, channel_dim, row_weight, 0.5, 0.9)
    (call,) = launch.call_args_list
    *to, rows, weight, row_scale, decay = call.args
    assert [id(tensor) for tensor in to] == [id(tensor) for tensor in tensors]
    assert_untouched(rows.movedim(call.kwargs["channel_dim"], -1), activation, channel_dim)
    assert weight is row_weight
    assert (row_scale, decay) == (0.5, 0.9)


def test_gather(given: tuple[Tensor, int]) -> None:
    activation, channel_dim = given
    buffer = torch.zeros(9, activation.shape[channel_dim], dtype=activation.dtype)
    with mock.patch("fastcov.kernels.gather.launch_gather_") as launch:
        library._gather_cuda(buffer, activation, 2, 5, 7, 1, -3, channel_dim)
    (call,) = launch.call_args_list
    assert call.args[0] is buffer
    assert_untouched(call.args[1], activation, channel_dim)
    assert call.args[2:] == (2, 5, 7, 1, -3)


def test_gather_with_a_cursor(given: tuple[Tensor, int]) -> None:
    """From the reader on, as there is no operator between."""
    activation, channel_dim = given
    rows = activation.movedim(channel_dim, -1)
    reader = Layer("layer", weighting="position", decay=None, phase=3, fraction=0.5)
    reader.begin_step(0)
    state = reader.prepare(rows.shape[-1], rows.device)
    buffer = DeviceBuffer(
        state,
        rows.dtype,
        step=torch.zeros((), dtype=torch.int64),
        threshold=100,
        first_threshold=100,
        most_rows=200,
        sampled=0,
        carry=0,
        state_step=0,
    )
    reader.on_device.buffer = buffer
    with mock.patch("fastcov.kernels.launch.Launch.start", return_value=None) as start:
        reader.read(rows, ActivationLayout(rows))
    (call,) = start.call_args_list
    to, launched, *_ = call.args
    assert to is buffer._buffer
    assert to.dtype is rows.dtype
    assert (launched.data_ptr(), launched.dtype) == (rows.data_ptr(), rows.dtype)
