import importlib.util
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn

import fastcov
from fastcov import bench
from fastcov.bench import (
    command,
    covariance,
    eigen,
    floors,
    hooks,
    machine,
    models,
    peers,
    results,
    training,
)
from fastcov.bench.contest import DEFAULT, EVERY_ROW, Setting, Size, WrongResultError, check
from fastcov.bench.memory import peak_bytes
from fastcov.bench.timing import interleave
from fastcov.ops import accumulate_

CPU = torch.device("cpu")
RATES = machine.Rates(CPU, copy_bytes_s=1e10, matmul={"float32": 1e11, "float64": 5e10})
GPU_RATES = machine.Rates(
    torch.device("cuda"), 1e12, {"float32": 1e13, "bfloat16": 1e14, "float64": 1e13}, clock_hz=1e9
)


# floors


@pytest.mark.parametrize("size", [(1, 224, 224), (2, 97, 131)])
def test_resnet50_maps_are_torchvisions(size: tuple[int, int, int]) -> None:
    with torch.device("meta"):
        model = torchvision.models.resnet50()
        shapes: list[tuple[int, ...]] = []
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_hook(lambda _m, _a, output: shapes.append(output.shape))
        model(torch.zeros(size[0], 3, *size[1:]))
    assert shapes == floors.resnet50_maps(*size)


def test_gram_floor_is_the_larger_bound() -> None:
    narrow = floors.GramLoad(100_000, 8, torch.float32)
    wide = floors.GramLoad(10_000, 512, torch.float32)
    floor = floors.gram_floor([narrow], RATES)
    assert floor.of == "bandwidth"
    assert floor.seconds == pytest.approx((100_000 * 8 * 4 + 8 * 8 * 9) / 1e10)
    floor = floors.gram_floor([wide], RATES)
    assert floor.of == "arithmetic"
    assert floor.seconds == pytest.approx(10_000 * 512 * 513 / 1e11)
    both = floors.gram_floor([narrow, wide], RATES).seconds
    assert both == pytest.approx(
        floors.gram_floor([narrow], RATES).seconds + floors.gram_floor([wide], RATES).seconds
    )


def test_float32_on_a_gpu_counts_six_products() -> None:
    load = floors.GramLoad(100_000, 2048, torch.float32)
    floor = floors.gram_floor([load], GPU_RATES)
    assert floor.seconds == pytest.approx(6 * floors.gram_flops(load) / 1e14)


def test_small_matrices_are_bound_by_latency_on_a_gpu() -> None:
    assert floors.eigenvalue_floor([(64, 1)], torch.float32, GPU_RATES).of == "latency"
    assert floors.eigenvalue_floor([(64, 1)], torch.float32, RATES).of != "latency"


def test_eigenvalue_floor_counts_what_bisection_takes_on_a_gpu() -> None:
    # n = 64: 6 of 24 bits are settled at once, one count more finds them: 19 counts.
    latency = floors.eigenvalue_floor([(64, 1)], torch.float32, GPU_RATES).seconds
    assert latency == pytest.approx(64 * 4 * (10 + 2 * 19) / 1e9)
    flops = 10_000 * (4 / 3 * 64**3 + 3 * 64**2 * 19)
    many = floors.eigenvalue_floor([(64, 10_000)], torch.float32, GPU_RATES)
    assert many.of == "arithmetic"
    assert many.seconds == pytest.approx(flops / 1e13)
    small_gpu = replace(GPU_RATES, multiprocessors=10)
    reciprocals = floors.eigenvalue_floor([(64, 10_000)], torch.float32, small_gpu)
    assert reciprocals.of == "reciprocals"
    assert reciprocals.seconds == pytest.approx(10_000 * 64**2 * 19 / (16 * 10 * 1e9))
    alone = floors.eigenvalue_floor([(64, 1)], torch.float32, RATES)
    assert alone.seconds == pytest.approx(4 / 3 * 64**3 / 1e11)


# hooks in turns


def test_hook_sets_do_not_mix() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    heard: list[str] = []
    model[0].register_forward_hook(lambda *_: heard.append("own"))
    turns = models.HookTurns(model)
    for name in ("a", "b"):
        turns.add(name, lambda n=name: model[0].register_forward_hook(lambda *_: heard.append(n)))
    for name, expected in (("none", ["own"]), ("a", ["own", "a"]), ("b", ["own", "b"])):
        heard.clear()
        turns.install(name)
        model(torch.zeros(1, 2))
        assert heard == expected
    turns.forget("b")
    turns.install("b")
    heard.clear()
    model(torch.zeros(1, 2))
    assert heard == ["own"]


def test_tracker_counts_only_its_turns() -> None:
    model = nn.Linear(3, 4)
    turns = models.HookTurns(model)
    tracker = turns.add("tracked", lambda: fastcov.track(model, rows="all"))
    for name in ("tracked", "none", "tracked"):
        turns.install(name)
        model(torch.randn(10, 3))
    assert (tracker.steps, tracker.count("")) == (2, 20)


