"""Widths that a ResNet-50 uses of those it has: ``python resnet50.py FOLDER_OF_IMAGES``.

Without a folder random weights and random images show that the script works, not what it finds.
"""

import sys

import torch
from torchvision.datasets import ImageFolder
from torchvision.models import ResNet50_Weights, resnet50

import fastcov

if len(sys.argv) > 1:  # subfolders of images, such as ImageNet's val/
    weights = ResNet50_Weights.IMAGENET1K_V2  # downloads 98 MB
    images = ImageFolder(sys.argv[1], weights.transforms())
    loader = torch.utils.data.DataLoader(images, batch_size=32, shuffle=True)
    batches, model = (batch for batch, _ in loader), resnet50(weights=weights)
else:
    torch.manual_seed(0)
    batches, model = (torch.randn(8, 3, 64, 64) for _ in range(2)), resnet50()

# A trained model is measured in evaluation mode, with every row.
model.eval()
with fastcov.track(model, where="input", rows="all", train_only=False) as tracker, torch.no_grad():
    for batch, _ in zip(batches, range(32), strict=False):
        model(batch)
    spectra = tracker.spectra()

print("input of                    channels  99 %   dof  share used")
used = {name: spectrum.dof() / len(spectrum.eigenvalues) for name, spectrum in spectra.items()}
for name in sorted(used, key=used.__getitem__):  # the widest for what they carry come first
    spectrum = spectra[name]
    channels = len(spectrum.eigenvalues)
    enough = "" if spectrum.count >= 16 * channels else "  too few rows"
    print(
        f"{name:<28}{channels:>8}{int(spectrum.rank_at(0.99)):>6}"
        f"{spectrum.dof():>6.0f}{used[name]:>11.0%}{enough}"
    )
assert len(spectra) > 40
