"""Whether a run or a job continues with the settings it began with, which an older version may have saved."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

OLDER_DEFAULTS = {"random_crop": False, "temperature": 1.0, "start_temperature": 1.0}  # once no options
RENAMED = {"backend": {"cpu": "cpp"}}  # the present name of a value, by setting and older name


def in_present_terms(saved: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    """Saved settings with the renamed values, and with the defaults of those `names` that an older version left out."""
    older = {name: value for name, value in OLDER_DEFAULTS.items() if name in names}
    renamed = {name: values[saved[name]] for name, values in RENAMED.items() if saved.get(name) in values}
    return {**older, **saved, **renamed}


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """{name: (saved value, value now)} of the settings that differ, sorted by name; None for one that is missing."""
    names = sorted({*saved, *now})
    return {name: (saved.get(name), now.get(name)) for name in names if saved.get(name) != now.get(name)}
