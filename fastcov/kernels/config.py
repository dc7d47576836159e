"""Static choices: tile shapes by kind of GPU, rows and channels.

Nothing is tuned at run time: a launch must not measure, allocate or synchronise. The shapes below
are the largest found whose loops over the rows compile without spilling registers, and on sm_90
without waits between wgmma instructions (tests/resources/triton.json; ``python -m
tests.kernels.aot``). To try others on real hardware, replace entries of :data:`GRAM_CONFIGS`, which
every launch looks up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from fastcov.kernels.gpus import GPUS, Pace, gpu_told
from fastcov.kernels.layout import RowLayout
from fastcov.rows.dtypes import ROW_DTYPES

MAX_CHAIN_ROWS = 4096
"""Rows of the longest chain, one that float32 products without tensor cores add with rounding."""

FLUSH_CHAIN_ROWS = 512
"""The shortest of :func:`chain_rows`: a flush is too small for longer ones to gain anything."""

SHIFT_ROWS = 64
"""Rows whose mean becomes the shift of a float32 state, as in ops/reference.py."""

Family = Literal["sm_80", "sm_90", "sm_100", "sm_120"]
Mode = Literal["direct", "split", "tf32", "ieee"]
Kind = Literal["matrix", "rows", "planes", "unaligned"]


@dataclass(frozen=True)
class Architecture:
    """Kind of GPU that the choices depend on.

    Families sm_80 and sm_120: pointers and mma.sync, at most 99 KB of shared memory, which 8.6, 8.9
    and 12.x have; sm_90: descriptors and wgmma; sm_100: descriptors and tcgen05.
    """

    family: Family
    multiprocessors: int
    pace: Pace = GPUS["H100"].pace

    @property
    def overlaps_launches(self) -> bool:
        """True if a launch may come while the one before it runs, and wait: from sm_90 on."""
        return self.family != "sm_80"

    @staticmethod
    def of(properties: Any) -> Architecture:
        """Architecture of a GPU, from ``torch.cuda.get_device_properties``."""
        families: dict[int, Family] = {9: "sm_90", 10: "sm_100", 12: "sm_120"}
        gpu = gpu_told(properties)
        return Architecture(families.get(properties.major, "sm_80"), gpu.multiprocessors, gpu.pace)


@dataclass(frozen=True)
class GramConfig:
    """Shapes of gram_kernel. ``left`` and ``right`` count the panels of a rectangle.

    ``residents`` is how many programs share a multiprocessor, by registers and shared memory, eight
    at most; ``hoists`` tells whether the compiler may compute addresses ahead of all chains:
    the way that takes fewer registers is found by trying.
    """

    panel: int
    panels: int
    step: int
    warps: int
    stages: int
    left: int = 0
    right: int = 0
    residents: int = 1
    hoists: bool = True

    @property
    def width(self) -> int:
        """Channels of one triangle."""
        return self.panel * self.panels

    @property
    def edge(self) -> int:
        """Edge of a block of the packed triangle."""
        return min(64, self.panel)


@dataclass(frozen=True)
class GramCase:
    """One kind of rows on one kind of GPU.

    matrix: aligned rows through a descriptor; rows, planes: aligned, through pointers.
    """

    family: Family
    mode: Mode
    kind: Kind

    @property
    def loads_twice(self) -> bool:
        """True if a panel is loaded as left and as right operand: sm_80 pipelines it only so."""
        return self.family in ("sm_80", "sm_120") and self.mode == "direct"

    @property
    def adds_vectors(self) -> bool:
        """True if one instruction adds four neighbouring entries in memory: not before sm_90.

        There a thread that holds four would add them one by one, and a warp touch four times the
        sectors that it needs.
        """
        return self.family != "sm_80"


def chain_rows(architecture: Architecture, mode: Mode, dtype: torch.dtype) -> int:
    """Rows that one chain of matrix instructions may add up and lose about 5e-6.

    The instructions cut every addend at the last bit of the largest plus a few, then the sum; with
    numbers of one sign all cuts go one way. One instruction adds 8 rows and keeps 1 bit more on
    Ampere, 16 rows and 2 bits on Hopper (Khattak and Mikaitis, arXiv 2512.07004; Xie et al., arXiv
    2511.10909). Products of bfloat16 have 16 bits and lose theirs late, those of float16 have 22.
    On squares of normal rows, emulated (tests/kernels/test_truncation.py): bfloat16 5.1e-6 after
    2048 rows on Hopper and 4.4e-6 after 1024 on Ampere, float16 4.3e-6 after 1024 and 4.1e-6 after
    512. sm_120 counts as Ampere.
    """
    if mode == "ieee":
        return MAX_CHAIN_ROWS
    # Split rows are multiplied as bfloat16, whatever they are; tf32 keeps as many bits as float16.
    multiplied = {"split": torch.bfloat16, "tf32": torch.float16}.get(mode, dtype)
    return ROW_DTYPES[multiplied].chain_rows[architecture.family]


def gram_case(architecture: Architecture, layout: RowLayout, mode: Mode) -> GramCase | None:
    """The case that reads a layout fast, or None: then block_kernel reads it."""
    if mode not in ("direct", "split") or layout.kind == "strided":
        return None
    if not layout.is_aligned:
        return GramCase(architecture.family, mode, "unaligned")
    if layout.kind == "planes":
        return GramCase(architecture.family, mode, "planes")
    has_descriptors = architecture.family in ("sm_90", "sm_100") and mode == "direct"
    kind: Kind = "matrix" if has_descriptors and layout.is_matrix else "rows"
    return GramCase(architecture.family, mode, kind)


def gram_config(case: GramCase, channels: int) -> GramConfig:
    """Configuration for a number of channels: the first that covers them, else the widest."""
    configs = GRAM_CONFIGS[case]
    return next((config for config in configs[:-1] if config.width >= channels), configs[-1])


# Panel, panels, step, warps, stages. What differs between kinds was found by trying: the largest
# tiles, then the longest pipelines, whose loop over the rows keeps all it needs in registers.
# - Rows that are not aligned, or float32 in three parts, pass through registers: 128 channels at
#   most in one triangle. wgmma takes one wide panel with fewer registers than two narrow ones; the
#   part above the diagonal costs a third more products in a triangle, but operands that it reads
#   once instead of twice.
# - sm_120 has sm_80's registers and less to load ahead with: 128 channels too.
# - Triton 3.6 cannot pipeline split products into several accumulators of tcgen05: panels of 32
#   channels take mma.sync instead.
GRAM_CONFIGS: dict[GramCase, tuple[GramConfig, ...]] = {
    GramCase("sm_80", "direct", "rows"): (
        GramConfig(32, 1, 64, 4, 3, residents=5, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=3),
        GramConfig(64, 2, 64, 8, 3),
        GramConfig(64, 4, 32, 8, 3),
        GramConfig(64, 4, 32, 8, 3, left=2, right=2),
    ),
    GramCase("sm_80", "direct", "planes"): (
        GramConfig(32, 1, 64, 4, 3, residents=7, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=3),
        GramConfig(64, 2, 64, 8, 3, residents=2),
        GramConfig(64, 4, 32, 8, 2),
        GramConfig(64, 4, 32, 8, 2, left=2, right=2),
    ),
    GramCase("sm_80", "direct", "unaligned"): (
        GramConfig(32, 1, 64, 4, 3, residents=3, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=2),
        GramConfig(64, 2, 32, 8, 3),
        GramConfig(64, 2, 32, 8, 3, left=1, right=2),
    ),
    GramCase("sm_80", "split", "rows"): (
        GramConfig(32, 1, 32, 4, 3, residents=3, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=2, hoists=False),
        GramConfig(64, 2, 32, 8, 3, hoists=False),
        GramConfig(64, 2, 16, 8, 3, left=1, right=2, hoists=False),
    ),
    GramCase("sm_80", "split", "planes"): (
        GramConfig(32, 1, 32, 4, 3, residents=4, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=2, hoists=False),
        GramConfig(64, 2, 32, 8, 3, hoists=False),
        GramConfig(64, 2, 32, 8, 2, left=1, right=2, hoists=False),
    ),
    GramCase("sm_80", "split", "unaligned"): (
        GramConfig(32, 1, 32, 4, 3, residents=2, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=2, hoists=False),
        GramConfig(64, 2, 16, 8, 3, hoists=False),
        GramConfig(64, 2, 16, 8, 3, left=1, right=2, hoists=False),
    ),
    GramCase("sm_90", "direct", "matrix"): (
        GramConfig(32, 1, 64, 4, 3, residents=8, hoists=False),
        GramConfig(64, 1, 64, 4, 3, residents=6),
        GramConfig(128, 1, 64, 8, 4, residents=2),
        GramConfig(128, 2, 64, 8, 4),
        GramConfig(128, 2, 64, 8, 4, left=1, right=2),
    ),
    GramCase("sm_90", "direct", "rows"): (
        GramConfig(32, 1, 64, 4, 3, residents=8),
        GramConfig(64, 1, 64, 4, 3, residents=4),
        GramConfig(64, 2, 32, 8, 3, residents=2),
        GramConfig(64, 4, 32, 8, 3),
        GramConfig(64, 4, 32, 8, 3, left=2, right=2),
    ),
    GramCase("sm_90", "direct", "planes"): (
        GramConfig(32, 1, 64, 4, 2, residents=7),
        GramConfig(64, 1, 64, 4, 3, residents=3),
        GramConfig(64, 2, 32, 8, 3, residents=2),
        GramConfig(64, 4, 32, 8, 3),
        GramConfig(64, 4, 32, 8, 3, left=2, right=2),
    ),
    GramCase("sm_90", "direct", "unaligned"): (
        GramConfig(32, 1, 64, 4, 3, residents=4, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=3),
        GramConfig(64, 2, 32, 8, 3),
        GramConfig(64, 2, 32, 8, 3, left=1, right=2),
    ),
    GramCase("sm_90", "split", "rows"): (
        GramConfig(32, 1, 32, 4, 3, residents=4, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=3, hoists=False),
        GramConfig(128, 1, 32, 8, 3, hoists=False),
        GramConfig(128, 1, 32, 8, 2, left=1, right=1, hoists=False),
    ),
    GramCase("sm_90", "split", "planes"): (
        GramConfig(32, 1, 32, 4, 3, residents=4, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=3, hoists=False),
        GramConfig(64, 2, 16, 8, 3, hoists=False),
        GramConfig(64, 2, 16, 8, 3, left=1, right=2, hoists=False),
    ),
    GramCase("sm_90", "split", "unaligned"): (
        GramConfig(32, 1, 32, 4, 3, residents=3, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=2, hoists=False),
        GramConfig(128, 1, 16, 8, 2, hoists=False),
        GramConfig(128, 1, 16, 8, 2, left=1, right=1, hoists=False),
    ),
    GramCase("sm_100", "direct", "matrix"): (
        GramConfig(32, 1, 64, 4, 3, residents=8),
        GramConfig(64, 1, 64, 8, 3, residents=4),
        GramConfig(128, 1, 64, 8, 4),
        GramConfig(128, 2, 64, 8, 4),
        GramConfig(128, 2, 64, 8, 4, left=1, right=2),
    ),
    GramCase("sm_100", "direct", "rows"): (
        GramConfig(32, 1, 64, 4, 3, residents=8),
        GramConfig(64, 1, 64, 4, 3, residents=5),
        GramConfig(64, 2, 32, 8, 3, residents=4),
        GramConfig(64, 4, 32, 8, 3, residents=3),
        GramConfig(64, 4, 32, 8, 3, left=2, right=2, residents=2),
    ),
    GramCase("sm_100", "direct", "planes"): (
        GramConfig(32, 1, 64, 4, 3, residents=7),
        GramConfig(64, 1, 64, 4, 3, residents=4),
        GramConfig(64, 2, 64, 8, 3, residents=4),
        GramConfig(64, 4, 32, 8, 3, residents=3),
        GramConfig(64, 4, 32, 8, 3, left=2, right=2, residents=3, hoists=False),
    ),
    GramCase("sm_100", "direct", "unaligned"): (
        GramConfig(32, 1, 64, 4, 3, residents=4),
        GramConfig(64, 1, 64, 4, 3, residents=2),
        GramConfig(64, 2, 32, 8, 3, residents=2),
        GramConfig(64, 2, 32, 8, 3, left=1, right=2, residents=2),
    ),
    GramCase("sm_100", "split", "rows"): (
        GramConfig(32, 1, 32, 4, 3, residents=4, hoists=False),
        GramConfig(32, 2, 32, 4, 2, residents=3),
        GramConfig(32, 3, 16, 8, 2, left=1, right=3, hoists=False),
    ),
    GramCase("sm_100", "split", "planes"): (
        GramConfig(32, 1, 32, 4, 3, residents=4, hoists=False),
        GramConfig(32, 2, 32, 4, 4, residents=3),
        GramConfig(32, 3, 16, 8, 2, left=1, right=3, hoists=False),
    ),
    GramCase("sm_100", "split", "unaligned"): (
        GramConfig(32, 1, 64, 4, 3, residents=2, hoists=False),
        GramConfig(32, 2, 32, 4, 3, residents=2, hoists=False),
        GramConfig(32, 3, 16, 8, 2, left=1, right=3, hoists=False),
    ),
    GramCase("sm_120", "direct", "rows"): (
        GramConfig(32, 1, 64, 4, 3, residents=5),
        GramConfig(64, 1, 64, 4, 3, residents=3),
        GramConfig(64, 2, 32, 8, 3),
        GramConfig(64, 2, 32, 8, 3, left=1, right=2),
    ),
    GramCase("sm_120", "direct", "planes"): (
        GramConfig(32, 1, 64, 4, 3, residents=5, hoists=False),
        GramConfig(64, 1, 32, 4, 3, residents=3),
        GramConfig(64, 2, 32, 8, 3),
        GramConfig(64, 2, 32, 8, 3, left=1, right=2, residents=2),
    ),
    GramCase("sm_120", "direct", "unaligned"): (
        GramConfig(32, 1, 64, 4, 3, residents=3, hoists=False),
        GramConfig(64, 1, 16, 4, 3, residents=3),
        GramConfig(64, 2, 32, 8, 3),
        GramConfig(64, 2, 32, 8, 3, left=1, right=2),
    ),
    GramCase("sm_120", "split", "rows"): (
        GramConfig(32, 1, 32, 4, 3, residents=4),
        GramConfig(64, 1, 32, 4, 2, residents=2, hoists=False),
        GramConfig(64, 2, 16, 8, 2),
        GramConfig(64, 2, 16, 8, 3, left=1, right=2, hoists=False),
    ),
    GramCase("sm_120", "split", "planes"): (
        GramConfig(32, 1, 32, 4, 3, residents=4),
        GramConfig(64, 1, 32, 4, 2, residents=2, hoists=False),
        GramConfig(64, 2, 16, 8, 2),
        GramConfig(64, 2, 16, 8, 3, left=1, right=2, hoists=False),
    ),
    GramCase("sm_120", "split", "unaligned"): (
        GramConfig(32, 1, 32, 4, 4, residents=4),
        GramConfig(64, 1, 32, 4, 4, residents=2),
        GramConfig(64, 2, 16, 8, 3, hoists=False),
        GramConfig(64, 2, 16, 8, 2, left=1, right=1, hoists=False),
    ),
}
"""Configurations by case, from few channels to many; the last serves any number."""
