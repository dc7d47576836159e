from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastcov_detection.config import (
    PRESETS,
    ModelConfig,
    SearchConfig,
    TrainConfig,
    from_dict,
    load_config,
    preset,
    save_config,
    to_dict,
)
from fastcov_detection.detector.build import parse_name
from fastcov_detection.errors import ConfigError
from fastcov_detection.train.loop import learning_rate


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_survives_json(name: str, tmp_path: Path) -> None:
    config = SearchConfig(train=preset(name, "maskrcnn_resnet101_fpn"))
    save_config(config, tmp_path / "config.json")
    assert load_config(SearchConfig, tmp_path / "config.json") == config
    assert from_dict(SearchConfig, json.loads(json.dumps(to_dict(config)))) == config
    assert parse_name(config.train.model.name) == (True, 101)


def test_unknown_preset_names_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"'minni'.*did you mean 'mini'"):
        preset("minni")


def test_unknown_key_names_the_closest() -> None:
    with pytest.raises(ConfigError, match=r"model\.nrom.*did you mean 'model.norm'"):
        from_dict(TrainConfig, {"model": {"nrom": "batch"}})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"steps": "many"}, "steps is many; expected int"),
        ({"steps": True}, "steps is True"),
        ({"lr": None}, "lr is None"),
        (
            {"model": {"norm": "layer"}},
            "model.norm is layer; expected one of 'auto', 'batch', 'sync', 'group'",
        ),
        ({"model": 3}, "expected settings by name"),
        (
            {"data": {"scale_jitter": [0.5]}},
            r"data.scale_jitter is \[0.5\]; expected tuple\[float, float\]",
        ),
    ],
)
def test_wrong_values_are_named(values: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        from_dict(TrainConfig, values)


@pytest.mark.parametrize("text", ["{", "[1]"])
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.json").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.json"):
        load_config(TrainConfig, tmp_path / "c.json")
    with pytest.raises(ConfigError, match="no configuration at"):
        load_config(TrainConfig, tmp_path / "absent.json")


@pytest.mark.parametrize("name", ["fasterrcnn_resnet51_fpn", "resnet50", "retinanet_resnet50_fpn"])
def test_unknown_detectors_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="unknown detector"):
        parse_name(name)


def test_the_rate_warms_up_then_follows_its_schedule() -> None:
    config = TrainConfig(steps=100, warmup_steps=10, lr=1.0, milestones=(0.5, 0.75))
    steps = replace(config, schedule="step")
    assert learning_rate(steps, 0) == pytest.approx(0.1)
    assert learning_rate(steps, 9) == learning_rate(steps, 49) == 1.0
    assert learning_rate(steps, 50) == pytest.approx(0.1)
    assert learning_rate(steps, 99) == pytest.approx(0.01)
    cosine = replace(config, schedule="cosine", final_lr=0.02)
    rates = [learning_rate(cosine, step) for step in range(100)]
    assert rates[10] == 1.0
    assert rates[55] == pytest.approx(0.51)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(cosine, 100) == pytest.approx(0.02)


def test_stock_settings_are_torchvisions() -> None:
    config = ModelConfig()
    assert (config.min_size, config.max_size) == (800, 1333)
    assert config.anchor_sizes == (32, 64, 128, 256, 512)
