r"""Modules of torchvision with changes: any widths, boxes in float32, faster input and RoIAlign.

ResNets: blocks inherit torchvision's forward, and modules carry torchvision's names. At stock
widths a stock state_dict loads and every output bit is the same.

Anchors and heads: torchvision decodes and encodes boxes in the type of a head's predictions, and
makes anchors in the type of the feature maps. In bfloat16 that moves a coordinate near 800 by up to
2 pixels: of anchors, of proposals, of detections, and of the ground truth that box regression
learns from. Here they stay in float32 under autocast.

RoIAlign as weighted sums of feature rows: with one row of C channels for every pixel of every
level, each sample of a region is a sum of four rows, weighted bilinearly, and a cell the mean of
its samples:

.. math:: \text{out}_{c} = \sum_k a_{ck} F_{p_{ck}}

``embedding_bag`` computes it row by row. The gradient is the transposed sum, so that the same
kernel computes it from the samples sorted by their rows; torchvision's kernel for processors adds
the gradient number by number, that of ``embedding_bag`` sample by sample.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.models.resnet import BasicBlock, Bottleneck, conv1x1, conv3x3
from torchvision.ops import MultiScaleRoIAlign
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
        ``stem``, ``layer1`` to ``layer4`` (outputs of the stages) and ``layer1.0.inner1``...
        (convolutions inside one block). The stem of a basic-block ResNet is added to the first
        stage, so there ``layer1`` stands for both.
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
    """Initial state of a ResNet, as torchvision sets it."""
    for module in resnet.modules():
        if isinstance(module, nn.Conv2d) and not module.weight.is_meta:
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    if not zero_init_last_norm:
        return
    for module in resnet.modules():
        if isinstance(module, WideBottleneck | WideBasicBlock):
            last = module.bn3 if isinstance(module, WideBottleneck) else module.bn2
            nn.init.zeros_(last.weight)


class Float32Anchors(AnchorGenerator):
    """torchvision's anchors, in float32 whatever the type of the feature maps."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of every image. [A, 4] each"""
        # Only size, type and device of a map are read.
        shapes = [level.new_empty(level.shape[-2:], dtype=torch.float32) for level in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, shapes)
        return anchors


class Float32RPNHead(RPNHead):
    """torchvision's RPN head; scores and box offsets leave it in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and box offsets of every level."""
        scores, offsets = super().forward(x)
        return [level.float() for level in scores], [level.float() for level in offsets]


class Float32BoxPredictor(FastRCNNPredictor):
    """torchvision's box predictor; class scores and box offsets leave it in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [R, K] and box offsets [R, 4 K] of R regions."""
        scores, offsets = super().forward(x)
        return scores.float(), offsets.float()


class BatchTransform(GeneralizedRCNNTransform):
    """Transform that normalises, resizes and pads images as torchvision does, to the same bits.

    Images of one shape whose edges are those of the configuration, and multiples of 32, need
    neither resizing nor padding: they are stacked and normalised in one go, where torchvision
    interpolates and copies every image by itself.
    """

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None
    ) -> tuple[ImageList, list[dict[str, Any]] | None]:
        """Batch for the detector; see torchvision's ``GeneralizedRCNNTransform.forward``."""
        if not self._are_ready(images):
            prepared: tuple[ImageList, list[dict[str, Any]] | None] = super().forward(
                images, targets
            )
            return prepared
        if self.training:
            for _ in images:  # torchvision draws an edge for each: later draws stay the same
                self.torch_choice(self.min_size)
        height, width = images[0].shape[-2:]
        batch = self.normalize(torch.stack(images))
        copies = None if targets is None else [dict(target) for target in targets]
        return ImageList(batch, [(height, width)] * len(images)), copies

    def _are_ready(self, images: list[Tensor]) -> bool:
        shape = images[0].shape
        if len(shape) != 3 or len(self.min_size) != 1 or self.fixed_size is not None:
            return False
        edges = shape[-2:]
        return (
            min(edges) == self.min_size[0]
            and max(edges) <= self.max_size
            and all(edge % self.size_divisible == 0 for edge in edges)
            and all(image.shape == shape and image.is_floating_point() for image in images)
        )


