"""One self-contained HTML page: no script, nothing loaded from outside, every text escaped."""

from __future__ import annotations

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastcov_detection.files import write_text

# One size of text for all: figures are drawn with the same at 130 dots an inch and shown dot by dot
# where there is room. On a narrow window they shrink to 600 pixels and scroll in their own frame.
_STYLE = """
:root{--ink:#1d2429;--soft:#5b6770;--line:#e3e8eb;--mark:#17618c}
body{font:15px/1.55 system-ui,sans-serif;color:var(--ink);max-width:1080px;margin:2rem auto}
body{padding:0 1rem;overflow-wrap:anywhere}
h1,h2{font-size:15px}h1{border-bottom:3px solid var(--mark);padding-bottom:.4rem}
h2{margin-top:2.2rem;border-bottom:1px solid var(--line);padding-bottom:.3rem;color:var(--mark)}
p.lead{font-weight:600}p.note,footer,figcaption{color:var(--soft)}
figure{margin:1rem 0}figure div{overflow-x:auto}
figure img{max-width:max(100%,600px);height:auto;display:block}
div.gallery{display:grid;grid-template-columns:repeat(auto-fill,340px);gap:10px;margin:1rem 0}
div.gallery img{display:block;max-width:100%}
div.wide{overflow-x:auto}table{border-collapse:collapse;white-space:nowrap}
th,td{padding:4px 12px;text-align:right;border-bottom:1px solid var(--line)}
th{color:var(--soft);font-weight:600;vertical-align:bottom;white-space:pre-line}
th:first-child,td:first-child{text-align:left;font-weight:600}
th.text,td.text{text-align:left}td.text{font-weight:400}
td.text:last-child{white-space:normal;min-width:15em}th,td{overflow-wrap:normal}
details{margin:1rem 0}summary{cursor:pointer;color:var(--mark)}
pre{background:#f5f7f8;padding:.8rem;overflow-x:auto;font-size:15px}
"""


def table(headings: Sequence[str], rows: Iterable[Sequence[str]], text: Sequence[str] = ()) -> str:
    """A table; columns whose heading is in ``text`` hold words, the others numbers.

    Headings stand over their cells: to the left over words, to the right over numbers.
    """
    marks = [' class="text"' if heading in text else "" for heading in headings]
    head = "".join(
        f"<th{mark}>{html.escape(heading)}</th>"
        for mark, heading in zip(marks, headings, strict=True)
    )
    body = "".join(
        "<tr>"
        + "".join(
            f"<td{mark}>{html.escape(cell)}</td>" for mark, cell in zip(marks, row, strict=True)
        )
        + "</tr>"
        for row in rows
    )
    inner = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{inner}</table></div>'


def paragraph(text: str, kind: str = "") -> str:
    """Plain text as a paragraph."""
    mark = f' class="{html.escape(kind)}"' if kind else ""
    return f"<p{mark}>{html.escape(text)}</p>"


def picture(png: bytes, caption: str) -> str:
    """An embedded picture with its caption."""
    encoded = base64.b64encode(png).decode("ascii")
    text = html.escape(caption)
    return (
        f'<figure><div><img alt="{text}" src="data:image/png;base64,{encoded}"></div>'
        f"<figcaption>{text}</figcaption></figure>"
    )


def gallery(pngs: Sequence[bytes], name: str) -> str:
    """Embedded pictures of 340 pixels, as many beside each other as the window has room for."""
    shown = [
        f'<img alt="{html.escape(name)}, picture {number}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode("ascii")}">'
        for number, png in enumerate(pngs, 1)
    ]
    return f'<div class="gallery">{"".join(shown)}</div>'


def folded(title: str, content: str) -> str:
    """Content that opens with a click."""
    return f"<details><summary>{html.escape(title)}</summary>{content}</details>"


def listing(text: str) -> str:
    """Text as it is, in a fixed font."""
    return f"<pre>{html.escape(text)}</pre>"


def section(heading: str, *parts: str) -> str:
    """A heading and what stands under it."""
    return f"<section><h2>{html.escape(heading)}</h2>{''.join(parts)}</section>"


def write_page(path: Path, title: str, parts: Sequence[str], footer: str) -> Path:
    """Writes the page; it appears whole or not at all."""
    # The policy lets no script run and nothing load, whatever a name may hold.
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    content = "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *parts,
            f"<footer>{html.escape(footer)}</footer></body></html>",
        ]
    )
    write_text(path, content.encode("utf-8", "replace").decode("utf-8"))
    return path
