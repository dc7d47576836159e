"""The Hugging Face callback where trainings resume, fail, are searched or log often."""

from __future__ import annotations

import json
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

import fastcov
from fastcov.integrations import runs
from fastcov.integrations.transformers import FastcovCallback

BATCH = 4


class Points(Dataset[dict[str, Any]]):
    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"inputs": torch.randn(6), "labels": torch.tensor(index % 2)}


class Classifier(nn.Module):
    """Small enough that a Trainer is what takes the time; ``on_call`` may break a step off."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 5), nn.Linear(5, 2)
        self.on_call: Callable[[Tensor], None] | None = None

    def forward(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        if self.on_call is not None and self.training:
            self.on_call(inputs)
        logits = self.head(self.body(inputs).relu())
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def _trainer(
    folder: Path, *callbacks: TrainerCallback, model: nn.Module | None = None, **options: Any
) -> Trainer:
    torch.manual_seed(0)
    own = {"model_init": options.pop("model_init", None)}
    arguments: dict[str, Any] = {
        "per_device_train_batch_size": BATCH,
        "max_steps": 4,
        "save_steps": 2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
    }
    return Trainer(
        None if own["model_init"] else model or Classifier(),
        TrainingArguments(output_dir=str(folder), **{**arguments, **options}),
        train_dataset=Points(),
        eval_dataset=Points(),
        callbacks=list(callbacks),
        **own,
    )


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _tracker(callback: FastcovCallback) -> fastcov.Tracker:
    assert callback.tracker is not None
    return callback.tracker


OPTUNA = """
class TrialPruned(Exception):
    pass

class trial:
    class BaseTrial:
        pass

class Trial(trial.BaseTrial):
    def __init__(self, number):
        self.number, self.params = number, {"learning_rate": 0.1 / (number + 1)}

class Study:
    def optimize(self, objective, n_trials, **_):
        for number in range(n_trials):
            self.best_trial = Trial(number)
            self.best_trial.value = objective(self.best_trial)

    def _is_multi_objective(self):
        return False

def create_study(**_):
    return Study()
"""


@pytest.fixture
def optuna(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Stand-in that asks for trials in a row."""
    (tmp_path / "site" / "optuna").mkdir(parents=True)
    (tmp_path / "site" / "optuna" / "__init__.py").write_text(OPTUNA)
    with monkeypatch.context() as patch:
        patch.syspath_prepend(tmp_path / "site")
        yield
        patch.delitem(__import__("sys").modules, "optuna", raising=False)


@pytest.mark.usefixtures("optuna")
@pytest.mark.parametrize("name", [None, lambda trial: f"try/{trial.number}"], ids=["run", "named"])
def test_trials_of_a_search_are_stored_apart(tmp_path: Path, name: Any) -> None:
    counts = []

    class Counts(TrainerCallback):
        def on_train_end(self, *_: Any, **__: Any) -> None:
            counts.append(_tracker(callback).count("head"))

    callback = FastcovCallback(rows="all", snapshot_every=2, out=tmp_path / "spectra")
    trainer = _trainer(tmp_path / "out", callback, Counts(), model_init=Classifier)
    trainer.hyperparameter_search(
        backend="optuna",
        n_trials=2,
        direction="minimize",
        hp_space=lambda trial: trial.params,
        hp_name=name,
        compute_objective=lambda metrics: metrics["eval_loss"],
    )
    assert counts == [4 * BATCH] * 2
    for number in range(2):
        run = "run-{}" if name is None else "try/{}"
        checkpoint = tmp_path / "out" / run.format(number) / "checkpoint-4"
        stored = torch.load(checkpoint / "fastcov.pt", weights_only=True)
        assert stored["steps"] == 4
        history = fastcov.load_history(tmp_path / "spectra" / run.format(number))
        assert history.steps() == [2, 4]


def test_a_training_continues_from_any_folder(tmp_path: Path) -> None:
    _trainer(tmp_path / "first", FastcovCallback(rows="all")).train()
    checkpoint = tmp_path / "first" / "checkpoint-4"
    callback = FastcovCallback(rows="all")
    _trainer(tmp_path / "second", callback, max_steps=6).train(str(checkpoint))
    assert _tracker(callback).steps == 6
    assert _tracker(callback).count("head") == 6 * BATCH
    callback = FastcovCallback(rows="all")
    _trainer(tmp_path / "second", callback, max_steps=8).train(True)  # from 6, the last there
    assert _tracker(callback).count("head") == 8 * BATCH


