"""RankMe of a self-supervised model while it trains: does the representation collapse?"""

import copy

import torch
from torch import nn

import fastcov

torch.set_num_threads(1)
torch.manual_seed(0)
encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32))
mix = torch.randn(16, 64)  # inputs lie in 16 of 64 directions


def views(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Two noisy views of the same inputs."""
    inputs = torch.randn(count, 16) @ mix
    return inputs + 0.3 * torch.randn(count, 64), inputs + 0.3 * torch.randn(count, 64)


def vicreg(a: torch.Tensor, b: torch.Tensor, spread: float) -> torch.Tensor:
    """Views agree; with spread above 0 every direction keeps its variance (arXiv 2105.04906)."""
    loss = nn.functional.mse_loss(a, b)
    for one in (a, b):
        covariance = one.T.cov()
        variances = covariance.diagonal()
        loss = loss + spread * torch.relu(1 - (variances + 1e-4).sqrt()).mean()
        loss = loss + 0.04 * spread * (covariance.square().sum() - variances.square().sum()) / 32
    return loss


def train(spread: float) -> list[float]:
    """RankMe of the embedding after each part of the training."""
    model = copy.deepcopy(encoder)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    tracker = fastcov.track(model, include=["2"], rows="all")
    ranks = []
    for _ in range(4):
        tracker.reset()  # this part alone, not the mean over the training
        for _ in range(50):
            a, b = views(256)
            loss = vicreg(model(a), model(b), spread)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        ranks.append(tracker.spectrum("2").rankme())
    tracker.close()
    return ranks


def rankme_of_rows(rows: torch.Tensor) -> float:
    """RankMe as its paper computes it: an SVD of embeddings kept in memory."""
    shares = torch.linalg.svdvals(rows.double())
    shares = shares / shares.sum()
    return float(torch.exp(-(shares * shares.log()).sum()))


for name, spread in (("agreement alone", 0.0), ("VICReg", 1.0)):
    print(f"{name:<16}", " ".join(f"{rank:5.1f}" for rank in train(spread)), "of 32")

state = fastcov.CovarianceState(32)
rows = encoder(views(2048)[0]).detach()
state.update(rows)
ours, theirs = state.spectrum().rankme(), rankme_of_rows(rows)
print(f"the same rows: {ours:.4f}, by an SVD of all of them {theirs:.4f}")
assert abs(ours - theirs) < 1e-3 * theirs
