"""Kronecker factors (K-FAC) from a training's own steps, beside curvlinops' separate pass."""

import time

import torch
from curvlinops import KFACLinearOperator
from torch import nn

import fastcov

torch.manual_seed(0)
torch.set_num_threads(1)
model = nn.Sequential(
    nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
)
data = [(torch.randn(256, 128), torch.randint(10, (256,))) for _ in range(16)]
loss_fn = nn.CrossEntropyLoss()


def run_steps() -> None:
    """Forward and backward passes of a training; its optimizer would come here."""
    for inputs, labels in data:
        model.zero_grad()
        loss_fn(model(inputs), labels).backward()


run_steps()  # the first one pays for what others share
start = time.perf_counter()
run_steps()
plain_s = time.perf_counter() - start

start = time.perf_counter()
inputs = fastcov.track(model, where="input", rows="all")
gradients = fastcov.track(model, of="gradient", rows="all")
run_steps()
# The loss is a mean over the batch, K-FAC's gradients are those of single examples.
factors = {
    layer: (inputs.covariance(f"{layer}:in"), 256**2 * gradients.covariance(f"{layer}:grad"))
    for layer in ("0", "2", "4")
}
ours_s = time.perf_counter() - start
inputs.close()
gradients.close()

start = time.perf_counter()
params = [parameter for name, parameter in model.named_parameters() if "weight" in name]
operator = KFACLinearOperator(
    model, loss_fn, params, data, fisher_type="empirical", check_deterministic=False
)
operator.compute_kronecker_factors()
theirs_s = time.perf_counter() - start
saved = operator.state_dict()

print(f"steps alone              {1e3 * plain_s:6.0f} ms")
print(f"steps with fastcov       {1e3 * ours_s:6.0f} ms")
print(f"steps, then curvlinops   {1e3 * (plain_s + theirs_s):6.0f} ms")
for layer, (a, g) in factors.items():
    others = saved["input_covariances"][layer], saved["gradient_covariances"][layer]
    errors = [
        float((ours - theirs).abs().max() / ours.abs().max())
        for ours, theirs in zip((a, g), others, strict=True)
    ]
    print(f"layer {layer}: inputs agree to {errors[0]:.0e}, gradients to {errors[1]:.0e}")
    assert max(errors) < 1e-4

# What K-FAC does with them: the inverse of (A + d I) x (G + d I), applied to a gradient.
a, g = factors["2"]
damping = 1e-2
gradient = model[2].weight.grad.double()
left = torch.linalg.solve(g + damping * torch.eye(len(g), dtype=g.dtype), gradient)
step = torch.linalg.solve(a + damping * torch.eye(len(a), dtype=a.dtype), left.T).T
assert step.isfinite().all()
