"""Workspace of updates on a GPU in estimate(): it comes and goes, at the peak too."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Callable
from math import ceil
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov import kernels
from fastcov.kernels.config import Architecture
from fastcov.ops import accumulate_, backend
from fastcov.ops.backend import Pretended
from fastcov.ops.covariance import Moments
from fastcov.stats.workspace import update_workspace_bytes

estimating = importlib.import_module("fastcov.estimate")  # the function hides the module
META, GPU = torch.device("meta"), torch.device("cuda", 0)
H100 = Architecture("sm_90", 132)


def meta(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")


def linear(inputs: int, channels: int) -> nn.Module:
    return nn.Linear(inputs, channels, device="meta")


def taken(rows: Tensor, **options: Any) -> int:
    return kernels.workspace_bytes(rows, architecture=H100, **options)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Tensor, torch.device, bool]]:
    """The updates whose workspace is asked for; each is said to take a byte a row."""
    calls: list[tuple[Tensor, torch.device, bool]] = []

    def note(rows: Tensor, device: torch.device, *, is_weighted: bool = False) -> int:
        calls.append((rows, device, is_weighted))
        return rows.numel() // rows.shape[-1]

    monkeypatch.setattr(estimating, "update_workspace_bytes", note)
    return calls


def test_a_cpu_takes_none_from_torch() -> None:
    for rows in ("auto", "all", 0.5):
        report = fastcov.estimate(nn.Linear(8, 60), torch.zeros(500, 8), rows=rows)
        assert report.workspace_bytes == 0
        layer = report.layers[0]
        assert report.memory_bytes == layer.state_bytes + layer.buffer_bytes
        assert "workspace" not in str(report)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_every_row_of_resnet50_takes_the_largest_layers_workspace(
    memory_format: torch.memory_format, dtype: torch.dtype
) -> None:
    pytest.importorskip("triton")
    torchvision = pytest.importorskip("torchvision")

    with torch.device("meta"):
        model = torchvision.models.resnet50().to(dtype).to(memory_format=memory_format)
    sizes: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):

            def note(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                sizes[name] = taken(output.permute(0, 2, 3, 1))

            module.register_forward_hook(note)
    images = meta(256, 3, 224, 224, dtype=dtype).contiguous(memory_format=memory_format)
    report = fastcov.estimate(model, images, rows="all", include="*conv*")
    told = {layer.name: layer.workspace_bytes for layer in report.layers}
    assert told == {name: sizes[name] for name in told}
    # One update after another, not all at once.
    assert report.workspace_bytes == max(told.values()) < sum(told.values())
    assert report.workspace_bytes > 2**20
    stay = sum(layer.state_bytes + layer.buffer_bytes for layer in report.layers)
    assert report.memory_bytes == stay + report.workspace_bytes
    largest = max(told, key=lambda name: told[name])
    line = next(line for line in str(report).splitlines() if "workspace" in line)
    assert f"{report.workspace_bytes / 2**20:.2f} MiB" in line
    assert line.endswith(largest)


def test_calls_are_asked_for_as_they_lie(asked: list[Any]) -> None:
    """Where rows are read at once the kernel is chosen by their strides."""
    model = nn.Conv2d(3, 16, 1, device="meta")
    fastcov.estimate(model, meta(4, 3, 8, 8), rows="all")
    (rows, device, is_weighted), *waiting = asked
    assert rows.shape == (4, 8, 8, 16)
    assert rows.stride() == (1024, 8, 1, 64)  # planes
    assert (device, is_weighted) == (META, False)
    assert not any(rows.numel() for rows, _, _ in waiting)


@pytest.mark.parametrize("weighting", ["position", "image"])
def test_rows_that_have_waited_are_added_together(weighting: Any, asked: list[Any]) -> None:
    """Fewer rows than are added at once: the update is that of a buffer, weighted by images."""
    report = fastcov.estimate(linear(8, 60), meta(100, 8), rows="all", weighting=weighting)
    assert {rows.shape[-1] for rows, _, _ in asked} == {60}
    assert max(len(rows) for rows, _, _ in asked) == 120
    assert {is_weighted for _, _, is_weighted in asked} == {weighting == "image"}
    assert report.workspace_bytes == 120


def test_a_buffer_less_than_full_may_take_more() -> None:
    pytest.importorskip("triton")
    channels = 1536
    told = fastcov.estimate(linear(8, channels), meta(500, 8), rows="all").workspace_bytes
    sizes = [taken(meta(rows, channels)) for rows in range(96, 2 * channels + 1, 96)]
    assert told >= max(sizes)


def test_sampled_rows_are_copied_where_they_do_not_wait(asked: list[Any]) -> None:
    report = fastcov.estimate(linear(8, 16), meta(100_000, 8), rows=0.5)
    assert report.layers[0].buffer_bytes == 0
    assert report.workspace_bytes == 50_000 * 16 * 4 + 50_000


def test_samples_in_a_device_buffer_are_not_counted_twice(asked: list[Any]) -> None:
    report = fastcov.estimate(linear(8, 16), meta(1001, 8), rows=0.5)
    assert report.layers[0].buffer_bytes > 0
    assert report.workspace_bytes == ceil(0.5 * 1001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_weighted", [False, True])
def test_a_gpu_is_asked_for_its_own_shapes(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, is_weighted: bool
) -> None:
    pytest.importorskip("triton")
    small = Architecture("sm_80", 8)
    monkeypatch.setattr(backend, "active", Pretended(backend.GPU))
    monkeypatch.setattr(kernels, "architecture_of", lambda _: small)
    rows = meta(50_000, 256, dtype=dtype)
    told = update_workspace_bytes(rows, GPU, is_weighted=is_weighted)
    assert told == kernels.workspace_bytes(rows, is_weighted=is_weighted, architecture=small)
    assert 0 < told < update_workspace_bytes(rows, META, is_weighted=is_weighted)


def test_where_no_triton_serves_nothing_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = meta(5000, 64)
    monkeypatch.setattr(backend, "active", Pretended(backend.HOST))
    assert update_workspace_bytes(rows, GPU) == 0
    assert update_workspace_bytes(rows, torch.device("cpu")) == 0
    assert update_workspace_bytes(rows.double(), META) == 0
    monkeypatch.setattr(kernels, "unavailable_reason", lambda: "not installed")
    assert update_workspace_bytes(rows, META) == 0


def on_the_gpu(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(size, device="cuda").to(dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize(
    "rows_of",
    [
        lambda dtype: on_the_gpu(50_000, 256, dtype=dtype),
        lambda dtype: on_the_gpu(3000, 1536, dtype=dtype),
        lambda dtype: on_the_gpu(64, 64, 28, 28, dtype=dtype).permute(0, 2, 3, 1),
    ],
    ids=["rows", "wide", "planes"],
)
def test_an_update_takes_what_is_told(
    rows_of: Callable[[torch.dtype], Tensor], is_weighted: bool, dtype: torch.dtype
) -> None:
    rows = rows_of(dtype)
    told = update_workspace_bytes(rows, rows.device, is_weighted=is_weighted)
    assert told > 0
    moments = Moments(rows.shape[-1], rows.device)
    count = rows.shape[:-1].numel()
    weight = torch.rand(count, dtype=torch.float64, device="cuda") if is_weighted else None
    accumulate_(moments, rows, weight)
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_stats()["requested_bytes.all.current"]
    accumulate_(moments, rows, weight)
    torch.cuda.synchronize()
    peak = torch.cuda.memory_stats()["requested_bytes.all.peak"]
    assert peak - before == pytest.approx(told, rel=0.02)


class Masked(nn.Module):
    """Two layers, whose forward is given a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.narrow = nn.Linear(6, 40), nn.Linear(40, 5)

    def forward(self, rows: Tensor, mask: Tensor) -> Tensor:
        del mask
        return self.narrow(self.wide(rows))


