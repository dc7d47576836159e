"""Compiles every specialisation that the launchers launch, with no GPU, and reads its resources.

Launches are recorded, not listed: the launchers run on CPU tensors while the step that would start
a kernel is replaced. ``python -m tests.kernels.aot 80 90`` updates tests/resources/triton.json for
two architectures; ``--check`` compares instead. With ``--changed`` only kernels are compiled whose
fingerprint is not the one on record, and a sample of the others. ``--cache 90`` leaves the kernels
for one GPU's architecture in Triton's cache, where launches find them.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcov.kernels.config import Architecture, Family
from fastcov.kernels.covariance import launch_accumulate_
from fastcov.kernels.flush import BufferedLayer, FlushTable, launch_flush_
from fastcov.kernels.gather import CURSOR_FIELDS, launch_cursor_gather_, launch_gather_
from fastcov.ops import triangle

TABLE = Path(__file__).parents[1] / "resources" / "triton.json"
FAMILIES: dict[int, Family] = {80: "sm_80", 90: "sm_90", 100: "sm_100", 120: "sm_120"}
SHARED_LIMITS = {80: 99 * 1024, 90: 227 * 1024, 100: 227 * 1024, 120: 99 * 1024}
"""Bytes one program may take; sm_80 shapes also serve 8.6 and 8.9, which have less than 8.0."""

_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
_MULTIPROCESSORS = {80: (164, 2048), 90: (228, 2048), 100: (228, 2048), 120: (100, 1536)}
"""KiB of shared memory and threads of one, from the CUDA programming guide's table."""

_TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.uint8: "u8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# The same in all specialisations of a kernel for one architecture, or in the name elsewhere.
_UNNAMED = ("IS_INTERPRETED", "STAGES", "FIELDS", "VALUES", "OVERLAPS")
_MODES = {0: "direct", 1: "split", 2: "tf32", 3: "ieee"}
_SAMPLED = 24


@dataclass(frozen=True)
class Specialization:
    """One compilation of one kernel."""

    kernel: JITFunction[Any]
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, Any], ...]
    aligned: tuple[int, ...]
    options: tuple[tuple[str, int], ...]

    @property
    def warps(self) -> int:
        """Of a program."""
        return dict(self.options)["num_warps"]

    @property
    def stages(self) -> int:
        """Of its pipelines."""
        return dict(self.options)["num_stages"]

    @property
    def name(self) -> str:
        """Readable and unique: kernel, dtypes of its pointers to rows, constants."""
        values = dict(self.signature)
        constants = dict(self.constants)
        words = [self.kernel.fn.__name__]
        for argument in ("matrix", "rows", "buffer", "row_weight", "chain_weight"):
            kind = values.get(argument, "constexpr")
            if kind != "constexpr":
                words.append(f"{argument}={kind}")
        for key, value in self.constants:
            if value is None or key in _UNNAMED:
                continue
            words.append(f"{key}={_MODES[value] if key == 'MODE' else value}")
        if "VALUES" in constants:
            words.append(f"VALUES={constants['VALUES']}")
        return f"{' '.join(words)} warps={self.warps} stages={self.stages}"


