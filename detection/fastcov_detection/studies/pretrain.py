"""Pretraining of a backbone: a classifier of a detection data set's objects.

The resulting weights have torchvision's names for a ResNet, the classifier included, and a detector
starts from them with ``--init``: the pretrained side of the comparison with training from scratch
(Shinya, Simo-Serra and Suzuki, arXiv 1909.04021), with no download.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.transforms.v2 import functional

from fastcov_detection.config import TrainConfig, save_config, to_dict
from fastcov_detection.data.dataset import (
    BatchPlan,
    CocoDataset,
    Draw,
    load_data,
    mix_seed,
    with_short_errors,
)
from fastcov_detection.detector.build import check_widths, parse_name, save_widths, settle_norm
from fastcov_detection.detector.modules import build_resnet, norm_layer
from fastcov_detection.detector.weights import initialise_backbone
from fastcov_detection.distributed import pick_device
from fastcov_detection.errors import CheckpointError, ConfigError, DataError
from fastcov_detection.progress import progress_bar
from fastcov_detection.train.folder import LAST, open_folder, write_result
from fastcov_detection.train.loop import Loop, run_settings, watch

RESULT = "pretrain.json"
# Mean and deviation with which torchvision's detectors normalise images.
_MEAN, _STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]


@dataclass(frozen=True)
class PretrainConfig:
    """Settings of a pretraining: a detector's run, whose backbone and data are used, and crops."""

    train: TrainConfig = field(default_factory=TrainConfig)
    objects: int = 64
    """Crops of one step."""
    crop: int = 64
    """Edge of a crop, in pixels."""
    context: tuple[float, float] = (1.0, 2.0)
    """Smallest and largest edge of a crop by the longer edge of its object's box."""


@dataclass(frozen=True)
class PretrainResult:
    """Result of a pretraining."""

    accuracy: float
    """Share of the validation objects that get their class, in 0-1."""
    loss: float
    """Mean cross-entropy of the validation objects, in nats."""
    train_objects: int
    val_objects: int
    steps: int
    seed: int
    train_s: float
    cpu_s: float
    run_dir: str