def test_a_checkpoint_without_statistics_is_said(tmp_path: Path) -> None:
    _trainer(tmp_path, save_only_model=True).train()
    callback = FastcovCallback(rows="all")
    with pytest.warns(UserWarning, match=r"resumes at step 2, but .*checkpoint-2.*holds no stat"):
        _trainer(tmp_path, callback).train(str(tmp_path / "checkpoint-2"))
    assert _tracker(callback).count("head") == 2 * BATCH


def test_a_file_that_cannot_be_read_is_named_and_leaves_no_hook(tmp_path: Path) -> None:
    _trainer(tmp_path, FastcovCallback(rows="all", include="head")).train()
    stored = tmp_path / "checkpoint-2" / "fastcov.pt"
    model = Classifier()
    trainer = _trainer(tmp_path, FastcovCallback(rows="all", include="body"), model=model)
    with pytest.raises(ValueError, match="layers that are not tracked here: head"):
        trainer.train(str(stored.parent))
    assert not _hooks(model)
    stored.write_bytes(stored.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"fastcov\.pt cannot be read .*: restore it, or delete"):
        trainer.train(str(stored.parent))


def _interrupt(model: Classifier, error: BaseException, at: int) -> None:
    calls = iter(range(10**6))

    def on_call(_: Tensor) -> None:
        if next(calls) == at:
            raise error

    model.on_call = on_call


