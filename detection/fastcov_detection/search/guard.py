"""Process between a worker of a cluster and its training: when the worker dies, the training ends.

A run that is started again on another node must not meet its earlier process in the same folder.
No signal says that a parent was killed, but the standard input that came from the parent then ends:
the guard waits for this end, and stops the command, which has a process group of its own. A worker
that is asked to end kills the guard first: for that case Linux is asked to stop the command with
the guard.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from pathlib import Path

GRACE_S = 10.0
"""Seconds in which a training may end by itself, with the processes that it started."""
_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of linux/prctl.h


def train_guarded(words: Sequence[str], folder: str, threads: int) -> int:
    """One task of a cluster: a training in processes that do not outlive this one.

    This file imports nothing beyond Python, so that a worker is ready at once.

    Args:
        words: Command line after the interpreter.
        folder: Folder of the run, the same on every node.
        threads: CPU threads of each process.

    Returns:
        Exit status of the training.

    Raises:
        FileNotFoundError: If the folder is not on this node.
    """
    run = Path(folder)
    if not run.is_dir():
        raise FileNotFoundError(
            f"{run} is not on this node; --out must lie on a file system that all nodes share"
        )
    if (run / "run.json").exists():  # an earlier start ended before it could say so
        return 0
    command = [sys.executable, "-P", "-m", "fastcov_detection.search.guard", sys.executable]
    with (run / "output.txt").open("ab") as output:
        output.write(f"started on node {os.uname().nodename}\n".encode())
        output.flush()
        with subprocess.Popen(
            [*command, *words],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | thread_limits(threads) | {"PYTHONSAFEPATH": "1"},
        ) as process:
            return process.wait()


def thread_limits(threads: int) -> dict[str, str]:
    """Environment variables that set the CPU threads of a process."""
    return dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(threads))


def guard(words: Sequence[str]) -> int:
    """Exit status of a command that runs until its own end, or that of standard input."""
    child = subprocess.Popen(
        words, stdin=subprocess.DEVNULL, start_new_session=True, preexec_fn=_end_with_parent
    )

    def watch() -> None:
        # Not through sys.stdin, whose lock a thread that still reads would hold when Python ends.
        while os.read(0, 4096):
            continue
        for sign in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(child.pid, sign)
            except ProcessLookupError:
                return
            try:
                child.wait(GRACE_S)
            except subprocess.TimeoutExpired:
                continue

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    return child.wait()


def _end_with_parent() -> None:
    """Request to the kernel for SIGTERM when the parent of this process dies."""
    ctypes.CDLL(None).prctl(_PARENT_DEATH_SIGNAL, signal.SIGTERM)


if __name__ == "__main__":
    sys.exit(guard(sys.argv[1:]))
