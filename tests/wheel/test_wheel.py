"""The built wheel: its tag, its libraries, and that it works beside nothing but torch and numpy."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

ROOT = Path(__file__).parent.parent.parent
OTHER_TORCH = "2.13.0"
OTHER_VENV = ROOT / ".venv-torch213"

pytestmark = pytest.mark.wheel


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = sorted((ROOT / "dist").glob("fastcov_torch-*.whl"))
    assert len(wheels) == 1, f"expected one wheel in dist/, found {wheels}; run `make setup`"
    return wheels[0]


@pytest.fixture(scope="module")
def libraries(wheel: Path) -> dict[str, ELFFile]:
    with zipfile.ZipFile(wheel) as archive:
        return {
            Path(name).name: ELFFile(BytesIO(archive.read(name)))
            for name in archive.namelist()
            if name.endswith(".so")
        }


def needed(library: ELFFile) -> set[str]:
    dynamic = library.get_section_by_name(".dynamic")
    return {tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"}


def test_one_wheel_for_every_python(wheel: Path) -> None:
    assert wheel.name.split("-")[2:4] == ["py3", "none"]
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
    assert "fastcov/lib/libfastcov_cpu.so" in names
    assert "fastcov/py.typed" in names
    assert not [n for n in names if not n.startswith(("fastcov/", "fastcov_torch-"))]


def test_libraries_need_torch_and_the_system_alone(libraries: dict[str, ELFFile]) -> None:
    system = {"libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "libpthread.so.0"}
    system |= {"libdl.so.2", "librt.so.1", "ld-linux-x86-64.so.2"}
    for name, library in libraries.items():
        assert "libtorch.so" in needed(library), name
        assert needed(library) <= system | {"libtorch.so"}, name


def test_libraries_are_no_python_modules(libraries: dict[str, ELFFile]) -> None:
    for library in libraries.values():
        symbols = library.get_section_by_name(".dynsym").iter_symbols()
        assert not [s.name for s in symbols if s.name.startswith(("PyInit", "Py_", "_Py"))]


def test_libraries_use_the_stable_abi_only(libraries: dict[str, ELFFile]) -> None:
    for name, library in libraries.items():
        symbols = library.get_section_by_name(".dynsym").iter_symbols()
        undefined = {s.name for s in symbols if s["st_shndx"] == "SHN_UNDEF"}
        assert not {s for s in undefined if re.match(r"_ZN?K?(2at|3c10|5torch)", s)}, name
        assert {s for s in undefined if s.startswith(("aoti_torch_", "torch_"))}, name


SIX_LINES = """
import contextlib, io, json, sys
printed = io.StringIO()
with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
    import fastcov
assert printed.getvalue() == "", printed.getvalue()
optional = {"triton", "matplotlib", "rich", "torchvision", "scipy", "pandas", "tensorboard"}
extra = sorted(optional & set(sys.modules))

import torch
from torch import nn

class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3)
        self.conv = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.head = nn.Linear(16, 5)
    def forward(self, x):
        x = self.stem(x).relu()
        x = (x + self.norm(self.conv(x))).relu_()
        return self.head(x.mean((2, 3)))

class VisionTransformer(nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 32, 4, 4)
        layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.head = nn.Linear(32, 5)
    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).mT).mean(1))

mlp = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.ReLU(), nn.Linear(64, 5))
result = {}
for model in (Residual(), VisionTransformer(), mlp):
    tracker = fastcov.track(model)
    for _ in range(20):
        model(torch.randn(64, 3, 16, 16)).square().mean().backward()
    summary = tracker.summary()
    print(summary)
    result[type(model).__name__] = [tracker.count(name) for name in tracker.names()]
    exact = fastcov.track(model, rows="all")
    model(torch.randn(64, 3, 16, 16))
    assert all(value.dim() >= 1 for value in exact.spectra().values())
print(json.dumps({
    "torch": torch.__version__,
    "extra": extra,
    "cpu": list(fastcov.backends()["cpu"]),
    "counts": result,
}))
"""


def run_six_lines(python: Path | str, folder: Path) -> dict[str, object]:
    script = folder / "six_lines.py"
    script.write_text(SIX_LINES)
    run = subprocess.run(
        [str(python), "-W", "error::UserWarning:fastcov", str(script)],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return json.loads(run.stdout.strip().splitlines()[-1])


def check(result: dict[str, object]) -> None:
    assert result["extra"] == []
    is_active, reason = result["cpu"]
    assert is_active, reason
    for model, counts in result["counts"].items():
        assert sum(counts) > 0, model


def test_the_installed_wheel_runs_here(tmp_path: Path) -> None:
    check(run_six_lines(sys.executable, tmp_path))


@pytest.mark.slow
def test_it_runs_beside_another_torch_and_nothing_else(wheel: Path, tmp_path: Path) -> None:
    python = OTHER_VENV / "bin" / "python"
    pip = [str(python), "-m", "pip", "install", "-qq"]
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(OTHER_VENV)], check=True)
    subprocess.run([*pip, f"torch=={OTHER_TORCH}", "numpy"], check=True)
    subprocess.run([*pip, "--no-deps", "--force-reinstall", str(wheel)], check=True)
    result = run_six_lines(python, tmp_path)
    assert str(result["torch"]).startswith(OTHER_TORCH)
    check(result)
