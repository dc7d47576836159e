"""Weights & Biases: scalars of every layer, and pictures of the spectra."""

from typing import Any

import fastcov

try:
    import wandb
except ImportError as error:
    raise ImportError("wandb is missing: pip install 'fastcov-torch[integrations]'") from error


def log_wandb(
    run: Any, tracker: fastcov.Tracker, step: int | None = None, *, figures: bool = False
) -> None:
    """Logs the summary of a tracker under ``fastcov/``.

    Args:
        run: What ``wandb.init`` returned.
        tracker: Of :func:`fastcov.track`.
        step: Global step; None leaves it to wandb.
        figures: Whether to draw all spectra, and demand against width; needs matplotlib.
    """
    values: dict[str, Any] = {f"fastcov/{key}": v for key, v in tracker.summary().items()}
    spectra = tracker.spectra() if figures else {}
    if spectra:
        from fastcov.show.figures import free_axes, spectra_grid
        from fastcov.show.plot import plot_demand

        demand = plot_demand(spectra, free_axes(len(spectra)))
        values["fastcov/figures/demand"] = wandb.Image(demand.figure)
        values["fastcov/figures/spectra"] = wandb.Image(spectra_grid(spectra))
    run.log(values, step=step)
