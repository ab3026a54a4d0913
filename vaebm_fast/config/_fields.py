"""Validation and JSON conversion shared by all configurations."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any

from vaebm_fast.runtime.errors import UserError

if TYPE_CHECKING:
    from vaebm_fast.config.energy import EnergyConfig
    from vaebm_fast.config.nvae import NVAEConfig


def require(condition: bool, sentence: str) -> None:
    """Raise ValueError with `sentence` unless the condition holds."""
    if not condition:
        raise UserError(sentence)


def require_positive(settings: object, *names: str) -> None:
    """Raise ValueError naming the first of these fields that is not above 0."""
    for name in names:
        value = getattr(settings, name)
        require(value > 0, f"{name} is {value}; it must be above 0.")


def require_not_negative(settings: object, *names: str) -> None:
    """Raise ValueError naming the first of these fields that is below 0."""
    for name in names:
        value = getattr(settings, name)
        require(value >= 0, f"{name} is {value}; it must not be negative.")


def to_json(config: NVAEConfig | EnergyConfig) -> dict[str, Any]:
    """The configuration as JSON values; inverse of `nvae_from_json` and `energy_from_json`."""
    return asdict(config)


def known_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` as a dictionary; raises ValueError naming keys that are not fields of `kind`."""
    names = {entry.name for entry in fields(kind)}
    unknown = sorted(set(values) - names)
    require(not unknown, f"{kind.__name__} has no field {', '.join(unknown)}; was this written by a newer version?")
    return dict(values)
