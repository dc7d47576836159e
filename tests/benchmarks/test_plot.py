"""README's tables come from result files, and a difference is noticed."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from xml.etree import ElementTree

import pytest

from fastcov.bench.contest import Row
from fastcov.bench.results import Result

ROOT = Path(__file__).resolve().parents[2]
MACHINE = {
    "device": "A CPU",
    "kind": "cpu",
    "threads": 2,
    "cpu_capability": "AVX2",
    "driver": None,
    "versions": {"torch": "2.11.0", "delve": "0.1.50"},
}
RATES = {"copy_gb_s": 20.0, "matmul_tflop_s": {"float32": 0.1}}
PAGE = """# Title
<!-- table:cpu-a/training -->
<!-- /table -->
between
<!-- figure:cpu-a/training -->
<!-- /figure -->
end
"""


@pytest.fixture(scope="module")
def plot() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_plot", ROOT / "benchmarks" / "plot.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(contender: str, seconds: float) -> Row:
    return Row(
        work="step",
        contender=contender,
        samples=40,
        p20_s=seconds,
        p50_s=seconds,
        p80_s=seconds,
        low_s=seconds,
        high_s=seconds,
        versus="untracked",
        ratio=seconds,
        ratio_low=seconds - 0.005,
        ratio_high=seconds + 0.005,
    )


@pytest.fixture
def readme(tmp_path: Path) -> Path:
    times = {
        "untracked": 1.0,
        "fastcov, default": 1.012,
        "fastcov, every row": 1.1,
        "naive hooks": 1.234,
    }
    rows = [row(name, seconds) for name, seconds in times.items()]
    rows[2].notes["gram_floor_s"] = 0.0625
    result = Result("training-resnet50", "default", MACHINE, RATES, {}, {}, rows)
    result.save(tmp_path / "benchmarks" / "results" / "cpu-a")
    page = tmp_path / "README.md"
    page.write_text(PAGE)
    return page


def set_in_every_row(readme: Path, **values: str) -> None:
    path = readme.parent / "benchmarks/results/cpu-a/training-resnet50.json"
    content = json.loads(path.read_text())
    for one in content["rows"]:
        one.update(values)
    path.write_text(json.dumps(content))


def test_numbers_come_from_the_files(plot: ModuleType, readme: Path) -> None:
    assert plot.main(["--readme", str(readme)]) == 0
    text = readme.read_text()
    numbers = ("1.012x (1.007 to 1.017)", "1.062x", "1.234x")
    for part in (*numbers, "A CPU", "torch 2.11.0", "not run"):
        assert part in text
    assert text.startswith("# Title\n")
    assert "\nbetween\n" in text
    assert text.endswith("end\n")
    picture = readme.parent / "benchmarks/results/cpu-a/training.svg"
    words = "".join(ElementTree.fromstring(picture.read_text()).itertext())
    assert "+1.2 %" in words
    assert "+23.4 %" in words


def test_targets_stand_beside_what_was_measured(plot: ModuleType, readme: Path) -> None:
    set_in_every_row(readme, work="resnet50 training step")
    readme.write_text("<!-- table:cpu-a/targets -->\n<!-- /table -->\n")
    assert plot.main(["--readme", str(readme)]) == 0
    lines = readme.read_text().splitlines()
    default = next(line for line in lines if "fastcov, default" in line)
    assert "| 1.012x | 1.007x to 1.017x | at most 1.020x | met |" in default
    every_row = next(line for line in lines if "fastcov, every row" in line)
    assert "| at most 1.150x | met |" in every_row


@pytest.mark.parametrize("has_gpu_path", [False, True])
def test_hooks_of_files_with_and_without_the_path_of_a_gpu(
    plot: ModuleType, readme: Path, has_gpu_path: bool
) -> None:
    names = ("no hook", "torch, an empty hook", "fastcov, default")
    rows = [replace(row(name, 1.0), work=plot.CPU_PATH) for name in names]
    if has_gpu_path:
        rows += [replace(row(name, 1.0), work=plot.GPU_PATH) for name in names]
    for number, one in enumerate(rows):
        one.notes = {"per_hook_s": number * 1e-6}
    folder = readme.parent / "benchmarks/results/cpu-a"
    for case, peer in (("covariance", "torch.mm"), ("eigen", "torch.linalg")):
        alone = replace(row(peer, 1.0), versus=peer)
        Result(case, "default", MACHINE, RATES, {}, {}, [alone]).save(folder)
    Result("hooks", "default", MACHINE, RATES, {}, {}, rows).save(folder)
    tables = ("hooks", "kernels")
    readme.write_text("".join(f"<!-- table:cpu-a/{t} -->\n<!-- /table -->\n" for t in tables))
    assert plot.main(["--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "| 53 hooks | fastcov, default | 1.00 s | 2 us |" in text
    on_gpu = "| 53 hooks, GPU path | fastcov, default | 1.00 s | 5 us |"
    assert (on_gpu in text) == has_gpu_path
    assert "| one hook, nothing launched | 2 us | torch's empty hook: 1 us |" in text


def test_a_difference_is_noticed(
    plot: ModuleType, readme: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--readme", str(readme), "--check"]
    assert plot.main(arguments) == 1
    assert plot.main(arguments[:2]) == 0
    assert plot.main(arguments) == 0
    readme.write_text(readme.read_text().replace("1.012x", "1.002x"))
    assert plot.main(arguments) == 1
    assert "differs from the result files" in capsys.readouterr().out
    assert plot.main(arguments[:2]) == 0
    path = readme.parent / "benchmarks/results/cpu-a/training-resnet50.json"
    content = json.loads(path.read_text())
    content["rows"][1]["ratio"] = 1.5
    path.write_text(json.dumps(content))
    assert plot.main(arguments) == 1


def test_device_may_be_left_out(plot: ModuleType, readme: Path) -> None:
    readme.write_text("<!-- table:training -->\n<!-- /table -->\n")
    assert plot.main(["--readme", str(readme)]) == 0
    assert "1.012x" in readme.read_text()
    (readme.parent / "benchmarks/results/cpu-b").mkdir()
    assert plot.main(["--readme", str(readme)]) == 2


def test_nothing_measured_is_said(plot: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "README.md"
    page.write_text("<!-- table:training -->\n<!-- /table -->\n")
    assert plot.main(["--readme", str(page)]) == 0
    assert "Not measured yet" in page.read_text()


@pytest.mark.parametrize(
    ("marker", "message"),
    [
        ("table:cpu-a/nothing", "no table 'nothing'"),
        ("table:cpu-a/eigen", "fastcov bench --only eigen"),
        ("table:cpu-b/training", "no benchmark result"),
    ],
)
def test_unmeasured_tables_are_refused(
    plot: ModuleType,
    readme: Path,
    marker: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    readme.write_text(f"<!-- {marker} -->\n<!-- /table -->\n")
    assert plot.main(["--readme", str(readme)]) == 2
    assert message in capsys.readouterr().err


def test_committed_tables_are_current(plot: ModuleType) -> None:
    pages = [str(ROOT / page) for page in plot.PAGES]
    assert plot.main(["--readme", *pages, "--check"]) == 0


def test_links_start_from_the_page_and_nothing_is_said_twice(
    plot: ModuleType, readme: Path
) -> None:
    page = readme.parent / "benchmarks" / "README.md"
    page.write_text(PAGE)
    assert plot.main(["--readme", str(readme), str(page)]) == 0
    for path, link in ((readme, "benchmarks/results/cpu-a/"), (page, "results/cpu-a/")):
        text = path.read_text()
        assert f"[file]({link}training-resnet50.json)" in text
        assert f"]({link}training.svg)" in text
        assert (text.count("torch 2.11.0"), text.count("The same machine")) == (1, 1)
        assert text.count("Medians;") == 1


def test_a_mean_is_called_one(plot: ModuleType, readme: Path) -> None:
    set_in_every_row(readme, statistic="mean")
    assert plot.main(["--readme", str(readme)]) == 0
    assert "mean ratios; in brackets the mean's 95 % interval" in readme.read_text()
