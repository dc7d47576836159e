"""Laws of the state: merging, translating, order, resets."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastcov.state import REDUCTIONS, CovarianceState


def filled(rows: torch.Tensor) -> CovarianceState:
    state = CovarianceState(rows.shape[1])
    state.update(rows)
    return state


def draw(count: int, seed: int, offset: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 5, generator=generator, dtype=torch.float64) + offset


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 60), st.integers(0, 60), st.floats(-1e4, 1e4), st.floats(-1e4, 1e4))
def test_merge_is_update_by_both(first: int, second: int, offset: float, other: float) -> None:
    a, b = draw(first, 1, offset), draw(second, 2, other)
    together = filled(torch.cat([a, b]))
    merged = filled(a)
    merged.merge(filled(b))
    assert merged.count.tolist() == together.count.tolist()
    if first + second:
        trace = together.covariance().trace()
        error = (merged.covariance() - together.covariance()).abs().max()
        assert float(error) <= 1e-12 * float(trace)


def test_merge_leaves_the_other_alone() -> None:
    a, b = filled(draw(20, 1, 3.0)), filled(draw(20, 2, -3.0))
    before = b.state_dict()
    a.merge(b, scale=0.5)
    assert all(torch.equal(before[name], getattr(b, name)) for name in REDUCTIONS)
    assert float(a.weight) == 30.0


def test_row_order_does_not_matter() -> None:
    rows = draw(500, 3, 10.0)
    permuted = rows[torch.randperm(500, generator=torch.Generator().manual_seed(4))]
    torch.testing.assert_close(
        filled(rows).covariance(True), filled(permuted).covariance(True), rtol=0, atol=1e-11
    )


def test_trace_is_the_sum_of_variances() -> None:
    rows = draw(300, 5, -7.0)
    variances = rows.var(0, unbiased=False).sum()
    torch.testing.assert_close(filled(rows).covariance(True).trace(), variances)


def test_rotation_leaves_eigenvalues() -> None:
    rows = draw(300, 6, 1.0)
    rotation, _ = torch.linalg.qr(draw(5, 7, 0.0))
    torch.testing.assert_close(
        torch.linalg.eigvalsh(filled(rows).covariance()),
        torch.linalg.eigvalsh(filled(rows @ rotation).covariance()),
    )


def test_translation_changes_nothing_that_is_read() -> None:
    state = filled(draw(50, 8, 2.0))
    covariance, mean = state.covariance(), state.mean()
    state.translate_(torch.full((5,), -1.0, dtype=torch.float64))
    torch.testing.assert_close(state.covariance(), covariance)
    torch.testing.assert_close(state.mean(), mean)


def test_state_dict_round_trip_and_reset() -> None:
    state = filled(draw(50, 9, 2.0))
    twin = CovarianceState(5)
    twin.load_state_dict(state.state_dict())
    assert torch.equal(twin.covariance(), state.covariance())
    state.reset()
    assert all(not getattr(state, name).any() for name in REDUCTIONS)


def test_bad_input_is_named() -> None:
    state = CovarianceState(5)
    with pytest.raises(ValueError, match="4 channels into one of 5"):
        state.merge(CovarianceState(4))
    with pytest.raises(ValueError, match=r"\(4, 4\), expected \(5, 5\)"):
        state.load_state_dict({**state.state_dict(), "moment": torch.zeros(4, 4)})
    with pytest.raises(KeyError, match="'shift'"):
        state.load_state_dict({k: v for k, v in state.state_dict().items() if k != "shift"})


def test_state_made_under_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        state = CovarianceState(5)
    state.update(draw(10, 0, 0.0))
    assert int(state.count[0]) == 10
