"""How many rows of each layer the policies read."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastcov
from fastcov.rows.policy import Auto, Fixed, LayerLoad, Share, policy_of, rows_per_channel

LOADS = st.lists(
    st.builds(
        LayerLoad,
        channels=st.integers(1, 2048),
        rows=st.integers(1, 10**6),
        macs=st.integers(1, 10**10),
        sketch=st.none() | st.integers(2, 3000),
    ),
    min_size=1,
    max_size=20,
)


def planned(loads: list[LayerLoad]) -> tuple[float, list[float]]:
    """Rows per channel, and the share of each layer's rows."""
    policy, named = Auto(), {str(number): load for number, load in enumerate(loads)}
    fractions = policy.fractions(named, named)
    assert policy.rho == rows_per_channel(loads)
    return policy.rho, [fractions[name] for name in named]


def macs_of_a_row(load: LayerLoad) -> float:
    channels = load.channels
    if load.sketch is None or load.sketch >= channels:
        return channels * (channels + 1) / 2
    return load.sketch * channels + (load.sketch + 1) * (load.sketch + 2) / 2


@given(LOADS)
def test_plan_spends_the_budget_and_no_more(loads: list[LayerLoad]) -> None:
    rho, fractions = planned(loads)
    spent = sum(
        fraction * load.rows * macs_of_a_row(load)
        for load, fraction in zip(loads, fractions, strict=True)
    )
    budget = 0.03 * sum(load.macs for load in loads)
    assert spent <= budget * (1 + 1e-9)
    if math.isfinite(rho):
        assert spent == pytest.approx(budget)


@given(LOADS)
def test_plan_gives_every_layer_the_same_rows_per_channel(loads: list[LayerLoad]) -> None:
    rho, fractions = planned(loads)
    for load, fraction in zip(loads, fractions, strict=True):
        rows = fraction * load.rows
        assert rows == pytest.approx(min(load.rows, rho * load.channels))


def test_resnet50_at_batch_256_reads_one_and_a_half_rows_a_channel() -> None:
    torchvision = pytest.importorskip("torchvision")

    with torch.device("meta"):
        model = torchvision.models.resnet50()
    report = fastcov.estimate(model, torch.empty(256, 3, 224, 224, device="meta"))
    layer = next(layer for layer in report.layers if layer.name == "layer3.0.conv2")
    assert layer.rows_read / layer.channels == pytest.approx(1.4, abs=0.1)
    assert report.flops_share == pytest.approx(0.01, rel=0.02)


def test_layers_that_come_later_get_the_rows_per_channel_of_the_first_step() -> None:
    policy = Auto()
    first = {"a": LayerLoad(10, 1000, 100_000)}
    rho = policy.fractions(first, first)["a"] * 1000 / 10
    later = {"b": LayerLoad(20, 5000, 7)}
    assert policy.fractions(later, {**first, **later})["b"] == pytest.approx(rho * 20 / 5000)


@pytest.mark.parametrize(
    ("rows", "kind", "first", "read"),
    [
        ("all", Share, 1.0, 1.0),
        (0.25, Share, 0.25, 0.25),
        (30, Fixed, None, 0.3),
        ("auto", Auto, None, None),
    ],
)
def test_rows_name_a_policy(
    rows: object, kind: type, first: float | None, read: float | None
) -> None:
    policy = policy_of(rows)
    assert type(policy) is kind
    assert policy.first_fraction == first
    if read is not None:
        load = {"layer": LayerLoad(10, 100, 1000)}
        assert policy.fractions(load, load) == {"layer": read}
