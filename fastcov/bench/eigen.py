"""Contests of batched symmetric eigenvalues: sizes, batches, mixed sizes, a network's set."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from fastcov.bench import peers
from fastcov.bench.contest import OURS, Contest, Setting, Work, check
from fastcov.bench.floors import eigenvalue_floor, resnet50_maps
from fastcov.bench.machine import slots
from fastcov.bench.timing import Call
from fastcov.ops import count_above, eigvalsh
from fastcov.ops.reference import eigenvalue_tolerance, eigvalsh_reference

_ORDERS_AND_BATCHES = (
    *((8, 1024), (16, 1024), (32, 256), (64, 256), (100, 500)),
    *((128, 128), (256, 16), (512, 4), (1024, 1), (2048, 1)),
)
_GPU_ORDERS_AND_BATCHES = (
    *((128, 1024), (512, 64)),  # promised: first, see _problems
    *((8, 65536), (32, 4096), (64, 256), (100, 500), (256, 64), (1024, 8), (2048, 4)),
)
_CHECKED = 8  # matrices of a batch that are compared with the oracle


class Problem(NamedTuple):
    """Matrices to solve in one call; ``sizes`` holds pairs of matrix order and number."""

    name: str
    dtype: torch.dtype
    sizes: tuple[tuple[int, int], ...]


def works(setting: Setting) -> list[Work]:
    """Eigenvalue contests of a setting."""
    problems = dict.fromkeys(_problems(setting))
    return [Work(problem.name, partial(_contest, problem)) for problem in problems]


def _problems(setting: Setting) -> list[Problem]:
    f32, f64 = torch.float32, torch.float64
    mixed = ((16, 20), (33, 20), (64, 20), (100, 10), (190, 5), (256, 2))
    if setting.is_tiny:
        return [
            _uniform(f32, 8, 16),
            _uniform(f64, 33, 2),
            Problem("mixed 8 to 33, float32", f32, ((8, 3), (33, 2))),
        ]
    is_cuda = setting.device.type == "cuda"
    grid = _GPU_ORDERS_AND_BATCHES if is_cuda else _ORDERS_AND_BATCHES
    problems = [_uniform(f32, order, batch) for order, batch in grid]
    if is_cuda:  # the third promised problem
        problems.insert(2, _resnet50())
    problems.append(Problem("mixed: 77 matrices of 16 to 256, float32", f32, mixed))
    if not is_cuda and setting.size == "full":
        problems.append(_resnet50())
    if not is_cuda:
        problems += [_uniform(f64, order, 1) for order in (512, 1024, 2048)]
    if setting.size == "full":
        problems += [_uniform(f64, order, batch) for order, batch in grid]
        problems += [_uniform(f32, order, 1) for order in (32, 64, 128, 256, 512)]
    return problems


def _resnet50() -> Problem:
    widths = [channels for _, channels, _, _ in resnet50_maps(1, 224, 224)]
    counted = tuple((width, widths.count(width)) for width in sorted(set(widths)))
    return Problem("ResNet-50: 53 matrices of 64 to 2048, float32", torch.float32, counted)


def _uniform(dtype: torch.dtype, order: int, batch: int) -> Problem:
    kind = str(dtype).removeprefix("torch.")
    return Problem(f"n={order} B={batch}, {kind}", dtype, ((order, batch),))


def make_matrices(problem: Problem, device: torch.device, seed: int) -> list[Tensor]:
    """Covariances of random rows with a spread of scales, one batch for each size. [B, n, n]"""
    generator = torch.Generator(device).manual_seed(seed)
    batches = []
    for order, number in problem.sizes:
        rows = torch.randn(
            number, 2 * order, order, device=device, generator=generator, dtype=torch.float64
        )
        rows *= torch.logspace(0, -2, order, device=device, dtype=torch.float64)
        batches.append((rows.mT @ rows / (2 * order)).to(problem.dtype))
    return batches


def _contest(problem: Problem, setting: Setting) -> Contest:
    device = setting.device
    byte_count = sum(b * n * n for n, b in problem.sizes) * problem.dtype.itemsize
    copies = slots(byte_count, setting.rates.cache_bytes, most=16)
    inputs = [make_matrices(problem, device, seed) for seed in range(copies)]
    ours = [_separate(batches) if len(batches) > 1 else batches for batches in inputs]
    error, bar = _worst_error(eigvalsh(ours[0]), ours[0])
    errors = {
        OURS: check(problem.name, error, bar),
        "torch.linalg": _worst_error(peers.linalg_loop(ours[0]), ours[0])[0],
    }
    contenders: dict[str, Call] = {
        OURS: lambda index: eigvalsh(ours[index % copies]),
        "torch.linalg": lambda index: peers.linalg_loop(ours[index % copies]),
    }

    def start(peer: Callable[[torch.device], peers.EigenvalueSolver]) -> Call:
        prepare = peer(device)
        solves = [prepare(batches) for batches in ours]
        solves[0]()
        return lambda index: solves[index % copies]()

    for name, peer in peers.EIGENVALUE_PEERS.items():
        call = peers.find(setting, name, partial(start, peer))
        if call is not None:
            contenders[name] = call
    if len(problem.sizes) == 1:
        thresholds = [float(batches[0].diagonal(dim1=-2, dim2=-1).mean()) for batches in inputs]
        contenders["count_above, one threshold"] = lambda index: count_above(
            inputs[index % copies][0], thresholds[index % copies]
        )
    return Contest(
        contenders,
        reference=OURS,
        rounds=setting.rounds(15),
        # A loop of torch.linalg takes seconds on a GPU where ours takes milliseconds.
        fewest_rounds=3 if device.type == "cuda" else 6,
        errors=errors,
        floor=eigenvalue_floor(problem.sizes, problem.dtype, setting.rates),
        budget_s=8.0,
        # torch.linalg stalls the host on a GPU, so the caller's wait is timed, not the device.
        clock="wall",
    )


def _separate(batches: Sequence[Tensor]) -> list[Tensor]:
    # Mixed sizes come one by one, as the layers of a network do.
    return [matrix for batch in batches for matrix in batch]


def _worst_error(eigenvalues: Sequence[Tensor], matrices: Sequence[Tensor]) -> tuple[float, float]:
    """The error that is largest relative to its bar, and this bar."""
    worst = (0.0, 1.0)
    for values, matrix in zip(eigenvalues, matrices, strict=True):
        order = matrix.shape[-1]
        truth = eigvalsh_reference(matrix.reshape(-1, order, order)[:_CHECKED])
        ours = values.double().reshape(-1, order)[:_CHECKED]
        error = float(((ours - truth).abs().amax(-1) / truth.abs().amax(-1)).max())
        bar = eigenvalue_tolerance(order, matrix.dtype)
        if not error / bar <= worst[0] / worst[1]:
            worst = (error, bar)
    return worst
