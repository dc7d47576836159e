"""One case, one contest, or one call that goes wrong costs nothing else."""

import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcov
from fastcov.bench import apart, command, models, results, timing
from fastcov.bench.contest import Contest, Setting, Work, WrongResultError, measure

CPU = torch.device("cpu")


def sleep_contest(_setting: Setting) -> Contest:
    return Contest({"fastcov": lambda _index: time.sleep(1e-3)}, reference="fastcov", rounds=2)


def broken(_setting: Setting) -> Contest:
    raise ZeroDivisionError("by design")


def wrong(_setting: Setting) -> Contest:
    raise WrongResultError("off by 1")


def works(_setting: Setting) -> list[Work]:
    return [
        Work("first", sleep_contest),
        Work("broken", broken),
        Work("wrong", wrong),
        Work("last", sleep_contest),
    ]


def test_a_failed_contest_loses_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "CASES", {"case": works})
    assert command.main(["--tiny", "--only", "case", "--out", str(tmp_path)]) == 1
    saved = results.load_results(tmp_path)["case"]
    assert [row.work for row in saved.rows] == ["first", "last"]
    assert saved.failures == {"broken": "ZeroDivisionError: by design", "wrong": "off by 1"}
    printed = capsys.readouterr()
    assert "NOT MEASURED: broken" in printed.out
    assert "case: wrong: off by 1" in printed.err


def test_what_was_measured_is_written_after_each_contest(tmp_path: Path) -> None:
    class KilledError(BaseException):
        pass

    def killed(_setting: Setting) -> Contest:
        raise KilledError

    with pytest.raises(KilledError):
        command.run_case(
            "case",
            lambda _setting: [Work("first", sleep_contest), Work("killed", killed)],
            CPU,
            "tiny",
            folder=tmp_path,
        )
    saved = results.load_results(tmp_path)["case"]
    assert [row.work for row in saved.rows] == ["first"]
    assert saved.rates["copy_gb_s"] > 0


@pytest.mark.alone
def test_no_contest_begins_once_time_is_up(tmp_path: Path) -> None:
    def slow(_setting: Setting) -> Contest:
        time.sleep(0.3)
        return sleep_contest(_setting)

    result = command.run_case(
        "case",
        lambda _setting: [Work("slow", slow), Work("late", sleep_contest)],
        CPU,
        "tiny",
        folder=tmp_path,
        seconds=0.2 + _rates_s(),
    )
    assert [row.work for row in result.rows] == ["slow"]
    assert "s were up" in result.failures["late"]
    assert results.load_results(tmp_path)["case"].failures == result.failures


@pytest.mark.slow
def test_every_contest_compiles_what_it_compares_with(tmp_path: Path) -> None:
    # Beyond eight kinds of input torch.compile runs a function in eager mode, and says so once.
    compilations = []

    def backend(graph: torch.fx.GraphModule, _inputs: object) -> torch.fx.GraphModule:
        compilations.append(graph)
        return graph

    def build(rank: int) -> Contest:
        def naive(rows: torch.Tensor) -> torch.Tensor:
            return rows + 1

        function, rows = torch.compile(naive, backend=backend), torch.zeros([1] * rank)
        return Contest({"fastcov": lambda _index: function(rows)}, reference="fastcov", rounds=2)

    works = [Work(str(rank), lambda _, rank=rank: build(rank)) for rank in range(1, 11)]
    result = command.run_case("case", lambda _: works, CPU, "tiny", folder=tmp_path)
    assert len(result.rows) == len(compilations) == 10


def _rates_s() -> float:
    start = time.perf_counter()
    assert Setting(CPU, "tiny").rates.copy_bytes_s > 0
    return 0.5 * (time.perf_counter() - start)


@pytest.mark.alone
def test_a_mean_holds_what_a_median_hides(tmp_path: Path) -> None:
    def build(setting: Setting) -> Contest:
        slow = iter([False, False, False, True] * 10)
        return Contest(
            {
                "bare": lambda _index: time.sleep(2e-3),
                "fastcov": lambda _index: time.sleep(20e-3 if next(slow) else 2e-3),
            },
            reference="bare",
            rounds=24,
            statistic="mean" if setting.size == "full" else "median",
        )

    ratios = {}
    for size in ("default", "full"):
        work = Work("work", build)
        rows = measure(work.name, work.build(Setting(CPU, size)), Setting(CPU, size))
        ours = next(row for row in rows if row.contender == "fastcov")
        assert ours.ratio_low < ours.ratio < ours.ratio_high
        ratios[ours.statistic] = ours.ratio
    assert ratios["median"] < 1.5
    assert 2.5 < ratios["mean"] < 4.0  # (3 * 1 + 10) / 4


def test_a_dead_gpu_ends_its_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "is_alive", lambda device: False)
    result = command.run_case("case", works, CPU, "tiny", folder=tmp_path)
    assert list(result.failures) == ["the rest"]
    assert [row.work for row in results.load_results(tmp_path)["case"].rows] == ["first"]


# processes


def test_shares_leave_half_a_minute_of_nine() -> None:
    unasked = [n for n in command.CASES if n not in command._BY_NAME_ONLY["cuda"]]
    assert set(apart.SHARES_S) == set(unasked)
    assert sum(apart.shares(unasked, "default").values()) == apart.TOTAL_S <= 510
    compiled = [name for name in command.CASES if name.endswith("-compiled")]
    assert len(compiled) == 3
    assert sum(apart.shares(compiled, "default").values()) <= apart.TOTAL_S
    # Beside the start of its process and the end of its last contest each has time to measure.
    assert min(apart.shares(unasked, "default").values()) >= apart._START_S + apart._GRACE_S + 10


