from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastcov
from fastcov_detection.config import TrainConfig, load_config, save_config
from fastcov_detection.data.dataset import load_data
from fastcov_detection.errors import CheckpointError, ConfigError, DataError, LossError, WidthsError
from fastcov_detection.train import folder as checkpoint
from fastcov_detection.train import loop as engine
from fastcov_detection.train.folder import RunResult, load_run
from fastcov_detection.train.logbook import read_log
from fastcov_detection.train.loop import Loop, train

_FILES = {
    "checkpoint.pt",
    "checkpoint.previous.pt",
    "classes.json",
    "config.json",
    "log.jsonl",
    "model.pt",
    "run.json",
    "spectra",
    "tensorboard",
    "widths.json",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_root: Path) -> Path:
    """The folder of one whole run, which tests only read."""
    return tmp_path_factory.mktemp("runs") / "finished"


@pytest.fixture
def run_dir(finished: Path, tiny_run: TrainConfig) -> Path:
    if not finished.exists():
        train(tiny_run, {"layer3": 20}, run_dir=finished, seed=3, progress=False)
    return finished


def _losses(folder: Path) -> list[dict[str, float]]:
    entries = [entry for entry in read_log(folder) if entry["kind"] == "train"]
    return [
        {key: value for key, value in entry.items() if key not in ("kind", "train_s", "speed")}
        for entry in entries
    ]


def _in_another_process(
    folder: Path, config: TrainConfig, body: str, processes: int = 1
) -> subprocess.CompletedProcess[str]:
    """Runs ``body`` with ``config`` and ``folder`` defined, under torchrun where asked."""
    folder.mkdir(parents=True, exist_ok=True)
    save_config(config, folder / "asked.json")
    script = folder / "script.py"
    script.write_text(
        "from pathlib import Path\n"
        "from fastcov_detection.train import loop as engine\n"
        "from fastcov_detection.config import TrainConfig, load_config\n"
        f"folder = Path({str(folder)!r})\n"
        "config = load_config(TrainConfig, folder / 'asked.json')\n" + textwrap.dedent(body)
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script)]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


