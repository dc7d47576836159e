"""Figures: what is drawn is what the numbers say, on the axes that were given."""

import io
import itertools
import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import matplotlib as mpl
import pytest
import torch
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread

import fastcov
from fastcov.show import figures
from fastcov.show.plot import (
    DARK,
    FEW,
    plot_comparison,
    plot_demand,
    plot_dims,
    plot_ridges,
    plot_spectrum,
)
from fastcov.spectra.compare import Comparison, compare_histories
from fastcov.spectra.history import History, Snapshot
from fastcov.spectra.spectrum import Spectrum

mpl.use("Agg")


def _spectrum(channels: int, power: float = 1.5, count: int = 100_000, name: str = "") -> Spectrum:
    eigenvalues = 7.0 * torch.arange(1, channels + 1, dtype=torch.float64) ** -power
    return Spectrum(eigenvalues, count, float(eigenvalues.sum()), name)


def _history(layers: int, power: float = 1.0) -> History:
    history = History()
    for step in (0, 50, 400):
        spectra = {
            f"backbone.body.layer{i}.conv": _spectrum(32, power + step / 400)
            for i in range(layers)
            if step or i
        }
        history.append(Snapshot(step, 0.0, spectra))
    return history


@pytest.fixture
def ax() -> Axes:
    return Figure(figsize=(6, 4)).add_subplot()


@pytest.fixture
def comparison() -> Comparison:
    return compare_histories(_history(3), _history(3, 2.0))


def _rendered(figure: Figure) -> Any:
    return imread(io.BytesIO(figures.png(figure)))


def test_one_spectrum_with_band_and_threshold(ax: Axes) -> None:
    spectrum = _spectrum(64, name="layer1.conv1")
    assert plot_spectrum(spectrum, ax) is ax
    line, threshold = ax.get_lines()
    assert line.get_xdata().tolist() == list(range(1, 65))
    assert torch.equal(torch.as_tensor(line.get_ydata()), spectrum.eigenvalues)
    assert threshold.get_ydata() == pytest.approx([7e-3, 7e-3])
    assert (ax.get_xscale(), ax.get_yscale()) == ("log", "log")
    assert ax.get_title() == f"layer1.conv1: dim {spectrum.dim()} of 64"
    (band,) = ax.collections
    corners = band.get_paths()[0].get_extents()
    lower, upper = spectrum.interval
    assert corners.y1 == pytest.approx(upper[0].item())
    assert corners.y0 == pytest.approx(lower[-1].item())
    bottom, top = ax.get_ylim()
    assert bottom < lower[-1]
    assert top > upper[0]


@pytest.mark.parametrize(
    ("channels", "ticks"), [(8, "1 2 5"), (64, "1 10"), (2048, "1 10 100 1000")]
)
def test_ranks_are_whole_numbers(ax: Axes, channels: int, ticks: str) -> None:
    plot_spectrum(_spectrum(channels), ax)
    assert [label.get_text() for label in ax.get_xticklabels()] == ticks.split()
    assert len(ax.get_xticks()) == len(ticks.split())


def test_the_threshold_is_in_the_picture_of_a_flat_spectrum(ax: Axes) -> None:
    plot_spectrum(Spectrum(torch.ones(8), 1000, 8.0), ax)
    bottom, top = ax.get_ylim()
    assert bottom < 1e-3 < 1 < top


@pytest.mark.parametrize("power", [0.0, 0.2, 1.5, 4.0])
def test_the_legend_covers_no_curve(ax: Axes, power: float) -> None:
    for spectra in (
        _spectrum(64, power),
        {f"layer{i}": _spectrum(64, power + i) for i in range(4)},
    ):
        ax.clear()
        plot_spectrum(spectra, ax)
        ax.figure.draw_without_rendering()
        box = ax.get_legend().get_window_extent()
        for line in ax.get_lines()[:-1]:  # the last one marks the threshold
            assert not any(box.contains(x, y) for x, y in ax.transData.transform(line.get_xydata()))


def test_too_few_rows_are_said_instead_of_a_band(ax: Axes) -> None:
    plot_spectrum(_spectrum(64, count=50), ax)
    assert not ax.collections
    assert any("50 rows bound no eigenvalue from above" in t.get_text() for t in ax.texts)


