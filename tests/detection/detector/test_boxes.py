"""Boxes under autocast: in float32 from the anchors to the detections."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fastcov_detection.config import ModelConfig
from fastcov_detection.detector.build import build_model


def test_boxes_keep_their_pixels_under_autocast(tiny_model: ModelConfig) -> None:
    """bfloat16 has 8 bits: 513 would become 512, and 799 800."""
    model = build_model(replace(tiny_model, min_size=800, max_size=800), num_classes=4).train()
    seen: dict[str, list[Tensor]] = {}
    model.rpn.anchor_generator.register_forward_hook(
        lambda module, inputs, found: seen.update(anchors=found)
    )
    model.rpn.register_forward_hook(lambda module, inputs, found: seen.update(proposals=found[0]))
    encode = model.roi_heads.box_coder.encode

    def watched(references: list[Tensor], proposals: list[Tensor]) -> list[Tensor]:
        seen.update(references=references)
        return encode(references, proposals)

    model.roi_heads.box_coder.encode = watched
    truth = torch.tensor([[513.0, 515.0, 799.0, 797.0]])
    target = {"boxes": truth, "labels": torch.tensor([1])}
    with torch.autocast("cpu", torch.bfloat16):
        model([torch.rand(3, 800, 800)], [target])
        found = model.eval()([torch.rand(3, 800, 800)])[0]
    assert {one.dtype for part in seen.values() for one in part} == {torch.float32}
    assert found["boxes"].dtype == found["scores"].dtype == torch.float32
    odd = (seen["anchors"][0] % 2 == 1) & (seen["anchors"][0] > 512)
    assert odd.any()
    assert (seen["references"][0] == truth).all(dim=1).any()
