"""Gates of the compiled libraries: what is opened, what is not, and the reason that is given."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcov.ops import library, native
from fastcov.stats import cursor

COMPILED = (
    "accumulate_",
    "accumulate_affine_",
    "accumulate_again_",
    "gather_",
    "gather_again_",
    "eigvalsh",
    "eigh",
    "count_above",
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A library folder of this test's own, and gates that have not been tried."""
    monkeypatch.delenv(native.BACKEND_SWITCH, raising=False)
    monkeypatch.setattr(native, "LIBRARY_FOLDER", tmp_path)
    return tmp_path


@pytest.fixture
def cuda_folder(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (folder / "libfastcov_cuda.so").write_bytes(b"")
    record = {"cuda": "13.0", "cuda_archs": "80;90", "interface": str(native.INTERFACE)}
    (folder / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(native, "_driver_cuda_version", lambda: 13000)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(native, "_compute_capabilities", lambda: [90])
    return folder


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def test_cpu_library_serves_the_operators() -> None:
    active, reason = native.status()["cpu"]
    assert active, reason
    assert reason.startswith("libfastcov_cpu.so with ")
    for operator in ("accumulate_", "gather_"):
        registered = torch._C._dispatch_dump(f"fastcov::{operator}")
        cpu = next(line for line in registered.splitlines() if line.startswith("CPU:"))
        # What Python registers is attributed to its file, what a library does to csrc/.
        assert "_cpu.cpp" in cpu


@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "avx2", "avx512"])
def test_a_lower_instruction_set_can_be_asked_for(level: str) -> None:
    result = run_python(
        "import fastcov; print(fastcov.backends()['cpu'].reason)", FASTCOV_CPU_LEVEL=level
    )
    assert result.returncode == 0, result.stderr
    name = result.stdout.strip().removeprefix("libfastcov_cpu.so with ").removesuffix(" kernels")
    levels = ["baseline", "avx2", "avx512", "amx"]
    # Never more than was asked for; less where the machine has less.
    assert levels.index(name) <= levels.index(level)


def test_excluded_by_the_switch_falls_back_to_plain_torch() -> None:
    result = run_python(
        "import torch, fastcov\n"
        "print(fastcov.backends()['cpu'])\n"
        "print(fastcov.ops.covariance(torch.tensor([[1.0], [3.0]])).item())",
        FASTCOV_BACKEND="torch",
    )
    assert result.returncode == 0, result.stderr
    reason, value = result.stdout.splitlines()
    assert reason == "Backend(active=False, reason='excluded by FASTCOV_BACKEND=torch')"
    assert float(value) == 5.0


def test_unknown_backend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.BACKEND_SWITCH, "native,cuda")
    with pytest.raises(ValueError, match="'cuda'; use a comma-separated list of native, triton"):
        native.allowed_backends()


def test_plain_torch_is_always_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.BACKEND_SWITCH, " native ")
    assert native.allowed_backends() == {"native", "torch"}


def test_missing_library_is_named(folder: Path) -> None:
    with pytest.raises(native.UnavailableError, match=r"no libfastcov_cpu\.so in"):
        native.load_cpu()


def test_broken_library_warns_and_gives_the_loaders_words(folder: Path) -> None:
    (folder / "libfastcov_cpu.so").write_bytes(b"not a library")
    (folder / "build.json").write_text(json.dumps({"interface": str(native.INTERFACE)}))
    with (
        pytest.warns(RuntimeWarning, match="without its compiled code"),
        pytest.raises(native.UnavailableError, match=r"libfastcov_cpu\.so does not load"),
    ):
        native.load_cpu()


@pytest.mark.parametrize("record", [{}, {"interface": "1"}])
def test_library_of_other_sources_is_not_opened(
    folder: Path, record: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (folder / "libfastcov_cpu.so").write_bytes(b"")
    (folder / "build.json").write_text(json.dumps(record))
    monkeypatch.setattr(torch.ops, "load_library", None)
    with (
        pytest.warns(RuntimeWarning, match="without its compiled code"),
        pytest.raises(native.UnavailableError, match=r"\(interface 1, not \d+\): install fastcov"),
    ):
        native.load_cpu()


def test_a_changed_schema_has_another_interface() -> None:
    schemas = [str(getattr(library.operators, name).default._schema) for name in COMPILED]
    fields = (cursor.LAYOUT, cursor.FIELDS)
    digest = hashlib.sha256(f"{schemas} {fields}".encode()).hexdigest()[:16]
    # Where this fails, raise INTERFACE and write both here: libraries built before are refused.
    assert (native.INTERFACE, digest) == (4, "456a4c359e3ab2b0")


def test_cuda_library_needs_a_cuda_build_of_torch(
    cuda_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(native.UnavailableError, match="is not a CUDA build"):
        native.load_cuda()


def test_cuda_library_needs_a_driver(cuda_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "_driver_cuda_version", lambda: 0)
    with pytest.raises(native.UnavailableError, match="no NVIDIA driver"):
        native.load_cuda()


def test_cuda_library_needs_a_driver_of_its_toolkits_major(
    cuda_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_driver_cuda_version", lambda: 12080)
    with pytest.raises(native.UnavailableError, match=r"CUDA 13\.0, but the driver .* CUDA 12\.8;"):
        native.load_cuda()


def test_cuda_library_needs_a_gpu(cuda_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(native.UnavailableError, match="no GPU"):
        native.load_cuda()


def test_cuda_library_needs_code_for_the_gpu(
    cuda_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(native, "_open", lambda path: None)
    for found in ([], [86], [90, 75], [120]):  # none known, its major's, one of two, by PTX
        monkeypatch.setattr(native, "_compute_capabilities", lambda found=found: found)
        assert native.load_cuda().startswith("libfastcov_cuda.so")
    monkeypatch.setattr(native, "_compute_capabilities", lambda: [75])
    with pytest.raises(native.UnavailableError, match="for sm_80, sm_90, the GPU is sm_75: inst"):
        native.load_cuda()


def test_capabilities_are_unknown_without_nvml(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(native.ctypes, "CDLL", absent)
    assert native._compute_capabilities() == []


def test_cuda_library_needs_its_build_record(cuda_folder: Path) -> None:
    (cuda_folder / "build.json").unlink()
    with pytest.raises(native.UnavailableError, match=r"build\.json is missing"):
        native.load_cuda()


def test_open_gates_open_the_library(cuda_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []
    monkeypatch.setattr(native, "_open", opened.append)
    assert native.load_cuda() == "libfastcov_cuda.so built with CUDA 13.0"
    assert opened == [cuda_folder / "libfastcov_cuda.so"]


def test_status_without_a_gpu_never_fails() -> None:
    result = run_python(
        "import fastcov\nassert not fastcov.backends()['cuda'].active\n"
        "import torch\nassert not torch.cuda.is_initialized()",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_asking_makes_no_cuda_context() -> None:
    result = run_python(
        "import torch, fastcov\nfastcov.backends()\nassert not torch.cuda.is_initialized()"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.gpu
def test_cuda_library_gathers_on_this_gpu() -> None:
    active, reason = native.status()["cuda"]
    assert active, reason
    assert "gather.cu" in torch._C._dispatch_dump("fastcov::gather_")
