"""Run by test_buffered.py with TRITON_INTERPRET=1: host counters against device counters."""

from __future__ import annotations

import itertools
from unittest import mock

import torch
from torch import nn

import fastcov
from fastcov.rows.layout import ActivationLayout
from fastcov.rows.sequence import sequence_phase
from fastcov.stats.capture import DeviceCounters
from fastcov.stats.device_buffer import flush_full_, make_flush_table
from fastcov.stats.layer import Layer


def read_steps(is_on_device: bool, decay: float | None, dtype: torch.dtype) -> Layer:
    reader = Layer(
        "layer",
        weighting="position",
        decay=decay,
        phase=sequence_phase("layer"),
        fraction=0.2,
    )
    step = torch.zeros((), dtype=torch.int64)
    generator = torch.Generator().manual_seed(1)
    table = None
    for number in range(8):
        step.fill_(number)
        reader.begin_step(number)
        rows = (torch.randn(2, 5, 6, 8, generator=generator) + 3).to(dtype)
        if number == 4:
            rows[1, 2, :, 4] = float("nan")
        reader.read(rows, ActivationLayout(rows))
        reader.end_step()
        if table is not None:
            flush_full_(table, step, decay or 1.0)
        elif is_on_device:
            buffer = reader.use_device_buffer(step)
            assert buffer is not None
            table = make_flush_table([buffer])
    return reader


for decay, dtype in itertools.product((None, 0.9), (torch.float32, torch.bfloat16)):
    host, device = read_steps(False, decay, dtype), read_steps(True, decay, dtype)
    assert device.state_dict()["sampled"] == host.state_dict()["sampled"] == 96
    assert device.state_dict()["carry"] == host.state_dict()["carry"]
    if decay is not None:
        assert device.state_dict()["state_step"] == host.state_dict()["state_step"]
    assert host.state is not None
    assert device.state is not None
    assert host.state.count.tolist() == device.state.count.tolist()
    assert int(host.state.count[1]) > 0
    torch.testing.assert_close(host.state.weight, device.state.weight)
    torch.testing.assert_close(host.state.effective_count, device.state.effective_count)
    assert (device.state.effective_count < device.state.count[0]) == (decay is not None)
    torch.testing.assert_close(
        host.state.covariance(), device.state.covariance(), rtol=1e-5, atol=1e-5
    )


def track_steps(is_on_device: bool) -> fastcov.Tracker:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    generator = torch.Generator().manual_seed(2)
    serve = DeviceCounters.serve if is_on_device else lambda readers: False
    with (
        mock.patch.object(DeviceCounters, "serve", serve),
        fastcov.track(model, rows=0.1, decay=0.95) as tracker,
    ):
        for _ in range(6):
            model(torch.randn(120, 8, generator=generator))
        tracker.summary()  # reading in between changes nothing
        for _ in range(6):
            model(torch.randn(120, 8, generator=generator))
    return tracker


host, device = track_steps(False), track_steps(True)
assert device.steps == host.steps == 12
for name in host.names():
    assert host.count(name) == device.count(name) == 144
    torch.testing.assert_close(host.covariance(name), device.covariance(name), rtol=1e-5, atol=1e-6)
    assert host.spectrum(name).count == device.spectrum(name).count == 140
saved, expected = device.state_dict(), host.state_dict()
for name, layer in expected["layers"].items():
    assert saved["layers"][name]["sampled"] == layer["sampled"]
print("equal")
