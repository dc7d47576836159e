"""What is checked before a search starts, and read of an earlier process's work."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fastcov.widths import RULES
from fastcov_detection.config import ConfigError, SearchConfig, closest, load_config, to_dict
from fastcov_detection.files import write_text
from fastcov_detection.search.arms import check_arms
from fastcov_detection.search.results import read_result

# What a search may change when it goes on in a folder: everything else would mix two experiments.
_MAY_GROW = ("arms", "seeds", "peer_seeds", "jobs", "latency_runs")
# Where the data lies; its content is compared instead.
_PLACES = (
    "train.data.name",
    "train.data.root",
    "train.data.train_images",
    "train.data.train_annotations",
    "train.data.val_images",
    "train.data.val_annotations",
)
_DATA = "data.json"


def checked(config: SearchConfig) -> SearchConfig:
    """The configuration with its arms in order.

    Raises:
        ConfigError: If a setting is impossible.
    """
    for name in ("seeds", "rounds", "jobs", "measure_images", "latency_runs", "peer_seeds"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; give at least 1")
    if config.train.model.init != "random":
        raise ConfigError(
            f"model.init is {config.train.model.init!r}: pretrained weights fit one set of widths, "
            "and a search trains every set; use random"
        )
    if config.rule not in RULES:
        raise ConfigError(f"rule is {config.rule!r}{closest(config.rule, RULES)}")
    arms = check_arms(config.arms)
    for arm in arms:
        arm.check(config)
    return replace(config, arms=tuple(arm.name for arm in arms))


def check_same_search(folder: Path, config: SearchConfig) -> None:
    """Refuses a folder that holds another search.

    Raises:
        ConfigError: Naming the first setting that differs.
    """
    path = folder / "config.json"
    if path.exists():
        # A setting that came later had its default then.
        known = to_dict(load_config(SearchConfig, path))
        free = _PLACES if (folder / _DATA).exists() else ()
        for name, before, now in _differences(known, to_dict(config)):
            if name in free:
                continue
            if name.split(".")[0] not in _MAY_GROW:
                raise ConfigError(
                    f"{folder} holds a search with {name} = {before!r}, not {now!r}; "
                    "choose another folder, or the same settings to go on with it"
                )


def check_same_data(folder: Path, content: Mapping[str, str]) -> None:
    """Comparison of a search's data with what its folder remembers; a new folder remembers it.

    Args:
        folder: Of the search.
        content: Digests of the data set, as
            :func:`fastcov_detection.data.dataset.load_data` gives them.

    Raises:
        ConfigError: Naming what has changed.
    """
    path = folder / _DATA
    if not path.exists():
        write_text(path, json.dumps(dict(content), indent=2) + "\n")
        return
    known = json.loads(path.read_text(encoding="utf-8"))
    changed = [key for key in {**known, **content} if known.get(key) != content.get(key)]
    if changed:
        raise ConfigError(
            f"{folder} holds a search on other data: {', '.join(sorted(changed))} changed since; "
            "choose another folder"
        )


def recorded_latency(folder: Path) -> dict[str, float]:
    """What an earlier process measured, where it came to that."""
    if not (folder / "result.json").exists():
        return {}
    arms = read_result(folder)["arms"]
    return {name: arm["latency_ms"] for name, arm in arms.items() if arm["latency_ms"] is not None}


def _differences(before: Any, now: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    if isinstance(before, dict) and isinstance(now, dict):
        return [
            found
            for key in sorted(set(before) | set(now))
            for found in _differences(before.get(key), now.get(key), f"{prefix}{key}.")
        ]
    return [] if before == now else [(prefix.rstrip("."), before, now)]
