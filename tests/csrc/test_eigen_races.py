"""The GPU's kernels on the host: no access that only luck orders.

ThreadSanitizer takes each thread of a block for a thread and knows what a barrier and a counter
order: what compute-sanitizer's racecheck and synccheck look for on a GPU. A shuffle orders nothing.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

SHARED = 232448
# Kernel, order, matrices, shared memory, multiprocessors, clusters.
CASES = {
    "8 lanes of a warp": ("registers", 5, 9, SHARED, 6, 0),
    "16 lanes of a warp": ("registers", 13, 9, SHARED, 6, 0),
    "a warp": ("registers", 20, 5, SHARED, 6, 0),
    "a block of 64": ("registers", 37, 2, SHARED, 6, 0),
    "a block of 128": ("registers", 67, 1, SHARED, 6, 0),
    "triangle": ("triangle", 21, 2, SHARED, 6, 0),
    "counts": ("counts", 21, 2, SHARED, 6, 0),
    "one member": ("members", 17, 2, SHARED, 1, 0),
    "cooperative": ("members", 18, 1, SHARED, 2, 0),
    "cluster": ("members", 18, 1, SHARED, 2, 1),
    "cooperative, far rows": ("members", 18, 1, 5200, 2, 0),
    "cluster of four": ("members", 50, 1, SHARED, 4, 1),
    "three members, far rows": ("members", 40, 1, 6500, 3, 0),
    "Jacobi in a warp": ("jacobi", 11, 5, SHARED, 6, 0),
    "Jacobi in a block": ("jacobi", 34, 1, SHARED, 6, 0),
    "Jacobi, far vectors": ("jacobi", 34, 1, 4500, 6, 0),
}


def matrices_of(n: int, count: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    square = torch.randn(count, n, n, generator=generator, dtype=torch.float64)
    return square + square.mT


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_no_data_race(checked_kernels, case: str) -> None:
    kernel, n, count, *gpu = CASES[case]
    run = checked_kernels(kernel, "float32", n, count, *gpu, matrices=matrices_of(n, count))
    assert run.returncode == 0, run.stderr.decode()[-4000:]
    if kernel == "members":
        _, multiprocessors, clusters = gpu
        words = run.stderr.decode().split()
        plan = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        assert plan["members"] == max(1, multiprocessors // count)
        assert (plan["far"] > 0) == ("far" in case)
        assert plan["cluster"] == clusters


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "barriers"),
    [
        ("a warp", "warp"),
        ("a block of 64", "block"),
        ("triangle", "warp"),
        ("triangle", "block"),
        ("cooperative", "block"),
        ("cluster", "cluster"),
        ("Jacobi in a block", "block"),
    ],
)
def test_missing_barriers_are_found(checked_kernels, case: str, barriers: str) -> None:
    kernel, n, count, *gpu = CASES[case]
    run = checked_kernels(
        kernel,
        "float32",
        n,
        count,
        *gpu,
        matrices=matrices_of(n, count),
        # One report is enough.
        environment={"EMULATED_WITHOUT": barriers, "TSAN_OPTIONS": "halt_on_error=1"},
    )
    assert run.returncode != 0
    assert b"WARNING: ThreadSanitizer: data race" in run.stderr


@pytest.mark.parametrize("case", CASES)
def test_the_order_of_the_threads_changes_nothing(emulated, case: str) -> None:
    kernel, n, count, *gpu = CASES[case]
    matrices = matrices_of(n, count)
    results = [
        emulated(
            kernel,
            "float32",
            n,
            count,
            *gpu,
            matrices=matrices,
            environment={"EMULATED_ORDER": order},
        )[0]
        for order in ("0", "1", "7")
    ]
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])
