"""The peer of the width search: a wider trained detector, pruned to the budget by Torch-Pruning.

A pruner only shrinks, so it starts from a detector whose varying widths are :data:`WIDER` times the
baseline's, trained for the baseline's schedule. Its ResNet is pruned once, all layers ranked
together by group magnitude (Torch-Pruning's GroupMagnitudeImportance with its own defaults), as
little as meets the MACs of the budget, and the detector is trained again for the same schedule from
the weights that are left: as a pruner is used, and at the price of two trainings, like a searched
network. Feature pyramid and heads are kept.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastcov import WidthGroup
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.errors import ConfigError

WIDER = 1.25
_SHARES = tuple(step / 20 for step in range(20))
_HALVINGS = 7
_NORMS = ("batch", "sync")


@dataclass(frozen=True)
class Pruned:
    """A pruned detector: its widths by group, its weights, and how much was taken away."""

    widths: dict[str, int]
    state: dict[str, Tensor]
    ratio: float
    """Share of all channels that the pruner was asked to remove."""


def check_peer(norm: str) -> None:
    """Refusal of a detector that cannot be pruned, before anything is trained.

    Raises:
        ConfigError: If Torch-Pruning is missing, or the norm is not one it prunes as we rebuild it.
    """
    _torch_pruning()
    if norm not in _NORMS:
        raise ConfigError(
            f"model.norm is {norm!r}: arm torch-pruning removes single channels, which changes "
            f"the result of other norms; use {' or '.join(_NORMS)}, or leave the arm out"
        )


def peer_version() -> str:
    """Name and version of the pruner, as a result carries them."""
    _torch_pruning()
    return f"torch-pruning {version('torch-pruning')}"


def prune_to_budget(
    model: GeneralizedRCNN,
    groups: Sequence[WidthGroup],
    macs: Callable[[Mapping[str, int]], float],
    budget: float,
) -> Pruned:
    """Removal of the ResNet's weakest channels, as few as bring the detector to its budget.

    Args:
        model: Trained detector, which stays as it is.
        groups: Width groups that may change; the largest of their floors holds for all.
        macs: Function that counts the MACs of a detector of given widths.
        budget: MACs that the pruned detector may have at most.

    Raises:
        ConfigError: If Torch-Pruning is missing or the budget cannot be met above the floors.
    """
    # The pruner skips a layer that it would have to empty. From such a share on, MACs may rise: so
    # shares are tried in ascending order, and the first that meets the budget is refined.
    low, found = 0.0, None
    for share in _SHARES:
        pruned = _prune(model, groups, share)
        if macs(pruned.widths) <= budget:
            found = pruned
            break
        low = share
    if found is None:
        raise ConfigError(
            f"no share of channels up to {_SHARES[-1]} brings the detector to the budget of "
            f"{budget:,.0f} MACs; raise the budget"
        )
    for _ in range(_HALVINGS):
        pruned = _prune(model, groups, (low + found.ratio) / 2)
        if macs(pruned.widths) <= budget:
            found = pruned
        else:
            low = pruned.ratio
    return found


def _prune(model: GeneralizedRCNN, groups: Sequence[WidthGroup], ratio: float) -> Pruned:
    peer = _torch_pruning()
    pruned = copy.deepcopy(model).cpu().eval()
    # A dependency graph is found through the graph of gradients.
    for parameter in pruned.parameters():
        parameter.requires_grad_(True)
    backbone = pruned.backbone
    floor = max(group.floor for group in groups)
    pruner = peer.pruner.BasePruner(
        backbone,
        torch.zeros(1, 3, 64, 64),
        importance=peer.importance.GroupMagnitudeImportance(),
        global_pruning=True,
        pruning_ratio=ratio,
        round_to=max(group.multiple for group in groups),
        ignored_layers=[backbone.fpn],
        # The pruner's defaults are dicts that all pruners of the process share and write to.
        in_channel_groups={},
        out_channel_groups={},
    )
    for group in pruner.step(interactive=True):
        dependency, channels = group[0]
        layer = dependency.target.module
        most = max(0, layer.out_channels - floor)
        if len(channels) > most:
            everything = list(range(layer.out_channels))
            whole = pruner.DG.get_pruning_group(layer, dependency.handler, everything)
            weakest = pruner.estimate_importance(whole).argsort()[:most].tolist()
            if not weakest:
                continue
            group = pruner.DG.get_pruning_group(layer, dependency.handler, weakest)
        group.prune()
    wanted = {group.name for group in groups}
    widths = {g.name: g.width for g in width_groups(pruned) if g.name in wanted}
    state = {name: tensor.detach().clone() for name, tensor in pruned.state_dict().items()}
    return Pruned(widths, state, ratio)


def _torch_pruning() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise ConfigError(
            "arm torch-pruning needs the package torch-pruning: "
            "pip install torch-pruning==1.6.1, or leave the arm out"
        ) from None
    return torch_pruning
