"""Widths for a network of your own: measure, plan, build again; beside uniform scaling."""

import torch
from sklearn.datasets import load_digits
from torch import nn

import fastcov
from fastcov.widths import uniform_widths

torch.set_num_threads(1)
digits = load_digits()
images = torch.from_numpy(digits.images).float()[:, None] / 16
labels = torch.from_numpy(digits.target)
SPLIT, SEEDS = 1200, 3


# 1. A network whose widths are arguments.
def build(widths: dict[str, int]) -> nn.Sequential:
    """Three convolutions and a classifier."""
    stem, body, tail = widths["stem"], widths["body"], widths["tail"]
    return nn.Sequential(
        nn.Conv2d(1, stem, 3, padding=1), nn.ReLU(),
        nn.Conv2d(stem, body, 3, 2, padding=1), nn.ReLU(),
        nn.Conv2d(body, tail, 3, padding=1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(tail, 10),
    )  # fmt: skip


# 2. Cost of the widths: multiply-accumulates of one image.
def macs(widths: dict[str, int]) -> int:
    """MACs of the convolutions on maps of 64 and 16 positions, and of the classifier."""
    stem, body, tail = widths["stem"], widths["body"], widths["tail"]
    return 9 * (64 * stem + 16 * stem * body + 16 * body * tail) + 10 * tail


def train(widths: dict[str, int], seed: int) -> tuple[nn.Sequential, float]:
    """Trained network, and its accuracy on images that it has not seen."""
    torch.manual_seed(seed)
    model = build(widths)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for _ in range(300):
        batch = torch.randint(SPLIT, (64,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    with torch.no_grad():
        right = model(images[SPLIT:]).argmax(1) == labels[SPLIT:]
    return model, float(right.float().mean())


# 3. Spectra of the maps that the widths are about: what the next layer is given.
base = {"stem": 16, "body": 64, "tail": 64}
model, _ = train(base, seed=0)
model.eval()
with (
    fastcov.track(model, where="input", rows="all", train_only=False) as tracker,
    torch.no_grad(),
):
    model(images[:SPLIT])
    print(tracker.summary())

# 4. Groups: each width, and the tensors that have it. Here one each; blocks that are added up
#    share a width, and their members are averaged.
#    Multiples of 4 and not of 8, since the network is small; no map narrower than the ten classes.
members = {"stem": ("2:in",), "body": ("4:in",), "tail": ("8:in",)}
groups = [
    fastcov.WidthGroup(name, members[name], width=width, multiple=4, floor=12)
    for name, width in base.items()
]

# 5. Widths at no more than a third of the cost, and uniform scaling to the same cost.
budget = macs(base) / 3
plan = fastcov.suggest_widths(tracker.spectra(), groups, macs, budget)
uniform = uniform_widths(groups, macs, budget)
arms = {"measured": plan.widths, "uniform": uniform.widths}
scores = {name: [train(widths, seed)[1] for seed in range(SEEDS)] for name, widths in arms.items()}
for name, widths in arms.items():
    shown = " ".join(f"{score:.3f}" for score in scores[name])
    print(f"{name:<9} {widths} {macs(widths):>7,} MACs, accuracy {shown}")
differences = torch.tensor(scores["measured"]) - torch.tensor(scores["uniform"])
error = differences.std() / SEEDS**0.5
print(f"difference {differences.mean():+.3f} +- {error:.3f}, {SEEDS} paired seeds")
assert all(macs(widths) <= budget for widths in arms.values())
