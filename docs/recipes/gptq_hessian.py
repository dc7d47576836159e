"""Hessians for GPTQ of every Linear layer in one pass, beside the usual sum in hooks."""

import time

import torch
from torch import nn

import fastcov

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(256, 512), nn.GELU(), nn.Linear(512, 256)).eval()
batches = [torch.randn(8, 128, 256) for _ in range(16)]  # calibration: batch, tokens, channels

start = time.perf_counter()
with (
    fastcov.track(model, where="input", rows="all", train_only=False) as tracker,
    torch.no_grad(),
):
    for batch in batches:
        model(batch)
    hessians = {name: 2 * tracker.covariance(name) for name in tracker.names()}
ours_s = time.perf_counter() - start

# As GPTQ's own code sums it: H <- H n/(n+m) + 2/(n+m) X^T X, in float32.
sums = {"0:in": torch.zeros(256, 256), "2:in": torch.zeros(512, 512)}
counts = dict.fromkeys(sums, 0)


def add(name: str):
    def hook(module: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        rows = inputs[0].flatten(0, -2)
        total = counts[name] + len(rows)
        sums[name] *= counts[name] / total
        rows = (2 / total) ** 0.5 * rows
        sums[name] += rows.T @ rows
        counts[name] = total

    return hook


handles = [model[index].register_forward_hook(add(f"{index}:in")) for index in (0, 2)]
start = time.perf_counter()
with torch.no_grad():
    for batch in batches:
        model(batch)
usual_s = time.perf_counter() - start
for handle in handles:
    handle.remove()

print(f"fastcov      {1e3 * ours_s:6.1f} ms")
print(f"GPTQ's sums  {1e3 * usual_s:6.1f} ms")
for name, hessian in hessians.items():
    difference = float((hessian - sums[name]).abs().max() / hessian.abs().max())
    print(f"{name}: differ by {difference:.1e} of the largest entry")
    assert difference < 1e-5

# What GPTQ does with it: damping, inverse, Cholesky factor. In float64 it does not fail.
hessian = hessians["2:in"]
damped = hessian + 0.01 * hessian.diagonal().mean() * torch.eye(len(hessian), dtype=hessian.dtype)
factor = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
assert factor.isfinite().all()
