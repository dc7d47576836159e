"""The source distribution installs where nothing can be compiled, and plain torch does the work."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

USE = """
import json, torch, fastcov
rows = torch.randn(500, 8)
state = fastcov.CovarianceState(8)
state.update(rows)
exact = rows.double().T @ rows.double() / 500
assert float((state.covariance() - exact).abs().max()) < 1e-5
model = torch.nn.Linear(8, 4)
tracker = fastcov.track(model, rows="all")
model(rows).sum().backward()
assert tracker.spectrum("").count == 500
print(json.dumps({name: list(backend) for name, backend in fastcov.backends().items()}))
"""


def run(*command: str | Path, folder: Path, **environment: str) -> str:
    outside = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=folder,
        env={**outside, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.wheel
@pytest.mark.slow
def test_without_a_compiler_plain_torch_serves(tmp_path: Path) -> None:
    pip = (sys.executable, "-m", "pip", "wheel", "-qq", "--no-deps", "--no-build-isolation")
    run(sys.executable, "-m", "build", "-n", "-s", "-o", tmp_path, ROOT, folder=tmp_path)
    (sdist,) = tmp_path.glob("fastcov_torch-*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"csrc/eigen_cpu.cpp", "CMakeLists.txt", "fastcov/tracker.py"} <= names
    # A missing file in CXX hides every compiler; nvcc has its own switch.
    run(
        *(*pip, "-w", tmp_path, sdist),
        folder=tmp_path,
        CXX=str(tmp_path / "no-compiler"),
        FASTCOV_CUDA="0",
    )
    (wheel,) = tmp_path.glob("*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.endswith(".so")]
        archive.extractall(installed)
    printed = run(sys.executable, "-c", USE, folder=tmp_path, PYTHONPATH=str(installed))
    active, reason = json.loads(printed)["cpu"]
    assert not active
    assert "no C++ compiler" in reason
