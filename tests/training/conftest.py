"""Real models in sizes that train in a fraction of a second, each with its own loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


@dataclass(frozen=True)
class Case:
    """A model and what one training step computes."""

    build: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], Tensor]  # of the model and a seed for the batch

    def make(self, seed: int = 0) -> nn.Module:
        torch.manual_seed(seed)
        return self.build()


def _images(seed: int, batch: int = 4, size: int = 32) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


def _tokens(seed: int, vocabulary: int, batch: int = 3, length: int = 12) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (batch, length), generator=generator)


def _classify(model: nn.Module, seed: int) -> Tensor:
    logits = model(_images(seed))
    return F.cross_entropy(logits.float(), torch.arange(len(logits)) % logits.shape[1])


def _detect(model: nn.Module, seed: int) -> Tensor:
    boxes = torch.tensor([[8.0, 8.0, 40.0, 44.0], [30.0, 20.0, 60.0, 60.0]])
    targets = [{"boxes": boxes + seed, "labels": torch.tensor([1, 2])} for _ in range(2)]
    return sum(model(list(_images(seed, 2, 72)), targets).values())


def _predict_tokens(model: nn.Module, seed: int) -> Tensor:
    ids = _tokens(seed, 40)
    return model(input_ids=ids, labels=ids).loss


def _predict_next(model: nn.Module, seed: int) -> Tensor:
    ids = _tokens(seed, 40)
    return F.cross_entropy(model(ids).flatten(0, 1), ids.roll(-1, 1).flatten())


class Recurrent(nn.Module):
    """Embedding, LSTM, weight norm, a frozen layer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 12)
        self.lstm = nn.LSTM(12, 10, num_layers=2, batch_first=True, dropout=0.1)
        self.normed = parametrizations.weight_norm(nn.Linear(10, 14))
        self.spectral = parametrizations.spectral_norm(nn.Linear(14, 12))
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.head = nn.Linear(12, 40)
        self.head.weight = nn.Parameter(self.embedding.weight.detach().clone())

    def forward(self, ids: Tensor) -> Tensor:
        hidden, _ = self.lstm(self.embedding(ids))
        return self.head(self.frozen(self.spectral(self.normed(hidden).relu_())))


def _resnet() -> nn.Module:
    from torchvision.models import ResNet
    from torchvision.models.resnet import Bottleneck

    # Grouped 3x3 convolutions of ResNeXt, in-place ReLUs, shortcuts.
    model = ResNet(Bottleneck, [1, 1, 1, 1], num_classes=5, groups=4, width_per_group=4)
    return model.to(memory_format=torch.channels_last)


def _mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    return mobilenet_v2(width_mult=0.25, num_classes=5)


def _detector() -> nn.Module:
    from torchvision.models.detection import FasterRCNN
    from torchvision.models.detection.backbone_utils import BackboneWithFPN
    from torchvision.models.resnet import BasicBlock, ResNet

    body = ResNet(BasicBlock, [1, 1, 1, 1], width_per_group=64)
    layers = {f"layer{i}": str(i) for i in (2, 3, 4)}
    backbone = BackboneWithFPN(body, layers, [128, 256, 512], 32)
    return FasterRCNN(
        backbone,
        num_classes=4,
        min_size=72,
        max_size=72,
        rpn_anchor_generator=_anchors(),
        rpn_pre_nms_top_n_train=60,
        rpn_post_nms_top_n_train=30,
        box_batch_size_per_image=16,
    )


def _anchors() -> nn.Module:
    from torchvision.models.detection.anchor_utils import AnchorGenerator

    return AnchorGenerator(((8,), (16,), (32,), (48,)), ((0.5, 1.0, 2.0),) * 4)


def _vision_transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5,
        drop_path_rate=0.1,
    )  # fmt: skip


def _bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=40, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
            intermediate_size=48, max_position_embeddings=16,
        )
    )  # fmt: skip


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2)
    )


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=16,
        )
    )  # fmt: skip


CASES = {
    "resnet": Case(_resnet, _classify),
    "mobilenet": Case(_mobilenet, _classify),
    "detector": Case(_detector, _detect),
    "vit": Case(_vision_transformer, _classify),
    "bert": Case(_bert, _predict_tokens),
    "gpt2": Case(_gpt2, _predict_tokens),
    "llama": Case(_llama, _predict_tokens),
    "recurrent": Case(Recurrent, _predict_next),
}


@pytest.fixture(scope="session")
def cases() -> dict[str, Case]:
    return CASES


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    """Every model of the zoo in turn."""
    return CASES[request.param]
