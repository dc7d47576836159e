"""Pages of docs/: their code runs as printed, recipes and notebooks too, and the site builds."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import matplotlib.image
import pytest
from matplotlib import pyplot

import fastcov

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
COPIED = DOCS / "repository"  # copies that the site's build makes
PAGES = [
    page
    for page in sorted(DOCS.rglob("*.md"))
    if COPIED not in page.parents and "```python\n" in page.read_text()
]

RECIPES = sorted((DOCS / "recipes").glob("*.py"))
NOTEBOOKS = sorted((DOCS / "recipes").glob("*.ipynb"))


@pytest.fixture(autouse=True)
def no_figure_is_left() -> Iterator[None]:
    """Pages and notebooks draw with pyplot, which other tests of this process find empty."""
    with mpl.rc_context({"backend": "Agg"}):
        yield
    pyplot.close("all")


def run(*command: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={
            **os.environ,
            "PYTHONPATH": str(Path(fastcov.__file__).parents[1]),
            "MPLBACKEND": "Agg",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_blocks_run_in_order(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL):
        exec(compile(block, str(page), "exec"), names)
    assert "error" not in capsys.readouterr().out.lower()


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_recipes_run_and_print_what_their_page_says(recipe: Path, tmp_path: Path) -> None:
    """The same words in the same order; numbers are those of another machine."""
    page = recipe.with_suffix(".md").read_text()
    launch = re.findall(rf"^torchrun (.*) {recipe.name}$", page, re.MULTILINE)
    options = ["-m", "torch.distributed.run", "--standalone", *launch[0].split()] if launch else []
    printed = run(*options, str(recipe), folder=tmp_path)
    assert f"{{literalinclude}} {recipe.name}" in page
    for shown in re.findall(r"```text\n(.*?)```", page, re.DOTALL):
        assert re.findall(r"[A-Za-z]{3,}", shown) == re.findall(r"[A-Za-z]{3,}", printed)
    for command in re.findall(r"^\$ (.*)", printed, re.MULTILINE):
        assert f"\n{command}\n" in page


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook: Path, tmp_path: Path) -> None:
    cells = json.loads(notebook.read_text())["cells"]
    code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
    assert len(code) > 3
    names: dict[str, object] = {}
    for cell in code:
        exec(compile(cell, str(notebook), "exec"), names)


@pytest.mark.slow
def test_pictures_are_made_by_their_command(tmp_path: Path) -> None:
    """Those that the page shows, as wide as a page; of fewer steps than those in docs/."""
    printed = run(str(DOCS / "pictures" / "make.py"), str(tmp_path), "8", folder=tmp_path)
    shown = re.findall(r"]\((pictures/\w+\.png)\)", (DOCS / "pictures.md").read_text())
    assert len(shown) == len(printed.splitlines()) == 3
    for name in shown:
        committed, made = (
            mpl.image.imread(path) for path in (DOCS / name, tmp_path / Path(name).name)
        )
        assert abs(made.shape[1] - committed.shape[1]) <= 2  # pixels: labels differ
        assert made.std() > 0.02
        assert (DOCS / name).stat().st_size < 150_000


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built without a warning."""
    folder = tmp_path_factory.mktemp("site")
    options = ("-m", "sphinx", "-W", "-q", "-b", "html", "-d", str(folder / "trees"))
    run(*options, str(DOCS), str(folder / "html"), folder=ROOT)
    return folder / "html"


@pytest.mark.slow
def test_the_site_builds_without_a_warning(site: Path) -> None:
    """Links inside lead somewhere: conf.py refuses those to missing files, Sphinx the others."""
    reference = (site / "reference" / "api.html").read_text()
    for name in fastcov.__all__:
        assert f'id="fastcov.{name}"' in reference or f'id="module-fastcov.{name}"' in reference
    assert (site / "recipes" / "pca.html").is_file()


MEASURE = """
<body></body><script>
async function measure(page) {
  const frame = document.createElement("iframe");
  Object.assign(frame.style, {width: "420px", height: "900px", border: 0});
  frame.src = page;
  document.body.append(frame);
  await new Promise(done => frame.onload = done);
  const parts = frame.contentDocument.querySelectorAll("html, .content");
  const width = 420 + Math.max(...[...parts].map(part => part.scrollWidth - part.clientWidth));
  frame.remove();
  return page + " " + width;
}
(async () => {
  const lines = [];
  for (const page of PAGES) lines.push(await measure(page));
  document.body.innerText = "measured\\n" + lines.join("\\n") + "\\nend";
})();
</script>
"""


@pytest.mark.slow
def test_no_page_is_wider_than_a_telephone(site: Path, browser: str, tmp_path: Path) -> None:
    """Tables, code, formulas and pictures scroll or shrink at 420 px."""
    (site / "wide.html").write_text("<div style='width: 500px; height: 9px'></div>")
    pages = [str(page.relative_to(site)) for page in site.rglob("*.html")]
    (site / "measure.html").write_text(MEASURE.replace("PAGES", json.dumps(pages)))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}"]
    flags += ["--allow-file-access-from-files", "--virtual-time-budget=600000", "--dump-dom"]
    dump = subprocess.run(
        [browser, *flags, (site / "measure.html").as_uri()],
        capture_output=True,
        text=True,
        check=True,
        timeout=300,
    ).stdout
    widths = dict(re.findall(r"([\w/-]+\.html) (\d+)", dump))
    assert set(widths) == set(pages)
    assert {page for page, width in widths.items() if int(width) > 420} == {"wide.html"}
