"""Second moments of affine layers from their inputs, against the outputs' own rows in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor, nn

from fastcov.stats.affine import AffineMap, accumulate_mapped_, affine_input, is_affine
from fastcov.stats.state import CovarianceState

BAR = 1e-6  # of the largest entry; float32 rows themselves stay below 1e-5


def pixels(batch: int, channels: int, *size: int) -> Tensor:
    return torch.randn(batch, channels, *size).relu()


def channels_last(batch: int, channels: int, *size: int) -> Tensor:
    return pixels(batch, channels, *size).contiguous(memory_format=torch.channels_last)


def layers() -> dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]]:
    return {
        "rows": (lambda: nn.Linear(16, 96), lambda: torch.randn(4000, 16)),
        "tokens": (lambda: nn.Linear(24, 200, bias=False), lambda: torch.randn(8, 197, 24)),
        "wide": (lambda: nn.Linear(70, 531), lambda: torch.randn(3000, 70) + 3),
        "strided": (lambda: nn.Linear(16, 96), lambda: torch.randn(8000, 40)[::2, 3:19]),
        "images": (lambda: nn.Conv2d(16, 130, 1), lambda: pixels(8, 16, 20, 20)),
        "channels_last": (lambda: nn.Conv2d(16, 130, 1), lambda: channels_last(8, 16, 20, 20)),
        "stride": (
            lambda: nn.Conv2d(16, 130, 1, stride=(2, 3), bias=False),
            lambda: channels_last(8, 16, 41, 61),
        ),
        "sequence": (lambda: nn.Conv1d(16, 130, 1), lambda: pixels(8, 16, 400)),
        "volume": (lambda: nn.Conv3d(16, 130, 1, stride=2), lambda: pixels(8, 16, 15, 15, 15)),
    }


def rows_of(module: nn.Module, output: Tensor) -> Tensor:
    return output if isinstance(module, nn.Linear) else output.movedim(1, -1)


def exact_rows(module: nn.Module, given: Tensor) -> Tensor:
    """Output of the module without rounding. [N, C_out]"""
    twin = type(module).__new__(type(module))
    twin.__dict__.update(module.__dict__)
    twin._parameters = {
        name: None if weight is None else nn.Parameter(weight.detach().double())
        for name, weight in module._parameters.items()
    }
    with torch.no_grad():
        rows = rows_of(module, twin(given.double()))
    return rows.reshape(-1, rows.shape[-1])


def started_state(rows: Tensor) -> CovarianceState:
    """A state that has a shift."""
    state = CovarianceState(rows.shape[-1])
    state.update(rows.detach().reshape(-1, rows.shape[-1])[-50:])
    return state


def distance(state: CovarianceState, expected: CovarianceState) -> float:
    """Largest difference of covariances, against the largest entry."""
    reference = expected.covariance()
    return float((state.covariance() - reference).abs().max() / reference.abs().max())


def add_both(
    module: nn.Module, given: Tensor, **weights: float
) -> tuple[CovarianceState, CovarianceState, bool]:
    with torch.no_grad():
        output = module(given)
    rows = rows_of(module, output)
    mapped = started_state(rows)
    expected = mapped.copy()
    source = affine_input(module, (given,), output)
    assert source is not None
    assert source.explains(output)
    is_added = accumulate_mapped_(mapped, source, **weights)
    expected.update(exact_rows(module, given), **weights)
    return mapped, expected, is_added


@pytest.mark.parametrize("name", layers())
def test_equals_the_outputs_own_rows(name: str) -> None:
    torch.manual_seed(0)
    make, draw = layers()[name]
    mapped, expected, is_added = add_both(make(), draw())
    assert is_added
    assert distance(mapped, expected) < BAR
    assert torch.allclose(mapped.mean(), expected.mean(), atol=1e-7)
    assert torch.equal(mapped.count, expected.count)
    assert torch.equal(mapped.weight, expected.weight)


def test_weights_and_decay() -> None:
    torch.manual_seed(0)
    module, given = nn.Linear(16, 96), torch.randn(4000, 16) + 1
    mapped, expected, is_added = add_both(module, given, row_scale=0.25, decay=0.9)
    assert is_added
    assert distance(mapped, expected) < BAR
    assert mapped.weight.item() == pytest.approx(expected.weight.item(), rel=1e-12)
    assert torch.allclose(mapped.mean(), expected.mean(), atol=1e-7)
    whole, _, _ = add_both(module, given)
    assert mapped.weight.item() == pytest.approx(50 * 0.9 + 4000 * 0.25)
    assert whole.weight.item() == 4050


def faraway() -> tuple[nn.Module, Tensor]:
    return nn.Linear(16, 96), torch.randn(4000, 16) + 1e4


def dead_channels() -> tuple[nn.Module, Tensor]:
    given = torch.randn(4000, 16).relu()
    given[:, 3] = 0
    given[:, 7] = 5
    return nn.Linear(16, 96), given


def rank_one() -> tuple[nn.Module, Tensor]:
    return nn.Linear(16, 96), torch.randn(4000, 1) @ torch.randn(1, 16)


def few_directions() -> tuple[nn.Module, Tensor]:
    return nn.Linear(96, 400), torch.randn(30000, 5) @ torch.randn(5, 96)


def graded() -> tuple[nn.Module, Tensor]:
    return nn.Linear(16, 96), torch.randn(4000, 16) * torch.logspace(-12, 12, 16)


def cancelling(strength: float) -> tuple[nn.Module, Tensor]:
    """Outputs of the input's weak directions alone, beside a strong one."""
    module, strong = nn.Linear(16, 96), torch.randn(16)
    strong /= strong.norm()
    module.weight.data -= torch.outer(module.weight.data @ strong, strong)
    return module, torch.randn(4000, 16) + strength * torch.randn(4000, 1) * strong


