"""Pictures of docs/pictures.md and README: ``make pictures``.

``python docs/pictures/make.py [FOLDER [STEPS]]``: a small residual network learns scikit-learn's
handwritten digits. Half a minute on one core, no download.
"""

import sys
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn

import fastcov
from fastcov.show.figures import png
from fastcov.show.plot import plot_demand, plot_dims, plot_ridges

SNAPSHOTS = (1, 2, 4, 8, 12, 18, 27, 40, 60, 90, 130, 190, 280, 400)
IMAGES = torch.from_numpy(load_digits().images).float()[:, None] / 16
LABELS = torch.from_numpy(load_digits().target)


class Block(nn.Module):
    """Residual block of two convolutions."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(after)
        self.conv2 = nn.Conv2d(after, after, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(after)
        self.skip = nn.Conv2d(before, after, 1, stride, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Features of the next stage."""
        hidden = torch.relu(self.norm1(self.conv1(images)))
        return torch.relu(self.norm2(self.conv2(hidden)) + self.skip(images))


def classifier() -> nn.Sequential:
    """Stem, five blocks and a head: about 0.6 M parameters."""
    widths, strides = (32, 32, 64, 64, 128, 128), (1, 2, 1, 2, 1)
    blocks = [
        Block(before, after, stride)
        for before, after, stride in zip(widths[:-1], widths[1:], strides, strict=True)
    ]
    network = nn.Sequential()
    network.add_module("stem", nn.Conv2d(1, 32, 3, padding=1))
    for number, block in enumerate(blocks, 1):
        network.add_module(f"block{number}", block)
    network.add_module("pool", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    network.add_module("head", nn.Linear(128, 10))
    return network


def learn(steps: int) -> fastcov.Tracker:
    """Tracker of the classifier's training, with a history of snapshots."""
    model = classifier()
    tracker = fastcov.track(model, rows="all", decay=0.8)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    for step in range(1, steps + 1):
        batch = torch.randint(len(IMAGES), (128,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(IMAGES[batch]), LABELS[batch]).backward()
        optimizer.step()
        if step in SNAPSHOTS:
            tracker.snapshot()
    return tracker


def axes(height: float) -> Axes:
    """Axes as wide as a page of the documentation, so that their type is legible on a telephone."""
    return Figure(figsize=(5.2, height), layout="constrained").add_subplot()


def main(folder: Path, steps: int) -> None:
    """Command line: writes every picture."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    tracker = learn(steps)
    history, spectra = tracker.history, tracker.spectra()
    pictures = {
        "ridges": plot_ridges(history, "block5.conv2", axes(4.4)),
        "dims": plot_dims(history, axes(4.2)),
        "demand": plot_demand(spectra, axes(3.8)),
    }
    for name, drawing in pictures.items():
        (folder / f"{name}.png").write_bytes(png(drawing))
        print(folder / f"{name}.png")


if __name__ == "__main__":
    arguments = sys.argv[1:]
    main(
        Path(arguments[0]) if arguments else Path(__file__).parent,
        int(arguments[1]) if len(arguments) > 1 else SNAPSHOTS[-1],
    )
