"""Which images make up which step: a pure function of the seed, so a run can start at any step."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastcov_detection.data.augment import Augmentation
from fastcov_detection.data.dataset import CocoDataset, Target

_MASK_63 = (1 << 63) - 1


class Draw(NamedTuple):
    """One image of one epoch, with the seed of its random changes."""

    image: int
    seed: int


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers (splitmix64), the same on every machine."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK_63


def aspect_buckets(aspect_ratios: Sequence[float]) -> list[int]:
    """Buckets of shapes, a third of an octave apart at most; one shape in a batch saves padding."""
    return [max(-4, min(4, round(3 * math.log2(ratio)))) for ratio in aspect_ratios]


class BatchPlan(Sampler[list[Draw]]):
    """Batches of images of similar shape, in the same order whenever and wherever it is asked.

    Every epoch shuffles all images; an image waits until its bucket of aspect ratios has a whole
    batch, across epochs where need be, so none is dropped.

    Args:
        aspect_ratios: Width by height of every image.
        batch_size: Images of one step over all ranks.
        seed: Of the run.
        steps: Where the plan ends.
        first_step: Where it starts; earlier batches are skipped.
        rank: This process; it gets every ``world_size``-th image of a batch.
        world_size: Number of processes.

    Raises:
        ValueError: If the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float],
        batch_size: int,
        *,
        seed: int,
        steps: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}, the images of a step over all processes; "
                f"choose a multiple of {world_size}"
            )
        self.buckets = aspect_buckets(aspect_ratios)
        self.batch_size, self.seed = batch_size, seed
        self.steps, self.first_step = steps, first_step
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[Draw]]:
        waiting: dict[int, list[Draw]] = defaultdict(list)
        step, epoch = 0, 0
        while step < self.steps:
            for index in self._order(epoch):
                bucket = waiting[self.buckets[index]]
                bucket.append(Draw(index, mix_seed(self.seed, 1, epoch, index)))
                if len(bucket) < self.batch_size:
                    continue
                if step >= self.first_step:
                    yield bucket[self.rank :: self.world_size]
                bucket.clear()
                step += 1
                if step == self.steps:
                    return
            epoch += 1

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 0, epoch))
        order: list[int] = torch.randperm(len(self.buckets), generator=generator).tolist()
        return order


class AugmentedView(Dataset[tuple[Tensor, Target]]):
    """A data set whose random changes depend on the draw alone, whatever process makes them.

    Args:
        dataset: Images and targets by index.
        augmentation: The random changes.
        cache: Keep decoded images in memory.
    """

    def __init__(
        self, dataset: CocoDataset, augmentation: Augmentation, *, cache: bool = False
    ) -> None:
        self.dataset, self.augmentation = dataset, augmentation
        self._kept: dict[int, NDArray[np.uint8]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Target]:
        draws = torch.Generator().manual_seed(draw.seed)
        return self.dataset.read(draw.image, self.augmentation, draws, self._pixels(draw.image))

    def _pixels(self, index: int) -> NDArray[np.uint8] | None:
        if self._kept is None:
            return None
        if index not in self._kept:
            self._kept[index] = self.dataset.decode(index)
        return self._kept[index]


def to_float(image: Tensor) -> Tensor:
    """An image with values in [0, 1]; eight-bit pixels, as loaders ship them, are scaled."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def to_device(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A target with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in target.items()
    }
