"""Loss of tensor cores in addition, emulated: the error bar holds for the worst rows too.

One instruction adds ``products`` exact products to its accumulator: every addend is cut, towards
zero, to ``extra_bits`` below the last bit of the largest, and the sum to 24 bits. That model of
A100 (8 products, 1 bit) and H100 (16, 2) agrees with the devices bit by bit (Khattak and Mikaitis,
arXiv 2512.07004; Xie et al., arXiv 2511.10909). ``plain`` cuts the sum alone: the least any does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from fastcov.kernels.config import FLUSH_CHAIN_ROWS, Architecture, chain_rows
from fastcov.kernels.plan import MAX_CHAINS

STEP = 32  # rows of one step of the kernels
BAR = 1e-5


@dataclass(frozen=True)
class Instruction:
    products: int
    extra_bits: int


INSTRUCTIONS = {
    "plain": Instruction(16, 29),
    "sm_80": Instruction(8, 1),
    "sm_90": Instruction(16, 2),
}


def cut(values: Tensor, last_bit: Tensor) -> Tensor:
    return torch.trunc(torch.ldexp(values, -last_bit)).ldexp(last_bit)


def add(sums: Tensor, left: Tensor, right: Tensor, instruction: Instruction) -> Tensor:
    """Adds the rows' products to accumulators. [..., K], sums [...]"""
    for part in (left * right).split(instruction.products, -1):
        addends = torch.cat([sums[..., None], part], -1)
        _, exponent = torch.frexp(addends.abs().amax(-1, keepdim=True))
        total = cut(addends, exponent - 24 - instruction.extra_bits).sum(-1)
        _, exponent = torch.frexp(total)
        sums = cut(total, exponent - 24)
    return sums


def parts_of(values: Tensor, count: int) -> list[Tensor]:
    """float32 values in bfloat16 parts, as kernels/tiles.py splits them."""
    parts = []
    for _ in range(count):
        parts.append(values.float().bfloat16().double())
        values = values - parts[-1]
    return parts


def slots_sum(chains: Tensor) -> float:
    """MAX_CHAINS chains after each other in float32, rounded to nearest; then float64. [chains]"""
    total = 0.0
    for slot in chains.float().split(MAX_CHAINS):
        running = torch.zeros(())
        for chain in slot:
            running = running + chain
        total += float(running)
    return total


