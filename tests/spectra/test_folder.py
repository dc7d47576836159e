"""The folder of a history: continued, killed, full, damaged, written by two."""

import gc
import io
import json
import math
import os
import signal
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastcov.spectra.history import History, Snapshot, load_history
from fastcov.spectra.spectrum import Spectrum

LAYERS = {"stem": 5, "layer1.0.conv1": 8, 'odd "name"\n<b>': 3}


def _spectrum(step: int, channels: int, name: str = "") -> Spectrum:
    eigenvalues = torch.arange(1, channels + 1, dtype=torch.float64) ** -(1 + 0.01 * step)
    return Spectrum(eigenvalues, 16 * channels + step, float(eigenvalues.sum()), name)


def _snapshot(step: int, layers: dict[str, int] | None = None) -> Snapshot:
    layers = LAYERS if layers is None else layers
    spectra = {name: _spectrum(step, channels, name) for name, channels in layers.items()}
    return Snapshot(step, 0.5 * step, spectra)


def _same(a: Snapshot, b: Snapshot) -> bool:
    return (a.step, a.wall_s, list(a.spectra)) == (b.step, b.wall_s, list(b.spectra)) and all(
        torch.equal(x.eigenvalues, y.eigenvalues)
        and (x.count, x.total, x.name) == (y.count, y.total, y.name)
        for x, y in zip(a.spectra.values(), b.spectra.values(), strict=True)
    )


def test_a_folder_is_continued_and_read_by_others(tmp_path: Path) -> None:
    first = History(tmp_path)
    for step in range(3):
        first.append(_snapshot(step))
    second = History(str(tmp_path))
    assert second.steps() == [0, 1, 2]
    second.append(_snapshot(3))
    reader = load_history(tmp_path)
    assert [_same(s, _snapshot(i)) for i, s in enumerate(reader)] == [True] * 4
    lines = [json.loads(line) for line in (tmp_path / "history.jsonl").read_text().splitlines()]
    stem = _spectrum(2, 5)
    assert lines[2]["layers"][0]["dim"] == stem.dim()
    assert lines[2]["layers"][0]["dof"] == stem.dof()
    stored = np.load(tmp_path / "spectra" / lines[2]["file"], allow_pickle=False)
    offset = lines[2]["layers"][1]["offset"]
    assert np.array_equal(stored[offset : offset + 8], _spectrum(2, 8).eigenvalues.numpy())


def test_reading_writes_nothing(tmp_path: Path) -> None:
    History(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    with pytest.raises(FileNotFoundError, match=r"no history in .*new.*out="):
        load_history(tmp_path / "new")
    with pytest.raises(FileNotFoundError, match=r"snapshot_every= or tracker\.snapshot\(\)"):
        load_history(tmp_path)
    (tmp_path / "history.jsonl").touch()
    with pytest.raises(FileNotFoundError, match="is a file: give the folder that holds it"):
        load_history(tmp_path / "history.jsonl")


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match=r"file is a file; a history needs a folder"):
        History(tmp_path / "file")


def test_a_last_line_cut_anywhere_loses_that_snapshot_only(tmp_path: Path) -> None:
    history = History(tmp_path)
    for step in range(3):
        history.append(_snapshot(step))
    lines = tmp_path / "history.jsonl"
    whole = lines.read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    for cut in range(last, len(whole)):
        lines.write_bytes(whole[:cut])
        assert load_history(tmp_path).steps() == [0, 1], cut
        assert lines.stat().st_size == cut  # reading repairs nothing
    resumed = History(tmp_path)
    resumed.append(_snapshot(7))
    assert [_same(s, _snapshot(i)) for s, i in zip(History(tmp_path), (0, 1, 7), strict=True)]
    assert lines.read_bytes()[:last] == whole[:last]


def test_zeros_after_a_power_cut_are_ignored(tmp_path: Path) -> None:
    History(tmp_path).append(_snapshot(0))
    with (tmp_path / "history.jsonl").open("ab") as lines:
        lines.write(b"\0" * 700 + b"\n")
    history = History(tmp_path)
    assert history.steps() == [0]
    history.append(_snapshot(1))
    assert load_history(tmp_path).steps() == [0, 1]


