"""Compiles the C++ test programs once for a run, and hands matrices to them."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
COMPILER = shutil.which("g++") or shutil.which("c++")
KERNELS = ("registers", "triangle", "members", "jacobi", "library")

Run = Callable[..., tuple[Tensor, str]]
Check = Callable[..., subprocess.CompletedProcess[bytes]]
TSAN = ("-O1", "-g", "-fsanitize=thread")


def _compile(folder: Path, name: str, source: Path, *options: str) -> Path:
    if COMPILER is None:
        pytest.fail("no C++ compiler on PATH (g++): it builds the package as well")
    command = [COMPILER, "-std=c++20", "-fopenmp-simd", "-Wall", "-Wextra", "-Wno-psabi"]
    command += [f"-I{HERE}", f"-I{CSRC}", *options, str(source), "-o", str(folder / name)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "warning:" not in run.stderr, run.stderr[-4000:]
    return folder / name


def _compile_emulation(folder: Path, kernels: tuple[str, ...], *options: str) -> Path:
    """emulated_eigen.cpp with the kernels; CHECK_RACES among the options is for the runtime."""
    folder.mkdir()
    common = ["-Wno-unknown-pragmas", "-fno-extern-tls-init", f"-I{HERE / 'emulated'}"]
    is_checked = TSAN[-1] in options

    def compile_one(name: str) -> str:
        if name == "runtime":
            own = ["-O2", *(["-DFASTCOV_CHECK_RACES"] if is_checked else [])]
            source = HERE / "emulated" / "runtime.cpp"
            return str(_compile(folder, "runtime.o", source, *common, *own, "-c"))
        kernel = f'-DFASTCOV_KERNEL_FILE="{CSRC / f"eigen_{name}.cu"}"'
        source = HERE / "emulated_kernels.cpp"
        return str(_compile(folder, f"{name}.o", source, *common, *options, kernel, "-c"))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, ("runtime", *kernels)))
    source = HERE / "emulated_eigen.cpp"
    return _compile(folder, "emulated", source, *common, *options, "-pthread", *objects)


def _fused_options() -> list[str]:
    # As a GPU does: products and sums contracted, which shows where two copies of one expression
    # have to agree and do not.
    flags = Path("/proc/cpuinfo")
    has_fma = flags.is_file() and " fma " in flags.read_text() and " avx2 " in flags.read_text()
    return ["-march=x86-64-v3", "-ffp-contract=fast"] if has_fma else []


def _start(
    program: Path,
    arguments: tuple[object, ...],
    matrices: Tensor | None,
    environment: Mapping[str, str] | None = None,
    prefix: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[bytes]:
    data = b"" if matrices is None else matrices.double().contiguous().numpy().tobytes()
    return subprocess.run(
        [*prefix, str(program), *map(str, arguments)],
        input=data,
        capture_output=True,
        check=False,
        env={**os.environ, **(environment or {})},
    )


def _runner(program: Path) -> Run:
    """Output of the program as float64, and its messages."""

    def run(
        *arguments: object,
        matrices: Tensor | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> tuple[Tensor, str]:
        done = _start(program, arguments, matrices, environment)
        assert done.returncode == 0, f"status {done.returncode}: {done.stderr.decode()[-3000:]}"
        return torch.frombuffer(bytearray(done.stdout), dtype=torch.float64), done.stderr.decode()

    return run


def _checker(program: Path) -> Check:
    """A run under ThreadSanitizer, which fails where accesses race."""
    # Address randomisation of newer kernels and the sanitizer's memory map do not go together.
    prefix = ("setarch", "-R") if shutil.which("setarch") else ()

    def run(
        *arguments: object, matrices: Tensor, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[bytes]:
        return _start(program, arguments, matrices, environment, prefix)

    return run


@pytest.fixture(scope="session")
def families() -> dict[str, Callable[[int], Tensor]]:
    """The matrices of tests/ops/test_eigen.py: name -> function of the order."""
    path = HERE.parent / "ops" / "test_eigen.py"
    spec = importlib.util.spec_from_file_location("eigen_families", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAMILIES


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="session")
def teams(folder: Path) -> Run:
    """eigen_teams.cpp: the algorithm over host teams."""
    source = HERE / "eigen_teams.cpp"
    return _runner(_compile(folder, "teams", source, "-O2", "-pthread", *_fused_options()))


@pytest.fixture(scope="session")
def checked_teams(folder: Path) -> Check:
    """The same under ThreadSanitizer."""
    source = HERE / "eigen_teams.cpp"
    return _checker(_compile(folder, "checked", source, *TSAN, "-pthread"))


@pytest.fixture(scope="session")
def crew(folder: Path) -> Run:
    """eigen_crew.cpp: the reduction of a large matrix by threads."""
    source = HERE / "eigen_crew.cpp"
    return _runner(_compile(folder, "crew", source, "-O2", "-pthread", *_fused_options()))


@pytest.fixture(scope="session")
def checked_crew(folder: Path) -> Check:
    """The same under ThreadSanitizer."""
    source = HERE / "eigen_crew.cpp"
    return _checker(_compile(folder, "checked_crew", source, *TSAN, "-pthread"))


@pytest.fixture(scope="session")
def tiles(folder: Path) -> Run:
    """covariance_tiles.cpp: what the driver of accumulate_ multiplies, and on how many threads."""
    headers = Path(torch.__file__).parent / "include"
    options = ("-O2", "-isystem", str(headers), "-DTORCH_TARGET_VERSION=0x020a000000000000")
    return _runner(_compile(folder, "tiles", HERE / "covariance_tiles.cpp", *options))


@pytest.fixture(scope="session")
def emulated(folder: Path) -> Run:
    """emulated_eigen.cpp: the GPU's kernels on the host."""
    return _runner(_compile_emulation(folder / "emulated", KERNELS, "-O1", *_fused_options()))


@pytest.fixture(scope="session")
def checked_kernels(folder: Path) -> Check:
    """The same under ThreadSanitizer: a race detector for what shares memory."""
    return _checker(_compile_emulation(folder / "checked_kernels", KERNELS, *TSAN))