def held_bytes(layer: Any) -> int:
    """Memory of a layer's state and of the rows that wait."""
    state, buffer, weighted = layer.state, layer.buffer.storage, layer._weighted
    tensors = [*state.state_dict().values()]
    tensors += [each for each in (buffer, weighted._rows, weighted._weights) if each is not None]
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("rows", ["all", 12, 0.5])
@pytest.mark.parametrize(
    "options",
    [
        {"of": "both"},
        {"of": "gradient", "where": "both"},
        {"pairs": [("wide", "narrow")]},
        {"mask": "mask"},
        {"mask": "mask", "weighting": "image", "of": "both", "pairs": [("narrow", "wide")]},
    ],
    ids=str,
)
def test_gradients_masks_and_pairs_are_counted(options: dict[str, Any], rows: Any) -> None:
    torch.manual_seed(0)
    model = Masked()
    mask = torch.rand(3, 9) < 0.6
    example = {"rows": torch.randn(3, 9, 6, requires_grad=True), "mask": mask}
    report = fastcov.estimate(model, example, rows=rows, **options)
    with fastcov.track(model, rows=rows, **options) as tracker:
        for _ in range(3):
            model(**example).sum().backward()
        tracker.watcher.settle()
        held = {name: held_bytes(layer) for name, layer in tracker.watcher.taps.layers.items()}
        for names, pair in tracker.watcher.pairs.items():
            held[" x ".join(names)] = held_bytes(pair.layer)
        told = {each.name: each.state_bytes + each.buffer_bytes for each in report.layers}
        assert told == held
        for each in report.layers:
            if each.name in tracker.names():
                count = tracker.count(each.name)
                assert each.rows_read == pytest.approx(count / 3, rel=0.4), each.name


def test_small_sums_are_printed_with_their_digits() -> None:
    text = str(fastcov.estimate(nn.Linear(3, 64), torch.zeros(4096, 3), rows=1234))
    assert ", 1234 of 4096 rows a step, " in text
    assert " 0.0 MiB" not in text


def test_transformers_are_counted_unfused_and_padding_is_taken() -> None:
    layer = nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2)
    example = {"src": torch.zeros(3, 12, 32)}
    plain = fastcov.estimate(encoder, example)
    padding = torch.arange(12) >= torch.tensor([12, 5, 3])[:, None]
    padded = fastcov.estimate(encoder, example | {"src_key_padding_mask": padding})
    assert [each.rows_offered for each in padded.layers] == [3 * 12] * 6
    # A fused layer and a fused attention would hide their own arithmetic.
    rows = 3 * 12
    projections, attention = rows * (4 * 32 * 32 + 2 * 32 * 64), rows * 12 * 2 * 32
    assert plain.forward_flops == padded.forward_flops == 2 * 2 * (projections + attention)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("key_heads", [4, 2])
def test_attention_of_a_cpu_is_counted(key_heads: int) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            query = x.unflatten(-1, (4, 8)).transpose(1, 2)
            others = query[:, :key_heads]
            mixed = nn.functional.scaled_dot_product_attention(
                query, others, others, enable_gqa=key_heads < 4
            )
            return self.out(mixed.transpose(1, 2).flatten(2))

    report = fastcov.estimate(Attention(), torch.zeros(3, 12, 32))
    assert report.forward_flops == 2 * 3 * 12 * (32 * 32 + 2 * 12 * 32)
