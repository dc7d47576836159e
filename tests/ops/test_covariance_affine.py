"""The operator that maps second moments through an affine layer, compiled and plain, in a grid."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov.ops import aten, triangle
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import accumulate_affine_reference_, accumulate_reference_


def rows_of(channels: int) -> Tensor:
    """Rows that are not centred. [400, C]"""
    return torch.randn(400, channels, generator=torch.Generator().manual_seed(0)) * 2 + 1


def matrix_of(moments: Moments) -> Tensor:
    return triangle.unpack(moments.moment, len(moments.sum))


def distance(moments: Moments, oracle: Moments) -> float:
    """Largest error of the moment or of the sum, against the largest entry of the moment."""
    largest = matrix_of(oracle).abs().max()
    sums = (moments.sum - oracle.sum).abs().max() / (largest * oracle.weight).sqrt()
    error = (matrix_of(moments) - matrix_of(oracle)).abs().max()
    return max(float(error / largest), float(sums))


def maps_of(channels: int, inputs: int) -> dict[str, Tensor]:
    """The same matrix [channels, inputs] in several layouts."""
    generator = torch.Generator().manual_seed(5)
    matrix = torch.randn(channels, inputs, generator=generator) / inputs**0.5
    spread = torch.zeros(2 * channels, inputs + 3)
    spread[::2, 3:] = matrix
    every_other = torch.stack((matrix, matrix), 2).flatten(1)
    return {
        "by rows": matrix,
        "by columns": matrix.T.contiguous().T,
        "sliced": spread[::2, 3:],
        "no side by side": every_other[:, ::2],
    }


AFFINE = [torch.ops.fastcov.accumulate_affine_, aten.accumulate_affine_]


@pytest.mark.parametrize("affine", AFFINE, ids=["compiled", "aten"])
@pytest.mark.parametrize("inputs", [1, 16, 37, 300])
@pytest.mark.parametrize("channels", [3, 41, 200])
def test_grid_of_affine_maps(affine: Callable[..., Tensor], channels: int, inputs: int) -> None:
    rows = rows_of(inputs)
    given = Moments(inputs)
    accumulate_reference_(**vars(given), rows=rows)
    defined = triangle.cleared(torch.ones_like(given.moment), inputs)
    given.moment = torch.where(defined > 0, given.moment, torch.nan)
    biases = torch.randn(2 * channels)[::2]
    for matrix in maps_of(channels, inputs).values():
        for bias in (None, biases):
            seen, oracle, by_rows = Moments(channels), Moments(channels), Moments(channels)
            outputs = rows.double() @ matrix.double().T + (0 if bias is None else bias)
            for moments in (seen, oracle, by_rows):
                accumulate_reference_(**vars(moments), rows=outputs[:50].float())
            call = (given.moment, given.sum, given.shift, 400, matrix, bias, 0.5, 0.75)
            assert affine(*(seen.moment, seen.sum, seen.shift, seen.weight, seen.count), *call)
            accumulate_affine_reference_(*vars(oracle).values(), *call)
            accumulate_reference_(**vars(by_rows), rows=outputs, row_scale=0.5, decay=0.75)
            assert distance(seen, oracle) < 1e-6
            assert distance(by_rows, oracle) < 1e-12
            assert torch.equal(seen.count, oracle.count)
            torch.testing.assert_close(seen.weight, oracle.weight, rtol=1e-13, atol=0)


@pytest.mark.parametrize("channels", [41, 200])
def test_an_affine_map_writes_nothing_around_the_triangle(channels: int) -> None:
    given, seen = Moments(37), Moments(channels)
    accumulate_reference_(**vars(given), rows=rows_of(37))
    around = torch.full((len(seen.moment) + 2, 32, 32), 7.0, dtype=torch.float64)
    seen.moment = around[1:-1].zero_()
    matrix = maps_of(channels, 37)["by rows"]
    assert torch.ops.fastcov.accumulate_affine_(
        *(seen.moment, seen.sum, seen.shift, seen.weight, seen.count),
        *(given.moment, given.sum, given.shift, 400, matrix, None, 1.0, 0.5),
    )
    assert bool((around[[0, -1]] == 7).all())
    beyond = channels % 32
    assert not seen.moment[-1, beyond:].any()
    assert not seen.moment[-1, :, beyond:].any()


def test_an_affine_map_has_the_same_bits_on_any_number_of_threads() -> None:
    rows, matrix = rows_of(100), maps_of(200, 100)["by rows"]
    given = Moments(100)
    accumulate_reference_(**vars(given), rows=rows)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (2, 1, 6):
            torch.set_num_threads(threads)
            seen = Moments(200)
            assert torch.ops.fastcov.accumulate_affine_(
                *(seen.moment, seen.sum, seen.shift, seen.weight, seen.count),
                *(given.moment, given.sum, given.shift, 400, matrix, None, 1.0, 1.0),
            )
            results.append(matrix_of(seen))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("affine", AFFINE, ids=["compiled", "aten"])
@pytest.mark.parametrize(
    ("inputs_scale", "matrix_scale", "is_taken"),
    [
        (1e-25, 1e-3, True),
        (1e-25, 1e-12, False),  # squares of the matrix are too small
        (1e12, 1e3, True),
        (1e12, 1e9, False),  # outputs may overflow
        (1e-3, 1e16, False),  # squares of the matrix are too large
    ],
)
def test_scales_that_an_affine_map_may_have(
    affine: Callable[..., Tensor], inputs_scale: float, matrix_scale: float, is_taken: bool
) -> None:
    rows = rows_of(30) * inputs_scale
    matrix = maps_of(50, 30)["by rows"] * matrix_scale
    given, seen = Moments(30), Moments(50)
    accumulate_reference_(**vars(given), rows=rows)
    taken = affine(
        *(seen.moment, seen.sum, seen.shift, seen.weight, seen.count),
        *(given.moment, given.sum, given.shift, 400, matrix, None, 1.0, 1.0),
    )
    assert bool(taken) == is_taken
    outputs = (rows.double() @ matrix.double().T) * taken
    exact = outputs.T @ outputs
    assert float((matrix_of(seen) - exact).abs().max()) <= 1e-6 * float(exact.abs().max())


@pytest.mark.parametrize("affine", AFFINE, ids=["compiled", "aten"])
@pytest.mark.parametrize(
    ("inputs", "cancellation", "is_taken"),
    [
        (64, 3.9, True),
        (64, 4.1, False),
        (256, 1.9, True),
        (256, 2.1, False),
        (1024, 1.4, True),
        (1024, 1.6, False),
    ],
)
def test_cancellation_that_an_affine_map_may_have(
    affine: Callable[..., Tensor], inputs: int, cancellation: float, is_taken: bool
) -> None:
    # One direction of all inputs together, strong, that the matrix leaves out.
    shared = torch.ones(inputs, dtype=torch.float64)
    matrix = maps_of(50, inputs)["by rows"].double()
    matrix = (matrix - torch.outer(matrix.mean(1), shared)).float()
    scatter = torch.eye(inputs).double() + (cancellation - 1) * torch.outer(shared, shared)
    seen, given = Moments(50), Moments(inputs)
    taken = affine(
        *(seen.moment, seen.sum, seen.shift, seen.weight, seen.count),
        *(triangle.pack(scatter * 400), given.sum, given.shift, 400, matrix, None, 1.0, 1.0),
    )
    assert bool(taken) == is_taken
    exact = matrix.double() @ scatter @ matrix.double().T * 400 * is_taken
    assert float((matrix_of(seen) - exact).abs().max()) <= 2e-6 * float(exact.abs().max())


@pytest.mark.parametrize("affine", AFFINE, ids=["compiled", "aten"])
@pytest.mark.parametrize(("shift", "is_taken"), [(1.0, True), (100.0, False)])
def test_moments_about_a_far_shift_are_not_mapped(
    affine: Callable[..., Tensor], shift: float, is_taken: bool
) -> None:
    given, seen = Moments(30), Moments(50)
    given.shift += shift
    given.count[0] = 1  # the shift stays
    accumulate_reference_(**vars(given), rows=rows_of(30))
    taken = affine(
        *(seen.moment, seen.sum, seen.shift, seen.weight, seen.count),
        *(given.moment, given.sum, given.shift, 400, maps_of(50, 30)["by rows"], None, 1.0, 1.0),
    )
    assert bool(taken) == is_taken


@pytest.mark.parametrize("affine", AFFINE, ids=["compiled", "aten"])
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 30, 50), (9, 0, 50), (9, 30, 0)])
def test_an_affine_map_of_nothing_adds_nothing(
    affine: Callable[..., Tensor], rows: int, inputs: int, outputs: int
) -> None:
    given, seen = Moments(inputs), Moments(outputs)
    taken = affine(
        *(seen.moment, seen.sum, seen.shift, seen.weight, seen.count),
        *(given.moment, given.sum, given.shift, rows, torch.ones(outputs, inputs), None, 1.0, 0.5),
    )
    assert not taken
    assert not any(tensor.any() for tensor in vars(seen).values())


@pytest.mark.parametrize("bias", [torch.zeros(49), torch.zeros(50, dtype=torch.float64)])
def test_an_affine_map_of_other_sizes_is_refused(bias: Tensor) -> None:
    given, seen = Moments(30), Moments(50)
    state = (seen.moment, seen.sum, seen.shift, seen.weight, seen.count)
    matrix = torch.zeros(50, 30)
    moments = (given.moment, given.sum, given.shift)
    with pytest.raises(RuntimeError):
        torch.ops.fastcov.accumulate_affine_(*state, *moments, 1, matrix, bias, 1.0, 1.0)
    with pytest.raises(RuntimeError):
        torch.ops.fastcov.accumulate_affine_(*state, *moments, 1, matrix[1:], None, 1.0, 1.0)
