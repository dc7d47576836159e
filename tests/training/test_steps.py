"""Steps in loops that are not a plain ``loss = model(x)``."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov


class Fragile(nn.Module):
    """Fails between two layers when told to."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.error: BaseException | None = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        if self.error is not None:
            raise self.error
        return self.second(x)


BATCH = torch.randn(10, 4)


def counts(tracker: fastcov.Tracker) -> list[int]:
    return [tracker.count(name) for name in tracker.names()]


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
def test_a_forward_that_fails_is_no_step(error: BaseException) -> None:
    model = Fragile()
    with fastcov.track(model, rows="all") as tracker:
        model(BATCH)
        model.error = error
        with pytest.raises(type(error)):
            model(BATCH)
        model.error = None
        assert tracker.steps == 1
        assert counts(tracker) == [20, 10]  # what it has brought stays
        model.eval()
        model(BATCH)  # validation after the failure
        assert counts(tracker) == [20, 10]
        model.train()
        model(BATCH)
    assert tracker.steps == 2
    assert counts(tracker) == [30, 20]


def test_parts_that_run_between_a_failure_and_the_next_step_are_not_read() -> None:
    model = Fragile()
    model.error = RuntimeError("out of memory")
    with fastcov.track(model, rows="all") as tracker:
        with pytest.raises(RuntimeError):
            model(BATCH)
        model.second(BATCH)
        model.error = None
        model(BATCH)
    assert counts(tracker) == [20, 10]


def test_a_retry_inside_the_except_block_is_a_step() -> None:
    model = Fragile()
    model.error = RuntimeError("out of memory")
    with fastcov.track(model, rows="all") as tracker:
        try:
            model(BATCH)
        except RuntimeError:
            model.error = None
            model(BATCH[:5])
    assert tracker.steps == 1
    assert counts(tracker) == [15, 5]


@pytest.mark.usefixtures("fresh_compiler")
def test_an_error_in_compiled_code_leaves_no_open_step() -> None:
    class Gathering(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, index: Tensor) -> Tensor:
            return self.second(self.first(x)[index])

    model = Gathering()
    tracker = fastcov.track(model, rows="all")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def run(x: Tensor, index: Tensor) -> Tensor:
        return model(x, index)

    run(BATCH, torch.arange(10))
    with pytest.raises(IndexError):
        run(BATCH, torch.arange(10) + 5)
    run(BATCH, torch.arange(10))
    assert tracker.steps == 2
    assert counts(tracker) == [30, 20]


