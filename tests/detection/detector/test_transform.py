"""The short way of preparing images is torchvision's own, bit for bit."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from fastcov_detection.detector.modules import BatchTransform

SETTINGS = (64, 96, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


@pytest.mark.parametrize(
    "shapes",
    [
        [(64, 64)] * 3,  # ready as they are
        [(64, 96)] * 2,
        [(64, 80)] * 2,  # needs padding
        [(64, 64), (64, 96)],  # of two shapes
        [(32, 32)] * 2,  # needs resizing
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_batches_are_torchvisions(shapes: Sequence[tuple[int, int]], training: bool) -> None:
    draw = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *shape, generator=draw) for shape in shapes]
    targets = [{"boxes": torch.tensor([[1.0, 2.0, 20.0, 30.0]])} for _ in shapes]
    kinds = (GeneralizedRCNNTransform, BatchTransform)
    transforms = [kind(*SETTINGS).train(training) for kind in kinds]
    (stock, stock_targets), (ours, our_targets) = (t(images, targets) for t in transforms)
    assert torch.equal(stock.tensors, ours.tensors)
    assert [tuple(size) for size in stock.image_sizes] == [tuple(size) for size in ours.image_sizes]
    for first, second, given in zip(stock_targets, our_targets, targets, strict=True):
        assert torch.equal(first["boxes"], second["boxes"])
        assert second is not given
