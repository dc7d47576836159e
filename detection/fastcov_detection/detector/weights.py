"""First weights of a backbone: random ones, torchvision's ImageNet weights, or those of a file."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN_ResNet50_FPN_Weights

from fastcov_detection.config import ModelConfig
from fastcov_detection.errors import ConfigError

log = logging.getLogger("fastcov_detection")

_CLASS_HEADS = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")
_TORCHVISION_COCO: tuple[str, ...] = tuple(
    FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"]
)
"""Class names of torchvision's detectors by label, the background first and gaps as N/A."""
_PREFIXES = ("backbone.body.", "body.", "module.", "")


def initialise_backbone(body: nn.Module, config: ModelConfig, depth: int) -> None:
    """Start of a ResNet body from the weights that ``config.init`` names.

    Args:
        body: Children conv1, bn1, layer1 to layer4.
        config: ``init`` is ``random``, ``imagenet``, or a state_dict's file or the run folder of
            another training; of a detector's state_dict the ResNet is taken.
        depth: Depth of the ResNet.

    Raises:
        ConfigError: If the weights cannot be had or do not fit the widths.
    """
    if config.init == "random":
        return
    if config.init == "imagenet":
        if config.norm == "group":
            raise ConfigError(
                "the ImageNet weights are of a BatchNorm, model.norm is 'group'; set model.norm "
                "to batch, sync or frozen, or model.init to random or to weights of a GroupNorm"
            )
        stock = get_model_weights(f"resnet{depth}").DEFAULT
        state, source = fetch_state(stock, "--init"), "the ImageNet weights"
    else:
        path = Path(config.init)
        path = path / "model.pt" if path.is_dir() else path
        state, source = read_state(path), str(path)
    _load_body(body, state, source)


def load_start(model: nn.Module, path: Path, class_names: Sequence[str] = ()) -> str:
    """Start of a whole detector from the weights of another.

    Class heads of another number of classes are not refused: of the 91 classes of torchvision's
    own detectors, those of the same name are taken, whatever their places; a class without a
    counterpart keeps its fresh weights. A warning counts both.

    Args:
        model: Detector of the same depth, norm and widths as the weights.
        path: File of a state_dict.
        class_names: Names of the model's labels 1 to K.

    Returns:
        The file's digest, which tells runs from different weights apart.

    Raises:
        ConfigError: If the file cannot be read or holds another detector.
    """
    state = _with_class_heads(read_state(path), model.state_dict(), class_names, path)
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise ConfigError(
            f"{path} does not fit this detector ({reason}); "
            "give the weights of the same model, classes and widths"
        ) from None
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


def _with_class_heads(
    state: dict[str, Tensor], own: Mapping[str, Tensor], class_names: Sequence[str], path: Path
) -> dict[str, Tensor]:
    """The weights with class heads of the model's size, and with its norms' counters alone."""
    head = "roi_heads.box_predictor.cls_score.weight"
    counters = "num_batches_tracked"
    state = {name: one for name, one in state.items() if name in own or not name.endswith(counters)}
    state |= {name: own[name] for name in own if name.endswith(counters) and name not in state}
    if head not in state or head not in own or len(state[head]) == len(own[head]):
        return state
    count = len(state[head])
    known = _TORCHVISION_COCO if count == len(_TORCHVISION_COCO) else ()
    names = ("__background__", *class_names)
    places = {to: known.index(name) for to, name in enumerate(names) if name in known}
    if len(places) == 1:  # the background alone says nothing
        places = {}
    for name in own:
        if not name.startswith(_CLASS_HEADS) or name not in state:
            continue
        # Rows of one class lie together: one of a score or mask, four of a box.
        fresh = own[name].clone()
        rows = len(fresh) // len(own[head])
        theirs = state[name].reshape(count, rows, *fresh.shape[1:])
        ours = fresh.reshape(len(own[head]), rows, *fresh.shape[1:])
        for to, source in places.items():
            ours[to] = theirs[source]
        state[name] = fresh
    log.warning(
        "%s has heads of %d classes, this detector of %d: %s",
        path,
        count,
        len(names),
        f"{len(places) - 1} of {len(class_names)} classes are taken by name, others start anew"
        if places
        else "the class heads start anew",
    )
    return state


def read_state(path: Path) -> dict[str, Tensor]:
    """State_dict of a file, read without pickle.

    Raises:
        ConfigError: If the file is missing, truncated, or holds anything but tensors by name.
    """
    if not path.exists():
        raise ConfigError(
            f"no weights at {path}; --init takes random, imagenet, a state_dict or a run folder"
        )
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"cannot read weights from {path} ({reason}); save them again") from None
    for key in ("model", "state_dict"):
        if isinstance(state, Mapping) and isinstance(state.get(key), Mapping):
            state = state[key]
    if not isinstance(state, Mapping) or not all(isinstance(v, Tensor) for v in state.values()):
        raise ConfigError(f"{path} does not hold a state_dict (tensors by name)")
    return dict(state)


def fetch_state(weights: Any, option: str) -> dict[str, Tensor]:
    """State_dict of one of torchvision's weights, downloaded once.

    Args:
        weights: Entry of torchvision's enumeration of weights.
        option: Option that takes a file of these weights, named in the error.

    Raises:
        ConfigError: If there is no connection.
    """
    try:
        return dict(weights.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError) as error:
        raise ConfigError(
            f"cannot fetch torchvision's {weights} ({error}); download {weights.url} on a machine "
            f"with a connection and give the file as {option}"
        ) from None


def _load_body(body: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    wanted = body.state_dict()
    prefix = next((p for p in _PREFIXES if f"{p}conv1.weight" in state), None)
    if prefix is None:
        raise ConfigError(f"{source} holds no ResNet: conv1.weight is missing")
    found = {name: state[prefix + name] for name in wanted if prefix + name in state}
    # A frozen norm has no counter of batches, and a state_dict of one does not bring it.
    missing = [n for n in wanted if n not in found and not n.endswith("num_batches_tracked")]
    if missing:
        raise ConfigError(
            f"{source} lacks {len(missing)} of {len(wanted)} tensors, the first is {missing[0]}; "
            "depth and norm must be those of this model"
        )
    # Without this check, weights that the ResNet lacks would be dropped silently: the statistics of
    # a BatchNorm where this model has a GroupNorm, or blocks of a deeper network.
    parts = tuple(f"{name}." for name, _ in body.named_children())
    own = [n.removeprefix(prefix) for n in state if n.startswith(prefix)]
    surplus = [n for n in own if n.startswith(parts) and n not in wanted]
    surplus = [n for n in surplus if not n.endswith("num_batches_tracked")]
    if surplus:
        is_norm = surplus[0].endswith(("running_mean", "running_var"))
        remedy = (
            "these are weights of a BatchNorm: set model.norm=batch or frozen, or give weights "
            "that were trained with this norm"
            if is_norm
            else "depth and norm must be those of this model"
        )
        raise ConfigError(
            f"{source} has {len(surplus)} tensors that this model lacks, the first is "
            f"{surplus[0]}; {remedy}"
        )
    for name, tensor in found.items():
        if tensor.shape != wanted[name].shape:
            raise ConfigError(
                f"{source} has {name} of shape {tuple(tensor.shape)}, this model "
                f"{tuple(wanted[name].shape)}; "
                "pretrained weights fit only a model of the same widths"
            )
    body.load_state_dict(found, strict=False)
