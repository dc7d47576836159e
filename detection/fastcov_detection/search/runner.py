"""Training runs side by side, each in a process of its own, followed through their logs."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)

_POLL_S = 0.25
_PLAIN_EVERY_S = 10.0
_TAIL_BYTES = 65_536
_GRACE_S = 10.0


class RunError(RuntimeError):
    """A training run that ended without a result."""


@dataclass(frozen=True)
class Job:
    """One training run: what to train and where it leaves its files."""

    label: str
    run_dir: Path
    config_file: Path
    widths_file: Path | None
    seed: int
    steps: int
    start_file: Path | None = None
    """Weights of the whole detector to start from instead of random ones."""

    @property
    def is_finished(self) -> bool:
        """Whether an earlier process brought the run to its result."""
        return (self.run_dir / "run.json").exists()

    def command(self) -> list[str]:
        """The command line that runs or resumes it."""
        # -P: the process imports what this one did, not a checkout that happens to lie here.
        words = [sys.executable, "-P", "-m", "fastcov_detection.cli", "train", "--quiet"]
        words += ["--config", str(self.config_file), "--out", str(self.run_dir)]
        words += ["--seed", str(self.seed)]
        files = {"--widths": self.widths_file, "--start": self.start_file}
        given = {option: path for option, path in files.items() if path is not None}
        return words + [word for option, path in given.items() for word in (option, str(path))]


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Keeps a second search, or a run that a killed search left behind, out of the folder.

    Yields:
        The lock's file descriptor; child processes that inherit it hold the lock as well.

    Raises:
        RunError: If another process holds the lock.
    """
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{folder} is in use by another search, or by a training run that one left behind; "
                "wait for it or choose another folder"
            ) from None
        yield handle
    finally:
        os.close(handle)


def run_jobs(
    jobs: Sequence[Job],
    *,
    at_once: int = 1,
    lock: int | None = None,
    on_finish: Callable[[], Any] | None = None,
    progress: bool = True,
) -> None:
    """Runs what is not finished, ``at_once`` at a time, and shows how far each is.

    Processes share the CPU cores evenly, and the GPUs in turn (several processes on one GPU where
    there are more processes than GPUs).

    Args:
        jobs: Independent of each other.
        at_once: Processes side by side.
        lock: Descriptor of :func:`locked`, inherited by the processes.
        on_finish: Called after each run that ends well.
        progress: Show a bar for each run.

    Raises:
        RunError: If a run fails; the others are stopped, and resume when the same command is given.
    """
    waiting = [job for job in jobs if not job.is_finished]
    slots: list[_Running | None] = [None] * max(1, at_once)
    with _display(progress) as display:
        try:
            while waiting or any(slots):
                for slot, running in enumerate(slots):
                    if running is not None and running.poll(display):
                        slots[slot] = running = None
                        if on_finish is not None:
                            on_finish()
                    if running is None and waiting:
                        slots[slot] = _Running(waiting.pop(0), slot, len(slots), lock, display)
                time.sleep(_POLL_S)
        finally:
            for running in slots:
                if running is not None:
                    running.stop()


class _Running:
    """A process at work, and what is shown of it."""

    def __init__(
        self, job: Job, slot: int, slots: int, lock: int | None, display: _Display
    ) -> None:
        self.job = job
        job.run_dir.mkdir(parents=True, exist_ok=True)
        self.output: IO[bytes] = (job.run_dir / "output.txt").open("ab")
        self.process = subprocess.Popen(
            job.command(),
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=_environment(slot, slots),
            pass_fds=() if lock is None else (lock,),
        )
        self.task = display.add(job.label, job.steps)

    def poll(self, display: _Display) -> bool:
        """Shows how far the run is; True once it has ended well."""
        code = self.process.poll()
        step, note = read_position(self.job.run_dir / "log.jsonl")
        if code is None:
            display.update(self.task, step, "evaluating" if step >= self.job.steps else note)
            return False
        self.output.close()
        if code != 0 or not self.job.is_finished:
            raise RunError(self._failure(code))
        display.update(self.task, self.job.steps, "done", is_done=True)
        return True

    def _failure(self, code: int) -> str:
        said = (self.job.run_dir / "output.txt").read_text(errors="replace").strip().splitlines()
        last = "\n  ".join(said[-12:]) or "(it said nothing)"
        return (
            f"{self.job.label} ended with exit status {code}; its last words in "
            f"{self.job.run_dir / 'output.txt'}:\n  {last}\n"
            "Mend that and give the same command again: what is finished is not run again."
        )

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        self.output.close()


def threads_per_run(at_once: int) -> int:
    """CPU threads of one of several runs side by side."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, at_once))


def _environment(slot: int, slots: int) -> dict[str, str]:
    threads = str(threads_per_run(slots))
    changes = {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
    gpus = torch.cuda.device_count()
    if gpus > 1:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(index) for index in range(gpus)]
        changes["CUDA_VISIBLE_DEVICES"] = names[slot % gpus]
    return os.environ | changes


def read_position(log: Path) -> tuple[int, str]:
    """Step and loss of the last complete line of a run's log; (0, "") before the first."""
    try:
        with log.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            tail = file.read()
    except OSError:
        return 0, ""
    for line in reversed(tail[: tail.rfind(b"\n") + 1].splitlines()):
        try:
            values = json.loads(line)
        except ValueError:
            continue
        if isinstance(values, dict) and isinstance(values.get("step"), int):
            loss = values.get("loss")
            return values["step"], f"loss {loss:.3f}" if isinstance(loss, float) else ""
    return 0, ""


class _Display:
    """Nothing; the shape of what shows the runs."""

    def add(self, label: str, total: int) -> int:
        return 0

    def update(self, task: int, step: int, note: str, *, is_done: bool = False) -> None:
        return


class _Bars(_Display):
    """A bar for every run, on a terminal."""

    def __init__(self, bars: Progress) -> None:
        self.bars = bars

    def add(self, label: str, total: int) -> int:
        return self.bars.add_task(label, total=total, note="starting")

    def update(self, task: int, step: int, note: str, *, is_done: bool = False) -> None:
        self.bars.update(TaskID(task), completed=step, note=note or "starting")


class _Lines(_Display):
    """A line for every run every ten seconds, where there is no terminal."""

    def __init__(self) -> None:
        self.labels: list[tuple[str, int]] = []
        self.next_s: list[float] = []

    def add(self, label: str, total: int) -> int:
        self.labels.append((label, total))
        self.next_s.append(time.monotonic())
        return len(self.labels) - 1

    def update(self, task: int, step: int, note: str, *, is_done: bool = False) -> None:
        if time.monotonic() < self.next_s[task] and not is_done:
            return
        self.next_s[task] = time.monotonic() + _PLAIN_EVERY_S
        label, total = self.labels[task]
        print(f"{label}: {step}/{total} {note or 'starting'}", file=sys.stderr, flush=True)


@contextmanager
def _display(enabled: bool) -> Iterator[_Display]:
    console = Console(file=sys.stderr)
    if not enabled:
        yield _Display()
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bars:
            yield _Bars(bars)
    else:
        yield _Lines()
