"""Training state as tensors and JSON: nested dictionaries and lists, taken apart for the store and put together again.

Nothing is ever pickled. A tensor's name is the Python subscript that reaches it, `['optimizer']['state'][0]['step']`:
names tell integer keys from strings and cannot collide.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from vaebm_fast.checkpoint.store import CheckpointError

_SCALARS = (bool, int, float, str, type(None))


def flatten(state: Any) -> tuple[dict[str, Tensor], Any]:
    """(tensors by name, structure as JSON values) of nested dictionaries, lists and tuples of tensors and scalars.

    Dictionary keys are str or int; scalars are bool, int, float, str and None, of exactly these types. Raises
    CheckpointError naming whatever else is found.
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
            raise CheckpointError(f"A checkpoint's keys are str or int, but state{name} has the key {wrong[0]!r}.")
        return {"dict": [[key, _flatten(value, f"{name}[{key!r}]", tensors)] for key, value in node.items()]}
    if type(node) in (list, tuple):
        items = [_flatten(value, f"{name}[{index}]", tensors) for index, value in enumerate(node)]
        return items if type(node) is list else {"tuple": items}
    if type(node) in _SCALARS:
        return node
    raise CheckpointError(f"A checkpoint holds tensors and plain values, but state{name} is a {type(node).__name__}.")


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