def test_peak_counts_what_is_alive_at_once() -> None:
    def grow() -> None:
        first = torch.zeros(1000, 250)
        second = first + 1
        del first, second
        torch.zeros(1000, 250)

    assert peak_bytes(CPU, grow) == pytest.approx(2_000_000, rel=0.01)


@pytest.mark.parametrize(("backend", "peak"), [("native", 600), ("cudaMallocAsync", 1024)])
def test_peak_on_a_gpu_is_what_was_asked_for(
    monkeypatch: pytest.MonkeyPatch, backend: str, peak: int
) -> None:
    """The allocator hands out more, by up to 1 MiB a tensor: no memory of the tracker's."""
    stats = dict.fromkeys(("requested_bytes.all.current", "allocated_bytes.all.current"), 0)

    def grow() -> None:
        stats.update({"requested_bytes.all.peak": 600, "allocated_bytes.all.peak": 1024})

    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda _: None)
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda _: stats)
    monkeypatch.setattr(torch.cuda, "get_allocator_backend", lambda: backend)
    assert peak_bytes(torch.device("cuda"), grow) == peak


# correctness comes first


@pytest.mark.parametrize("error", [2e-5, math.nan])
def test_wrong_result_is_refused(error: float) -> None:
    with pytest.raises(WrongResultError, match="nothing was timed"):
        check("work", error, 1e-5)
    assert check("work", 1e-5, 1e-5) == 1e-5


def test_wrong_operator_is_never_timed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(covariance, "accumulate_", lambda s, x: accumulate_(s, x * 1.1))
    assert command.main(["--tiny", "--only", "covariance"]) == 1
    printed = capsys.readouterr()
    assert "off by" in printed.err
    assert "p50" not in printed.out


def test_untracked_hooks_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    # A set of hooks that is never called would look free.
    step = models.supervised(nn.Linear(4, 4), [torch.randn(8, 4)], autocast=None)
    monkeypatch.setattr(models.HookTurns, "install", lambda self, name: None)
    with pytest.raises((WrongResultError, ValueError), match=r"steps counted|no row"):
        training.contest(step, Setting(CPU, "tiny"))


# inputs


@pytest.mark.parametrize(
    ("layout", "strides"),
    [
        ("rows", (8, 1)),
        ("tokens", (49 * 8, 8, 1)),
        ("strided", (49 * 16, 16, 1)),
        ("channels_last", (49 * 8, 7 * 8, 8, 1)),
        ("nchw", (49 * 8, 7, 1, 49)),
    ],
)
def test_layouts_are_what_they_say(layout: str, strides: tuple[int, ...]) -> None:
    shape = covariance.Shape(layout, torch.bfloat16, 8, 392)
    rows = covariance.make_rows(shape, CPU, seed=0)
    assert rows.stride() == strides
    assert rows.numel() == 392 * 8
    assert rows.dtype == torch.bfloat16
    assert len(rows.unique()) > 100  # never zeros: denormals and zeros are faster


def test_matrices_are_symmetric_and_differ_by_seed() -> None:
    problem = eigen.Problem("two sizes", torch.float32, ((4, 3), (6, 2)))
    first, other = (eigen.make_matrices(problem, CPU, seed) for seed in (0, 1))
    assert [tuple(batch.shape) for batch in first] == [(3, 4, 4), (2, 6, 6)]
    for batch, another in zip(first, other, strict=True):
        assert torch.equal(batch, batch.mT)
        assert not torch.equal(batch, another)


# whole cases


def run(name: str, tmp_path: Path, *more: str) -> results.Result:
    assert command.main(["--tiny", "--only", name, "--out", str(tmp_path), *more]) == 0
    return results.load_results(tmp_path / f"{name}.json")[name]


@pytest.mark.slow
def test_covariance_case(tmp_path: Path) -> None:
    result = run("covariance", tmp_path)
    ours = [row for row in result.rows if row.contender == "fastcov"]
    assert len(ours) == 4
    for row in ours:
        assert row.error is not None
        assert 0 < row.error <= 1e-5
        assert row.floor_s is not None
        assert row.floor_s > 0
        assert row.p20_s <= row.p50_s <= row.p80_s
        assert row.ratio == 1
    others = {row.contender for row in result.rows}
    assert {"torch.mm", "cast + addmm"} <= others | set(result.missing)
    assert "torch.compile" not in others | set(result.missing)  # takes minutes of a GPU's eight
    assert "float32" in result.missing["torch.mm"]  # half precision has no such mm on a CPU
    content = json.loads((tmp_path / "covariance.json").read_text())
    assert {"device", "driver", "versions", "commit", "threads"} <= set(content["machine"])
    assert content["clocks"]["before"]
    assert content["rates"]["copy_gb_s"] > 0
    assert content["machine"]["versions"]["torch"] == torch.__version__


