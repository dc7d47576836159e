"""Table of the dtypes that rows may have, with every fact that depends on a dtype alone.

A new dtype is one line here, its code in csrc/cursor.h and the loads of each kernel that takes it.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch

Kernels = Literal["cpu", "triton", "torch"]
"""Implementations of the covariance operators: csrc/covariance*, fastcov/kernels, ops/aten.py."""

_ALL: frozenset[Kernels] = frozenset(("cpu", "triton", "torch"))

# Rows by architecture: families of GPUs as fastcov.kernels.config names them, and the compiled CPU
# library.
_SHORT_PRODUCTS = {"sm_80": 1024, "sm_90": 2048, "sm_100": 2048, "sm_120": 1024, "cpu": 256}
_LONG_PRODUCTS = {"sm_80": 512, "sm_90": 1024, "sm_100": 1024, "sm_120": 512, "cpu": 256}


class RowDtype(NamedTuple):
    """One dtype of rows.

    Attributes:
        dtype: The dtype.
        code: Number that stands for the dtype in a layout's numbers; csrc/cursor.h has the same.
        is_centred: True if Triton's kernels subtract the shift from rows before they multiply.
            False where products of uncentred rows are exact in float32.
        triton_name: Name in triton.language; None where Triton's kernels do not take the dtype.
        chain_rows: Rows that may be added up one by one in float32 (float64 for float64 rows), by
            architecture. On a GPU the products of unweighted rows decide: those of bfloat16, and of
            float32 in three parts, have few bits, so that sums round late.
        kernels: Implementations that take the dtype.
    """

    dtype: torch.dtype
    code: int
    is_centred: bool
    triton_name: str | None
    chain_rows: dict[str, int]
    kernels: frozenset[Kernels]


ROW_DTYPES: dict[torch.dtype, RowDtype] = {
    row.dtype: row
    for row in (
        RowDtype(torch.float32, 0, True, "float32", _SHORT_PRODUCTS, _ALL),
        RowDtype(torch.bfloat16, 1, False, "bfloat16", _SHORT_PRODUCTS, _ALL),
        RowDtype(torch.float16, 2, False, "float16", _LONG_PRODUCTS, _ALL),
        RowDtype(torch.float64, 3, True, None, {"cpu": 256}, frozenset(("cpu", "torch"))),
    )
}
"""Every dtype of rows, in the order of messages."""


def dtype_names() -> str:
    """Names of all row dtypes, for messages.

    Example:
        >>> dtype_names()
        'float32, bfloat16, float16 or float64'
    """
    names = [str(dtype).removeprefix("torch.") for dtype in ROW_DTYPES]
    return f"{', '.join(names[:-1])} or {names[-1]}"
