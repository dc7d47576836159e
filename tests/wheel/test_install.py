"""The wheel in an environment of its own: torch 2.13.0 and numpy, nothing else.

The environment stays in .venv-torch213, so that only its first use takes minutes.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = ROOT / ".venv-torch213"
REQUIREMENTS = ["torch==2.13.0", "numpy<2.4"]

pytestmark = pytest.mark.wheel


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {
        k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "FASTCOV_BACKEND")
    }
    result = subprocess.run(
        [str(part) for part in command],
        cwd=ENVIRONMENT,
        env={**environment, "OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, f"{command}\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}"
    return result


@pytest.fixture(scope="session")
def python() -> Path:
    """Python of the environment, with the wheel of dist/ in it."""
    wheels = list((ROOT / "dist").glob("fastcov_torch-*.whl"))
    assert len(wheels) == 1, f"{len(wheels)} wheels in {ROOT / 'dist'}: run `make setup`"
    executable = ENVIRONMENT / "bin" / "python"
    stamp = ENVIRONMENT / "installed.json"
    wanted = {
        "requirements": REQUIREMENTS,
        "wheel": hashlib.sha256(wheels[0].read_bytes()).hexdigest(),
    }
    installed = json.loads(stamp.read_text()) if stamp.is_file() else {}
    ENVIRONMENT.mkdir(exist_ok=True)
    pip = (executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check")
    if installed.get("requirements") != REQUIREMENTS:
        run(sys.executable, "-m", "venv", "--clear", ENVIRONMENT)
        run(*pip, *REQUIREMENTS)
    if installed != wanted:
        run(*pip, "--no-deps", "--force-reinstall", wheels[0])
        stamp.write_text(json.dumps(wanted))
    return executable


def test_import_needs_torch_and_numpy_alone_and_prints_nothing(python: Path) -> None:
    code = """
import sys, numpy, torch
before = set(sys.modules)
import fastcov
new = {name.partition(".")[0] for name in set(sys.modules) - before}
unknown = new - set(sys.stdlib_module_names) - {"fastcov", "torch", "numpy"}
assert not unknown, unknown
assert "site-packages" in fastcov.__file__
assert not torch.cuda.is_initialized()
"""
    result = run(python, "-c", code)
    assert result.stdout == ""
    assert result.stderr == ""


def test_environment_holds_no_optional_package(python: Path) -> None:
    listed = json.loads(run(python, "-m", "pip", "list", "--format=json").stdout)
    names = {package["name"].lower() for package in listed}
    assert not names & {"matplotlib", "rich", "torchvision", "transformers", "lightning", "wandb"}
    assert {"torch", "numpy", "fastcov-torch"} <= names


def test_compiled_library_is_in_use(python: Path) -> None:
    code = (
        "import json, torch, fastcov\n"
        "assert torch.__version__.startswith('2.13.0'), torch.__version__\n"
        "print(json.dumps(fastcov.backends()))"
    )
    backends = json.loads(run(python, "-c", code).stdout)
    active, reason = backends["cpu"]
    assert active, reason
    active, reason = backends["cuda"]
    assert reason


MODELS = {
    "mlp": """
model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 5))
inputs = torch.randn(48, 20)
layers = 3
""",
    "resnet": """
class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
    def forward(self, x):
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(x + self.norm2(self.conv2(y)))
model = nn.Sequential(
    nn.Conv2d(3, 16, 3), Block(16), Block(16),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5),
).to(memory_format=torch.channels_last)
inputs = torch.randn(8, 3, 18, 18).to(memory_format=torch.channels_last)
layers = 6
""",
    "vit": """
class ViT(nn.Module):
    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 32, 4, stride=4)
        self.blocks = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, dropout=0.0), 2
        )
        self.head = nn.Linear(32, 5)
    def forward(self, x):
        return self.head(self.blocks(self.patch(x).flatten(2).transpose(1, 2)).mean(1))
model = ViT()
inputs = torch.randn(8, 3, 32, 32)
layers = 8
""",
}


@pytest.mark.parametrize("model", MODELS)
def test_tracking_any_model(python: Path, model: str) -> None:
    code = f"""
import torch
from torch import nn
torch.manual_seed(0)
{MODELS[model]}
import fastcov
tracker = fastcov.track(model)
exact = fastcov.track(model, rows="all")
optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
for _ in range(3):
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(inputs), torch.arange(len(inputs)) % 5).backward()
    optimizer.step()
print(tracker.summary())
assert len(tracker.names()) == layers
spectra = exact.spectra()
assert len(spectra) == layers, sorted(spectra)
for name, spectrum in spectra.items():
    assert spectrum.count > 0 and spectrum.total > 0, name
    assert 1 <= int(spectrum.rank_at(0.99)) <= len(spectrum.eigenvalues), name
tracker.close()
exact.close()
"""
    printed = run(python, "-c", code).stdout
    assert printed.count("\n") > 4


def test_command_line_says_what_is_active(python: Path) -> None:
    printed = run(python.parent / "fastcov", "doctor").stdout
    assert "libfastcov_cpu.so" in printed