def test_a_model_that_calls_itself_makes_one_step() -> None:
    class Tree(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.leaf, self.join = nn.Linear(4, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) == 1:
                return self.leaf(x)
            half = len(x) // 2
            return self.join(torch.cat([self(x[:half]), self(x[half:])], 1))

    model = Tree()
    with fastcov.track(model, rows="all", every=2) as tracker:
        for _ in range(3):
            model(torch.randn(8, 4))
    assert tracker.steps == 3
    assert counts(tracker) == [2 * 8, 2 * 7]


def test_generate_is_no_step_in_evaluation_mode_and_one_a_token_otherwise(cases: Any) -> None:
    model = cases["gpt2"].make()
    prompt = torch.ones(2, 3, dtype=torch.long)
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with fastcov.track(model, rows="all") as tracker:
        model.eval()
        model.generate(prompt, **options)
        assert tracker.steps == 0
        model.train()
        cases["gpt2"].loss(model, 0).backward()
    assert tracker.steps == 1
    assert tracker.count("transformer.h.0.mlp.c_fc") == 36
    model.eval()
    with fastcov.track(model, rows="all", train_only=False) as tracker:
        model.generate(prompt, **options)
    assert tracker.steps == 4
    assert tracker.count("transformer.h.0.mlp.c_fc") == 2 * (3 + 1 + 1 + 1)


def test_parts_of_a_model_that_is_never_called_whole() -> None:
    """A GAN in one container: its layers run, the container's forward does not."""
    model = nn.ModuleDict({"generator": nn.Linear(4, 4), "critic": nn.Linear(4, 1)})
    tracker = fastcov.track(model, rows="all")
    model["critic"](model["generator"](BATCH))
    text = str(tracker.summary())
    assert "its layers ran, but in no forward of the tracked module" in text
    with pytest.raises(ValueError, match="track the module that is called"):
        tracker.covariance("critic")
    with fastcov.track(model["critic"], rows="all") as critic:
        model["critic"](model["generator"](BATCH))
        model["critic"](BATCH)
    assert critic.steps == 2
    assert critic.count("") == 20


def test_forward_called_by_name_says_so(cases: Any) -> None:
    model = cases["vit"].make()
    tracker = fastcov.track(model, rows="all")
    model.forward(torch.randn(1, 3, 32, 32))
    assert "in no forward of the tracked module" in str(tracker.summary())


def test_gradient_accumulation_makes_a_step_of_every_forward(cases: Any) -> None:
    model = cases["vit"].make()
    with fastcov.track(model, rows="all") as whole:
        model(torch.randn(8, 3, 32, 32))
    with fastcov.track(model, rows="all") as parts:
        for part in torch.randn(8, 3, 32, 32).chunk(4):
            (model(part).sum() / 4).backward()
    assert (whole.steps, parts.steps) == (1, 4)
    assert whole.count("head") == parts.count("head") == 8


def test_validation_between_epochs_changes_nothing(cases: Any) -> None:
    case = cases["resnet"]

    def run(validate: bool) -> fastcov.Tracker:
        model = case.make()
        with fastcov.track(model, rows=0.5, include="layer1*") as tracker:
            for seed in range(2):
                case.loss(model, seed).backward()
                if validate:
                    model.eval()
                    with torch.inference_mode() if seed else torch.no_grad():
                        case.loss(model, 7)
                    model.train()
        return tracker

    plain, validated = run(False), run(True)
    for name in plain.names():
        torch.testing.assert_close(plain.covariance(name), validated.covariance(name))


def test_steps_in_inference_mode_and_then_in_training(cases: Any) -> None:
    """States born in inference mode can still be written in training."""
    case = cases["vit"]
    model = case.make()
    with fastcov.track(model, train_only=False, weighting="image", decay=0.9) as tracker:
        with torch.inference_mode():
            case.loss(model, 0)
            case.loss(model, 1)
        for seed in range(3):
            case.loss(model, seed).backward()
    assert tracker.steps == 5
    assert max(counts(tracker)) > 0


def test_exponential_average_and_its_validation_do_not_feed_the_tracker(cases: Any) -> None:
    case = cases["mobilenet"]
    model = case.make()
    tracker = fastcov.track(model, rows="all")
    average = torch.optim.swa_utils.AveragedModel(model)
    twin = copy.deepcopy(model)
    for seed in range(2):
        case.loss(model, seed).backward()
        average.update_parameters(model)
        case.loss(average, seed)
        case.loss(twin, seed)
    assert tracker.steps == 2
    assert tracker.count("classifier.1") == 8
    torch.optim.swa_utils.update_bn([torch.randn(4, 3, 32, 32)], average)
    assert tracker.steps == 2


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("compiled", [False, True])
def test_a_part_may_have_a_tracker_of_its_own(cases: Any, compiled: bool) -> None:
    """One tracker on the model, one on a block in it, in place at the same time."""
    case = cases["vit"]
    model = case.make()
    whole = fastcov.track(model, rows="all")
    part = fastcov.track(model.blocks[1], rows="all", where="both")
    forward = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    for seed in range(2):
        case.loss(forward, seed).backward()
    assert (whole.steps, part.steps) == (2, 2)
    for name in ("attn.qkv", "mlp.fc2"):
        assert part.count(name) == whole.count(f"blocks.1.{name}") == 2 * 4 * 17
        torch.testing.assert_close(
            part.covariance(name), whole.covariance(f"blocks.1.{name}"), rtol=1e-9, atol=0
        )
    model.blocks[1](torch.randn(1, 5, 48))  # outside the whole: a step of the part alone
    assert (whole.steps, part.steps) == (2, 3)
    part.close()
    case.loss(model, 2)
    assert (whole.steps, part.steps) == (3, 3)