def test_eigenvalues_that_a_log_axis_cannot_show_are_left_out(ax: Axes) -> None:
    plot_spectrum(Spectrum(torch.tensor([2.0, 1.0, 1e-14, 0.0]), 1000, 3.0), ax)
    assert ax.get_lines()[0].get_xdata().tolist() == [1, 2]


def test_a_zero_spectrum_is_said(ax: Axes) -> None:
    plot_spectrum(Spectrum(torch.zeros(4), 1000, 0.0, "dead"), ax)
    assert any("every eigenvalue is zero" in text.get_text() for text in ax.texts)
    _rendered(ax.figure)
    with pytest.raises(ValueError, match="none of the 1 spectra has a positive eigenvalue"):
        plot_spectrum({"dead": Spectrum(torch.zeros(4), 10, 0.0)})


@pytest.mark.parametrize(("count", "named"), [(3, 3), (10, 10), (53, 10)])
def test_many_spectra_share_one_scale_and_a_short_legend(ax: Axes, count: int, named: int) -> None:
    plot_spectrum({f"layer{i}": _spectrum(8 + i) for i in range(count)}, ax)
    assert len(ax.get_lines()) == count + 1
    assert all(line.get_ydata()[0] == 1 for line in ax.get_lines()[:count])
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert len(labels) == named
    assert (labels[0], labels[-1]) == ("layer0", f"layer{count - 1}")


def test_dims_heat_map(ax: Axes) -> None:
    history = _history(3)
    assert plot_dims(history, ax, threshold=0.05) is ax
    layers, steps, dims = history.dims(0.05)
    (image,) = ax.get_images()
    shown = torch.as_tensor(image.get_array().filled(math.nan))
    torch.testing.assert_close(shown, dims / 32, equal_nan=True)
    assert [label.get_text() for label in ax.get_yticklabels()] == layers
    assert [label.get_text() for label in ax.get_xticklabels()] == [str(s) for s in steps]
    late = layers.index("backbone.body.layer0.conv")
    assert shown[late, 0].isnan()
    assert f"{dims[late, 2]:.0f} of 32" in [text.get_text() for text in ax.texts]
    with pytest.raises(ValueError, match="no spectrum to draw"):
        plot_dims(History(), ax)


def test_many_steps_keep_few_ticks(ax: Axes) -> None:
    history = History()
    for step in range(0, 50_000, 500):
        history.append(Snapshot(step, 0.0, {"x": _spectrum(4)}))
    plot_dims(history, ax)
    labels = [label.get_text() for label in ax.get_xticklabels()]
    assert len(labels) == 7
    assert (labels[0], labels[-1]) == ("4,500", "49,500")
    places = [int(label.replace(",", "")) for label in labels]
    assert len({b - a for a, b in itertools.pairwise(places)}) == 1  # evenly spaced


def test_every_layer_of_a_heat_map_has_its_name() -> None:
    ax = plot_dims(_history(53), figures.free_axes(53))
    ax.figure.draw_without_rendering()
    labels = ax.get_yticklabels()
    assert len(labels) == 53
    boxes = [label.get_window_extent() for label in labels]
    assert all(above.y0 > below.y1 - 1 for above, below in itertools.pairwise(boxes))


def test_small_shares_are_told_apart(ax: Axes) -> None:
    """In transformers most layers use a few per cent of their width."""
    history = History()
    few, more = (
        Spectrum(torch.tensor([1.0] * n + [0.0] * (256 - n)), 9999, float(n)) for n in (3, 16)
    )
    history.append(Snapshot(0, 0.0, {"few": few, "more": more}))
    plot_dims(history, ax)
    (image,) = ax.get_images()
    colors = image.cmap(image.norm(image.get_array()))[:, 0, :3]
    assert abs(colors[0] - colors[1]).sum() > 0.2


