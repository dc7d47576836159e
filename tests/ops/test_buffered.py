"""Sampling with counters on the device gives what counters on the host give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastcov
from fastcov.watch import hooks
from fastcov.watch import watcher as collector


@pytest.mark.slow
def test_device_counters_equal_host_counters_in_the_interpreter() -> None:
    pytest.importorskip("triton")
    script = Path(__file__).parent / "interpreted_buffers.py"
    run = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout.strip() == "equal", run.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["auto", "all", 0.5])
def test_a_cuda_graph_replays_with_right_counts(rows: str | float) -> None:
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1)).cuda()
    twin = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1)).cuda()
    twin.load_state_dict(model.state_dict())
    batch = torch.randn(8, 16, 24, 24, device="cuda")
    with fastcov.track(model, rows=rows) as graphed, fastcov.track(twin, rows=rows) as eager:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.no_grad():
            for _ in range(3):
                model(batch)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph), torch.no_grad():
            model(batch)
        for _ in range(20):
            graph.replay()
        with torch.no_grad():
            for _ in range(23):
                twin(batch)
    assert graphed.steps == eager.steps == 23
    for name in graphed.names():
        assert graphed.count(name) == eager.count(name)
        torch.testing.assert_close(graphed.covariance(name), eager.covariance(name))


STEADY = [
    pytest.param(rows, options, id=f"{rows}-{'-'.join(options) or 'default'}")
    for rows in ("auto", "all", 0.004)  # the last are added once in four steps
    for options in (
        {},
        {"decay": 0.99},
        {"weighting": "image"},
        {"decay": 0.99, "weighting": "image"},
    )
]


class Calls(nn.Module):
    """One layer called once a step, one that is called for two sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.head = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 32, 1)

    def forward(self, x: Tensor) -> Tensor:
        level = self.stem(x)
        return self.head(level).sum() + self.head(level[..., ::2, ::2]).sum()


@pytest.mark.gpu
@pytest.mark.parametrize(("rows", "options"), STEADY)
def test_steady_state_never_waits_for_the_host(rows: Any, options: dict[str, Any]) -> None:
    model = Calls().cuda()
    batch = torch.randn(8, 16, 24, 24, device="cuda")
    with fastcov.track(model, rows=rows, **options) as tracker:
        for _ in range(20):
            model(batch)
        torch.cuda.synchronize()
        segments = torch.cuda.memory_stats()["segment.all.allocated"]
        allocated = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(20):
                model(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["segment.all.allocated"] == segments
        assert torch.cuda.memory_allocated() == allocated
        assert not tracker.watcher.taps.notes


class NothingIsRead(TorchDispatchMode):
    """Raises where an operator makes a number of the host's, or a size, of a tensor's values."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None):
        if torch.Tag.data_dependent_output in operator.tags or (
            torch.Tag.dynamic_output_shape in operator.tags
        ):
            raise AssertionError(f"{operator} waits for the device")
        self.seen.add(operator.name())
        return operator(*args, **(kwargs or {}))


@pytest.mark.parametrize(("rows", "options"), STEADY)
def test_steps_ask_no_tensor_for_its_values(rows: Any, options: dict[str, Any]) -> None:
    """Waits of torch's operators show on a CPU already; kernels' are tested on a GPU, above."""
    model, batch = Calls(), torch.randn(8, 16, 24, 24)
    with fastcov.track(model, rows=rows, **options) as tracker:
        for _ in range(3):
            model(batch)
        # The tracker hides what it runs from such modes.
        with (
            mock.patch.object(collector, "has_modes", return_value=False),
            mock.patch.object(collector, "is_undisturbed", return_value=True),
            mock.patch.object(hooks, "is_undisturbed", return_value=True),
            NothingIsRead() as mode,
        ):
            for _ in range(10):
                model(batch)
        assert (
            not tracker.watcher.taps.notes
        )  # an error in a hook ends its layer's reading, not the step
        assert tracker.steps == 13
        assert any(name.startswith("fastcov::") for name in mode.seen)
