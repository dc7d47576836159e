"""The table of layouts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fastcov.rows.layout import run_length
from fastcov.rows.view import Layout, row_view
from fastcov.watch.layers import kind_of

CASES = [
    (nn.Conv1d(3, 8, 1), (2, 8, 5), (2, 5, 8)),
    (nn.Conv2d(3, 8, 1), (2, 8, 5, 7), (2, 5, 7, 8)),
    (nn.Conv2d(3, 8, 1), (8, 5, 7), (1, 5, 7, 8)),
    (nn.Conv3d(3, 8, 1), (2, 8, 3, 5, 7), (2, 3, 5, 7, 8)),
    (nn.ConvTranspose2d(3, 8, 1), (2, 8, 5, 7), (2, 5, 7, 8)),
    (nn.BatchNorm1d(8), (2, 8), (2, 8)),
    (nn.BatchNorm2d(8), (2, 8, 5, 7), (2, 5, 7, 8)),
    (nn.GroupNorm(2, 8), (2, 8, 5), (2, 5, 8)),
    (nn.Linear(3, 8), (2, 8), (2, 8)),
    (nn.Linear(3, 8), (8,), (1, 8)),
    (nn.Linear(3, 8), (2, 5, 7, 8), (2, 5, 7, 8)),
    (nn.Linear(3, 8), (2, 3, 4, 5, 6, 8), (2, 12, 5, 6, 8)),
    (nn.LayerNorm(8), (2, 5, 8), (2, 5, 8)),
    (nn.Embedding(9, 8), (2, 5, 8), (2, 5, 8)),
    (nn.MultiheadAttention(8, 2), (5, 2, 8), (2, 5, 8)),
    (nn.MultiheadAttention(8, 2), (5, 8), (1, 5, 8)),
    (nn.MultiheadAttention(8, 2, batch_first=True), (2, 5, 8), (2, 5, 8)),
    (nn.LSTM(3, 8), (5, 2, 8), (2, 5, 8)),
    (nn.ReLU(), (2, 8, 5, 7), (2, 5, 7, 8)),
    (nn.ReLU(), (2, 5, 8), (2, 5, 8)),
]


@pytest.mark.parametrize(("module", "shape", "expected"), CASES, ids=str)
def test_images_first_channels_last(
    module: nn.Module, shape: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    activation = torch.randn(shape)
    kind = kind_of(module)
    view = row_view(activation, kind.layout(module), kind.batched_rank(module))
    assert view.shape == expected
    assert view.untyped_storage().data_ptr() == activation.untyped_storage().data_ptr()


def test_channels_first_rows_hold_one_position() -> None:
    images = torch.randn(2, 8, 5, 7)
    view = row_view(images, Layout.CHANNELS_FIRST)
    assert torch.equal(view[1, 2, 3], images[1, :, 2, 3])


def test_runs_cover_32_bytes_where_channels_are_apart() -> None:
    images = torch.randn(2, 8, 5, 7)
    assert run_length(images.permute(0, 2, 3, 1)) == 8
    assert run_length(images.half().permute(0, 2, 3, 1)) == 16
    assert run_length(images[..., :1, :3].permute(0, 2, 3, 1)) == 3
    channels_last = images.to(memory_format=torch.channels_last)
    assert run_length(channels_last.permute(0, 2, 3, 1)) == 1
    assert run_length(torch.randn(2, 5, 8)) == 1