@pytest.mark.parametrize("layout", [None, "constrained"])
def test_the_colour_bar_stands_clear_of_the_steps(layout: str | None) -> None:
    given = Figure(figsize=(6, 4), layout=layout).add_subplot()
    plot_dims(_history(3), given)
    figure = given.figure
    figure.draw_without_rendering()
    (bar,) = (each for each in figure.axes if each is not given)
    assert bar.get_window_extent().y1 < given.xaxis.label.get_window_extent().y0
    assert bar.get_tightbbox().y0 >= 0


def _ridge_history() -> History:
    """Half of 32 eigenvalues sink from 0.1 to 1e-5 of the largest; two snapshots lack the layer."""
    history = History()
    history.append(Snapshot(0, 0.0, {"other": _spectrum(4)}))
    for step, small in ((10, 1e-1), (20, 1e-2), (40, 1e-4), (1500, 1e-5)):
        eigenvalues = torch.tensor([2.0] * 16 + [2 * small] * 16, dtype=torch.float64)
        spectra = {"conv": Spectrum(eigenvalues, 9999, float(eigenvalues.sum())), "dead": _DEAD}
        history.append(Snapshot(step, 0.0, spectra))
    history.append(Snapshot(1600, 0.0, {"other": _spectrum(4)}))
    return history


_DEAD = Spectrum(torch.zeros(4), 10, 0.0)


def test_ridges_are_densities_of_the_eigenvalues(ax: Axes) -> None:
    assert plot_ridges(_ridge_history(), "conv", ax) is ax
    assert [label.get_text() for label in ax.get_yticklabels()] == ["10", "20", "40", "1,500"]
    assert [text.get_text() for text in ax.texts] == ["32 of 32"] * 2 + ["16 of 32"] * 2
    *ridges, threshold = ax.get_lines()
    assert set(threshold.get_xdata()) == {1e-3}
    assert len(ridges) == 4
    areas = []
    for place, (ridge, small) in enumerate(zip(ridges, (1e-1, 1e-2, 1e-4, 1e-5), strict=True)):
        decades = torch.as_tensor(ridge.get_xdata()).log10()
        heights = torch.as_tensor(ridge.get_ydata()) + place
        assert heights.min() >= 0
        for peak in (0.0, math.log10(small)):  # half of the eigenvalues at each
            near = (decades - peak).abs() < 0.45
            assert float(decades[near][heights[near].argmax()]) == pytest.approx(peak, abs=0.02)
            areas.append(float(torch.trapezoid(heights[near], decades[near])))
    assert areas == pytest.approx([areas[0]] * 8, rel=0.02)
    colours = [to_hex(each.get_facecolor()[0]) for each in ax.collections]
    assert len(set(colours[::2])) == 1  # left of the threshold all are grey
    assert len(set(colours[1::2])) == 4
    assert _rendered(ax.figure).std() > 0.02


def test_eigenvalues_far_below_the_threshold_stand_at_the_left_end(ax: Axes) -> None:
    history = History()
    eigenvalues = torch.tensor([1.0] + [0.0] * 15)
    history.append(Snapshot(0, 0.0, {"conv": Spectrum(eigenvalues, 999, 1.0)}))
    plot_ridges(history, ax=ax)  # the only layer needs no name
    ridge = ax.get_lines()[0]
    assert ridge.get_xdata()[ridge.get_ydata().argmax()] == pytest.approx(1e-6)
    assert ax.get_title().startswith("conv:")


def test_of_many_snapshots_the_last_is_among_the_ridges(ax: Axes) -> None:
    history = History()
    for step in range(100):
        history.append(Snapshot(step, 0.0, {"conv": _spectrum(8)}))
    plot_ridges(history, "conv", ax)
    labels = [label.get_text() for label in ax.get_yticklabels()]
    assert len(labels) <= 24
    assert labels[-1] == "99"


def test_ridges_of_what_is_not_there(ax: Axes) -> None:
    history = _ridge_history()
    with pytest.raises(ValueError, match=r"no layer 'conw' among .*closest names: conv"):
        plot_ridges(history, "conw", ax)
    with pytest.raises(ValueError, match="layer=None, and the history has 3 layers"):
        plot_ridges(history, ax=ax)
    with pytest.raises(ValueError, match="'dead' has no positive eigenvalue in any snapshot"):
        plot_ridges(history, "dead", ax)
    with pytest.raises(ValueError, match="no spectrum to draw; take a snapshot"):
        plot_ridges(History(), "conv", ax)
    with pytest.raises(ValueError, match=r"threshold must lie in \(0, 1\), got 2"):
        plot_ridges(history, "conv", ax, threshold=2)


