"""Least time that second moments of a model's layers can take on a GPU, as a table.

A layer's rows must be read once, and its lower triangle takes half the flops of a full product,
rounded up to whole tiles: the floor is the longer of the two. ``python benchmarks/roofline.py``
prints ResNet-50's 53 convolution outputs for a training batch and for a detection batch on an H200
and an H100, or any layers: ``python benchmarks/roofline.py --gpu A100 802816x256 50176x1024*6``.
Give measured rates to hold a measurement against its own machine.
"""

from __future__ import annotations

import argparse
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from fastcov.kernels.gpus import GPUS

PLANNED = ("H200", "H100")
"""GPUs that targets are set for."""
TILE = 128
"""Channels of one tile: a triangle is paid for in whole tiles."""
PRODUCTS = {"bfloat16": 1, "float16": 1, "float32": 6}
"""Low-precision products that one product of rows takes."""
ELEMENT_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Layer:
    """Rows that one step of one layer brings."""

    rows: int
    channels: int
    dtype: str = "bfloat16"
    name: str = ""

    @property
    def bytes_read(self) -> int:
        """Bytes of the rows."""
        return self.rows * self.channels * ELEMENT_BYTES[self.dtype]

    @property
    def flops(self) -> int:
        """Flops of the lower triangle in tiles of TILE, or of all channels where they are fewer."""
        tile = min(TILE, self.channels)
        tiles = -(-self.channels // tile)
        return PRODUCTS[self.dtype] * self.rows * tile**2 * tiles * (tiles + 1)


@dataclass(frozen=True)
class Floor:
    """Seconds that a layer needs at least, and what they go to."""

    read_s: float
    matmul_s: float

    @property
    def wall_s(self) -> float:
        """Reading and multiplying overlap."""
        return max(self.read_s, self.matmul_s)

    @property
    def bound(self) -> str:
        """The longer one."""
        return "memory" if self.read_s >= self.matmul_s else "matmul"


def layer_floor(layer: Layer, bandwidth: float, matmul_flops: float) -> Floor:
    """Floor of one layer.

    Args:
        layer: Rows, channels and dtype.
        bandwidth: Bytes a second.
        matmul_flops: Low-precision flops a second.

    Returns:
        Both times.
    """
    return Floor(layer.bytes_read / bandwidth, layer.flops / matmul_flops)


def total_floor_s(layers: Iterable[Layer], bandwidth: float, matmul_flops: float) -> float:
    """Seconds of all layers, one after the other, as hooks call them."""
    return sum(layer_floor(layer, bandwidth, matmul_flops).wall_s for layer in layers)


def resnet50_layers(batch: int, height: int, width: int, dtype: str = "bfloat16") -> list[Layer]:
    """Outputs of ResNet-50's 53 convolutions, in torchvision's order and stride placement."""
    height, width = -(-height // 2), -(-width // 2)
    layers = [Layer(batch * height * width, 64, dtype, "conv1")]
    height, width = -(-height // 2), -(-width // 2)
    for stage, (blocks, inner) in enumerate(((3, 64), (4, 128), (6, 256), (3, 512)), start=1):
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            rows_in = batch * height * width
            height, width = -(-height // stride), -(-width // stride)
            rows = batch * height * width
            name = f"layer{stage}.{block}"
            layers.append(Layer(rows_in, inner, dtype, f"{name}.conv1"))
            layers.append(Layer(rows, inner, dtype, f"{name}.conv2"))
            layers.append(Layer(rows, 4 * inner, dtype, f"{name}.conv3"))
            if block == 0:
                layers.append(Layer(rows, 4 * inner, dtype, f"{name}.downsample"))
    return layers


def format_table(title: str, layers: list[Layer], bandwidth: float, matmul_flops: float) -> str:
    """Floors by shape, and their sum."""
    lines = [
        title,
        f"{'layers':>6} {'rows':>9} {'channels':>8} {'dtype':>9} {'read us':>9} {'matmul us':>9} "
        f"{'floor us':>9}  bound",
    ]
    shapes = Counter((layer.rows, layer.channels, layer.dtype) for layer in layers)
    for (rows, channels, dtype), count in shapes.items():
        floor = layer_floor(Layer(rows, channels, dtype), bandwidth, matmul_flops)
        lines.append(
            f"{count:6d} {rows:9d} {channels:8d} {dtype:>9} {count * floor.read_s * 1e6:9.1f} "
            f"{count * floor.matmul_s * 1e6:9.1f} {count * floor.wall_s * 1e6:9.1f}  {floor.bound}"
        )
    total_s = total_floor_s(layers, bandwidth, matmul_flops)
    lines.append(f"{len(layers)} layers: at least {total_s * 1e3:.2f} ms")
    return "\n".join(lines)


def parsed_layers(text: str, dtype: str = "bfloat16") -> list[Layer]:
    """Layers of one word: ROWSxCHANNELS, or ROWSxCHANNELS*COUNT for several alike.

    Raises:
        ValueError: If the word is anything else, or a number in it is 0.

    Example:
        >>> [(layer.rows, layer.channels) for layer in parsed_layers("4096x64*2")]
        [(4096, 64), (4096, 64)]
    """
    found = re.fullmatch(r"(\d+)x(\d+)(?:\*(\d+))?", text)
    rows, channels, count = (int(number or 1) for number in found.groups()) if found else (0, 0, 0)
    if not rows * channels * count:
        raise ValueError(f"{text!r} is no layer: give ROWSxCHANNELS or ROWSxCHANNELS*COUNT")
    return [Layer(rows, channels, dtype)] * count


def main(arguments: list[str] | None = None) -> None:
    """Command line: prints the floors of layers; without any, those of ResNet-50 at two sizes."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("layers", nargs="*", help="ROWSxCHANNELS or ROWSxCHANNELS*COUNT")
    parser.add_argument("--gpu", action="append", choices=sorted(GPUS), help="default: H200, H100")
    parser.add_argument("--bandwidth", type=float, help="bytes a second, in place of the GPU's")
    parser.add_argument("--matmul-flops", type=float, help="flops a second, in place of the GPU's")
    parser.add_argument("--dtype", choices=sorted(PRODUCTS), default="bfloat16")
    options = parser.parse_args(arguments)
    try:
        layers = [layer for word in options.layers for layer in parsed_layers(word, options.dtype)]
    except ValueError as error:
        parser.error(str(error))
    batches = {
        "ResNet-50, batch 256 at 224x224, every row": (256, 224, 224),
        "ResNet-50 as a detector's backbone, batch 2 at 800x1344, every row": (2, 800, 1344),
    }
    tables = {"layers": layers} if layers else {}
    for title, sizes in {} if layers else batches.items():
        tables[title] = resnet50_layers(*sizes, dtype=options.dtype)
    for name in options.gpu or PLANNED:
        bandwidth = options.bandwidth or GPUS[name].copy_bytes_s
        matmul_flops = options.matmul_flops or GPUS[name].matmul_flop_s
        rates = f"{bandwidth / 1e12:.2f} TB/s and {matmul_flops / 1e12:.0f} TFLOP/s"
        print(f"{name}: at {rates}")
        for title, found in tables.items():
            print("\n" + format_table(title, found, bandwidth, matmul_flops) + "\n")


if __name__ == "__main__":
    main()
