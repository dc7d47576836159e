"""How long one image takes: measured on every arm in turn, with nothing else running."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from contextlib import nullcontext

import torch
from torch import Tensor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastcov_detection.data.batches import to_float
from fastcov_detection.progress import progress_bar

_WARM_UP = 3


def measure_latency(
    models: Mapping[str, GeneralizedRCNN],
    image: Tensor,
    runs: int = 20,
    device: str | torch.device = "cpu",
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Median milliseconds of a forward pass in eval mode, for the same image.

    The models take turns, so that whatever slows the machine down for a while slows all of them.

    Args:
        models: By name; moved to the device and back to the CPU.
        image: Values in [0, 1], or pixels in eight bits. [3, H, W]
        runs: Timed passes of each model, after three that are not.
        device: Where the passes run.
        progress: Show a bar.

    Raises:
        ValueError: If ``runs`` is below 1.
    """
    if runs < 1:
        raise ValueError(f"latency_runs is {runs}; at least one pass must be timed")
    place = torch.device(device)
    finish = torch.cuda.synchronize if place.type == "cuda" else nullcontext
    seconds: dict[str, list[float]] = {name: [] for name in models}
    images = [to_float(image.to(place))]
    for model in models.values():
        model.to(place).eval()
    bar = progress_bar("measuring latency", _WARM_UP + runs, enabled=progress)
    with torch.inference_mode(), bar as advance:
        for turn in range(_WARM_UP + runs):
            for name, model in models.items():
                finish()
                start = time.perf_counter()
                model(images)
                finish()
                if turn >= _WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
            advance(1)
    for model in models.values():
        model.to("cpu")
    return {name: 1000 * statistics.median(taken) for name, taken in seconds.items()}
