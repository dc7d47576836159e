"""Principal components and whitening of features that no memory holds, beside scikit-learn."""

import time

import torch
from sklearn.decomposition import PCA, IncrementalPCA

import fastcov

torch.manual_seed(0)
torch.set_num_threads(1)
channels, kept = 64, 8
batches = [torch.randn(1024, channels) * torch.logspace(0, -2, channels) + 3 for _ in range(10)]

start = time.perf_counter()
state = fastcov.CovarianceState(channels)
for rows in batches:  # only one batch needs to be in memory
    state.update(rows)
variances, components = state.directions(k=kept, centered=True, correction=1)
ours_s = time.perf_counter() - start

start = time.perf_counter()
incremental = IncrementalPCA(kept)
for rows in batches:
    incremental.partial_fit(rows.numpy())
incremental_s = time.perf_counter() - start

everything = torch.cat(batches)
start = time.perf_counter()
exact = PCA(kept, svd_solver="covariance_eigh").fit(everything.double().numpy())
exact_s = time.perf_counter() - start


def error(found) -> float:
    """Largest difference to PCA over all rows at once, relative to the largest variance."""
    difference = torch.as_tensor(found) - torch.as_tensor(exact.explained_variance_)
    return float(difference.abs().max() / variances[0])


overlap = (components.T @ torch.as_tensor(exact.components_).T).abs().diagonal().min()
white = (everything - state.mean()) @ state.whitening()
covariance = white.T.cov()
print(f"fastcov         {1e3 * ours_s:7.1f} ms, error {error(variances):.1e}")
print(
    f"IncrementalPCA  {1e3 * incremental_s:7.1f} ms, "
    f"error {error(incremental.explained_variance_):.1e}"
)
print(f"PCA, all rows   {1e3 * exact_s:7.1f} ms")
print(f"components agree to {1 - float(overlap):.0e}")
far = float((covariance - torch.eye(channels)).abs().max())
print(f"whitened covariance: the identity to {far:.0e}")

assert error(variances) < 1e-5
assert overlap > 0.999
