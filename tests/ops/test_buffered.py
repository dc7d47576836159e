"""Sampling with counters on the device gives what counters on the host give."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcov


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


@pytest.mark.gpu
@pytest.mark.parametrize("rows", ["auto", "all"])
def test_steady_state_never_waits_for_the_host(rows: str) -> None:
    model = nn.Conv2d(16, 32, 1).cuda()
    batch = torch.randn(8, 16, 24, 24, device="cuda")
    with fastcov.track(model, rows=rows):
        for _ in range(3):
            model(batch)
        torch.cuda.synchronize()
        before = torch.cuda.memory_stats()["segment.all.allocated"]
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(10):
                model(batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert torch.cuda.memory_stats()["segment.all.allocated"] == before
