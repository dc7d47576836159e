"""Copies, files, exports and other views of a tracked model; and what close() leaves."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov

IMAGE = torch.randn(2, 3, 32, 32)


def tracked(cases: Any, name: str = "vit", **options: Any) -> tuple[nn.Module, fastcov.Tracker]:
    model = cases[name].make()
    return model, fastcov.track(model, rows="all", **options)


def save_and_load(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "twin_of",
    [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m)), save_and_load],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_a_copy_does_not_feed_the_tracker(cases: Any, twin_of: Any) -> None:
    model, tracker = tracked(cases, where="both")
    model(IMAGE)
    twin = twin_of(model)
    if twin_of is not copy.copy:  # which shares the hooks, and the layers with them
        twin(IMAGE).sum().backward()
    assert tracker.steps == 1
    with fastcov.track(twin, rows="all", include="head") as own:
        twin(IMAGE)
    assert own.count("head") == 2
    model.load_state_dict(twin.state_dict())
    assert not [key for key in model.state_dict() if "fastcov" in key]


def test_a_shallow_copy_is_the_same_model(cases: Any) -> None:
    """copy.copy shares layers and hooks: its forward is a step like any other."""
    model, tracker = tracked(cases)
    copy.copy(model)(IMAGE)
    assert (tracker.steps, tracker.count("head")) == (1, 2)


def test_a_module_that_holds_its_own_tracker(cases: Any) -> None:
    """As in a LightningModule that keeps ``self.tracker``."""
    model, tracker = tracked(cases)
    model.tracker = tracker
    model(IMAGE)
    for twin in (copy.deepcopy(model), save_and_load(model)):
        twin(IMAGE)
        assert tracker.steps == 1
        assert twin.tracker.count("head") == 2  # what was seen until the copy was made
        assert twin.tracker.steps == 1
    model(IMAGE)
    assert tracker.count("head") == 4


def test_the_state_dict_of_a_model_is_untouched(cases: Any) -> None:
    plain = cases["resnet"].make().state_dict()
    model, _tracker = tracked(cases, "resnet")
    assert list(model.state_dict()) == list(plain)


def test_a_saved_model_loads_where_fastcov_is_tracking_nothing(cases: Any, tmp_path: Path) -> None:
    model, _tracker = tracked(cases)
    torch.save(model, tmp_path / "model.pt")
    torch.save(IMAGE, tmp_path / "image.pt")
    script = (
        "import sys, torch; folder = sys.argv[1];"
        "model = torch.load(folder + '/model.pt', weights_only=False);"
        "torch.save(model.eval()(torch.load(folder + '/image.pt')), folder + '/out.pt')"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    expected = model.eval()(IMAGE)
    torch.testing.assert_close(torch.load(tmp_path / "out.pt"), expected)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_exported_model_holds_nothing_of_the_tracker(
    cases: Any, strict: bool, training: bool
) -> None:
    model, tracker = tracked(cases, where="both")
    model.train(training)
    program = torch.export.export(model, (IMAGE,), strict=strict)
    targets = {str(node.target) for node in program.graph.nodes}
    assert not [target for target in targets if "fastcov" in target]
    assert not program.constants
    assert tracker.steps == 0
    model.train()
    model(IMAGE)
    program.module()(IMAGE)
    assert (tracker.steps, tracker.count("head")) == (1, 2)


def test_torch_jit_trace_records_the_model_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    tracker = fastcov.track(model, rows="all", where="both")
    x = torch.randn(2, 3, 8, 8)
    traced = torch.jit.trace(model, x, check_trace=False)
    assert "fastcov" not in str(traced.inlined_graph)
    assert tracker.steps == 0
    assert "torch.jit.trace are not read" in str(tracker.summary())
    traced(x)
    assert tracker.steps == 0
    model(x)
    assert tracker.steps == 1


def test_torch_jit_script_needs_close_first() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
    tracker = fastcov.track(model, rows="all")
    with pytest.raises(torch.jit.frontend.FrontendError, match=r"fastcov/watch/hooks\.py"):
        torch.jit.script(model)
    model(torch.randn(3, 4))
    assert tracker.count("0") == 3
    tracker.close()
    scripted = torch.jit.script(model)
    with pytest.raises(ValueError, match="nothing to track"):
        fastcov.track(scripted)


def test_fx_and_make_fx_graphs_hold_nothing_of_the_tracker(cases: Any) -> None:
    from torch.fx import symbolic_trace
    from torch.fx.experimental.proxy_tensor import make_fx

    model, tracker = tracked(cases, "mobilenet", where="both")
    graph = symbolic_trace(model)
    assert "fastcov" not in graph.code
    plain = make_fx(cases["mobilenet"].make())(IMAGE)
    assert make_fx(model)(IMAGE).code == plain.code
    assert tracker.count("classifier.1") == 2


def test_flop_counters_and_other_modes_see_the_model_alone(cases: Any) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils.flop_counter import FlopCounterMode

    class Recorder(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            self.seen.append(str(function))
            return function(*args, **(kwargs or {}))

    def run(track: bool) -> tuple[int, list[str]]:
        model = cases["llama"].make()
        tracker = fastcov.track(model, where="both", rows=0.5) if track else None
        with FlopCounterMode(display=False) as flops, Recorder() as recorder:
            cases["llama"].loss(model, 0).backward()
            cases["llama"].loss(model, 1).backward()
        assert tracker is None or tracker.count("lm_head") == 36
        return flops.get_total_flops(), recorder.seen

    assert run(track=True) == run(track=False)


def test_fake_tensors_leave_the_tracker_alone(cases: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode() as mode:
        model = cases["mobilenet"].make()
    tracker = fastcov.track(model, rows="all")
    with mode:
        model(torch.randn(2, 3, 32, 32)).sum().backward()
    assert tracker.count("classifier.1") == 0
    assert "gives tensors of type FakeTensor" in str(tracker.summary())


def test_closing_leaves_nothing_behind(cases: Any) -> None:
    model = cases["detector"].make()
    hooks = [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    attributes = [set(vars(m)) for m in model.modules()]
    with fastcov.track(model, where="both") as tracker, fastcov.track(model) as second:
        cases["detector"].loss(model, 0).backward()
        second.close()
        second.close()
        cases["detector"].loss(model, 1).backward()
    assert (tracker.steps, second.steps) == (2, 1)
    assert hooks == [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()]
    assert attributes == [set(vars(m)) for m in model.modules()]
    for module in model.modules():
        assert not module._forward_hooks_always_called
        assert not module._forward_pre_hooks_with_kwargs
    cases["detector"].loss(model, 2)
    assert tracker.steps == 2
    assert tracker.spectra()  # still readable


def test_neither_keeps_the_other_alive(cases: Any) -> None:
    model, tracker = tracked(cases)
    model(IMAGE).sum().backward()
    layer = weakref.ref(model.head)
    del model
    gc.collect()
    assert layer() is None
    assert tracker.count("head") == 2
    _model, tracker = tracked(cases)
    tracker.close()
    states = weakref.ref(tracker)
    del tracker
    gc.collect()
    assert states() is None


def test_inputs_and_activations_are_not_kept_alive(cases: Any) -> None:
    kept: list[weakref.ref[Tensor]] = []
    model, tracker = tracked(cases, where="both")
    model.blocks[0].register_forward_hook(lambda _m, _a, output: kept.append(weakref.ref(output)))
    model(IMAGE).sum().backward()
    gc.collect()
    assert [reference() for reference in kept] == [None]
    assert tracker.steps == 1


def test_data_parallel_replicas_are_refused_in_words() -> None:
    """Replicas as of torch.nn.DataParallel on several GPUs: copies that share their hooks."""
    model = nn.Sequential(nn.Linear(4, 4))
    replica = model._replicate_for_data_parallel()
    replica._modules["0"] = model[0]._replicate_for_data_parallel()
    for name, parameter in model[0].named_parameters():
        setattr(replica._modules["0"], name, parameter.detach())
    tracker = fastcov.track(model, rows="all")
    replica(torch.randn(3, 4))
    assert tracker.steps == 0
    assert "use DistributedDataParallel" in str(tracker.summary())
    wrapped = nn.DataParallel(model)  # one device or none: calls the module itself
    wrapped(torch.randn(3, 4))
    assert tracker.count("0") == 3
