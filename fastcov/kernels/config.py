"""Static choices: tile shapes by kind of GPU, rows and channels.

Nothing is tuned at run time: a launch must not measure, allocate or synchronise. The shapes below
are the largest that compile without spilling registers (tests/resources/triton.json). To try
others on real hardware, replace entries of :data:`GRAM_CONFIGS`, which every launch looks up.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch

from fastcov.kernels.layout import RowLayout

MAX_CHAIN_ROWS = 4096
"""Rows added up in float32 with rounding, between two additions in float64."""

FLUSH_CHAIN_ROWS = 512
"""The shortest of :func:`chain_rows`: a flush is too small for longer ones to gain anything."""

SHIFT_ROWS = 64
"""Rows whose mean becomes the shift of a float32 state, as in ops/reference.py."""

Family = Literal["sm_80", "sm_90", "sm_100", "sm_120"]
Mode = Literal["direct", "split", "tf32", "ieee"]
Kind = Literal["matrix", "rows", "planes", "unaligned"]


@dataclass(frozen=True)
class Architecture:
    """What the choices depend on.

    Families sm_80 and sm_120: pointers and mma.sync, at most 99 KB of shared memory, which 8.6, 8.9
    and 12.x have; sm_90: descriptors and wgmma; sm_100: descriptors and tcgen05.
    """

    family: Family
    multiprocessors: int

    @staticmethod
    def of(capability: tuple[int, int], multiprocessors: int) -> Architecture:
        """Family of a compute capability."""
        families: dict[int, Family] = {9: "sm_90", 10: "sm_100", 12: "sm_120"}
        return Architecture(families.get(capability[0], "sm_80"), multiprocessors)


@dataclass(frozen=True)
class GramConfig:
    """Shapes of gram_kernel. ``left`` and ``right`` count the panels of a rectangle.

    ``residents`` is how many programs share a multiprocessor, by registers and shared memory.
    """

    panel: int
    panels: int
    step: int
    warps: int
    stages: int
    left: int = 0
    right: int = 0
    residents: int = 1

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
        """Whether a panel is loaded as left and as right operand: sm_80 pipelines it only so."""
        return self.family in ("sm_80", "sm_120") and self.mode == "direct"


def chain_rows(architecture: Architecture, mode: Mode, dtype: torch.dtype) -> int:
    """Rows that one chain of matrix instructions may add up: what it loses stays near 5e-6.

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
    rows = 2048 if architecture.family in ("sm_90", "sm_100") else 1024
    has_short_products = mode == "split" or dtype == torch.bfloat16
    return rows if has_short_products else rows // 2


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


def _narrow(*widths: int, step: int = 64, stages: int = 3) -> tuple[GramConfig, ...]:
    return tuple(
        GramConfig(width, 1, step, warps=4, stages=stages, residents=4 if width == 64 else 8)
        for width in widths
    )


_POINTERS_128 = GramConfig(64, 2, 32, warps=8, stages=3, residents=2)
_POINTERS_REST = GramConfig(64, 2, 32, warps=8, stages=3, left=1, right=2, residents=1)
_POINTERS_256 = GramConfig(64, 4, 32, warps=8, stages=3)
_POINTERS_WIDE = GramConfig(64, 4, 32, warps=8, stages=3, left=2, right=2)
_DESCRIPTORS_128 = GramConfig(128, 1, 64, warps=8, stages=4, residents=2)
_DESCRIPTORS_256 = GramConfig(128, 2, 64, warps=8, stages=4)
_DESCRIPTORS_WIDE = GramConfig(128, 2, 64, warps=8, stages=4, left=1, right=2)

