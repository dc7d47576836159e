"""The measuring passes of one search: each is made once and read from its file afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastcov import Spectrum
from fastcov.widths import find_rule
from fastcov_detection.config import ModelConfig, SearchConfig
from fastcov_detection.data.batches import mix_seed
from fastcov_detection.detector.build import build_model
from fastcov_detection.search.arms import Untrained
from fastcov_detection.search.engines import threads_per_run
from fastcov_detection.search.folder import measured_path
from fastcov_detection.search.measure import Images, measure_gradient_spectra, measure_spectra
from fastcov_detection.search.spectra import load_spectra, save_spectra
from fastcov_detection.train.folder import load_run


class Measurements:
    """Spectra of a search's networks, by name of the network and rule.

    Args:
        config: The search.
        folder: Its folder.
        model: Its detector, with the number of classes.
        images: Training images without augmentation.
        device: Where passes run.
        progress: Show bars.
    """

    def __init__(
        self,
        config: SearchConfig,
        folder: Path,
        model: ModelConfig,
        images: Images,
        device: torch.device,
        *,
        progress: bool,
    ) -> None:
        self.config, self.folder, self.model = config, folder, model
        self.images, self.device, self.progress = images, device, progress

    def trained(self, name: str, rule: str, find: Callable[[], Path]) -> dict[str, Spectrum]:
        """What a rule reads of a trained network; ``find`` gives a run's folder with weights."""
        return self._read(name, rule, lambda: load_run(find())[0])

    def untrained(self, rule: str, seed: int) -> dict[str, Spectrum]:
        """What a rule reads of the network that a seed's baseline run starts from."""
        return self._read(Untrained().name, rule, lambda: self._before_training(seed))

    def _before_training(self, seed: int) -> GeneralizedRCNN:
        with torch.random.fork_rng(devices=[]):
            # The engine's own seeding of a run's initial weights.
            torch.manual_seed(mix_seed(seed, 2))
            return build_model(self.model)

    def _read(
        self, name: str, rule: str, make: Callable[[], GeneralizedRCNN]
    ) -> dict[str, Spectrum]:
        path = measured_path(self.folder, name, rule)
        if not path.exists():
            save_spectra(self._measure(make(), rule), path)
        return load_spectra(path)

    def _measure(self, model: GeneralizedRCNN, rule: str) -> dict[str, Spectrum]:
        reads_features = find_rule(rule).reads == "features"
        measure = measure_spectra if reads_features else measure_gradient_spectra
        threads = torch.get_num_threads()
        # One small image at a time gains little from more threads, and waiting ones spin.
        torch.set_num_threads(min(threads, threads_per_run(self.config.jobs)))
        try:
            return measure(
                model.to(self.device),
                self.images,
                images=self.config.measure_images,
                vary=self.config.vary,
                progress=self.progress,
            )
        finally:
            torch.set_num_threads(threads)
