"""Pure parts: layouts describe every element, chunks cover every row, chains stay short."""

from __future__ import annotations

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from fastcov.kernels.config import (
    FLUSH_CHAIN_ROWS,
    GRAM_CONFIGS,
    MAX_CHAIN_ROWS,
    Architecture,
    GramCase,
    chain_rows,
    gram_case,
    gram_config,
)
from fastcov.kernels.gpus import GPUS, gpu_named, gpu_told
from fastcov.kernels.layout import RowLayout, row_layout, row_layout_of
from fastcov.kernels.plan import MAX_CHAINS, block_plan, gram_plan


def addresses(layout: RowLayout) -> list[int]:
    """Offsets of channel 0 of every row, by the formula that the kernels use."""
    found = []
    for row in range(layout.rows):
        image, position = divmod(row, layout.positions)
        outer, inner = divmod(image, layout.size_2)
        outer, middle = divmod(outer, layout.size_1)
        found.append(
            outer * layout.stride_0
            + middle * layout.stride_1
            + inner * layout.stride_2
            + position * layout.stride_position
        )
    return found


BLOCK = torch.arange(2 * 3 * 4 * 5 * 16).reshape(2, 3, 4, 5, 16).to(torch.float32)
VIEWS = {
    "matrix": (BLOCK.reshape(-1, 16), "rows"),
    "channels_last": (BLOCK[0].to(torch.float32), "rows"),
    "nchw": (BLOCK[0].permute(0, 2, 3, 1), "planes"),
    "planes": (BLOCK.reshape(2, 3, 320).permute(0, 2, 1), "planes"),
    "tokens": (BLOCK.reshape(6, 20, 16)[:, 1:], "rows"),
    "part of each image": (BLOCK[:, :, ::2], "rows"),
    "deep": (BLOCK[:, ::2, ::2], "strided"),
    "every second channel": (BLOCK[..., ::2], "strided"),
    "reversed dimensions": (BLOCK.permute(3, 2, 1, 0, 4), "strided"),
    "one row": (BLOCK[0, 0, 0, 0], "rows"),
    "one channel": (BLOCK[..., :1], "rows"),
    "repeated": (BLOCK[0, 0, 0, 0].expand(7, 16), "rows"),
    "one image of planes": (BLOCK.reshape(1, 6, 320).permute(0, 2, 1), "planes"),
}


