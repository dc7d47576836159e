"""How fast a run goes: images a second, waiting for data, memory of the GPU, and what is left."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import timedelta
from typing import TypeVar

import torch

Batch = TypeVar("Batch")


class Speed:
    """Clock of a training loop.

    Args:
        images: Of one step, over all processes.
        device: Whose memory is told.
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
        """Takes out time that was not training."""
        self.start_s += seconds

    def since(self, steps_left: int) -> dict[str, float]:
        """Figures of the steps since the last call.

        Args:
            steps_left: To the end of the run.

        Returns:
            ``images_per_s``, ``data_share`` (of the time, spent waiting for images), ``eta_s``, and
            on a GPU ``memory_gib`` (the most that was allocated).
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


def told(losses: dict[str, float], rate: float, speed: dict[str, float]) -> str:
    """Losses, rate and speed as they stand beside a bar.

    Args:
        losses: ``loss`` and its parts.
        rate: Learning rate.
        speed: Of :meth:`Speed.since`.
    """
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
