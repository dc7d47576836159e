"""Fréchet distance of two sets of images (FID) from running covariances, beside torchmetrics."""

import time

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance

import fastcov

torch.manual_seed(0)
torch.set_num_threads(1)
channels = 512
# In earnest Inception's 2048 features; here a small random network that needs no download.
features = nn.Sequential(
    nn.Conv2d(3, 64, 5, 2, 2), nn.ReLU(), nn.Conv2d(64, channels, 3, 2, 1), nn.ReLU(),
    nn.AdaptiveAvgPool2d(1), nn.Flatten(),
).eval()  # fmt: skip
real = [torch.rand(64, 3, 32, 32) for _ in range(20)]
fake = [torch.rand(64, 3, 32, 32) ** 1.2 for _ in range(20)]


def distance(one: fastcov.CovarianceState, other: fastcov.CovarianceState) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2)), by symmetric eigenvalues alone."""
    s1, s2 = (state.covariance(centered=True, correction=1) for state in (one, other))
    values, vectors = fastcov.ops.eigh(s1)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    # S1 S2 has the eigenvalues of the symmetric S1^(1/2) S2 S1^(1/2).
    cross = fastcov.ops.eigvalsh(root @ s2 @ root).clamp(min=0).sqrt().sum()
    return float((one.mean() - other.mean()).square().sum() + s1.trace() + s2.trace() - 2 * cross)


with torch.no_grad():
    rows = {
        name: [features(batch) for batch in images]
        for name, images in (("real", real), ("fake", fake))
    }

start = time.perf_counter()
states = {name: fastcov.CovarianceState(channels) for name in rows}
for name, batches in rows.items():
    for batch in batches:
        states[name].update(batch)
updated = time.perf_counter()
ours = distance(states["real"], states["fake"])
ours_s = updated - start, time.perf_counter() - updated

metric = FrechetInceptionDistance(nn.Identity(), normalize=True, input_img_size=(channels,))
start = time.perf_counter()
for name, batches in rows.items():
    for batch in batches:
        metric.update(batch, real=name == "real")
updated = time.perf_counter()
metric.orig_dtype = torch.float64  # its result would be rounded to the features' float32
theirs = float(metric.compute())
theirs_s = updated - start, time.perf_counter() - updated

print("               updates   distance")
print(f"fastcov      {1e3 * ours_s[0]:6.0f} ms  {1e3 * ours_s[1]:6.0f} ms   {ours:.6f}")
print(f"torchmetrics {1e3 * theirs_s[0]:6.0f} ms  {1e3 * theirs_s[1]:6.0f} ms   {theirs:.6f}")
print(f"differ by {abs(ours - theirs) / theirs:.0e} of the distance")
assert abs(ours - theirs) < 1e-4 * theirs
