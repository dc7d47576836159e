"""One self-contained HTML page, from the template ``page.html``: every text in it is escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2
from matplotlib.figure import Figure

from fastcov_detection.files import write_text

DPI = 130
"""Dots an inch of figures, which are shown dot by dot."""
WIDE, NARROW = 8.2, 2.83
"""Widths of figures in inches: for a page of 1080 pixels, and a window of 420 with a scrollbar."""
FONT = 15 * 72 / DPI
"""Points of every text in a figure: 15 pixels, as on the page."""


@dataclass(frozen=True)
class Block:
    """Part of a section; its fields are shown in this order, empty ones left out.

    Columns whose heading is among ``words`` hold text, the others numbers. ``fold`` is the line
    that opens the block with a click; pictures of the gallery stand beside each other.
    """

    text: str = ""
    style: str = ""
    """``lead`` or ``note``."""
    headings: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()
    words: Sequence[str] = ()
    picture: bytes = b""
    narrow: bytes = b""
    """Picture for windows below 700 pixels; without one, ``picture`` scrolls there."""
    caption: str = ""
    gallery: Sequence[bytes] = ()
    listing: str = ""
    fold: str = ""


@dataclass(frozen=True)
class Section:
    """Blocks under a heading; the first section of a page has none."""

    heading: str
    blocks: Sequence[Block]


def write_page(path: Path, title: str, sections: Sequence[Section], footer: str) -> Path:
    """HTML file of a page; it appears whole or not at all."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["base64"] = lambda png: base64.b64encode(png).decode("ascii")
    template = environment.get_template("page.html")
    shown = [section for section in sections if section.blocks]
    content = template.render(title=title, sections=shown, footer=footer)
    write_text(path, content.encode("utf-8", "replace").decode("utf-8"))
    return path


def figure_block(draw: Callable[..., Figure], caption: str) -> Block:
    """Block of a figure that is drawn at both widths, with text of one size.

    Args:
        draw: Function of ``width``, in inches, that draws the figure.
        caption: Sentence under the figure.
    """
    return Block(
        picture=to_png(draw(width=WIDE)), narrow=to_png(draw(width=NARROW)), caption=caption
    )


def to_png(figure: Figure) -> bytes:
    """Picture of a figure, as pages show it."""
    packed = io.BytesIO()
    figure.savefig(packed, format="png", dpi=DPI, facecolor="white")
    return packed.getvalue()
