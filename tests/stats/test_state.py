"""Laws of the state: merging, translating, order, resets."""

from __future__ import annotations

import copy
import pickle
import re
import threading
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastcov
from fastcov.ops import triangle
from fastcov.stats.state import DECLARED, CovarianceState, StateTensors


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
    assert all(torch.equal(before[name], getattr(b, name)) for name in DECLARED)
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
    assert all(not getattr(state, name).any() for name in DECLARED)


WEIGHTS = st.lists(st.sampled_from([1e-4, 0.25, 1.0, 3.0]), min_size=1, max_size=20)


@settings(max_examples=40, deadline=None)
@given(WEIGHTS, WEIGHTS, st.sampled_from([0.5, 1.0]), st.sampled_from([0.01, 1.0, 2.0]))
def test_squared_weights_are_followed(
    first: list[float], second: list[float], decay: float, scale: float
) -> None:
    """Weights, decay, scaling, merging and skipped rows, against the weights one by one."""
    state = CovarianceState(5)
    rows = draw(len(first), 1, 0.0)
    rows[0, 2] = torch.nan  # skipped: its weight is no part of any sum
    state.update(rows, torch.tensor(first, dtype=torch.float64), row_scale=scale)
    state.update(draw(3, 2, 0.0), row_scale=scale, decay=decay)
    state.update(draw(2, 3, 0.0))
    other = CovarianceState(5)
    other.update(draw(len(second), 4, 0.0), torch.tensor(second, dtype=torch.float64))
    other.scale_(0.125)
    state.merge(other, scale=scale)
    weights = [w * scale * decay for w in first[1:]] + [scale] * 3 + [1.0] * 2
    weights += [w * 0.125 * scale for w in second]
    squares = sum(w * w for w in weights)
    assert float(state.squared_weight) == pytest.approx(squares, rel=1e-12)
    effective = sum(weights) ** 2 / squares
    assert float(state.effective_count) == pytest.approx(effective, rel=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1 / 49, 1e-6])
def test_equal_weights_count_every_row(scale: float) -> None:
    state = CovarianceState(5)
    for seed in range(20):
        state.update(draw(50_000, seed, 0.0).float(), row_scale=scale)
    assert round(float(state.effective_count)) == 1_000_000


def test_a_state_saved_without_squared_weights_counts_its_rows_as_equal() -> None:
    state = CovarianceState(5)
    state.update(draw(50, 1, 0.0), torch.linspace(0.01, 1, 50))
    older = {name: tensor for name, tensor in state.state_dict().items() if name != "excess"}
    twin = CovarianceState(5)
    twin.load_state_dict(older)
    assert float(twin.effective_count) == pytest.approx(50, rel=1e-12)
    twin.load_state_dict({name: torch.zeros_like(tensor) for name, tensor in older.items()})
    assert not twin.excess.any()


@pytest.mark.parametrize("size", [1e-150, 1e-20, 1e-9, 1.0, 1e20, 1e150])
def test_an_effective_count_neither_cancels_nor_overflows(size: float) -> None:
    state = CovarianceState(5)
    weights = torch.full((40,), size, dtype=torch.float64)
    state.update(draw(40, 1, 0.0), weights)
    assert float(state.effective_count) == pytest.approx(40, rel=1e-12)
    state.update(draw(40, 2, 0.0), weights * 3 if size < 1e150 else weights / 3)
    assert float(state.effective_count) == pytest.approx(64, rel=1e-12)
    twin = state.copy()
    twin.merge(state, scale=1e-9)
    assert float(twin.effective_count) == pytest.approx(64, rel=1e-7)
    state.scale_(1e-120 if size > 1e20 else 1e-3)
    assert float(state.effective_count) == pytest.approx(64, rel=1e-12)
    state.update(draw(7, 3, 0.0))
    expected = 7 if size < 1e-5 else None
    if expected:
        assert float(state.effective_count) == pytest.approx(expected, rel=1e-4)


def test_decay_to_nothing_leaves_a_count_of_rows() -> None:
    state = CovarianceState(5)
    state.update(draw(40, 1, 0.0))
    for _ in range(40):
        state.scale_(1e-8)
    assert 0 < float(state.effective_count) <= 40


def damaged(name: str, change: Any) -> dict[str, Any]:
    saved = CovarianceState(5)
    saved.update(draw(20, 3, 1.0))
    state_dict: dict[str, Any] = saved.state_dict()
    state_dict[name] = change(state_dict[name])
    return state_dict


def set_entry(index: Any, value: float) -> Any:
    def change(tensor: torch.Tensor) -> torch.Tensor:
        tensor[index] = value
        return tensor

    return change


