"""The page, its figures and the summary in words, from results made by hand."""

import html
import io
import itertools
import re
import subprocess
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from PIL import Image
from rich.console import Console

from fastcov import Spectrum, WidthGroup
from fastcov_detection.errors import ConfigError
from fastcov_detection.report import pictures
from fastcov_detection.report.page import Block, Section, figure_block, to_png, write_page
from fastcov_detection.report.report import write_report
from fastcov_detection.report.tables import columns, print_summary, rows, sentences
from fastcov_detection.search.verdicts import compare_paired

EVIL = "<script>alert('x')</script>&\"layer\""


def _arm(backbone, aps, segm=None, latency=12.0):
    runs = [
        {"seed": seed, "ap": ap, "ap50": ap + 0.2, "segm_ap": segm, "train_s": 100.0 + seed}
        for seed, ap in enumerate(aps)
    ]
    widths = {"stem": 16, "layer1": backbone // 10_000}
    return {
        "params": backbone + 500_000,
        "backbone_params": backbone,
        "macs": 130_000_000,
        "widths": widths,
        "latency_ms": latency,
        "runs": runs,
    }


def _result(seeds=3, segm=None):
    aps = {"baseline": [0.50, 0.56, 0.53], "searched": [0.51, 0.57, 0.55]}
    arms = {
        "baseline": _arm(1_480_000, aps["baseline"][:seeds], segm),
        "searched": _arm(1_184_000, aps["searched"][:seeds], segm, None),
    }
    found = compare_paired(
        "searched",
        "baseline",
        "ap",
        dict(enumerate(aps["searched"][:seeds])),
        dict(enumerate(aps["baseline"][:seeds])),
        "no loss",
    )
    return {"arms": arms, "comparisons": [found.as_dict()]}


def test_rows_say_what_each_arm_costs_and_reaches():
    result = _result()
    table = {row[0]: dict(zip(columns(result), row, strict=True)) for row in rows(result)}
    assert table["baseline"]["backbone\nparams, M"] == "1.480"
    assert table["searched"]["backbone\nparams, M"] == "1.184 (-20 %)"
    assert table["searched"]["params,\nM"] == "1.684"
    assert table["searched"]["MACs,\nG"] == "0.130"
    # Mean of 0.50, 0.56, 0.53 is 0.53; standard error 0.03 / sqrt(3) = 0.01732.
    assert table["baseline"]["AP"] == "0.530±0.017"
    assert table["baseline"]["wall s\na run"] == "101"
    assert table["baseline"]["ms per\nimage"] == "12.0"
    assert table["searched"]["ms per\nimage"] == "-"
    assert table["baseline"]["seeds"] == "3"


def test_mask_ap_has_a_column_where_masks_were_evaluated():
    result = _result(segm=0.25)
    assert "mask AP" in columns(result)
    assert all(len(row) == len(columns(result)) for row in rows(result))
    assert "mask AP" not in columns(_result())


def test_sentences_claim_nothing_that_one_seed_cannot_show():
    said = " ".join(sentences(_result(seeds=1)))
    assert "20.0 % fewer backbone parameters" in said
    assert "cannot show which network is more accurate" in said
    assert "no loss" not in said
    assert "better" not in said


def test_a_peer_with_one_seed_does_not_silence_the_others():
    result = _result()
    result["arms"]["torch-pruning"] = _arm(1_300_000, [0.6]) | {"made_with": "torch-pruning 1.6.1"}
    said = " ".join(sentences(result))
    assert "searched against baseline, ap: +0.0133" in said
    assert "One seed shows" not in said


def test_an_arm_of_a_stopped_search_does_not_silence_the_others():
    result = _result()
    result["arms"]["power"] = _arm(1_300_000, [0.6])
    found = compare_paired("power", "baseline", "ap", {0: 0.6}, {0: 0.5, 1: 0.56}, "no loss")
    result["comparisons"].append(found.as_dict())
    said = sentences(result)
    assert any(one.startswith("searched against baseline, ap: +0.0133") for one in said)
    assert "power against baseline, ap: +0.1000 (n = 1): not shown: one seed says" in " ".join(said)
    assert not [one for one in said if one.startswith("One seed shows")]


def test_sentences_give_difference_error_and_verdict():
    # Differences 0.01, 0.01, 0.02: mean 0.0133, error 0.00577 / sqrt(3) = 0.0033; the lower bound
    # 0.0133 - 2.92 * 0.0033 = 0.0036 is above 0.
    said = " ".join(sentences(_result()))
    assert "searched against baseline, ap: +0.0133 ± 0.0033 (n = 3): better." in said


def test_summary_is_one_table_that_fits_a_terminal():
    out = io.StringIO()
    print_summary(_result(seeds=1), Console(file=out, width=80))
    text = out.getvalue()
    assert "…" not in text
    for word in ("baseline", "searched", "1.184 (-20 %)", "AP50", "backbone"):
        assert word in text


def test_page_escapes_everything_and_forbids_scripts(tmp_path):
    block = Block(
        text=EVIL,
        style='x"><script>',
        headings=[EVIL],
        rows=[[EVIL]],
        words=[EVIL],
        picture=b"png",
        caption=EVIL,
        gallery=[b"png"],
        listing=EVIL,
        fold=EVIL,
    )
    path = write_page(tmp_path / "r.html", EVIL, [Section(EVIL, [block])], EVIL)
    text = path.read_text(encoding="utf-8")
    assert "<script" not in text
    assert text.count("&lt;script&gt;") >= 12
    assert "default-src 'none'" in text


def test_page_survives_names_that_are_not_unicode(tmp_path):
    broken = "layer\udcff"
    write_page(tmp_path / "r.html", broken, [Section("", [Block(broken)])], "")
    assert "layer?" in (tmp_path / "r.html").read_text(encoding="utf-8")


def test_what_is_not_given_is_not_shown(tmp_path):
    sections = [Section("", [Block("words")]), Section("nothing", [])]
    text = write_page(tmp_path / "r.html", "t", sections, "f").read_text(encoding="utf-8")
    body = text[text.index("<body>") :]
    assert "nothing" not in body
    assert not [tag for tag in ("table", "figure", "pre", "details", "h2") if f"<{tag}" in body]


GROUPS = [
    WidthGroup("stem", ("a:in",), 16),
    WidthGroup("layer1.0.inner1", ("c:in",), 8),
    WidthGroup("layer1", ("b:in",), 48),
]


def _spectrum(channels):
    values = torch.logspace(0, -6, channels, dtype=torch.float64)
    return Spectrum(values, 1000, float(values.sum()))


def _figures():
    result = _result()
    for arm in result["arms"].values():
        arm["widths"]["layer1.0.inner1"] = 8
    spectra = {"a:in": _spectrum(16), "b:in": _spectrum(48), "c:in": _spectrum(8)}
    dead = Spectrum(torch.zeros(48, dtype=torch.float64), 10, 0.0)
    demands = {"stem": 12.0, "layer1.0.inner1": 8.0, "layer1": 20.5}
    names = [group.name for group in GROUPS]
    return {
        "accuracy": pictures.draw_accuracy(result),
        "losses": pictures.draw_losses(
            {"baseline": [(1, 2.0), (2, 1.5)], "quarter": [(1, 2.1)], "power": []}
        ),
        "widths": pictures.draw_widths(result, names),
        "demand": pictures.draw_demand(GROUPS, demands, None, "dof"),
        "demand of both": pictures.draw_demand(GROUPS, demands, demands, "share"),
        "spectra": pictures.draw_stage_spectra(GROUPS, spectra, spectra | {"b:in": dead}),
    }


def test_every_figure_shows_something():
    for name, figure in _figures().items():
        packed = io.BytesIO()
        figure.savefig(packed, format="png")
        pixels = np.asarray(Image.open(packed).convert("L"))
        assert pixels.std() > 5, name


def test_figures_name_what_they_show():
    figures = _figures()
    ax = figures["widths"].axes[0]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == [
        "stem",
        "layer1.0.inner1",
        "layer1",
    ]
    assert "148 → 118" in [text.get_text() for text in ax.texts]
    assert [ax.get_title() for ax in figures["spectra"].axes] == [
        "stem: 16",
        "layer1: 48",
    ]
    assert "20.5 of 48" in [text.get_text() for text in figures["demand"].axes[0].texts]


def test_arms_keep_their_colour_and_further_ones_differ():
    arms = ["baseline", "searched", "searched-share", "searched-relative"]
    colours = [pictures.colour_of(arm, arms) for arm in arms]
    assert len(set(colours)) == len(arms)
    assert pictures.colour_of("searched", ["searched"]) == colours[1]


def test_report_of_a_folder_without_a_search_says_so(tmp_path):
    with pytest.raises(ConfigError, match=r"no result\.json in"):
        write_report(tmp_path)


@pytest.mark.parametrize("width", [420, 1200])
def test_nothing_is_wider_than_the_window(browser, tmp_path, width):
    """A table and a figure wider than the window scroll in their own frames."""
    blocks = [
        Block("word " * 60, "lead"),
        Block(headings=[f"column {k}" for k in range(30)], rows=[["long value"] * 30] * 2),
        Block(picture=to_png(pictures.draw_accuracy(_result())), caption="layer4.2.conv1" * 20),
        Block(gallery=[to_png(pictures.draw_losses({"baseline": [(1, 2.0)]}))], caption="a"),
        Block(listing="x" * 500),
    ]
    page = write_page(tmp_path / "r.html", "title", [Section("heading", blocks)], "end")
    read = "document.title = document.documentElement.scrollWidth + ' ' + document.images.length"
    assert _seen(browser, tmp_path, page, width, read) == f"{width} 2"


def _seen(browser, folder, page, width, read):
    """Title that a script gives to a page in a window of a width."""
    inner = html.escape(page.read_text(encoding="utf-8"))
    frame = f'<iframe style="width:{width}px;height:6000px;border:0" srcdoc="{inner}"></iframe>'
    look = "const outer = document; { const document = outer.querySelector('iframe')"
    look += f".contentDocument; {read}; outer.title = document.title }}"
    wrapper = folder / "w.html"
    wrapper.write_text(f"<title></title>{frame}<script>onload = () => {{ {look} }}</script>")
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1400,900"]
    words = [browser, *flags, "--dump-dom", wrapper.as_uri()]
    shown = subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout
    return re.search("<title>(.*?)</title>", shown)[1]


@pytest.mark.parametrize("width", [420, 1200])
@pytest.mark.parametrize("draws_maps", [False, True])
def test_a_figure_keeps_the_size_of_its_text_and_does_not_scroll(
    browser, tmp_path, width, draws_maps
):
    maps = {f"layer1.{place}.conv1:in: 3 of 8": {"trained": _spectrum(8)} for place in range(5)}
    every, accuracy = (pictures.draw_spectra, maps), (pictures.draw_accuracy, _result())
    block = figure_block(partial(*(every if draws_maps else accuracy)), "AP")
    page = write_page(tmp_path / "r.html", "title", [Section("heading", [block])], "end")
    read = "const image = document.images[0], frame = image.closest('div');"
    read += "document.title = [image.naturalWidth == image.width, frame.scrollWidth"
    read += " <= frame.clientWidth, document.images.length].join(' ')"
    assert _seen(browser, tmp_path, page, width, read) == "true true 1"


def test_headings_stand_over_their_cells(tmp_path):
    """Words to the left with their heading, numbers to the right with theirs."""
    block = Block(headings=["arm", "n", "verdict"], rows=[["searched", "4", "better"]])
    block = replace(block, words=["verdict"])
    path = write_page(tmp_path / "r.html", "t", [Section("", [block])], "f")
    text = path.read_text(encoding="utf-8")
    assert '<th class="text">verdict</th>' in text
    assert '<td class="text">better</td>' in text
    assert "<th>n</th>" in text
    assert "<td>4</td>" in text
    assert "th.text,td.text{text-align:left}" in text


@pytest.mark.parametrize(
    ("places", "expected"),
    [
        ([0.2, 0.8], [0.2, 0.8]),
        ([0.5, 0.5], [0.45, 0.55]),
        ([0.52, 0.5], [0.56, 0.46]),
        ([0.0, 0.0, 0.0], [0.0, 0.1, 0.2]),
        ([1.0, 1.0, 0.3], [0.9, 1.0, 0.3]),
        ([0.85, 1.0, 1.0], [0.8, 0.9, 1.0]),
        ([0.5], [0.5]),
        ([], []),
    ],
)
def test_names_are_spread_as_little_as_keeps_them_apart(places, expected):
    found = pictures.spread(places, 0.1)
    # Of two names at one place, either may stand below.
    assert sorted(found) == pytest.approx(sorted(expected))
    for (one, here), (other, there) in itertools.combinations(zip(places, found, strict=True), 2):
        assert abs(here - there) >= 0.1 - 1e-12
        assert (one - other) * (here - there) >= 0


def test_many_names_share_the_height():
    found = pictures.spread([0.5] * 21, 0.1)
    assert sorted(found) == pytest.approx([k / 20 for k in range(21)])


def test_names_of_arms_that_lie_on_one_another_do_not_overlap():
    result = _result()
    result["arms"] |= {f"exponent-0.{k + 1}": _arm(1_184_000, [0.54, 0.55, 0.54]) for k in range(8)}
    figure = pictures.draw_accuracy(result)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    names = figure.axes[0].texts
    assert {text.get_text() for text in names} == set(result["arms"])
    boxes = [Text.get_window_extent(text, canvas.get_renderer()) for text in names]
    assert not [pair for pair in itertools.combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    width, height = canvas.get_width_height()
    assert all(box.x0 >= 0 and box.x1 <= width and box.y0 >= 0 for box in boxes)
    assert all(box.y1 <= height for box in boxes)
