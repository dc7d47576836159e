"""Inputs of every layer of many models, against float64 hooks of our own that copy at the call.

Activations are watched too: in-place ones change the tensor that a later layer reads.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

import fastcov

STEPS = 2
TOLERANCE = 1e-5  # of the largest entry

ACTIVATIONS = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SiLU, nn.Mish, nn.GELU, nn.Sigmoid, nn.Tanh),
    *(nn.Hardswish, nn.Hardsigmoid, nn.Softmax, nn.Identity, nn.MaxPool2d),
)
CHANNELS_FIRST = (_ConvNd, _BatchNorm, nn.GroupNorm)
WATCHED = (*CHANNELS_FIRST, nn.Linear, *ACTIVATIONS)

IDS = torch.randint(1, 40, (2, 10), generator=torch.Generator().manual_seed(0))
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 16,
}
VISION = {"image_size": 32, "num_labels": 5}


def timm_model(name: str, **options: Any) -> nn.Module:
    import timm

    return timm.create_model(name, num_classes=5, **options)


def transformers_model(kind: str, config: str, **options: Any) -> nn.Module:
    import transformers

    return getattr(transformers, kind)(getattr(transformers, config)(**options))


def look(model: nn.Module) -> None:
    model(torch.randn(2, 3, 32, 32))


def read(model: nn.Module) -> None:
    model(input_ids=IDS)


def translate(model: nn.Module) -> None:
    model(input_ids=IDS, decoder_input_ids=IDS[:, :7])


TIMM: dict[str, dict[str, Any]] = {
    "test_resnet": {},
    "test_byobnet": {},
    "test_efficientnet": {},
    "test_efficientnet_evos": {},
    "test_nfnet": {},
    "test_convnext": {},
    "test_coatnet": {"img_size": 32},
    "test_mambaout": {},
    "test_vit": {"img_size": 32},
    "mobilenetv2_035": {},
    "tf_mobilenetv3_small_minimal_100": {},
    "lcnet_035": {},
    "regnetx_002": {},
    "resnetv2_50": {"layers": (1, 1, 1, 1), "channels": (32, 64, 64, 128)},
    "densenet121": {"block_config": (2, 2, 2, 2), "growth_rate": 8},
    "repvgg_a0": {},
}
TRANSFORMERS: dict[str, tuple[str, str, dict[str, Any], Callable[[nn.Module], None]]] = {
    "bert": ("BertModel", "BertConfig", TEXT, read),
    "albert": ("AlbertModel", "AlbertConfig", TEXT | {"embedding_size": 16}, read),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT, read),
    "llama": ("LlamaForCausalLM", "LlamaConfig", TEXT | {"num_key_value_heads": 2}, read),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", TEXT | {"num_key_value_heads": 2}, read),
    "opt": ("OPTForCausalLM", "OPTConfig", TEXT | {"ffn_dim": 48, "word_embed_proj_dim": 32}, read),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        TEXT | {"num_key_value_heads": 2, "num_local_experts": 4},
        read,
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": 40, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4},
        translate,
    ),
    "bart": (
        "BartModel",
        "BartConfig",
        {
            "vocab_size": 40,
            "d_model": 32,
            "max_position_embeddings": 16,
            **{f"{part}_layers": 2 for part in ("encoder", "decoder")},
            **{f"{part}_attention_heads": 4 for part in ("encoder", "decoder")},
            **{f"{part}_ffn_dim": 48 for part in ("encoder", "decoder")},
        },
        translate,
    ),
    "vit": ("ViTModel", "ViTConfig", TEXT | VISION | {"patch_size": 8}, look),
    "resnet": (
        "ResNetModel",
        "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [2, 2]},
        look,
    ),
    "regnet": (
        "RegNetModel",
        "RegNetConfig",
        {"embedding_size": 16, "hidden_sizes": [32, 48], "depths": [1, 2], "groups_width": 16},
        look,
    ),
    "mobilenet v2": (
        "MobileNetV2Model",
        "MobileNetV2Config",
        VISION | {"depth_multiplier": 0.35},
        look,
    ),
    "segformer": (
        "SegformerModel",
        "SegformerConfig",
        {
            "hidden_sizes": [8, 16, 24, 32],
            "depths": [1, 1, 1, 1],
            "num_attention_heads": [1, 1, 2, 2],
        },
        look,
    ),
}


def rows_of(module: nn.Module, activation: Tensor) -> Tensor:
    is_by_rank = isinstance(module, ACTIVATIONS) and activation.dim() >= 4
    if isinstance(module, CHANNELS_FIRST) or is_by_rank:
        activation = activation.movedim(1, -1)
    return activation.reshape(-1, activation.shape[-1])


def copy_inputs(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    """Rows and sums of outer products of all inputs, as they are when the layer is called."""
    seen: dict[str, tuple[int, Tensor]] = {}

    def add(name: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = (*args, *kwargs.values())[0]
        rows = rows_of(module, given.detach().clone().double())
        count, total = seen.get(name, (0, torch.zeros(()).double()))
        seen[name] = (count + len(rows), total + rows.T @ rows)

    for name, module in model.named_modules():
        if isinstance(module, WATCHED):
            module.register_forward_pre_hook(
                lambda module, args, kwargs, name=name: add(f"{name}:in", module, args, kwargs),
                with_kwargs=True,
            )
    return seen


def errors_of(build: Callable[[], nn.Module], run: Callable[[nn.Module], None]) -> dict[str, float]:
    """Largest error of each tap's second moment, as a share of its largest entry.

    It is infinite where the number of rows differs.
    """
    torch.manual_seed(0)
    model = build().train()
    seen = copy_inputs(model)
    with fastcov.track(model, include=list(WATCHED), where="input", rows="all") as tracker:
        for _ in range(STEPS):
            run(model)
    assert tracker.steps == STEPS
    errors = {}
    for name in tracker.names():
        count, total = seen.get(name, (0, None))
        if tracker.count(name) != count:
            errors[name] = float("inf")
        elif total is not None and float(largest := total.abs().max() / count) > 0:
            difference = tracker.covariance(name) - total / count
            errors[name] = float(difference.abs().max() / largest)
    assert errors
    return errors


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small take longer where threads wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wrong(errors: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm(name: str) -> None:
    errors = errors_of(lambda: timm_model(name, **TIMM[name]), look)
    assert not wrong(errors), f"of {len(errors)} taps"


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformers(name: str) -> None:
    kind, config, options, run = TRANSFORMERS[name]
    errors = errors_of(lambda: transformers_model(kind, config, **options), run)
    assert not wrong(errors), f"of {len(errors)} taps"
