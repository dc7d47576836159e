"""Each one-line semantic of tracking, on real modules, against sums made by hand."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fastcov


class Net(nn.Module):
    """A convolution, an in-place ReLU, a head that is called twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.act(self.conv(x))
        coarse = self.pool(self.norm(fine))
        return self.head(fine).mean() + self.head(coarse).mean()


def images(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def outputs(module: nn.Module, model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Output of a module, copied before an in-place successor changes it. [B, P, C]"""
    seen: list[Tensor] = []
    handle = module.register_forward_hook(
        lambda _m, _a, out: seen.append(out.detach().double().flatten(2).mT.clone())
    )
    for x in inputs:
        model(x)
    handle.remove()
    return seen


def second_moment(rows: Tensor) -> Tensor:
    flat = rows.reshape(-1, rows.shape[-1])
    return flat.T @ flat / len(flat)


def frozen() -> Net:
    torch.manual_seed(0)
    return Net()


def test_default_names_and_root_step() -> None:
    model = frozen()
    with fastcov.track(model, rows="all") as tracker:
        assert tracker.names() == ["conv", "head"]
        model(images())
        model.conv(images())  # not a forward of the root: no step
    assert tracker.steps == 1
    assert tracker.count("conv") == 3 * 64


def test_covariance_sees_what_the_layer_gave_before_in_place_relu() -> None:
    model = frozen()
    (expected,) = outputs(model.conv, model, images())
    with fastcov.track(model, rows="all") as tracker:
        model(images())
    torch.testing.assert_close(
        tracker.covariance("conv"), second_moment(expected), rtol=1e-5, atol=1e-6
    )
    centred = expected.reshape(-1, 6) - expected.reshape(-1, 6).mean(0)
    torch.testing.assert_close(
        tracker.covariance("conv", centered=True), second_moment(centred), rtol=1e-5, atol=1e-6
    )
    torch.testing.assert_close(tracker.mean("conv"), expected.mean((0, 1)), rtol=1e-5, atol=1e-6)


def test_every_reads_steps_0_k_2k() -> None:
    model = frozen()
    with fastcov.track(model, rows="all", every=3) as tracker:
        for _ in range(7):
            model(images())
    assert tracker.steps == 7
    assert tracker.count("conv") == 3 * 192


def test_train_only_reads_the_root_training_flag() -> None:
    model = frozen()
    with fastcov.track(model, rows="all") as tracker:
        model.eval()
        with torch.no_grad():
            model(images())
        assert tracker.steps == 0
        model.train()
        model.norm.eval()
        with torch.no_grad():  # grad mode says nothing
            model(images())
    assert tracker.count("conv") == 192
    model.eval()
    with fastcov.track(model, rows="all", train_only=False) as tracker:
        model(images())
    assert tracker.count("conv") == 192


def test_non_finite_rows_are_counted_apart() -> None:
    model = nn.Linear(3, 3)
    nn.init.eye_(model.weight)
    nn.init.zeros_(model.bias)
    rows = torch.randn(10, 3)
    rows[4] = float("nan")
    with fastcov.track(model, rows="all") as tracker:
        model(rows)
    assert tracker.count("") == 9
    assert "1 rows with NaN or inf skipped" in str(tracker.summary())


def test_image_weighting_shares_one_weight_over_calls_by_positions() -> None:
    model = frozen()
    batches = [images(1), images(2, batch=5), images(3)]
    calls = outputs(model.head, model, *batches)
    total, weight = torch.zeros(4, 4, dtype=torch.float64), 0
    for fine, coarse in zip(calls[::2], calls[1::2], strict=True):
        both = torch.cat([fine, coarse], 1)  # [B, P of both calls, C]
        total += torch.einsum("bpc,bpd->cd", both, both) / both.shape[1]
        weight += len(both)
    with fastcov.track(model, rows="all", weighting="image") as tracker:
        for batch in batches:
            model(batch)
    torch.testing.assert_close(tracker.covariance("head"), total / weight, rtol=1e-5, atol=1e-6)
    summary = {status.name: status for status in tracker.statuses()}
    assert summary["head"].weight == pytest.approx(weight)
    assert summary["conv"].weight == pytest.approx(weight)


def test_image_weighting_counts_images_not_positions() -> None:
    model = nn.Conv2d(2, 2, 1)
    large, small = torch.randn(1, 2, 32, 32), torch.randn(1, 2, 4, 4)
    rows = [r for x in (large, small) for r in outputs(model, model, x)]
    expected = (second_moment(rows[0]) + second_moment(rows[1])) / 2
    with fastcov.track(model, rows="all", weighting="image") as tracker:
        model(large)
        model(small)
    torch.testing.assert_close(tracker.covariance(""), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 40])  # through the buffer, and at once
def test_decay_is_one_factor_a_step(batch: int) -> None:
    model = nn.Linear(4, 4)
    inputs = [torch.randn(batch, 4) for _ in range(6)]
    expected, weight = torch.zeros(4, 4, dtype=torch.float64), 0.0
    for x in inputs:
        rows = model(x).detach().double()
        expected, weight = 0.8 * expected + rows.T @ rows, 0.8 * weight + batch
    with fastcov.track(model, rows="all", decay=0.8) as tracker:
        for x in inputs:
            model(x)
    torch.testing.assert_close(tracker.covariance(""), expected / weight, rtol=1e-5, atol=1e-6)


def test_pooled_calls_are_one_layer() -> None:
    model = frozen()
    calls = outputs(model.head, model, images())
    with fastcov.track(model, rows="all") as tracker:
        model(images())
    expected = second_moment(torch.cat([call.reshape(-1, 4) for call in calls]))
    assert tracker.count("head") == 3 * (64 + 16)
    torch.testing.assert_close(tracker.covariance("head"), expected, rtol=1e-5, atol=1e-6)


def test_input_taps_see_the_map_that_feeds_the_layer() -> None:
    model = frozen()
    (before,) = outputs(model.act, model, images())
    with fastcov.track(model, rows="all", where="both", include="norm") as tracker:
        model(images())
    assert tracker.names() == ["norm", "norm:in"]
    torch.testing.assert_close(
        tracker.covariance("norm:in"), second_moment(before), rtol=1e-5, atol=1e-6
    )


def test_consumers_of_one_tensor_share_one_tap() -> None:
    class Fork(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = x.relu()
            return self.left(y) + self.right(y)

    model = Fork()
    with fastcov.track(model, rows="all", where="input") as tracker:
        for _ in range(2):
            model(torch.randn(10, 4))
    assert len(tracker.watcher.taps.unique_layers) == 1
    assert tracker.count("left:in") == tracker.count("right:in") == 20


def test_merge_adds_what_both_have_seen() -> None:
    model = frozen().double()  # so that the rows' own rounding stays out of the comparison
    with fastcov.track(model, rows="all") as together:
        with fastcov.track(model, rows="all") as first:
            model(images(1).double())
        with fastcov.track(model, rows="all") as second:
            model(images(2).double())
    first.merge(second)
    error = (first.covariance("conv") - together.covariance("conv")).abs().max()
    assert float(error) <= 1e-12 * float(together.covariance("conv").trace())
    assert first.steps == 2
    with fastcov.track(model, decay=0.5) as decayed, pytest.raises(ValueError, match="decay"):
        decayed.merge(first)
    with fastcov.track(nn.Linear(2, 2)) as other, pytest.raises(ValueError, match="no layer in"):
        other.merge(first)


def test_auto_spends_one_percent_and_shares_it() -> None:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32))
    macs_a_row = 2 * 32 * 64
    with fastcov.track(model) as tracker:
        for _ in range(50):
            model(torch.randn(400, 32))
    spent = sum(
        tracker.count(name) * width * (width + 1) / 2 for name, width in (("0", 64), ("2", 32))
    )
    assert spent == pytest.approx(0.03 * macs_a_row * 400 * 50, rel=0.01)
    assert tracker.count("0") == pytest.approx(2 * tracker.count("2"), rel=0.01)


def test_a_layer_that_first_runs_late_is_read_too() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.Linear(8, 8), nn.Linear(8, 8)
            self.use_late = False

        def forward(self, x: Tensor) -> Tensor:
            x = self.early(x)
            return self.late(x) if self.use_late else x

    model = Late()
    with fastcov.track(model) as tracker:
        model(torch.randn(1000, 8))
        assert "late" not in tracker.spectra()
        with pytest.raises(ValueError, match="'late' has seen no row: its module was not called"):
            tracker.covariance("late")
        model.use_late = True
        model(torch.randn(1000, 8))
    assert 0 < tracker.count("late") < 1000


def test_paused_and_reset() -> None:
    model = frozen()
    with fastcov.track(model, rows="all") as tracker:
        with tracker.paused():
            model(images())
        assert tracker.steps == 0
        model(images())
        tracker.reset()
        model(images(1))
        (expected,) = outputs(model.conv, model, images(1))[:1]
    assert tracker.steps == 2
    torch.testing.assert_close(
        tracker.covariance("conv"),
        second_moment(torch.cat([expected, expected])),
        rtol=1e-5,
        atol=1e-6,
    )


def test_attention_shared_modules_tuples_and_widths() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.lstm = nn.LSTM(8, 5, batch_first=True)
            self.wide = nn.Linear(5, 64)
            self.shared = nn.Linear(5, 5)
            self.again = self.shared

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            x, _ = self.attention(x, x, x)
            x, _ = self.lstm(x)
            self.wide(x)
            return {"out": self.again(self.shared(x))}

    model = Odd()
    with fastcov.track(
        model, rows="all", include=["*", nn.LSTM], exclude="", max_channels=32
    ) as tracker:
        model(torch.randn(2, 7, 8))
    assert tracker.count("attention") == tracker.count("lstm") == 14
    assert tracker.count("shared") == 28
    text = str(tracker.summary())
    assert "64 channels > max_channels=32" in text
    assert "attention.out_proj" not in fastcov.track(model).names()


def test_closing_leaves_nothing_behind() -> None:
    model = frozen()
    tracker = fastcov.track(model, where="both")
    model(images())
    tracker.close()
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    steps = tracker.steps
    model(images())
    assert tracker.steps == steps


def test_two_trackers_on_one_model() -> None:
    model = frozen()
    with fastcov.track(model, rows="all") as a, fastcov.track(model, rows="all", every=2) as b:
        model(images())
        model(images())
    assert (a.count("conv"), b.count("conv")) == (384, 192)


def test_snapshots_are_taken_and_kept(tmp_path: object) -> None:
    model = frozen()
    with fastcov.track(model, rows="all", snapshot_every=2, out=tmp_path / "run") as tracker:
        for seed in range(5):
            model(images(seed))
    reloaded = fastcov.load_history(tmp_path / "run")
    assert [snapshot.step for snapshot in reloaded] == [2, 4]
    assert len(tracker.history) == 2
    assert reloaded[-1].spectra["conv"].channels == 6


def test_summary_is_a_flat_dict_of_floats_that_prints() -> None:
    model = frozen()
    with fastcov.track(model, rows=5) as tracker:
        model(images())
        summary = tracker.summary()
    assert summary
    assert all(isinstance(k, str) and isinstance(v, float) for k, v in summary.items())
    assert "conv" in str(summary)
    assert "more steps until 16 rows a channel" in str(summary)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": "layer9.*"}, ValueError, "'layer9.*' matches no module"),
        ({"include": "cnv"}, ValueError, "conv"),
        ({"exclude": "con"}, ValueError, "conv"),
        ({"include": nn.LSTM}, ValueError, "nothing to track"),
        ({"include": 3}, TypeError, "3 selects no module"),
        ({"rows": 1.5}, ValueError, r"rows=1\.5"),
        ({"rows": None}, TypeError, "rows=None"),
        ({"every": 0}, ValueError, "every=0"),
        ({"max_channels": 2}, ValueError, "wider than max_channels=2"),
        ({"snapshot_every": 0}, ValueError, "snapshot_every=0"),
    ],
)
def test_bad_arguments_are_named(
    arguments: dict[str, object], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        fastcov.track(frozen(), **arguments)


def test_unknown_layer_and_foreign_state() -> None:
    model = frozen()
    with fastcov.track(model) as tracker:
        with pytest.raises(KeyError, match="conv"):
            tracker.covariance("cnv")
        with pytest.raises(KeyError, match=r"tracker.names\(\) lists all"):
            tracker.covariance("77")
        with pytest.raises(ValueError, match="no training-mode forward"):
            tracker.covariance("conv")
        with pytest.raises(ValueError, match="format None"):
            tracker.load_state_dict({})
        with fastcov.track(nn.Linear(2, 2)) as other, pytest.raises(ValueError, match="conv"):
            other.load_state_dict(tracker.state_dict())
    with pytest.raises(TypeError, match="int"):
        fastcov.track(3)
