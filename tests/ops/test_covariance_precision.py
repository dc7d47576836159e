"""Products of float32 rows by the caller's choice: what reaches the kernels, and what it costs."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fastcov import kernels
from fastcov.ops import accumulate_, backend, covariance, library
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import accumulate_reference_

PRECISIONS = ("split", "tf32", "ieee")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def random_rows(count: int = 600, channels: int = 41, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(count, channels, generator=generator) + 0.5).to(dtype)


def oracle_of(rows: Tensor, **options: Any) -> Moments:
    oracle = Moments(rows.shape[-1], rows.device)
    accumulate_reference_(**vars(oracle), rows=rows, **options)
    return oracle


def error_of(found: Tensor, oracle: Moments) -> float:
    truth = oracle.covariance()
    return float((found - truth).abs().max() / truth.abs().max())


@pytest.mark.parametrize("precision", ["bf16x3", "direct", "SPLIT", None, 3, ["split"]])
def test_another_precision_is_refused_with_the_choices(precision: Any) -> None:
    moments, rows = Moments(41), random_rows()
    message = r"precision=.*: choose one of 'split', 'tf32', 'ieee'"
    with pytest.raises(ValueError, match=message) as refused:
        accumulate_(moments, rows, precision=precision)
    assert f"precision={precision!r}" in str(refused.value)
    assert moments.count.tolist() == [0, 0]
    with pytest.raises(ValueError, match=message):
        covariance(rows, precision=precision)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_cpu_multiplies_the_same_way_whatever_is_asked(
    precision: Any, dtype: torch.dtype
) -> None:
    rows = random_rows(dtype=dtype)
    found = covariance(rows, precision=precision)
    assert error_of(found, oracle_of(rows)) < (1e-13 if dtype == torch.float64 else 1e-6)
    assert torch.equal(found, covariance(rows))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_weights_scale_and_decay_come_along(precision: Any) -> None:
    rows, row_weight = random_rows(), torch.rand(600, dtype=torch.float64)
    moments, oracle = Moments(41), Moments(41)
    for _ in range(2):
        accumulate_(moments, rows, row_weight, row_scale=0.5, decay=0.9, precision=precision)
        options = {"row_weight": row_weight, "row_scale": 0.5, "decay": 0.9}
        accumulate_reference_(**vars(oracle), rows=rows, **options)
    assert error_of(moments.covariance(), oracle) < 1e-6
    torch.testing.assert_close(moments.weight, oracle.weight)


class Recorded(TorchDispatchMode):
    """The operators of fastcov that run, and the strings among their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[str]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "fastcov":
            self.calls.append((str(func), [value for value in args if isinstance(value, str)]))
        return func(*args, **(kwargs or {}))


def test_public_functions_pass_the_choice_on_and_the_default_costs_no_argument() -> None:
    rows = random_rows()
    with Recorded() as recorded:
        covariance(rows)
        covariance(rows, precision="split")
        covariance(rows, precision="tf32")
        accumulate_(Moments(41), rows, precision="ieee")
    assert recorded.calls == [
        ("fastcov.accumulate_.default", []),
        ("fastcov.accumulate_.default", []),
        ("fastcov.accumulate_at_precision_.default", ["tf32"]),
        ("fastcov.accumulate_at_precision_.default", ["ieee"]),
    ]


@pytest.mark.parametrize("channel_dim", [-1, 1])
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_the_launcher_gets_what_a_gpu_is_asked_for(
    monkeypatch: pytest.MonkeyPatch, precision: str, channel_dim: int
) -> None:
    launched: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    monkeypatch.setattr(backend, "active", backend.Pretended(backend.GPU))
    monkeypatch.setattr(
        kernels,
        "launch_accumulate_",
        lambda *args, **options: launched.append((args, options)),
        raising=False,
    )
    maps, row_weight = torch.randn(2, 41, 3), torch.rand(6)
    rows = maps if channel_dim == 1 else maps.permute(0, 2, 1)
    state = vars(Moments(41)).values()
    on_a_gpu = library._FALLBACKS["accumulate_at_precision_", "CUDA"]
    on_a_gpu(*state, rows, precision, channel_dim, row_weight, 0.5, 0.9)
    library._FALLBACKS["accumulate_", "CUDA"](*state, rows, channel_dim)
    (args, options), (_, default) = launched
    assert options == {"channel_dim": channel_dim, "precision": precision}
    assert default == {"channel_dim": channel_dim, "precision": "split"}
    assert args[5] is rows
    assert args[6] is row_weight
    assert args[7:] == (0.5, 0.9)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_plain_torch_on_a_gpu_keeps_float32(
    monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    monkeypatch.setattr(backend, "active", backend.Pretended(backend.HOST))
    rows, moments = random_rows(), Moments(41)
    library._FALLBACKS["accumulate_at_precision_", "CUDA"](*vars(moments).values(), rows, precision)
    assert error_of(moments.covariance(), oracle_of(rows)) < 1e-6


def test_opcheck() -> None:
    operator = torch.ops.fastcov.accumulate_at_precision_
    state = vars(Moments(5)).values()
    torch.library.opcheck(operator, (*state, random_rows(20, 5), "tf32"))
    maps = random_rows(20, 5).view(2, 5, 10)
    torch.library.opcheck(operator, (*state, maps, "ieee", 1, torch.rand(20), 0.5, 0.9))
    for key in ("CPU", "CUDA"):
        assert library.has_kernel("accumulate_at_precision_", key)


def test_one_graph_with_a_choice() -> None:
    rows = random_rows()
    compiled = torch.compile(
        partial(covariance, precision="ieee"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(rows), covariance(rows))


@pytest.mark.gpu
def test_precisions_differ_on_a_gpu_by_what_they_cost() -> None:
    """Values that TF32 has no bits for: it is off by that, the others and plain torch are not."""
    is_triton = backend.service_of(torch.float32, torch.device("cuda")).kernels == "triton"
    channel = torch.arange(192, device="cuda")
    # The mean of the first rows, the shift, is 0: the products are of these values themselves.
    sign = torch.tensor([1.0, -1.0], device="cuda").repeat(4096)[:, None]
    rows = sign * (1 + (channel % 3 + 1) * 2.0**-13)
    errors = {p: error_of(covariance(rows, precision=p), oracle_of(rows)) for p in PRECISIONS}
    assert errors["tf32"] < 2e-3, errors
    assert (errors["tf32"] > 2e-4) == is_triton, errors
    assert errors["split"] < 1e-5, errors
    assert errors["ieee"] < 2e-6, errors
    rows = torch.randn(20_000, 192, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    errors = {p: error_of(covariance(rows, precision=p), oracle_of(rows)) for p in PRECISIONS}
    assert errors["tf32"] < 2e-3, errors
    assert errors["split"] < 1e-5, errors
    assert errors["ieee"] < 2e-6, errors
    half = rows.bfloat16()
    assert torch.equal(covariance(half, precision="tf32"), covariance(half))
