"""Plan of an update: its rows cut into chunks, so that all multiprocessors end together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastcov.kernels.config import Architecture, GramConfig
from fastcov.kernels.gpus import Pace
from fastcov.kernels.layout import RowLayout

# Costs in clocks of a multiprocessor; of the GPU's pace only ratios matter.
_START_CLOCKS = 2000  # of a program's launch and first address
_CHAIN_CLOCKS = 1000  # of emptying and filling the pipeline between two chains

MAX_CHAINS = 64
"""Chains that one slot takes in float32, each addition rounded to nearest.

Every one of the k - 1 additions is off by at most 2**-24 of the running sum, which nowhere exceeds
the largest entry of S (rows' products of one sign grow; others are bounded by the diagonal, after
Cauchy and Schwarz): all of them by 63 * 2**-24 = 3.8e-6 at the worst, and about 0.3e-6 where
roundings go either way. With the 5.1e-6 of a chain (config.chain_rows) that is below 1e-5 for any
rows. Slots are added in float64. A slot overflows where rows above 5e16 fill all its chains, and
numbers below 1.2e-38 count as 0.
"""


@dataclass(frozen=True)
class Plan:
    """One update's grid.

    Attributes:
        edge: Edge of the blocks of the packed triangle.
        edges: Blocks along its diagonal.
        triangles: Programs that cover the diagonal, per chunk.
        tiles: Programs below the diagonal, per chunk.
        steps: Steps of all rows; an image's last step may be shorter.
        steps_per_chunk: A multiple of steps_per_chain, at most :data:`MAX_CHAINS` chains.
        steps_per_chain: Steps that matrix instructions add up, before an addition with rounding.
        chunks: Parts that are summed apart, each in a slot of its own.
    """

    edge: int
    edges: int
    triangles: int
    tiles: int
    steps: int
    steps_per_chunk: int
    steps_per_chain: int
    chunks: int

    @property
    def blocks(self) -> int:
        """Blocks of the packed triangle."""
        return self.edges * (self.edges + 1) // 2

    @property
    def chains(self) -> int:
        """Chains of all chunks."""
        return -(-self.steps // self.steps_per_chain)

    @property
    def programs(self) -> int:
        """Programs of gram_kernel."""
        return (self.triangles + self.tiles) * self.chunks

    @property
    def slot(self) -> int:
        """float32 entries of one chunk's partial result."""
        return self.blocks * self.edge**2 + self.edges * self.edge


def gram_plan(
    config: GramConfig,
    layout: RowLayout,
    element_bytes: int,
    architecture: Architecture,
    chain_rows: int,
) -> Plan:
    """Plan of chunks for gram_kernel: the fewest clocks that the model foresees."""
    return _gram_plan(
        config,
        layout.channels,
        layout.images * -(-layout.positions // config.step),
        element_bytes,
        architecture.multiprocessors,
        architecture.pace,
        chain_rows,
    )


def block_plan(
    edge: int, step: int, layout: RowLayout, architecture: Architecture, chain_rows: int
) -> Plan:
    """Plan of chunks for block_kernel: about eight programs a multiprocessor."""
    edges = -(-layout.channels // edge)
    blocks = edges * (edges + 1) // 2
    steps = layout.images * -(-layout.positions // step)
    most_steps = chain_rows // step
    least = -(-steps // (most_steps * MAX_CHAINS))
    wanted = -(-8 * architecture.multiprocessors // blocks)
    per_chain, per_chunk = _split(steps, max(1, least, min(wanted, steps)), most_steps)
    return Plan(edge, edges, 1, 0, steps, per_chunk, per_chain, -(-steps // per_chunk))


def _split(steps: int, chunks: int, most_steps: int) -> tuple[int, int]:
    """Steps of a chain and of a chunk, for about so many chunks: chains of one length."""
    per_chunk = -(-steps // chunks)
    chains = -(-per_chunk // most_steps)
    per_chain = -(-per_chunk // chains)
    return per_chain, per_chain * chains


@lru_cache(maxsize=4096)
def _gram_plan(
    config: GramConfig,
    channels: int,
    steps: int,
    element_bytes: int,
    multiprocessors: int,
    pace: Pace,
    chain_rows: int,
) -> Plan:
    triangles = -(-channels // config.width)
    tiles = 0
    if config.left:
        tiles = triangles * (triangles - 1) // 2
        tiles *= (config.panels // config.left) * (config.panels // config.right)
    most_steps = chain_rows // config.step
    least = -(-steps // (most_steps * MAX_CHAINS))
    slots = multiprocessors * config.residents
    # Chunks so short that a program's start outweighs its work are never tried.
    most = max(least, min(steps, least + 4 * -(-slots // triangles)))
    best: tuple[float, int, int, int] | None = None
    for wanted in range(least, most + 1):
        per_chain, per_chunk = _split(steps, wanted, most_steps)
        chunks = -(-steps // per_chunk)
        clocks = _clocks(
            config,
            channels,
            element_bytes,
            triangles,
            tiles,
            per_chunk,
            per_chunk // per_chain,
            chunks,
            slots,
            pace,
        )
        if best is None or clocks < best[0]:
            best = (clocks, per_chunk, per_chain, chunks)
    assert best is not None
    return Plan(config.edge, -(-channels // config.edge), triangles, tiles, steps, *best[1:])


def _clocks(
    config: GramConfig,
    channels: int,
    element_bytes: int,
    triangles: int,
    tiles: int,
    per_chunk: int,
    chains: int,
    chunks: int,
    slots: int,
    pace: Pace,
) -> float:
    rows = per_chunk * config.step
    products = 6 if element_bytes == 4 else 1
    area = config.panel**2 * products * config.residents / pace.macs
    row_bytes = element_bytes * config.residents
    # All programs of a chunk share its rows: memory delivers them once.
    shared = row_bytes * channels / (triangles + tiles) / pace.load_bytes
    triangle_row = max(
        shared,
        area * config.panels * (config.panels + 1) / 2,
        row_bytes * min(channels, config.width) / pace.cached_load_bytes,
    )
    tile_row = max(
        shared,
        area * config.left * config.right,
        row_bytes * config.panel * (config.left + config.right) / pace.cached_load_bytes,
    )
    entries = config.width * (config.width + config.edge) // 2
    added = _CHAIN_CLOCKS + 4 * entries * config.residents / pace.cached_load_bytes
    fixed = _START_CLOCKS + chains * added
    longest = fixed + rows * max(triangle_row, tile_row)
    mean = fixed + rows * (triangles * triangle_row + tiles * tile_row) / (triangles + tiles)
    rounds, rest = divmod((triangles + tiles) * chunks, slots)
    partial_bytes = 4 * (channels * (channels + config.edge) // 2) * chunks
    # Read once from L2, or written to and read from memory where L2 is too small.
    is_cached = partial_bytes <= pace.cache_bytes
    bytes_per_clock = pace.cached_load_bytes if is_cached else pace.load_bytes / 2
    reduction = partial_bytes * config.residents / (slots * bytes_per_clock)
    return rounds * mean + (longest if rest else 0.0) + reduction
