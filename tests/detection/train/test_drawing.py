"""Pictures of detections: what is right, wrong and missed can be told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastcov_detection.data.dataset import CocoDataset
from fastcov_detection.train.drawing import (
    MISSED,
    RIGHT,
    WRONG,
    are_right,
    draw_pictures,
    in_grid,
)


class _Truth(nn.Module):
    """Finds every object, with a score and a class that may be wrong."""

    def __init__(self, dataset: CocoDataset, score: float = 0.9, shift: int = 0) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.dataset, self.score, self.shift = dataset, score, shift

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        targets = [self.dataset.read(index)[1] for index in range(len(self.dataset))]
        found = []
        for image in images:
            (target,) = (
                target
                for index, target in enumerate(targets)
                if torch.equal(self.dataset.read(index)[0].float() / 255, image)
            )
            labels = (target["labels"] - 1 + self.shift) % len(self.dataset.class_names) + 1
            scores = torch.full((len(labels),), self.score)
            found.append({"boxes": target["boxes"], "labels": labels, "scores": scores})
        return found


@pytest.fixture
def val(tiny_root: Path) -> CocoDataset:
    return CocoDataset(tiny_root / "val2017", tiny_root / "annotations" / "instances_val2017.json")


@pytest.mark.parametrize(
    ("score", "shift", "expected"),
    [(0.9, 0, {RIGHT}), (0.9, 1, {WRONG, MISSED}), (0.4, 0, {MISSED})],
)
def test_each_kind_has_its_colour(
    val: CocoDataset, score: float, shift: int, expected: set[tuple[int, int, int]]
) -> None:
    picture = in_grid(draw_pictures(_Truth(val, score, shift), val, count=2), 2)
    shown = {c for c in (RIGHT, WRONG, MISSED) if (picture == c).all(axis=2).sum() > 100}
    assert shown == expected
    assert picture.shape == (344, 688, 3)


def test_pictures_have_the_width_of_a_page(val: CocoDataset) -> None:
    for picture in draw_pictures(_Truth(val), val, count=3):
        assert max(picture.shape) == 340


def test_the_best_score_takes_the_object() -> None:
    truth = {"boxes": torch.tensor([[0.0, 0, 10, 10]]), "labels": torch.tensor([2])}
    boxes = torch.tensor([[0.0, 0, 10, 9], [0.0, 0, 10, 10], [0.0, 0, 10, 10], [0.0, 0, 4, 4]])
    found = {
        "boxes": boxes,
        "labels": torch.tensor([2, 2, 1, 2]),
        "scores": torch.tensor([0.9, 0.8, 0.99, 0.7]),
    }
    assert are_right(found, truth) == ([True, False, False, False], [True])
    nothing = {name: tensor[:0] for name, tensor in found.items()}
    assert are_right(nothing, truth) == ([], [False])
