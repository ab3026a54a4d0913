"""The state that a run continues from: that of an object's parts, by name."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol


class Stateful(Protocol):
    """An object that can be saved and rolled back."""

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> Any: ...


class StateOfParts(ABC):
    """A `Stateful` whose state is that of its parts. An absent part is saved as None."""

    @abstractmethod
    def _parts(self) -> Mapping[str, Stateful | None]:
        """Everything that the next step depends on, by its name in the state."""

    def state_dict(self) -> dict[str, Any]:
        """All state that the next step depends on."""
        return {name: None if part is None else part.state_dict() for name, part in self._parts().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s state."""
        for name, part in self._parts().items():
            if part is not None:
                part.load_state_dict(state[name])
