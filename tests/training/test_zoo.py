"""Many families of real models: every tap's count and covariance, against hooks of our own."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov

IDS = torch.randint(1, 40, (2, 10), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def images(batch: int = 2, size: int = 64) -> Tensor:
    return torch.randn(batch, 3, size, size)


def of_torchvision(name: str, **options: Any) -> Callable[[], nn.Module]:
    from torchvision import models

    return lambda: models.get_model(name, weights=None, **options)


def of_timm(name: str, **options: Any) -> Callable[[], nn.Module]:
    import timm

    return lambda: timm.create_model(name, num_classes=5, **options)


def of_transformers(kind: str, config: str, **options: Any) -> Callable[[], nn.Module]:
    import transformers

    return lambda: getattr(transformers, kind)(getattr(transformers, config)(**options))


def retinanet() -> nn.Module:
    """Two heads over the levels of a pyramid, one of which also feeds a coarser level."""
    from torchvision.models.detection import RetinaNet
    from torchvision.models.detection.backbone_utils import _resnet_fpn_extractor
    from torchvision.models.resnet import BasicBlock, ResNet
    from torchvision.ops.feature_pyramid_network import LastLevelP6P7

    backbone = _resnet_fpn_extractor(
        ResNet(BasicBlock, [1, 1, 1, 1]),
        trainable_layers=5,
        returned_layers=[2, 3, 4],
        extra_blocks=LastLevelP6P7(256, 256),
    )
    return RetinaNet(backbone, num_classes=3, min_size=96, max_size=96)


def multihead() -> nn.Module:
    """torchvision's transformer is built on nn.MultiheadAttention, whose out_proj never runs."""
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48
    )


def detect(model: nn.Module) -> Any:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 44.0]])
    targets = [{"boxes": boxes, "labels": torch.tensor([1])} for _ in range(2)]
    return model(list(images(2, 96)), targets)


def predict(model: nn.Module) -> Any:
    return model(input_ids=IDS, labels=IDS)


MODELS: dict[str, tuple[Callable[[], Callable[[], nn.Module]], Callable[[nn.Module], Any]]] = {
    "shufflenet": (lambda: of_torchvision("shufflenet_v2_x0_5"), lambda m: m(images())),
    "squeezenet": (lambda: of_torchvision("squeezenet1_1"), lambda m: m(images())),
    "swin": (lambda: of_torchvision("swin_t"), lambda m: m(images(1, 32))),
    "video resnet": (lambda: of_torchvision("r3d_18"), lambda m: m(torch.randn(2, 3, 4, 16, 16))),
    "optical flow": (
        lambda: of_torchvision("raft_small"),
        lambda m: m(images(1, 128), images(1, 128), num_flow_updates=2),
    ),
    "retinanet": (lambda: retinanet, detect),
    "multihead": (lambda: multihead, lambda m: m(images(2, 32))),
    "repvgg": (lambda: of_timm("repvgg_a0"), lambda m: m(images())),
    "edgenext": (lambda: of_timm("edgenext_xx_small"), lambda m: m(images())),
    "beit": (
        lambda: of_timm("beit_base_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3),
        lambda m: m(images(2, 32)),
    ),
    "mixtral": (
        lambda: of_transformers(
            "MixtralForCausalLM", "MixtralConfig", **SIZES,
            num_local_experts=4, num_key_value_heads=2,
        ),
        predict,
    ),
    "t5": (
        lambda: of_transformers(
            "T5ForConditionalGeneration", "T5Config", vocab_size=40, d_model=32, d_kv=8, d_ff=48,
            num_layers=2, num_heads=4, decoder_start_token_id=0,
        ),
        predict,
    ),
    "mamba": (
        lambda: of_transformers(
            "MambaForCausalLM", "MambaConfig", vocab_size=40, hidden_size=32, num_hidden_layers=2
        ),
        predict,
    ),
    "wav2vec2": (
        lambda: of_transformers(
            "Wav2Vec2Model", "Wav2Vec2Config", hidden_size=32, num_hidden_layers=2,
            num_attention_heads=4, intermediate_size=48, conv_dim=(16, 16), conv_stride=(5, 2),
            conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=4,
        ),
        lambda m: m(torch.randn(2, 800)),
    ),
    "clip": (
        lambda: of_transformers(
            "CLIPModel", "CLIPConfig", projection_dim=16,
            text_config=SIZES | {"max_position_embeddings": 16},
            vision_config=SIZES | {"image_size": 32, "patch_size": 8},
        ),
        lambda m: m(input_ids=IDS, pixel_values=images(2, 32), return_loss=True),
    ),
}  # fmt: skip

# Layers whose weights a parent hands to a function: their own forward never runs.
BYPASSED = {"swin": "*.attn.*", "mamba": "*.mixer.*", "beit": "*.attn.qkv"}


def rows_of(module: nn.Module, value: Tensor | tuple[Tensor, ...]) -> Tensor:
    activation = value if isinstance(value, Tensor) else value[0]
    if isinstance(module, nn.modules.conv._ConvNd):
        activation = activation.movedim(1, -1)
    return activation.detach().double().reshape(-1, activation.shape[-1])


def watch(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Rows and sums of outer products of all outputs and inputs, as plain hooks see them."""
    seen: dict[str, tuple[int, Tensor]] = {}

    def add(name: str, rows: Tensor) -> None:
        count, total = seen.get(name, (0, torch.zeros(()).double()))
        seen[name] = (count + len(rows), total + rows.T @ rows)

    for name, module in model.named_modules():
        if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear, nn.MultiheadAttention)):
            module.register_forward_hook(
                lambda module, _args, output, name=name: add(name, rows_of(module, output))
            )
            module.register_forward_pre_hook(
                lambda module, args, name=name: add(f"{name}:in", rows_of(module, args[0]))
            )
    return seen


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_model(name: str) -> None:
    build, run = MODELS[name]
    torch.manual_seed(0)
    model = build()().train()
    seen = watch(model)
    with fastcov.track(model, rows="all", where="both", max_channels=800) as tracker:
        run(model)
    assert tracker.steps == 1
    silent = set()
    for status in tracker.statuses():
        if status.note.startswith("skipped"):
            assert "> max_channels=800" in status.note
            continue
        count, total = seen.get(status.name, (0, None))
        assert status.count == count, status.name
        if total is None:
            assert "its module was not called (its parent may use its weights" in status.note
            silent.add(status.name)
            continue
        error = (tracker.covariance(status.name) - total / count).abs().max()
        assert float(error) <= 1e-5 * float(total.abs().max()) / count, status.name
    assert bool(silent) == (name in BYPASSED), silent
    if silent:
        assert all(fnmatch(each.removesuffix(":in"), BYPASSED[name]) for each in silent), silent
