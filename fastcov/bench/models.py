"""Networks whose training step is timed, and sets of hooks that take turns on one model.

All contenders share one model: two copies would differ by where their memory lies, which moves a
step by more than the 2 % that is to be shown. Learning rate 0, so that every step sees the same
activations and nothing diverges; the optimizer's arithmetic is the same.
"""

from __future__ import annotations

import importlib
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.bench.peers import MissingPeerError, compiled

_HOOK_TABLES = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
)
_BATCHES = 3  # inputs to rotate through


@dataclass
class Training:
    """A model and one training step of it.

    Attributes:
        model: Model to track.
        example: Input of the model, as fastcov.estimate takes it.
        step: Function of a forward (the model itself, or its compiled form) and a batch number
            that runs one step.
        dtype: Dtype of the activations.
        compile_forward: Function from the model to its compiled forward, which has the hooks that
            the model has at its first call.
    """

    model: nn.Module
    example: Any
    step: Callable[[Callable[..., Any], int], object]
    dtype: torch.dtype = torch.float32
    compile_forward: Callable[[nn.Module], Callable[..., Any]] = compiled


class HookTurns:
    """Several sets of forward hooks on one model, of which one is installed at a time.

    Args:
        model: Model whose own hooks belong to every set.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = list(model.modules())
        self._bare = self._read()
        self._sets: dict[str, list[dict[str, Any]]] = {}

    def _read(self) -> list[dict[str, Any]]:
        return [{name: m.__dict__[name] for name in _HOOK_TABLES} for m in self._modules]

    def add(self, name: str, attach: Callable[[], Any]) -> Any:
        """Set of the hooks that ``attach`` installs.

        Returns:
            Result of ``attach()``.
        """
        mine = [{key: OrderedDict(t) for key, t in tables.items()} for tables in self._bare]
        self._write(mine)
        try:
            attached = attach()
            self._sets[name] = self._read()
        finally:
            self._write(self._bare)
        return attached

    def install(self, name: str) -> None:
        """Installation of one set; under a name without a set the model has only its own hooks."""
        self._write(self._sets.get(name, self._bare))

    def forget(self, name: str) -> None:
        """Removal of a set and of everything that its hooks hold."""
        self._sets.pop(name, None)

    def _write(self, all_tables: list[dict[str, Any]]) -> None:
        for module, tables in zip(self._modules, all_tables, strict=True):
            module.__dict__.update(tables)


def loss_of(output: Any) -> Tensor:
    """Scalar loss of any output: the sum of the means of its floating-point tensors."""
    found = [tensor.float().mean() for tensor in _tensors(output) if tensor.is_floating_point()]
    if not found:
        raise ValueError(
            f"the model returned {type(output).__name__} without a floating-point tensor; let "
            "build() return (model, step) with a step() of your own"
        )
    return torch.stack(found).sum()


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (list, tuple)):
        return [tensor for item in value for tensor in _tensors(item)]
    return []


def supervised(
    model: nn.Module,
    batches: list[Any],
    *,
    autocast: torch.dtype | None,
    optimizer: torch.optim.Optimizer | None = None,
) -> Training:
    """Training on given inputs: forward, backward, update.

    Args:
        model: Model in training mode.
        batches: Inputs to rotate through: tensors, tuples of arguments or mappings of keywords.
        autocast: Dtype of autocast, None without.
        optimizer: Optimizer of the model's parameters; SGD with momentum if None.
    """
    if optimizer is None:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
    device = next(model.parameters()).device

    def step(forward: Callable[..., Any], index: int) -> None:
        batch = batches[index % len(batches)]
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            if isinstance(batch, Mapping):
                output = forward(**batch)
            else:
                output = forward(*batch) if isinstance(batch, tuple) else forward(batch)
            loss = loss_of(output)
        loss.backward()
        optimizer.step()

    return Training(model, batches[0], step, autocast or torch.float32)


def resnet50(device: torch.device, is_tiny: bool) -> Training:
    """ResNet-50: on a GPU batch 256 at 224 in bf16, else batch 8 at 112; ResNet-18 if tiny."""
    if is_tiny:
        return resnet("resnet18", 2, 32, device)
    return resnet("resnet50", *((256, 224) if device.type == "cuda" else (8, 112)), device)


def resnet(name: str, batch: int, size: int, device: torch.device) -> Training:
    """A ResNet of torchvision, channels_last, bf16 autocast on a GPU."""
    torch.manual_seed(0)
    model: nn.Module = getattr(_torchvision("models"), name)()
    model.to(device).train()
    nn.utils.convert_conv2d_weight_memory_format(model, torch.channels_last)
    autocast = torch.bfloat16 if device.type == "cuda" else None
    return supervised(model, _images(batch, size, size, device), autocast=autocast)


def vit(device: torch.device, is_tiny: bool) -> Training:
    """Vision transformer at 224: ViT-B with batch 128 in bf16 on a GPU, else ViT-S with batch 8.

    Trained by AdamW, as these networks are. From five images on its hidden layers are read through
    their inputs on a CPU (:mod:`fastcov.stats.affine`): with fewer, every row costs more.
    """
    models = _torchvision("models")
    is_cuda = device.type == "cuda"
    depth, heads, width = (2, 2, 32) if is_tiny else ((12, 12, 768) if is_cuda else (12, 6, 384))
    batch, size = (2, 32) if is_tiny else ((128, 224) if is_cuda else (8, 224))
    torch.manual_seed(0)
    model = models.VisionTransformer(size, 16, depth, heads, width, 4 * width)
    # Its head starts at zero: every gradient would be zero, and zeros draw less power on a GPU.
    nn.init.trunc_normal_(model.heads.head.weight, std=0.02)
    model = model.to(device).train()
    return supervised(
        model,
        _images(batch, size, size, device),
        autocast=torch.bfloat16 if is_cuda else None,
        optimizer=torch.optim.AdamW(model.parameters(), lr=0.0),
    )


def faster_rcnn(device: torch.device, is_tiny: bool) -> Training:
    """Faster R-CNN R50-FPN of torchvision: two images of 800x1344 in bf16 on a GPU.

    On a CPU one image of 256 px and 128 RoIs: with two images and the stock 512 RoIs each a step
    takes 2.6 s (two cores of a Xeon), and 40 rounds of all contenders over 10 minutes.
    MobileNetV3 stands for ResNet-50 if tiny.
    """
    detection = _torchvision("models.detection")
    is_cuda = device.type == "cuda"
    height, width = (64, 64) if is_tiny else ((800, 1344) if is_cuda else (256, 256))
    torch.manual_seed(0)
    make = detection.fasterrcnn_resnet50_fpn
    if is_tiny:
        make = detection.fasterrcnn_mobilenet_v3_large_320_fpn
    rois = 512 if is_cuda else 128
    model = make(
        weights=None,
        weights_backbone=None,
        min_size=height,
        max_size=width,
        box_batch_size_per_image=rois,
    )
    model = model.to(device).train()
    generator = torch.Generator().manual_seed(0)
    batches = []
    for _ in range(_BATCHES):
        images, targets = [], []
        for _ in range(2 if is_cuda else 1):
            images.append(torch.rand(3, height, width, generator=generator).to(device))
            corner = torch.rand(6, 2, generator=generator) * 0.6
            extent = 0.1 + 0.3 * torch.rand(6, 2, generator=generator)
            scale = torch.tensor([width, height, width, height])
            boxes = torch.cat([corner, corner + extent], 1) * scale
            labels = torch.randint(1, 91, (6,), generator=generator)
            targets.append({"boxes": boxes.to(device), "labels": labels.to(device)})
        batches.append((images, targets))
    training = supervised(model, batches, autocast=torch.bfloat16 if is_cuda else None)
    training.example = batches[0]
    training.compile_forward = compile_backbone
    return training


def compile_backbone(model: nn.Module) -> Callable[..., Any]:
    """A detector's forward with its backbone compiled; shapes of later parts depend on the data."""
    backbone: Any = model.backbone
    own_forward = backbone.forward
    run = compiled(lambda images: own_forward(images))

    def forward(*arguments: Any) -> Any:
        backbone.forward = run
        try:
            return model(*arguments)
        finally:
            del backbone.forward

    return forward


