"""Compares saved settings with current ones, including settings saved by older versions."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Settings that older versions did not save, with the values they had.
OLDER_DEFAULTS = {
    "random_crop": False,
    "transform": "square",
    "temperature": 1.0,
    "start_temperature": 1.0,
    "flat": False,
}
OLD_DATA = "data"
RENAMED = {"backend": {"cpu": "cpp"}}  # {setting: {old value: new value}}


def in_present_terms(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Saved settings as the present version would have saved them, to be compared with `now`.

    Renamed values are updated, and defaults added for settings of `now` that older versions lack.
    """
    older = {name: value for name, value in OLDER_DEFAULTS.items() if name in now}
    renamed = {name: values[saved[name]] for name, values in RENAMED.items() if saved.get(name) in values}
    return _with_identified_data({**older, **saved, **renamed}, now)


def names_data_by_path(saved: Mapping[str, Any]) -> bool:
    """Whether an older version saved these settings, which named the data by its path and number of images only."""
    return OLD_DATA in saved


def _with_identified_data(saved: dict[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the data by its digest: for those that lack one, the present, if the number of images is known."""
    match = re.search(r", (\d+) images$", str(saved.get(OLD_DATA)))
    if match is None or "data_sha256" not in now:
        return saved
    del saved[OLD_DATA]
    return {**saved, "images": int(match[1]), "data_sha256": now["data_sha256"]}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (saved, current)} for settings that differ, sorted by name; None stands for a missing value."""
    names = sorted({*saved, *now})
    return {name: (saved.get(name), now.get(name)) for name in names if saved.get(name) != now.get(name)}
