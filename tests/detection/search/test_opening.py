"""Folders of an earlier search, or of an earlier version: which settings may change."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from fastcov_detection.config import SearchConfig, TrainConfig, save_config, to_dict
from fastcov_detection.errors import CheckpointError, ConfigError
from fastcov_detection.search.folder import check_same_search
from fastcov_detection.train.folder import check_same_run


def test_a_search_from_before_a_setting_existed_had_its_default(
    tiny_run: TrainConfig, tmp_path: Path
) -> None:
    config = SearchConfig(train=tiny_run)
    path = tmp_path / "config.json"
    save_config(config, path)
    kept = json.loads(path.read_text())
    del kept["power"], kept["train"]["track_rows"]
    path.write_text(json.dumps(kept))
    check_same_search(tmp_path, config)
    check_same_search(tmp_path, replace(config, seeds=3))  # may grow
    for before, is_same in ((5, True), (4, False)):  # None stands for all five
        kept["train"]["model"]["trainable_layers"] = before
        path.write_text(json.dumps(kept))
        if is_same:
            check_same_search(tmp_path, config)
        else:
            with pytest.raises(ConfigError, match=r"trainable_layers = 4, not 5"):
                check_same_search(tmp_path, config)
    kept["train"]["model"]["trainable_layers"] = None
    path.write_text(json.dumps(kept))
    with pytest.raises(ConfigError, match=r"power = 1\.0, not 0\.75"):
        check_same_search(tmp_path, replace(config, power=0.75))
    with pytest.raises(ConfigError, match=r"train\.track_rows = None, not 64"):
        check_same_search(tmp_path, replace(config, train=replace(tiny_run, track_rows=64)))


def test_a_run_from_before_a_setting_existed_had_its_default(
    tiny_run: TrainConfig, tmp_path: Path
) -> None:
    wanted = {"seed": 0, "config": to_dict(tiny_run), "widths": {}}
    config = to_dict(tiny_run)
    del config["track_rows"]
    saved = {**wanted, "config": config}
    check_same_run(saved, wanted, tmp_path)
    changed = to_dict(replace(tiny_run, track_rows=64))
    with pytest.raises(CheckpointError, match=r"track_rows = None, now it is 64"):
        check_same_run(saved, {**wanted, "config": changed}, tmp_path)