def moment(
    x: Tensor, y: Tensor, chain: int, instruction: Instruction, parts: int = 3
) -> tuple[float, float]:
    """Sum of x * y as gram_kernel computes it, the fullest slots it takes, and exactly. [N]"""
    exact = math.fsum((x.double() * y.double()).tolist())
    x, y = (values.double().view(-1, chain // STEP, STEP) for values in (x, y))
    sums = torch.zeros(len(x), dtype=torch.float64)
    if parts == 1:
        for step in range(x.shape[1]):
            sums = add(sums, x[:, step], y[:, step], instruction)
        return slots_sum(sums), exact
    left, right = parts_of(x, parts), parts_of(y, parts)
    small_products = [(i, j) for i in range(parts) for j in range(parts) if 0 < i + j < parts]
    for step in range(x.shape[1]):
        small = torch.zeros_like(sums)
        for i, j in sorted(small_products, key=sum, reverse=True):
            small = add(small, left[i][:, step], right[j][:, step], instruction)
        sums = add(sums, left[0][:, step], right[0][:, step], instruction)
        sums = (sums + small).float().double()
    return slots_sum(sums), exact


def normal(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, generator=torch.Generator().manual_seed(seed))


def uniform(rows: int) -> Tensor:
    return torch.rand(rows, generator=torch.Generator().manual_seed(0)) + 0.5


# Halfway between two bfloat16, and what is left again halfway: no value is split worse in two.
WORST = 1 + 2**-8 + 2**-16 - 2**-20
ROWS = {
    "squares of normal rows": normal,
    "one sign": uniform,
    "behind a relu": lambda rows: normal(rows).relu(),
    "constant": lambda rows: torch.full((rows,), WORST),
    "two values": lambda rows: WORST * normal(rows).sign(),
}


def chain_of(family: str, dtype: torch.dtype) -> int:
    mode = "split" if dtype == torch.float32 else "direct"
    return chain_rows(Architecture("sm_90" if family == "plain" else family, 132), mode, dtype)


@pytest.mark.parametrize("family", INSTRUCTIONS)
@pytest.mark.parametrize("name", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_chains_keep_the_error_bar(dtype: torch.dtype, name: str, family: str) -> None:
    rows = ROWS[name](1 << 14).to(dtype)
    parts = 3 if dtype == torch.float32 else 1
    found, exact = moment(rows, rows, chain_of(family, dtype), INSTRUCTIONS[family], parts)
    assert abs(found - exact) <= 0.8 * BAR * exact


@pytest.mark.parametrize("family", INSTRUCTIONS)
def test_a_million_rows_of_one_sign(family: str) -> None:
    """2**20 rows of bfloat16, channels of one sign: every cut goes the same way."""
    rows = uniform(1 << 20).bfloat16()
    other = rows.flip(0)
    chain = chain_of(family, torch.bfloat16)
    for right in (rows, other):
        found, exact = moment(rows, right, chain, INSTRUCTIONS[family], parts=1)
        assert abs(found - exact) <= BAR * exact


@pytest.mark.parametrize("seed", range(3))
def test_a_full_slot_stays_within_its_bound(seed: int) -> None:
    """Chains of one sign: at most MAX_CHAINS - 1 roundings of the running sum."""
    chains = normal(MAX_CHAINS, seed).abs() * 10.0 ** (normal(MAX_CHAINS, seed + 9) * seed)
    exact = math.fsum(chains.tolist())
    bound = (MAX_CHAINS - 1) * 2.0**-24
    assert bound <= 0.4 * BAR
    assert abs(slots_sum(chains.double()) - exact) <= bound * exact


def test_one_chain_of_a_million_rows_would_break_the_bar() -> None:
    rows = uniform(1 << 20).bfloat16()
    sums = torch.zeros((), dtype=torch.float64)
    # One addend an instruction, the exact sum of its 16 products: the plain model, in few calls.
    steps = (rows.double() ** 2).view(-1, 16).sum(1)
    for step in steps.tolist():
        sums = torch.tensor(float(sums) + step, dtype=torch.float64)
        sums = cut(sums, torch.frexp(sums)[1] - 24)
    assert float(sums / steps.sum()) - 1 <= -5e-4


def test_longer_chains_would_break_the_bar() -> None:
    """Why the chain is not the 4096 rows that the plain model would allow."""
    for family, dtype in (("sm_90", torch.float16), ("sm_80", torch.bfloat16)):
        rows = normal(1 << 14).to(dtype)
        found, exact = moment(rows, rows, 4096, INSTRUCTIONS[family], parts=1)
        assert abs(found - exact) > BAR * exact


def test_two_parts_would_break_the_bar_and_three_hold_all_bits() -> None:
    rows = torch.full((1 << 14,), WORST)
    found, exact = moment(rows, rows, 1024, INSTRUCTIONS["sm_90"], parts=2)
    assert abs(found - exact) > BAR * exact
    values = normal(10_000) * torch.logspace(-20, 20, 10_000)
    assert torch.equal(sum(parts_of(values.double(), 3)).float(), values)


@pytest.mark.parametrize("family", INSTRUCTIONS)
def test_products_of_mixed_sign_are_judged_by_the_largest_entry(family: str) -> None:
    """Off the diagonal: against the diagonal, which is what the bar is a share of."""
    x, y = normal(1 << 14), normal(1 << 14, seed=1)
    found, exact = moment(x, y, chain_of(family, torch.float32), INSTRUCTIONS[family])
    largest = float((x.double() ** 2).sum())
    assert abs(found - exact) <= 1e-6 * largest


def test_a_flush_takes_the_shortest_chain() -> None:
    families = ("sm_80", "sm_90", "sm_100", "sm_120")
    chains = [chain_rows(Architecture(family, 132), "direct", torch.float16) for family in families]
    assert min(chains) == FLUSH_CHAIN_ROWS