def small_convnet(device: torch.device) -> Training:
    """A few convolutions that compile in seconds, to run the compiled path once."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3), nn.Flatten(), nn.LazyLinear(4)
    )
    model = model.to(device).train()
    batches = _images(4, 16, 16, device)
    model(batches[0])
    return supervised(model, batches, autocast=None)


def load_model(spec: str, device: torch.device) -> Training:
    """The training step of a user's own model.

    Args:
        spec: ``my_module:build``. ``build()`` returns ``(model, inputs)``, inputs as the model
            takes them (a tensor, a tuple of arguments, a mapping of keywords), or
            ``(model, step)``, where ``step()`` runs one whole training step of that model.
        device: Device that model and inputs are moved to; a step() moves its own data.

    Raises:
        ValueError: If it cannot be imported or returns something else.
    """
    module_name, _, function_name = spec.partition(":")
    if not module_name or not function_name:
        raise ValueError(f"--model {spec!r}: expected MODULE:FUNCTION, such as my_module:build")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"--model {spec!r} cannot be imported ({error}); run in the folder that holds "
            f"{module_name.split('.')[0]}.py, or install it"
        ) from error
    build = getattr(module, function_name, None)
    if not callable(build):
        raise ValueError(
            f"--model {spec!r}: {module_name} has no function {function_name!r}; it is "
            f"{getattr(module, '__file__', 'built in')}"
        )
    built = build()
    if not (isinstance(built, tuple) and len(built) == 2 and isinstance(built[0], nn.Module)):
        raise ValueError(
            f"--model {spec!r} returned {type(built).__name__}; expected (model, inputs) or "
            "(model, step), the model a torch.nn.Module"
        )
    model, second = built
    model.to(device).train()
    if callable(second) and not isinstance(second, Tensor):
        return Training(model, None, lambda _forward, _index: second())
    return supervised(model, [_moved(second, device)], autocast=None)


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: _moved(item, device) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_moved(item, device) for item in value)
    return value


def _images(batch: int, height: int, width: int, device: torch.device) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(batch, 3, height, width, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
        for _ in range(_BATCHES)
    ]


def _torchvision(part: str) -> Any:
    try:
        return importlib.import_module(f"torchvision.{part}")
    except ImportError as error:
        raise MissingPeerError(
            f"needs torchvision, which is not installed: pip install torchvision ({error})"
        ) from error
