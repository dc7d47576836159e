"""Repeated calls read by one operator, against the same trainings read call by call."""

from __future__ import annotations

import pickle
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.ops import backend

SIZES = [(2, 3, 6, 6), (4, 3, 8, 8), (1, 3, 5, 7)]
DTYPES = [torch.float32, torch.float64, torch.bfloat16]


class Network(nn.Module):
    """Layers that share inputs, until one is called once more or gets another tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.left = nn.Conv2d(6, 8, 3, padding=1)
        self.right = nn.Conv2d(6, 5, 3)
        self.head = nn.Linear(8, 4)
        self.turn = ""

    def forward(self, image: Tensor) -> Tensor:
        stem = self.norm(self.stem(image)).relu()
        if self.turn == "twice":
            self.left(stem * 2)
        left = self.left(stem)
        self.right(stem + 1 if self.turn == "apart" else stem)
        return self.head(left.flatten(2).mean(-1))


class Training:
    """Steps of a small network with things between them that change what a call is like."""

    def __init__(self, seed: int, **options: Any) -> None:
        torch.manual_seed(seed)
        self.draw = random.Random(seed)
        self.model = Network()
        self.options = options
        self.tracker = fastcov.track(self.model, include="*", exclude="", **options)
        self.size, self.dtype = SIZES[1], DTYPES[0]
        self.saved = self.tracker.state_dict()

    def other_size(self) -> None:
        self.size = self.draw.choice(SIZES)

    def other_dtype(self) -> None:
        self.dtype = self.draw.choice(DTYPES)
        self.model.to(self.dtype)

    def other_layout(self) -> None:
        formats = [torch.channels_last, torch.contiguous_format]
        self.model.to(memory_format=self.draw.choice(formats))

    def other_turn(self) -> None:
        self.model.turn = self.draw.choice(["", "", "twice", "apart"])

    def other_mode(self) -> None:
        self.model.train(not self.model.training)

    def reset(self) -> None:
        self.tracker.reset()

    def save(self) -> None:
        self.saved = self.tracker.state_dict()

    def load(self) -> None:
        self.tracker.load_state_dict(self.saved)

    def merge(self) -> None:
        if "decay" not in self.options:
            self.tracker.merge(pickle.loads(pickle.dumps(self.tracker)))

    def step_in_inference_mode(self) -> None:
        with torch.inference_mode():
            self.step()

    def step_with_nan(self) -> None:
        self.step(torch.nan)

    def step(self, value: float = 1.0) -> None:
        image = torch.randn(self.size).to(self.dtype)
        image[0, 0, 0, 0] *= value
        self.model(image)

    def run(self) -> None:
        events: list[Callable[[], None]] = [
            *(self.other_size, self.other_dtype, self.other_layout, self.other_turn),
            *(self.other_mode, self.reset, self.save, self.load, self.merge),
            *(self.step_in_inference_mode, self.step_with_nan),
        ]
        for _ in range(60):
            if self.draw.random() < 0.4:
                self.draw.choice(events)()
            self.step()

    def outcome(self) -> dict[str, Any]:
        counters = {
            name: (reader.total_calls, reader.offered_rows, reader.cursor.numbers[:8].tolist())
            for name, reader in self.tracker.watcher.taps.layers.items()
        }
        return {
            **self.tracker.state_dict(),
            "counters": counters,
            "notes": dict(self.tracker.watcher.taps.notes),
        }


def differences(one: Any, other: Any, place: str = "") -> list[str]:
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        return [at for key in one for at in differences(one[key], other[key], f"{place}/{key}")]
    if isinstance(one, Tensor):
        return [] if torch.equal(one.nan_to_num(), other.nan_to_num()) else [place]
    return [] if one == other else [place]


@pytest.mark.parametrize("where", ["output", "input", "both"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": "all"},
        {"rows": 0.3},
        {"rows": 7},
        {"decay": 0.9},
        {"rows": "all", "decay": 0.9},
        {"weighting": "image"},
        {"rows": 0.3, "weighting": "image", "decay": 0.8},
        {"rows": "all", "weighting": "image"},
    ],
    ids=str,
)
def test_the_same_training_leaves_the_same_statistics(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], where: str
) -> None:
    assert backend.backends()["cpu"].active  # compiled code is part of what is tested
    outcomes = []
    for machine in (backend.Machine(), backend.Pretended(backend.HOST)):
        monkeypatch.setattr(backend, "active", machine)
        training = Training(seed=len(options) + len(where), where=where, **options)
        training.run()
        outcomes.append(training.outcome())
        training.tracker.close()
    assert any(any(counts[2]) for counts in outcomes[0]["counters"].values())
    assert not differences(*outcomes)
