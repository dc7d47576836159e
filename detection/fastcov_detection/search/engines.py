"""Engines: places where a search's trainings run, each in a process of its own.

A local engine starts the processes on this machine. For a search that outgrows one machine, a Ray
engine makes every run a task of a cluster whose nodes share the file system of the search's folder
and of the data. A task whose worker or node is lost is started again on another node, and the run
goes on from its checkpoint; a run that has ended is not run again.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from fastcov_detection.errors import ConfigError, RunError
from fastcov_detection.progress import Bar, display
from fastcov_detection.search.guard import thread_limits, train_guarded

_POLL_S = 0.25
_TAIL_BYTES = 65_536
_GRACE_S = 10.0
_MOST_RESTARTS = 10
"""Times that a run is started again after the loss of its worker or node."""


@dataclass(frozen=True)
class Job:
    """One training run: its settings, and the folder of its files."""

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
        """True if an earlier process brought the run to its result."""
        return (self.run_dir / "run.json").exists()

    def command(self, processes: int = 1) -> list[str]:
        """Command line that starts or resumes the run; torchrun's for several processes."""
        # -P: the process imports the installed package, not a checkout in the current folder.
        words = [sys.executable, "-P", "-m"]
        if processes > 1:
            shared = f"--nproc-per-node={processes}"
            words += ["torch.distributed.run", "--standalone", shared, "-m"]
        words += ["fastcov_detection.cli", "train", "--quiet"]
        words += ["--config", str(self.config_file), "--out", str(self.run_dir)]
        words += ["--seed", str(self.seed)]
        files = {"--widths": self.widths_file, "--start": self.start_file}
        given = {option: path for option, path in files.items() if path is not None}
        return words + [word for option, path in given.items() for word in (option, str(path))]