def test_orphans_are_ignored_and_removed_by_the_next_append(tmp_path: Path) -> None:
    History(tmp_path).append(_snapshot(0))
    spectra = tmp_path / "spectra"
    for name in ("00000001.npy", "00000001.npy.tmp", "00000002.npy"):
        (spectra / name).write_bytes(b"half a file")
    (spectra / "notes.txt").write_text("not ours")
    history = History(tmp_path)
    assert len(history) == 1
    history.append(_snapshot(5, {"x": 2}))
    assert sorted(p.name for p in spectra.iterdir()) == [
        "00000000.npy",
        "00000001.npy",
        "notes.txt",
    ]
    assert _same(load_history(tmp_path)[1], _snapshot(5, {"x": 2}))


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from test_folder import History, _snapshot
history = History({folder!r})
start = history.steps()[-1] + 1 if len(history) else 0
for step in range(start, 10**9):
    history.append(_snapshot(step))
    print(step, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_nothing_that_was_appended_is_lost(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    appended = -1
    for attempt in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, bufsize=1
        )
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(5)]
        time.sleep(0.003 * attempt + 0.001)
        process.send_signal(signal.SIGKILL)
        said += process.stdout.read().splitlines()
        process.wait()
        appended = max(int(line) for line in said if line.strip())
        history = load_history(tmp_path)
        assert history.steps()[: appended + 1] == list(range(appended + 1))
        assert len(history) <= appended + 2
        assert all(_same(s, _snapshot(s.step)) for s in history)
    assert appended >= 14


