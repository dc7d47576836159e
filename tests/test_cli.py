"""The command line, as a process would call it."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcov
from fastcov.cli import main


def _run(folder: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3))
    with fastcov.track(model, rows="all", snapshot_every=1, out=folder):
        for _ in range(3):
            model(torch.randn(256, 6))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("package", ["fastcov", "fastcov_detection"])
def test_a_package_is_its_command_line(package: str) -> None:
    command = [sys.executable, "-m", package, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"usage: {package.replace('_', '-')}")


def test_doctor_prints_versions_devices_and_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    lines = {line[:15].strip(): line for line in said.splitlines()}
    assert fastcov.__version__ in lines["fastcov"]
    assert torch.__version__ in lines["torch"]
    assert "threads" in lines["cpu"]
    for name, backend in fastcov.backends().items():
        state = "active" if backend.active else "not active"
        assert lines[f"kernels: {name}"].endswith(f"  {state}: {backend.reason}")


def test_report_writes_into_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = _run(tmp_path / "run", 0)
    assert main(["report", str(folder)]) == 0
    assert "3 snapshots of 2 layers" in capsys.readouterr().out
    assert "<h1>fastcov: " in (folder / "report.html").read_text()
    assert main(["report", str(folder), "--out", str(tmp_path / "p.html"), "--title", "T"]) == 0
    assert "<h1>T</h1>" in (tmp_path / "p.html").read_text()


def test_compare_prints_a_table_and_writes_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = _run(tmp_path / "a", 0), _run(tmp_path / "b", 1)
    monkeypatch.chdir(tmp_path)
    assert main(["compare", str(a), str(b), "--threshold", "0.01"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == [f"a: {a}", f"b: {b}"]
    last = [fastcov.load_history(folder)[-1].spectra["0"] for folder in (a, b)]
    cells = said[4].split()
    assert cells[:5] == ["0", "12", "12", *[str(spectrum.dim(0.01)) for spectrum in last]]
    assert "above 0.01 of the largest" in said[6]
    assert (tmp_path / "comparison.html").read_text().count("<img") == 4


def test_a_history_one_folder_down_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _run(tmp_path / "run" / "spectra", 0)  # where a detector's run keeps it
    assert main(["report", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert f"there is one in {tmp_path / 'run' / 'spectra'}: give that folder" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["report", "missing"], "no history in missing"),
        (["compare", "missing", "missing"], "no history in missing"),
        (["compare", "run", "run", "--threshold", "-1"], "threshold must be finite"),
        (
            ["report", "run", "--out", "run/history.jsonl/page.html"],
            "fastcov: cannot write the page run/",
        ),
        (["report", "damaged"], "line 1: no snapshot"),
    ],
)
def test_an_error_is_one_line_and_exit_code_2(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    _run(tmp_path / "run", 0)
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "history.jsonl").write_text("{}\n{}\n")
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = said.err.splitlines()
    assert line.startswith("fastcov: ")
    assert message in line


@pytest.mark.parametrize("arguments", [[], ["doctr"], ["report"], ["compare", "one"]])
def test_wrong_usage_is_one_line_and_exit_code_2(
    capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--help" in line


def test_the_module_runs_as_a_process() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fastcov.cli", "--version"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout == f"fastcov {fastcov.__version__}\n"
