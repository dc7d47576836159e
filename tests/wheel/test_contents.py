"""Contents of the wheel in dist/: one pure tag, two libraries, no Python module, no CUDA."""

from __future__ import annotations

import io
import json
import re
import zipfile
from pathlib import Path

import pytest
from elftools.elf.dynamic import DynamicSection
from elftools.elf.elffile import ELFFile
from elftools.elf.gnuversions import GNUVerNeedSection
from elftools.elf.sections import SymbolTableSection

DIST = Path(__file__).resolve().parents[2] / "dist"
SYSTEM = {
    "ld-linux-x86-64.so.2",
    "libc.so.6",
    "libdl.so.2",
    "libgcc_s.so.1",
    "libm.so.6",
    "libpthread.so.0",
    "librt.so.1",
    "libstdc++.so.6",
}


@pytest.fixture(scope="module")
def wheel() -> Path:
    wheels = list(DIST.glob("fastcov_torch-*.whl"))
    assert len(wheels) == 1, f"{len(wheels)} wheels in {DIST}: run `make setup`"
    return wheels[0]


@pytest.fixture(scope="module")
def libraries(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {Path(name).name: archive.read(name) for name in archive.namelist() if ".so" in name}


def needed(content: bytes) -> set[str]:
    section = ELFFile(io.BytesIO(content)).get_section_by_name(".dynamic")
    assert isinstance(section, DynamicSection)
    return {tag.needed for tag in section.iter_tags("DT_NEEDED")}


def newest(content: bytes, prefix: str) -> tuple[int, ...]:
    section = ELFFile(io.BytesIO(content)).get_section_by_name(".gnu.version_r")
    assert isinstance(section, GNUVerNeedSection)
    names = [aux.name for _, auxiliaries in section.iter_versions() for aux in auxiliaries]
    found = [re.fullmatch(rf"{prefix}_([0-9.]+)", name) for name in names]
    return max((tuple(map(int, m.group(1).split("."))) for m in found if m), default=(0,))


def symbols(content: bytes) -> tuple[set[str], set[str]]:
    """Names that the library gives, and names that it needs."""
    section = ELFFile(io.BytesIO(content)).get_section_by_name(".dynsym")
    assert isinstance(section, SymbolTableSection)
    given, wanted = set(), set()
    for symbol in section.iter_symbols():
        (wanted if symbol["st_shndx"] == "SHN_UNDEF" else given).add(symbol.name)
    return given, wanted


def test_one_tag_for_every_python(wheel: Path) -> None:
    assert re.fullmatch(r"fastcov_torch-\d+\.\d+\.\d+-py3-none-\w*linux_\w+\.whl", wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        text = archive.read(name).decode()
    assert "Root-Is-Purelib: false" in text
    assert re.findall(r"^Tag: py3-none-", text, re.MULTILINE)


def test_package_is_complete_and_nothing_else_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        record = json.loads(archive.read("fastcov/lib/build.json"))
        entry_points = archive.read(
            next(name for name in names if name.endswith("entry_points.txt"))
        ).decode()
    assert "fastcov/py.typed" in names
    assert "fastcov/lib/libfastcov_cpu.so" in names
    assert ("fastcov/lib/libfastcov_cuda.so" in names) == (record["cuda"] != "none")
    assert "fastcov = fastcov.cli:main" in entry_points
    assert {name.partition("/")[0] for name in names} == {
        "fastcov",
        next(name for name in names if ".dist-info/" in name).partition("/")[0],
    }
    # Sources of the compiled code and of the tests stay out; so does what Python left behind.
    assert not [n for n in names if n.endswith((".cpp", ".cu", ".h", ".pyc"))]
    checkout = DIST.parent / "fastcov"
    for suffix in (".py", ".html"):
        files = {
            path.relative_to(checkout.parent).as_posix()
            for path in checkout.rglob(f"*{suffix}")
            if "lib" not in path.relative_to(checkout).parts
        }
        assert files
        assert {name for name in names if name.endswith(suffix)} == files


def test_libraries_need_torch_and_the_system_alone(libraries: dict[str, bytes]) -> None:
    for name, content in libraries.items():
        assert needed(content) - SYSTEM == {"libtorch.so"}, name


def test_no_cuda_runtime_nor_its_libraries(libraries: dict[str, bytes]) -> None:
    for name, content in libraries.items():
        given, wanted = symbols(content)
        foreign = {
            symbol
            for symbol in given | wanted
            if re.match(r"(cuda|cublas|cusolver|cu[A-Z])", symbol)
        }
        assert not foreign, f"{name}: {sorted(foreign)[:5]}"


def test_stable_abi_only(libraries: dict[str, bytes]) -> None:
    for name, content in libraries.items():
        given, wanted = symbols(content)
        # C++ names of torch, c10 or at, and everything of Python, change between versions.
        unstable = {s for s in wanted if re.match(r"_Z.*(2at|3c10|5torch)|_?Py[A-Z_]", s)}
        assert not unstable, f"{name}: {sorted(unstable)[:5]}"
        assert not [s for s in given if s.startswith("PyInit_")], name
        assert {s for s in wanted if s.startswith(("aoti_torch_", "torch_"))}, name


def test_libraries_export_next_to_nothing(libraries: dict[str, bytes]) -> None:
    given, _ = symbols(libraries["libfastcov_cpu.so"])
    assert "fastcov_cpu_instruction_set" in given
    for name, content in libraries.items():
        exported = {s for s in symbols(content)[0] if "fastcov" in s and s.startswith("_Z")}
        assert not exported, f"{name}: {sorted(exported)[:5]}"


def test_old_enough_systems_can_load_it(libraries: dict[str, bytes]) -> None:
    # Debian 12 builds reach manylinux_2_34 (static cudart); a manylinux_2_28 image reaches 2_28.
    for name, content in libraries.items():
        assert newest(content, "GLIBC") <= (2, 34), name
        assert newest(content, "GLIBCXX") <= (3, 4, 30), name


def test_libraries_name_no_folder_of_the_build_machine(libraries: dict[str, bytes]) -> None:
    for name, content in libraries.items():
        assert str(DIST.parent).encode() not in content, name