def test_ridges_of_the_layers_that_changed_most() -> None:
    history = _ridge_history()  # "other" and "dead" never change
    assert figures.most_changed(history) == ["other", "conv"]
    assert figures.most_changed(history, 1) == ["conv"]
    assert figures.most_changed(History()) == []
    before = pyplot.get_fignums()
    figure = figures.ridges_grid(history, ["conv", "other", "conv"])
    assert [ax.get_title() for ax in figure.axes] == ["conv", "other", "conv"]
    assert pyplot.get_fignums() == before
    assert _rendered(figure).std() > 0.02


def test_a_tracker_draws_every_kind() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Linear(6, 4))
    with fastcov.track(model, rows="all") as tracker:
        for _ in range(3):
            model(torch.randn(64, 8))
            tracker.snapshot()
        titles = {
            kind: tracker.plot(layer, Figure().add_subplot(), kind=kind).get_title()
            for kind, layer in {
                "spectrum": "0",
                "ridges": "0",
                "dims": None,
                "demand": None,
            }.items()
        }
        assert titles["spectrum"].startswith("0: dim")
        assert titles["ridges"].startswith("0: eigenvalues over training")
        assert titles["dims"].startswith("directions used")
        assert titles["demand"].startswith("demand")
        ax = tracker.plot("1", Figure().add_subplot(), kind="demand")
        assert [label.get_text() for label in ax.get_yticklabels()] == ["1"]
        with pytest.raises(ValueError, match="kind=\"dims\" draws every layer, got layer='0'"):
            tracker.plot("0", kind="dims")
        with pytest.raises(ValueError, match="kind='ridge': choose 'spectrum', 'ridges'"):
            tracker.plot("0", kind="ridge")
        with pytest.raises(KeyError):
            tracker.plot("nope")


def test_demand_against_width(ax: Axes) -> None:
    spectra = {"conv1": _spectrum(64), "fc": _spectrum(10)}
    assert plot_demand(spectra, ax) is ax
    width, demand = ax.containers
    assert [bar.get_width() for bar in width] == [1, 1]
    assert [bar.get_width() for bar in demand] == pytest.approx(
        [spectra["conv1"].dof() / 64, spectra["fc"].dof() / 10]
    )
    assert [t.get_text() for t in ax.texts] == [
        f"{spectra['conv1'].dof():.1f} of 64",
        f"{spectra['fc'].dof():.1f} of 10",
    ]
    with pytest.raises(ValueError, match="no spectrum to draw"):
        plot_demand({}, ax)


def test_too_few_rows_are_grey_and_said(ax: Axes) -> None:
    """Seven rows show seven directions at most, whatever the layer uses."""
    plot_demand({"sure": _spectrum(8, count=128), "unsure": _spectrum(8, count=127)}, ax)
    _, demand = ax.containers
    assert [to_hex(bar.get_facecolor()) for bar in demand] == [DARK, FEW]
    assert "grey: fewer than 16 rows a channel" in ax.get_title()
    grid = figures.spectra_grid({"sure": _spectrum(8, count=128), "un": _spectrum(8, count=127)})
    assert [each.get_lines()[0].get_color() for each in grid.axes] == [DARK, FEW]
    ax.clear()
    assert "grey" not in plot_demand({"sure": _spectrum(8, count=128)}, ax).get_title()


@pytest.mark.parametrize("lines", [1, 53, 160])
@pytest.mark.parametrize("own_figure", [True, False])
def test_names_of_neighbouring_lines_never_overlap(lines: int, own_figure: bool) -> None:
    spectra = {f"backbone.body.layer{i // 9}.{i % 9}.conv{i}": _spectrum(8) for i in range(lines)}
    given = figures.free_axes(lines) if own_figure else Figure(figsize=(5, 3)).add_subplot()
    ax = plot_demand(spectra, given)
    ax.figure.draw_without_rendering()
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert all(above.y0 > below.y1 - 1 for above, below in itertools.pairwise(boxes))
    assert min(label.get_fontsize() for label in ax.get_yticklabels()) >= 4.5
    if own_figure:
        assert len(boxes) == lines
        assert boxes[0].x0 >= 0


