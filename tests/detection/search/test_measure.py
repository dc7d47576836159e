from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov_detection.config import TrainConfig
from fastcov_detection.data.dataset import CocoDataset, load_data
from fastcov_detection.detector.build import build_model
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.search.measure import measure_spectra

ALL = ("backbone", "fpn", "heads")


@pytest.fixture
def images(tiny_run: TrainConfig) -> CocoDataset:
    return load_data(tiny_run.data, with_masks=True).train


@pytest.fixture
def model(tiny_run: TrainConfig) -> nn.Module:
    torch.manual_seed(0)
    config = replace(tiny_run.model, name="maskrcnn_resnet18_fpn", train_sizes=(32, 48))
    model = build_model(config, num_classes=11)
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.running_mean.normal_(std=0.1)
    return model


def test_every_member_of_every_group_gets_a_spectrum(model: nn.Module, images: CocoDataset) -> None:
    groups = width_groups(model, vary=ALL)
    spectra = measure_spectra(model, images, images=3, vary=ALL)
    assert list(spectra) == [member for group in groups for member in group.members]
    for group in groups:
        for member in group.members:
            assert spectra[member].eigenvalues.shape == (group.width,)
            assert spectra[member].count > 0
    assert set(measure_spectra(model, images, images=1)) < set(spectra)
    plan = fastcov.suggest_widths(
        spectra, groups, lambda widths: sum(w * w for w in widths.values())
    )
    assert plan.widths.keys() == {group.name for group in groups}


def test_the_spectrum_is_that_of_the_papers_covariance(
    model: nn.Module, images: CocoDataset
) -> None:
    """Float64 covariances of the same maps, each image weighing the same, norms standing still."""
    name = "backbone.body.layer2.1.conv1"
    maps: list[Tensor] = []
    layer = model.get_submodule(name)
    hook = layer.register_forward_pre_hook(lambda _, inputs: maps.append(inputs[0].clone()))
    spectra = measure_spectra(model, images, images=4, seed=2)
    hook.remove()
    assert [m.shape[0] for m in maps] == [1] * 4
    assert {m.shape[-1] for m in maps} == {8}, "multi-scale must be off"
    covariance = torch.zeros(maps[0].shape[1], maps[0].shape[1], dtype=torch.float64)
    for feature in maps:
        rows = feature[0].flatten(1).double()
        covariance += rows @ rows.T / rows.shape[1] / len(maps)
    expected = torch.linalg.eigvalsh(covariance).flip(0)
    found = spectra[f"{name}:in"].eigenvalues
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7 * float(expected[0]))


def test_measuring_changes_nothing(model: nn.Module, images: CocoDataset) -> None:
    model.train()
    model.backbone.body.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(11)
    expected = torch.rand(2)
    torch.manual_seed(11)
    first = measure_spectra(model, images, images=2, vary=ALL)
    assert torch.equal(torch.rand(2), expected)
    second = measure_spectra(model, images, images=2, vary=ALL)
    for name, spectrum in first.items():
        assert torch.equal(spectrum.eigenvalues, second[name].eigenvalues)
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert model.training
    assert not model.backbone.body.bn1.training
    assert model.transform.min_size == (32, 48, 64)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_seeds_choose_other_images_and_too_many_means_all(
    model: nn.Module, images: CocoDataset
) -> None:
    first, second = (measure_spectra(model, images, images=3, seed=s) for s in (0, 1))
    member = next(iter(first))
    assert not torch.equal(first[member].eigenvalues, second[member].eigenvalues)
    whole = [measure_spectra(model, images, images=n, seed=s) for n, s in ((12, 0), (500, 1))]
    one, other = (spectra[member].eigenvalues for spectra in whole)
    torch.testing.assert_close(one, other, rtol=0, atol=1e-6 * float(one[0]))
    assert whole[0][member].count == 12 * 16 * 16
    with pytest.raises(ValueError, match="images is 0"):
        measure_spectra(model, images, images=0)


def test_gradient_spectra_are_those_of_the_definition(
    model: nn.Module, images: CocoDataset
) -> None:
    """S and G from autograd's own gradients of the summed losses, map by map, in float64."""
    member = "backbone.body.layer2.1.conv1:in"
    maps: list[Tensor] = []

    def retain(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        inputs[0].retain_grad()
        maps.append(inputs[0])

    hook = model.get_submodule(member.removesuffix(":in")).register_forward_pre_hook(retain)
    found = measure_spectra(model, images, images=3, seed=2, reads="sensitivity")[member]
    hook.remove()
    assert len(maps) == 3
    covariance = weight = torch.zeros((), dtype=torch.float64)
    for feature in maps:
        rows = feature[0].detach().flatten(1).double()
        covariance = covariance + rows @ rows.T / rows.shape[1] / 3
        gradients = feature.grad[0].flatten(1).double()
        weight = weight + gradients @ gradients.T / 3
    assert found.count == sum(feature[0, 0].numel() for feature in maps)
    # G S is similar to S^1/2 G S^1/2.
    expected = torch.linalg.eigvals(weight @ covariance).real.sort(descending=True).values
    assert expected[0] > 0
    torch.testing.assert_close(
        found.eigenvalues, expected, rtol=1e-4, atol=1e-6 * float(expected[0])
    )


def test_a_branch_that_nothing_reads_has_full_features_and_no_demand(
    model: nn.Module, images: CocoDataset
) -> None:
    """Purpose of the rule: the last norm of a block may scale its branch to nothing."""
    block = model.backbone.body.layer2[1]
    member = "backbone.body.layer2.1.conv2:in"
    with torch.no_grad():
        block.bn2.weight.fill_(1e-4)
        block.bn2.bias.zero_()
    features = measure_spectra(model, images, images=3)
    felt = measure_spectra(model, images, images=3, reads="sensitivity")
    groups = width_groups(model)
    branch = next(group.name for group in groups if group.members == (member,))
    by_features = fastcov.widths.demand(features, groups, "dof")
    by_loss = fastcov.widths.demand(felt, groups, "gradient")
    width = next(group.width for group in groups if group.name == branch)
    assert by_features[branch] > 0.5 * width
    assert by_loss[branch] < 1e-3 * width
    assert by_loss["layer1"] > 1


def test_gradients_pass_frozen_layers_and_touch_no_parameter(
    model: nn.Module, images: CocoDataset
) -> None:
    expected = measure_spectra(model, images, images=2, vary=ALL, reads="sensitivity")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(11)
    drawn = torch.rand(2)
    torch.manual_seed(11)
    found = measure_spectra(model, images, images=2, vary=ALL, reads="sensitivity")
    assert torch.equal(torch.rand(2), drawn)
    assert list(found) == [member for g in width_groups(model, vary=ALL) for member in g.members]
    for name, spectrum in expected.items():
        torch.testing.assert_close(
            found[name].eigenvalues, spectrum.eigenvalues, rtol=1e-4, atol=1e-6 * spectrum.total
        )
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    with pytest.raises(ValueError, match="images is 0"):
        measure_spectra(model, images, images=0, reads="sensitivity")
