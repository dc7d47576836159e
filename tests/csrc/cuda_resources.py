"""Registers, spills and shared memory of the CUDA kernels, from ptxas: tables that a test compares.

``python tests/csrc/cuda_resources.py`` compiles them all and writes tests/resources/; with
``--spills`` it compiles them for every architecture of the wheels and fails where one spills.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
RESOURCES = HERE.parent / "resources"
COMMAND = "python tests/csrc/cuda_resources.py"

OPTIONS = (
    "-std=c++20", "-O3", "-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000",
    "-Xcompiler", "-fPIC", "-Xptxas", "-v", "-diag-suppress", "20012,20014",
)  # fmt: skip
"""Of nvcc, without paths and architectures."""

Resources = dict[str, int]
ByArchitecture = dict[str, dict[str, Resources]]


class Table(NamedTuple):
    """Content of one file of tests/resources/."""

    sources: tuple[str, ...]
    archs: tuple[int, ...]


TABLES = {
    "eigen": Table(
        (
            "eigen_jacobi.cu",
            "eigen_library.cu",
            "eigen_members.cu",
            "eigen_registers.cu",
            "eigen_triangle.cu",
        ),
        (80, 90),
    ),
    # The oldest and the newest that wheels hold, and the one that is tuned for.
    "gather": Table(("gather.cu", "gather_counted.cu"), (75, 90, 120)),
}


def path_of(name: str) -> Path:
    """Where a table is committed."""
    return RESOURCES / f"{name}.json"


def compiler() -> str:
    """nvcc: the machine's, else the one of this Python's packages, as CMakeLists.txt chooses."""
    packages = importlib.util.find_spec("nvidia")
    folders = packages.submodule_search_locations if packages else []
    path = os.pathsep.join([os.environ["PATH"], *(f"{folder}/cu13/bin" for folder in folders)])
    nvcc = shutil.which("nvcc", path=path)
    if nvcc is None:
        raise RuntimeError(f"no nvcc in {path}: run make setup, which installs nvidia-cuda-nvcc")
    return nvcc


def nvcc_release() -> str:
    """Version of the compiler, whose numbers a table holds, such as 13.0."""
    command = [compiler(), "--version"]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([0-9.]+)", text).group(1)


def torch_headers() -> Path:
    """Headers of the installed torch, which is not imported."""
    found = importlib.util.find_spec("torch")
    if found is None or found.origin is None:
        raise RuntimeError("torch is not installed: its headers are needed to compile csrc/")
    return Path(found.origin).parent / "include"


def readable(mangled: str) -> str:
    """Kernel and template arguments: eigen_warp_kernel<float, 8>."""
    filt = shutil.which("c++filt") or "cu++filt"
    text = subprocess.run([filt, mangled], capture_output=True, text=True, check=True).stdout
    name = re.sub(r"\(anonymous namespace\)::|\(int\)|fastcov::|portable::", "", text.strip())
    name = re.sub(r"^void ", "", name)
    return name.partition("(")[0]


def included(source: str, folder: Path = CSRC) -> set[str]:
    """Files of csrc/ that a source is compiled from: itself, and what it includes, and so on."""
    found: set[str] = set()
    waiting = [source]
    while waiting:
        name = waiting.pop()
        if name not in found and (folder / name).is_file():
            found.add(name)
            text = (folder / name).read_text("utf-8")
            waiting += re.findall(r'^\s*#\s*include\s*"([^"]+)"', text, re.MULTILINE)
    return found


def code(text: str) -> str:
    """C++ without comments, every space or end of a line as one space."""
    parts = re.sub(
        r"""("(?:\\.|[^"\\\n])*")|//[^\n]*|/\*.*?\*/""",
        lambda match: match[1] or " ",
        text,
        flags=re.DOTALL,
    )
    return " ".join(parts.split())


def fingerprint(source: str, archs: tuple[int, ...], folder: Path = CSRC) -> str:
    """Hash of everything of ours that a source's resources follow from; comments do not count."""
    digest = hashlib.sha256(repr((OPTIONS, archs)).encode())
    for name in sorted(included(source, folder)):
        digest.update(f"{name}\n{code((folder / name).read_text('utf-8'))}\n".encode())
    return digest.hexdigest()[:16]


def compile_source(source: str, archs: tuple[int, ...]) -> ByArchitecture:
    """Resources of each kernel of csrc/<source>, by architecture and kernel."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler(), "-c", str(CSRC / source), "-o", f"{folder}/kernels.o", *OPTIONS]
        command += ["-isystem", str(torch_headers()), "--threads", "2"]
        command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
        run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        raise RuntimeError(f"{source} does not compile:\n{run.stderr[-4000:]}")
    table: ByArchitecture = {f"sm_{arch}": {} for arch in archs}
    for report in (run.stdout + run.stderr).split("Compiling entry function '")[1:]:
        mangled, arch = re.match(r"(\w+)' for '(sm_\w+)'", report).groups()
        stack, stores, loads = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
        ).groups()
        shared = re.search(r"(\d+) bytes smem", report)
        table[arch][readable(mangled)] = {
            "registers": int(re.search(r"Used (\d+) registers", report).group(1)),
            "spills": int(stores) + int(loads),
            "stack": int(stack),
            "shared": int(shared.group(1)) if shared else 0,
        }
    return table


def wheel_archs() -> tuple[int, ...]:
    """Architectures that a wheel holds, as the build lists them."""
    text = (CSRC.parent / "cmake" / "cuda.cmake").read_text("utf-8")
    (listed,) = re.findall(r"^set\(wheel_archs ([0-9 ]+)\)$", text, re.MULTILINE)
    return tuple(map(int, listed.split()))


def check_spills() -> None:
    """Ends the program with a message if a kernel spills or uses local memory anywhere."""
    archs = wheel_archs()
    for source in (source for table in TABLES.values() for source in table.sources):
        for arch, kernels in compile_source(source, archs).items():
            for kernel, numbers in kernels.items():
                if numbers["spills"] or numbers["stack"]:
                    sys.exit(f"{source}: {kernel} spills on {arch}: {numbers}")
    sys.stdout.write(f"no CUDA kernel spills on sm_{', sm_'.join(map(str, archs))}\n")


def main() -> None:
    """Writes every table, or looks for spills."""
    if sys.argv[1:] == ["--spills"]:
        check_spills()
        return
    for name, (sources, archs) in TABLES.items():
        table: dict[str, object] = {source: compile_source(source, archs) for source in sources}
        table["nvcc"] = nvcc_release()
        table["fingerprints"] = {source: fingerprint(source, archs) for source in sources}
        path_of(name).write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
        sys.stdout.write(f"{path_of(name)}\n")


if __name__ == "__main__":
    main()
