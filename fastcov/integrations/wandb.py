"""Weights & Biases: scalars of every layer, and pictures of the spectra."""

import warnings
from typing import Any

import fastcov

try:
    import wandb
except ImportError as error:
    raise ImportError("wandb is missing: pip install wandb") from error


def log_wandb(
    run: Any, tracker: fastcov.Tracker, step: int | None = None, *, figures: bool = False
) -> None:
    """Log of a tracker's summary under ``fastcov/``.

    Warns where ``step`` lies before a step that was logged: wandb drops such values.

    Args:
        run: Run, from ``wandb.init``.
        tracker: Tracker, from :func:`fastcov.track`.
        step: Global step; None leaves the step to wandb.
        figures: True draws all spectra, and demand against width; needs matplotlib.
    """
    summary = tracker.summary()
    values: dict[str, Any] = {f"fastcov/{key}": value for key, value in summary.items()}
    spectra = summary.spectra
    if figures and spectra:
        from fastcov.show.figures import free_axes, spectra_grid
        from fastcov.show.plot import plot_demand

        demand = plot_demand(spectra, free_axes(len(spectra)))
        values["fastcov/figures/demand"] = wandb.Image(demand.figure)
        values["fastcov/figures/spectra"] = wandb.Image(spectra_grid(spectra))
    if step is not None and step < run.step:
        warnings.warn(
            f"wandb drops the summary of step {step}, it stands at step {run.step}: log in order, "
            "or give step=None and the step as a value of its own",
            stacklevel=2,
        )
    run.log(values, step=step)