@pytest.mark.parametrize("kind", ["out of memory", "Ctrl-C"])
def test_what_an_abandoned_training_left_is_closed(tmp_path: Path, kind: str) -> None:
    seen: list[fastcov.Tracker] = []

    class Trackers(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            if _tracker(callback) not in seen:
                seen.append(_tracker(callback))

    model = Classifier()
    callback = FastcovCallback(rows="all", snapshot_every=1, out=tmp_path / "spectra")
    memory = kind == "out of memory"
    trainer = _trainer(tmp_path, callback, Trackers(), model=model, auto_find_batch_size=memory)
    with pytest.warns(UserWarning, match="starts anew after a run that did not end: its 2 snap"):
        if memory:
            _interrupt(model, RuntimeError("CUDA out of memory."), at=2)
        else:
            _interrupt(model, KeyboardInterrupt(), at=2)
            with pytest.raises(KeyboardInterrupt):
                trainer.train()
        trainer.train()
    old, new = seen
    assert old.steps == 2
    assert new.steps == 4
    assert new.count("head") == 4 * trainer._train_batch_size
    assert fastcov.load_history(tmp_path / "spectra").steps() == [1, 2, 3, 4]
    assert not _hooks(model)


def test_a_run_is_not_appended_to_another(tmp_path: Path) -> None:
    model = Classifier()
    options = {"rows": "all", "snapshot_every": 2, "out": tmp_path / "spectra"}
    callback = FastcovCallback(**options)
    trainer = _trainer(tmp_path, callback, model=model)
    trainer.train()
    for again in (trainer, _trainer(tmp_path, FastcovCallback(**options), model=model)):
        with pytest.raises(ValueError, match=r"holds 2 snapshots of another run, up to step 4"):
            again.train()
        assert not _hooks(model)
    assert fastcov.load_history(tmp_path / "spectra").steps() == [2, 4]


class Blocked:
    """Eigenvalues that come when ``free`` is set; the training itself must set it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.free = threading.Event()
        self.threads: set[threading.Thread] = set()
        solve = fastcov.ops.eigvalsh

        def eigvalsh(matrices: Any) -> Any:
            self.threads.add(threading.current_thread())
            assert self.free.wait(120), "the training waits for the spectra"
            return solve(matrices)

        monkeypatch.setattr(fastcov.ops, "eigvalsh", eigvalsh)


@pytest.mark.parametrize("room", [runs.ROOM_BYTES, 1], ids=["room", "none"])
def test_the_training_waits_for_no_spectrum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: int
) -> None:
    monkeypatch.setattr(runs, "ROOM_BYTES", room)
    blocked = Blocked(monkeypatch)
    logged: list[tuple[int, float]] = []

    class AtTheEnd(TrainerCallback):
        def on_epoch_end(self, *_: Any, **__: Any) -> None:
            assert not logged
            blocked.free.set()

    callback = FastcovCallback(
        lambda summary, step: logged.append((step, summary["head/rows"])), log_every=1, rows="all"
    )
    trainer = _trainer(tmp_path, callback, AtTheEnd())
    is_full = room == 1
    said: AbstractContextManager[Any] = nullcontext()
    if is_full:
        said = pytest.warns(UserWarning, match=r"no summary of step 2: .*raise log_every")
    with warnings.catch_warnings(), said:
        if not is_full:
            warnings.simplefilter("error", UserWarning)
        trainer.train()
    assert logged == [(step, step * BATCH) for step in ([1] if is_full else [1, 2, 3, 4])]
    assert threading.main_thread() not in blocked.threads


def test_summaries_go_to_reporters_and_the_folder_not_to_the_log_history(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = FastcovCallback(log_every=2, rows="all", out=tmp_path / "spectra")
    trainer = _trainer(tmp_path, callback, report_to="tensorboard")
    trainer.train()
    assert "train_loss" in trainer.state.log_history[-1]
    state = (tmp_path / "checkpoint-4" / "trainer_state.json").read_text()
    assert "head" not in state
    assert [entry["step"] for entry in json.loads(state)["log_history"]] == [1, 2, 3, 4]
    events = EventAccumulator(str(tmp_path / "events")).Reload()
    rows = events.Scalars("train/fastcov/head/rows")
    assert [(event.step, event.value) for event in rows] == [(2, 2 * BATCH), (4, 4 * BATCH)]
    history = fastcov.load_history(tmp_path / "spectra")
    assert history.steps() == [2, 4]
    assert history[-1].spectra["head"].dim() == _tracker(callback).summary()["head/dim"]


def test_nobody_who_listens_costs_no_spectrum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fastcov.ops, "eigvalsh", None)
    callback = FastcovCallback(log_every=1, rows="all")
    _trainer(tmp_path, callback).train()
    assert _tracker(callback).count("head") == 4 * BATCH


def test_a_checkpoint_is_whole_before_it_is_sent_to_the_hub(tmp_path: Path) -> None:
    sent = []

    class Pushing(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
            self.callback_handler.on_push_begin(self.args, self.state, self.control)
            sent.append((Path(checkpoint_folder) / "fastcov.pt").is_file())

    trainer = _trainer(tmp_path, FastcovCallback(rows="all"))
    trainer.__class__ = Pushing
    trainer.args.push_to_hub = True
    trainer.train()
    assert sent == [True, True]


def test_two_callbacks_of_one_trainer_keep_apart(tmp_path: Path) -> None:
    def callbacks() -> list[FastcovCallback]:
        return [FastcovCallback(rows="all", include=layer) for layer in ("body", "head")]

    _trainer(tmp_path, *callbacks()).train()
    resumed = callbacks()
    _trainer(tmp_path, *resumed, max_steps=6).train(True)
    assert _tracker(resumed[0]).count("body") == _tracker(resumed[1]).count("head") == 6 * BATCH


def test_a_folder_that_is_gone_is_a_warning(tmp_path: Path) -> None:
    class Elsewhere(Trainer):
        def _save_checkpoint(self, *_: Any, **__: Any) -> None:
            """Writes nothing."""

    trainer = _trainer(tmp_path, FastcovCallback(rows="all"))
    trainer.__class__ = Elsewhere
    with pytest.warns(UserWarning, match=r"step 2 are not stored .*no such checkpoint"):
        trainer.train()
    assert not (tmp_path / "checkpoint-2").exists()  # else the Trainer would resume from it


@pytest.mark.parametrize("name", ["log_every", "snapshot_every"])
@pytest.mark.parametrize("value", [0, -1, 2.5, True, "10"])
def test_numbers_of_steps_are_checked_at_once(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a number of steps.*{value!r}"):
        FastcovCallback(**{name: value})
