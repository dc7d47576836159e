"""Every CUDA kernel compiles without a GPU, to the registers and shared memory on record.

Compiled here are sources that are not those on record, and the smallest of all, which shows that
this machine's compiler still gives what is on record; ``make setup`` compiles every source, and
``make wheels`` looks for spills on every architecture.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
SHARED_OF_A_BLOCK = 48 << 10  # static; more has to be asked for at a launch


def _load() -> ModuleType:
    path = HERE.parent / "csrc" / "cuda_resources.py"
    spec = importlib.util.spec_from_file_location("cuda_resources", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["cuda_resources"] = module
    spec.loader.exec_module(module)
    return module


resources = _load()
SMALLEST = "gather_counted.cu"
SOURCES = [(name, source) for name, table in resources.TABLES.items() for source in table.sources]


def test_every_kernel_is_on_record() -> None:
    with_kernels = {
        path.name for path in CSRC.glob("*.cu") if "__global__" in path.read_text("utf-8")
    }
    assert {source for _, source in SOURCES} == with_kernels
    for name, table in resources.TABLES.items():
        recorded = json.loads(resources.path_of(name).read_text())
        assert set(recorded) - {"fingerprints"} == {*table.sources, "nvcc"}
        for source in table.sources:
            assert set(recorded[source]) == {f"sm_{arch}" for arch in table.archs}
            for kernels in recorded[source].values():
                assert kernels
                for kernel, numbers in kernels.items():
                    assert numbers["spills"] == numbers["stack"] == 0, kernel
                    assert numbers["shared"] <= SHARED_OF_A_BLOCK, kernel


def test_wheels_hold_the_architectures_of_torchs_own() -> None:
    told = torch._C._cuda_getArchFlags()
    assert told is not None
    assert resources.wheel_archs() == tuple(
        int(arch) for arch in re.findall(r"sm_(\d+)", told) if int(arch) >= 75
    )


def test_a_source_is_known_by_all_that_it_includes(tmp_path: Path) -> None:
    archs = (80, 90)
    for name in resources.included("eigen_members.cu"):
        (tmp_path / name).write_text((CSRC / name).read_text("utf-8"))
    before = resources.fingerprint("eigen_members.cu", archs, tmp_path)
    assert before == resources.fingerprint("eigen_members.cu", archs)
    assert before != resources.fingerprint("eigen_members.cu", (80,), tmp_path)
    headers = {path.name for path in tmp_path.glob("*.h")}
    assert {"eigen.h", "team.h"} <= headers
    for header in sorted(headers):
        text = (tmp_path / header).read_text("utf-8")
        (tmp_path / header).write_text(f"// A comment.\n{text}\n/* Another. */\n")
        assert resources.fingerprint("eigen_members.cu", archs, tmp_path) == before, header
        (tmp_path / header).write_text(text + "int other;\n")
        assert resources.fingerprint("eigen_members.cu", archs, tmp_path) != before, header
        (tmp_path / header).write_text(text)


def test_texts_in_quotes_are_no_comments() -> None:
    assert resources.code('a("//b", 1); // c\n/* d\n"e" */ f("\\"/*");') == (
        'a("//b", 1); f("\\"/*");'
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "source"), SOURCES, ids=[source for _, source in SOURCES])
def test_registers_shared_memory_and_spills(name: str, source: str) -> None:
    recorded = json.loads(resources.path_of(name).read_text())
    archs = resources.TABLES[name].archs
    is_recorded = recorded.get("fingerprints", {}).get(source) == resources.fingerprint(
        source, archs
    )
    if is_recorded and recorded["nvcc"] == resources.nvcc_release() and source != SMALLEST:
        return
    compiled = resources.compile_source(source, resources.TABLES[name].archs)
    if recorded["nvcc"] == resources.nvcc_release():
        assert compiled == recorded[source], (
            f"{source} needs other resources than tests/resources/{name}.json says: see that "
            f"nothing is lost, then record them with `{resources.COMMAND}`"
        )
    # Another compiler may count otherwise; spills are a defect under every one.
    for arch, kernels in compiled.items():
        assert set(kernels) == set(recorded[source][arch])
        for kernel, numbers in kernels.items():
            assert numbers["spills"] == 0, f"{kernel} spills on {arch}"
