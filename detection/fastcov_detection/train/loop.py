"""Training of a detector: from a configuration to a trained detector in a folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import fastcov
from fastcov_detection.config import ModelConfig, TrainConfig, save_config, to_dict
from fastcov_detection.data.augment import training_transform
from fastcov_detection.data.dataset import (
    AugmentedView,
    BatchPlan,
    LoadedData,
    Target,
    load_on_ranks,
    mix_seed,
    to_device,
    to_float,
)
from fastcov_detection.detector.build import build_model, count_cost, parse_name, save_widths
from fastcov_detection.detector.weights import load_start
from fastcov_detection.distributed import barrier, pick_device, process_group, rank, world_size
from fastcov_detection.files import write_text
from fastcov_detection.train.drawing import draw_pictures, in_grid
from fastcov_detection.train.evaluate import Evaluation, evaluate, tell_limits, write_predictions
from fastcov_detection.train.folder import BEST, LAST, RunResult, open_folder, write_result
from fastcov_detection.train.steps import (
    Loop,
    check_parts,
    evaluation_steps,
    tell_recipe,
)

_DRAWN_IMAGES = 4


def train(
    config: TrainConfig,
    widths: Mapping[str, int] | None = None,
    *,
    run_dir: str | os.PathLike[str],
    seed: int = 0,
    start: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> RunResult:
    """Trains a detector to its end and evaluates it.

    What the folder gets stands in the package's README. Order of images, their random changes and
    the sampling of regions follow from the seed, the step and the rank alone, so a run that was
    killed goes on to the same losses.

    Args:
        config: The run.
        widths: Channels by width group; None: the configuration's.
        run_dir: Folder of the run.
        seed: Of everything random.
        start: File of a state_dict of the whole detector, of these widths, to start from; the run
            remembers its digest. None: as ``config.model.init`` says.
        resume: Go on where an earlier process stopped, with another rate, clipping or number of
            steps where they are given; a finished run is returned at once, or goes on to more
            steps. False: start over.
        progress: Show bars.

    Raises:
        DataError: If the data cannot be used.
        CheckpointError: If the folder holds a run with other settings, or no checkpoint can be
            read.
        LossError: If a loss is not finite.
    """
    folder = Path(run_dir)
    device = pick_device(config.device)
    with process_group(device), run_settings(config, device):
        is_main = rank() == 0
        predicts_masks, _ = parse_name(config.model.name)
        data = load_on_ranks(config.data, with_masks=predicts_masks, progress=progress and is_main)
        config = replace(config, model=replace(config.model, num_classes=len(data.class_names) + 1))
        model = initial_model(config.model, widths, seed)
        identity: dict[str, Any] = {
            "seed": seed,
            "config": to_dict(config),
            "widths": dict(model.widths),
            "start": None if start is None else load_start(model, Path(start), data.class_names),
            "data": data.content,
        }
        finished = open_folder(folder, identity, RunResult, resume=resume)
        if finished is not None:
            return finished
        if is_main:
            save_config(config, folder / "config.json")
            save_widths(model.widths, folder / "widths.json")
            tell_limits(data.val, config.model.detections_per_image)
            write_text(folder / "classes.json", json.dumps(list(data.class_names)) + "\n")
            ids = list(data.train.category_of.values())
            write_text(folder / "category_ids.json", json.dumps(ids) + "\n")
            tell_recipe(config, model, world_size())
        return _Run(config, model, data, folder, identity, device, progress).run()


def initial_model(
    config: ModelConfig, widths: Mapping[str, int] | None, seed: int
) -> GeneralizedRCNN:
    """The network that a run of a seed starts from; seeds torch."""
    torch.manual_seed(mix_seed(seed, 2))
    return build_model(config, widths)


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        model: GeneralizedRCNN,
        data: LoadedData,
        folder: Path,
        identity: dict[str, Any],
        device: torch.device,
        progress: bool,
    ) -> None:
        self.config, self.data, self.folder, self.device = config, data, folder, device
        self.model, self.identity = model, identity
        self.evaluate_steps = evaluation_steps(config, len(data.train))
        self.loop = Loop(
            config,
            model,
            folder,
            identity,
            device,
            self._losses,
            track=self._track,
            progress=progress,
        )

    def run(self) -> RunResult:
        """Trains what is left, evaluates, and leaves the result."""
        loop = self.loop
        try:
            check_parts(self.config, world_size())
            loop.run(
                f"training {self.folder.name}",
                self._loader(),
                self.config.batch_size,
                pause=self._evaluate,
                pause_steps=self.evaluate_steps,
            )
            final = self._evaluate()
        finally:
            loop.close()
        cost = vars(count_cost(self.model, self.config.model.min_size))
        result = RunResult(
            ap=final.ap,
            ap50=final.numbers["ap50"] or 0.0,
            segm_ap=final.numbers["segm_ap"],
            train_s=loop.train_s,
            **cost,
            steps=loop.step,
            seed=loop.seed,
            run_dir=str(self.folder),
            cpu_s=loop.cpu_s,
            numbers=final.numbers,
            classes=final.classes,
            best=loop.best,
        )
        if loop.is_main:
            write_predictions(final, self.folder)
            loop.write_weights(LAST)
            write_result(self.folder, result, self.identity)
        barrier()
        return result

    def _loader(self) -> DataLoader[Any]:
        config = self.config
        plan = BatchPlan(
            self.data.train.aspect_ratios(),
            config.batch_size,
            seed=self.loop.seed,
            steps=config.steps,
            first_step=self.loop.step,
            rank=rank(),
            world_size=world_size(),
        )
        view = AugmentedView(
            self.data.train, training_transform(config.data), cache=config.data.cache
        )
        return DataLoader(
            view,
            batch_sampler=plan,
            num_workers=config.data.workers,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
        )

    def _losses(self, model: nn.Module, part: list[tuple[Tensor, Target]]) -> dict[str, Tensor]:
        images = [to_float(image.to(self.device, non_blocking=True)) for image, _ in part]
        targets = [to_device(target, self.device) for _, target in part]
        losses: dict[str, Tensor] = model(images, targets)
        return losses

    def _evaluate(self) -> Evaluation:
        """Scores the weights as they are, and keeps them where none were better."""
        loop = self.loop
        found = evaluate(
            loop.result_model(),
            self.data.val,
            batch_size=self.config.eval_batch_size,
            workers=self.config.data.workers,
            precision=loop.dtype,
            progress=loop.progress,
        )
        values = {**found.numbers, "seconds": found.seconds, "classes": found.classes}
        loop.logbook.write("eval", loop.step, values)
        if loop.is_main:
            pictures = draw_pictures(loop.result_model(), self.data.val, count=_DRAWN_IMAGES)
            loop.logbook.picture("eval/detections", loop.step, in_grid(pictures, 2))
        if self.evaluate_steps and (loop.best is None or found.ap > loop.best["ap"]):
            loop.best = {"step": loop.step, "ap": found.ap}
            if loop.is_main:
                loop.write_weights(BEST)
        return found

    def _track(self) -> fastcov.Tracker | None:
        config = self.config
        if config.track == "none":
            return None
        root = self.model if config.track == "model" else self.model.backbone
        is_main = rank() == 0
        # Snapshots come from inside a step, where ranks must not wait for each other: rank 0 takes
        # its own.
        return fastcov.track(
            root,
            where=config.track_where,
            rows="auto" if config.track_rows is None else config.track_rows,
            decay=config.track_decay,
            snapshot_every=config.snapshot_every if is_main else None,
            out=self.folder / "spectra" if is_main else None,
        )


@contextmanager
def run_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Threads, determinism and random state, as they were before afterwards."""
    threads = torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        try:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            # On the CPU every kernel in use is deterministic; on a GPU RoIAlign's gradient warns
            # that it is not.
            if config.deterministic and device.type == "cuda":
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(was_deterministic)
