"""Compares saved settings with current ones, including settings saved by older versions."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

OLDER_DEFAULTS = {"random_crop": False, "temperature": 1.0, "start_temperature": 1.0}  # not saved by older versions
RENAMED = {"backend": {"cpu": "cpp"}}  # {setting: {old value: new value}}


def in_present_terms(saved: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Saved settings with renamed values updated, and defaults added for those `names` that older versions lack."""
    older = {name: value for name, value in OLDER_DEFAULTS.items() if name in names}
    renamed = {name: values[saved[name]] for name, values in RENAMED.items() if saved.get(name) in values}
    return {**older, **saved, **renamed}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (saved, current)} for settings that differ, sorted by name; None stands for a missing value."""
    names = sorted({*saved, *now})
    return {name: (saved.get(name), now.get(name)) for name in names if saved.get(name) != now.get(name)}