def test_a_run_leaves_everything_in_its_folder(run_dir: Path, tiny_run: TrainConfig) -> None:
    assert {path.name for path in run_dir.iterdir()} >= _FILES
    model, config, result = load_run(run_dir)
    assert result is not None
    assert not model.training
    assert config.model.num_classes == 11
    assert replace(config, model=replace(config.model, num_classes=None)) == tiny_run
    assert 0 <= result.ap <= result.ap50 <= 1
    assert result.segm_ap is None
    assert (result.steps, result.seed) == (6, 3)
    assert result.params == sum(p.numel() for p in model.parameters())
    assert model.backbone.body.layer3[1].conv2.out_channels == 20
    assert json.loads((run_dir / "classes.json").read_text()) == [str(d) for d in range(10)]
    entries = read_log(run_dir)
    assert [e["step"] for e in entries if e["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert all(e["speed"]["images_per_s"] > 0 for e in entries[:-1])
    assert all(e["loss"] > 0 and e["lr"] > 0 and e["grad_norm"] > 0 for e in entries[:-1])
    assert entries[-1]["kind"] == "eval"
    assert entries[-1]["ap"] == result.ap


def test_the_tracker_watched_the_backbone(run_dir: Path) -> None:
    history = fastcov.load_history(run_dir / "spectra")
    assert history.steps() == [2, 4, 6]
    assert "body.layer3.0.conv1" in history.layers()
    assert history[2].spectra["body.layer3.0.conv1"].eigenvalues[0] > 0


def test_weights_are_a_plain_state_dict(run_dir: Path) -> None:
    state = torch.load(run_dir / "model.pt", weights_only=True)
    assert all(isinstance(tensor, torch.Tensor) for tensor in state.values())
    model, _, _ = load_run(run_dir)
    assert state.keys() == model.state_dict().keys()


def test_a_finished_run_is_returned_at_once(
    run_dir: Path, tiny_run: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Loop, "_step", lambda *_: pytest.fail("trained again"))
    again = train(tiny_run, {"layer3": 20}, run_dir=run_dir, seed=3, progress=False)
    assert again == load_run(run_dir)[2]


@pytest.mark.parametrize(
    ("change", "widths", "seed", "message"),
    [
        ({"lr": 0.5}, {"layer3": 20}, 3, r"config\.lr = 0\.01, now it is 0\.5"),
        ({}, {"layer3": 24}, 3, r"widths\.layer3 = 20, now it is 24"),
        ({}, {"layer3": 20}, 4, r"seed = 3, now it is 4"),
    ],
)
def test_a_folder_of_another_run_is_refused(
    run_dir: Path,
    tiny_run: TrainConfig,
    change: dict[str, float],
    widths: dict[str, int],
    seed: int,
    message: str,
) -> None:
    config = replace(tiny_run, **change)
    with pytest.raises(CheckpointError, match=message + r".*choose another run folder"):
        train(config, widths, run_dir=run_dir, seed=seed, progress=False)


def test_a_finished_run_may_be_asked_for_with_other_workers(
    run_dir: Path, tiny_run: TrainConfig
) -> None:
    config = replace(tiny_run, threads=None, data=replace(tiny_run.data, workers=1))
    assert train(config, {"layer3": 20}, run_dir=run_dir, seed=3, progress=False).steps == 6


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_losses(
    run_dir: Path, tiny_run: TrainConfig, tmp_path: Path
) -> None:
    """The process dies in the middle of an epoch, two steps after its last checkpoint."""
    killed = tmp_path / "killed"
    body = """
        import os, signal
        from fastcov_detection.train.loop import Loop
        step = Loop._step
        def die(self, batch, rate):
            step(self, batch, rate)
            if self.step == 4:
                os.kill(os.getpid(), signal.SIGKILL)
        Loop._step = die
        engine.train(config, {"layer3": 20}, run_dir=folder, seed=3, progress=False)
    """
    done = _in_another_process(killed, tiny_run, body)
    assert done.returncode == -9, done.stderr
    leftover = killed / "checkpoint.pt.new.123.tmp"
    leftover.write_bytes(b"half of a checkpoint")
    assert [entry["step"] for entry in read_log(killed)] == [1, 2, 3, 4]
    assert not (killed / "run.json").exists()
    result = train(tiny_run, {"layer3": 20}, run_dir=killed, seed=3, progress=False)
    assert not leftover.exists()
    whole = load_run(run_dir)[2]
    assert whole is not None
    assert _losses(killed) == _losses(run_dir)
    assert (result.ap, result.ap50) == (whole.ap, whole.ap50)
    expected = torch.load(run_dir / "model.pt", weights_only=True)
    found = torch.load(killed / "model.pt", weights_only=True)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    histories = [fastcov.load_history(folder / "spectra") for folder in (run_dir, killed)]
    assert histories[0].steps() == histories[1].steps()
    for name, spectrum in histories[0][2].spectra.items():
        # A checkpoint empties the buffers, so float32 sums may begin at other rows and round
        # otherwise, by less than 1e-7. A row that was lost would show as 1e-3.
        atol = 1e-6 * float(spectrum.eigenvalues[0])
        resumed = histories[1][2].spectra[name]
        assert resumed.count == spectrum.count
        torch.testing.assert_close(resumed.eigenvalues, spectrum.eigenvalues, rtol=0, atol=atol)


def test_mask_rcnn_learns_and_is_scored_on_masks(
    tiny_mask_run: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_mask_run, steps=3, track="model", track_where="input", evaluate_every=2)
    result = train(config, run_dir=tmp_path, progress=False)
    assert result.segm_ap is not None
    assert 0 <= result.segm_ap <= 1
    assert all("loss_mask" in entry for entry in _losses(tmp_path))
    assert [e["step"] for e in read_log(tmp_path) if e["kind"] == "eval"] == [2, 3]
    layers = fastcov.load_history(tmp_path / "spectra").layers()
    assert "roi_heads.box_head.fc6:in" in layers


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_training_reduces_the_loss(tiny_run: TrainConfig, tmp_path: Path, precision: str) -> None:
    config = replace(
        tiny_run,
        steps=20,
        track="none",
        checkpoint_every=20,
        precision=precision,
        channels_last=precision == "float32",
        data=replace(tiny_run.data, workers=1 if precision == "float32" else 0),
    )
    train(config, run_dir=tmp_path, progress=False)
    losses = [entry["loss"] for entry in _losses(tmp_path)]
    assert sum(losses[-3:]) < 0.6 * sum(losses[:3])


def test_a_loss_that_is_not_finite_stops_the_run(tiny_run: TrainConfig, tmp_path: Path) -> None:
    config = replace(tiny_run, lr=1e25, clip_norm=None, warmup_steps=0, steps=40)
    with pytest.raises((LossError, AssertionError), match=r"at step \d+; lower lr|degenerate"):
        train(replace(config, track="none"), run_dir=tmp_path, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "steps is 0"),
        ({"lr": -1.0}, "lr -1.0"),
        ({"device": "tpu9"}, "unknown device 'tpu9'"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_impossible_runs(
    tiny_run: TrainConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        train(replace(tiny_run, **change), run_dir=tmp_path, progress=False)


def test_widths_for_another_model_are_refused_before_training(
    tiny_run: TrainConfig, tmp_path: Path
) -> None:
    with pytest.raises(WidthsError, match="'layer9'"):
        train(tiny_run, {"layer9": 8}, run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_missing_data_folder_is_found_before_training(
    tiny_run: TrainConfig, tmp_path: Path
) -> None:
    config = replace(tiny_run, data=replace(tiny_run.data, name=str(tmp_path / "absent")))
    with pytest.raises(DataError, match="absent is missing"):
        train(config, run_dir=tmp_path / "run", progress=False)


def test_settings_and_random_state_are_left_alone(tiny_run: TrainConfig, tmp_path: Path) -> None:
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    threads = torch.get_num_threads()
    train(replace(tiny_run, steps=1), run_dir=tmp_path, progress=False)
    assert torch.equal(torch.rand(3), expected)
    assert torch.get_num_threads() == threads


def test_a_folder_without_a_run_is_named(tmp_path: Path, tiny_run: TrainConfig) -> None:
    with pytest.raises(ConfigError, match="no configuration at"):
        load_run(tmp_path)
    config = replace(tiny_run, model=replace(tiny_run.model, num_classes=3))
    save_config(config, tmp_path / "config.json")
    (tmp_path / "widths.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"neither model\.pt nor a checkpoint"):
        load_run(tmp_path)
    (tmp_path / "run.json").write_text('{"result": {"ap": 1}}')
    (tmp_path / "model.pt").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"cannot read weights from .*model\.pt"):
        load_run(tmp_path)


_FIXED_REGIONS = """
    import torch
    from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
    from torchvision.models.detection.rpn import RegionProposalNetwork

    def first_ones(self, labels):
        # Always the same number of samples in an image, so a mean over ranks is a mean over images.
        positive, negative = [], []
        for one in labels:
            found = torch.where(one >= 1)[0][: int(self.batch_size_per_image * 0.5)]
            rest = torch.where(one == 0)[0][: self.batch_size_per_image - len(found)]
            assert len(found) + len(rest) == self.batch_size_per_image
            positive.append(torch.zeros_like(one, dtype=torch.uint8).index_fill_(0, found, 1))
            negative.append(torch.zeros_like(one, dtype=torch.uint8).index_fill_(0, rest, 1))
        return positive, negative

    def grid(self, proposals, objectness, image_shapes, num_anchors_per_level):
        corners = torch.tensor([[x, y] for x in range(0, 48, 8) for y in range(0, 48, 8)])
        boxes = torch.cat([corners, corners + 16], dim=1).float()
        return [boxes for _ in image_shapes], [torch.ones(len(boxes)) for _ in image_shapes]

    BalancedPositiveNegativeSampler.__call__ = first_ones
    RegionProposalNetwork.filter_proposals = grid
    result = engine.train(config, run_dir=folder, seed=5, progress=False)
"""


@pytest.mark.dist
@pytest.mark.slow
def test_two_ranks_have_the_losses_of_one(tiny_run: TrainConfig, tmp_path: Path) -> None:
    """GroupNorm and fixed proposals: what is left is the arithmetic of sharing a batch."""
    model = replace(tiny_run.model, norm="group", roi_batch=16)
    config = replace(tiny_run, model=model, clip_norm=1.0)
    folders = [tmp_path / "one", tmp_path / "two"]
    for processes, folder in enumerate(folders, 1):
        done = _in_another_process(folder, config, _FIXED_REGIONS, processes)
        assert done.returncode == 0, done.stderr[-3000:]
    one, two = (_losses(folder) for folder in folders)
    assert len(one) == len(two) == 6
    for first, second in zip(one, two, strict=True):
        assert first.keys() == second.keys()
        for name, value in first.items():
            assert second[name] == pytest.approx(value, rel=2e-3, abs=1e-5), (name, first["step"])
    results = [load_run(folder)[2] for folder in folders]
    assert all(isinstance(result, RunResult) for result in results)
    assert load_config(TrainConfig, folders[1] / "config.json").model.norm == "group"
    counts = [_rows_of_checkpoint(folder) for folder in folders]
    assert counts[1] == counts[0]


def _rows_of_checkpoint(folder: Path) -> set[str]:
    saved = checkpoint.load_checkpoint(folder)
    assert saved is not None
    assert saved["step"] == 6
    return set(saved["tracker"]["layers"])


def test_the_data_of_a_run_is_the_data_of_its_configuration(
    run_dir: Path, tiny_run: TrainConfig
) -> None:
    _, config, _ = load_run(run_dir)
    data = load_data(config.data)
    assert len(data.train) == tiny_run.data.mini.train


def test_multi_scale_draws_from_the_sizes(
    tiny_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = replace(tiny_run.model, train_sizes=(32, 48), max_size=96, norm="group")
    config = replace(tiny_run, model=model)
    sizes: list[int] = []
    build = engine.build_model

    def watched(*arguments: object) -> object:
        model = build(*arguments)
        model.backbone.register_forward_pre_hook(
            lambda module, inputs: sizes.append(inputs[0].shape[-1]) if module.training else None
        )
        return model

    monkeypatch.setattr(engine, "build_model", watched)
    train(replace(config, batch_size=1, steps=12), run_dir=tmp_path, progress=False)
    assert set(sizes) == {32, 64}, "48 is padded to 64"
    assert len(sizes) == 12
