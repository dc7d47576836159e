"""Speed of a run, from a clock that a test turns."""

from __future__ import annotations

import pytest
import torch

from fastcov_detection.train import logbook as module
from fastcov_detection.train.logbook import Speed, progress_note


def test_figures_of_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])

    def batches() -> object:
        for number in range(4):
            now[0] += 1.0  # a second to load
            yield number

    speed = Speed(16, torch.device("cpu"))
    for number in speed.watch(batches()):
        now[0] += 3.0  # three to compute
        if number == 1:
            speed.pause(5.0)
            now[0] += 5.0  # an evaluation
    found = speed.since(steps_left=10)
    assert found == {"images_per_s": 4.0, "data_share": 0.25, "eta_s": 40.0}
    text = progress_note({"loss": 1.5, "loss_classifier": 1.0, "grad_norm": 3.0}, 0.02, found)
    assert text == ("loss 1.500 (classifier 1.00), lr 0.02, 4.0 images/s, data 25 %, 0:00:40 left")
    now[0] += 2.0
    assert speed.since(0)["eta_s"] == 0.0
