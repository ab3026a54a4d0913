"""Converts nested training state to named tensors plus JSON for `store`, and back, without pickle.

A tensor's name is the Python subscript that reaches it, such as `['optimizer']['state'][0]['step']`: names distinguish
integer from string keys and cannot collide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vaebm_fast.checkpoint.store import CheckpointError

_SCALARS = (bool, int, float, str, type(None))


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dictionaries, lists and tuples into (tensors by name, structure as JSON values).

    Dictionary keys are str or int; scalars are bool, int, float, str and None; subclasses are not accepted. Raises
    CheckpointError naming any other key or value.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _flatten(state, "", tensors)


def _flatten(node: Any, name: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        tensors[name] = node
        return {"tensor": name}
    if isinstance(node, Mapping):
        wrong = [key for key in node if type(key) not in (str, int)]
        if wrong:
            raise CheckpointError(f"Checkpoint keys must be str or int, but state{name} has the key {wrong[0]!r}.")
        return {"dict": [[key, _flatten(value, f"{name}[{key!r}]", tensors)] for key, value in node.items()]}
    if type(node) in (list, tuple):
        items = [_flatten(value, f"{name}[{index}]", tensors) for index, value in enumerate(node)]
        return items if type(node) is list else {"tuple": items}
    if type(node) in _SCALARS:
        return node
    raise CheckpointError(f"Checkpoint values must be tensors or scalars, but state{name} is a {type(node).__name__}.")


def unflatten(tensors: Mapping[str, Tensor], structure: Any) -> Any:
    """The inverse of `flatten`: equal values, keys, types, dtypes and shapes."""
    if isinstance(structure, list):
        return [unflatten(tensors, item) for item in structure]
    if not isinstance(structure, dict):
        return structure
    ((tag, content),) = structure.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "tuple":
        return tuple(unflatten(tensors, item) for item in content)
    return {key: unflatten(tensors, item) for key, item in content}
