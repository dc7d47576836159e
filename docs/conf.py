"""Settings of the site that `make docs` builds: Sphinx, Markdown by MyST, the theme furo.

Furo is maintained, works without JavaScript from elsewhere and is legible on a telephone; Sphinx
is what torch itself is documented with, so that links into its reference work.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from pygments.lexers.special import TextLexer
from sphinx.application import Sphinx
from sphinx.writers.html5 import HTML5Translator

import fastcov

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
# Pages of the repository that are pages of the site too, by their name there.
REPOSITORY_PAGES = {
    "README.md": "readme.md",
    "CONTRIBUTING.md": "architecture.md",
    "CHANGELOG.md": "changelog.md",
    "detection/README.md": "detection.md",
    "benchmarks/README.md": "benchmark-method.md",
}
COPIES = DOCS / "repository"  # git ignores it

project = "fastcov"
author = "the fastcov authors"
copyright = "the fastcov authors"
version = release = fastcov.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.intersphinx",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
source_suffix = {".md": "markdown"}
myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
html_math_renderer = "mathml"
html_theme = "furo"
html_title = f"fastcov {version}"
html_static_path = ["_static"]
html_css_files = ["narrow.css"]

autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}

# Links into the references of torch and Python need their inventories from the network.
# FASTCOV_DOCS_ONLINE=1 fetches them; without it names of other projects are shown without links,
# so that the site builds anywhere, with the same warnings.
intersphinx_mapping = (
    {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }
    if os.environ.get("FASTCOV_DOCS_ONLINE") == "1"
    else {}
)


def with_site_links(text: str, source: Path, folder: Path) -> str:
    """A page with links that hold on the site.

    Args:
        text: Of the page.
        source: File that the page comes from, where its links start.
        folder: Of the page on the site.

    Returns:
        The page: links to pages of the site lead there, pictures are taken from where they lie, and
        of links to other files of the repository, which the site does not have, the text stays.

    Raises:
        FileNotFoundError: If a link leads to no file.
    """

    def moved(match: re.Match[str]) -> str:
        sign, words, target = match["sign"], match["words"], match["target"]
        if re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        found = (source.parent / path).resolve()
        if not found.exists():
            name = source.relative_to(ROOT)
            raise FileNotFoundError(f"{name} links to {target}, which does not exist")
        name = found.relative_to(ROOT).as_posix()
        if name in REPOSITORY_PAGES:
            found = COPIES / REPOSITORY_PAGES[name]
        on_site = DOCS in found.parents or sign
        link = f"{sign}[{words}]({os.path.relpath(found, folder)}{hash_}{anchor})"
        return link if on_site else f"{words} (`{name}`)"

    link = r"(?P<sign>!?)\[(?P<words>[^\]]*)\]\((?P<target>[^)\s]+)\)"
    # Odd parts lie between fences: code, in which such a pattern is no link.
    parts = re.split(r"(^```.*?^```$)", text, flags=re.DOTALL | re.MULTILINE)
    return "".join(
        part if number % 2 else re.sub(link, moved, part) for number, part in enumerate(parts)
    )


def rewrite_links(app: Sphinx, name: str, content: list[str]) -> None:
    """Links of a page of docs/ that hold on the site, in place of those of the repository."""
    source = DOCS / f"{name}.md"
    if COPIES not in source.parents:
        content[0] = with_site_links(content[0], source, source.parent)


def write_inline_formula(writer: HTML5Translator, node: nodes.math) -> None:
    """MathML of a formula in a sentence, which browsers show without a script."""
    writer.body.append(tex2mathml(node.astext().replace(r"\dots", r"\ldots"), as_block=False))
    raise nodes.SkipNode


def write_formula(writer: HTML5Translator, node: nodes.math_block) -> None:
    """MathML of a formula of its own."""
    formula = tex2mathml(node.astext().replace(r"\dots", r"\ldots"), as_block=True)
    writer.body.append(f'<div class="formula">{formula}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> None:
    """Entry point of Sphinx: copies the repository's pages, and shows Mermaid drawings as text."""
    COPIES.mkdir(exist_ok=True)
    for page, name in REPOSITORY_PAGES.items():
        text = (ROOT / page).read_text(encoding="utf-8")
        (COPIES / name).write_text(with_site_links(text, ROOT / page, COPIES), encoding="utf-8")
    app.add_lexer("mermaid", TextLexer)
    app.add_html_math_renderer("mathml", (write_inline_formula, None), (write_formula, None))
    app.connect("source-read", rewrite_links)
