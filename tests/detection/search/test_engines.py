"""Training processes side by side, and the clock that compares networks."""

import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from fastcov_detection.errors import RunError
from fastcov_detection.search.engines import Job, LocalEngine, locked, read_position, run_jobs
from fastcov_detection.search.measure import measure_latency


@dataclass(frozen=True)
class _Script(Job):
    """A job that runs a few lines of Python instead of a training."""

    code: str = ""

    def command(self):
        return [sys.executable, "-c", self.code, str(self.run_dir)]


def _script(folder, name, code):
    return _Script(name, folder / name, folder / "c.json", None, 0, 3, code=code)


FINISH = "import sys, pathlib; pathlib.Path(sys.argv[1], 'run.json').write_text('{}')"


def test_jobs_run_side_by_side_and_finished_ones_are_left_alone(tmp_path, capsys):
    # Each waits for the other's file: one after the other they would never end.
    meet = (
        "import sys, time, pathlib; here = pathlib.Path(sys.argv[1]); (here / 'up').touch()\n"
        "other = here.parent / {'a': 'b', 'b': 'a'}[here.name] / 'up'\n"
        "while not other.exists(): time.sleep(0.02)\n"
        "(here / 'run.json').write_text('{}')\n"
    )
    jobs = [_script(tmp_path, name, meet) for name in ("a", "b")]
    run_jobs(jobs, engine=LocalEngine(2), progress=True)
    assert all(job.is_finished for job in jobs)
    told = capsys.readouterr().err
    assert "a: 3/3 done" in told
    assert "b: 3/3 done" in told
    done = _script(tmp_path, "a", "raise SystemExit('ran again')")
    run_jobs([done], engine=LocalEngine(), progress=False)


def test_failed_job_tells_its_last_words_and_stops_the_others(tmp_path):
    bad = _script(tmp_path, "bad", "raise SystemExit('no space in the box')")
    slow = _script(tmp_path, "slow", "import time; time.sleep(60)")
    start = time.monotonic()
    with pytest.raises(RunError, match=r"(?s)bad ended with exit status 1.*no space in the box"):
        run_jobs([bad, slow], engine=LocalEngine(2), progress=False)
    assert time.monotonic() - start < 30


def test_job_that_ends_without_a_result_is_an_error(tmp_path):
    with pytest.raises(RunError, match="exit status 0"):
        run_jobs([_script(tmp_path, "empty", "pass")], engine=LocalEngine(), progress=False)


def test_folder_in_use_is_refused_even_when_the_owner_was_killed(tmp_path):
    with locked(tmp_path / "s") as handle:
        with pytest.raises(RunError, match="in use by another search"), locked(tmp_path / "s"):
            pass
        child = subprocess.Popen(
            [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(handle,)
        )
    try:
        with pytest.raises(RunError, match="in use"), locked(tmp_path / "s"):
            pass
    finally:
        child.communicate(b"\n", timeout=30)
    with locked(tmp_path / "s"):
        pass


def test_position_is_read_from_complete_lines_only(tmp_path):
    log = tmp_path / "log.jsonl"
    assert read_position(log) == (0, "")
    log.write_text('{"step": 4, "loss": 1.5}\n{"step": 5, "lo')
    assert read_position(log) == (4, "loss 1.500")
    log.write_text('{"step": 4, "loss": 1.5}\n{"kind": "eval", "step": 5, "ap": 0.5}\n')
    assert read_position(log) == (5, "")


def test_latency_is_the_median_of_turns_on_one_image():
    class Sleeper(torch.nn.Module):
        def __init__(self, seconds):
            super().__init__()
            self.seconds, self.calls = seconds, 0

        def forward(self, images):
            assert not self.training
            self.calls += 1
            # One pass in five is disturbed; the median does not see it.
            time.sleep(0.2 if self.calls == 5 else self.seconds)

    models = {"fast": Sleeper(0.002), "slow": Sleeper(0.02)}
    found = measure_latency(models, torch.rand(3, 8, 8), runs=5)
    assert 2 <= found["fast"] < 15
    assert 20 <= found["slow"] < 100
    assert models["fast"].calls == models["slow"].calls == 8
    with pytest.raises(ValueError, match="latency_runs is 0"):
        measure_latency(models, torch.rand(3, 8, 8), runs=0)


@pytest.mark.parametrize("killed", ["guard", "its parent"])
def test_a_guarded_command_does_not_outlive_what_started_it(tmp_path, killed):
    inner = f"import os, time, pathlib; pathlib.Path({str(tmp_path / 'pid')!r})"
    inner += ".write_text(str(os.getpid())); time.sleep(600)"
    command = [sys.executable, "-P", "-m", "fastcov_detection.search.guard"]
    guard = subprocess.Popen([*command, sys.executable, "-c", inner], stdin=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    inside = int((tmp_path / "pid").read_text())
    if killed == "guard":
        guard.kill()
    else:
        guard.stdin.close()  # as it ends when the parent dies
    guard.wait(60)
    while Path(f"/proc/{inside}").exists():
        state = Path(f"/proc/{inside}/stat").read_text().rpartition(")")[2].split()[0]
        if state == "Z":
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