@pytest.mark.parametrize("call", ["replace", "fsync"])
@pytest.mark.parametrize("which", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_an_append_that_fails_changes_nothing_and_can_be_repeated(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    which: int,
    error: BaseException,
) -> None:
    history = History(tmp_path)
    history.append(_snapshot(0))
    calls = 0
    real = getattr(os, call)

    def failing(*arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == which:
            raise error
        return real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, failing)
        if call == "replace" and which > 1:
            history.append(_snapshot(1))  # an append renames once
            return
        with pytest.raises(type(error)):
            history.append(_snapshot(1))
    assert history.steps() == [0]
    assert load_history(tmp_path).steps() == [0]
    history.append(_snapshot(1))
    assert [_same(s, _snapshot(i)) for i, s in enumerate(load_history(tmp_path))] == [True, True]
    assert len(list((tmp_path / "spectra").iterdir())) == 2


FULL = """
import resource, signal, sys
sys.path.insert(0, {tests!r})
from test_folder import History, _snapshot
history = History({folder!r})
layers = {layers!r}
history.append(_snapshot(0, layers))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
try:
    history.append(_snapshot(1, layers))
except OSError as error:
    print(error)
assert history.steps() == [0], history
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
history.append(_snapshot(1, layers))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("layers", "limit"),
    [({"a": 4000}, 20_000), ({f"layer number {i}": 1 for i in range(40)}, 10_000)],
    ids=["no room for the spectra", "no room for the line"],
)
def test_a_full_disk_is_one_error_and_nothing_is_lost(
    tmp_path: Path, layers: dict[str, int], limit: int
) -> None:
    """The kernel refuses to let a file grow past the limit, as it refuses on a full disk."""
    script = FULL.format(
        tests=str(Path(__file__).parent), folder=str(tmp_path), layers=layers, limit=limit
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    (said,) = done.stdout.strip().splitlines()
    for part in ("step 1", str(tmp_path), "File too large", "1 snapshots before", "free space"):
        assert part in said
    history = load_history(tmp_path)
    assert [_same(s, _snapshot(i, layers)) for i, s in enumerate(history)] == [True, True]
    assert len(list((tmp_path / "spectra").iterdir())) == 2


def test_a_second_writer_is_refused(tmp_path: Path) -> None:
    first, second = History(tmp_path), History(tmp_path)
    first.append(_snapshot(0))
    with pytest.raises(ValueError, match="another process writes here"):
        second.append(_snapshot(1))
    first.append(_snapshot(1))
    third = History(tmp_path)
    first.append(_snapshot(2))
    with pytest.raises(ValueError, match="another process writes here"):
        third.truncate(1)
    assert load_history(tmp_path).steps() == [0, 1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f.pop("format"), '"format" is missing'),
        (lambda f: f.update(format=99), "format 99 is not 1"),
        (lambda f: f.update(step=-1), "'step' is -1"),
        (lambda f: f.update(step="3"), "'step' is '3'"),
        (lambda f: f.update(step=10**30), "'step' is 10+"),
        (lambda f: f.update(wall_s=math.inf), "'wall_s' is inf"),
        (lambda f: f.update(file="../../etc/passwd"), "'file' is '../../etc/passwd'"),
        (lambda f: f.update(length=10**15), "'length' is 10+"),
        (lambda f: f.update(layers={}), "'layers' is {}"),
        (lambda f: f["layers"].append(7), "layers holds 7"),
        (lambda f: f["layers"][1].update(channels=10**15), "'offset' is 13"),
        (lambda f: f["layers"][0].update(channels=0), "'channels' is 0"),
        (lambda f: f["layers"][0].update(name=3), "'name' is 3"),
        (lambda f: f["layers"][0].update(count=-2), "'count' is -2"),
        (lambda f: f["layers"][0].update(total=math.nan), "'total' is nan"),
    ],
)
def test_a_damaged_line_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    history = History(tmp_path)
    history.append(_snapshot(0))
    history.append(_snapshot(1))
    whole = (tmp_path / "history.jsonl").read_text().splitlines()
    for number in (0, 1):
        fields = json.loads(whole[number])
        change(fields)
        lines = [*whole]
        lines[number] = json.dumps(fields)
        (tmp_path / "history.jsonl").write_text("\n".join(lines) + "\n")
        with pytest.raises(ValueError, match=rf"history.jsonl, line {number + 1}: .*{message}"):
            load_history(tmp_path)


def test_a_damaged_line_between_others_is_named(tmp_path: Path) -> None:
    history = History(tmp_path)
    for step in range(3):
        history.append(_snapshot(step))
    lines = (tmp_path / "history.jsonl").read_bytes().splitlines(keepends=True)
    for garbage in (b"\xff\xfe\n", b"[" * 100_000 + b"\n", b"\n"):
        (tmp_path / "history.jsonl").write_bytes(lines[0] + garbage + lines[2])
        with pytest.raises(ValueError, match=r"line 2: .*delete this line and all after it"):
            load_history(tmp_path)
    (tmp_path / "history.jsonl").write_bytes(
        lines[0] + lines[1].replace(b'"step": 1', b'"step": 9') + lines[2]
    )
    with pytest.raises(ValueError, match="line 3: step 2 follows step 9; two runs"):
        load_history(tmp_path)


def test_an_endless_line_takes_no_memory(tmp_path: Path) -> None:
    with (tmp_path / "history.jsonl").open("wb") as lines:
        lines.truncate(2**40)  # sparse: a terabyte of zeros
    with pytest.raises(ValueError, match="a line of more than 64 MiB"):
        load_history(tmp_path)


def _pickled() -> bytes:
    stored = io.BytesIO()
    np.save(stored, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return stored.getvalue()


def _npy(array: np.ndarray[Any, Any]) -> bytes:
    stored = io.BytesIO()
    np.save(stored, array)
    return stored.getvalue()


def _npz() -> bytes:
    stored = io.BytesIO()
    np.savez(stored, np.zeros(16))
    return stored.getvalue()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "No such file"),
        (b"", "No data left|cannot be read"),
        (b"not numpy", "cannot be read"),
        (_npy(np.zeros(16))[:-8], "cannot be read"),
        (_npy(np.zeros(16)).replace(b"(16,)", b"(99,)"), "cannot be read"),
        (_npy(np.zeros(15)), r"shape \(15,\), not float64 of \(16,\)"),
        (_npy(np.zeros((4, 4))), r"shape \(4, 4\)"),
        (_npy(np.zeros(16, np.float32)), "float32 of shape"),
        (_pickled(), "cannot be read"),
        (_npz(), "an archive"),
    ],
)
def test_damaged_spectra_are_named_when_read(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    history = History(tmp_path)
    history.append(_snapshot(0))
    history.append(_snapshot(1))
    stored = tmp_path / "spectra" / "00000001.npy"
    stored.unlink()
    if content is not None:
        stored.write_bytes(content)
    history = load_history(tmp_path)
    assert _same(history[0], _snapshot(0))
    with pytest.raises(ValueError, match=rf"00000001.npy .*({message})"):
        history[1]


def test_spectra_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    History(tmp_path).append(_snapshot(0))
    stored = tmp_path / "spectra" / "00000000.npy"
    stored.write_bytes(_npy(np.full(16, np.nan)))
    with pytest.raises(ValueError, match="finite, got nan"):
        load_history(tmp_path)[0]


def test_memory_does_not_grow_with_the_number_of_snapshots(tmp_path: Path) -> None:
    history = History(tmp_path)
    layers = {"wide": 20_000}
    for step in range(4):
        history.append(_snapshot(step, layers))
    tracemalloc.start()
    for step in range(4, 44):
        history.append(_snapshot(step, layers))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 20_000  # torch's memory is not traced: see the count of live tensors below
    assert peak < 2_000_000
    gc.collect()
    wide = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape == (20_000,)]
    assert wide == []
