"""Engine for a search that outgrows one machine: every run is a task of a Ray cluster.

The search's folder and the data lie on a file system that all nodes share. A task whose worker or
node is lost is started again on another one, and its run goes on from its checkpoint; a run that
has ended is in the folder and is not run again.
"""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

from fastcov_detection.config import ConfigError
from fastcov_detection.search.engines import Job, RunError, Running
from fastcov_detection.search.guard import train_guarded

_STARTS = 10
"""Times that a run is started again after the loss of its worker or node."""


class RayEngine:
    """A Ray cluster, which decides where and when each run is trained.

    Args:
        address: Of the cluster: ``auto``, ``HOST:PORT`` or ``ray://HOST:PORT``; None: a cluster of
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
            said = " ".join(str(error).split())
            raise RunError(
                f"no Ray cluster at {address!r} ({said}); start one with ray start --head, or "
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
        """Queues a run; the cluster starts it when it has room."""
        job.run_dir.mkdir(parents=True, exist_ok=True)
        task = self._ray.remote(train_guarded).options(
            num_cpus=self.threads * max(1, self.gpus),
            num_gpus=self.gpus,
            max_retries=_STARTS,
            name=job.label,
        )
        folder = job.run_dir.resolve()
        return _Task(self._ray, task.remote(self._words(job), str(folder), self.threads), folder)

    def _words(self, job: Job) -> list[str]:
        _, *words = job.command()
        if self.gpus < 2:
            return words
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={self.gpus}"]
        return [*launcher, *job.arguments()]

    def close(self) -> None:
        """Leaves the cluster; one that was started here ends."""
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
                "give the same command again: what is finished is not run again"
            ) from None
        return status

    def stop(self) -> None:
        """Ends the run's worker, whose training ends with it."""
        self._ray.cancel(self._reference, force=True)

    def _size(self) -> int:
        return self._output.stat().st_size if self._output.exists() else -1


def _ray() -> Any:
    try:
        import ray
    except ImportError:
        raise ConfigError(
            "--engine ray needs the package ray; install it with "
            "pip install 'fastcov-detection[cluster]', or use --engine local"
        ) from None
    return ray
