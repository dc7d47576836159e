"""What a run tells while it goes: JSON lines for programs, TensorBoard for people."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.tensorboard import SummaryWriter

from fastcov_detection.distributed import average_over_ranks
from fastcov_detection.files import write_text

LOG = "log.jsonl"


class LossError(RuntimeError):
    """Training has left the finite numbers."""


class Logbook:
    """Collects losses on the device and writes their means.

    Args:
        run_dir: Gets ``log.jsonl`` and ``tensorboard/``; None: nothing is written.
        first_step: Where this process starts; what an earlier one wrote about later steps is
            dropped, so that every step is told once.
        remedy: Options that make a run calmer, named where a loss is not finite.
    """

    def __init__(self, run_dir: Path | None, first_step: int, remedy: str = "") -> None:
        self.first_step, self.remedy = first_step, remedy
        self.window: list[dict[str, Tensor]] = []
        self.lines = None
        self.board = None
        if run_dir is not None:
            _keep_until(run_dir / LOG, first_step)
            self.lines = (run_dir / LOG).open("a", encoding="utf-8")
            self.board = SummaryWriter(run_dir / "tensorboard", purge_step=first_step + 1)

    def add(self, values: Mapping[str, Tensor]) -> None:
        """Remembers one step's values without waiting for the device."""
        self.window.append({name: value.detach() for name, value in values.items()})

    def flush(
        self, step: int, rate: float, train_s: float, speed: Mapping[str, float] | None = None
    ) -> dict[str, float]:
        """Writes the means since the last call, over all processes; every process must call it.

        Args:
            step: That was done last.
            rate: Learning rate of the step.
            train_s: Seconds of training so far.
            speed: See :meth:`fastcov_detection.train.speed.Speed.since`.

        Raises:
            LossError: If a value is not finite; nothing later than the last checkpoint is lost.
        """
        if not self.window:
            return {}
        names = list(self.window[0])
        table = torch.stack(
            [torch.stack([one[name].float() for name in names]) for one in self.window]
        )
        values = average_over_ranks(table.double()).cpu()
        self._refuse_non_finite(names, values, step)
        means = dict(zip(names, values.mean(dim=0).tolist(), strict=True))
        self.window.clear()
        self.write("train", step, {**means, "lr": rate, "train_s": train_s, "speed": speed or {}})
        return means

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Writes one line and its curves."""
        if self.lines is None or self.board is None:
            return
        self.lines.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        self.lines.flush()
        for name, value in _flat(values):
            if value is not None:
                self.board.add_scalar(f"{kind}/{name}", value, step)

    def picture(self, name: str, step: int, pixels: NDArray[np.uint8]) -> None:
        """Shows a picture in TensorBoard. [H, W, 3]"""
        if self.board is not None:
            self.board.add_image(name, pixels, step, dataformats="HWC")

    def close(self) -> None:
        """Closes the files."""
        if self.lines is not None and self.board is not None:
            self.lines.close()
            self.board.close()

    def refuse_weights(self, state: Mapping[str, Tensor], step: int) -> None:
        """Refusal of weights that no lower rate could mend, before a checkpoint is written.

        Args:
            state: A model's state_dict.
            step: After which it is.

        Raises:
            LossError: If a tensor is not finite; the last checkpoint stays as it is.
        """
        for name, tensor in state.items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise LossError(f"{name} is not finite after step {step}; {self._advice()}")

    def _refuse_non_finite(self, names: list[str], values: Tensor, step: int) -> None:
        bad = (~values.isfinite()).nonzero()
        if len(bad) == 0:
            return
        row, column = bad[0].tolist()
        raise LossError(
            f"{names[column]} is {values[row, column].item()} at step "
            f"{step - len(values) + row + 1}; {self._advice()}"
        )

    def _advice(self) -> str:
        return (
            f"lower lr or clip_norm: the same command with {self.remedy} goes on from the last "
            "checkpoint, which is from before; with --restart as well, from the beginning"
        )


def read_log(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's log; a last line that a kill cut short is left out."""
    path = run_dir / LOG
    if not path.exists():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            break
    return entries


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Curves by path: those of a mapping under its name."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{name}/{inner}", one) for inner, one in _flat(value))
        else:
            yield name, value


def _keep_until(path: Path, step: int) -> None:
    kept = [entry for entry in read_log(path.parent) if entry["step"] <= step]
    write_text(path, "".join(json.dumps(entry) + "\n" for entry in kept))