DAMAGES = {
    "another width": ("sum", lambda t: t[:4], ValueError, r"\(4,\), expected \(5,\)"),
    "more tiles": (
        "moment",
        lambda t: t.expand(3, 32, 32),
        ValueError,
        r"\(3, 32, 32\), expected \(1, 32, 32\)",
    ),
    "a count of one": ("count", lambda t: t[:1], ValueError, r"count has shape \(1,\)"),
    "bool": (
        "weight",
        lambda t: t.bool(),
        TypeError,
        "weight is torch.bool, expected torch.float64",
    ),
    "float32": ("sum", lambda t: t.float(), TypeError, "sum is torch.float32"),
    "counts as floats": ("count", lambda t: t.double(), TypeError, "count is torch.float64"),
    "no tensor": ("shift", lambda t: t.tolist(), TypeError, "shift is a list"),
    "None": ("shift", lambda t: None, TypeError, "shift is a NoneType"),
    "meta": ("moment", lambda t: t.to("meta"), TypeError, "moment is a meta tensor"),
    "sparse": ("moment", lambda t: t.to_sparse(), TypeError, "moment is a torch.sparse_coo tensor"),
    "a gradient": ("sum", lambda t: t.requires_grad_(), TypeError, "sum requires a gradient"),
    "NaN": ("moment", set_entry((0, 3, 1), float("nan")), ValueError, "moment holds a NaN"),
    "infinity": ("shift", set_entry(2, float("inf")), ValueError, "shift holds a NaN"),
    "NaN weight": ("weight", lambda t: t * float("nan"), ValueError, "weight holds a NaN"),
    "negative count": ("count", set_entry(0, -1), ValueError, r"count is \[-1, 0\]"),
    "negative skips": ("count", set_entry(1, -2), ValueError, r"count is \[20, -2\]"),
    "negative weight": ("weight", lambda t: -t, ValueError, "weight is -20.0"),
    "no weight": ("weight", lambda t: t * 0, ValueError, "rows whose weight is 0"),
    "no row": ("count", lambda t: t * 0, ValueError, "without a row"),
    "negative diagonal": ("moment", set_entry((0, 2, 2), -1.0), ValueError, "-1.0 on its diagonal"),
    "negative squares": ("excess", set_entry(0, -1.0), ValueError, "squares' sum -1.0"),
    "too many squares": ("excess", set_entry(1, 21.0), ValueError, "counts 21 of 20"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_state_is_refused_and_changes_nothing(damage: str) -> None:
    name, change, error, message = DAMAGES[damage]
    state = CovarianceState(5)
    state.update(draw(30, 4, 2.0), torch.linspace(0.1, 1, 30))
    before = state.state_dict()
    with pytest.raises(error, match=message):
        state.load_state_dict(damaged(name, change))
    assert all(torch.equal(before[key], value) for key, value in state.state_dict().items())


@pytest.mark.parametrize(
    "shown", ["float64", "three", "meta", "sparse", "nested", "quantised", "list"]
)
def test_a_sketch_of_damaged_sizes_is_refused_and_changes_nothing(shown: str) -> None:
    state = CovarianceState(5, sketch=2)
    state.update(draw(30, 4, 2.0))
    before = state.state_dict()
    sizes = before["sketch"]
    damaged_sizes: dict[str, Any] = {
        "float64": sizes.double(),
        "three": torch.tensor([5, 2, 0]),
        "meta": sizes.to("meta"),
        "sparse": sizes.to_sparse(),
        "nested": torch.nested.nested_tensor([sizes.double(), sizes.double()], layout=torch.jagged),
        "quantised": torch.quantize_per_tensor(sizes.float(), 1.0, 0, torch.qint32),
        "list": sizes.tolist(),
    }
    with pytest.raises(TypeError, match="sketch is "):
        state.load_state_dict({**before, "sketch": damaged_sizes[shown]})
    assert all(torch.equal(before[key], value) for key, value in state.state_dict().items())


def test_a_state_saved_with_or_without_a_sketch_names_it() -> None:
    whole, sketched = CovarianceState(5), CovarianceState(5, sketch=2)
    with pytest.raises(ValueError, match=r"a sketch of sizes \(5, 2\), this state None"):
        whole.load_state_dict(sketched.state_dict())
    with pytest.raises(ValueError, match=r"a sketch of sizes None, this state \(5, 2\)"):
        sketched.load_state_dict(whole.state_dict())


@pytest.mark.parametrize(
    ("excess", "error", "message"),
    [
        (None, TypeError, "excess is a NoneType"),
        (torch.tensor(1 + 1j, dtype=torch.complex128), ValueError, r"excess has shape \(\)"),
        (torch.tensor(3), ValueError, r"excess has shape \(\)"),
        (torch.tensor([2.0, 0.5], dtype=torch.float64), ValueError, "excess counts 0.5 of 20"),
    ],
    ids=["None", "complex", "integer", "half a row"],
)
def test_squared_weights_of_no_version_are_refused(
    excess: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        CovarianceState(5).load_state_dict(damaged("excess", lambda _: excess))


def test_what_stands_above_the_diagonal_is_not_read() -> None:
    state = CovarianceState(5)
    state.load_state_dict(damaged("moment", set_entry((0, 1, 3), float("nan"))))
    assert bool(torch.isfinite(state.covariance()).all())


def as_square(saved: dict[str, Any], channels: int) -> dict[str, Any]:
    """A state as versions before saved it: the whole square, nothing valid above the diagonal."""
    square = triangle.unpack(saved["moment"], channels)
    above = torch.full_like(square, float("nan")).triu(1)
    return {**saved, "moment": square.tril() + above}


@pytest.mark.parametrize("channels", [1, 5, 32, 70])
def test_a_square_of_an_older_version_loads_exactly(channels: int) -> None:
    state, loaded = CovarianceState(channels), CovarianceState(channels)
    rows = torch.randn(50, channels, generator=torch.Generator().manual_seed(1)) + 3
    state.update(rows, torch.linspace(0.1, 1, 50))
    loaded.load_state_dict(as_square(state.state_dict(), channels))
    for centered in (False, True):
        assert torch.equal(loaded.covariance(centered), state.covariance(centered))
    loaded.update(rows)
    state.update(rows)
    assert torch.equal(loaded.covariance(), state.covariance())


@pytest.mark.parametrize("damage", ["NaN", "infinity", "negative diagonal", "width"])
def test_a_damaged_square_of_an_older_version_is_refused(damage: str) -> None:
    state = CovarianceState(5)
    state.update(draw(20, 3, 1.0))
    square = as_square(state.state_dict(), 5)["moment"]
    message = "moment holds a NaN"
    if damage == "NaN":
        square[4, 2] = float("nan")
    elif damage == "infinity":
        square[4, 4] = float("inf")
    elif damage == "width":
        square, message = square[:4, :4], r"\(4, 4\), expected \(5, 5\)"
    else:
        square[3, 3], message = -1.0, "-1.0 on its diagonal"
    with pytest.raises(ValueError, match=message):
        state.load_state_dict({**state.state_dict(), "moment": square})


def test_every_state_that_the_project_makes_loads() -> None:
    state = CovarianceState(5)
    twin = CovarianceState(5)
    for seed, offset in enumerate((0.0, 1e8, -1e8, 1.0)):
        state.update(torch.full((30, 5), offset, dtype=torch.float64), decay=0.5)
        state.update(draw(30, seed, offset).float())
        state.translate_(state.mean())
        twin.load_state_dict(state.state_dict())
        twin.merge(state)
        state.load_state_dict(twin.state_dict())
    assert state.count.tolist() == twin.count.tolist()


def test_a_state_of_the_version_before_keeps_its_squared_weights() -> None:
    state = CovarianceState(5)
    state.update(draw(50, 1, 0.0), torch.linspace(0.01, 1, 50))
    squares = state.squared_weight
    single = {**state.state_dict(), "excess": squares - state.weight}
    twin = CovarianceState(5)
    twin.load_state_dict(single)
    torch.testing.assert_close(twin.squared_weight, squares)


def test_threads_that_update_one_state_lose_no_row() -> None:
    state = CovarianceState(8)
    parts = [draw(200, seed, 0.0)[:, :1].expand(-1, 8).contiguous() for seed in range(8)]

    def run(part: torch.Tensor) -> None:
        for number in range(150):
            state.update(part, row_scale=2.0 if number % 2 else 1.0)

    threads = [threading.Thread(target=run, args=(part,)) for part in parts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state.count.tolist() == [8 * 150 * 200, 0]
    assert float(state.weight) == 8 * 150 * 200 * 1.5
    expected = torch.cat(parts).square().mean()
    torch.testing.assert_close(state.covariance()[3, 3], expected, rtol=1e-9, atol=0)


def test_threads_that_read_a_state_while_others_update_it_see_whole_updates() -> None:
    values = torch.arange(160) % 7 + 1.0
    rows = torch.stack([values, -values] * 300)
    exact = torch.outer(values, values).double()
    state, others = CovarianceState(160), [CovarianceState(160) for _ in range(40)]
    state.update(rows)
    found: list[torch.Tensor] = []

    def update() -> None:
        for number in range(200):
            state.update(rows, row_scale=2.0 if number % 2 else 1.0)

    def read() -> None:
        for other in others:
            other.merge(state)
            found.extend([state.covariance(), state.spectral_parts().matrix, other.covariance()])

    threads = [threading.Thread(target=run) for run in (update, read)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.allclose(matrix, exact, rtol=1e-5) for matrix in found)
    assert all(0 < float(other.weight) <= 2 * int(other.count[0]) for other in others)


def test_threads_that_merge_two_states_into_each_other_end() -> None:
    states = [CovarianceState(3), CovarianceState(3)]
    for state in states:
        state.update(draw(20, 1, 0.0)[:, :3].contiguous())

    def run(first: int) -> None:
        for _ in range(100):
            states[first].merge(states[1 - first], scale=1e-6)

    threads = [threading.Thread(target=run, args=(first,), daemon=True) for first in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert not any(thread.is_alive() for thread in threads)


def test_a_state_is_copied_and_pickled_with_its_lock_left_behind() -> None:
    state = CovarianceState(5)
    state.update(draw(20, 1, 0.0))
    for twin in (copy.deepcopy(state), copy.copy(state), pickle.loads(pickle.dumps(state))):
        twin.update(draw(1, 2, 0.0))
        assert twin.channels == 5
    assert state.count.tolist() == [21, 0]  # copy.copy shares the tensors


def test_bad_input_is_named() -> None:
    state = CovarianceState(5)
    with pytest.raises(ValueError, match="4 channels into one of 5"):
        state.merge(CovarianceState(4))
    with pytest.raises(ValueError, match=r"\(4, 4\), expected \(5, 5\)"):
        state.load_state_dict({**state.state_dict(), "moment": torch.zeros(4, 4)})
    with pytest.raises(KeyError, match="'shift'"):
        state.load_state_dict({k: v for k, v in state.state_dict().items() if k != "shift"})


def test_every_declared_tensor_is_kept_and_combined() -> None:
    """Nothing that a state does forgets a tensor: all of it iterates over the declarations."""
    state = CovarianceState(5)
    state.update(draw(30, 1, 4.0), torch.linspace(0.5, 2, 30), decay=0.5)
    assert tuple(DECLARED) == StateTensors._fields
    for name, tensor in state.tensors._asdict().items():
        assert getattr(state, name) is tensor
        assert tensor.dtype == DECLARED[name].dtype
        assert tensor.shape == DECLARED[name].zeros(5, "cpu").shape
        assert tensor.any()
    twin = state.copy()
    loaded = CovarianceState(5)
    loaded.load_state_dict(state.state_dict())
    merged = CovarianceState(5)
    merged.merge(state)
    for other in (twin, loaded, merged):
        for own, copied in zip(state.tensors, other.tensors, strict=True):
            assert torch.equal(own, copied)
            assert own.data_ptr() != copied.data_ptr()
    twin.merge(state, scale=3.0)
    state.scale_(4.0)
    torch.testing.assert_close(twin.covariance(), state.covariance())
    torch.testing.assert_close(twin.squared_weight, state.squared_weight * 10 / 16)
    assert twin.count.tolist() == [60, 0]
    state.reset()
    assert not any(tensor.any() for tensor in state.tensors)


def test_state_made_under_inference_mode_can_be_trained_with() -> None:
    with torch.inference_mode():
        state = CovarianceState(5)
    state.update(draw(10, 0, 0.0))
    assert int(state.count[0]) == 10


def test_a_state_that_moves_under_inference_mode_can_be_updated_in_training() -> None:
    state = filled(torch.randn(5, 3))
    with torch.inference_mode():
        state.to("meta")
    assert not any(tensor.is_inference() for tensor in state.tensors)


def test_numpys_integers_are_numbers() -> None:
    state = CovarianceState(cast(int, np.prod((2, 4))), sketch=cast(int, np.int64(3)))
    assert (state.channels, state.sketch_width) == (8, 3)
    assert type(state.channels) is int
    assert type(state.sketch_width) is int
    full = filled(torch.randn(20, 4))
    assert full.directions(cast(int, np.int32(2))).vectors.shape == (4, 2)


@pytest.mark.parametrize("channels", [0, -1, 2.5, np.float64(8), True, "8", None])
def test_a_length_that_no_row_has_is_refused(channels: Any) -> None:
    with pytest.raises(ValueError, match=re.escape(f"channels={channels!r}: expected the length")):
        CovarianceState(channels)


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_a_layer_without_outputs_does_not_end_a_training() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 0))
    tracker = fastcov.track(model, rows="all", where="both")
    model(torch.randn(8, 4)).sum().backward()
    assert tracker.count("0") == 8
    assert tracker.count("1") == 0
    assert "1" not in tracker.spectra()
