"""csrc/eigen_large.h by several threads: the same bits as by one, and free of data races."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcov.ops.reference import eigvalsh_reference

BARS = {"float32": 2e-6, "float64": 1e-14}


def random(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    square = torch.randn(n, n, generator=generator, dtype=torch.float64)
    # Nobody may read above the diagonal.
    return (square + square.T).tril() + torch.full_like(square, torch.nan).triu(1).nan_to_num(1e9)


def tridiagonal(results: Tensor) -> Tensor:
    n = len(results) // 2
    below = torch.diag(results[n:-1], -1)
    return (torch.diag(results[:n]) + below + below.T) * results[-1]


@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("n", [2, 3, 31, 32, 33, 34, 63, 65, 96, 97, 150])
def test_the_tridiagonal_form_has_the_matrix_eigenvalues(crew, n: int, dtype: str) -> None:
    matrix = random(n).to(getattr(torch, dtype))
    results, _ = crew("one", dtype, n, matrices=matrix)
    exact = eigvalsh_reference(matrix)
    error = (torch.linalg.eigvalsh(tridiagonal(results)) - exact).abs().max()
    assert float(error) <= BARS[dtype] * float(exact.abs().max())


# Sweeps of 7, 14 and 19 steps: one, three and four ranges of them.
@pytest.mark.parametrize("dtype", BARS)
@pytest.mark.parametrize("n", [230, 445, 600])
@pytest.mark.parametrize("name", ["even", "uneven", "serial"])
def test_every_crew_gives_the_bits_of_one_rank(crew, name: str, n: int, dtype: str) -> None:
    matrix = random(n)
    alone, _ = crew("one", dtype, n, matrices=matrix)
    together, _ = crew(name, dtype, n, matrices=matrix)
    assert torch.equal(together, alone)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["even", "uneven"])
def test_no_data_race(checked_crew, name: str) -> None:
    run = checked_crew(name, "float32", 445, matrices=random(445))
    assert run.returncode == 0, run.stderr.decode()[-4000:]


@pytest.mark.slow
def test_a_sweep_that_does_not_wait_is_found(checked_crew) -> None:
    run = checked_crew("unsafe", "float32", 445, matrices=random(445))
    assert run.returncode != 0
    assert b"WARNING: ThreadSanitizer: data race" in run.stderr