def unusual_first_rows() -> tuple[nn.Module, Tensor]:
    given = torch.randn(100_000, 16).relu()
    given[:64] += 300
    return nn.Linear(16, 96), given


@pytest.mark.parametrize(
    "make", [faraway, dead_channels, rank_one, few_directions, graded, unusual_first_rows]
)
def test_inputs_that_vary_little_or_unequally(make: Callable[[], tuple[nn.Module, Tensor]]) -> None:
    torch.manual_seed(0)
    mapped, expected, is_added = add_both(*make())
    assert is_added
    assert distance(mapped, expected) < BAR
    # Without the mean, which may be nearly all there is: against float32 rows' own rounding.
    spread = expected.covariance(centered=True)
    rounding = expected.covariance().abs().max() * 1e-14
    difference = (mapped.covariance(centered=True) - spread).abs().max()
    assert float(difference) < BAR * float(spread.abs().max()) + float(rounding)


@pytest.mark.parametrize(("strength", "is_mapped"), [(3.5, True), (1e4, False)])
def test_a_map_whose_terms_cancel_much_is_left_to_the_rows(
    strength: float, is_mapped: bool
) -> None:
    torch.manual_seed(0)
    module, given = cancelling(strength)
    state = started_state(torch.randn(100, 96))
    before = state.copy()
    source = affine_input(module, (given,), module(given))
    assert source is not None
    assert accumulate_mapped_(state, source) == is_mapped
    if is_mapped:
        before.update(exact_rows(module, given))
        assert distance(state, before) < BAR
    else:
        assert torch.equal(state.moment, before.moment)


def test_what_could_not_be_mapped_is_not_tried_in_every_call() -> None:
    torch.manual_seed(0)
    module, given = nn.Linear(16, 96), torch.randn(4000, 16)
    state, layer = started_state(torch.randn(100, 96)), AffineMap(module)
    rows_with_nan = given.clone()
    rows_with_nan[5] = torch.nan
    added = [
        layer.add_to(module, (rows,), module(rows).detach(), state)
        for rows in (given, rows_with_nan, *[given] * 15)
    ]
    assert added == [True, *[False] * 15, True]


