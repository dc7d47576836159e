"""Operator and tracker tests of the wheel under further Pythons and torch versions.

Each pair has an environment of its own in build/matrix, kept for the next run. A Python that this
machine lacks is named and left out; at least one must be there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
# The oldest and the newest of both, and the pair that the development environment pins.
MATRIX = [("3.10", "2.10.0"), ("3.11", "2.13.0"), ("3.12", "2.11.0"), ("3.13", "2.14.1")]
PACKAGES = ["numpy", "hypothesis", "pytest", "pytest-benchmark", "pytest-timeout"]
TESTS = ["tests/ops/test_covariance.py", "tests/ops/test_covariance_native.py"]
TESTS += ["tests/ops/test_eigen.py", "tests/ops/test_native.py", "tests/stats/test_state.py"]
TESTS += [
    "tests/spectra/test_spectrum.py",
    "tests/rows/test_sequence.py",
    "tests/tracker/test_tracker.py",
]


def find_python(version: str) -> str | None:
    """An interpreter of this version: on PATH, or one that uv can provide."""
    name = f"python{version}"
    found = shutil.which(name)
    if found and subprocess.run([found, "--version"], capture_output=True).returncode == 0:
        return found
    installed = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}"))
    if installed:
        return str(installed[-1])
    if shutil.which("uv"):
        located = subprocess.run(["uv", "python", "find", version], capture_output=True, text=True)
        return located.stdout.strip() or None
    return None


def check(python: str, version: str, torch: str, wheel: Path) -> int:
    """Exit status of the tests in the pair's environment."""
    folder = ROOT / "build" / "matrix" / f"python{version}-torch{torch}"
    executable = folder / "bin" / "python"
    if not executable.is_file():
        subprocess.run([python, "-m", "venv", folder], check=True)
    pip = [executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    subprocess.run([*pip, f"torch=={torch}", *PACKAGES], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", wheel], check=True)
    # The script in bin/ puts no folder of the checkout on sys.path, and child processes find none
    # in theirs (Python 3.10 knows no PYTHONSAFEPATH): the wheel is what is tested.
    pytest = [folder / "bin" / "pytest", "-q", "-p", "no:cacheprovider"]
    settings = ["--rootdir", ROOT, "-c", ROOT / "pyproject.toml"]
    return subprocess.run(
        [*pytest, *settings, *(ROOT / test for test in TESTS)],
        cwd=folder,
        env={**os.environ, "PYTHONSAFEPATH": "1"},
    ).returncode


def main() -> None:
    """Command line: tests the wheel of a folder; further arguments select Pythons."""
    (wheel,) = Path(sys.argv[1]).resolve().glob("fastcov_torch-*.whl")
    selected = sys.argv[2:]
    results = {}
    for version, torch in MATRIX:
        pair = f"Python {version}, torch {torch}"
        if selected and version not in selected:
            continue
        python = find_python(version)
        if python is None:
            results[pair] = f"left out: no python{version} on this machine"
            continue
        print(f"--- {pair}", flush=True)
        status = check(python, version, torch, wheel)
        results[pair] = "passed" if status == 0 else f"FAILED ({status})"
    for pair, result in results.items():
        print(f"{pair}: {result}")
    if "passed" not in results.values() or any("FAILED" in r for r in results.values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