@pytest.mark.parametrize("name", VIEWS)
def test_layout_finds_every_row(name):
    rows, kind = VIEWS[name]
    layout = row_layout(rows)
    assert layout.kind == kind
    channels = rows.shape[-1]
    assert (layout.rows, layout.channels) == (rows.numel() // channels, channels)
    start = torch.tensor(addresses(layout)) + rows.storage_offset()
    column = torch.arange(channels) * layout.stride_channel
    found = BLOCK.view(-1)[start[:, None] + column]
    assert torch.equal(found, rows.reshape(-1, channels))


def test_too_many_dimensions_are_named():
    rows = torch.empty(32, 32, 32)[::2, ::2, ::2].reshape(16, 16, 16)
    deep = torch.empty(4, 4, 4, 4, 4, 4)[::2, ::2, ::2, ::2, ::2]
    assert row_layout(rows).rows == 256
    with pytest.raises(ValueError, match="5 separate leading dimensions"):
        row_layout(deep)


def test_alignment_is_told_by_strides_and_address():
    rows = torch.empty(64, 72, dtype=torch.bfloat16)
    assert row_layout(rows).is_aligned
    assert row_layout(rows[:, 8:]).is_aligned
    assert not row_layout(rows[:, 1:65]).is_aligned
    assert not row_layout(rows[:, :63]).is_aligned
    assert row_layout(torch.empty(2, 5, 64).transpose(1, 2)).is_aligned
    assert not row_layout(torch.empty(2, 5, 49).transpose(1, 2)).is_aligned


def test_offsets_beyond_32_bits_take_the_wide_path():
    rows = torch.empty(1, 1 << 12, 1 << 20, device="meta").transpose(1, 2)
    assert row_layout(rows).kind == "strided"
    assert row_layout(rows[:, : 1 << 10].contiguous()).kind == "rows"


SHAPES = [
    (1, 1, 3),
    (1, 199, 64),
    (256, 12544, 64),
    (256, 3136, 256),
    (256, 196, 1024),
    (256, 49, 2048),
    (2, 67200, 64),
    (2, 1050, 2048),
    (1, 8192, 1128),
    (7, 1, 4096),
]


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("shape", SHAPES)
def test_chunks_cover_all_rows_in_short_chains(family, dtype, shape):
    images, positions, channels = shape
    architecture = Architecture(family, 132)
    element_bytes = torch.empty((), dtype=dtype).element_size()
    mode = "split" if dtype == torch.float32 else "direct"
    for rows in (
        torch.empty(images, positions, channels, dtype=dtype, device="meta"),
        torch.empty(images, channels, positions, dtype=dtype, device="meta").transpose(1, 2),
    ):
        layout = row_layout(rows)
        case = gram_case(architecture, layout, mode)
        assert case is not None
        config = gram_config(case, channels)
        chain = chain_rows(architecture, mode, dtype)
        assert FLUSH_CHAIN_ROWS <= chain <= MAX_CHAIN_ROWS
        plan = gram_plan(config, layout, element_bytes, architecture, chain)
        assert plan.steps * config.step >= layout.rows
        assert plan.steps_per_chain * config.step <= chain
        assert plan.steps_per_chunk % plan.steps_per_chain == 0
        assert plan.steps_per_chunk // plan.steps_per_chain <= MAX_CHAINS
        assert (plan.chunks - 1) * plan.steps_per_chunk < plan.steps
        assert plan.chunks * plan.steps_per_chunk >= plan.steps
        edges = -(-channels // config.edge)
        assert plan.slot == edges * (edges + 1) // 2 * config.edge**2 + edges * config.edge
        plan = block_plan(64, 32, layout, architecture, chain)
        assert plan.steps_per_chain * 32 <= chain
        assert plan.steps_per_chunk // plan.steps_per_chain <= MAX_CHAINS
        assert plan.chunks * plan.steps_per_chunk >= plan.steps


def plan_of(rows: int, channels: int, dtype: torch.dtype):
    layout = row_layout(torch.empty(rows, channels, dtype=dtype, device="meta"))
    architecture = Architecture("sm_90", 132)
    mode = "split" if dtype == torch.float32 else "direct"
    case = gram_case(architecture, layout, mode)
    assert case is not None
    config = gram_config(case, channels)
    chain = chain_rows(architecture, mode, dtype)
    return config, gram_plan(config, layout, dtype.itemsize, architecture, chain)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("channels", [64, 128, 256, 512, 1024, 2048, 4096])
def test_slots_follow_programs_not_rows(dtype, channels):
    """More rows make fuller slots; a slot more only where all are full."""
    chain = chain_rows(
        Architecture("sm_90", 132), "split" if dtype == torch.float32 else "direct", dtype
    )
    for rows in (1 << 16, 1 << 18, 1 << 20, 1 << 22):
        config, plan = plan_of(rows, channels, dtype)
        resident = 132 * config.residents
        full = -(-rows // (chain * MAX_CHAINS))
        assert plan.chunks <= full + 4 * -(-resident // plan.triangles)
        assert plan.programs >= 0.9 * min(132, rows // chain)
    _, plan = plan_of(1 << 18, 4096, dtype)
    assert 4 * plan.slot * plan.chunks < 0.5e9


@pytest.mark.parametrize("channels", [32, 64, 128])
def test_few_channels_of_many_rows_fill_the_machine(channels):
    _, plan = plan_of(1 << 18, channels, torch.bfloat16)
    assert plan.programs >= 132


def test_how_many_channels_one_triangle_holds():
    """256 of half precision; less where registers must hold three parts or pass rows on."""
    for case, configs in GRAM_CONFIGS.items():
        expected = 128
        if case.mode == "direct" and case.kind != "unaligned" and case.family != "sm_120":
            expected = 256
        if case.mode == "split" and case.family == "sm_100":
            expected = 64
        assert max(config.width for config in configs if config.left == 0) == expected, case
        assert gram_config(case, expected).left == 0
        assert gram_config(case, expected + 1).left > 0


def test_shapes_fit_together():
    for case, configs in GRAM_CONFIGS.items():
        assert [c.width for c in configs] == sorted(c.width for c in configs), case
        for config in configs:
            assert config.step % 16 == 0
            assert config.panel % config.edge == 0
        assert all(config.left == config.right == 0 for config in configs[:-1])
        assert configs[-1].panels % configs[-1].left == 0
        assert configs[-1].panels % configs[-1].right == 0


def properties(name: str, **told: object) -> SimpleNamespace:
    defaults = {"major": 9, "minor": 0, "multi_processor_count": 132, "L2_cache_size": 50 << 20}
    return SimpleNamespace(name=name, **{**defaults, **told})


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA GH200 480GB", "GH200"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA A100 80GB PCIe", "A100 80GB"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("Tesla T4", None),
    ],
)
def test_a_gpu_is_known_by_its_name(name: str, key: str | None) -> None:
    assert gpu_named(name) == (GPUS[key] if key else None)


def test_floors_of_the_design_are_those_of_the_table() -> None:
    assert GPUS["H100"].copy_bytes_s == pytest.approx(3.0e12, rel=0.01)
    assert GPUS["H200"].copy_bytes_s == pytest.approx(4.3e12, rel=0.01)
    for name in ("H100", "H200"):
        assert GPUS[name].matmul_flop_s == pytest.approx(790e12, rel=0.02)
    assert GPUS["A100"].matmul_flop_s == pytest.approx(0.8 * 312e12, rel=0.02)
    assert GPUS["B200"].matmul_flop_s == pytest.approx(0.8 * 2250e12, rel=0.02)


def test_the_driver_is_believed_before_the_table() -> None:
    told = gpu_told(
        properties(
            "NVIDIA H200", memory_clock_rate=3_201_000, memory_bus_width=6144, L2_cache_size=7
        )
    )
    assert told.bandwidth == pytest.approx(4.9e12, rel=0.01)
    assert (told.cache_bytes, told.macs) == (7, 2048)
    assert gpu_told(properties("NVIDIA H200")).bandwidth == GPUS["H200"].bandwidth
    unknown = gpu_told(properties("NVIDIA X", major=12, clock_rate=2_000_000))
    assert (unknown.macs, unknown.clock_hz) == (256, 2e9)


def test_a_plan_follows_the_gpu() -> None:
    """More chunks where partial results are read back faster than rows are multiplied."""
    layout = row_layout(torch.empty(1 << 18, 512, dtype=torch.bfloat16, device="meta"))
    config = gram_config(GramCase("sm_90", "direct", "matrix"), 512)
    chunks = {
        name: gram_plan(config, layout, 2, Architecture("sm_90", 132, GPUS[name].pace), 2048).chunks
        for name in ("H100", "H200")
    }
    assert chunks["H100"] < chunks["H200"]
    assert Architecture.of(properties("NVIDIA H100 80GB HBM3")) == Architecture("sm_90", 132)


def test_importing_fastcov_imports_no_triton():
    code = (
        "import sys, fastcov, fastcov.kernels;"
        "fastcov.kernels.unavailable_reason();"
        "sys.exit('triton' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_package_names_its_launchers_and_no_others():
    from fastcov import kernels

    pytest.importorskip("triton")
    assert kernels.unavailable_reason() is None
    for name in kernels.__all__:
        assert getattr(kernels, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'launch_nothing'"):
        _ = kernels.launch_nothing


@pytest.mark.parametrize(
    ("size", "dtype", "is_weighted"),
    [
        ((3000, 300), torch.bfloat16, False),
        ((3000, 24), torch.float32, False),
        ((3000, 24), torch.float32, True),
    ],
)
def test_workspace_is_what_a_launch_takes(monkeypatch, size, dtype, is_weighted):
    pytest.importorskip("triton")
    from fastcov.kernels import covariance, launch

    rows = torch.empty(size, dtype=dtype)
    weight = torch.empty(size[0], dtype=torch.float64) if is_weighted else None
    state = [torch.zeros(size[1], size[1]), *torch.zeros(3, size[1]), torch.zeros(2)]
    monkeypatch.setattr(launch.Launch, "start", lambda *_: None)
    taken = []

    def counting(real):
        def count(*arguments, **options):
            taken.append(real(*arguments, **options))
            return taken[-1]

        return count

    monkeypatch.setattr(torch.Tensor, "new_empty", counting(torch.Tensor.new_empty))
    monkeypatch.setattr(torch, "empty", counting(torch.empty))
    architecture = Architecture("sm_90", 132)
    covariance.launch_accumulate_(*state, rows, weight, architecture=architecture)
    expected = covariance.workspace_bytes(rows, is_weighted=is_weighted, architecture=architecture)
    sizes = [tensor.nbytes for tensor in taken if tensor.nbytes]
    assert sum(sizes) == expected
    assert len(sizes) == 1 + is_weighted


def test_memory_that_no_program_waits_for_changes_no_plan() -> None:
    """Programs of a chunk share its rows: of 2048 channels the cache binds, whatever the memory."""
    layout = row_layout_of((1 << 18, 2048), (2048, 1), 2, True)
    pace = GPUS["H100"].pace
    plans = []
    for factor in (1.0, 1.5):
        faster = pace._replace(load_bytes=factor * pace.load_bytes, cache_bytes=1 << 30)
        architecture = Architecture("sm_90", 132, faster)
        case = gram_case(architecture, layout, "direct")
        assert case is not None
        plans.append(gram_plan(gram_config(case, 2048), layout, 2, architecture, 2048))
    assert plans[0] == plans[1]
