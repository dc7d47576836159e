"""ResNets of any widths, made of torchvision's own blocks.

The blocks inherit torchvision's forward, and modules carry torchvision's names: at stock widths a
stock state_dict loads and every output bit is the same.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3
from torchvision.ops.misc import FrozenBatchNorm2d

STAGE_BLOCKS: dict[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 6, 3),
    101: (3, 4, 23, 3),
    152: (3, 8, 36, 3),
}
STAGE_PLANES = (64, 128, 256, 512)
BOTTLENECK_FROM = 50
"""Depth from which ResNets have bottleneck blocks."""

NORMS = (nn.modules.batchnorm._BatchNorm, nn.GroupNorm, FrozenBatchNorm2d)
NormLayer = Callable[[int], nn.Module]


_GROUPS = 32


def norm_groups(width: int, rule: str = "nearest") -> int:
    """Groups of a GroupNorm.

    Args:
        width: Channels.
        rule: ``nearest``: the divisor of the width that is nearest to 32 and leaves at least two
            channels a group, of two the smaller; ``common``: the largest common divisor with 32.

    Example:
        >>> [norm_groups(width) for width in (64, 1000, 104, 16, 41)]
        [32, 25, 26, 8, 1]
    """
    if rule == "common":
        return math.gcd(_GROUPS, width)
    if rule != "nearest":
        raise ValueError(f"unknown rule of groups {rule!r}; choose from nearest, common")
    divisors = [groups for groups in range(1, width // 2 + 1) if width % groups == 0] or [1]
    return min(divisors, key=lambda groups: (abs(groups - _GROUPS), groups))


def unusual_groups(model: nn.Module) -> dict[int, int]:
    """Groups of the model's GroupNorms by width, where they are not 32."""
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    return {n.num_channels: n.num_groups for n in norms if n.num_groups != _GROUPS}


def norm_layer(kind: str, groups: str = "nearest") -> NormLayer:
    """Constructor of a normalisation.

    Args:
        kind: ``batch``, ``sync``, ``group`` or ``frozen``.
        groups: Rule of :func:`norm_groups`.
    """
    if kind == "group":
        return lambda width: nn.GroupNorm(norm_groups(width, groups), width)
    kinds: dict[str, NormLayer] = {
        "batch": nn.BatchNorm2d,
        "sync": nn.SyncBatchNorm,
        "frozen": FrozenBatchNorm2d,
    }
    if kind not in kinds:
        raise ValueError(f"unknown norm {kind!r}; choose from batch, sync, group, frozen")
    return kinds[kind]


class WideBasicBlock(BasicBlock):
    """torchvision's basic block with an inner width of its own."""

    def __init__(
        self, entry: int, inner: tuple[int, ...], width: int, stride: int, norm: NormLayer
    ) -> None:
        nn.Module.__init__(self)
        (inner1,) = inner
        self.conv1 = conv3x3(entry, inner1, stride)
        self.bn1 = norm(inner1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = conv3x3(inner1, width)
        self.bn2 = norm(width)
        self.downsample = shortcut(entry, width, stride, norm)
        self.stride = stride


class WideBottleneck(Bottleneck):
    """torchvision's bottleneck with two inner widths of its own."""

    def __init__(
        self,
        entry: int,
        inner: tuple[int, ...],
        width: int,
        stride: int,
        norm: NormLayer,
        project: bool,
    ) -> None:
        nn.Module.__init__(self)
        inner1, inner2 = inner
        self.conv1 = conv1x1(entry, inner1)
        self.bn1 = norm(inner1)
        self.conv2 = conv3x3(inner1, inner2, stride)
        self.bn2 = norm(inner2)
        self.conv3 = conv1x1(inner2, width)
        self.bn3 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = shortcut(entry, width, stride, norm, project)
        self.stride = stride


def shortcut(
    entry: int, width: int, stride: int, norm: NormLayer, project: bool = False
) -> nn.Sequential | None:
    """The projection of a block's input, where the block changes its shape."""
    if stride == 1 and entry == width and not project:
        return None
    return nn.Sequential(conv1x1(entry, width, stride), norm(width))


def stock_widths(depth: int, multiplier: float = 1.0) -> dict[str, int]:
    """Widths of every group of a ResNet's backbone, in forward order.

    Args:
        depth: 18, 34, 50, 101 or 152.
        multiplier: Scales every width; at least 1 channel stays.

    Returns:
        ``stem``, ``layer1`` to ``layer4`` (what a stage's blocks add up to) and
        ``layer1.0.inner1``... (what is inside one block). The stem of a basic-block ResNet is added
        to the first stage, so there ``layer1`` stands for both.
    """
    if depth not in STAGE_BLOCKS:
        raise ValueError(
            f"no ResNet of depth {depth}; choose from {', '.join(map(str, STAGE_BLOCKS))}"
        )

    def scaled(width: int) -> int:
        return max(1, round(width * multiplier))

    bottleneck = depth >= BOTTLENECK_FROM
    widths = {"stem": scaled(STAGE_PLANES[0])} if bottleneck else {}
    for stage, (planes, blocks) in enumerate(
        zip(STAGE_PLANES, STAGE_BLOCKS[depth], strict=True), 1
    ):
        for block in range(blocks):
            for inner in range(1, 3 if bottleneck else 2):
                widths[f"layer{stage}.{block}.inner{inner}"] = scaled(planes)
        widths[f"layer{stage}"] = scaled(planes * (4 if bottleneck else 1))
    return widths


def build_resnet(
    depth: int, widths: Mapping[str, int], norm: NormLayer, zero_init_last_norm: bool = False
) -> nn.Sequential:
    """A ResNet without its classifier.

    Args:
        depth: 18, 34, 50, 101 or 152.
        widths: One for every name that :func:`stock_widths` gives.
        norm: Constructor of a normalisation, see :func:`norm_layer`.
        zero_init_last_norm: Start every block as the identity.
    """
    bottleneck = depth >= BOTTLENECK_FROM
    stem = widths["stem" if bottleneck else "layer1"]
    layers: OrderedDict[str, nn.Module] = OrderedDict(
        conv1=nn.Conv2d(3, stem, kernel_size=7, stride=2, padding=3, bias=False),
        bn1=norm(stem),
        relu=nn.ReLU(inplace=True),
        maxpool=nn.MaxPool2d(kernel_size=3, stride=2, padding=1),
    )
    entry = stem
    for stage, blocks in enumerate(STAGE_BLOCKS[depth], 1):
        width = widths[f"layer{stage}"]
        stack: list[nn.Module] = []
        for block in range(blocks):
            stride = 2 if stage > 1 and block == 0 else 1
            if bottleneck:
                inner = tuple(widths[f"layer{stage}.{block}.inner{k}"] for k in (1, 2))
                stack.append(WideBottleneck(entry, inner, width, stride, norm, project=block == 0))
            else:
                inner = (widths[f"layer{stage}.{block}.inner1"],)
                stack.append(WideBasicBlock(entry, inner, width, stride, norm))
            entry = width
        layers[f"layer{stage}"] = nn.Sequential(*stack)
    resnet = nn.Sequential(layers)
    _initialise(resnet, zero_init_last_norm)
    return resnet


def _initialise(resnet: nn.Module, zero_init_last_norm: bool) -> None:
    """Gives a ResNet torchvision's initial state."""
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if not zero_init_last_norm:
        return
    for module in resnet.modules():
        if isinstance(module, WideBottleneck | WideBasicBlock):
            last = module.bn3 if isinstance(module, WideBottleneck) else module.bn2
            nn.init.zeros_(last.weight)
