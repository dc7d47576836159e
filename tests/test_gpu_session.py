"""A session on a GPU, rehearsed: the script runs whole, and programs stand in for a GPU's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "tools" / "gpu_session.sh"

# In place of python, answers the script without a GPU. One file of tests hangs, as in a kernel; one
# fails; one ends by a signal, as after an error of the driver's.
PYTHON = """#!/bin/bash
case "$*" in
*get_device_capability*) echo 90 ;;
*"import numpy, pytest, torch"*) ;;
*"import fastcov"*) echo "cuda: stand-in" ;;
*tests.kernels.aot*) echo "186 kernels in the cache: $*" ;;
*"-m pytest "*test_eigen_gpu.py*) sleep 60 ;;
*"-m pytest "*test_buffered.py*) echo "1 failed"; exit 1 ;;
*"-m pytest "*test_devices.py*) kill -SEGV $$ ;;
*"-m pytest "*) echo "3 passed" ;;
*fastcov.bench*)
    sleep "${SLOW_S:-0}"
    echo "bench $*"; out=${@: -1}; mkdir -p "$out"; echo '{}' > "$out/eigen.json" ;;
*) exec @PYTHON@ "$@" ;;
esac
"""
TORCH = """
class cuda:
    @staticmethod
    def get_device_name():
        return "NVIDIA H200"
__version__ = "2.11.0"
"""


@pytest.fixture
def session(tmp_path: Path):
    """Runs parts; gives status, output and the folder of results."""
    tools = tmp_path / "tools"
    tools.mkdir()
    programs = dict.fromkeys(("nvcc", "cmake", "ninja"), "#!/bin/bash\n")
    programs["python3"] = PYTHON.replace("@PYTHON@", sys.executable)
    programs["compute-sanitizer"] = (
        "#!/bin/bash\necho '===== Error: Device not supported'; exit 1\n"
    )
    for name, text in programs.items():
        (tools / name).write_text(text)
        (tools / name).chmod(0o755)
    stand_in = tmp_path / "torch"
    stand_in.mkdir()
    (stand_in / "torch.py").write_text(TORCH)
    results = tmp_path / "results"

    def run(*parts: str, **environment: str) -> tuple[int, str, Path]:
        done = subprocess.run(
            [str(SCRIPT), *parts],
            env={
                **os.environ,
                "PATH": f"{tools}{os.pathsep}{os.environ['PATH']}",
                "PYTHONPATH": str(stand_in),
                "OUT": str(results),
                "FILE_S": "2",
                **environment,
            },
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout + done.stderr, results

    return run


def notes(results: Path) -> dict[str, dict[str, object]]:
    lines = (results / "status.jsonl").read_text().splitlines()
    return {note["part"]: note for note in map(json.loads, lines)}


def test_one_file_of_tests_that_hangs_or_crashes_costs_that_file(session) -> None:
    status, output, results = session("test")
    assert status == 1, output
    statuses = {path.stem: int(path.read_text()) for path in (results / "test").glob("*.status")}
    assert len(statuses) >= 9, output
    assert statuses.pop("tests-ops-test_eigen_gpu") == 124  # ended by `timeout`
    assert statuses.pop("tests-ops-test_buffered") == 1
    assert statuses.pop("tests-training-test_devices") == 139
    assert {*statuses.values()} == {0}
    assert notes(results)["test"]["status"] == 1
    with tarfile.open(results / "test.tgz") as packed:
        assert "test/tests-kernels-test_gpu.log" in packed.getnames()
    # Called again it has nothing left to run.
    status, output, _ = session("test")
    assert status == 0
    assert "passed" not in output


def test_files_for_which_no_time_is_left_wait_for_another_call(session) -> None:
    status, output, results = session("test", LIMIT_S="20")
    assert status != 0
    assert output.count("not run yet, call again") >= 9
    assert not list((results / "test").glob("*.status"))


def test_every_other_part_runs_and_leaves_one_archive(session) -> None:
    listed = session("list")[1].split()
    parts = [part for part in listed if part != "test"]
    assert len(parts) == len({*parts}) == 15
    status, output, results = session(*parts)
    assert status == 0, output
    assert {*notes(results)} == {*parts}
    assert {note["status"] for note in notes(results).values()} == {0}
    assert {note["device"] for note in notes(results).values()} == {"NVIDIA H200"}
    assert {path.name for path in results.glob("*.tgz")} == {f"{part}.tgz" for part in parts}
    assert "--cache 90 --workers 16" in output
    for tool in ("memcheck", "racecheck", "synccheck"):
        assert f"{tool}: not available: Error: Device not supported" in output
    with tarfile.open(results / "bench-eigen.tgz") as packed:
        assert "bench-eigen/eigen.json" in packed.getnames(), output


def test_three_calls_run_every_part_once_and_in_order(session) -> None:
    listed = session("list")[1].split()
    ran = []
    for number in (1, 2, 3):
        status, output, results = session(f"call-{number}")
        assert status == (1 if number == 1 else 0), output  # tests fail, see PYTHON
        lines = (results / "status.jsonl").read_text().splitlines()
        ran.append([json.loads(line)["part"] for line in lines][sum(map(len, ran)) :])
    assert [part for call in ran for part in call] == [
        "build",
        "kernels",
        "test",
        *(part for part in listed if part.startswith("bench") and "compiled" not in part),
        *(part for part in listed if part.startswith("sanitize")),
        *(part for part in listed if part.endswith("-compiled")),
    ]
    assert {part for call in ran for part in call} == {*listed}


@pytest.mark.slow
def test_a_call_ends_in_time_whatever_its_parts_take(session) -> None:
    """A part gets what is left of its call, and none begins with too little."""
    begin = time.monotonic()
    status, output, results = session("call-2", CALL_S="9", LEAST_S="3", SLOW_S="4")
    assert time.monotonic() - begin < 30  # the calls of the stand-in for python among it
    assert status != 0
    assert "no time was left for:" in output
    done = notes(results)
    assert 1 <= len(done) <= 3
    assert all(note["seconds"] <= 10 for note in done.values())
    left_out = output.partition("no time was left for:")[2].splitlines()[0].split()
    assert len(done) + len(left_out) == 7
    assert "bench-training-faster_rcnn" in left_out


def test_libraries_may_have_been_built_elsewhere(session, tmp_path: Path) -> None:
    (tmp_path / "tools" / "cmake").write_text("#!/bin/bash\nexit 1\n")
    status, output, _ = session("build")
    assert status == 1, output
    status, output, _ = session("build", PREBUILT="1")
    assert status == 0, output
    assert "cuda: stand-in" in output


@pytest.mark.parametrize(
    ("parts", "message"), [((), "or one or more of"), (("bench",), "no part 'bench'")]
)
def test_wrong_parts_are_named(session, parts: tuple[str, ...], message: str) -> None:
    status, output, _ = session(*parts)
    assert status == 2
    assert message in output


def test_nvcc_is_found_where_toolkits_put_it() -> None:
    assert "/usr/local/cuda/bin" in SCRIPT.read_text()