class ObjectCrops(Dataset[tuple[Tensor, int]]):
    """Square crops around the objects of a data set, each with its class.

    A crop reaches past its object by a factor drawn from ``context``, and the object lies anywhere
    inside; the factor and the place follow from the draw's seed alone. Crowds are left out. Pixels
    outside the image are black.

    Args:
        dataset: Images with boxes.
        edge: Edge of a crop, in pixels; the network sees every object at a similar size.
        context: Smallest and largest edge of a crop by the longer edge of its object's box.
        hflip: Chance of a mirrored crop.
        varies: False for validation: the object in the middle, at the mean of ``context``, not
            mirrored, whatever the draw.

    Raises:
        ConfigError: If an edge or a factor is impossible.
        DataError: If there is no object.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        edge: int,
        context: tuple[float, float],
        *,
        hflip: float = 0.0,
        varies: bool = True,
    ) -> None:
        low, high = context
        if edge < 32 or not 1 <= low <= high:
            raise ConfigError(
                f"crops of {edge} pixels, {low} to {high} times their object; a ResNet needs "
                "at least 32 pixels, and a crop no less than its object"
            )
        self.dataset, self.edge, self.context = dataset, edge, context
        self.hflip, self.varies = hflip, varies
        counts = dataset.records.counts().tolist()
        self.places = [(index, number) for index, n in enumerate(counts) for number in range(n)]
        if not self.places:
            raise DataError(f"{dataset.file.path} has no object that is not a crowd")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, int]:
        """Normalised pixels [3, edge, edge] and the class, counted from 0."""
        index, seed = (draw, 0) if isinstance(draw, int) else (draw.image, draw.seed)
        image, number = self.places[index]
        pixels, target = self.dataset.read(image)
        chance = torch.full((4,), 0.5)
        if self.varies:
            chance = torch.rand(4, generator=torch.Generator().manual_seed(seed))
        factor, right, down, mirrored = chance.tolist()
        left, top, x_max, y_max = target["boxes"][number].tolist()
        width, height = x_max - left, y_max - top
        low, high = self.context
        side = max(1, round(max(width, height) * (low + (high - low) * factor)))
        top, left = round(top - (side - height) * down), round(left - (side - width) * right)
        edges = [self.edge, self.edge]
        crop = functional.resized_crop(pixels, top, left, side, side, edges, antialias=True)
        if self.varies and mirrored < self.hflip:
            crop = functional.horizontal_flip(crop)
        normalised = functional.normalize(crop.float() / 255, _MEAN, _STD)
        return normalised, int(target["labels"][number]) - 1


def build_classifier(config: TrainConfig, widths: Mapping[str, int], classes: int) -> nn.Module:
    """A detector's ResNet with a pool and a linear layer behind it, named as torchvision's.

    Args:
        config: ``model`` is the detector.
        widths: Widths of all width groups of the detector.
        classes: Without background.

    Raises:
        ConfigError: If the norm cannot be trained.
    """
    model = settle_norm(replace(config.model, init="random"))
    if model.norm == "frozen":
        raise ConfigError("model.norm is 'frozen', which cannot be trained; use batch")
    _, depth = parse_name(model.name)
    norm = norm_layer(model.norm, model.norm_groups)
    body = build_resnet(depth, widths, norm, model.zero_init_last_norm)
    initialise_backbone(body, config.model, depth)
    layers: OrderedDict[str, nn.Module] = OrderedDict(body.named_children())
    layers["avgpool"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten(1)
    layers["fc"] = nn.Linear(widths["layer4"], classes)
    return nn.Sequential(layers)


def pretrain(
    config: PretrainConfig,
    widths: Mapping[str, int] | None = None,
    *,
    run_dir: str | os.PathLike[str],
    seed: int = 0,
    resume: bool = True,
    progress: bool = True,
) -> PretrainResult:
    """Training of a backbone to tell the objects of the training images apart.

    Validation objects serve the accuracy alone. At the end the folder has ``model.pt`` (a ResNet's
    plain state_dict, for ``--init``), ``pretrain.json``, and in ``spectra`` a snapshot of every
    watched layer each ``snapshot_every`` steps.

    Args:
        config: The run; the detector's own parts and its batch are not used.
        widths: Channels by width group; None: the configuration's.
        run_dir: Folder of the run.
        seed: Seed of everything random.
        resume: Go on from an earlier process's checkpoint; a finished run is returned at once.
            False: start over.
        progress: Show bars.

    Raises:
        ConfigError: If a setting is impossible.
        DataError: If the data cannot be used.
        CheckpointError: If the folder holds a run with other settings.
        LossError: If the loss is not finite.
    """
    folder = Path(run_dir)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("pretrain runs in one process; start it without torchrun")
    if config.objects < 1:
        raise ConfigError(f"objects is {config.objects}; a step needs at least 1 crop")
    if config.objects % config.train.accumulate:
        raise ConfigError(
            f"objects is {config.objects}, not a multiple of accumulate, {config.train.accumulate}"
        )
    complete = check_widths(config.train.model, widths)
    device = pick_device(config.train.device)
    with run_settings(config.train, device):
        data = load_data(config.train.data, progress=progress)
        crops = tuple(
            ObjectCrops(
                dataset,
                config.crop,
                config.context,
                hflip=config.train.data.hflip,
                varies=dataset is data.train,
            )
            for dataset in (data.train, data.val)
        )
        torch.manual_seed(mix_seed(seed, 2))
        model = build_classifier(config.train, complete, len(data.class_names))
        settings = {key: v for key, v in to_dict(config).items() if key != "train"}
        identity = {
            "seed": seed,
            "config": to_dict(config.train),
            "widths": complete,
            "pretrain": settings,
            "data": data.content,
        }
        if (folder / "classes.json").exists():
            raise CheckpointError(f"{folder} holds a detector's training; choose another folder")
        finished = open_folder(folder, identity, PretrainResult, resume=resume, name=RESULT)
        if finished is not None:
            return finished
        save_config(config, folder / "config.json")
        save_widths(complete, folder / "widths.json")
        return _Pretraining(config, model, crops, folder, identity, device, progress).run()


class _Pretraining:
    """A run at work."""

    def __init__(
        self,
        config: PretrainConfig,
        model: nn.Module,
        crops: tuple[ObjectCrops, ...],
        folder: Path,
        identity: dict[str, Any],
        device: torch.device,
        progress: bool,
    ) -> None:
        self.config, self.crops, self.identity = config, crops, identity
        self.loop = Loop(
            config.train,
            model,
            folder,
            identity,
            device,
            self._losses,
            track=lambda: watch(model, config.train, folder),
            progress=progress,
        )

    def run(self) -> PretrainResult:
        """Training of the steps that are left, then the accuracy and the result."""
        loop, workers = self.loop, self.config.train.data.workers
        plan = BatchPlan(
            [1.0] * len(self.crops[0]),
            self.config.objects,
            seed=loop.seed,
            steps=self.config.train.steps,
            first_step=loop.step,
        )
        loader = DataLoader(
            self.crops[0],
            batch_sampler=plan,
            num_workers=workers,
            collate_fn=list,
            pin_memory=loop.device.type == "cuda",
        )
        try:
            loop.run(f"pretraining {loop.folder.name}", loader, self.config.objects)
            scores = self._evaluate()
            loop.logbook.write("eval", loop.step, scores)
        finally:
            loop.close()
        result = PretrainResult(
            accuracy=scores["accuracy"],
            loss=scores["loss"],
            train_objects=len(self.crops[0]),
            val_objects=len(self.crops[1]),
            steps=loop.step,
            seed=loop.seed,
            train_s=loop.train_s,
            cpu_s=loop.cpu_s,
            run_dir=str(loop.folder),
        )
        loop.write_weights(LAST)
        write_result(loop.folder, result, self.identity, RESULT)
        return result

    def _losses(self, model: nn.Module, part: list[Any]) -> dict[str, torch.Tensor]:
        pixels, classes = default_collate(part)
        return {"loss": self._loss(self._logits(model, pixels), classes)}

    def _logits(self, model: nn.Module, pixels: torch.Tensor) -> torch.Tensor:
        loop = self.loop
        pixels = pixels.to(loop.device, non_blocking=True, memory_format=loop.memory_format)
        with loop.autocast():
            logits: torch.Tensor = model(pixels)
        return logits.float()

    def _loss(self, logits: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        with torch.autocast(self.loop.device.type, enabled=False):
            return nn.functional.cross_entropy(logits, classes.to(self.loop.device))

    @torch.no_grad()
    def _evaluate(self) -> dict[str, float]:
        """Accuracy and loss on the validation objects."""
        model = self.loop.result_model().eval()
        crops = self.crops[1]
        workers = self.config.train.data.workers
        loader = DataLoader(crops, self.config.objects, num_workers=workers)
        right, loss = 0, 0.0
        with progress_bar("evaluating", len(crops), enabled=self.loop.progress) as advance:
            for pixels, classes in with_short_errors(loader):
                logits = self._logits(model, pixels)
                right += int((logits.argmax(dim=1).cpu() == classes).sum())
                loss += float(self._loss(logits, classes)) * len(classes)
                advance(len(classes))
        return {"accuracy": right / len(crops), "loss": loss / len(crops)}
