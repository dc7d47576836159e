"""Rules of torch.vmap for the operators that add or copy rows: one call for each example.

An example adds to tensors of its own. Where a state is shared by all examples there is no right
answer inside torch.vmap, which promises that examples do not see each other.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_CHANGED = {  # tensors in front of the arguments that an operator changes, and their name
    "accumulate_": (5, "the state"),
    "accumulate_at_precision_": (5, "the state"),
    "accumulate_affine_": (5, "the state"),
    "gather_": (1, "the buffer"),
}


def _rule(name: str) -> Callable[..., tuple[Any, Any]]:
    changed, what = _CHANGED[name]

    def run(info: Any, in_dims: tuple[int | None, ...], *arguments: Any) -> tuple[Any, Any]:
        if None in in_dims[:changed]:
            raise RuntimeError(
                f"torch.vmap of fastcov.{name}: {what} is shared by all {info.batch_size} "
                "examples; add the whole batch outside of torch.vmap, or map over one for each "
                "example"
            )
        results = []
        for index in range(info.batch_size):
            parts = [
                argument if dim is None else argument.select(dim, index)
                for argument, dim in zip(arguments, in_dims, strict=True)
            ]
            results.append(getattr(torch.ops.fastcov, name)(*parts))
        return (None, None) if results[0] is None else (torch.stack(results), 0)

    return run


RULES: dict[str, Callable[..., tuple[Any, Any]]] = {name: _rule(name) for name in _CHANGED}
"""Rules by operator, which library.py registers."""
