"""Validation and JSON conversion shared by all configurations."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import asdict, fields
from typing import TYPE_CHECKING, Any, SupportsIndex

from vaebm_fast.runtime.errors import UserError
from vaebm_fast.runtime.files import expanded

if TYPE_CHECKING:
    from vaebm_fast.config.energy import EnergyConfig
    from vaebm_fast.config.nvae import NVAEConfig


def plain(value: Any) -> Any:
    """Scalars of other libraries, such as NumPy and torch, as Python's; arrays and sequences of them as tuples."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return tuple(map(plain, value))
    is_foreign = not isinstance(value, (int, float, str)) and hasattr(value, "__float__")  # Fraction, Decimal
    return float(value) if is_foreign else value


class PlainFields:
    """Base of frozen dataclasses: turns their fields into Python's scalars, which JSON can hold, and paths into Path.

    Raises UserError for an int field that is not a whole number and a float field that is not a number.
    """

    def __post_init__(self) -> None:
        for name, entry in self.__dataclass_fields__.items():  # type: ignore[attr-defined]
            value = plain(getattr(self, name))
            if entry.type in ("Path", "Path | None") and isinstance(value, str):
                value = expanded(value)
            if entry.type == "int" or (entry.type == "int | None" and value is not None):
                value = whole_number(name, value)
            if entry.type == "float":
                require(isinstance(value, (int, float)), f"{name} is {value!r}; it must be a number.")
            object.__setattr__(self, name, value)


def whole_number(name: str, value: SupportsIndex) -> int:
    """The value as an int. Raises UserError if it is not a whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{name} is {value!r}; it must be a whole number.") from None


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
