"""README's code runs as printed, and what it names exists."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastcov

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
DISTRIBUTED = (ROOT / "docs" / "guide" / "distributed.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def test_it_is_short() -> None:
    assert len(README.splitlines()) <= 150


def test_the_promise_runs_as_printed(capsys: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), nn.Linear(20, 5))

    def train_step(model: nn.Module, batch: Tensor) -> None:
        model(batch).square().mean().backward()

    names = {"model": model, "loader": [torch.randn(64, 10)] * 4, "train_step": train_step}
    assert BLOCKS
    for block in BLOCKS:
        exec(block, names)
    assert "part. ratio" in capsys.readouterr().out


def test_the_first_example_prints_what_it_says(tmp_path: Path) -> None:
    (script,) = re.findall(r"```py\n(# directions\.py\n.*?)```", README, re.DOTALL)
    (table,) = re.findall(r"```text\n(layer .*?)```", README, re.DOTALL)
    (tmp_path / "directions.py").write_text(script)
    done = run(["directions.py"], tmp_path)
    assert done.returncode == 0, done.stderr
    shown, printed = (text.splitlines() for text in (table, done.stdout))
    assert shown[:2] == printed[:2]
    assert len(shown) == len(printed) == 6
    assert shown[-1] == printed[-1]  # the parameters that are watched
    for one, other in zip(shown[2:-1], printed[2:-1], strict=True):
        ours, theirs = ([float(cell) for cell in line.split()] for line in (one, other))
        assert ours[:3] == theirs[:3]
        # Processors round differently, and 50 steps of training carry that on.
        assert theirs[3:] == pytest.approx(ours[3:], rel=0.1, abs=1)


def run(arguments: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(fastcov.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


@pytest.mark.dist
@pytest.mark.slow
def test_the_distributed_example_runs_as_printed(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    (script,) = re.findall(r"```py\n(# train\.py\n.*?)```", DISTRIBUTED, re.DOTALL)
    script = script.replace("64, 64", "32, 32")
    (tmp_path / "train.py").write_text(script)
    (command,) = re.findall(r"^torchrun (.* train\.py)$", DISTRIBUTED, re.MULTILINE)
    done = run(["-m", "torch.distributed.run", "--standalone", *command.split()], tmp_path)
    assert done.returncode == 0, done.stderr
    (fc,) = (line for line in done.stdout.splitlines() if line.startswith("fc "))
    assert fc.split()[1] == "10"
    assert fastcov.load_history(tmp_path / "runs" / "resnet18").steps() == [2, 4]
    (command,) = re.findall(r"^fastcov (report \S+)", DISTRIBUTED, re.MULTILINE)
    done = run(["-m", "fastcov.cli", *command.split()], tmp_path)
    assert done.returncode == 0, done.stderr
    assert "2 snapshots" in done.stdout


def test_commands_and_files_that_it_names_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"`?make ([a-z-]+)", README))
    assert {"demo", "docs", "test", "setup", "bench-gpu"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / link).exists(), link


def test_the_unrelated_package_is_never_installed() -> None:
    for document in (*ROOT.glob("*.md"), *ROOT.glob("detection/*.md"), *ROOT.glob("docs/**/*.md")):
        assert not re.search(r"pip install (\S+ )*fastcov(?![-_]torch)\b", document.read_text())
