"""Summary, tables and HTML pages, the pages also in a real browser."""

import base64
import re
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.image import imread
from torch import nn

import fastcov
from fastcov.show.page import last_statuses, write_comparison, write_report
from fastcov.show.plot import DARK
from fastcov.show.status import LayerStatus, Summary
from fastcov.show.tables import comparison_legend, comparison_rows, text_table
from fastcov.spectra.compare import compare_histories
from fastcov.spectra.history import History, Snapshot
from fastcov.spectra.spectrum import Spectrum

HOSTILE = '<script>document.title="owned"</script><img src=x onerror="document.title=1">&amp;"\'$x$'


REPORT = {"Demand against width", "Dimension over training", "Spectra over training", "Spectra"}
COMPARISON = {
    "Distance at the end",
    "Dimension over training",
    "Spectra at the end",
    "Distance over training",
}


def _spectrum(channels: int, power: float = 1.0, count: int = 10_000) -> Spectrum:
    eigenvalues = torch.arange(1, channels + 1, dtype=torch.float64) ** -power
    return Spectrum(eigenvalues, count, float(eigenvalues.sum()))


def _statuses() -> list[LayerStatus]:
    return [
        LayerStatus("conv1", 64, 10_000, 0, 10_000.0, _spectrum(64)),
        LayerStatus("few", 8, 100, 3, 100.0, _spectrum(8, count=100)),
        LayerStatus("head", 10, 0, 0, 0.0, None, "no row: never called"),
        LayerStatus("quiet", 10, 0, 0, 0.0, None),
        LayerStatus(HOSTILE, 4, 640, 0, 640.0, _spectrum(4), HOSTILE),
    ]


def _history(names: list[str], power: float = 1.0, steps: int = 3) -> History:
    history = History()
    for step in range(steps):
        spectra = {name: _spectrum(16, power + 0.2 * step) for name in names}
        history.append(Snapshot(100 * step, float(step), spectra))
    return history


def _write_history(path: Path, history: History) -> Path:
    return write_report(path, last_statuses(history), HOSTILE, history=history)


def test_summary_is_a_flat_dict_of_finite_floats() -> None:
    summary = Summary(_statuses())
    assert isinstance(summary, dict)
    assert all(type(key) is str and type(value) is float for key, value in summary.items())
    spectrum = _spectrum(64)
    assert summary["conv1/dim"] == spectrum.dim()
    assert summary["conv1/rank_at_99"] == spectrum.rank_at(0.99)
    assert summary["conv1/dof"] == spectrum.dof()
    assert summary["conv1/participation_ratio"] == spectrum.participation_ratio()
    assert summary["conv1/effective_rank"] == spectrum.effective_rank()
    assert summary["conv1/stable_rank"] == spectrum.stable_rank()
    assert summary["few/rows"] == 100
    assert summary["few/skipped"] == 3
    assert {key for key in summary if key.startswith("head/")} == {
        "head/channels",
        "head/rows",
        "head/skipped",
    }


def test_the_table_says_why_something_is_missing() -> None:
    lines = str(Summary(_statuses()[:4])).splitlines()
    assert lines[0].split("  ")[0] == "layer"
    assert len(lines) == 6
    assert lines[2].split() == ["conv1", "64", "10000", "64", "62", "62.0", "13.8"]
    assert lines[3].endswith("only 100 of 128 rows: eigenvalues are uncertain")
    assert lines[4].endswith("no row: never called")
    assert lines[5].endswith("no row")
    columns = [line.index(value) for line, value in ((lines[0], "note"), (lines[4], "no row"))]
    assert columns[0] == columns[1]


def test_control_characters_do_not_reach_a_terminal() -> None:
    table = text_table(("layer", "x"), [("a\x1b[31m\nb", "1")])
    assert "\x1b" not in table
    assert len(table.splitlines()) == 3


