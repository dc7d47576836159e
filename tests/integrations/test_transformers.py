"""The Hugging Face callback in real trainings of a model built from a config."""

from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastcov
from fastcov.integrations.transformers import FastcovCallback

TOKENS = 12


class Sentences(Dataset[dict[str, Any]]):
    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(0, 50, (count, TOKENS), generator=generator)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {"input_ids": self.ids[index], "labels": index % 2}


def _train(
    folder: Path, callback: FastcovCallback, steps: int, resume: bool | str = False
) -> Trainer:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    trainer = Trainer(
        BertForSequenceClassification(config),
        TrainingArguments(
            output_dir=str(folder),
            per_device_train_batch_size=4,
            max_steps=steps,
            logging_steps=2,
            save_steps=4,
            eval_strategy="steps",
            eval_steps=2,
            lr_scheduler_type="constant",  # the same for 6 and 8 steps
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
            seed=0,
        ),
        train_dataset=Sentences(64),
        eval_dataset=Sentences(8),
        callbacks=[callback],
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def test_counts_training_tokens_and_logs(tmp_path: Path) -> None:
    logged: list[tuple[int, float]] = []
    callback = FastcovCallback(
        lambda summary, step: logged.append((step, summary[f"{name}/rows"])),
        log_every=2,
        include="*.query",
        rows="all",
    )
    name = "bert.encoder.layer.1.attention.self.query"
    trainer = _train(tmp_path, callback, steps=4)
    tracker = callback.tracker
    assert tracker is not None
    assert tracker.steps == 4
    assert tracker.count(name) == 4 * 4 * TOKENS  # evaluation adds nothing
    assert logged == [(2, 2 * 4 * TOKENS), (4, 4 * 4 * TOKENS)]
    assert not any(module._forward_hooks for module in trainer.model.modules())


def test_a_resumed_training_continues(tmp_path: Path) -> None:
    seen: list[tuple[int, float]] = []

    def callback(folder: str) -> FastcovCallback:
        return FastcovCallback(
            lambda summary, step: seen.append((step, summary["classifier/rows"])),
            log_every=2,
            include="classifier",
            rows="all",
            snapshot_every=1,
            out=tmp_path / folder,
        )

    straight, resumed = callback("straight"), callback("resumed")
    _train(tmp_path / "s", straight, steps=8)
    _train(tmp_path / "r", callback("resumed"), steps=6)
    _train(tmp_path / "r", resumed, steps=8, resume=str(tmp_path / "r" / "checkpoint-4"))
    assert straight.tracker is not None
    assert resumed.tracker is not None
    assert resumed.tracker.count("classifier") == straight.tracker.count("classifier") == 32
    assert fastcov.load_history(tmp_path / "resumed").steps() == list(range(1, 9))
    assert (2, 8.0) in seen
    torch.testing.assert_close(
        resumed.tracker.covariance("classifier"),
        straight.tracker.covariance("classifier"),
        rtol=1e-4,
        atol=1e-8,
    )
