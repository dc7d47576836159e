"""The roofline model: DESIGN's two floors, shapes of the real model, and its laws."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from fastcov.kernels.gpus import GPUS


@pytest.fixture(scope="module")
def roofline() -> ModuleType:
    path = Path(__file__).parents[2] / "benchmarks" / "roofline.py"
    spec = importlib.util.spec_from_file_location("roofline", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["roofline"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def rates(name: str = "H100") -> tuple[float, float]:
    return GPUS[name].copy_bytes_s, GPUS[name].matmul_flop_s


@pytest.mark.parametrize(
    ("gpu", "sizes", "wall_ms"),
    [
        ("H100", (256, 224, 224), 2.5),
        ("H100", (2, 800, 1344), 0.41),
        ("H200", (256, 224, 224), 2.13),
        ("H200", (2, 800, 1344), 0.356),
    ],
)
def test_floor_of_resnet50(roofline, gpu, sizes, wall_ms):
    total_s = roofline.total_floor_s(roofline.resnet50_layers(*sizes), *rates(gpu))
    assert total_s * 1e3 == pytest.approx(wall_ms, rel=0.03)


@pytest.mark.parametrize("size", [(2, 64, 64), (1, 75, 130)])
def test_layers_are_those_of_the_model(roofline, size):
    from torchvision.models import resnet50

    seen: list[tuple[int, int]] = []
    with torch.device("meta"):
        model = resnet50()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(
                    lambda _module, _inputs, output: seen.append(
                        (output.numel() // output.shape[1], output.shape[1])
                    )
                )
        model(torch.empty(size[0], 3, *size[1:]))
    layers = roofline.resnet50_layers(*size)
    assert sorted((layer.rows, layer.channels) for layer in layers) == sorted(seen)


def test_bound_changes_at_405_channels(roofline):
    narrow, wide = (
        roofline.layer_floor(roofline.Layer(1 << 18, channels), *rates()) for channels in (384, 512)
    )
    assert narrow.bound == "memory"
    assert wide.bound == "matmul"


def test_table_sums_to_the_total(roofline):
    layers = roofline.resnet50_layers(2, 64, 64, dtype="float32")
    table = roofline.format_table("t", layers, *rates())
    total_ms = roofline.total_floor_s(layers, *rates()) * 1e3
    assert table.endswith(f"53 layers: at least {total_ms:.2f} ms")
    assert sum(int(line.split()[0]) for line in table.splitlines()[2:-1]) == 53


def test_floors_by_hand(roofline):
    """200 rows of 300 channels: 3 tiles of 128 along the edge, 6 below and on the diagonal."""
    layer = roofline.Layer(200, 300, "float32")
    floor = roofline.layer_floor(layer, bandwidth=1e9, matmul_flops=1e12)
    assert floor.read_s == pytest.approx(200 * 300 * 4 / 1e9)
    # float32 takes six products of bfloat16 parts, see kernels/tiles.py.
    assert floor.matmul_s == pytest.approx(6 * 2 * 200 * 6 * 128**2 / 1e12)
    assert floor.wall_s == max(floor.read_s, floor.matmul_s)


def test_command_prints_the_design_floors(roofline, capsys):
    roofline.main([])
    totals = [line for line in capsys.readouterr().out.splitlines() if "layers: at least" in line]
    assert [float(line.split()[-2]) for line in totals] == pytest.approx(
        [2.13, 0.356, 2.5, 0.41], rel=0.03
    )


def test_command_prints_any_layers(roofline, capsys):
    options = ["--gpu", "A100", "--bandwidth", "2e12", "--matmul-flops", "5e14"]
    roofline.main([*options, "802816x256", "50176x1024*6"])
    lines = capsys.readouterr().out.rstrip().splitlines()
    assert lines[0] == "A100: at 2.00 TB/s and 500 TFLOP/s"
    layers = [*roofline.parsed_layers("802816x256"), *roofline.parsed_layers("50176x1024*6")]
    total_ms = roofline.total_floor_s(layers, 2e12, 5e14) * 1e3
    assert lines[-1] == f"7 layers: at least {total_ms:.2f} ms"
    assert [line.split()[:3] for line in lines[-3:-1]] == [
        ["1", "802816", "256"],
        ["6", "50176", "1024"],
    ]


@pytest.mark.parametrize("word", ["256", "0x64", "64x0", "8x8*0", "8x-8", "8x8x8"])
def test_command_names_what_is_no_layer(roofline, capsys, word):
    with pytest.raises(SystemExit):
        roofline.main([word])
    assert f"'{word}' is no layer" in capsys.readouterr().err