def test_each_case_has_its_own_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # covariance never ends, eigen fails, hooks writes a result: all three are heard of.
    def stand_in(case: str, size: str, folder: Path | None, seconds: float) -> list[str]:
        assert seconds >= 1
        body = {
            "covariance": "import time; time.sleep(600)",
            "eigen": "raise SystemExit(3)",
            "hooks": (
                "from pathlib import Path; from fastcov.bench.results import Result; "
                "about = {'kind': 'cuda', 'device': 'd'}; "
                "result = Result('hooks', 'default', about, {}, {}, {}, []); "
                f"result.save(Path({str(folder)!r}))"
            ),
        }[case]
        return [sys.executable, "-c", body]

    monkeypatch.setattr(apart, "_command", stand_in)
    monkeypatch.setattr(apart, "_START_S", 1.0)
    shares = {"covariance": 1.0, "eigen": 60.0, "hooks": 60.0}
    monkeypatch.setattr(apart, "SHARES_S", shares)
    start = time.monotonic()
    assert apart.run_apart(list(shares), "default", tmp_path) == 1
    assert time.monotonic() - start < 60
    printed = capsys.readouterr()
    assert "covariance: ended after 1 s" in printed.err
    assert "eigen: status 3" in printed.err
    assert "failed: covariance, eigen\n" in printed.out
    assert "not measured" in printed.out  # the table of targets


def test_sigterm_ends_the_case_that_runs(tmp_path: Path) -> None:
    # As `timeout` sends it. The case has a process group of its own and would run on.
    ticking = tmp_path / "ticks"
    case = (
        "import time, pathlib\n"
        f"path = pathlib.Path({str(ticking)!r})\n"
        "while True: path.write_text(str(time.monotonic())); time.sleep(0.01)"
    )
    script = (
        "import sys; from fastcov.bench import apart\n"
        f"apart._command = lambda *_: [sys.executable, '-c', {case!r}]\n"
        "apart.run_apart(['eigen'], 'default', None)"
    )
    bench = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not ticking.exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    bench.terminate()
    assert bench.wait(timeout=30) == 128 + signal.SIGTERM
    last = ticking.read_text()
    time.sleep(0.2)
    assert ticking.read_text() == last


@pytest.mark.slow
def test_the_command_of_a_case_is_one_that_runs(tmp_path: Path) -> None:
    line = apart._command("eigen", "tiny", tmp_path, 30.0)
    line.remove("--gpu")
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert results.load_results(tmp_path)["eigen"].rows


# the device's clock


class FakeDevice:
    """A device that begins after its sleep, and a host that takes its time to enqueue."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, enqueue_s: float) -> None:
        self.now = self.ready = 0.0
        self.enqueue_s = enqueue_s
        self.sleeps: list[int] = []
        device = self

        class Event:
            def __init__(self, *, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = max(device.ready, device.now)

            def query(self) -> bool:
                return self.at <= device.now

            def synchronize(self) -> None:
                device.now = max(device.now, self.at)

            def elapsed_time(self, end: "Event") -> float:
                return 1e3 * (end.at - self.at)

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda _device: None)
        monkeypatch.setattr(torch.cuda, "_sleep", self.sleep, raising=False)

    def sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles)
        self.now = max(self.now, self.ready)
        self.ready = self.now + cycles / 2e9

    def call(self, _index: int) -> None:
        self.now += self.enqueue_s
        self.ready = max(self.ready, self.now) + 1e-5

    def waiting_call(self, _index: int) -> None:
        self.call(0)
        self.now = max(self.now, self.ready)


def test_gaps_between_launches_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch, enqueue_s=1e-4)
    clock = timing.DeviceClock()
    call = device.call
    taken = [clock(torch.device("cuda"), call, 0, 20) for _ in range(2)]
    assert taken == pytest.approx([1e-5, 1e-5])  # not the host's 1e-4
    assert device.sleeps[0] < device.sleeps[-1]
    assert device.sleeps[-1] == device.sleeps[-2]  # the second sample knows how long


def test_what_waits_for_the_device_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice(monkeypatch, enqueue_s=1e-4)
    clock = timing.DeviceClock()
    call = device.waiting_call
    first = clock(torch.device("cuda"), call, 0, 5)
    tries = len(device.sleeps)
    assert 3 <= tries <= 8
    clock(torch.device("cuda"), call, 5, 5)
    assert len(device.sleeps) == tries + 1  # not tried again
    assert first > 1e-5
    assert math.isfinite(first)


# compiled detectors


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.backbone(images)
        return features[features > 0].sum()  # a shape that data decide


@pytest.mark.slow
def test_compiled_backbone_counts_every_row() -> None:
    torch.manual_seed(0)
    model = Detector().train()
    images = torch.randn(2, 3, 6, 6)
    expected = model(images)
    with fastcov.track(model, rows="all") as tracker, torch.no_grad():
        forward = models.compile_backbone(model)
        for _ in range(3):
            assert float(forward(images)) == pytest.approx(float(expected.detach()), rel=1e-5)
        assert (tracker.steps, tracker.count("backbone.0")) == (3, 3 * 2 * 16)
    assert "forward" not in vars(model.backbone)
