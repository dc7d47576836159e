"""Script that rebuilds the detector beside this file with torch and torchvision alone."""

import json
from pathlib import Path

import torch
import torchvision
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign


def rebuild(folder=Path(__file__).parent):
    """The detector of a folder with model.json and model.pt, in eval()."""
    spec = json.loads((folder / "model.json").read_text())
    state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    groups = {int(width): count for width, count in spec["groups"].items()}
    norm = {
        "batch": nn.BatchNorm2d,
        "frozen": FrozenBatchNorm2d,
        "group": lambda width: nn.GroupNorm(groups.get(width, 32), width),
    }[spec["norm"]]
    resnet = torchvision.models.get_model(spec["resnet"], weights=None, norm_layer=norm)
    stages = [resnet.inplanes // 2**power for power in (3, 2, 1, 0)]
    levels = {f"layer{stage}": str(stage - 1) for stage in (1, 2, 3, 4)}
    fpn_norm = norm if spec["fpn_norm"] else None
    trunk = BackboneWithFPN(resnet, levels, stages, 256, norm_layer=fpn_norm)
    options = {**spec["options"], "rpn_anchor_generator": AnchorGenerator(**spec["anchors"])}
    for name, size in spec["pools"].items():
        options[name] = MultiScaleRoIAlign(output_size=size, **spec["roi_align"])
    head_norm = norm if spec["head_norm"] else None
    if spec["box_head"] == "4conv1fc":
        options["box_head"] = FastRCNNConvFCHead((256, 7, 7), [256] * 4, [1024], head_norm)
    if spec["masks"]:
        options["mask_head"] = MaskRCNNHeads(256, (256,) * 4, 1, norm_layer=head_norm)
    model = (MaskRCNN if spec["masks"] else FasterRCNN)(trunk, **options)
    for name, layer in list(model.named_modules()):  # every layer gets the width of its weights
        weight = state.get(name + ".weight")
        if weight is None or weight.shape == layer.weight.shape:
            continue
        if isinstance(layer, nn.Linear):
            new = nn.Linear(weight.shape[1], weight.shape[0])
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            ins, outs = weight.shape[:2] if layer.transposed else weight.shape[1::-1]
            size = layer.kernel_size, layer.stride, layer.padding
            new = type(layer)(ins, outs, *size, bias=layer.bias is not None)
        else:
            new = norm(len(weight))
        model.set_submodule(name, new)
    model.load_state_dict(state)
    return model.eval()


if __name__ == "__main__":
    detector = rebuild()
    print(sum(p.numel() for p in detector.parameters()), "parameters")
    print({name: tensor.shape for name, tensor in detector([torch.rand(3, 96, 96)])[0].items()})
