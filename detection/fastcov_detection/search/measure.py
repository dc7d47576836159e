r"""The measuring pass: spectra of a network that stands still, from which widths are set.

:func:`measure_spectra` reads what feature maps hold, :func:`measure_gradient_spectra` what of that
the loss feels. Taking direction :math:`u` out of a map whose rows are :math:`f` changes the loss,
to first order, by :math:`\sum_{xy} (g \cdot u)(f \cdot u)`, :math:`g` being the loss's gradient
with respect to the row. Where positions and gradients are independent, its mean square is
:math:`(u^T G u)(u^T S u)` with

.. math:: S = \overline{f f^T} \text{ (mean over images and positions)}, \qquad
    G = \overline{\textstyle\sum_{xy} g g^T} \text{ (mean over images)}

The spectrum of :math:`S^{1/2} G S^{1/2}` therefore has one unit in the whole network, that of the
loss squared. A norm behind a layer scales S to 1 whether or not anything reads the map; G falls by
as much as the reader's weights do.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import fastcov
from fastcov_detection.data.batches import mix_seed, to_device, to_float
from fastcov_detection.detector.backbone import NORMS
from fastcov_detection.detector.groups import width_groups
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
        Spectra by member of :func:`fastcov_detection.detector.groups.width_groups`.
    """
    members = _members(model, vary)
    tracker = _tracker(model, members)
    with tracker, _measuring(model), torch.no_grad():
        for image, target in _passes(model, dataset, images, seed, progress):
            model([image], [target])
        spectra = tracker.spectra()
        return {member: spectra[member] for member in members}


def measure_gradient_spectra(
    model: GeneralizedRCNN,
    dataset: Images,
    images: int = 512,
    seed: int = 0,
    *,
    vary: Sequence[str] = ("backbone",),
    progress: bool = False,
) -> dict[str, fastcov.Spectrum]:
    """Spectra of how much the loss feels each direction of the feature maps; see the module's page.

    Images, modes and arguments are those of :func:`measure_spectra`; the loss is the sum of the
    detector's losses. No parameter's gradient is touched.

    Returns:
        Spectra by member, in the unit of the loss squared, for the rule ``"gradient"``.
    """
    members = _members(model, vary)
    tracker = _tracker(model, members)
    gradients: dict[str, Tensor] = {}
    with tracker, _measuring(model), _reading_gradients(model, members, gradients):
        for image, target in _passes(model, dataset, images, seed, progress):
            # Through the image, every feature map has a gradient, frozen layers or not.
            image.requires_grad_(True)
            loss = torch.stack(list(model([image], [target]).values())).sum()
            torch.autograd.grad(loss, image)
        return {
            member: weighted_spectrum(
                tracker.covariance(member),
                gradients[member] / min(images, len(dataset)),
                tracker.count(member),
                member,
            )
            for member in members
        }


def weighted_spectrum(
    covariance: Tensor, weight: Tensor, count: int, name: str = ""
) -> fastcov.Spectrum:
    """Spectrum of S^(1/2) G S^(1/2) for two positive semidefinite matrices.

    Args:
        covariance: S. [C, C]
        weight: G. [C, C]
        count: Rows that S was made of.
        name: Of the feature map.
    """
    values, vectors = torch.linalg.eigh(covariance.double().cpu())
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    product = root @ weight.double().cpu() @ root
    # Rounding may leave zeros a little below zero.
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).flip(0).clamp_min(0)
    return fastcov.Spectrum(eigenvalues, count, float(eigenvalues.sum()), name)


def _members(model: GeneralizedRCNN, vary: Sequence[str]) -> list[str]:
    return [member for group in width_groups(model, vary=vary) for member in group.members]


def _tracker(model: GeneralizedRCNN, members: Sequence[str]) -> fastcov.Tracker:
    return fastcov.track(
        model,
        include=[_layer(member) for member in members],
        where="input",
        rows="all",
        weighting="image",
        train_only=False,
    )


def _layer(member: str) -> str:
    return member.removesuffix(":in")


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
def _reading_gradients(
    model: GeneralizedRCNN, members: Sequence[str], sums: dict[str, Tensor]
) -> Iterator[None]:
    """Adds g g^T of every row of every map's gradient to the map's sum, in float64."""

    def watch(member: str) -> Any:
        def add(gradient: Tensor) -> None:
            # Channels are the second axis of maps and the last of vectors: for both, axis 1.
            rows = gradient.detach().transpose(0, 1).flatten(1).double()
            product = rows @ rows.T
            sums[member] = sums[member] + product if member in sums else product

        def hook(_: Any, inputs: tuple[Tensor, ...]) -> None:
            inputs[0].register_hook(add)

        return hook

    handles = [
        model.get_submodule(_layer(member)).register_forward_pre_hook(watch(member))
        for member in members
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


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
