"""Weights of rows: what they may be, and what no row of weight 0 does."""

from __future__ import annotations

import gc
import resource
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov import CovarianceState
from fastcov.ops import accumulate_, aten, native
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import accumulate_reference_

PATHS: dict[str, Callable[..., None]] = {
    "dispatched": torch.ops.fastcov.accumulate_,
    "aten": aten.accumulate_,
    "reference": lambda *state_and_rows: accumulate_reference_(
        *state_and_rows[:6], row_weight=state_and_rows[7]
    ),
}


def rows_of(count: int = 60, channels: int = 4) -> Tensor:
    return torch.randn(count, channels, generator=torch.Generator().manual_seed(1)) + 3


def test_an_update_without_memory_says_so_and_changes_nothing() -> None:
    program = """
import resource, torch, fastcov
torch.set_num_threads(1)
state = fastcov.CovarianceState(1000)
state.update(torch.randn(20, 1000))
before = [tensor.clone() for tensor in state.tensors]
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 20), resource.RLIM_INFINITY))
try:
    state.update(torch.ones(1).expand(200000, 1000))
except MemoryError as error:
    print(error, all(map(torch.equal, before, state.tensors)))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    if "native" in native.allowed_backends():
        assert "rows (200000, 1000) torch.float32: the state is as it was True" in result.stdout


def test_rows_of_ten_dimensions() -> None:
    x = rows_of(2**9).reshape(4, *[2] * 9).permute(9, 3, 1, 5, 7, 2, 4, 6, 8, 0)
    weights = torch.rand(x.shape[:-1])
    for options in ({}, {"row_weight": weights}, {"precision": "float64"}):
        found, expected = CovarianceState(4), CovarianceState(4)
        found.update(x, **options)
        if "row_weight" in options:
            options = {"row_weight": weights.flatten()}
        expected.update(x.reshape(-1, 4), **options)
        assert all(torch.equal(a, b) for a, b in zip(found.tensors, expected.tensors, strict=True))


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("channels", [4, 140])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows_of_weight_0_are_left_out(path: str, channels: int, dtype: torch.dtype) -> None:
    """They count neither as read nor as skipped, lend no shift, and may hold anything."""
    rows = rows_of(channels=channels).to(dtype)
    weights = torch.rand(60) + 0.5
    padded = torch.cat([torch.full((70, channels), 1e30).to(dtype), rows])
    padded[0] = torch.nan
    padded_weights = torch.cat([torch.zeros(70), weights])
    broken, broken_weights = padded.clone(), padded_weights.clone()
    broken[[75, 80]] = torch.inf
    broken_weights[3] = -0.0
    for given, given_weights, skipped in (
        (padded, padded_weights, 0),
        (broken, broken_weights, 2),
    ):
        moments, expected = Moments(channels), Moments(channels)
        PATHS[path](*vars(moments).values(), given, -1, given_weights)
        kept = given[70:]
        PATHS[path](*vars(expected).values(), kept, -1, given_weights[70:])
        assert moments.count.tolist() == [60 - skipped, skipped]
        assert torch.equal(moments.shift, expected.shift)
        torch.testing.assert_close(
            moments.covariance(), expected.covariance(), rtol=1e-5, atol=1e-5
        )
        torch.testing.assert_close(moments.weight, expected.weight, rtol=1e-12, atol=0)


@pytest.mark.parametrize("path", PATHS)
def test_operators_skip_rows_that_cannot_be_weighed(path: str) -> None:
    rows, weights = rows_of(), torch.ones(60)
    weights[[3, 9, 27]] = torch.tensor([-1.0, torch.nan, torch.inf])
    moments, expected = Moments(4), Moments(4)
    PATHS[path](*vars(moments).values(), rows, -1, weights)
    accumulate_reference_(**vars(expected), rows=rows[weights == 1])
    assert moments.count.tolist() == [57, 3]
    torch.testing.assert_close(moments.covariance(), expected.covariance(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("wrong", [-1.0, -1e-30, float("nan"), float("inf"), 1e151])
def test_weights_that_are_none_are_refused_before_anything_is_added(wrong: float) -> None:
    state, rows = CovarianceState(4), rows_of()
    weights = torch.ones(60, dtype=torch.float64)
    weights[7] = wrong
    before = state.state_dict()
    for add in (state.update, lambda *given: accumulate_(state, *given)):
        with pytest.raises(ValueError, match=r"row_weight\[7\] is .*expected a number from 0"):
            add(rows, weights)
    assert all(torch.equal(before[name], value) for name, value in state.state_dict().items())
    for options in ({"row_scale": wrong}, {"decay": wrong}, {"row_scale": 0.0}):
        with pytest.raises(ValueError, match=r"row_scale=|decay="):
            state.update(rows, **options)


def test_masks_and_weights_of_sequences() -> None:
    tokens = torch.randn(3, 20, 4)
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) > 0.4
    expected = CovarianceState(4)
    expected.update(tokens[mask])
    for weight in (mask, mask.flatten(), mask.float(), mask.double().flatten()):
        state = CovarianceState(4)
        state.update(tokens, weight)
        assert state.count.tolist() == [int(mask.sum()), 0]
        torch.testing.assert_close(state.covariance(), expected.covariance(), rtol=1e-6, atol=1e-6)
        assert float(state.effective_count) == int(mask.sum())
    for wrong in (torch.ones(20, 3), torch.ones(3, 20, 1), torch.ones(59)):
        with pytest.raises(ValueError, match=r"expected \(60,\) or \(3, 20\)"):
            state.update(tokens, wrong)


def test_weights_that_require_a_gradient_keep_no_graph() -> None:
    state, rows = CovarianceState(64), torch.randn(256, 64)
    logits = torch.zeros(256, requires_grad=True)
    state.update(rows, torch.sigmoid(logits), row_scale=0.5, decay=0.9)
    assert not any(tensor.requires_grad for tensor in state.tensors)
    gc.collect()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(300):
        state.update(rows, torch.sigmoid(logits) + torch.rand(256), decay=0.9)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # KiB
    with state.weighing(rows, torch.sigmoid(logits), 1.0, 1.0):
        pass
    assert not state.excess.requires_grad