_SPLIT_128 = replace(_POINTERS_128, residents=1)
_SPLIT_REST = GramConfig(64, 2, 32, warps=8, stages=2, left=1, right=2)
_SPLIT_ANY_128 = GramConfig(64, 2, 16, warps=8, stages=3)
_SPLIT_ANY_REST = GramConfig(64, 2, 16, warps=8, stages=3, left=1, right=2)
_UNALIGNED = (*_narrow(32), *_narrow(64, step=32), _POINTERS_128, _POINTERS_REST)
_SPLIT = (*_narrow(32, 64, step=32), _SPLIT_128, _SPLIT_REST)
_SPLIT_UNALIGNED = (*_narrow(32, 64, step=32), _SPLIT_ANY_128, _SPLIT_ANY_REST)
# Triton 3.6 cannot pipeline split products into several accumulators of tcgen05: panels of 32
# channels take mma.sync instead.
_SPLIT_100 = (
    *_narrow(32, step=32),
    GramConfig(32, 2, 32, warps=4, stages=2, residents=2),
    GramConfig(32, 3, 16, warps=8, stages=2, left=1, right=3),
)
_SPLIT_ANY_100 = (*_narrow(32), *_SPLIT_100[1:])
_DESCRIPTORS = (*_narrow(32, 64), _DESCRIPTORS_128, _DESCRIPTORS_256, _DESCRIPTORS_WIDE)


_SPLIT_120 = (
    *_narrow(32, step=32),
    *_narrow(64, step=32, stages=2),
    _SPLIT_128,
    _SPLIT_REST,
)
_DESCRIPTORS_100 = (
    *_narrow(32),
    GramConfig(64, 1, 64, warps=8, stages=3, residents=4),
    _DESCRIPTORS_128,
    _DESCRIPTORS_256,
    _DESCRIPTORS_WIDE,
)
_PLANES_100 = (
    *_narrow(32, 64),
    replace(_POINTERS_128, step=64),
    _POINTERS_256,
    _POINTERS_WIDE,
)
_POINTERS_120 = (*_narrow(32, step=32), *_narrow(64), _POINTERS_128, _POINTERS_256, _POINTERS_WIDE)
_PLANES_120 = (*_narrow(32, 64, step=32), _POINTERS_128, _POINTERS_REST)


def _pointers(step: int, stages: int = 3) -> tuple[GramConfig, ...]:
    wide = (replace(config, stages=stages) for config in (_POINTERS_256, _POINTERS_WIDE))
    return (*_narrow(32, 64, step=step), _POINTERS_128, *wide)


GRAM_CONFIGS: dict[GramCase, tuple[GramConfig, ...]] = {
    GramCase("sm_80", "direct", "rows"): _pointers(32),
    GramCase("sm_80", "direct", "planes"): _pointers(32, stages=2),
    GramCase("sm_80", "direct", "unaligned"): _UNALIGNED,
    GramCase("sm_80", "split", "rows"): _SPLIT,
    GramCase("sm_80", "split", "planes"): _SPLIT,
    GramCase("sm_80", "split", "unaligned"): _SPLIT_UNALIGNED,
    GramCase("sm_90", "direct", "matrix"): _DESCRIPTORS,
    GramCase("sm_90", "direct", "rows"): _pointers(64),
    GramCase("sm_90", "direct", "planes"): _pointers(64),
    GramCase("sm_90", "direct", "unaligned"): _UNALIGNED,
    GramCase("sm_90", "split", "rows"): _SPLIT,
    GramCase("sm_90", "split", "planes"): _SPLIT_UNALIGNED,
    GramCase("sm_90", "split", "unaligned"): _SPLIT_UNALIGNED,
    GramCase("sm_100", "direct", "matrix"): _DESCRIPTORS_100,
    GramCase("sm_100", "direct", "rows"): _pointers(64),
    GramCase("sm_100", "direct", "planes"): _PLANES_100,
    GramCase("sm_100", "direct", "unaligned"): _UNALIGNED,
    GramCase("sm_100", "split", "rows"): _SPLIT_100,
    GramCase("sm_100", "split", "planes"): _SPLIT_100,
    GramCase("sm_100", "split", "unaligned"): _SPLIT_ANY_100,
    GramCase("sm_120", "direct", "rows"): _POINTERS_120,
    GramCase("sm_120", "direct", "planes"): _PLANES_120,
    GramCase("sm_120", "direct", "unaligned"): _UNALIGNED,
    GramCase("sm_120", "split", "rows"): _SPLIT_120,
    GramCase("sm_120", "split", "planes"): _SPLIT_120,
    GramCase("sm_120", "split", "unaligned"): _SPLIT_UNALIGNED,
}
"""Configurations by case, from few channels to many; the last serves any number."""