def specialization(kernel: JITFunction[Any], args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    """Source that Triton would compile for a launch with these arguments."""
    values = dict(zip((p.name for p in kernel.params), args, strict=False))
    values |= {key: value for key, value in options.items() if key in kernel.arg_names}
    signature, constants, aligned = [], [], []
    for index, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or value is None:
            signature.append((parameter.name, "constexpr"))
            constants.append((parameter.name, value))
        elif isinstance(value, TensorDescriptor):
            # As Triton writes it at run time: its cache key holds this text.
            block = ", ".join(str(size) for size in value.block_shape)
            signature.append((parameter.name, f"tensordesc<{_TYPES[value.base.dtype]}[{block}]>"))
        elif isinstance(value, Tensor):
            signature.append((parameter.name, "*" + _TYPES[value.dtype]))
            if not parameter.do_not_specialize_on_alignment and value.data_ptr() % 16 == 0:
                aligned.append(index)
        else:
            # A number that picked a compilation by its value would be missed here.
            assert parameter.do_not_specialize, f"{kernel.fn.__name__}: {parameter.name}"
            signature.append((parameter.name, parameter.annotation_type))
    return Specialization(
        kernel,
        tuple(signature),
        tuple(constants),
        tuple(aligned),
        tuple(sorted({"num_warps": 4, "num_stages": 3, **options}.items())),
    )


def recorded(launch: Callable[[], object]) -> list[Specialization]:
    """Specialisations that a function launches, in order."""
    found: list[Specialization] = []

    def run(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(specialization(kernel, args, options))

    with patch.object(JITFunction, "run", run):
        launch()
    return found


def empty_state(channels: int) -> list[Tensor]:
    """moment, sum, shift, weight, count, not filled."""
    double = partial(torch.empty, dtype=torch.float64)
    count = torch.empty(2, dtype=torch.int64)
    moment = triangle.zeros(channels)
    return [moment, double(channels), double(channels), double(()), count]


def rows_of(layout: str, dtype: torch.dtype, channels: int, count: int = 64) -> Tensor:
    """About so many rows in one of the layouts that pick a specialisation."""
    half = count // 2
    if layout == "rows":
        return torch.empty(count, channels, dtype=dtype)
    if layout == "images":
        return torch.empty(2, half + 8, channels, dtype=dtype)[:, 8:]
    if layout == "planes":
        return torch.empty(2, channels, half // 8, 8, dtype=dtype).permute(0, 2, 3, 1)
    if layout == "unaligned":
        return torch.empty(count, channels + 1, dtype=dtype)[:, :channels]
    if layout == "unaligned planes":
        return torch.empty(2, channels, half // 7 | 1, 7, dtype=dtype).permute(0, 2, 3, 1)
    assert layout == "strided"
    return torch.empty(2, 3, half // 2, 2 * channels, dtype=dtype)[:, :, ::2, ::2]


LAYOUTS = ("rows", "images", "planes", "unaligned", "unaligned planes", "strided")
CHANNELS = (32, 64, 128, 256, 512)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def all_launches(family: Family) -> Iterator[Callable[[], object]]:
    """Calls that launch, together, everything that can be launched on a family of GPUs."""
    architecture = Architecture(family, 132)
    for dtype in DTYPES:
        for channels in CHANNELS:
            state = empty_state(channels)
            update = partial(launch_accumulate_, *state, architecture=architecture)
            for layout in LAYOUTS:
                yield partial(update, rows_of(layout, dtype, channels))
                # So many rows for so few programs that each takes several chains.
                many = rows_of(layout, dtype, channels, count=1 << 16)
                yield partial(update, many, architecture=Architecture(family, 1))
            weight = torch.empty(64, dtype=torch.float64)
            yield partial(update, rows_of("rows", dtype, channels), weight)
            if dtype == torch.float32:
                for precision in ("tf32", "ieee"):
                    yield partial(update, rows_of("rows", dtype, channels), precision=precision)
        buffer = torch.empty(8, 64, dtype=dtype)
        cursor = torch.empty(CURSOR_FIELDS, dtype=torch.int64)
        step = torch.empty((), dtype=torch.int64)
        for layout in ("rows", "strided"):
            rows = rows_of(layout, dtype, 64)
            yield partial(launch_gather_, buffer, rows, 0, 0, 4)
            for fraction in (2**30, 2**32):
                row_step = torch.empty(8, dtype=torch.int32)
                yield partial(launch_cursor_gather_, buffer, row_step, cursor, step, rows, fraction)
        for channels in (64, 3):
            layer = BufferedLayer(
                *empty_state(channels),
                torch.empty((), dtype=torch.float64),
                torch.empty(8, channels, dtype=dtype),
                torch.empty(8, dtype=torch.int32),
                cursor,
                threshold=8,
            )
            for decay in (1.0, 0.9):
                yield partial(launch_flush_, FlushTable([layer]), step, decay=decay)


@cache
def all_specializations(family: Family) -> dict[str, Specialization]:
    """Every specialisation by its name."""
    found: dict[str, Specialization] = {}
    for launch in all_launches(family):
        for item in recorded(launch):
            other = found.setdefault(item.name, item)
            assert other == item, f"two specialisations share the name {item.name!r}"
    return found


def source_of(item: Specialization) -> ASTSource:
    """Source as Triton makes it at a launch: its hash is part of the key in Triton's cache."""
    attributes = {
        (index,): [["tt.divisibility", 16]] if index in item.aligned else []
        for index, (_, kind) in enumerate(item.signature)
        if kind.startswith("*")
    }
    return ASTSource(item.kernel, dict(item.signature), dict(item.constants), attributes)


def compiled_for(item: Specialization, target: int) -> Any:
    """Kernel compiled for an architecture; Triton keeps it in its cache."""
    gpu = GPUTarget("cuda", target, 32)
    return triton.compile(source_of(item), target=gpu, options=dict(item.options))


def compile_resources(item: Specialization, target: int) -> dict[str, int]:
    """Registers, spills, shared memory and so on: from Triton, ptxas and nvdisasm."""
    compiled = compiled_for(item, target)
    ptxas = _TOOLS / ("ptxas-blackwell" if target >= 100 else "ptxas")
    ptx = compiled.asm["ptx"]
    found = re.search(r"\.target (\w+)", ptx)
    assert found is not None
    with tempfile.TemporaryDirectory() as folder:
        source_file, binary = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source_file.write_text(ptx)
        report = _output(ptxas, "-v", f"--gpu-name={found[1]}", source_file, "-o", binary).stderr
        listing = _output(_TOOLS / "nvdisasm", "-c", binary).stdout
    registers = re.search(r"Used (\d+) registers", report)
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert registers is not None, report
    assert spills is not None, report
    return {
        "registers": int(registers[1]),
        "spills": int(spills[1]) + int(spills[2]),
        "loop_spills": loop_spills(listing),
        "shared": compiled.metadata.shared,
        "matrix_instructions": len(re.findall(r"wgmma\.mma_async|tcgen05\.mma\.|mma\.sync", ptx)),
        "serialized": report.count("wgmma.mma_async instructions are serialized"),
    }


def _output(*command: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=True)


def loop_spills(listing: str) -> int:
    """Accesses to local memory in the innermost loops around matrix instructions, of a listing.

    Values put away before such a loop and fetched after it cost nothing; these would cost every
    step. A loop ends with a branch under a condition back to its label; branches without one lead
    back from waits that the assembler has moved to the end.
    """
    lines = listing.splitlines()
    labels = {line.strip(" :"): n for n, line in enumerate(lines) if line.startswith(".L_")}
    loops = []
    for last, line in enumerate(lines):
        branch = re.search(r"(@!?U?P\d\s+BRA|BRA\.U).*`\((\.L_\w+)\)", line)
        if branch is not None and labels[branch[2]] < last:
            loops.append(range(labels[branch[2]], last))
    multiplying = [
        loop
        for loop in loops
        if any(re.search(r"\b(HMMA|HGMMA|UTC\w*MMA)\b", lines[n]) for n in loop)
    ]
    innermost = [
        loop
        for loop in multiplying
        if not any(
            other != loop and other.start >= loop.start and other.stop <= loop.stop
            for other in multiplying
        )
    ]
    lines_inside = {n for loop in innermost for n in loop}
    return sum(re.search(r"\b(LDL|STL)\b", lines[n]) is not None for n in lines_inside)


def residents(resources: dict[str, int], warps: int, target: int) -> int:
    """Programs that a multiprocessor holds at the same time."""
    shared, threads = _MULTIPROCESSORS[target]
    registers = -(-resources["registers"] // 8) * 8  # are given out so
    return min(
        65536 // (registers * 32 * warps),
        shared * 1024 // (resources["shared"] + 1024),
        threads // (32 * warps),
    )


def sources(function: JITFunction[Any]) -> dict[str, str]:
    """Code of a kernel and of all that it calls, and the globals that they name.

    Comments, docstrings and the place in a file do not count. Triton's own key of a kernel holds
    line numbers, and hangs on which kernel was asked for first.
    """
    tree = ast.parse(function.src)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None:
            node.body[0] = ast.Pass()
    found = {f"{function.__module__}.{function.fn.__name__}": ast.unparse(tree)}
    scope = function.fn.__globals__
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    for name in sorted(names & scope.keys()):
        value = scope[name]
        if isinstance(value, JITFunction):
            found |= sources(value)
        elif isinstance(value, (bool, int, float, str, tuple, triton.language.constexpr)):
            found[f"{function.__module__} {name}"] = repr(value)
        elif isinstance(value, type):
            found[f"{function.__module__} {name}"] = repr(value.__annotations__)
    return found


def fingerprints(target: int) -> dict[str, str]:
    """Hash, by kernel, of everything of ours that its compilations for an architecture follow from.

    Kernels with the recorded fingerprint, under the recorded version of Triton, compile to the
    recorded resources.
    """
    parts: dict[str, list[str]] = {}
    for name, item in sorted(all_specializations(FAMILIES[target]).items()):
        kernel = item.kernel.fn.__name__
        if kernel not in parts:
            parts[kernel] = [repr(sorted(sources(item.kernel).items()))]
        given = (item.signature, item.constants, item.aligned, item.options)
        parts[kernel].append(f"{name} {given}")
    return {
        kernel: hashlib.sha256("\n".join(keys).encode()).hexdigest()[:16]
        for kernel, keys in parts.items()
    }


def worth_compiling(target: int, known: dict[str, str]) -> list[str]:
    """Specialisations of kernels without their known fingerprint; of the others, one in 24.

    The sample shows that this machine's tools still give what is on record.
    """
    now = fingerprints(target)
    chosen: list[str] = []
    seen: dict[str, int] = {}
    for name, item in sorted(all_specializations(FAMILIES[target]).items()):
        kernel = item.kernel.fn.__name__
        seen[kernel] = seen.get(kernel, -1) + 1
        if known.get(kernel) != now[kernel] or seen[kernel] % _SAMPLED == 0:
            chosen.append(name)
    return chosen


def _compile_named(key: tuple[int, str]) -> dict[str, int]:
    target, name = key
    return compile_resources(all_specializations(FAMILIES[target])[name], target)


def _cache_named(key: tuple[int, str]) -> None:
    target, name = key
    compiled_for(all_specializations(family_of(target))[name], target)


def family_of(target: int) -> Family:
    """Family of an architecture such as 86, whose kernels it takes."""
    return FAMILIES.get(target // 10 * 10, "sm_80")


def cache_all(target: int, workers: int) -> int:
    """Compiles everything for one architecture, and returns how many kernels that is."""
    keys = [(target, name) for name in all_specializations(family_of(target))]
    with ProcessPoolExecutor(workers) as pool:
        list(pool.map(_cache_named, keys))
    return len(keys)


def compile_all(
    targets: list[int],
    filters: list[str],
    workers: int = 1,
    chosen: dict[int, list[str]] | None = None,
) -> dict[str, dict[str, dict[str, int]]]:
    """Resources of what is chosen and has a name with all filters, by architecture and name."""
    keys = [
        (target, name)
        for target in targets
        for name in sorted(
            all_specializations(FAMILIES[target]) if chosen is None else chosen[target]
        )
        if all(word in name for word in filters)
    ]
    table: dict[str, dict[str, dict[str, int]]] = {f"sm_{target}": {} for target in targets}
    with ProcessPoolExecutor(workers) as pool:
        for (target, name), resources in zip(keys, pool.map(_compile_named, keys), strict=True):
            table[f"sm_{target}"][name] = resources
    return table


def main() -> None:
    """Updates the table, or does as its options say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", help="architectures, and words that names must contain")
    parser.add_argument("--check", action="store_true", help="compare with the table")
    parser.add_argument(
        "--changed", action="store_true", help="only what is not as recorded, and a sample"
    )
    parser.add_argument("--cache", type=int, metavar="ARCHITECTURE", help="fill Triton's cache")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    options = parser.parse_args()
    targets = [int(word) for word in options.words if word.isdigit()] or [80, 90, 100, 120]
    filters = [word for word in options.words if not word.isdigit()]
    start = time.perf_counter()
    if options.cache is not None:
        number = cache_all(options.cache, options.workers)
        print(f"{number} kernels in Triton's cache after {time.perf_counter() - start:.0f} s")
        return
    table = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    chosen = None
    if options.changed:
        known = table.get("fingerprints", {})
        if table.get("triton") != triton.__version__:
            known = {}
        chosen = {t: worth_compiling(t, known.get(f"sm_{t}", {})) for t in targets}
    found = compile_all(targets, filters, options.workers, chosen)
    wall_s = time.perf_counter() - start
    if options.check:
        changed = [
            f"{target}: {name}: {resources}, table: {table[target].get(name)}"
            for target, part in found.items()
            for name, resources in part.items()
            if table[target].get(name) != resources
        ]
        print(
            f"{sum(map(len, found.values()))} compiled in {wall_s:.0f} s, {len(changed)} differ",
            *changed,
            sep="\n",
        )
        sys.exit(bool(changed))
    for target, part in found.items():
        current = set(all_specializations(FAMILIES[int(target[3:])]))
        kept = {name: row for name, row in table.get(target, {}).items() if name in current}
        table[target] = kept | part
        if not filters:
            prints = table.setdefault("fingerprints", {})
            prints[target] = fingerprints(int(target[3:]))
    table["triton"] = triton.__version__
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main()
