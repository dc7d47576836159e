"""Peak of live tensor memory, exact on a CPU and on a GPU."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable

import torch
from torch.profiler import ProfilerActivity, profile


def peak_bytes(device: torch.device, call: Callable[[], object]) -> int:
    """Highest number of tensor bytes alive at once while ``call`` runs, above the start.

    On a CPU from the allocator's own events, so that neither fragmentation nor other processes
    count; on a GPU the bytes asked of torch's caching allocator, which hands out up to 511 bytes
    more for a small tensor, and up to 1 MiB for one above 1 MiB.
    """
    if device.type == "cuda":
        # Another allocator of torch's reports only the bytes that it handed out.
        is_native = torch.cuda.get_allocator_backend() == "native"
        bytes_of = "requested_bytes.all" if is_native else "allocated_bytes.all"
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before: int = torch.cuda.memory_stats(device)[f"{bytes_of}.current"]
        call()
        torch.cuda.synchronize(device)
        peak: int = torch.cuda.memory_stats(device)[f"{bytes_of}.peak"]
        return peak - before
    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # it reports a missing GPU as an error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
            call()
    alive = peak = 0
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()
        peak = max(peak, alive)
    return peak
