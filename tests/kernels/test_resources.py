"""Every kernel that can be launched compiles for every architecture, with the resources on record.

``python -m tests.kernels.aot`` writes the table and with ``--check`` compares it. Here kernels for
sm_80 and sm_90 are compiled whose source, constants or options are not those on record, and a
sample of the others; ``make wheels`` compiles everything.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from fastcov.bench.stubs import KernelStubs
from fastcov.kernels import tiles
from fastcov.kernels.config import GRAM_CONFIGS, GramCase, GramConfig

triton = pytest.importorskip("triton", reason="the kernels need triton")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def aot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("aot", HERE / "aot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["aot"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def table() -> dict[str, dict[str, dict[str, int]]]:
    return json.loads((HERE.parent / "resources" / "triton.json").read_text())


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_table_lists_what_is_launched(aot, table, target):
    launched = aot.all_specializations(aot.FAMILIES[target])
    assert set(table[f"sm_{target}"]) == set(launched)


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_loops_keep_to_their_registers_and_everything_fits(aot, table, target):
    """Values of a loop may be spilled before the loop, a few of each thread."""
    for name, resources in table[f"sm_{target}"].items():
        assert resources["loop_spills"] == 0, name
        assert resources["spills"] <= 128, name
        assert resources["serialized"] == 0, name
        assert resources["registers"] <= 255, name
        assert resources["shared"] <= aot.SHARED_LIMITS[target], name


@pytest.mark.slow
def test_a_launch_finds_what_was_compiled_ahead(
    aot: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Key for key: a kernel that the cache misses is compiled inside somebody's training step."""
    gpu = triton.backends.compiler.GPUTarget("cuda", 90, 32)
    backend = triton.compiler.make_backend(gpu)
    launches = list(aot.all_launches("sm_90"))
    items = [item for launch in launches for item in aot.recorded(launch)]
    ahead = {
        (aot.source_of(item).hash(), backend.parse_options(dict(item.options)).hash())
        for item in items
    }
    asked = set()
    for kernel in {item.kernel for item in items}:  # as in a new process
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    with KernelStubs(torch.device("cpu")):
        stand_in = triton.compiler.compile

        def compile_(source: Any, target: Any, options: Any, **others: Any) -> Any:
            asked.add((source.hash(), backend.parse_options(dict(options)).hash()))
            assert target == gpu
            return stand_in(source, target=target, options=options, **others)

        with mock.patch.object(triton.compiler, "compile", compile_):
            for launch in launches:
                launch()
    assert len(asked) == len(aot.all_specializations("sm_90"))
    assert asked == ahead


def is_shape(name: str, case: GramCase, config: GramConfig) -> bool:
    """True if a row of the table is this shape of gram_kernel, for any dtype and layout."""
    words = (
        f"PANEL={config.panel} PANELS={config.panels} LEFT={config.left} RIGHT={config.right} ",
        f" STEP={config.step} ",
        f" MODE={case.mode} ",
        f" HOISTS={config.hoists} ",
        f" warps={config.warps} stages={config.stages}",
    )
    return (
        all(word in name for word in words)
        and ("matrix=" in name) == (case.kind == "matrix")
        and ("VECTOR=1 " in name) == (case.kind == "unaligned")
        and (case.kind == "unaligned" or ("IS_PLANES=True" in name) == (case.kind == "planes"))
    )


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_plans_count_on_the_programs_that_fit(aot, table, target):
    for case, configs in GRAM_CONFIGS.items():
        if case.family != f"sm_{target}":
            continue
        for config in configs:
            fitting = {
                name: aot.residents(resources, config.warps, target)
                for name, resources in table[f"sm_{target}"].items()
                if is_shape(name, case, config)
            }
            assert fitting, (case, config)
            assert config.residents == min(8, *fitting.values()), (case, config, fitting)


@pytest.mark.parametrize("target", [80, 90, 100, 120])
def test_products_use_matrix_instructions_unless_exact(table, target):
    for name, resources in table[f"sm_{target}"].items():
        multiplies = name.split()[0] in ("gram_kernel", "block_kernel", "flush_kernel")
        if "MODE=ieee" in name:
            continue  # exact float32 products: Triton chooses other instructions on each target
        assert (resources["matrix_instructions"] > 0) == multiplies, name


@pytest.mark.parametrize("target", [80, 90])
def test_what_is_not_as_recorded_is_compiled(aot, table, target, monkeypatch):
    """A change of a kernel, of what it calls, of a constant or of an option asks for it again."""
    recorded = table["fingerprints"][f"sm_{target}"]
    everything = aot.all_specializations(aot.FAMILIES[target])
    kernels = {item.kernel.fn.__name__: item.kernel for item in everything.values()}
    assert set(recorded) <= set(kernels)
    assert set(aot.worth_compiling(target, {})) == set(everything)
    sample = aot.worth_compiling(target, aot.fingerprints(target))
    assert {everything[name].kernel.fn.__name__ for name in sample} == set(kernels)
    assert len(sample) < len(everything) / 8

    fingerprints = aot.fingerprints(target)
    dot = tiles.multiply
    monkeypatch.setattr(dot, "_src", dot.src + "\n    # another line\n")
    assert aot.fingerprints(target) == fingerprints
    other = dot.src.replace("tl.dot(left, right", "tl.dot(right, left")
    assert other != dot.src
    monkeypatch.setattr(dot, "_src", other)
    changed = {n for n, seen in aot.fingerprints(target).items() if seen != fingerprints[n]}
    assert changed == {"block_kernel", "flush_kernel", "gram_kernel"}
    asked = aot.worth_compiling(target, fingerprints)
    assert {name for name in everything if name.split()[0] in changed} <= set(asked)
    assert set(asked) - set(sample) == {
        n for n in set(asked) - set(sample) if n.split()[0] in changed
    }


@pytest.mark.slow
@pytest.mark.timeout(1200)  # two minutes on two idle cores where every kernel has changed
@pytest.mark.parametrize("target", [80, 90])
def test_compiles_to_the_resources_on_record(table, target):
    if table["triton"] != triton.__version__:
        pytest.fail(
            f"the table is of triton {table['triton']}, installed is {triton.__version__}: run "
            "python -m tests.kernels.aot"
        )
    # As a module from the root of the checkout, which PYTHONSAFEPATH would keep from sys.path.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}
    workers = (os.cpu_count() or 1) // int(environment.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    command = [sys.executable, "-m", "tests.kernels.aot", "--check", "--changed", str(target)]
    run = subprocess.run(
        [*command, "--workers", str(max(1, workers))],
        cwd=HERE.parents[1],
        env=environment,
        capture_output=True,
        text=True,
        timeout=1200,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-4000:]
    assert 0 < int(run.stdout.split()[0]) <= len(table[f"sm_{target}"])