@contextmanager
def locked(folder: Path) -> Iterator[int]:
    """Context that keeps a second search, or a killed search's last run, out of the folder.

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


class Running(Protocol):
    """A run at work."""

    @property
    def has_begun(self) -> bool:
        """False while the run waits for its turn."""

    def status(self) -> int | None:
        """Exit status of the run; None while it goes on."""

    def stop(self) -> None:
        """End of the run, which resumes later."""


class Engine(Protocol):
    """A place where runs are trained."""

    def start(self, job: Job) -> Running | None:
        """Run that was started or queued; None where there is no room now."""


def run_jobs(
    jobs: Sequence[Job],
    *,
    engine: Engine,
    on_finish: Callable[[], Any] | None = None,
    progress: bool = True,
) -> None:
    """Runs of all jobs that are not finished, with a display of their progress.

    Args:
        jobs: Independent of each other.
        engine: Where they run.
        on_finish: Called after each run that ends well.
        progress: Show a bar for each run.

    Raises:
        RunError: If a run fails; the others are stopped, and resume when the same command is given.
    """
    waiting = [job for job in jobs if not job.is_finished]
    at_work: dict[Job, Running] = {}
    bars: dict[Job, Bar] = {}
    with display(progress) as show:
        try:
            while waiting or at_work:
                while waiting and (started := engine.start(waiting[0])) is not None:
                    at_work[waiting.pop(0)] = started
                for job, running in list(at_work.items()):
                    if job not in bars and running.has_begun:
                        bars[job] = show(job.label, job.steps, note="starting")
                    code = running.status()
                    if code is not None and (code != 0 or not job.is_finished):
                        raise RunError(_failure(job, code))
                    if code is not None:
                        del at_work[job]
                    if job in bars:
                        _report(job, bars[job], is_done=code is not None)
                    if code is not None and on_finish is not None:
                        on_finish()
                time.sleep(_POLL_S)
        finally:
            for running in at_work.values():
                running.stop()


def _report(job: Job, bar: Bar, is_done: bool) -> None:
    if is_done:
        bar(job.steps, "done", is_done=True)
        return
    step, note = read_position(job.run_dir / "log.jsonl")
    bar(step, "evaluating" if step >= job.steps else note or "starting")


def _failure(job: Job, code: int) -> str:
    output = job.run_dir / "output.txt"
    lines = output.read_text(errors="replace").strip().splitlines() if output.exists() else []
    last = "\n  ".join(lines[-12:]) or "(it said nothing)"
    return (
        f"{job.label} ended with exit status {code}; its last words in {output}:\n  {last}\n"
        "Mend that and give the same command again: finished runs are not run again."
    )


class LocalEngine:
    """Processes of this machine, ``at_once`` at a time.

    The processes share the CPU cores evenly, and the GPUs in turn (several processes on one GPU
    where there are more processes than GPUs).

    Args:
        at_once: Processes side by side.
        lock: Descriptor of :func:`locked`, inherited by the processes.
    """

    def __init__(self, at_once: int = 1, lock: int | None = None) -> None:
        self.at_once, self.lock = max(1, at_once), lock
        self._slots: list[_Process | None] = [None] * self.at_once

    def start(self, job: Job) -> Running | None:
        """Run in the first free slot; None where there is none."""
        for slot, process in enumerate(self._slots):
            if process is None or process.status() is not None:
                environment = _environment(slot, self.at_once)
                self._slots[slot] = started = _Process(job, environment, self.lock)
                return started
        return None


class _Process:
    """A run in a process of this machine."""

    has_begun = True

    def __init__(self, job: Job, environment: dict[str, str], lock: int | None) -> None:
        job.run_dir.mkdir(parents=True, exist_ok=True)
        with (job.run_dir / "output.txt").open("ab") as output:
            self._process = subprocess.Popen(
                job.command(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=() if lock is None else (lock,),
            )

    def status(self) -> int | None:
        """Exit status; None while the process lives."""
        return self._process.poll()

    def stop(self) -> None:
        """End of the process: by SIGTERM, ten seconds later by SIGKILL."""
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(_GRACE_S)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()


def threads_per_run(at_once: int) -> int:
    """CPU threads of one of several runs side by side."""
    return max(1, len(os.sched_getaffinity(0)) // max(1, at_once))


def _environment(slot: int, slots: int) -> dict[str, str]:
    changes = thread_limits(threads_per_run(slots))
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


class RayEngine:
    """A Ray cluster, which decides where and when each run is trained.

    Args:
        address: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT`` of the cluster; None: a cluster of
            this machine alone, started now.
        gpus_per_run: GPUs of one run, which torchrun trains on all of them; None: one where the
            cluster has any.
        threads: CPU threads of each of a run's processes.

    Raises:
        ConfigError: If Ray is missing, or no node has as many GPUs.
        RunError: If there is no cluster at the address.
    """

    def __init__(
        self, address: str | None = None, gpus_per_run: int | None = None, threads: int = 1
    ) -> None:
        self._ray = _ray()
        before = signal.getsignal(signal.SIGTERM)
        try:
            self._ray.init(address=address or "local", log_to_driver=False)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise RunError(
                f"no Ray cluster at {address!r} ({reason}); start one with ray start --head, or "
                "leave --address out for one on this machine"
            ) from None
        finally:
            # Ray takes SIGTERM for itself; here it stops the search in order.
            signal.signal(signal.SIGTERM, before)
        most = max(
            (int(node["Resources"].get("GPU", 0)) for node in self._ray.nodes() if node["Alive"]),
            default=0,
        )
        self.gpus = min(1, most) if gpus_per_run is None else gpus_per_run
        if not 0 <= self.gpus <= most:
            self.close()
            raise ConfigError(
                f"gpus_per_run is {self.gpus}; the largest node of the cluster has {most} GPUs"
            )
        self.threads = max(1, threads)

    def start(self, job: Job) -> Running:
        """Run in the cluster's queue, which starts when the cluster has room."""
        job.run_dir.mkdir(parents=True, exist_ok=True)
        task = self._ray.remote(train_guarded).options(
            num_cpus=self.threads * max(1, self.gpus),
            num_gpus=self.gpus,
            max_retries=_MOST_RESTARTS,
            name=job.label,
        )
        folder, words = job.run_dir.resolve(), job.command(self.gpus)[1:]
        return _Task(self._ray, task.remote(words, str(folder), self.threads), folder)

    def close(self) -> None:
        """End of the connection, and of a cluster that was started here."""
        self._ray.shutdown()


class _Task:
    """A run that the cluster has in hand."""

    def __init__(self, ray: Any, reference: Any, folder: Path) -> None:
        self._ray, self._reference = ray, reference
        self._output = folder / "output.txt"
        self._before = self._size()

    @property
    def has_begun(self) -> bool:
        """True once the run has written a line."""
        return self._size() != self._before

    def status(self) -> int | None:
        """Exit status; None while the run waits, goes on or is started again."""
        ready, _ = self._ray.wait([self._reference], timeout=0)
        if not ready:
            return None
        try:
            status: int = self._ray.get(self._reference)
        except self._ray.exceptions.RayError as error:
            raise RunError(
                f"Ray gave the run of {self._output.parent} up ({' '.join(str(error).split())}); "
                "give the same command again: finished runs are not run again"
            ) from None
        return status

    def stop(self) -> None:
        """End of the run's worker, whose training ends with it."""
        self._ray.cancel(self._reference, force=True)

    def _size(self) -> int:
        return self._output.stat().st_size if self._output.exists() else -1


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--engine ray needs the package ray: pip install ray, or use --engine local"
        ) from None
    return ray
