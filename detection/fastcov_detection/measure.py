"""The measuring pass: spectra of a network that stands still, from which widths are set."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import fastcov
from fastcov_detection.backbone import NORMS
from fastcov_detection.batches import mix_seed
from fastcov_detection.groups import width_groups
from fastcov_detection.progress import progress_bar


class Images(Protocol):
    """Images and targets by index."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, dict[str, Any]]: ...


def measure_spectra(
    model: GeneralizedRCNN,
    dataset: Images,
    images: int = 512,
    seed: int = 0,
    *,
    vary: Sequence[str] = ("backbone",),
    progress: bool = False,
) -> dict[str, fastcov.Spectrum]:
    """Spectra of every feature map that a width group stands for.

    The detector is in train(), so that heads see the regions they learn from, every norm in eval().
    Images come one by one, unvaried and without padding, and every position of every feature map is
    read, each image weighing the same. The model is as before afterwards.

    Args:
        model: Trained or not.
        dataset: Training images without augmentation: (image, target) by index.
        images: How many are read, drawn by ``seed``; all where there are fewer.
        seed: Of the choice of images and of the sampling of regions.
        vary: Parts to measure: ``backbone``, ``fpn``, ``heads``.
        progress: Show a bar.

    Returns:
        Spectra by member of :func:`fastcov_detection.groups.width_groups`.
    """
    if images < 1:
        raise ValueError(f"images is {images}; at least one must be read")
    members = [member for group in width_groups(model, vary=vary) for member in group.members]
    device = next(model.parameters()).device
    total = len(dataset)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(mix_seed(seed, 4)))
    chosen = order[:images].tolist()
    tracker = fastcov.track(
        model,
        include=[member.removesuffix(":in") for member in members],
        where="input",
        rows="all",
        weighting="image",
        train_only=False,
    )
    forked = [device] if device.type == "cuda" else []
    with tracker, _measuring(model), torch.no_grad(), torch.random.fork_rng(devices=forked):
        with progress_bar("measuring spectra", len(chosen), enabled=progress) as advance:
            for number, index in enumerate(chosen):
                torch.manual_seed(mix_seed(seed, 5, number))
                image, target = dataset[index]
                model([image.to(device)], [to_device(target, device)])
                advance(1)
        spectra = tracker.spectra()
        return {member: spectra[member] for member in members}


def to_device(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A target with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in target.items()
    }


@contextmanager
def _measuring(model: GeneralizedRCNN) -> Iterator[None]:
    """Detector in train(), norms in eval(), images at the size of evaluation."""
    modes = {module: module.training for module in model.modules()}
    sizes = model.transform.min_size
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()
    model.transform.min_size = sizes[-1:]
    try:
        yield
    finally:
        model.transform.min_size = sizes
        for module, is_training in modes.items():
            module.training = is_training
