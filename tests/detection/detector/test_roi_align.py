"""RoIAlign by rows against torchvision's kernel."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torchvision.ops import MultiScaleRoIAlign

from fastcov_detection.detector.modules import RowRoIAlign

NAMES = ["0", "1", "2", "3"]


def _features(edge: int, channels: int = 5, images: int = 3) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(
            images, channels, edge // 4 // 2**level, edge // 4 // 2**level, generator=draw
        )
        .contiguous(memory_format=torch.channels_last)
        .requires_grad_()
        for level, name in enumerate(NAMES)
    }


def _boxes(edge: int) -> list[Tensor]:
    """Regions of all sizes, one that is the whole image, some without area, an image with none."""
    draw = torch.Generator().manual_seed(1)
    boxes = []
    for count in (40, 0, 13):
        centre, extent = torch.rand(2, count, 2, generator=draw)
        corners = torch.cat([centre - extent / 2, centre + extent / 2], 1) * edge
        boxes.append(corners.clamp(0, edge))
    boxes[0][0] = torch.tensor([0.0, 0.0, edge, edge])
    boxes[0][1] = torch.tensor([edge - 0.5, edge - 0.5, edge, edge])
    boxes[2][0, 2:] = boxes[2][0, :2]
    return boxes


@pytest.mark.parametrize("edge", [64, 96])
@pytest.mark.parametrize("samples", [1, 2, 3])
@pytest.mark.parametrize("scale", [12, 64])
def test_values_and_gradients_are_torchvisions(edge: int, samples: int, scale: int) -> None:
    features, boxes = _features(edge), _boxes(edge)
    shapes = [(edge, edge)] * len(boxes)
    pooled = [
        kind(NAMES, 7, samples, canonical_scale=scale)(features, boxes, shapes)
        for kind in (MultiScaleRoIAlign, RowRoIAlign)
    ]
    assert pooled[0].shape == pooled[1].shape == (53, 5, 7, 7)
    torch.testing.assert_close(pooled[1], pooled[0], rtol=1e-4, atol=2e-5)
    weight = torch.randn(pooled[0].shape, generator=torch.Generator().manual_seed(2))
    expected, found = (
        torch.autograd.grad((one * weight).sum(), list(features.values())) for one in pooled
    )
    for first, second in zip(expected, found, strict=True):
        torch.testing.assert_close(second, first, rtol=1e-4, atol=1e-4)


def test_no_region_at_all_is_an_empty_batch() -> None:
    features = _features(64)
    pooled = RowRoIAlign(NAMES, 7, 1)(features, [torch.zeros(0, 4)] * 3, [(64, 64)] * 3)
    assert pooled.shape == (0, 5, 7, 7)
    gradients = torch.autograd.grad(pooled.sum(), list(features.values()))
    assert all(not gradient.any() for gradient in gradients)


def test_adaptive_sampling_is_refused() -> None:
    with pytest.raises(ValueError, match="roi_sampling_ratio is 0"):
        RowRoIAlign(NAMES, 7, 0)