def test_comparison_bars_and_layers(comparison: Comparison) -> None:
    ax = plot_comparison(comparison, figures.free_axes(3))
    assert [bar.get_width() for bar in ax.containers[0]] == [
        layer.distance for layer in comparison.layers
    ]
    layer = comparison.layers[0]
    expected = {
        "dims": ([layer.steps_a, layer.steps_b], [layer.dims_a, layer.dims_b]),
        "distance": ([layer.common_steps], [layer.distances]),
        "spectra": (
            [list(range(1, 33))] * 2,
            [(end.eigenvalues / 7).tolist() for end in (layer.end_a, layer.end_b)],
        ),
    }
    for what, (xs, ys) in expected.items():
        ax = Figure().add_subplot()
        assert plot_comparison(comparison, ax, layer=layer.name, view=what) is ax
        for line, x, y in zip(ax.get_lines(), xs, ys, strict=False):
            assert list(line.get_xdata()) == x
            assert list(line.get_ydata()) == pytest.approx(y)
    with pytest.raises(ValueError, match="no layer 'nope' in both"):
        plot_comparison(comparison, layer="nope")
    with pytest.raises(ValueError, match="view='angles'"):
        plot_comparison(comparison, view="angles")
    with pytest.raises(ValueError, match="needs a layer"):
        plot_comparison(comparison, view="dims")


@pytest.mark.parametrize("count", [1, 7])
def test_small_multiples(count: int) -> None:
    spectra = {f"layer{i}.$math$": _spectrum(16 + i) for i in range(count - 1)}
    spectra["dead"] = Spectrum(torch.zeros(4), 10, 0.0)
    figure = figures.spectra_grid(spectra)
    assert len(figure.axes) == count
    assert figure.axes[-1].get_title().endswith("0 of 4")
    assert _rendered(figure).std() > 0.02


@pytest.mark.parametrize("what", ["dims", "spectra", "distance"])
def test_comparison_grid_shares_its_scale(comparison: Comparison, what: str) -> None:
    figure = figures.comparison_grid(comparison, what)
    assert len(figure.axes) == 3
    assert len({ax.get_xlim() for ax in figure.axes}) == 1
    assert _rendered(figure).std() > 0.02


def test_a_single_snapshot_can_be_compared() -> None:
    single = History()
    single.append(Snapshot(5, 0.0, {"x": _spectrum(8)}))
    comparison = compare_histories(single, single)
    for what in ("dims", "spectra", "distance"):
        _rendered(figures.comparison_grid(comparison, what))


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plot_spectrum(_spectrum(8)),
        lambda: plot_dims(_history(2)),
        lambda: plot_ridges(_history(1)),
        lambda: plot_demand({"a": _spectrum(8)}),
        lambda: plot_comparison(compare_histories(_history(2), _history(2))),
    ],
)
def test_without_axes_pyplot_shows_the_figure(draw: Callable[[], Axes]) -> None:
    ax = draw()
    assert ax.figure is pyplot.gcf()
    assert ax.get_xlabel()
    pyplot.close("all")


def test_pages_leave_nothing_with_pyplot() -> None:
    before = pyplot.get_fignums()
    plot_demand({"a": _spectrum(8)}, figures.free_axes(1))
    figures.spectra_grid({"a": _spectrum(8)})
    assert pyplot.get_fignums() == before


@pytest.mark.slow
@pytest.mark.parametrize(
    ("package", "module", "noun"), [("matplotlib", "plot", "figures"), ("jinja2", "page", "pages")]
)
def test_without_a_package_the_error_names_it(package: str, module: str, noun: str) -> None:
    # torch has its own use for jinja2, so it is hidden once torch and fastcov are there.
    code = f"import sys, fastcov; sys.modules['{package}'] = None; import fastcov.show.{module}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith(f"ImportError: {noun} need {package}")
    assert last.endswith(f"pip install {package}")
