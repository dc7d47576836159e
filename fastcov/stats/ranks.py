"""Merging of states over ranks: the only collectives of the package.

The declarations of a state's tensors say which are sent, and how those of several ranks combine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from fastcov.stats.state import DECLARED, CovarianceState

_Sizes = tuple[int, int | None]  # channels of a row, and of its sketch
_NO_STATE: _Sizes = (0, None)


def rank_and_ranks() -> tuple[int, int]:
    """Rank of this process and number of processes; (0, 1) without torch.distributed."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def sync_states(
    states: Sequence[CovarianceState], group: dist.ProcessGroup | None = None
) -> list[CovarianceState]:
    """States of all ranks merged, by two collectives, whatever the number of layers.

    Args:
        states: One state a layer, in the same order on every rank, all on one device.
        group: Process group; None is the default group.

    Returns:
        New states, equal on every rank; the given ones stay as they are.
    """
    if not states:
        return []
    merged = [state.copy() for state in states]
    _share_shifts(merged, group)
    summed = [
        tensor
        for state in merged
        for declared, tensor in zip(DECLARED.values(), state.tensors, strict=True)
        if declared.reduction == "sum"
    ]
    # One vector of float64 for one collective; counts up to 2^53 stay exact.
    flat = torch.cat([tensor.flatten().double() for tensor in summed])
    dist.all_reduce(flat, group=group)
    totals = flat.split([tensor.numel() for tensor in summed])
    for tensor, total in zip(summed, totals, strict=True):
        values = total if tensor.is_floating_point() else total.round()
        tensor.copy_(values.view(tensor.shape))
    return merged


def _share_shifts(states: Sequence[CovarianceState], group: dist.ProcessGroup | None) -> None:
    # Sums of several ranks may be added if they are about one shift. Each layer takes the shift of
    # the first rank that has read a row of it.
    has_rows = torch.stack([(state.count[0] > 0).double() for state in states])
    local = torch.cat([has_rows, *(state.shift for state in states)])
    gathered = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
    dist.all_gather(gathered, local, group=group)
    start = len(states)
    for layer, state in enumerate(states):
        stop = start + len(state.shift)
        shift = torch.zeros_like(state.shift)
        for rank in reversed(gathered):
            shift = torch.where(rank[layer] > 0, rank[start:stop], shift)
        state.translate_(shift)
        start = stop


def sync_named_states(
    states: Mapping[str, CovarianceState | None], group: dist.ProcessGroup | None = None
) -> dict[str, CovarianceState]:
    """States of all ranks merged, by name; a rank may have read no row of some layers.

    Args:
        states: States by layer, in the same order on every rank; None where this rank has none.
        group: Process group; None is the default group.

    Returns:
        New states of the layers of which some rank has read a row, equal on every rank.

    Raises:
        RuntimeError: On every rank, if names or widths differ between ranks.
    """
    own = {
        name: _NO_STATE if state is None else (state.channels, state.sketch_width)
        for name, state in states.items()
    }
    gathered: list[dict[str, _Sizes]] = [{} for _ in range(dist.get_world_size(group))]
    dist.all_gather_object(gathered, own, group=group)
    sizes = {
        name: next((r[name] for r in gathered if r.get(name, _NO_STATE)[0]), _NO_STATE)
        for name in own
    }
    for rank, found in enumerate(gathered):
        if list(found) != list(own) or any(found[n] not in (_NO_STATE, sizes[n]) for n in own):
            raise RuntimeError(
                f"rank {rank} tracks other layers or widths than this rank: track the same model "
                "with the same arguments on every rank"
            )
    is_nccl = dist.get_backend(group) == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
    names = [name for name, (channels, _) in sizes.items() if channels]
    local = []
    for name in names:
        state = states[name]
        channels, sketch = sizes[name]
        empty = CovarianceState(channels, device, sketch=sketch)
        local.append(empty if state is None else state.copy().to(device))
    merged = zip(names, sync_states(local, group), strict=True)
    return {name: state for name, state in merged if int(state.count[0]) > 0}
