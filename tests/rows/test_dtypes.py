"""The table of row dtypes against the compiled code's list and against each implementation."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from fastcov.ops import aten
from fastcov.ops.covariance import Moments
from fastcov.rows.dtypes import ROW_DTYPES, RowDtype

CSRC = Path(__file__).parents[2] / "csrc"
SCALAR_TYPES = {
    "Float": torch.float32,
    "BFloat16": torch.bfloat16,
    "Half": torch.float16,
    "Double": torch.float64,
}


def codes_of_cursor() -> dict[torch.dtype, int]:
    source = (CSRC / "cursor.h").read_text(encoding="utf-8")
    found = re.findall(r"case ScalarType::(\w+):\s+return (\d+);", source)
    return {SCALAR_TYPES[name]: int(code) for name, code in found}


def test_codes_are_those_of_the_compiled_library() -> None:
    assert codes_of_cursor() == {row.dtype: row.code for row in ROW_DTYPES.values()}


def test_the_compiled_chain_is_the_tables() -> None:
    source = (CSRC / "covariance.h").read_text(encoding="utf-8")
    (rows,) = re.findall(r"constexpr int64_t kChainRows = (\d+);", source)
    assert {row.chain_rows["cpu"] for row in ROW_DTYPES.values()} == {int(rows)}


@pytest.mark.parametrize("row", ROW_DTYPES.values(), ids=lambda row: str(row.dtype))
def test_every_dtype_is_taken_where_the_table_says(row: RowDtype) -> None:
    rows = torch.ones(3, 2, dtype=row.dtype)
    for name, path in (("cpu", torch.ops.fastcov.accumulate_), ("torch", aten.accumulate_)):
        assert name in row.kernels
        moments = Moments(2)
        path(*vars(moments).values(), rows)
        assert moments.count.tolist() == [3, 0]


def test_the_table_is_what_the_triton_kernels_do() -> None:
    pytest.importorskip("triton")
    import triton.language as tl

    from fastcov.kernels.config import Architecture, chain_rows
    from fastcov.kernels.job import mode_of

    for row in ROW_DTYPES.values():
        assert (row.triton_name is not None) == ("triton" in row.kernels)
        if row.triton_name is None:
            continue
        assert isinstance(getattr(tl, row.triton_name), tl.dtype)
        mode = mode_of(row.dtype, is_weighted=False)
        assert row.is_centred == (mode == "split")
        for family, rows in row.chain_rows.items():
            if family != "cpu":
                assert chain_rows(Architecture(family, 1), mode, row.dtype) == rows
