"""csrc/eigen.h over teams of real threads: right, and free of data races."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcov.ops.reference import eigvalsh_reference

DTYPES = ["float32", "float64"]
BARS = {"float32": 2e-6, "float64": 1e-13}
LANES_OF_REGISTERS = 16  # of the team in eigen_teams.cpp that has a row a lane


def matrices_of(n: int) -> Tensor:
    """Random, rank one and clustered, all of size about 1. [3, n, n]"""
    generator = torch.Generator().manual_seed(n)
    square = torch.randn(n, n, generator=generator, dtype=torch.float64)
    random = (square + square.T) / (4 * n**0.5)
    ones = torch.ones(n, n, dtype=torch.float64) / n
    clustered = torch.eye(n, dtype=torch.float64) + 1e-7 * random
    return torch.stack([random, ones, clustered])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 5, 16, 23, 40])
@pytest.mark.parametrize("team", ["loop", "block", "registers", "members"])
def test_every_team_finds_the_eigenvalues(teams, team: str, n: int, dtype: str) -> None:
    if team == "registers":
        n = min(n, LANES_OF_REGISTERS)
    matrices = matrices_of(n).to(getattr(torch, dtype))
    values, _ = teams(team, dtype, n, 3, matrices=matrices)
    exact = eigvalsh_reference(matrices)
    assert float((values.reshape(3, n) - exact).abs().max()) <= BARS[dtype] * n**0.5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 5, 12, 23])
def test_jacobi_over_a_team(teams, n: int, dtype: str) -> None:
    matrices = matrices_of(n).to(getattr(torch, dtype))
    results, _ = teams("jacobi", dtype, n, 3, matrices=matrices)
    results = results.reshape(3, n + n * n)
    values, rows = results[:, :n], results[:, n:].reshape(3, n, n)
    bar = 1e-5 if dtype == "float32" else 1e-13
    residual = rows @ matrices.double() - values[..., None] * rows
    assert float(residual.abs().max()) <= bar
    assert float((rows @ rows.mT - torch.eye(n)).abs().max()) <= bar


@pytest.mark.slow
@pytest.mark.parametrize("team", ["block", "registers", "members", "jacobi"])
def test_no_data_race(checked_teams, team: str) -> None:
    for n in (5, 13):
        run = checked_teams(team, "float32", n, 3, matrices=matrices_of(n))
        assert run.returncode == 0, run.stderr.decode()[-4000:]


@pytest.mark.slow
def test_a_missing_barrier_is_found(checked_teams) -> None:
    run = checked_teams("unsafe", "float32", 13, 3, matrices=matrices_of(13))
    assert run.returncode != 0
    assert b"WARNING: ThreadSanitizer: data race" in run.stderr
