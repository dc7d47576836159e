"""Training of a detector: from a configuration to a trained detector in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
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
from fastcov_detection.config import TrainConfig, save_config, to_dict
from fastcov_detection.data.augment import training_transform
from fastcov_detection.data.batches import AugmentedView, BatchPlan, mix_seed, to_device, to_float
from fastcov_detection.data.dataset import (
    LoadedData,
    Target,
    load_data,
)
from fastcov_detection.detector.build import build_model, parse_name, save_widths
from fastcov_detection.detector.cost import count_cost
from fastcov_detection.detector.weights import load_start
from fastcov_detection.distributed import barrier, pick_device, process_group, rank, world_size
from fastcov_detection.errors import CheckpointError
from fastcov_detection.files import write_text
from fastcov_detection.provenance import made_by
from fastcov_detection.train import checkpoint as checkpoints
from fastcov_detection.train.drawing import draw_pictures, in_grid
from fastcov_detection.train.evaluate import Evaluation, evaluate, tell_limits, write_predictions
from fastcov_detection.train.folder import BEST, RunResult, has_weights, load_run, read_run_result
from fastcov_detection.train.schedule import (
    check_parts,
    evaluation_steps,
    tell_recipe,
)
from fastcov_detection.train.steps import Loop

__all__ = ["RunResult", "has_weights", "load_run", "train"]

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

    The folder gets ``config.json``, ``widths.json``, ``classes.json``,
    ``category_ids.json``, ``log.jsonl``,
    ``tensorboard/``, ``spectra/`` (what :func:`fastcov.track` saw), ``checkpoint.pt``, ``best.pt``
    (where it is evaluated on the way: the weights with the highest AP of boxes), and at the end
    ``model.pt`` (a plain state_dict), ``predictions.bbox.json`` (and ``.segm``, in COCO's results
    format) and ``run.json``. Order of images, their random changes
    and the sampling of regions follow from the seed, the step and the rank alone, so a run that was
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
        data = _load(config, progress and is_main)
        config = replace(config, model=replace(config.model, num_classes=len(data.class_names) + 1))
        torch.manual_seed(mix_seed(seed, 2))
        model = build_model(config.model, widths)
        identity: dict[str, Any] = {
            "seed": seed,
            "config": to_dict(config),
            "widths": dict(model.widths),
            "start": None if start is None else load_start(model, Path(start), data.class_names),
            "data": data.content,
        }
        finished = _open_folder(folder, identity, resume)
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
        cost = count_cost(self.model, self.config.model.min_size)
        result = RunResult(
            ap=final.ap,
            ap50=final.numbers["ap50"] or 0.0,
            segm_ap=final.numbers["segm_ap"],
            train_s=loop.train_s,
            params=cost.params,
            backbone_params=cost.backbone_params,
            macs=cost.macs,
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
            loop.write_weights("model.pt")
            kept = {key: v for key, v in dataclasses.asdict(result).items() if key != "run_dir"}
            content = {**self.identity, "result": kept, "made_by": made_by()}
            write_text(self.folder / "run.json", json.dumps(content, indent=2) + "\n")
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


def _load(config: TrainConfig, progress: bool) -> LoadedData:
    """Opens the data; one process builds what is missing, the others wait for it."""
    predicts_masks, _ = parse_name(config.model.name)
    loaded = None
    if rank() == 0:
        loaded = load_data(config.data, with_masks=predicts_masks, progress=progress)
    barrier()
    return loaded or load_data(config.data, with_masks=predicts_masks, progress=False)


def _open_folder(folder: Path, identity: dict[str, Any], resume: bool) -> RunResult | None:
    """Prepares the folder; the result where the run has ended already."""
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        checkpoints.remove_leftovers(folder)
        if not resume:
            checkpoints.remove_checkpoints(folder)
            for name in ("run.json", "model.pt", BEST):
                (folder / name).unlink(missing_ok=True)
            for name in ("spectra", "tensorboard"):
                shutil.rmtree(folder / name, ignore_errors=True)
    barrier()
    finished = read_run_result(folder)
    if finished is not None:
        content = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        before = {key: content.get(key) for key in identity}
        checkpoints.check_same_run(
            before, identity, folder, reached=finished.steps, is_finished=True
        )
        if finished.steps >= identity["config"]["steps"]:
            return finished
    saved = checkpoints.load_checkpoint(folder)
    if saved is not None:
        checkpoints.resume_from(saved, identity, folder)
    elif finished is not None:
        raise CheckpointError(
            f"{folder} has a result after {finished.steps} steps and no checkpoint to go on from; "
            "start over with --restart, or choose another folder"
        )
    return None


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
