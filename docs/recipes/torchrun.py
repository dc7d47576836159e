"""Several processes, one covariance: ``torchrun --nproc-per-node 2 torchrun.py``, GPUs or not."""

import os
import time

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastcov

has_gpus = torch.cuda.device_count() >= int(os.environ["LOCAL_WORLD_SIZE"])
dist.init_process_group("nccl" if has_gpus else "gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if has_gpus else torch.device("cpu")

torch.manual_seed(0)  # the same weights and batches everywhere
plain = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 10)).to(device)
initial = {name: value.clone() for name, value in plain.state_dict().items()}
batches = torch.randn(30, 128 * ranks, 64)
labels = torch.randint(10, (30, 128 * ranks))


def train(model: nn.Module, first: int, step: int) -> float:
    """Seconds of a training on every ``step``-th example from the first."""
    plain.load_state_dict(initial)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    start = time.perf_counter()
    for inputs, targets in zip(batches, labels, strict=True):
        output = model(inputs[first::step].to(device))
        optimizer.zero_grad()
        nn.functional.cross_entropy(output, targets[first::step].to(device)).backward()
        optimizer.step()
    return time.perf_counter() - start


model = DistributedDataParallel(plain)
train(model, rank, ranks)
untracked_s = train(model, rank, ranks)
tracker = fastcov.track(model, rows="all")
tracked_s = train(model, rank, ranks)
start = time.perf_counter()
tracker.sync()  # on every rank: the only collective
sync_s = time.perf_counter() - start
tracker.close()

if rank == 0:
    print(f"{ranks} processes, {tracker.count('0')} rows of layer 0")
    print(f"untracked {1e3 * untracked_s:.0f} ms, tracked {1e3 * tracked_s:.0f} ms, ", end="")
    print(f"sync {1e3 * sync_s:.0f} ms")
    # The same training in one process, on whole batches: DDP gives it the same gradients.
    single = fastcov.track(plain, rows="all")
    train(plain, 0, 1)
    for name in single.names():
        alone = single.covariance(name)
        difference = float((tracker.covariance(name) - alone).abs().max() / alone.abs().max())
        print(f"layer {name}: one process differs by {difference:.0e} of the largest entry")
        assert single.count(name) == tracker.count(name)
        assert difference < 1e-4
dist.destroy_process_group()
