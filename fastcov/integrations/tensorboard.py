"""TensorBoard: scalars of every layer, and pictures of the spectra."""

from typing import Any

import fastcov


def write_tensorboard(
    writer: Any, tracker: fastcov.Tracker, step: int, *, figures: bool = False
) -> None:
    """Scalars of a tracker's summary in TensorBoard, one group a measure.

    Args:
        writer: ``torch.utils.tensorboard.SummaryWriter``, or any object with the same
            ``add_scalar`` and ``add_figure``.
        tracker: Tracker, from :func:`fastcov.track`.
        step: Global step.
        figures: True draws all spectra, and demand against width; needs matplotlib.

    Example:
        >>> import tempfile, torch
        >>> from torch.utils.tensorboard import SummaryWriter
        >>> model = torch.nn.Linear(4, 3)
        >>> tracker = fastcov.track(model, include="*", rows="all")
        >>> _ = model(torch.randn(64, 4))
        >>> with tempfile.TemporaryDirectory() as folder, SummaryWriter(folder) as writer:
        ...     write_tensorboard(writer, tracker, step=1)
    """
    summary = tracker.summary()
    for key, value in summary.items():
        layer, _, measure = key.rpartition("/")
        writer.add_scalar(f"fastcov {measure}/{layer}", value, step)
    spectra = summary.spectra
    if figures and spectra:
        from fastcov.show.figures import free_axes, spectra_grid
        from fastcov.show.plot import plot_demand

        demand = plot_demand(spectra, free_axes(len(spectra)))
        writer.add_figure("fastcov/demand", demand.figure, step, close=False)
        writer.add_figure("fastcov/spectra", spectra_grid(spectra), step, close=False)
