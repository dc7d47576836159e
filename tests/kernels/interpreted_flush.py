"""Chains of a flush, in Triton's interpreter, which adds without a matrix unit's truncation.

Each multiplication here loses what such a unit would: run as interpreted.py is.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastcov.kernels import flush
from fastcov.kernels.flush import BufferedLayer, FlushTable, launch_flush_
from fastcov.kernels.gather import CURSOR_FIELDS, FILL

_spec = importlib.util.spec_from_file_location(
    "interpreted", Path(__file__).with_name("interpreted.py")
)
assert _spec is not None
assert _spec.loader is not None
interpreted = importlib.util.module_from_spec(_spec)
sys.modules["interpreted"] = interpreted
_spec.loader.exec_module(interpreted)
State, test_runs_in_the_interpreter = interpreted.State, interpreted.test_runs_in_the_interpreter

LONGEST_CHAIN = 512  # rows
LOSS = 2.0**-12  # of what has been added before, at every step: more than that of any unit


@pytest.fixture(autouse=True)
def lossy_multiplications(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step of a chain takes its share of what the chain holds, always downwards."""
    multiply_tiles = flush.multiply_tiles

    def lossy(left: Any, right: Any, sums: Any, *options: Any) -> Any:
        return multiply_tiles(left, right, sums * (1 - LOSS), *options)

    monkeypatch.setattr(flush, "multiply_tiles", lossy)


def flushed(rows: Tensor, decay: float) -> State:
    count, channels = rows.shape
    state, cursor = State(channels), torch.zeros(CURSOR_FIELDS, dtype=torch.int64)
    cursor[FILL.value] = count
    row_step = torch.zeros(count, dtype=torch.int32)
    layer = BufferedLayer(*state.tensors, rows, row_step, cursor, count)
    launch_flush_(FlushTable([layer]), torch.zeros((), dtype=torch.int64), decay=decay)
    assert int(state.count[0]) == count
    return state


def share_lost(rows: Tensor, decay: float) -> float:
    state = flushed(rows, decay)
    shifted = rows.double() - state.shift
    exact = shifted.T @ shifted
    return float(1 - state.moment[0, 0, 0] / exact[0, 0])


@pytest.mark.parametrize(
    ("dtype", "channels", "decay"),  # each pair is multiplied in another way, or read in another
    [
        (torch.float32, 16, 1.0),
        (torch.float32, 3, 0.9),
        (torch.bfloat16, 16, 1.0),
        (torch.bfloat16, 3, 1.0),
        (torch.float16, 16, 0.9),
    ],
)
def test_losses_do_not_grow_with_the_rows_beyond_a_chain(
    dtype: torch.dtype, channels: int, decay: float
) -> None:
    """Rows of one sign, where every loss goes the same way."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.rand(3 * LONGEST_CHAIN, channels, generator=generator) + 0.5).to(dtype)
    of_one = share_lost(rows[:LONGEST_CHAIN], decay)
    of_three = share_lost(rows, decay)
    assert of_one > 2 * LOSS  # it is there to be seen
    assert of_three == pytest.approx(of_one, rel=0.1)