@pytest.mark.parametrize("size", ["tiny", "default", "full"])
def test_compiled_moments_take_part_in_full_runs_alone(
    monkeypatch: pytest.MonkeyPatch, size: Size
) -> None:
    started: list[str] = []

    def start(_device: torch.device) -> peers.MomentMaker:
        started.append("torch.compile")
        raise peers.MissingPeerError("none here")

    monkeypatch.setattr(peers, "MOMENT_PEERS", {})
    monkeypatch.setitem(peers.COMPILED_MOMENT_PEERS, "torch.compile", start)
    setting = Setting(CPU, size, _rates=RATES)
    shape = covariance.Shape("rows", torch.float32, 4, 64)
    covariance._contest("small", [[covariance.make_rows(shape, CPU, 0)]], setting, rounds=1)
    assert started == (["torch.compile"] if size == "full" else [])


def test_eigen_case_names_missing_peers(tmp_path: Path) -> None:
    result = run("eigen", tmp_path)
    assert {"fastcov", "torch.linalg"} <= {row.contender for row in result.rows}
    assert result.missing["cupy"] == "needs a GPU"


def test_hooks_case(tmp_path: Path) -> None:
    rows = {(row.work, row.contender): row for row in run("hooks", tmp_path).rows}
    works = [hooks.CPU_PATH]
    if importlib.util.find_spec("triton"):
        works += [hooks.GPU_PATH, hooks.HEADS_PATH]
    for work in works:
        for name in (DEFAULT, EVERY_ROW, hooks.INPUTS):
            row = rows[work, name]
            assert 0 < row.notes["per_hook_s"] < 1e-2


def test_a_step_of_hooks_takes_a_few_times_as_long_as_empty_hooks() -> None:
    """The least of many interleaved times: that of a machine that has nothing else to do."""
    work = hooks.works(Setting(CPU, "tiny"))[0]
    assert work.name == hooks.CPU_PATH
    contest = work.build(Setting(CPU, "tiny"))
    samples = interleave(
        contest.contenders,
        CPU,
        rounds=60,
        clock=contest.clock,
        prepare=contest.prepare,
        reference=contest.reference,
    )
    least = {name: min(seconds) for name, seconds in samples.items()}
    # Two cores of a Xeon, idle or with five processes on them: 2.5 to 3.2 times; 15 with a sum of
    # 2000 terms in Python in each hook. Without the compiled library 8 to 27.
    most = 5 if fastcov.backends()["cpu"].active else 50
    for name in (DEFAULT, EVERY_ROW, hooks.INPUTS):
        assert least[hooks.EMPTY] < least[name] < most * least[hooks.EMPTY], (name, least)


def test_absent_package_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str, package: str) -> None:
        raise peers.MissingPeerError(f"not installed (pip install {package})")

    monkeypatch.setattr(peers, "_module", absent)
    result = run("eigen", tmp_path)
    assert "pip install jax" in result.missing["jax"]
    assert "jax" not in {row.contender for row in result.rows}


def test_broken_peer_is_named() -> None:
    setting = Setting(CPU, "tiny")

    def break_() -> None:
        raise ZeroDivisionError("by design\nsecond line")

    assert peers.find(setting, "peer", break_) is None
    assert setting.missing == {"peer": "failed: ZeroDivisionError: by design"}


MODEL = """
import torch
import torchvision
from torch import nn

def build():
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(32, 6)

def build_step():
    model = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU())
    images = torch.randn(2, 3, 8, 8)
    return model, lambda: model(images).sum().backward()

def build_wrong():
    return nn.Linear(2, 2)
"""


@pytest.mark.parametrize("function", ["build", "build_step"])
def test_own_model(
    function: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "my_own_model.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    arguments = ["--model", f"my_own_model:{function}", "--tiny", "--out", "out"]
    assert command.main(arguments) == 0
    rows = {row.contender: row for row in results.load_results(Path("out"))["model"].rows}
    assert rows["untracked"].ratio == 1
    assert rows["fastcov, every row"].error is not None
    assert rows["fastcov, every row"].error <= 1e-5
    assert rows["fastcov, default"].notes["added_peak_bytes"] > 0
    assert ("estimate_bytes" in rows["fastcov, default"].notes) == (function == "build")
    assert "naive hooks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "no_such_module_here:build"], "cannot be imported"),
        (["--model", "fastcov:no_function"], "has no function 'no_function'"),
        (["--model", "just_a_module"], "expected MODULE:FUNCTION"),
        (["--model", "fastcov:backends"], "expected (model, inputs)"),
        (["--only", "nothing"], "names no case; cases: covariance"),
        (["--compare", "nowhere", "nowhere"], "no benchmark result at nowhere"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_without_a_gpu_gpu_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.main(["--gpu"]) == 2
    assert "no CUDA device" in capsys.readouterr().err


def test_every_case_is_a_public_name() -> None:
    setting = Setting(CPU, "full", _rates=RATES)
    for case in bench.CASES:
        names = [work.name for work in bench.works(case, setting)]
        assert names
        assert len(set(names)) == len(names)
