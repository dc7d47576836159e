"""The Ray engine, on real clusters of this machine: a head, and nodes with raylets of their own."""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from fastcov_detection import cli
from fastcov_detection.config import TrainConfig, save_config
from fastcov_detection.detector.build import save_widths
from fastcov_detection.errors import ConfigError, RunError
from fastcov_detection.search.engines import Job, RayEngine, run_jobs
from fastcov_detection.search.guard import train_guarded
from fastcov_detection.train.folder import read_run_result
from fastcov_detection.train.logbook import read_log
from fastcov_detection.train.loop import train

pytest.importorskip("ray")


@dataclass(frozen=True)
class _Script(Job):
    """A job that runs a few lines of Python instead of a training."""

    code: str = ""

    def command(self, processes: int = 1) -> list[str]:
        return [sys.executable, "-c", HEAD + self.code, str(self.run_dir)]


# Every start of a script leaves its process id in the file of its number.
HEAD = """
import os, pathlib, signal, sys, time
here = pathlib.Path(sys.argv[1])
number = len(list(here.glob('start*')))
(here / f'start{number}').write_text(str(os.getpid()))
def finish():
    (here / 'run.json').write_text('{}')
"""


def _script(folder: Path, name: str, code: str) -> _Script:
    return _Script(name, folder / name, folder / "c.json", None, 0, 3, code=code)


@pytest.fixture
def cluster() -> Iterator[Any]:
    """A head without room for runs; tests add nodes."""
    from ray.cluster_utils import Cluster

    nodes = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False}
    )
    yield nodes
    nodes.shutdown()


def _wait(condition: Callable[[], bool], seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.1)


def _lives(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_worker_loses_no_finished_run(cluster: Any, tmp_path: Path) -> None:
    engine = RayEngine(cluster.address)
    cluster.add_node(num_cpus=1)
    # The first start kills the worker above its guard, and would then go on for a minute.
    killing = """
if number == 0:
    guard = pathlib.Path(f'/proc/{os.getppid()}/stat').read_text()
    os.kill(int(guard.rpartition(')')[2].split()[1]), signal.SIGKILL)
    time.sleep(60)
finish()
"""
    done, killed = _script(tmp_path, "done", "finish()"), _script(tmp_path, "killed", killing)
    finished: list[float] = []
    try:
        run_jobs([done, killed], engine=engine, on_finish=lambda: finished.append(1), progress=True)
    finally:
        engine.close()
    assert done.is_finished
    assert killed.is_finished
    assert len(finished) == 2
    starts = [int(path.read_text()) for path in sorted(killed.run_dir.glob("start*"))]
    assert len(starts) == 2
    assert len(list(done.run_dir.glob("start*"))) == 1
    # The training of the lost worker did not outlive it.
    _wait(lambda: not any(_lives(process) for process in starts))


@pytest.mark.slow
@pytest.mark.dist
def test_the_loss_of_a_node_moves_its_run(cluster: Any, tmp_path: Path) -> None:
    engine = RayEngine(cluster.address)
    lost = cluster.add_node(num_cpus=1)
    done = _script(tmp_path, "done", "finish()")
    moved = _script(tmp_path, "moved", "time.sleep(600 * (number == 0)); finish()")
    failed: list[BaseException] = []

    def search() -> None:
        try:
            run_jobs([done, moved], engine=engine, progress=False)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=search)
    try:
        thread.start()
        _wait((moved.run_dir / "start0").exists)
        assert done.is_finished
        cluster.add_node(num_cpus=1)
        cluster.remove_node(lost, allow_graceful=False)
        thread.join(300)
        assert not thread.is_alive()
    finally:
        engine.close()
    assert not failed
    assert moved.is_finished
    assert len(list(done.run_dir.glob("start*"))) == 1
    first = int((moved.run_dir / "start0").read_text())
    _wait(lambda: not _lives(first))


@pytest.mark.slow
@pytest.mark.dist
def test_a_failed_run_is_told_and_stops_the_others(cluster: Any, tmp_path: Path) -> None:
    engine = RayEngine(cluster.address)
    cluster.add_node(num_cpus=2)
    bad = _script(tmp_path, "bad", "raise SystemExit('no space in the box')")
    slow = _script(tmp_path, "slow", "time.sleep(600)")
    try:
        with pytest.raises(RunError, match=r"(?s)bad ended with exit status 1.*no space in"):
            run_jobs([slow, bad], engine=engine, progress=False)
        started = [int(path.read_text()) for path in slow.run_dir.glob("start*")]
        _wait(lambda: not any(_lives(process) for process in started))
    finally:
        engine.close()
    with pytest.raises(ConfigError, match="gpus_per_run is 2; the largest node"):
        RayEngine(cluster.address, gpus_per_run=2)


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_of_several_gpus_is_one_training_of_several_processes(
    tiny_run: TrainConfig, tmp_path: Path
) -> None:
    """The command that a worker of a cluster gets for two GPUs, here with two CPUs and gloo."""
    folder = tmp_path / "run"
    folder.mkdir()
    save_config(tiny_run, tmp_path / "c.json")
    save_widths({"layer3": 40}, tmp_path / "w.json")
    job = Job("a", folder, tmp_path / "c.json", tmp_path / "w.json", 3, tiny_run.steps)
    assert train_guarded(job.command(2)[1:], str(folder), 1) == 0, read_output(folder)
    result = read_run_result(folder)
    assert result is not None
    assert (result.steps, result.seed) == (tiny_run.steps, 3)
    # One process that sees the whole batch takes other statistics of it: near, not the same.
    train(tiny_run, {"layer3": 40}, run_dir=tmp_path / "alone", seed=3, progress=False)
    both, alone = (_losses(run) for run in (folder, tmp_path / "alone"))
    assert both[0] == pytest.approx(alone[0], rel=0.5)
    assert both != alone, "each process has half of the batch"
    assert json.loads((folder / "widths.json").read_text())["layer3"] == 40


def read_output(folder: Path) -> str:
    return (folder / "output.txt").read_text()


def _losses(run: Path) -> list[float]:
    return [one["loss"] for one in read_log(run) if one["kind"] == "train"]


def test_options_of_the_cluster_need_it(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["search", "--out", str(tmp_path / "s"), "--gpus-per-run", "2"]
    assert cli.main(words) == 2
    assert "of --engine ray" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["search", "demo"])
def test_torchrun_is_told_what_to_do_instead(
    command: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert cli.main([command, "--out", str(tmp_path / "s")]) == 2
    told = capsys.readouterr().err
    assert "start one alone" in told
    assert "--engine ray" in told
    assert not (tmp_path / "s").exists()
