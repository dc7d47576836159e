"""The training loop: from a configuration to a trained detector in a folder."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
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
    one_line,
)
from fastcov_detection.detector.build import build_model, parse_name, save_widths
from fastcov_detection.detector.cost import count_cost
from fastcov_detection.detector.weights import load_start
from fastcov_detection.distributed import barrier, pick_device, process_group, rank, world_size
from fastcov_detection.errors import CheckpointError
from fastcov_detection.files import write_file, write_text
from fastcov_detection.progress import progress_bar
from fastcov_detection.provenance import made_by
from fastcov_detection.train import checkpoint as checkpoints
from fastcov_detection.train.average import Average
from fastcov_detection.train.drawing import draw_pictures, in_grid
from fastcov_detection.train.evaluate import Evaluation, evaluate, tell_limits, write_predictions
from fastcov_detection.train.folder import BEST, RunResult, has_weights, load_run, read_run_result
from fastcov_detection.train.logbook import Logbook
from fastcov_detection.train.schedule import (
    build_optimizer,
    calmer_settings,
    check_parts,
    evaluation_steps,
    learning_rate,
    set_learning_rate,
    tell_recipe,
)
from fastcov_detection.train.speed import Speed, told

__all__ = ["RunResult", "has_weights", "load_run", "train"]

_DRAWN_IMAGES = 4

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        self.identity, self.seed = identity, int(identity["seed"])
        self.is_main = rank() == 0
        self.progress = progress and self.is_main
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.model = model.to(device=device, memory_format=memory_format)
        self.optimizer = build_optimizer(self.model, config)
        self.dtype = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step, self.train_s, self.cpu_s = 0, 0.0, 0.0
        self.best: dict[str, float] | None = None
        self.evaluate_steps = evaluation_steps(config, len(data.train))
        # Before the tracker, whose hooks would be copied.
        self.average = None if config.ema is None else Average(self.model, config.ema)
        self.tracker = self._track()
        self._restore()
        self.logbook = Logbook(
            folder if self.is_main else None, self.step, remedy=calmer_settings(config)
        )
        self.replica: nn.Module = self.model
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.replica = DistributedDataParallel(self.model, device_ids=ids)

    def run(self) -> RunResult:
        """Trains what is left, evaluates, and leaves the result."""
        try:
            self._train()
            final = self._evaluate()
        finally:
            self.logbook.close()
            if self.tracker is not None:
                self.tracker.close()
        cost = count_cost(self.model, self.config.model.min_size)
        result = RunResult(
            ap=final.ap,
            ap50=final.numbers["ap50"] or 0.0,
            segm_ap=final.numbers["segm_ap"],
            train_s=self.train_s,
            params=cost.params,
            backbone_params=cost.backbone_params,
            macs=cost.macs,
            steps=self.step,
            seed=self.seed,
            run_dir=str(self.folder),
            cpu_s=self.cpu_s,
            numbers=final.numbers,
            classes=final.classes,
            best=self.best,
        )
        if self.is_main:
            write_predictions(final, self.folder)
            self._write_weights("model.pt")
            kept = {key: v for key, v in dataclasses.asdict(result).items() if key != "run_dir"}
            content = {**self.identity, "result": kept, "made_by": made_by()}
            write_text(self.folder / "run.json", json.dumps(content, indent=2) + "\n")
        barrier()
        return result

    def _train(self) -> None:
        config = self.config
        check_parts(config, world_size())
        plan = BatchPlan(
            self.data.train.aspect_ratios(),
            config.batch_size,
            seed=self.seed,
            steps=config.steps,
            first_step=self.step,
            rank=rank(),
            world_size=world_size(),
        )
        view = AugmentedView(
            self.data.train, training_transform(config.data), cache=config.data.cache
        )
        loader = DataLoader(
            view,
            batch_sampler=plan,
            num_workers=config.data.workers,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
        )
        self.model.train()
        label = f"training {self.folder.name}"
        bar = progress_bar(label, config.steps, done=self.step, enabled=self.progress)
        start_s, before_s = time.monotonic(), self.train_s
        start_cpu_s, before_cpu_s = time.process_time(), self.cpu_s
        speed = Speed(config.batch_size, self.device)
        with bar as advance:
            for batch in speed.watch(one_line(loader)):
                rate = learning_rate(config, self.step)
                self._step(batch, rate)
                self.step += 1
                self.train_s = before_s + time.monotonic() - start_s
                self.cpu_s = before_cpu_s + time.process_time() - start_cpu_s
                is_last = self.step == config.steps
                saves = self.step % config.checkpoint_every == 0 or is_last
                note = ""
                if self.step % config.log_every == 0 or saves:
                    figures = speed.since(config.steps - self.step)
                    losses = self.logbook.flush(self.step, rate, self.train_s, figures)
                    note = told(losses, rate, figures)
                if saves:
                    self._save()
                if self.evaluate_steps and self.step % self.evaluate_steps == 0 and not is_last:
                    pause_s, pause_cpu_s = time.monotonic(), time.process_time()
                    self._evaluate()
                    start_s += time.monotonic() - pause_s
                    speed.pause(time.monotonic() - pause_s)
                    start_cpu_s += time.process_time() - pause_cpu_s
                advance(1, note)
        if self.tracker is not None and world_size() > 1:
            self.tracker.sync()

    def _step(self, batch: list[tuple[Tensor, Target]], rate: float) -> None:
        set_learning_rate(self.optimizer, rate)
        torch.manual_seed(mix_seed(self.seed, 3, self.step, rank()))
        size = len(batch) // self.config.accumulate
        values: dict[str, Tensor] = {}
        for start in range(0, len(batch), size):
            is_last = start + size == len(batch)
            for name, value in self._backward(batch[start : start + size], is_last).items():
                values[name] = values[name] + value if name in values else value
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
            # A scaled gradient may overflow; the scaler then skips the step, and its norm means
            # nothing.
            if not self.scaler.is_enabled():
                values["grad_norm"] = norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.logbook.add(values)

    def _backward(self, part: list[tuple[Tensor, Target]], is_last: bool) -> dict[str, Tensor]:
        """Losses of a part of a step's images, with their gradients added; its share of the mean.

        Processes exchange gradients after the last part alone.
        """
        images = [to_float(image.to(self.device, non_blocking=True)) for image, _ in part]
        targets = [to_device(target, self.device) for _, target in part]
        waits = isinstance(self.replica, DistributedDataParallel) and not is_last
        with self.replica.no_sync() if waits else nullcontext():
            with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                losses: dict[str, Tensor] = self.replica(images, targets)
                loss = torch.stack(list(losses.values())).sum()
            share = 1 / self.config.accumulate
            self.scaler.scale(loss * share).backward()
        return {name: value.detach() * share for name, value in {"loss": loss, **losses}.items()}

    def _result_model(self) -> nn.Module:
        """The model that is evaluated and kept."""
        return self.model if self.average is None else self.average.model

    def _evaluate(self) -> Evaluation:
        """Scores the weights as they are, and keeps them where none were better."""
        found = evaluate(
            self._result_model(),
            self.data.val,
            batch_size=self.config.eval_batch_size,
            workers=self.config.data.workers,
            precision=self.dtype,
            progress=self.progress,
        )
        values = {**found.numbers, "seconds": found.seconds, "classes": found.classes}
        self.logbook.write("eval", self.step, values)
        if self.is_main:
            pictures = draw_pictures(self._result_model(), self.data.val, count=_DRAWN_IMAGES)
            self.logbook.picture("eval/detections", self.step, in_grid(pictures, 2))
        if self.evaluate_steps and (self.best is None or found.ap > self.best["ap"]):
            self.best = {"step": self.step, "ap": found.ap}
            if self.is_main:
                self._write_weights(BEST)
        return found

    def _write_weights(self, name: str) -> None:
        state = {
            key: tensor.cpu().contiguous()
            for key, tensor in self._result_model().state_dict().items()
        }
        write_file(self.folder / name, lambda file: torch.save(state, file))

    def _track(self) -> fastcov.Tracker | None:
        config = self.config
        if config.track == "none":
            return None
        root = self.model if config.track == "model" else self.model.backbone
        # Snapshots come from inside a step, where ranks must not wait for each other: rank 0 takes
        # its own.
        return fastcov.track(
            root,
            where=config.track_where,
            rows="auto" if config.track_rows is None else config.track_rows,
            decay=config.track_decay,
            snapshot_every=config.snapshot_every if self.is_main else None,
            out=self.folder / "spectra" if self.is_main else None,
        )

    def _save(self) -> None:
        self.logbook.refuse_weights(self.model.state_dict(), self.step)
        if self.tracker is not None and world_size() > 1:
            self.tracker.sync()
        if self.is_main:
            content = {
                **self.identity,
                "step": self.step,
                "train_s": self.train_s,
                "cpu_s": self.cpu_s,
                "best": self.best,
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "tracker": None if self.tracker is None else self.tracker.state_dict(),
            }
            checkpoints.save_checkpoint(self.folder, content)
        barrier()

    def _restore(self) -> None:
        saved = checkpoints.load_checkpoint(self.folder)
        barrier()
        if saved is not None:
            self.step, self.train_s = saved["step"], saved["train_s"]
            self.cpu_s, self.best = saved["cpu_s"], saved.get("best")
            self.model.load_state_dict(saved["model"])
            if self.average is not None:
                self.average.model.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.tracker is not None and saved["tracker"] is not None:
                self.tracker.load_state_dict(saved["tracker"])
        if self.tracker is not None:
            self.tracker.history.truncate(self.step + 1 if self.step else 0)


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