class _Page(HTMLParser):
    """Every tag with its attributes, every text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, text: str) -> None:
        self.texts.append(text)

    def pictures(self) -> dict[str, bytes]:
        found = {}
        for tag, attributes in self.tags:
            if tag == "img":
                kind, _, content = (attributes["src"] or "").partition(",")
                assert kind == "data:image/png;base64"
                found[attributes["alt"] or ""] = base64.b64decode(content, validate=True)
        return found


def _check_page(path: Path, pictures: set[str]) -> _Page:
    page = _Page(path)
    assert page.open == []
    assert {tag for tag, _ in page.tags} <= {
        *("html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "section", "img"),
        *("div", "table", "thead", "tbody", "tr", "th", "td", "dl", "dt", "dd", "footer"),
    }
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert not re.search(
        r"https?:|//|url\(", "".join(str(a) for _, a in page.tags if "src" not in a)
    )
    assert set(page.pictures()) == pictures
    assert all(content.startswith(b"\x89PNG") for content in page.pictures().values())
    return page


def _check_in_a_browser(browser: str, path: Path, folder: Path, title: str, pictures: int) -> None:
    """Document that a browser made of the page, and its visible text."""
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}"]
    dump = subprocess.run(
        [browser, *flags, "--dump-dom", path.as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    ).stdout
    seen = _Page(_written(folder / "dump.html", dump))
    assert "".join(seen.texts).count(title) >= 2
    assert len(seen.pictures()) == pictures
    assert not any(tag == "script" for tag, _ in seen.tags)
    for width in (1100, 420):  # a desk, a telephone
        shot = folder / f"{width}.png"
        window = f"--window-size={width},2400"
        subprocess.run(
            [browser, *flags, "--hide-scrollbars", f"--screenshot={shot}", window, path.as_uri()],
            capture_output=True,
            check=True,
            timeout=120,
        )
        colors = torch.from_numpy(imread(shot)[..., :3].copy())
        is_curve = (colors - torch.tensor(to_rgb(DARK))).abs().amax(-1) < 0.02
        # Only decoded pictures bring this colour; they leave the margins free.
        assert int(is_curve.sum()) > 300
        columns = is_curve.any(0).nonzero().flatten()
        assert 10 < int(columns.min()) < int(columns.max()) < width - 10


def _written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_report_of_a_history(tmp_path: Path) -> None:
    history = _history(["conv1", HOSTILE])
    path = _write_history(tmp_path / "new" / "page.html", history)
    assert path == tmp_path / "new" / "page.html"
    page = _check_page(path, REPORT)
    assert page.texts.count(HOSTILE) == 3  # title, heading, the table's line
    assert any("3 snapshots, steps 0 to 200" in text for text in page.texts)
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


@pytest.mark.slow
def test_report_page_in_a_browser(browser: str, tmp_path: Path) -> None:
    path = _write_history(tmp_path / "page.html", _history(["conv1", HOSTILE]))
    _check_in_a_browser(browser, path, tmp_path, HOSTILE, pictures=4)


def test_a_report_of_what_a_tracker_knows(tmp_path: Path) -> None:
    path = write_report(tmp_path / "page.html", _statuses())
    page = _check_page(path, REPORT - {"Dimension over training", "Spectra over training"})
    for text in ("no row: never called", "only 100 of 128 rows: eigenvalues are uncertain"):
        assert text in page.texts
    path = write_report(tmp_path / "page.html", _statuses(), history=_history(["conv1"]))
    _check_page(path, REPORT)


def test_a_report_without_any_row_still_says_why(tmp_path: Path) -> None:
    page = _check_page(write_report(tmp_path / "page.html", _statuses()[2:4]), set())
    assert "no row: never called" in page.texts


def test_a_report_needs_layers_and_leaves_an_old_page_alone(tmp_path: Path) -> None:
    path = _written(tmp_path / "page.html", "old")
    with pytest.raises(ValueError, match="no layer to report"):
        _write_history(path, History())
    with pytest.raises(ValueError, match="no layer to report"):
        write_report(path, [])
    assert path.read_text() == "old"


def test_a_page_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"cannot write the page .*file/page.html: .*another path"):
        write_report(tmp_path / "file" / "page.html", _statuses()[2:3])


def test_the_tracker_writes_its_report(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, 4))
    tracker = fastcov.track(model, rows="all", snapshot_every=1)
    for _ in range(2):
        model(torch.randn(8, 3, 8, 8))
    page = _check_page(tracker.report(tmp_path / "page.html"), REPORT)
    assert str(8 * 36 * 2) in page.texts
    assert str(tracker.summary()).splitlines()[2].split()[:3] == ["0", "8", str(8 * 36 * 2)]


def test_comparison_table(tmp_path: Path) -> None:
    comparison = compare_histories(
        _history(["x", "old"]), _history(["x", "new"], power=3.0), threshold=0.01
    )
    headers, lines = comparison_rows(comparison)
    (layer,) = comparison.layers
    assert dict(zip(headers, lines[0], strict=True)) == {
        "layer": "x",
        "width a": "16",
        "width b": "16",
        "dim a": str(_spectrum(16, 1.4).dim(0.01)),
        "dim b": str(_spectrum(16, 3.4).dim(0.01)),
        "dof a": f"{_spectrum(16, 1.4).dof():.1f}",
        "dof b": f"{_spectrum(16, 3.4).dof():.1f}",
        "distance": f"{layer.distance:.3f}",
    }
    assert [line[0::7] for line in lines[1:]] == [("old", "only in a"), ("new", "only in b")]
    assert "above 0.01 of the largest" in comparison_legend(comparison)
    page = _check_page(
        write_comparison(tmp_path / "page.html", comparison),
        COMPARISON,
    )
    assert "only in b" in page.texts


def _hostile_comparison(folder: Path) -> Path:
    comparison = compare_histories(
        _history([HOSTILE]), _history([HOSTILE], 2.0), label_a=HOSTILE, label_b="b"
    )
    return write_comparison(folder / "page.html", comparison, HOSTILE)


def test_comparison_page_escapes_every_name(tmp_path: Path) -> None:
    page = _check_page(_hostile_comparison(tmp_path), COMPARISON)
    assert HOSTILE in page.texts


@pytest.mark.slow
def test_comparison_page_in_a_browser(browser: str, tmp_path: Path) -> None:
    path = _hostile_comparison(tmp_path)
    _check_in_a_browser(browser, path, tmp_path, HOSTILE, pictures=4)
