"""How the rows of one update are cut into chunks, so that all multiprocessors end together."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from fastcov.kernels.config import Architecture, GramConfig
from fastcov.kernels.layout import RowLayout

# A model of one H100-like multiprocessor, from its data sheet; only ratios matter.
_MACS_PER_CLOCK = 2048  # bfloat16 with float32 sums
_LOAD_BYTES_PER_CLOCK = 14  # its share of 3.35 TB/s
_CACHE_BYTES_PER_CLOCK = 24  # its share of what L2 delivers
_START_CLOCKS = 3000  # launch, filling the pipeline, first address


@dataclass(frozen=True)
class Plan:
    """One update's grid.

    Attributes:
        edge: Edge of the blocks of the packed triangle.
        edges: Blocks along its diagonal.
        triangles: Programs that cover the diagonal, per chunk.
        tiles: Programs below the diagonal, per chunk.
        steps: Steps of all rows; an image's last step may be shorter.
        steps_per_chunk: At most one chain of rows.
        chunks: Parts that are summed apart.
    """

    edge: int
    edges: int
    triangles: int
    tiles: int
    steps: int
    steps_per_chunk: int
    chunks: int

    @property
    def blocks(self) -> int:
        """Blocks of the packed triangle."""
        return self.edges * (self.edges + 1) // 2

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
    """Chunks for gram_kernel: the fewest clocks that the model foresees."""
    return _gram_plan(
        config,
        layout.channels,
        layout.images * -(-layout.positions // config.step),
        element_bytes,
        architecture.multiprocessors,
        chain_rows,
    )


def block_plan(
    edge: int, step: int, layout: RowLayout, architecture: Architecture, chain_rows: int
) -> Plan:
    """Chunks for block_kernel: about eight programs a multiprocessor."""
    edges = -(-layout.channels // edge)
    blocks = edges * (edges + 1) // 2
    steps = layout.images * -(-layout.positions // step)
    least = -(-steps // (chain_rows // step))
    wanted = -(-8 * architecture.multiprocessors // blocks)
    per_chunk = -(-steps // max(1, least, min(wanted, steps)))
    return Plan(edge, edges, 1, 0, steps, per_chunk, -(-steps // per_chunk))


@lru_cache(maxsize=4096)
def _gram_plan(
    config: GramConfig,
    channels: int,
    steps: int,
    element_bytes: int,
    multiprocessors: int,
    chain_rows: int,
) -> Plan:
    triangles = -(-channels // config.width)
    tiles = 0
    if config.left:
        tiles = triangles * (triangles - 1) // 2
        tiles *= (config.panels // config.left) * (config.panels // config.right)
    most_steps = chain_rows // config.step
    least = -(-steps // most_steps)
    slots = multiprocessors * config.residents
    # Chunks so short that a program's start outweighs its work are never tried.
    most = max(least, min(steps, least + 4 * -(-slots // triangles)))
    best: tuple[float, int] | None = None
    for chunks in range(least, most + 1):
        per_chunk = -(-steps // chunks)
        if -(-steps // per_chunk) != chunks:
            continue
        clocks = _clocks(
            config, channels, element_bytes, triangles, tiles, per_chunk, chunks, slots
        )
        if best is None or clocks < best[0]:
            best = (clocks, per_chunk)
    per_chunk = best[1] if best else -(-steps // least)
    return Plan(
        config.edge,
        -(-channels // config.edge),
        triangles,
        tiles,
        steps,
        per_chunk,
        -(-steps // per_chunk),
    )


def _clocks(
    config: GramConfig,
    channels: int,
    element_bytes: int,
    triangles: int,
    tiles: int,
    per_chunk: int,
    chunks: int,
    slots: int,
) -> float:
    rows = per_chunk * config.step
    products = 6 if element_bytes == 4 else 1
    area = config.panel**2 * products * config.residents / _MACS_PER_CLOCK
    row_bytes = element_bytes * config.residents
    triangle_row = max(
        area * config.panels * (config.panels + 1) / 2,
        row_bytes * min(channels, config.width) / _LOAD_BYTES_PER_CLOCK,
    )
    tile_row = max(
        area * config.left * config.right,
        row_bytes * config.panel * (config.left + config.right) / _CACHE_BYTES_PER_CLOCK,
    )
    entries = config.width * (config.width + config.edge) // 2
    fixed = _START_CLOCKS + 4 * entries * config.residents / _CACHE_BYTES_PER_CLOCK
    longest = fixed + rows * max(triangle_row, tile_row)
    mean = fixed + rows * (triangles * triangle_row + tiles * tile_row) / (triangles + tiles)
    rounds, rest = divmod((triangles + tiles) * chunks, slots)
    entries = channels * (channels + config.edge) // 2
    reduction = 4 * entries * chunks * config.residents
    return rounds * mean + (longest if rest else 0.0) + reduction / (slots * _CACHE_BYTES_PER_CLOCK)
