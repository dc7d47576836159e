"""Several processes that train one model: started by torchrun, or one process alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist

Value = TypeVar("Value")


def rank() -> int:
    """Number of this process, 0 when it is alone."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """Number of processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def barrier() -> None:
    """Meeting point of all processes: each waits for the others."""
    if world_size() > 1:
        dist.barrier()


def gather_to_first(value: Value) -> list[Value] | None:
    """Values of all processes, in order of rank, on the first process; None on the others.

    Values are pickled: never ones from outside the program.
    """
    if world_size() == 1:
        return [value]
    gathered: list[Value | None] | None = [None] * world_size() if rank() == 0 else None
    dist.gather_object(value, gathered)
    return None if gathered is None else [item for item in gathered if item is not None]


def from_first(value: Value | None) -> Value:
    """The value of the first process, on every process."""
    if world_size() > 1:
        shared = [value]
        dist.broadcast_object_list(shared)
        value = shared[0]
    assert value is not None
    return value


def average_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """The mean of a tensor over all processes; the tensor itself may change."""
    if world_size() > 1:
        dist.all_reduce(values)
        values /= world_size()
    return values


@contextmanager
def process_group(device: torch.device) -> Iterator[None]:
    """Context in which the processes that torchrun started are joined."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """Device of this process: with ``auto`` or ``cuda``, a GPU for each local rank.

    Raises:
        ValueError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"unknown device {name!r}; choose auto, cpu, cuda or cuda:0") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f"device is {name!r}, but torch sees no GPU; use device=cpu")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if device.index >= torch.cuda.device_count():
            raise ValueError(
                f"device {device} does not exist, there are {torch.cuda.device_count()} GPUs; "
                "start fewer processes"
            )
        torch.cuda.set_device(device)
    return device
