"""Several chains of one slot, in Triton's interpreter: see interpreted.py."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcov.kernels import job
from fastcov.kernels.config import Architecture, Mode
from fastcov.kernels.plan import Plan, gram_plan

_spec = importlib.util.spec_from_file_location(
    "interpreted", Path(__file__).with_name("interpreted.py")
)
assert _spec is not None
assert _spec.loader is not None
interpreted = importlib.util.module_from_spec(_spec)
sys.modules["interpreted"] = interpreted
_spec.loader.exec_module(interpreted)
check, normal, narrow_tiles = interpreted.check, interpreted.normal, interpreted.narrow_tiles


@pytest.fixture(autouse=True)
def short_chains(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Chains of 64 rows, three of them in a slot, where a plan would take more slots for so few."""

    def three_chains(*arguments: object) -> Plan:
        plan = gram_plan(*arguments)
        steps = 3 * plan.steps_per_chain
        return replace(plan, steps_per_chunk=steps, chunks=-(-plan.steps // steps))

    monkeypatch.setattr(job, "chain_rows", lambda *_: 64)
    monkeypatch.setattr(job, "gram_plan", three_chains)
    job.cached_job.cache_clear()
    yield
    job.cached_job.cache_clear()


def plan_of(
    rows: Tensor,
    family: str,
    multiprocessors: int = 2,
    *,
    is_weighted: bool = False,
    precision: Mode = "split",
) -> Plan:
    architecture = Architecture(family, multiprocessors)
    found = job.job_of(rows, is_weighted, precision, architecture)
    assert found is not None
    return found.plan


@pytest.mark.parametrize("family", ["sm_80", "sm_90", "sm_100", "sm_120"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_several_chains_in_a_slot(family, dtype):
    rows = normal(270, 20, dtype=dtype)
    plan = plan_of(rows, family)
    assert plan.chains > plan.chunks > 1
    states = [check(rows, family=family) for _ in range(2)]
    for one, other in zip(states[0].tensors, states[1].tensors, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("row", [0, 80, 269])
def test_a_broken_row_in_any_chain_of_a_slot(dtype, row):
    rows = normal(270, 20, dtype=dtype)
    rows[row, 7] = float("nan")
    state = check(rows)
    assert state.count.tolist() == [269, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_wide_rows_in_several_chains(narrow_tiles, dtype):
    narrow_tiles(32, 2, 1, 2)
    rows = normal(150, 73, dtype=dtype)
    plan = plan_of(rows, "sm_90", 1)
    assert (plan.triangles, plan.chains, plan.chunks) == (2, 3, 1)
    broken = rows.clone()
    broken[80, 72] = float("inf")
    broken[81, 1] = float("nan")
    check(rows, broken, multiprocessors=1)


def test_other_paths_in_several_chains():
    rows = normal(600, 20)
    rows[70, 3] = float("nan")
    weight = torch.rand(600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    strided = normal(2, 3, 2, 160, 12).permute(3, 1, 0, 2, 4)[::2, ::2]
    for case, precision in ((rows, "split"), (rows, "ieee"), (strided, "split")):
        weights = weight if precision == "split" and case is rows else None
        plan = plan_of(case, "sm_90", 1, is_weighted=weights is not None, precision=precision)
        assert plan.steps_per_chunk > plan.steps_per_chain, (case.shape, precision)
        check(case, multiprocessors=1, precision=precision, row_weight=weights)