@pytest.mark.parametrize(
    ("place", "value"),
    [
        ("input", float("nan")),
        ("input", 0.0),
        ("weight", float("inf")),
        ("weight", 1e25),
        ("weight", 0.0),
    ],
)
def test_what_float32_may_not_hold_is_left_to_the_rows(place: str, value: float) -> None:
    module, given = nn.Linear(16, 96), torch.randn(4000, 16)
    with torch.no_grad():
        changed = given if place == "input" else module.weight
        if value:
            changed[5, 3] = value
        else:
            changed.fill_(1e-30)  # squares vanish: nothing varies, or hardly
        output = module(given)
    state = started_state(torch.randn(100, 96))
    before = state.copy()
    source = affine_input(module, (given,), output)
    assert source is not None
    assert not accumulate_mapped_(state, source)
    for name, tensor in before.state_dict().items():
        assert torch.equal(tensor, getattr(state, name))


def test_the_first_rows_choose_the_shift() -> None:
    module, given = nn.Linear(16, 96), torch.randn(4000, 16)
    output, state, layer = module(given), CovarianceState(96), AffineMap(module)
    assert not layer.add_to(module, (given,), output, state)
    state.update(output[:50])
    assert layer.add_to(module, (given,), output, state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_outputs_of_less_precise_products_are_read_themselves(dtype: torch.dtype) -> None:
    module, given = nn.Linear(16, 96), torch.randn(4000, 16)
    state, layer = started_state(torch.randn(100, 96)), AffineMap(module)

    def is_mapped(output: Tensor) -> bool:
        return layer.add_to(module, (given,), output.detach(), state)

    rounded = nn.functional.linear(given, module.weight.to(dtype).float(), module.bias)
    checks = [is_mapped(rounded)] + [is_mapped(module(given)) for _ in range(31)]
    # In every 16th call a row is compared, and what it says holds until the next.
    assert checks == [False] * 16 + [True] * 16


@pytest.fixture
def reduced_precision() -> Iterator[None]:
    """Matmuls of float32 by oneDNN in bfloat16, on processors that have it; convolutions not."""
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.usefixtures("reduced_precision")
@pytest.mark.parametrize("name", ["rows", "channels_last"])
def test_at_a_precision_of_the_users_choice_outputs_are_read_themselves(name: str) -> None:
    make, draw = layers()[name]
    module, given = make(), draw()
    assert affine_input(module, (given,), module(given)) is None


def test_a_row_of_zeros_tells_nothing_of_precision() -> None:
    module, given = nn.Linear(16, 96), torch.randn(4000, 16)
    given[2000] = 0
    output = module(given)
    source = affine_input(module, (given,), output)
    assert source is not None
    assert not source.explains(output)


def test_nothing_on_a_device_is_waited_for() -> None:
    module, given = nn.Linear(16, 96, device="meta"), torch.empty(4000, 16, device="meta")
    state = CovarianceState(96, "meta")  # whose count cannot be read
    assert not AffineMap(module).add_to(module, (given,), module(given), state)


def test_only_plain_float32_calls_of_widening_layers_are_mapped() -> None:
    rows = torch.randn(4000, 16)

    def source_of(module: nn.Module, given: Tensor) -> object:
        return affine_input(module, (given,), module(given))

    assert source_of(nn.Linear(16, 96), rows) is not None
    assert source_of(nn.Linear(96, 16), torch.randn(4000, 96)) is None
    assert source_of(nn.Linear(16, 96), rows[:100]) is None
    assert source_of(nn.Linear(16, 96).double(), rows.double()) is None
    assert source_of(nn.Conv2d(16, 130, 1), torch.randn(16, 60, 60)) is None
    patched = nn.Linear(16, 96)
    patched.forward = lambda given: given.new_ones(len(given), 96)
    assert source_of(patched, rows) is None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert source_of(nn.Linear(16, 96), rows) is None

    class OwnLinear(nn.Linear):
        pass

    assert not is_affine(OwnLinear(16, 96))
    assert not is_affine(nn.Conv2d(16, 96, 3))
    assert not is_affine(nn.Conv2d(16, 96, 1, padding=1))
    assert not is_affine(nn.Conv2d(16, 96, 1, groups=2))
    assert is_affine(nn.Conv2d(16, 96, 1, stride=2))
