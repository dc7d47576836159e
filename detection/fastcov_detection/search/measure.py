r"""Measurements of a network that stands still: spectra, from which widths follow, and latency.

Rules read the spectrum of the feature maps, or that of the directions which the loss feels. Taking
direction :math:`u` out of a map whose rows are :math:`f` changes the loss, to first order, by
:math:`\sum_{xy} (g \cdot u)(f \cdot u)`, :math:`g` being the loss's gradient with respect to the
row. Where positions and gradients are independent, its mean square is
:math:`(u^T G u)(u^T S u)` with

.. math:: S = \overline{f f^T} \text{ (mean over images and positions)}, \qquad
    G = \overline{\textstyle\sum_{xy} g g^T} \text{ (mean over images)}

The spectrum of :math:`S^{1/2} G S^{1/2}` therefore has one unit in the whole network, that of the
loss squared. A norm behind a layer scales S to 1 whether or not anything reads the map; G falls by
as much as the reader's weights do.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import fastcov
from fastcov_detection.data.dataset import mix_seed, to_device, to_float
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.detector.modules import NORMS
from fastcov_detection.progress import progress_bar

_WARM_UP = 3


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
    reads: Literal["features", "sensitivity"] = "features",
    progress: bool = False,
) -> dict[str, fastcov.Spectrum]:
    """Spectra of every feature map that a width group stands for.

    The detector is in train(), so that heads see the regions they learn from, every norm in eval().
    Images come one by one, unvaried and without padding, and every position of every feature map is
    read, each image weighing the same. The model is as before afterwards.

    Args:
        model: Trained or not.
        dataset: Training images without augmentation: (image, target) by index.
        images: Number of images to read, drawn by ``seed``; all where there are fewer.
        seed: Seed of the choice of images and of the sampling of regions.
        vary: Parts to measure: ``backbone``, ``fpn``, ``heads``.
        reads: ``sensitivity``: spectra of :math:`S^{1/2} G S^{1/2}`, in the unit of the loss
            squared; the loss is the sum of the detector's losses. No parameter gets a gradient.
        progress: Show a bar.

    Returns:
        Spectra by member of :func:`fastcov_detection.detector.groups.width_groups`.
    """
    members = [member for group in width_groups(model, vary=vary) for member in group.members]
    feels = reads == "sensitivity"
    tracker = fastcov.track(
        model,
        include=[member.removesuffix(":in") for member in members],
        where="input",
        of="both" if feels else "activation",
        rows="all",
        weighting="image",
        train_only=False,
    )
    with tracker, _measuring(model), torch.set_grad_enabled(feels):
        for image, target in _passes(model, dataset, images, seed, progress):
            # Through the image, every feature map has a gradient, frozen layers or not.
            losses = model([image.requires_grad_(feels)], [target])
            if feels:
                torch.autograd.grad(torch.stack(list(losses.values())).sum(), image)
        if not feels:
            spectra = tracker.spectra()
            return {member: spectra[member] for member in members}
        count = min(images, len(dataset))
        return {member: _summed_over_positions(tracker, member, count) for member in members}


def _summed_over_positions(tracker: fastcov.Tracker, member: str, images: int) -> fastcov.Spectrum:
    """Sensitivity with the sum over positions in place of the tracker's mean over them."""
    found = tracker.sensitivity(member)
    positions = tracker.count(member) / images
    values = found.eigenvalues * positions
    return fastcov.Spectrum(values, found.count, found.total * positions, member)


def _passes(
    model: GeneralizedRCNN, dataset: Images, images: int, seed: int, progress: bool
) -> Iterator[tuple[Tensor, dict[str, Any]]]:
    """Images one by one, drawn by the seed, which also seeds the sampling of each one's regions."""
    if images < 1:
        raise ValueError(f"images is {images}; at least one must be read")
    device = next(model.parameters()).device
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(mix_seed(seed, 4)))
    chosen = order[:images].tolist()
    with progress_bar("measuring spectra", len(chosen), enabled=progress) as advance:
        for number, index in enumerate(chosen):
            torch.manual_seed(mix_seed(seed, 5, number))
            image, target = dataset[index]
            yield to_float(image.to(device)), to_device(target, device)
            advance(1)


@contextmanager
def _measuring(model: GeneralizedRCNN) -> Iterator[None]:
    """Detector in train(), norms in eval(), images at the size of evaluation, random state kept."""
    device = next(model.parameters()).device
    modes = {module: module.training for module in model.modules()}
    sizes = model.transform.min_size
    model.train()
    for module in model.modules():
        if isinstance(module, NORMS):
            module.eval()
    model.transform.min_size = sizes[-1:]
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        model.transform.min_size = sizes
        for module, is_training in modes.items():
            module.training = is_training


def measure_latency(
    models: Mapping[str, GeneralizedRCNN],
    image: Tensor,
    runs: int = 20,
    device: str | torch.device = "cpu",
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Median milliseconds of a forward pass in eval mode, for the same image.

    The models take turns, so that whatever slows the machine down for a while slows all of them.

    Args:
        models: Detectors by name; moved to the device and back to the CPU.
        image: Values in [0, 1], or pixels in eight bits. [3, H, W]
        runs: Timed passes of each model, after three that are not.
        device: Where the passes run.
        progress: Show a bar.

    Raises:
        ValueError: If ``runs`` is below 1.
    """
    if runs < 1:
        raise ValueError(f"latency_runs is {runs}; at least one pass must be timed")
    place = torch.device(device)
    finish = torch.cuda.synchronize if place.type == "cuda" else nullcontext
    seconds: dict[str, list[float]] = {name: [] for name in models}
    images = [to_float(image.to(place))]
    for model in models.values():
        model.to(place).eval()
    bar = progress_bar("measuring latency", _WARM_UP + runs, enabled=progress)
    with torch.inference_mode(), bar as advance:
        for turn in range(_WARM_UP + runs):
            for name, model in models.items():
                finish()
                start = time.perf_counter()
                model(images)
                finish()
                if turn >= _WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
            advance(1)
    for model in models.values():
        model.to("cpu")
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