class _WeightedRows(torch.autograd.Function):
    """Weighted sums of rows, with a gradient with respect to the rows alone.

    Rows [P, C], the rows that each cell reads [N, K] and their weights [N, K] give cells [N, C].
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.count = len(rows)
        return functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        read = index.flatten()
        # Sorted 32-bit numbers take half the time; the order of equal ones fixes that of the sums.
        order = torch.argsort(read.int(), stable=True)
        ends = torch.cumsum(torch.bincount(read, minlength=ctx.count), 0)
        gradient = functional.embedding_bag(
            torch.div(order, index.shape[1], rounding_mode="floor"),
            gradients[0].contiguous(),
            offsets=functional.pad(ends[:-1], (1, 0)),
            mode="sum",
            per_sample_weights=weight.flatten()[order],
        )
        return gradient, None, None


class RowRoIAlign(MultiScaleRoIAlign):
    """Pooling of regions of a feature pyramid, equal to torchvision's up to rounding.

    Raises:
        ValueError: If ``sampling_ratio`` is below 1.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.sampling_ratio < 1:
            raise ValueError(
                f"roi_sampling_ratio is {self.sampling_ratio}; roi_align=rows needs a fixed number "
                "of samples, at least 1"
            )

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Pooled regions.

        Args:
            x: Pyramid levels by name. [B, C, H, W]
            boxes: Corners of each image's regions, in pixels. [R, 4]
            image_shapes: Height and width of each image.

        Returns:
            Regions of all images in order. [R, C, output_size, output_size]
        """
        features = [x[name] for name in self.featmap_names]
        edge = max(max(shape) for shape in image_shapes)
        strides = [2 ** round(math.log2(edge / max(f.shape[-2:]))) for f in features]
        rows = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features])
        corners = torch.cat(boxes).detach()
        image = torch.repeat_interleave(
            torch.arange(len(boxes), device=corners.device),
            torch.tensor([len(regions) for regions in boxes], device=corners.device),
        )
        level = self._levels(corners, strides)
        sizes = torch.tensor([f.shape[-2:] for f in features], device=corners.device)
        counts = sizes.prod(1) * len(boxes)
        starts = torch.cumsum(counts, 0) - counts
        height, width = sizes[level].unbind(1)
        scaled = corners / torch.tensor(strides, device=corners.device)[level, None]
        row, row_weight = self._axis(scaled[:, 1], scaled[:, 3], height)
        column, column_weight = self._axis(scaled[:, 0], scaled[:, 2], width)
        first = starts[level] + image * height * width
        # [R, i, j, samples of both axes, 2 rows, 2 columns]
        index = first[:, None, None, None] + (
            (row * width[:, None, None])[:, :, None, :, None] + column[:, None, :, None, :]
        ).flatten(3)
        weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
        cells = self.output_size[0]
        pooled = _WeightedRows.apply(
            rows, index.flatten(0, 2), weight.flatten(3).flatten(0, 2).to(rows.dtype)
        )
        return pooled.reshape(-1, cells, cells, rows.shape[1]).permute(0, 3, 1, 2)

    def _levels(self, corners: Tensor, strides: Sequence[int]) -> Tensor:
        """Index of the pyramid level of every region. [R]"""
        edges = corners[:, 2:] - corners[:, :2]
        scale = edges.prod(1).clamp_min(0).sqrt() / self.canonical_scale
        # torchvision's small number, for areas at the very border of two levels.
        level = torch.floor(self.canonical_level + torch.log2(scale) + 1e-6)
        first = int(math.log2(strides[0]))
        return level.clamp(first, first + len(strides) - 1).long() - first

    def _axis(self, low: Tensor, high: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels that each cell reads along one axis, and their weights. [R, cells, 2 * samples]"""
        cells, samples = self.output_size[0], self.sampling_ratio
        offsets = (torch.arange(cells * samples, device=low.device) + 0.5) / (cells * samples)
        position = low[:, None] + (high - low).clamp_min(1)[:, None] * offsets
        last = (size - 1)[:, None]
        is_inside = (position >= -1) & (position <= size[:, None])
        position = position.clamp_min(0).minimum(last.to(position.dtype))
        pixel = position.floor().long()
        share = position - pixel
        pixels = torch.stack([pixel, (pixel + 1).minimum(last)], dim=-1)
        weights = torch.stack([1 - share, share], dim=-1) * is_inside[..., None] / samples
        shape = (len(low), cells, 2 * samples)
        return pixels.reshape(shape), weights.reshape(shape)
