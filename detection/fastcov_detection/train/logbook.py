"""Messages of a run while it goes: JSON lines for programs, TensorBoard and a bar for people."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastcov_detection.config import flatten
from fastcov_detection.distributed import average_over_ranks
from fastcov_detection.errors import LossError
from fastcov_detection.files import write_text

LOG = "log.jsonl"

Batch = TypeVar("Batch")


class Logbook:
    """Log of losses, which are collected on the device and written as means.

    Args:
        run_dir: Folder that gets ``log.jsonl`` and ``tensorboard/``; None: nothing is written.
        first_step: Steps done before this process; lines of an earlier process about later steps
            are dropped, so that every step has one line.
        remedy: Options that an error recommends where a loss is not finite.
    """

    def __init__(self, run_dir: Path | None, first_step: int, remedy: str = "") -> None:
        self.first_step, self.remedy = first_step, remedy
        self.window: list[dict[str, Tensor]] = []
        self.lines = None
        self.board = None
        if run_dir is not None:
            kept = [entry for entry in read_log(run_dir) if entry["step"] <= first_step]
            write_text(run_dir / LOG, "".join(json.dumps(entry) + "\n" for entry in kept))
            self.lines = (run_dir / LOG).open("a", encoding="utf-8")
            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Values of one step, kept without waiting for the device."""
        self.window.append({name: value.detach() for name, value in values.items()})

    def flush(
        self, step: int, rate: float, train_s: float, speed: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Means since the last call, over all processes, written; every process must call it.

        Args:
            step: Number of steps done.
            rate: Learning rate of the last step.
            train_s: Seconds of training so far.
            speed: See :meth:`Speed.since`.

        Raises:
            LossError: If a value is not finite; nothing later than the last checkpoint is lost.
        """
        if not self.window:
            return {}
        names = list(self.window[0])
        table = torch.stack(
            [torch.stack([losses[name].float() for name in names]) for losses in self.window]
        )
        values = average_over_ranks(table.double()).cpu()
        bad = (~values.isfinite()).nonzero()
        if len(bad):
            row, column = bad[0].tolist()
            raise LossError(
                f"{names[column]} is {values[row, column].item()} at step "
                f"{step - len(values) + row + 1}; {self._advice()}"
            )
        means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        self.window.clear()
        self.write("train", step, {**means, "lr": rate, "train_s": train_s, "speed": speed or {}})
        return means

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """One line of the log and its curves."""
        if self.lines is None or self.board is None:
            return
        self.lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.lines.flush()
        for name, value in flatten(values).items():
            if value is not None:
                self.board.add_scalar(f"{kind}/{name.replace('.', '/')}", value, step)

    def picture(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Picture for TensorBoard. [H, W, 3]"""
        if self.board is not None:
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """End of the files."""
        if self.lines is not None and self.board is not None:
            self.lines.close()
            self.board.close()

    def refuse_weights(self, state: Mapping[str, Tensor], step: int) -> None:
        """Refusal of weights that no lower rate could mend, before a checkpoint is written.

        Raises:
            LossError: If a tensor is not finite; the last checkpoint stays as it is.
        """
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise LossError(f"{name} is not finite after step {step}; {self._advice()}")

    def _advice(self) -> str:
        return (
            f"lower lr or clip_norm: the same command with {self.remedy} goes on from the last "
            "checkpoint, which is from before; with --restart as well, from the beginning"
        )


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill cut short is left out."""
    entries: list[dict[str, Any]] = []
    if (run_dir / LOG).exists():
        for line in (run_dir / LOG).read_text(encoding="utf-8").splitlines():
            try:
                entries.append(json.loads(line))
            except ValueError:
                break
    return entries


class Speed:
    """Clock of a training loop.

    Args:
        images: Images of one step, over all processes.
        device: Device whose memory is reported.
    """

    def __init__(self, images: int, device: torch.device) -> None:
        self.images, self.device = images, device
        self.steps, self.waited_s, self.start_s = 0, 0.0, time.monotonic()

    def watch(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """The batches; the time until each comes counts as waiting for data."""
        iterator = iter(batches)
        while True:
            asked_s = time.monotonic()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.waited_s += time.monotonic() - asked_s
            self.steps += 1
            yield batch

    def pause(self, seconds: float) -> None:
        """Seconds that were not training, which the speed leaves out."""
        self.start_s += seconds

    def since(self, steps_left: int) -> dict[str, float]:
        """Figures of the steps since the last call.

        Args:
            steps_left: Steps to the end of the run.

        Returns:
            ``images_per_s``, ``data_share`` (share of the time spent waiting for images),
            ``eta_s``, and on a GPU ``memory_gib`` (largest allocation).
        """
        seconds = max(time.monotonic() - self.start_s, 1e-9)
        steps = max(self.steps, 1)
        found = {
            "images_per_s": self.images * steps / seconds,
            "data_share": min(1.0, self.waited_s / seconds),
            "eta_s": steps_left * seconds / steps,
        }
        if self.device.type == "cuda":
            found["memory_gib"] = torch.cuda.max_memory_allocated(self.device) / 2**30
        self.steps, self.waited_s, self.start_s = 0, 0.0, time.monotonic()
        return found


def progress_note(losses: dict[str, float], rate: float, speed: dict[str, float]) -> str:
    """Text beside a progress bar: losses, rate, and speed from :meth:`Speed.since`."""
    parts = [
        f"{name.removeprefix('loss_')} {value:.2f}"
        for name, value in losses.items()
        if name not in ("loss", "grad_norm")
    ]
    words = [f"loss {losses['loss']:.3f} ({', '.join(parts)})", f"lr {rate:.2g}"]
    words.append(f"{speed['images_per_s']:.1f} images/s")
    words.append(f"data {100 * speed['data_share']:.0f} %")
    if "memory_gib" in speed:
        words.append(f"{speed['memory_gib']:.1f} GiB")
    words.append(f"{timedelta(seconds=round(speed['eta_s']))} left")
    return ", ".join(words)
